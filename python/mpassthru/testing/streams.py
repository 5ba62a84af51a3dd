"""Two TCP streams between a guest and its peer, one each way, that last as long as they are wanted.

Both carry the same random bytes over and over, and the application that receives them compares every single byte: the
peer in this process, the guest by ``cmp``. A byte lost, changed or delivered twice shifts all that follow, and shows.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from mpassthru.testing.child import ChildError
from mpassthru.testing.qemu import QemuGuest
from mpassthru.testing.scenario_qemu import GUEST_FILE, Peer, random_file, send_file_to_guest

_PATTERN_BYTES = 1 << 20
_CHUNK_BYTES = 64 * 1024
_SEND_BUFFER_BYTES = 256 * 1024
"""Little enough that what was sent is soon received."""
_CONNECT_TIMEOUT_S = 10.0
_END_TIMEOUT_S = 60.0

# The guest is the client, so that the peer's sockets are there first. What cmp says stays in a file.
_START_IN_GUEST = f"""
cd /tmp && mkfifo expected counted
(while cat {GUEST_FILE}; do :; done) > expected 2> /dev/null &
wc -c < counted > rx.bytes &
(nc {{host}} {{rx_port}} < /dev/null | tee counted | cmp - expected > rx.verdict 2>&1) &
(while cat {GUEST_FILE}; do :; done | nc {{host}} {{tx_port}}) > /dev/null 2>&1 &
"""
_END_IN_GUEST = "cd /tmp; until [ -s rx.verdict ] && [ -s rx.bytes ]; do usleep 20000; done; cat rx.bytes rx.verdict"
_ALL_EQUAL = "cmp: EOF on -"
"""What cmp says when the stream ends before anything differed."""


class StreamFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What the applications received, every byte as it was sent; rx is towards the guest."""

    rx_bytes: int
    tx_bytes: int


class Streams:
    """Both streams while they run.

    Attributes:
        sent_bytes: Sent towards the guest.
        received_bytes: Received from it, and found right.
    """

    def __init__(self, pattern: bytes, rx: socket.socket, tx: socket.socket) -> None:
        self.sent_bytes = 0
        self.received_bytes = 0
        self._pattern = pattern * 2  # a chunk never wraps around
        self._rx, self._tx = rx, tx
        self._ending = False
        self._news = asyncio.Condition()
        self._moving = [asyncio.create_task(self._send()), asyncio.create_task(self._receive())]

    async def until_more(self, more_bytes: int = 1 << 20, *, timeout_s: float = 30.0) -> None:
        """Wait until both streams have moved so much from now on.

        Raises:
            ChildError: a stream broke, or carried what was not sent.
            TimeoutError: one stands still.
        """
        sent, received = self.sent_bytes + more_bytes, self.received_bytes + more_bytes
        try:
            async with asyncio.timeout(timeout_s), self._news:
                await self._news.wait_for(
                    lambda: self._broke() or (self.sent_bytes >= sent and self.received_bytes >= received)
                )
        except TimeoutError:
            missing = (max(0, sent - self.sent_bytes), max(0, received - self.received_bytes))
            raise TimeoutError(f"a stream stands still: {missing} bytes, rx and tx, lack after {timeout_s} s") from None
        self._check()

    async def end(self, guest: QemuGuest) -> StreamFigures:
        """End both streams and hear from both applications.

        Raises:
            ChildError: a stream broke, or carried what was not sent.
            TimeoutError: the guest does not say.
        """
        self._check()
        self._ending = True
        async with asyncio.timeout(_END_TIMEOUT_S):
            await self._moving[0]
        self._moving[1].cancel()
        self._tx.close()
        answer = await guest.run(_END_IN_GUEST, timeout_s=_END_TIMEOUT_S)
        counted, verdict = answer.output.strip().split("\n", 1)
        if verdict.strip() != _ALL_EQUAL or int(counted) != self.sent_bytes:
            raise ChildError(f"the guest received {counted} of {self.sent_bytes} bytes, and says: {verdict}")
        return StreamFigures(rx_bytes=int(counted), tx_bytes=self.received_bytes)

    def close(self) -> None:
        """Drop both connections."""
        for task in self._moving:
            task.cancel()
        self._rx.close()
        self._tx.close()

    def _broke(self) -> bool:
        return any(task.done() for task in self._moving)

    def _check(self) -> None:
        for task in self._moving:
            if task.done():
                task.result()
                raise ChildError("a stream ended early")

    async def _send(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while not self._ending:
                start = self.sent_bytes % _PATTERN_BYTES
                await loop.sock_sendall(self._rx, self._pattern[start : start + _CHUNK_BYTES])
                await self._moved(sent_bytes=_CHUNK_BYTES)
            self._rx.shutdown(socket.SHUT_WR)
        except OSError as error:
            await self._moved()
            raise ChildError(f"the stream towards the guest broke after {self.sent_bytes} bytes: {error}") from error

    async def _receive(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while chunk := await loop.sock_recv(self._tx, _CHUNK_BYTES):
                start = self.received_bytes % _PATTERN_BYTES
                if chunk != self._pattern[start : start + len(chunk)]:
                    raise ChildError(f"wrong bytes from the guest, {self.received_bytes} to {len(chunk)} more in")
                await self._moved(received_bytes=len(chunk))
        except OSError as error:
            raise ChildError(f"the stream from the guest broke after {self.received_bytes} bytes: {error}") from error
        finally:
            await self._moved()

    async def _moved(self, *, sent_bytes: int = 0, received_bytes: int = 0) -> None:
        async with self._news:
            self.sent_bytes += sent_bytes
            self.received_bytes += received_bytes
            self._news.notify_all()


@asynccontextmanager
async def running_streams(guest: QemuGuest, peer: Peer) -> AsyncIterator[Streams]:
    """Run both streams for the length of the block, or until `Streams.end`.

    Raises:
        ChildError: the guest cannot start them.
        TimeoutError: it does not connect.
    """
    pattern = random_file(_PATTERN_BYTES)
    if not (await send_file_to_guest(guest, peer, pattern)).intact:
        raise ChildError("the guest has not received the pattern")
    with peer.listen() as rx_listener, peer.listen() as tx_listener:
        host, rx_port = rx_listener.getsockname()
        _, tx_port = tx_listener.getsockname()
        await guest.run(_START_IN_GUEST.format(host=host, rx_port=rx_port, tx_port=tx_port))
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            rx, tx = await _accept(rx_listener), await _accept(tx_listener)
    rx.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    streams = Streams(pattern, rx, tx)
    try:
        yield streams
    finally:
        streams.close()


async def _accept(listener: socket.socket) -> socket.socket:
    listener.setblocking(False)
    connection, _ = await asyncio.get_running_loop().sock_accept(listener)
    return connection
