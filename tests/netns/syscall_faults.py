"""Makes a chosen system call of a program fail, of its threads and children too, and lists the calls that it makes.

A seccomp filter has the kernel ask us before each call that can fail for want of something, and we answer: go on, or
this errno (seccomp_unotify(2)). Nothing of the program under test is changed, and no call escapes, whichever library
makes it.

As a program it is the launcher: it installs the filter upon itself, hands the listening descriptor over, and becomes
the command. `supervised` is the other side.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import socket
import struct
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

SUPPORTED = platform.machine() == "x86_64"
"""The numbers below are those of one architecture."""

NUMBERS = {
    9: "mmap",
    16: "ioctl",
    41: "socket",
    42: "connect",
    44: "sendto",
    46: "sendmsg",
    47: "recvmsg",
    49: "bind",
    50: "listen",
    53: "socketpair",
    54: "setsockopt",
    55: "getsockopt",
    56: "clone",
    58: "vfork",
    72: "fcntl",
    87: "unlink",
    91: "fchmod",
    94: "lchown",
    116: "setgroups",
    117: "setresuid",
    119: "setresgid",
    126: "capset",
    157: "prctl",
    233: "epoll_ctl",
    257: "openat",
    260: "fchownat",
    272: "unshare",
    288: "accept4",
    290: "eventfd2",
    291: "epoll_create1",
    293: "pipe2",
    302: "prlimit64",
    319: "memfd_create",
    321: "bpf",
    434: "pidfd_open",
    435: "clone3",
}

_ERRNOS: dict[str, tuple[int, ...]] = {
    "mmap": (errno.ENOMEM,),
    "ioctl": (errno.EOPNOTSUPP, errno.ENODEV, errno.ENOMEM),
    "socket": (errno.EMFILE, errno.ENOBUFS, errno.EAFNOSUPPORT, errno.EPERM),
    "connect": (errno.EAGAIN, errno.EACCES),
    "sendto": (errno.ENOBUFS, errno.ENOMEM),
    "sendmsg": (errno.ENOBUFS, errno.ETOOMANYREFS),
    "recvmsg": (errno.ENOMEM,),
    "bind": (errno.ENOMEM, errno.EADDRINUSE, errno.EBUSY, errno.ENODEV, errno.EINVAL),
    "listen": (errno.EADDRINUSE,),
    "socketpair": (errno.EMFILE, errno.ENFILE),
    "setsockopt": (errno.ENOMEM, errno.ENOBUFS, errno.ENOPROTOOPT, errno.EPERM),
    "getsockopt": (errno.ENOPROTOOPT, errno.EINVAL),
    "clone": (errno.EAGAIN, errno.ENOMEM),
    "vfork": (errno.EAGAIN, errno.ENOMEM),
    "fcntl": (errno.EMFILE,),
    "unlink": (errno.EROFS,),
    "fchmod": (errno.EPERM,),
    "lchown": (errno.EPERM,),
    "setgroups": (errno.EPERM, errno.ENOMEM),
    "setresuid": (errno.EAGAIN, errno.EPERM),
    "setresgid": (errno.EAGAIN, errno.EPERM),
    "capset": (errno.EPERM,),
    "prctl": (errno.EINVAL, errno.EPERM),
    "epoll_ctl": (errno.ENOMEM, errno.ENOSPC),
    "openat": (errno.EMFILE, errno.EACCES, errno.ENOENT),
    "fchownat": (errno.EPERM,),
    "unshare": (errno.ENOMEM, errno.EPERM, errno.ENOSPC),
    "accept4": (errno.EMFILE, errno.ECONNABORTED),
    "eventfd2": (errno.EMFILE, errno.ENOMEM),
    "epoll_create1": (errno.EMFILE, errno.ENOMEM),
    "pipe2": (errno.EMFILE,),
    "prlimit64": (errno.EPERM,),
    "memfd_create": (errno.EMFILE, errno.ENOMEM),
    "bpf": (errno.ENOMEM, errno.EPERM, errno.EINVAL, errno.E2BIG),
    "pidfd_open": (errno.EMFILE, errno.ENOMEM),
    "clone3": (errno.EAGAIN, errno.ENOMEM),
}
_ERRNOS_OF_DETAIL = {
    "SIOCGIFNAME": (errno.ENODEV,),
    "XDP_UMEM_REG": (errno.ENOMEM, errno.ENOBUFS, errno.EFAULT, errno.EINVAL),
    "XDP_MAX_TX_SKB_BUDGET": (errno.ENOPROTOOPT, errno.EINVAL),
    "AF_XDP SOCK_RAW": (errno.ENOBUFS, errno.ENOMEM, errno.EBUSY, errno.ENODEV, errno.ENETDOWN, errno.EINVAL),
}


def errnos_of(call: Call) -> tuple[int, ...]:
    """What a call may plausibly fail with; the likeliest first."""
    return _ERRNOS_OF_DETAIL.get(call.detail) or _ERRNOS[call.name]


BPF_COMMANDS = ("MAP_CREATE", "MAP_LOOKUP_ELEM", "MAP_UPDATE_ELEM", "MAP_DELETE_ELEM", "MAP_GET_NEXT_KEY", "PROG_LOAD")
BPF_COMMAND_NAMES = {**dict(enumerate(BPF_COMMANDS)), 18: "BTF_LOAD", 28: "LINK_CREATE", 34: "LINK_DETACH"}
SOL_XDP_OPTIONS = (
    "",
    "XDP_MMAP_OFFSETS",
    "XDP_RX_RING",
    "XDP_TX_RING",
    "XDP_UMEM_REG",
    "XDP_UMEM_FILL_RING",
    "XDP_UMEM_COMPLETION_RING",
    "XDP_STATISTICS",
    "XDP_OPTIONS",
    "XDP_MAX_TX_SKB_BUDGET",
)
SOL_XDP = 283
AF_XDP = 44
SIOCETHTOOL = 0x8946
SIOCGIFNAME = 0x8910
F_DUPFD_CLOEXEC = 1030
EPOLL_CTL_ADD = 1
PR_CAPBSET_READ = 23
"""Fails for a capability that the kernel does not know, and never else."""
PROT_NONE, MAP_FIXED, MAP_ANONYMOUS, MAP_STACK = 0, 0x10, 0x20, 0x20000
FILES = ("/proc/", "/sys/", "/etc/passwd", "/etc/group")
"""Opened by us; other files are those of imports."""

_SET_MODE_FILTER, _NEW_LISTENER, _SYS_SECCOMP, _SYS_PIDFD_GETFD = 1, 8, 317, 438
_RET_USER_NOTIF, _RET_ALLOW = 0x7FC00000, 0x7FFF0000
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NOTIF = struct.Struct("=QIIiIQ6Q")
"""`struct seccomp_notif`: id, pid, flags; the call's number, architecture, instruction pointer, arguments."""
_RESPONSE = struct.Struct("=QqiI")
_RECV, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Call:
    """A kind of call: who makes it, and what it is about."""

    role: str
    name: str
    detail: str

    def __str__(self) -> str:
        return f"{self.role} {self.name}({self.detail})"


