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
_FRAMES = 128
_PAGE_OFFSETS = {"rx": 0, "fill": 0x100000000}
_STATISTICS = struct.Struct("=6Q")


class _Ring:
    """One mapped ring; offsets are those of XDP_MMAP_OFFSETS."""

    def __init__(self, fd: int, offsets: tuple[int, ...], page_offset: int, entry: struct.Struct) -> None:
        producer, consumer, self._descs, _flags = offsets
        self._entry = entry
        self._map = mmap.mmap(fd, self._descs + RING_DESCS * entry.size, mmap.MAP_SHARED, offset=page_offset)
        self._producer = ctypes.c_uint32.from_buffer(self._map, producer)
        self._consumer = ctypes.c_uint32.from_buffer(self._map, consumer)

    def produce(self, *entry: int) -> None:
        index = self._producer.value
        self._entry.pack_into(self._map, self._descs + index % RING_DESCS * self._entry.size, *entry)
        self._producer.value = index + 1

    def consume(self) -> tuple[int, ...] | None:
        index = self._consumer.value
        if index == self._producer.value:
            return None
        entry = self._entry.unpack_from(self._map, self._descs + index % RING_DESCS * self._entry.size)
        self._consumer.value = index + 1
        return entry

    def close(self) -> None:
        del self._producer, self._consumer
        self._map.close()


@dataclass(slots=True)
class Xsk:
    """A bound socket with every frame of its own UMEM in the fill ring."""

    socket: socket.socket
    memory: mmap.mmap
    rx: _Ring
    fill: _Ring

    def receive(self, timeout_s: float = 2.0) -> bytes | None:
        """The next frame, or None after `timeout_s` seconds."""
        entry = self.rx.consume()
        if entry is None and select.select([self.socket], [], [], timeout_s)[0]:
            entry = self.rx.consume()
        if entry is None:
            return None
        address, length, _options = entry
        frame = self.memory[address : address + length]
        self.fill.produce(address & ~(af_xdp.CHUNK_SIZE_BYTES - 1))
        return frame

    def statistics(self) -> tuple[int, ...]:
        """`struct xdp_statistics`; the first is rx_dropped, the fifth rx_fill_ring_empty_descs."""
        value = self.socket.getsockopt(af_xdp.SOL_XDP, af_xdp.XDP_STATISTICS, _STATISTICS.size)
        return _STATISTICS.unpack(value)


@contextmanager
def bound_xsk(ifindex: int, queue_id: int = 0, *, headroom_bytes: int = 0) -> Iterator[Xsk]:
    """Bind a socket in copy mode; the rings are unmapped before it is closed, for they would hold it open."""
    memory = mmap.mmap(-1, _FRAMES * af_xdp.CHUNK_SIZE_BYTES)
    sock = af_xdp.open_xsk_socket()
    rings: list[_Ring] = []
    try:
        af_xdp.register_umem(sock, memory, headroom_bytes=headroom_bytes)
        af_xdp.set_ring_sizes(sock, RING_DESCS)
        offsets = struct.unpack("=16Q", sock.getsockopt(af_xdp.SOL_XDP, af_xdp.XDP_MMAP_OFFSETS, 128))
        rx = _Ring(sock.fileno(), offsets[0:4], _PAGE_OFFSETS["rx"], struct.Struct("=QII"))
        rings.append(rx)
        fill = _Ring(sock.fileno(), offsets[8:12], _PAGE_OFFSETS["fill"], struct.Struct("=Q"))
        rings.append(fill)
        for index in range(RING_DESCS):
            fill.produce(index * af_xdp.CHUNK_SIZE_BYTES)
        af_xdp.bind(sock, ifindex=ifindex, queue_id=queue_id, mode="copy")
        yield Xsk(sock, memory, rx, fill)
    finally:
        for ring in rings:
            ring.close()
        sock.close()
        memory.close()
