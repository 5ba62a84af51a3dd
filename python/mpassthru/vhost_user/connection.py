"""One vhost-user socket: whole messages in and out, with their file descriptors, on the running event loop.

Messages are read exactly, header first and then `size` bytes, never further: the kernel hands out descriptors with the
bytes they were sent with, so that a descriptor found here belongs to the message being read and to no other.

Invariant: a descriptor that arrived is either in the `Message` returned or closed, whatever happens in between.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from typing import Self

from mpassthru.errors import ProtocolError, attempting, host_error
from mpassthru.vhost_user.message import (
    VHOST_MEMORY_BASELINE_NREGIONS,
    Header,
    Message,
    Payload,
    encode_message,
    request_name,
)

FD_BYTES = array.array("i").itemsize
ANCILLARY_BYTES = socket.CMSG_SPACE(VHOST_MEMORY_BASELINE_NREGIONS * FD_BYTES)


class Connection:
    """A connected SOCK_STREAM Unix socket, which it owns. One reader and one writer at a time."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock

    async def receive(self) -> Message | None:
        """Wait for the next message.

        Returns:
            The message, which owns its descriptors; None when the peer closed the connection between two messages.

        Raises:
            ProtocolError: a malformed header, a connection that ends inside a message, or more descriptors than any
                message carries.
            HostError: the kernel has no memory for it.
        """
        fds: list[int] = []
        try:
            head = await self._read_exactly(Header.LAYOUT.size, fds, "a header", may_end=True)
            if not head:
                return None
            header = Header.decode(head)
            payload = await self._read_exactly(header.size_bytes, fds, f"the payload of {request_name(header.request)}")
        except BaseException:
            _close_all(fds)
            raise
        return Message(header.request, header.flags, payload, fds)

    async def send(
        self,
        request: int,
        payload: Payload,
        *,
        reply: bool = False,
        need_reply: bool = False,
        fds: Sequence[int] = (),
    ) -> None:
        """Send one message; the descriptors stay the caller's.

        Raises:
            ConnectionError: the peer is gone.
            HostError: the kernel has no memory for it.
        """
        data = memoryview(encode_message(request, payload, reply=reply, need_reply=need_reply))
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while data:
            try:
                sent_bytes = self._socket.sendmsg([data], ancillary)
            except BlockingIOError:
                await self._ready(asyncio.get_running_loop().add_writer, asyncio.get_running_loop().remove_writer)
                continue
            except ConnectionError:
                raise
            except OSError as error:
                raise host_error(f"send {request_name(request)}", error) from error
            ancillary = []  # descriptors go once, with the first byte
            data = data[sent_bytes:]

    def close(self) -> None:
        """Close the socket. Harmless when repeated."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _read_exactly(self, size_bytes: int, fds: list[int], what: str, *, may_end: bool = False) -> bytes:
        """Read `size_bytes`, or nothing at all where the stream `may_end`; descriptors are appended to `fds`."""
        data = bytearray()
        while len(data) < size_bytes:
            try:
                chunk = self._receive_some(size_bytes - len(data), fds, what)
            except BlockingIOError:
                await self._ready(asyncio.get_running_loop().add_reader, asyncio.get_running_loop().remove_reader)
                continue
            except ConnectionResetError:
                chunk = b""  # a peer killed with unread replies; the same end as a close
            except OSError as error:
                raise host_error(f"receive {what}", error) from error
            if not chunk and may_end and not data:
                break
            if not chunk:
                raise ProtocolError(f"the connection ended after {len(data)} of the {size_bytes} bytes of {what}")
            data += chunk
        return bytes(data)

    def _receive_some(self, size_bytes: int, fds: list[int], what: str) -> bytes:
        flags = socket.MSG_CMSG_CLOEXEC
        chunk, ancillary, message_flags, _ = self._socket.recvmsg(size_bytes, ANCILLARY_BYTES, flags)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.extend(array.array("i", data[: len(data) - len(data) % FD_BYTES]))
        if message_flags & socket.MSG_CTRUNC:
            # Also what the kernel reports when this process may not open another descriptor.
            raise ProtocolError(
                f"descriptors were lost with {what}: more than {VHOST_MEMORY_BASELINE_NREGIONS} were sent, "
                "or this process is at its limit (ulimit -n)"
            )
        return chunk

    async def _ready(
        self,
        add: Callable[[socket.socket, Callable[[], None]], None],
        remove: Callable[[socket.socket], bool],
    ) -> None:
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        with attempting("wait for the vhost-user socket"):
            add(self._socket, wake)
        try:
            await ready
        finally:
            remove(self._socket)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