@dataclass(frozen=True, slots=True)
class Fault:
    """The `occurrence`th call of a kind, counted from 1, fails with `errno`."""

    call: Call
    occurrence: int
    errno: int

    def __str__(self) -> str:
        return f"{self.call} #{self.occurrence} {errno.errorcode[self.errno]}"


class Supervisor:
    """Answers the kernel's questions about one program.

    Attributes:
        calls: How often each kind of call was made.
        injected: Whether the fault has happened.
        prefix: Command to run the program with.
    """

    def __init__(self, listener: socket.socket, path: Path, fault: Fault | None) -> None:
        self.calls: Counter[Call] = Counter()
        self.injected = False
        self.prefix = (sys.executable, __file__, str(path))
        self._listener = listener
        self._fault = fault
        self._fd = -1
        self._broker = 0
        self._looping: set[int] = set()
        """Processes that have an event loop: what they were loaded from is mapped."""

    async def serve(self) -> None:
        """Take over from the launcher, then answer until cancelled."""
        loop = asyncio.get_running_loop()
        connection, _ = await loop.sock_accept(self._listener)
        with connection:
            (self._broker, *_) = struct.unpack("=3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            (theirs,) = struct.unpack("=i", await loop.sock_recv(connection, 4))
            self._fd = _descriptor_of(self._broker, theirs)
            loop.add_reader(self._fd, self._answer)
            try:
                await loop.sock_sendall(connection, b"!")
                await loop.create_future()
            finally:
                loop.remove_reader(self._fd)
                os.close(self._fd)

    def _answer(self) -> None:
        notification = bytearray(_NOTIF.size)
        try:
            fcntl.ioctl(self._fd, _RECV, notification)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):
                return  # killed while it waited for us
            raise
        identity, thread, _, number, _, _, *arguments = _NOTIF.unpack(notification)
        error_number = self._decide(thread, NUMBERS[number], arguments)
        flags = 0 if error_number else _CONTINUE
        with contextlib.suppress(OSError):  # killed while we thought about it
            fcntl.ioctl(self._fd, _SEND, bytearray(_RESPONSE.pack(identity, 0, -error_number, flags)))

    def _decide(self, thread: int, name: str, arguments: list[int]) -> int:
        try:
            process = _process_of(thread)
            detail = describe(process, name, arguments)
        except OSError:
            return 0  # it is gone, or the call is about a descriptor that is not there
        if detail is None:
            return 0
        if name == "socketpair":
            self._looping.add(process)
        if name == "mmap" and process not in self._looping:
            return 0  # of a library that the interpreter loads
        call = Call("broker" if process == self._broker else "worker", name, detail)
        self.calls[call] += 1
        if self._fault is None or self._fault.call != call or self._fault.occurrence != self.calls[call]:
            return 0
        self.injected = True
        return self._fault.errno


