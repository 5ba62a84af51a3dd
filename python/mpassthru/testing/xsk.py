"""A small AF_XDP socket in plain Python: receives frames one at a time, for tests of steering and of kernel facts.

And a kernel that answers wrongly, in the rings of somebody else's socket.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import select
import signal
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mpassthru.netdev import af_xdp

RING_DESCS = 64
_PAGE_OFFSETS = {"rx": 0, "fill": 0x100000000}
_LOOK_AGAIN_S = 0.05
_STATISTICS = struct.Struct("=6Q")
_OFFSETS = struct.Struct("=16Q")
_RX_DESC = struct.Struct("=QII")
_INDEX = struct.Struct("=I")


class _Ring:
    """One mapped ring; offsets are those of XDP_MMAP_OFFSETS."""

    def __init__(self, fd: int, offsets: tuple[int, ...], page_offset: int, entry: struct.Struct, descs: int) -> None:
        producer, consumer, self._start, _flags = offsets
        self._entry, self._descs = entry, descs
        self._map = mmap.mmap(fd, self._start + descs * entry.size, mmap.MAP_SHARED, offset=page_offset)
        self._producer = ctypes.c_uint32.from_buffer(self._map, producer)
        self._consumer = ctypes.c_uint32.from_buffer(self._map, consumer)

    def produce(self, *entries: int) -> None:
        index = self._producer.value
        for position, entry in enumerate(entries, index):
            self._entry.pack_into(self._map, self._at(position), entry)
        self._producer.value = index + len(entries)

    def consume(self) -> tuple[int, ...] | None:
        index = self._consumer.value
        if index == self._producer.value:
            return None
        entry = self._entry.unpack_from(self._map, self._at(index))
        self._consumer.value = index + 1
        return entry

    def _at(self, index: int) -> int:
        return self._start + index % self._descs * self._entry.size

    def close(self) -> None:
        del self._producer, self._consumer
        self._map.close()


@dataclass(slots=True)
class Xsk:
    """A bound socket with a UMEM of its own."""

    socket: socket.socket
    memory: mmap.mmap
    rx: _Ring
    fill: _Ring

    def post(self, *chunks: int) -> None:
        """Give chunks of the UMEM to the kernel, all at once, and let a zero-copy driver know."""
        self.fill.produce(*(chunk * af_xdp.CHUNK_SIZE_BYTES for chunk in chunks))
        select.select([self.socket], [], [], 0)

    def answer(self, timeout_s: float = 2.0) -> tuple[int, bytes] | None:
        """The next received frame, and the chunk that the kernel says it is in; None after `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        while (entry := self.rx.consume()) is None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return None
            # A driver that asks to be woken just after it was looked at is woken by the next look.
            select.select([self.socket], [], [], min(left_s, _LOOK_AGAIN_S))
        address, length, _options = entry
        return address // af_xdp.CHUNK_SIZE_BYTES, self.memory[address : address + length]

    def receive(self, timeout_s: float = 2.0) -> bytes | None:
        """The next frame, whose chunk is given to the kernel again; None after `timeout_s` seconds."""
        answer = self.answer(timeout_s)
        if answer is None:
            return None
        self.post(answer[0])
        return answer[1]

    def statistics(self) -> tuple[int, ...]:
        """`struct xdp_statistics`; the first is rx_dropped, the fifth rx_fill_ring_empty_descs."""
        value = self.socket.getsockopt(af_xdp.SOL_XDP, af_xdp.XDP_STATISTICS, _STATISTICS.size)
        return _STATISTICS.unpack(value)


@contextmanager
def bound_xsk(
    ifindex: int,
    queue_id: int = 0,
    *,
    headroom_bytes: int = 0,
    mode: af_xdp.Mode = "copy",
    ring_descs: int = RING_DESCS,
    posted: int = RING_DESCS,
) -> Iterator[Xsk]:
    """Bind a socket; the rings are unmapped before it is closed, for they would hold it open.

    Args:
        ifindex: Of the current network namespace.
        queue_id: 0-based.
        headroom_bytes: Of the UMEM.
        mode: The mode to bind in.
        ring_descs: Descriptors of each ring, and half the chunks of the UMEM.
        posted: How many of these are in the fill ring from the start.
    """
    memory = mmap.mmap(-1, 2 * ring_descs * af_xdp.CHUNK_SIZE_BYTES)
    sock = af_xdp.open_xsk_socket()
    rings: list[_Ring] = []
    try:
        af_xdp.register_umem(sock, memory, headroom_bytes=headroom_bytes)
        af_xdp.set_ring_sizes(sock, ring_descs)
        offsets = _ring_offsets(sock)
        rx = _Ring(sock.fileno(), offsets[0:4], _PAGE_OFFSETS["rx"], _RX_DESC, ring_descs)
        rings.append(rx)
        fill = _Ring(sock.fileno(), offsets[8:12], _PAGE_OFFSETS["fill"], struct.Struct("=Q"), ring_descs)
        rings.append(fill)
        fill.produce(*(chunk * af_xdp.CHUNK_SIZE_BYTES for chunk in range(posted)))
        af_xdp.bind(sock, ifindex=ifindex, queue_id=queue_id, mode=mode)
        yield Xsk(sock, memory, rx, fill)
    finally:
        for ring in rings:
            ring.close()
        sock.close()
        memory.close()


@asynccontextmanager
async def answering_twice(pid: int, *, frames: int, ring_descs: int, timeout_s: float = 5.0) -> AsyncIterator[None]:
    """Have the kernel name a buffer a second time, as a driver does that has lost its way.

    The process is stopped; the block is to send it at least `frames` frames; then the rx ring of its AF_XDP socket is
    changed behind its back, so that the first `frames` of them name the first one's buffer, and the process goes on.

    Args:
        pid: Of a process with one AF_XDP socket, whose rx ring is empty.
        frames: At least two.
        ring_descs: Descriptors of that ring.
        timeout_s: Seconds to wait for the process to stop, and for the frames.

    Raises:
        LookupError: it has no AF_XDP socket.
        TimeoutError: it does not stop, or the frames do not arrive, in time.
    """
    async with stopped(pid, timeout_s=timeout_s):
        yield
        await _repeat_first(pid, frames, ring_descs, timeout_s)


@asynccontextmanager
async def stopped(pid: int, *, timeout_s: float = 5.0) -> AsyncIterator[None]:
    """Stop a process, all its threads, for the block: what arrives meanwhile it sees all at once.

    Args:
        pid: Of the process.
        timeout_s: Seconds to wait for it to stop.

    Raises:
        TimeoutError: it does not stop in time.
    """
    os.kill(pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(timeout_s):
            while not _has_stopped(pid):  # noqa: ASYNC110 - a process that is not ours tells nobody
                await asyncio.sleep(0.005)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def _repeat_first(pid: int, frames: int, ring_descs: int, timeout_s: float) -> None:
    with af_xdp.open_xsk_socket() as sock:
        producer_at, consumer_at, start, _flags = _ring_offsets(sock)[:4]
    ring = _rx_mapping(pid)
    memory = os.open(f"/proc/{pid}/mem", os.O_RDWR)

    def read(offset: int, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(os.pread(memory, layout.size, ring + offset))

    try:
        (consumed,) = read(consumer_at, _INDEX)
        async with asyncio.timeout(timeout_s):
            while (read(producer_at, _INDEX)[0] - consumed) % (1 << 32) < frames:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.005)
        at = [start + index % ring_descs * _RX_DESC.size for index in range(consumed, consumed + frames)]
        first = _RX_DESC.pack(*read(at[0], _RX_DESC))
        for offset in at[1:]:
            os.pwrite(memory, first, ring + offset)
    finally:
        os.close(memory)


def _has_stopped(pid: int) -> bool:
    states = (task.read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").glob("*/stat"))
    return all(state == "T" for state in states)


def _ring_offsets(sock: socket.socket) -> tuple[int, ...]:
    return _OFFSETS.unpack(sock.getsockopt(af_xdp.SOL_XDP, af_xdp.XDP_MMAP_OFFSETS, _OFFSETS.size))


def _rx_mapping(pid: int) -> int:
    """Where a process has its rx ring mapped."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, _access, offset, _device, _inode, *name = line.split()
        if name and name[0].startswith("socket:") and int(offset, 16) == _PAGE_OFFSETS["rx"]:
            return int(addresses.partition("-")[0], 16)
    raise LookupError(f"process {pid} has no AF_XDP socket with an rx ring")
