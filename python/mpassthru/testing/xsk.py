"""A small AF_XDP socket in plain Python: receives frames one at a time, for tests of steering and of kernel facts."""

from __future__ import annotations

import ctypes
import mmap
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mpassthru.netdev import af_xdp

RING_DESCS = 64
_PAGE_OFFSETS = {"rx": 0, "fill": 0x100000000}
_STATISTICS = struct.Struct("=6Q")


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
        entry = self.rx.consume()
        if entry is None and select.select([self.socket], [], [], timeout_s)[0]:
            entry = self.rx.consume()
        if entry is None:
            return None
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
        offsets = struct.unpack("=16Q", sock.getsockopt(af_xdp.SOL_XDP, af_xdp.XDP_MMAP_OFFSETS, 128))
        rx = _Ring(sock.fileno(), offsets[0:4], _PAGE_OFFSETS["rx"], struct.Struct("=QII"), ring_descs)
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
