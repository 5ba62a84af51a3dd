"""The front-end side of vhost-user: what a VMM would send, for tests and for the built-in guest.

Each method is one message and waits for its answer. Once REPLY_ACK is negotiated every message asks for an
acknowledgement, so that a refusal is an exception where it happened. Descriptors passed in stay the caller's.
vhost-user.rst, "Front-end message types".
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Self, TypeVar

from mpassthru.errors import HostError, ProtocolError, RefusedError, errno_name
from mpassthru.vhost_user.connection import Connection
from mpassthru.vhost_user.features import ProtocolFeature, VirtioFeature
from mpassthru.vhost_user.inflight import InflightArea
from mpassthru.vhost_user.memory import MemoryRegion
from mpassthru.vhost_user.message import (
    U64,
    Empty,
    Inflight,
    LogDescription,
    MacAddress,
    Message,
    Payload,
    RegionTable,
    Request,
    SingleRegion,
    VringAddress,
    VringFile,
    VringState,
)

Reply = TypeVar("Reply", U64, VringState)


class Frontend:
    """One connection to a back-end.

    Attributes:
        features: Acknowledged with SET_FEATURES.
        protocol_features: Acknowledged with SET_PROTOCOL_FEATURES.
    """

    def __init__(self, connection: Connection, *, timeout_s: float = 5.0) -> None:
        """Speak over `connection`, which it owns; `timeout_s` seconds bound every exchange."""
        self.features = 0
        self.protocol_features = 0
        self._connection = connection
        self._timeout_s = timeout_s
        self._exchange = asyncio.Lock()

    @classmethod
    async def connect(cls, path: str | Path, *, timeout_s: float = 5.0) -> Self:
        """Connect to the socket that a back-end listens on.

        Raises:
            HostError: nobody listens there, or it may not be reached.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            await asyncio.get_running_loop().sock_connect(sock, str(path))
        except OSError as error:
            sock.close()
            reason = f"cannot connect to {path} ({errno_name(error.errno)}): is a back-end listening there?"
            raise HostError(error.errno or 0, reason) from error
        except BaseException:
            sock.close()
            raise
        return cls(Connection(sock), timeout_s=timeout_s)

    @classmethod
    def from_socket(cls, sock: socket.socket, *, timeout_s: float = 5.0) -> Self:
        """Speak over a connected socket, which it owns from now on."""
        return cls(Connection(sock), timeout_s=timeout_s)

    def close(self) -> None:
        """Disconnect. Harmless when repeated."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- negotiation ---------------------------------------------------------------------------------------

    async def negotiate(self, features: int, protocol_features: int) -> int:
        """Own the session and acknowledge what is both wanted and offered.

        Returns:
            The virtio features acknowledged, also in `features`.
        """
        await self.set_owner()
        offered = await self.get_features()
        if offered & VirtioFeature.VHOST_USER_F_PROTOCOL_FEATURES:
            await self.set_protocol_features(await self.get_protocol_features() & protocol_features)
        await self.set_features(offered & (features | VirtioFeature.VHOST_USER_F_PROTOCOL_FEATURES))
        return self.features

    async def get_features(self) -> int:
        """Virtio features offered."""
        return (await self._ask(Request.VHOST_USER_GET_FEATURES, Empty(), U64)).value

    async def set_features(self, features: int) -> None:
        """Acknowledge virtio features."""
        await self._tell(Request.VHOST_USER_SET_FEATURES, U64(features))
        self.features = features

    async def get_protocol_features(self) -> int:
        """Protocol features offered."""
        return (await self._ask(Request.VHOST_USER_GET_PROTOCOL_FEATURES, Empty(), U64)).value

    async def set_protocol_features(self, features: int) -> None:
        """Acknowledge protocol features. Never acknowledged itself: whether that is possible is what it decides."""
        self.protocol_features = 0
        await self._tell(Request.VHOST_USER_SET_PROTOCOL_FEATURES, U64(features))
        self.protocol_features = features

    async def set_owner(self) -> None:
        """Start the session."""
        await self._tell(Request.VHOST_USER_SET_OWNER, Empty())

    async def reset_owner(self) -> None:
        """Deprecated by the specification; old front-ends send it."""
        await self._tell(Request.VHOST_USER_RESET_OWNER, Empty())

    async def get_queue_num(self) -> int:
        """Queue pairs that the back-end has."""
        return (await self._ask(Request.VHOST_USER_GET_QUEUE_NUM, Empty(), U64)).value

    # ---- guest memory --------------------------------------------------------------------------------------

    async def set_mem_table(self, regions: Sequence[MemoryRegion]) -> None:
        """Replace the memory table; at most 8 regions."""
        table = RegionTable(tuple(region.description for region in regions))
        await self._tell(Request.VHOST_USER_SET_MEM_TABLE, table, [region.fd for region in regions])

    async def get_max_mem_slots(self) -> int:
        """Regions that the back-end can hold."""
        return (await self._ask(Request.VHOST_USER_GET_MAX_MEM_SLOTS, Empty(), U64)).value

    async def add_mem_reg(self, region: MemoryRegion) -> None:
        """Add one region."""
        await self._tell(Request.VHOST_USER_ADD_MEM_REG, SingleRegion(region.description), [region.fd])

    async def rem_mem_reg(self, region: MemoryRegion) -> None:
        """Remove one region."""
        await self._tell(Request.VHOST_USER_REM_MEM_REG, SingleRegion(region.description))

    # ---- vrings --------------------------------------------------------------------------------------------

    async def set_vring_num(self, index: int, size: int) -> None:
        """Size of the ring, in descriptors."""
        await self._tell(Request.VHOST_USER_SET_VRING_NUM, VringState(index, size))

    async def set_vring_addr(self, address: VringAddress) -> None:
        """Where the parts of the ring are, in user addresses."""
        await self._tell(Request.VHOST_USER_SET_VRING_ADDR, address)

    async def set_vring_base(self, index: int, base: int) -> None:
        """The avail index that the device looks at first."""
        await self._tell(Request.VHOST_USER_SET_VRING_BASE, VringState(index, base))

    async def get_vring_base(self, index: int) -> int:
        """Stop the ring; returns the avail index that the device would have looked at next."""
        state = await self._ask(Request.VHOST_USER_GET_VRING_BASE, VringState(index, 0), VringState)
        if state.index != index:
            raise ProtocolError(f"GET_VRING_BASE: asked for vring {index}, answered for vring {state.index}")
        return state.num

    async def set_vring_kick(self, index: int, fd: int | None) -> None:
        """The eventfd by which the driver notifies; starts the ring. None asks for polling."""
        await self._set_vring_file(Request.VHOST_USER_SET_VRING_KICK, index, fd)

    async def set_vring_call(self, index: int, fd: int | None) -> None:
        """The eventfd by which the device notifies; None for no notifications."""
        await self._set_vring_file(Request.VHOST_USER_SET_VRING_CALL, index, fd)

    async def set_vring_err(self, index: int, fd: int | None) -> None:
        """The eventfd that announces a faulted ring; None for none."""
        await self._set_vring_file(Request.VHOST_USER_SET_VRING_ERR, index, fd)

    async def set_vring_enable(self, index: int, enabled: bool) -> None:
        """Enable or disable the ring."""
        await self._tell(Request.VHOST_USER_SET_VRING_ENABLE, VringState(index, int(enabled)))

    async def get_inflight_fd(self, queues: int, queue_size: int) -> InflightArea:
        """Have the back-end make an area for what is in flight; the caller closes it."""
        request = Request.VHOST_USER_GET_INFLIGHT_FD
        async with self._exchange, asyncio.timeout(self._timeout_s):
            await self._send(request, Inflight(0, 0, queues, queue_size), (), need_reply=False)
            with await self._receive_message(request) as message:
                description = Inflight.decode(message.payload)
                if len(message.fds) != 1:
                    raise ProtocolError(f"GET_INFLIGHT_FD: the back-end sent {len(message.fds)} descriptors")
                return InflightArea(description, message.take_fds()[0])

    async def set_inflight_fd(self, area: InflightArea) -> None:
        """Hand over the area for what is in flight, before vrings start."""
        await self._tell(Request.VHOST_USER_SET_INFLIGHT_FD, area.description, [area.fd])

    async def set_log_base(self, fd: int | None, size_bytes: int, mmap_offset: int = 0) -> int:
        """Where written pages are logged; returns the back-end's answer, 0 if it will log there."""
        description = LogDescription(size_bytes, mmap_offset)
        return (await self._ask(Request.VHOST_USER_SET_LOG_BASE, description, U64, [] if fd is None else [fd])).value

    async def set_log_fd(self, fd: int) -> None:
        """The eventfd that tells of logged pages."""
        await self._tell(Request.VHOST_USER_SET_LOG_FD, Empty(), [fd])

    # ---- device --------------------------------------------------------------------------------------------

    async def set_status(self, status: int) -> None:
        """The virtio device status, as the driver wrote it."""
        await self._tell(Request.VHOST_USER_SET_STATUS, U64(status))

    async def get_status(self) -> int:
        """The virtio device status."""
        return (await self._ask(Request.VHOST_USER_GET_STATUS, Empty(), U64)).value

    async def reset_device(self) -> None:
        """Back to the initial state, with every ring disabled."""
        await self._tell(Request.VHOST_USER_RESET_DEVICE, Empty())

    async def set_mtu(self, mtu_bytes: int) -> None:
        """The MTU that the driver was told."""
        await self._tell(Request.VHOST_USER_NET_SET_MTU, U64(mtu_bytes))

    async def send_rarp(self, mac: bytes) -> None:
        """Ask for a RARP with the guest's MAC address to be sent to the wire."""
        await self._tell(Request.VHOST_USER_SEND_RARP, MacAddress(mac))

    async def set_backend_req_fd(self, fd: int) -> None:
        """Hand over the socket for requests of the back-end."""
        await self._tell(Request.VHOST_USER_SET_BACKEND_REQ_FD, Empty(), [fd])

    # ---- exchanges -----------------------------------------------------------------------------------------

    async def _set_vring_file(self, request: Request, index: int, fd: int | None) -> None:
        await self._tell(request, VringFile(index, has_fd=fd is not None), [] if fd is None else [fd])

    async def _tell(self, request: Request, payload: Payload, fds: Sequence[int] = ()) -> None:
        """Send a message without an answer of its own, and wait for the acknowledgement if there will be one.

        Raises:
            RefusedError: the back-end answered that it failed.
            ProtocolError: the back-end hung up, or answered something else.
        """
        acknowledged = bool(self.protocol_features & ProtocolFeature.VHOST_USER_PROTOCOL_F_REPLY_ACK)
        async with self._exchange, asyncio.timeout(self._timeout_s):
            await self._send(request, payload, fds, need_reply=acknowledged)
            if acknowledged and (code := (await self._receive(request, U64)).value):
                name = request.name.removeprefix("VHOST_USER_")
                raise RefusedError(f"{name}: the back-end refused ({code}); its log says why")

    async def _ask(self, request: Request, payload: Payload, kind: type[Reply], fds: Sequence[int] = ()) -> Reply:
        async with self._exchange, asyncio.timeout(self._timeout_s):
            await self._send(request, payload, fds, need_reply=False)
            return await self._receive(request, kind)

    async def _send(self, request: Request, payload: Payload, fds: Sequence[int], *, need_reply: bool) -> None:
        try:
            await self._connection.send(request, payload, need_reply=need_reply, fds=fds)
        except ConnectionError as error:
            name = request.name.removeprefix("VHOST_USER_")
            raise ProtocolError(f"{name}: the back-end closed the connection; its log says why") from error

    async def _receive(self, request: Request, kind: type[Reply]) -> Reply:
        with await self._receive_message(request) as message:
            return kind.decode(message.payload)

    async def _receive_message(self, request: Request) -> Message:
        name = request.name.removeprefix("VHOST_USER_")
        message = await self._connection.receive()
        if message is None:
            raise ProtocolError(f"{name}: the back-end closed the connection; its log says why")
        if not message.is_reply or message.request != request:
            message.close()
            raise ProtocolError(f"{name}: the back-end answered with {message.name}, flags {message.flags:#x}")
        return message
