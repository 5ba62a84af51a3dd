"""The channel between the broker and a worker: typed messages and file descriptors over one socket pair.

The broker holds the privileges, the worker holds the guest's memory; all that they say to each other is here. A message
is one MessagePack object in one SOCK_SEQPACKET record, tagged with its type, and may carry file descriptors
(SCM_RIGHTS). Volumes are tiny (a few messages a second), so a full socket buffer means that the other side hangs.

Invariant: the broker never trusts a worker. What comes in is decoded into the types below or refused, descriptors that
no message asked for are closed, and nothing that a worker says names a path, an address or an interface.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
from typing import Generic, Literal, TypeVar

import msgspec

from mpassthru.errors import MpassthruError, attempting, errno_name
from mpassthru.report import DirectionReport
from mpassthru.rules import ZeroCopyRules

MESSAGE_MAX_BYTES = 65536
MESSAGE_MAX_FDS = 4

Mode = Literal["auto", "zero-copy", "copy", "packet"]
SocketMode = Literal["zero-copy", "copy", "packet"]
PollMode = Literal["busy", "adaptive", "interrupt"]
GuestState = Literal["waiting", "connected", "running"]
"""`waiting` for a front-end; `connected` to one; `running`: at least one virtqueue runs."""


class ControlError(MpassthruError):
    """The other process broke the control protocol, hangs, or is gone."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all messages of a channel."""


class Binding(msgspec.Struct, frozen=True, kw_only=True):
    """What a port's sockets are bound to, and how."""

    serial: int
    """Tells it from all others of the port's life."""
    interface: str
    ifindex: int
    driver: str | None = None
    """Of the interface, for messages, and to remember one that is not to be trusted."""
    queue_ids: tuple[int, ...]
    """Hardware queue of each queue pair, in order."""
    mtu_bytes: int
    frame_max_bytes: int
    """The longest frame, without the virtio-net header."""
    room_bytes: int
    """What the kernel may write of it to one guest buffer, in copy mode; the rules of zero-copy mode have their own."""
    socket_mode: SocketMode
    zero_copy_rules: ZeroCopyRules | None = None
    """Set if `socket_mode` is `zero-copy`."""


# ---- broker to worker ----------------------------------------------------------------------------------------


class Configure(Message, frozen=True):
    """The first message: everything a worker is told about its port and about itself.

    Carries one fd: the memory file of `mpassthru.inflight_records`.
    """

    queue_pairs: int
    poll: PollMode
    binding: Binding | None
    """None: what the guest sends goes nowhere until there is one."""
    longer_buffers: bool = False
    """Offer VIRTIO_NET_F_HASH_REPORT for its side effect; the same all of a port's life, whatever it is bound to."""
    tx_offloads: bool = False
    """The guest may leave checksums and segmentation to us; the same all of a port's life too."""
    rx_offloads: bool = False
    """The guest may take frames merged; the same all of a port's life too."""
    source_addresses: tuple[bytes, ...] | None = None
    """What frames from the guest may have as their source; None for any."""
    pins_memory: bool = True
    """Not so in mode `packet`."""
    unproven: tuple[int, ...] = ()
    """Queue pairs of which a worker before this one may have had a zero-copy socket; no NIC was seen to have let go."""
    uid: int | None = None
    """The worker's user and group; None for both if the broker's own, who is not root then."""
    gid: int | None = None
    keep_ipc_lock: bool = False
    """The memlock limit could not be raised: CAP_IPC_LOCK has to stay."""


class Rebind(Message, frozen=True):
    """Asks for the port's sockets on another interface, or on the same in another way, or on none; see `Rebound`."""

    binding: Binding | None


class FrontendConnected(Message, frozen=True):
    """Carries one fd: a connected vhost-user socket from which no byte has been read."""


class SocketGranted(Message, frozen=True):
    """Answers `SocketWanted`; carries one fd: a new AF_XDP socket, not yet bound, or a packet socket, which is."""

    queue_pair: int


class SocketSteered(Message, frozen=True):
    """Answers `SocketBound`: the queue's frames go to the socket from now on."""

    queue_pair: int


class SocketFreed(Message, frozen=True):
    """Answers `SocketReleased`, if that was asked for: the kernel has let go of the socket's buffers."""

    queue_pair: int


class SocketRefused(Message, frozen=True):
    """Answers any of the above's questions: `error` says why not, `errno` is 0 if no system call failed."""

    queue_pair: int
    errno: int
    error: str


class MemoryGranted(Message, frozen=True):
    """Answers `MemoryWanted`: so much may be locked."""


class MemoryRefused(Message, frozen=True):
    """Answers `MemoryWanted`: `error` says why not, `errno` is 0 if no system call failed.

    What was granted before stays.
    """

    errno: int
    error: str


class ReportWanted(Message, frozen=True):
    """Asks for a `WorkerReport`."""


class Stop(Message, frozen=True):
    """Asks the worker to give everything back, send a last `WorkerReport` and end."""


BrokerMessage = (
    Configure
    | Rebind
    | FrontendConnected
    | SocketGranted
    | SocketSteered
    | SocketFreed
    | SocketRefused
    | MemoryGranted
    | MemoryRefused
    | ReportWanted
    | Stop
)


# ---- worker to broker ----------------------------------------------------------------------------------------


class Ready(Message, frozen=True):
    """Privileges are dropped; a front-end may come."""


