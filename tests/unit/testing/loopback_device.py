"""A vhost-user device in Python that sends every tx frame back: slow, plain, and enough to talk to the built-in guest.

Guest memory is mapped from the descriptors of the memory table, as any back-end would; addresses are translated from
the table, so a mix-up of address spaces shows.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from mpassthru.testing.guest_config import DEFAULT_FEATURES
from mpassthru.vhost_user import MemoryRegion, ProtocolFeature, VirtioFeature, Vring

DESC_NEXT, DESC_INDIRECT = 1, 4
HEADER_BYTES = 12


class Memory:
    """The guest's memory, by guest-physical and by user address."""

    def __init__(self, regions: Sequence[MemoryRegion]) -> None:
        self._regions = [
            (region.description, mmap.mmap(region.fd, region.mmap_offset + region.size_bytes)) for region in regions
        ]

    def at(self, address: int, *, user: bool = False) -> tuple[mmap.mmap, int]:
        for region, mapping in self._regions:
            offset = address - (region.user_address if user else region.guest_phys_address)
            if 0 <= offset < region.size_bytes:
                return mapping, region.mmap_offset + offset
        raise AssertionError(f"address {address:#x} is in no region")

    def read(self, address: int, length: int, *, user: bool = False) -> bytes:
        mapping, offset = self.at(address, user=user)
        return mapping[offset : offset + length]

    def write(self, address: int, data: bytes, *, user: bool = False) -> None:
        mapping, offset = self.at(address, user=user)
        mapping[offset : offset + len(data)] = data


@dataclass
class Queue:
    """A running virtqueue."""

    memory: Memory
    vring: Vring
    kick_fd: int
    call_fd: int
    next_avail: int
    used_idx: int

    def has_available(self) -> bool:
        (avail_idx,) = struct.unpack("<H", self.memory.read(self.vring.avail_user_address + 2, 2, user=True))
        return bool(avail_idx != self.next_avail)

    def ask_for_kick(self) -> None:
        """Want to hear of the next buffer (avail_event)."""
        event = self.vring.used_user_address + 4 + 8 * self.vring.size
        self.memory.write(event, struct.pack("<H", self.next_avail), user=True)

    def take(self) -> tuple[int, list[tuple[int, int]]] | None:
        """The next head and its pieces (address, length)."""
        avail = self.vring.avail_user_address
        if not self.has_available():
            return None
        slot = avail + 4 + 2 * (self.next_avail % self.vring.size)
        (head,) = struct.unpack("<H", self.memory.read(slot, 2, user=True))
        self.next_avail = (self.next_avail + 1) & 0xFFFF
        return head, self._walk(self.vring.desc_user_address, head, user=True)

    def _walk(self, table: int, index: int, *, user: bool) -> list[tuple[int, int]]:
        pieces: list[tuple[int, int]] = []
        while True:
            entry = self.memory.read(table + 16 * index, 16, user=user)
            address, length, flags, index = struct.unpack("<QIHH", entry)
            if flags & DESC_INDIRECT:
                return self._walk(address, 0, user=False)
            pieces.append((address, length))
            if not flags & DESC_NEXT:
                return pieces

    def use(self, head: int, length: int) -> None:
        """Put a head into the used ring and notify, whether or not the driver wants it."""
        used = self.vring.used_user_address
        entry = struct.pack("<II", head, length)
        self.memory.write(used + 4 + 8 * (self.used_idx % self.vring.size), entry, user=True)
        self.used_idx = (self.used_idx + 1) & 0xFFFF
        self.memory.write(used + 2, struct.pack("<H", self.used_idx), user=True)
        os.eventfd_write(self.call_fd, 1)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.kick_fd)
        os.close(self.kick_fd)
        os.close(self.call_fd)


class LoopbackDevice:
    """Sends what comes on tx of a queue pair back on its rx. With `lose_heads`, takes tx heads and forgets them."""

    def __init__(self, *, features: int = DEFAULT_FEATURES, queue_pairs: int = 1) -> None:
        self.features = features | VirtioFeature.VHOST_USER_F_PROTOCOL_FEATURES
        if queue_pairs > 1:
            self.features |= VirtioFeature.VIRTIO_NET_F_MQ
        self.protocol_features = int(
            ProtocolFeature.VHOST_USER_PROTOCOL_F_REPLY_ACK
            | ProtocolFeature.VHOST_USER_PROTOCOL_F_MQ
            | ProtocolFeature.VHOST_USER_PROTOCOL_F_STATUS
            | ProtocolFeature.VHOST_USER_PROTOCOL_F_RESET_DEVICE
        )
        self.queue_pairs_max = queue_pairs
        self.lose_heads = False
        self.statuses: list[int] = []
        self.resets = 0
        self.acknowledged = 0
        self._memory = Memory([])
        self._queues: dict[int, Queue] = {}

    async def set_features(self, features: int) -> None:
        self.acknowledged = features

    async def map_memory(self, regions: Sequence[MemoryRegion]) -> None:
        self._memory = Memory(regions)

    async def add_memory(self, regions: Sequence[MemoryRegion]) -> bool:
        return False

    async def start_vring(self, index: int, vring: Vring) -> None:
        (used_idx,) = struct.unpack("<H", self._memory.read(vring.used_user_address + 2, 2, user=True))
        kick_fd, call_fd = os.dup(vring.kick_fd), os.dup(vring.call_fd)
        self._queues[index] = Queue(self._memory, vring, kick_fd, call_fd, vring.base, used_idx)
        asyncio.get_running_loop().add_reader(kick_fd, self._kicked, index)

    async def stop_vring(self, index: int) -> int:
        queue = self._queues.pop(index)
        queue.close()
        return queue.next_avail

    def _kicked(self, index: int) -> None:
        os.eventfd_read(self._queues[index].kick_fd)
        tx, rx = self._queues.get(index | 1), self._queues.get(index & ~1)
        while tx and rx:
            while tx.has_available() and rx.has_available():
                self._forward(tx, rx)
            tx.ask_for_kick()
            rx.ask_for_kick()
            if not (tx.has_available() and rx.has_available()):
                break

    def _forward(self, tx: Queue, rx: Queue) -> None:
        taken = tx.take()
        if taken is None or self.lose_heads:
            return
        head, pieces = taken
        stream = b"".join(self._memory.read(address, length) for address, length in pieces)
        tx.use(head, 0)
        stream = bytes(10) + b"\x01\x00" + stream[HEADER_BYTES:]
        if (taken := rx.take()) is None:
            return
        head, pieces = taken
        rest = stream
        for address, length in pieces:
            self._memory.write(address, rest[:length])
            rest = rest[length:]
        rx.use(head, len(stream))

    async def log_writes(self, on: bool) -> None:
        pass

    async def set_log(self, fd: int, size_bytes: int, mmap_offset: int) -> None:
        pass

    async def set_log_fd(self, fd: int) -> None:
        pass

    async def set_vring_log(self, index: int, log_guest_address: int | None) -> None:
        pass

    async def set_vring_enabled(self, index: int, enabled: bool) -> None:
        pass

    async def set_vring_call(self, index: int, fd: int) -> None:
        pass

    async def set_vring_err(self, index: int, fd: int) -> None:
        pass

    async def set_mtu(self, mtu_bytes: int) -> None:
        pass

    async def send_rarp(self, mac: bytes) -> None:
        pass

    async def set_status(self, status: int) -> None:
        self.statuses.append(status)

    async def reset(self) -> None:
        self.resets += 1
