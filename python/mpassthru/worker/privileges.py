"""Giving up privileges for good, before a byte of the front-end is read.

`drop` leaves: a user that is not root, in no other group than its own; no capability, or CAP_IPC_LOCK alone; empty
inheritable, ambient and bounding sets; `no_new_privs`; an empty network namespace where that can be had (AF_XDP sockets
keep the one they were made in); a process that leaves no core dump with guest memory in it, and that no other process
of its user can trace; SIGKILL when the broker dies. See capabilities(7) for the rules used.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
from typing import Final

from mpassthru.errors import HostError, attempting, errno_name

CAP_SETGID: Final = 6
CAP_IPC_LOCK: Final = 14

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_KEEPCAPS: Final = 8
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CLONE_NEWNET: Final = 0x40000000
_LINUX_CAPABILITY_VERSION_3: Final = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent_pid: int) -> None:
    """Ask for SIGKILL when the parent ends.

    Args:
        parent_pid: Who the parent was when this process was started; if it is already gone, this process ends now.

    Raises:
        HostError: prctl failed.
    """
    _prctl("follow the broker's end", _PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        raise SystemExit(0)


def drop(*, parent_pid: int, uid: int | None = None, gid: int | None = None, keep_ipc_lock: bool = False) -> None:
    """Give up every privilege but, if asked for, CAP_IPC_LOCK. There is no way back.

    Everything that is needed later has to be imported before: the new user may not be able to read it.

    Args:
        parent_pid: See `die_with_parent`.
        uid: User to become; None keeps the present one, which must not be root.
        gid: Group to become. Set together with `uid`.
        keep_ipc_lock: Keep CAP_IPC_LOCK, if this process has it.

    Raises:
        HostError: a step failed; the process must not go on.
    """
    kept = {CAP_IPC_LOCK} & permitted_capabilities() if keep_ipc_lock else set()
    _enter_empty_network()
    _clear_bounding_set()
    _prctl("keep capabilities over the change of user", _PR_SET_KEEPCAPS, 1)
    _become(uid, gid)
    _prctl("clear the ambient set", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _capset(kept)
    _prctl("set no_new_privs", _PR_SET_NO_NEW_PRIVS, 1)
    _prctl("forbid core dumps", _PR_SET_DUMPABLE, 0)
    # The change of user has cleared it (prctl(2), PR_SET_PDEATHSIG).
    die_with_parent(parent_pid)


def permitted_capabilities(status: str | None = None) -> set[int]:
    """The permitted capabilities of this process, or of the process whose /proc/PID/status is given."""
    return _capability_set("CapPrm", status)


def effective_capabilities(status: str | None = None) -> set[int]:
    """The effective capabilities of this process, or of the process whose /proc/PID/status is given."""
    return _capability_set("CapEff", status)


def _capability_set(field: str, status: str | None) -> set[int]:
    if status is None:
        with attempting("read this process's capabilities from /proc/self/status"), open("/proc/self/status") as file:
            status = file.read()
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            bits = int(value, 16)
            return {number for number in range(bits.bit_length()) if bits >> number & 1}
    raise ValueError(f"no {field} line in a /proc/PID/status")


def _enter_empty_network() -> None:
    """A network namespace of its own, with nothing in it. Needs CAP_SYS_ADMIN; without it the present one stays."""
    if _libc.unshare(_CLONE_NEWNET) and ctypes.get_errno() not in (errno.EPERM, errno.ENOSPC, errno.EINVAL):
        raise _error("enter an empty network namespace")


def _clear_bounding_set() -> None:
    """So that no exec can gain a capability. Without CAP_SETPCAP it cannot be done; no_new_privs then has to do."""
    capability = 0
    while _libc.prctl(_PR_CAPBSET_READ, capability, 0, 0, 0) >= 0:
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) and ctypes.get_errno() != errno.EPERM:
            raise _error(f"drop capability {capability} from the bounding set")
        capability += 1


def _become(uid: int | None, gid: int | None) -> None:
    try:
        # A user that stays the same may have no say in its groups, which are no more than its own then.
        if uid is not None or CAP_SETGID in effective_capabilities():
            os.setgroups([])
        if uid is not None and gid is not None:
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
    except OSError as error:
        raise HostError(
            error.errno or 0,
            f"the worker cannot become user {uid} ({errno_name(error.errno)}): "
            "give the broker CAP_SETUID and CAP_SETGID",
        ) from error
    if 0 in os.getresuid():
        raise HostError(
            errno.EPERM, "the worker cannot run as root, who opens root's files without any capability: use --user"
        )


def _capset(capabilities: set[int]) -> None:
    """Make `capabilities` the permitted and effective sets; the inheritable set is emptied."""
    bits = sum(1 << number for number in capabilities)
    low, high = bits & 0xFFFFFFFF, bits >> 32
    header = struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    data = struct.pack("=6I", low, low, 0, high, high, 0)
    if _libc.capset(header, data):
        raise _error("give up capabilities")


def _prctl(attempt: str, option: int, argument: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0):
        raise _error(attempt)


def _error(attempt: str) -> HostError:
    number = ctypes.get_errno()
    return HostError(number, f"the worker cannot {attempt} ({errno_name(number)})")