class MemoryWanted(Message, frozen=True):
    """Asks to have so much memory locked in all, in place of what was granted before; 0 when none is any more."""

    locked_bytes: int


class SocketWanted(Message, frozen=True):
    """Asks for an AF_XDP socket for a queue pair."""

    queue_pair: int
    binding: int
    """Serial number of what it is to be bound to."""


class SocketBound(Message, frozen=True):
    """The socket of a queue pair is bound and can take frames."""

    queue_pair: int
    mode: SocketMode


class SocketReleased(Message, frozen=True):
    """The socket of a queue pair is closed; its queue drops frames until the next one."""

    queue_pair: int
    await_free: bool = False
    """Answer when no NIC can write to the buffers of any socket that the queue pair had (zero-copy mode; copy mode ends
    with the close). A socket that was granted meanwhile stays granted."""


class Rebound(Message, frozen=True):
    """Answers `Rebind`: every queue pair that had a socket, or needs one, has another; or `error` says why not.

    Then those that could be given a socket have one. If none could be had to begin with, all is as it was before.
    `errno` is 0 if no system call failed.
    """

    errno: int = 0
    error: str | None = None


class SessionChanged(Message, frozen=True):
    """The guest's state; `error` says why a session ended, if it did not end by the front-end's will."""

    state: GuestState
    error: str | None = None


class Fault(Message, frozen=True):
    """The guest broke a virtqueue, which was stopped; the others go on."""

    vring: int
    error: str


class Resumed(Message, frozen=True):
    """A virtqueue goes on where an earlier worker ended, which had `buffers` of it."""

    vring: int
    buffers: int


class Notice(Message, frozen=True):
    """Something worth a line for the user that stopped nothing."""

    text: str
    trouble: bool = False
    """Something failed, such as a message of the front-end that was refused."""


class WorkerReport(Message, frozen=True):
    """The counters of the port since this worker started."""

    rx: DirectionReport
    tx: DirectionReport


SocketMessage = MemoryWanted | SocketWanted | SocketBound | SocketReleased
WorkerMessage = Ready | SocketMessage | Rebound | SessionChanged | Fault | Resumed | Notice | WorkerReport

Outgoing = TypeVar("Outgoing", bound=Message)
Incoming = TypeVar("Incoming", bound=Message)


class ControlChannel(Generic[Outgoing, Incoming]):
    """One end of the channel. Sending never blocks; receiving waits on the running asyncio loop.

    If a message cannot be sent, as when the other process does not read, the channel is over for both, whoever sends:
    `receive` tells.
    """

    def __init__(self, sock: socket.socket, incoming: object) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._failure: ControlError | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)

    def send(self, message: Outgoing, fds: tuple[int, ...] = ()) -> None:
        """Send a message with copies of `fds`, which stay the caller's.

        Raises:
            ControlError: the other process is gone, or has not read for so long that the buffer is full; or the kernel
                has no memory for it.
        """
        if self._failure is not None:
            raise self._failure
        data = self._encoder.encode(message)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
        try:
            self._sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
        except OSError as error:
            name = type(message).__name__
            failure = ControlError(f"cannot send {name} on the control socket ({errno_name(error.errno)})")
            if not isinstance(error, ConnectionError):  # which is the end of the channel anyway
                self._failure = failure
                self._sock.shutdown(socket.SHUT_RDWR)
            raise failure from error

    async def receive(self) -> tuple[Incoming, list[int]] | None:
        """Wait for the next message.

        Returns:
            The message and the fds that came with it, which are the caller's to close; None at end of file.

        Raises:
            ControlError: not a message of this direction, or too large; or sending has failed, or the kernel.
        """
        # There may always be a next message: other tasks get their turn between two.
        await asyncio.sleep(0)
        while True:
            try:
                received = self._receive_now()
            except BlockingIOError:
                await self._readable()
                continue
            if received is None and self._failure is not None:
                raise self._failure
            return received

    def close(self) -> None:
        """Close this end; the other one reads end of file."""
        self._sock.close()

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        fd = self._sock.fileno()
        with attempting("wait for the control socket"):
            loop.add_reader(fd, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(fd)

    def _receive_now(self) -> tuple[Incoming, list[int]] | None:
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                MESSAGE_MAX_BYTES, socket.CMSG_SPACE(MESSAGE_MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError:
            return None
        except BlockingIOError:
            raise
        except OSError as error:
            raise ControlError(f"cannot receive on the control socket ({errno_name(error.errno)})") from error
        fds = _received_fds(ancillary)
        if not data and not fds:
            return None
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            close_fds(fds)
            raise ControlError(f"a control message has more than {MESSAGE_MAX_BYTES} bytes or {MESSAGE_MAX_FDS} fds")
        try:
            return self._decoder.decode(data), fds
        except msgspec.DecodeError as error:
            close_fds(fds)
            raise ControlError(f"cannot decode a control message: {error}") from error


def broker_channel(sock: socket.socket) -> ControlChannel[BrokerMessage, WorkerMessage]:
    """The broker's end of the channel."""
    return ControlChannel(sock, WorkerMessage)


def worker_channel(sock: socket.socket) -> ControlChannel[WorkerMessage, BrokerMessage]:
    """The worker's end of the channel."""
    return ControlChannel(sock, BrokerMessage)


def close_fds(fds: list[int]) -> None:
    """Close descriptors that came with a message."""
    for fd in fds:
        os.close(fd)


def _received_fds(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)
