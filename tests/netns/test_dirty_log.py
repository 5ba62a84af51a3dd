"""The migration log with the real kernel behind: whatever changes in guest memory while the driver sleeps is marked."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from frames_in_place import packet_socket, proving, receive
from test_in_place import NOT_MERGEABLE, RX_BOUNCED, RX_DIRECT, SIZES

from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import BufferLayout, GuestConfig, Source
from mpassthru.testing.netns import Namespace, veth_namespace
from mpassthru.vhost_user import MemoryRegion, ProtocolFeature, VirtioFeature, VringAddress
from mpassthru.vhost_user.message import VHOST_VRING_F_LOG

PAGE_BYTES = 4096
FRAMES = 24
"""Fewer than the posted buffers of any layout can take."""
LAYOUTS = {
    **RX_DIRECT,
    **{name: config for name, (config, _) in RX_BOUNCED.items()},
    "small-not-mergeable": GuestConfig(features=NOT_MERGEABLE, rx=BufferLayout(pieces=(12, 800, 800))),
}


class Log:
    """A log that covers all of a guest's memory."""

    def __init__(self, memory: list[MemoryRegion]) -> None:
        end = max(region.guest_phys_address + region.size_bytes for region in memory)
        self.size_bytes = -(-end // PAGE_BYTES // 8)
        self.fd = os.memfd_create("log")
        os.ftruncate(self.fd, self.size_bytes)

    def take(self) -> set[int]:
        """The pages marked since they were taken last."""
        bits = os.pread(self.fd, self.size_bytes, 0)
        os.pwrite(self.fd, bytes(self.size_bytes), 0)
        return {8 * index + bit for index, byte in enumerate(bits) if byte for bit in range(8) if byte >> bit & 1}


class Watched:
    """A built-in guest's memory, and what changed in it."""

    def __init__(self, guest: BuiltinGuest) -> None:
        self._memory = guest.memory
        self._before = self._read()

    def changed(self) -> set[int]:
        """The pages that changed since this was asked last."""
        before, self._before = self._before, self._read()
        pages = set()
        for region, old, new in zip(self._memory, before, self._before, strict=True):
            for start in range(0, region.size_bytes, PAGE_BYTES):
                if old[start : start + PAGE_BYTES] != new[start : start + PAGE_BYTES]:
                    pages.add((region.guest_phys_address + start) // PAGE_BYTES)
        return pages

    def _read(self) -> list[bytes]:
        return [os.pread(region.fd, region.size_bytes, region.mmap_offset) for region in self._memory]


def migrating(config: GuestConfig) -> GuestConfig:
    proof = proving(config, len(SIZES))
    return replace(proof, protocol_features=proof.protocol_features | ProtocolFeature.VHOST_USER_PROTOCOL_F_LOG_SHMFD)


async def switch_logging(guest: BuiltinGuest, log: Log | None) -> None:
    """As QEMU does it while the rings run: the log, the feature, the used rings."""
    if log is not None:
        await guest.frontend.set_log_base(log.fd, log.size_bytes)
    features = guest.frontend.features & ~VirtioFeature.VHOST_F_LOG_ALL
    await guest.frontend.set_features(features | (VirtioFeature.VHOST_F_LOG_ALL if log else 0))
    for index in guest.vrings:
        ring = guest.ring(index)
        address = VringAddress(
            index=index,
            flags=VHOST_VRING_F_LOG if log else 0,
            desc_user_address=ring.user_address(ring.desc_address),
            used_user_address=ring.user_address(ring.used_address),
            avail_user_address=ring.user_address(ring.avail_address),
            log_guest_address=ring.used_address,
        )
        await guest.frontend.set_vring_addr(address)


@pytest.fixture(scope="module")
def namespace() -> Iterator[Namespace]:
    with veth_namespace() as namespace:
        yield namespace


async def receive_asleep(namespace: Namespace, port: AttachedPort, count: int, seed: int) -> None:
    """Send frames of any size to a guest whose driver sleeps: nobody but the device changes its memory."""
    source = random.Random(seed)
    expected = (await port.until(lambda _: True)).rx.frames + count
    with packet_socket(namespace) as packets:
        for _ in range(count):
            size = source.randrange(60, 1515)
            packets.send(b"\xff" * 6 + b"\x02\0\0\0\0\1" + b"\x88\xb5" + source.randbytes(size - 14))
        await port.until(lambda report: report.rx.frames >= expected)


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_every_page_that_changes_is_marked(layout: str, namespace: Namespace, tmp_path: Path) -> None:
    path = tmp_path / "port.sock"
    async with attached_port(namespace, path) as port:
        await port.until_said("ready")
        async with BuiltinGuest.connect(path, migrating(LAYOUTS[layout])) as guest:
            log = Log(guest.memory)
            await switch_logging(guest, log)
            guest.start(rx="sink")
            guest.pause()
            watched = Watched(guest)
            log.take()
            for seed in range(2):
                await receive_asleep(namespace, port, FRAMES, seed)
                changed = watched.changed()
                marked = log.take()
                assert len(changed) > 1
                assert changed <= marked
            # Buffers that nobody used may have been written; GET_VRING_BASE is answered after they are marked.
            for index in guest.vrings:
                await guest.frontend.get_vring_base(index)
            assert watched.changed() <= log.take()
            await guest.stop()
            assert guest.violations() == {}
            os.close(log.fd)
        await port.stop()


async def test_logging_moves_to_another_log_and_ends_under_traffic(namespace: Namespace, tmp_path: Path) -> None:
    path = tmp_path / "port.sock"
    async with attached_port(namespace, path) as port:
        await port.until_said("ready")
        async with BuiltinGuest.connect(path, migrating(RX_DIRECT["linux-default"])) as guest:
            old, new = Log(guest.memory), Log(guest.memory)
            guest.start(rx="sink")
            guest.pause()
            watched = Watched(guest)
            for log, marks_old, marks_new in ((old, True, False), (new, False, True), (None, False, False)):
                await switch_logging(guest, log)
                old.take()
                new.take()
                await receive_asleep(namespace, port, FRAMES, 1)
                changed = watched.changed()
                marked = old.take(), new.take()
                assert [changed <= pages for pages in marked] == [marks_old, marks_new]
                assert [bool(pages) for pages in marked] == [marks_old, marks_new]
            os.close(old.fd)
            os.close(new.fd)
        await port.stop()


async def test_used_entries_of_sent_frames_are_marked(namespace: Namespace, tmp_path: Path) -> None:
    path = tmp_path / "port.sock"
    frames = tuple(b"\xff" * 6 + b"\x02\0\0\0\0\1" + b"\x88\xb5" + bytes(46) for _ in range(FRAMES))
    async with attached_port(namespace, path) as port:
        await port.until_said("ready")
        with packet_socket(namespace) as packets:
            async with BuiltinGuest.connect(path, migrating(GuestConfig())) as guest:
                log = Log(guest.memory)
                await switch_logging(guest, log)
                log.take()
                guest.start(source=Source(frames=frames, count=len(frames)))
                await receive(packets, len(frames))
                await guest.wait_for(lambda counters: counters.tx_frames == len(frames))
                used = guest.ring(1).used_address
                assert {used // PAGE_BYTES, (used + 4 + 8 * FRAMES - 1) // PAGE_BYTES} <= log.take()
                os.close(log.fd)
        await port.stop()