@asynccontextmanager
async def supervised(path: Path, fault: Fault | None = None) -> AsyncIterator[Supervisor]:
    """Supervise the program that is started with `prefix` within the block. `path` is where its launcher reports."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.setblocking(False)
        supervisor = Supervisor(listener, path, fault)
        serving = asyncio.create_task(supervisor.serve())
        try:
            yield supervisor
        finally:
            serving.cancel()
            outcome = (await asyncio.gather(serving, return_exceptions=True))[0]
            path.unlink()  # noqa: ASYNC240 (takes no time)
    assert isinstance(outcome, asyncio.CancelledError), outcome


# ---- what a call is about ------------------------------------------------------------------------------------


def describe(process: int, name: str, arguments: list[int]) -> str | None:
    """What a call is about, in words that are the same in each run; None if it is not of interest."""
    describe_one = _DESCRIBE.get(name)
    return describe_one(process, arguments) if describe_one else ""


def _describe_mmap(process: int, arguments: list[int]) -> str | None:
    _address, _length, protection, flags, fd, offset = arguments
    if not flags & MAP_ANONYMOUS:
        target = os.readlink(f"/proc/{process}/fd/{ctypes.c_int(fd).value}")
        if target.startswith("socket:"):
            return f"AF_XDP ring {offset:#x}"
        return "guest memory" if target.startswith("/memfd:") else None
    if flags & MAP_STACK:
        return "stack of a thread"
    if protection == PROT_NONE:
        return "reserve"
    return "anonymous, fixed" if flags & MAP_FIXED else None  # the interpreter's heap is not our subject


def _describe_ioctl(process: int, arguments: list[int]) -> str | None:
    _fd, request, pointer, *_ = arguments
    if request == SIOCETHTOOL:
        (data,) = struct.unpack_from("=Q", _memory(process, pointer, 24), 16)
        return f"SIOCETHTOOL {struct.unpack('=I', _memory(process, data, 4))[0]:#x}"
    return "SIOCGIFNAME" if request == SIOCGIFNAME else None  # the others set flags, which cannot fail


def _describe_socket(_process: int, arguments: list[int]) -> str:
    return f"{_family(arguments[0])} {_type(arguments[1])}"


def _describe_by_fd(process: int, arguments: list[int]) -> str:
    # Named though unknown: Python would ask for its address otherwise, and an AF_XDP socket has none.
    copy = _descriptor_of(process, ctypes.c_int(arguments[0]).value)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=copy) as sock:
        family, kind = (sock.getsockopt(socket.SOL_SOCKET, option) for option in (socket.SO_DOMAIN, socket.SO_TYPE))
        return f"{_family(family)} {_type(kind)}"


def _describe_option(process: int, arguments: list[int]) -> str | None:
    _fd, level, option, *_ = arguments
    if level == SOL_XDP:
        return SOL_XDP_OPTIONS[option]
    if level == socket.SOL_SOCKET and option in (socket.SO_TYPE, socket.SO_DOMAIN, socket.SO_PROTOCOL):
        return None  # which cannot fail
    return f"{_describe_by_fd(process, arguments)} {level}:{option}"


def _describe_open(process: int, arguments: list[int]) -> str | None:
    path = _memory(process, arguments[1], 256).split(b"\0", 1)[0].decode(errors="replace")
    return path.replace(f"/{process}/", "/PID/") if path.startswith(FILES) else None


def _describe_fcntl(_process: int, arguments: list[int]) -> str | None:
    return "F_DUPFD_CLOEXEC" if arguments[1] == F_DUPFD_CLOEXEC else None


_DESCRIBE: dict[str, Callable[[int, list[int]], str | None]] = {
    "mmap": _describe_mmap,
    "ioctl": _describe_ioctl,
    "socket": _describe_socket,
    "socketpair": _describe_socket,
    **dict.fromkeys(("connect", "sendto", "sendmsg", "recvmsg", "bind", "listen", "accept4"), _describe_by_fd),
    "setsockopt": _describe_option,
    "getsockopt": _describe_option,
    "openat": _describe_open,
    "fcntl": _describe_fcntl,
    "bpf": lambda _process, arguments: BPF_COMMAND_NAMES.get(arguments[0], str(arguments[0])),
    "prctl": lambda _process, arguments: None if arguments[0] == PR_CAPBSET_READ else str(arguments[0]),
    "prlimit64": lambda _process, arguments: f"{arguments[1]}" if arguments[2] else None,
    "epoll_ctl": lambda _process, arguments: "ADD" if arguments[1] == EPOLL_CTL_ADD else None,
}


def _family(number: int) -> str:
    return "AF_XDP" if number == AF_XDP else socket.AddressFamily(number).name


def _type(number: int) -> str:
    return socket.SocketKind(number & 0xF).name


def _memory(process: int, address: int, size_bytes: int) -> bytes:
    with open(f"/proc/{process}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(size_bytes)


def _process_of(thread: int) -> int:
    for line in Path(f"/proc/{thread}/status").read_text().splitlines():
        if line.startswith("Tgid:"):
            return int(line.split()[1])
    raise ProcessLookupError(thread)


def _descriptor_of(process: int, fd: int) -> int:
    """A descriptor of ours for what is open in another process (pidfd_getfd(2))."""
    pidfd = os.pidfd_open(process)
    try:
        copy = _libc.syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0)
    finally:
        os.close(pidfd)
    if copy < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return int(copy)


# ---- the launcher --------------------------------------------------------------------------------------------


def _install_filter() -> int:
    """Have the kernel ask about every call of `NUMBERS` from now on; the descriptor that it asks through."""
    last = len(NUMBERS) + 1
    instructions = [struct.pack("=HBBI", _LOAD, 0, 0, 0)]
    for position, number in enumerate(NUMBERS, 1):
        instructions.append(struct.pack("=HBBI", _JUMP_EQUAL, last - position, 0, number))
    instructions.append(struct.pack("=HBBI", _RETURN, 0, 0, _RET_ALLOW))
    instructions.append(struct.pack("=HBBI", _RETURN, 0, 0, _RET_USER_NOTIF))
    code = ctypes.create_string_buffer(b"".join(instructions))
    program = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(instructions), ctypes.addressof(code)))
    fd = _libc.syscall(_SYS_SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER, program)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return int(fd)


def main() -> None:
    """`syscall_faults.py SOCKET COMMAND...`."""
    path, *command = sys.argv[1:]
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    word = ctypes.create_string_buffer(struct.pack("=i", _install_filter()))
    # Only calls that the filter lets through, until somebody answers it.
    os.write(connection.fileno(), word.raw[:4])
    os.read(connection.fileno(), 1)
    connection.close()
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
