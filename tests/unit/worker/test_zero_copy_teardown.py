"""In zero-copy mode nobody gets memory back before the hardware queue was seen free."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import pytest
from fake_engine import FakeEngine
from test_device import VRING, configuration

from mpassthru.errors import HostError
from mpassthru.rules import ZeroCopyRules
from mpassthru.vhost_user import VirtioFeature
from mpassthru.worker.async_engine import AsyncEngine
from mpassthru.worker.device import PortDevice, wants_longer_buffers

RULES = ZeroCopyRules(
    frame_room_bytes=1536,
    direct=True,
    rx_write_max_bytes=1536,
    rx_write_align_bytes=1,
    rx_write_before_bytes=12,
    tx_frame_max_bytes=1518,
    tx_frame_min_bytes=60,
    tx_pieces_max=1,
    contiguity="backing-page",
)


@dataclass
class FakeSockets:
    """The broker's answers; `calls` is shared with the engine, so that their order shows."""

    calls: list[str]
    still_held: list[HostError] = field(default_factory=list)

    async def lock_memory(self, locked_bytes: int) -> None:
        self.calls.append(f"lock {locked_bytes}")

    async def want(self, _queue_pair: int) -> int:
        return os.open("/dev/null", os.O_RDWR)

    async def bound(self, queue_pair: int, mode: str) -> None:
        self.calls.append(f"bound {queue_pair} {mode}")

    def released(self, queue_pair: int) -> None:
        self.calls.append(f"released {queue_pair}")

    async def freed(self, queue_pair: int) -> None:
        if self.still_held:
            raise self.still_held.pop(0)
        self.calls.append(f"free {queue_pair}")


@dataclass
class Bench:
    device: PortDevice
    engine: FakeEngine
    sockets: FakeSockets


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    fake = FakeEngine(zero_copy=True, kernel_has_buffers=True)
    sockets = FakeSockets(fake.calls)
    engine = AsyncEngine(cast(Any, fake), lambda _: None)
    port = msgspec.structs.replace(configuration(), socket_mode="zero-copy", zero_copy_rules=RULES)
    device = PortDevice(
        engine, cast(Any, sockets), port, on_running=lambda _: None, on_resumed=print, notice=lambda _: None
    )
    await device.start_vring(0, VRING)
    fake.calls.clear()
    yield Bench(device, fake, sockets)
    engine.close()


async def test_stop_is_answered_after_the_queue_was_seen_free(bench: Bench) -> None:
    assert await bench.device.stop_vring(0) == 42
    assert bench.engine.calls == ["stop 0", "detach 0", "free 0", "stop 0"]


async def test_queue_that_does_not_come_free_fails_the_stop_and_keeps_memory_mapped(bench: Bench) -> None:
    bench.sockets.still_held = [HostError(errno.EBUSY, "still held")] * 2

    with pytest.raises(HostError, match="still held"):
        await bench.device.stop_vring(0)
    with pytest.raises(HostError, match="still held"):
        await bench.device.map_memory(())
    assert bench.engine.calls == ["stop 0", "detach 0"]

    await bench.device.map_memory(())
    assert bench.engine.calls[2:] == ["free 0", "map 0"]


async def test_stop_waits_for_the_queue_of_a_socket_that_somebody_else_closed(bench: Bench) -> None:
    bench.sockets.still_held = [HostError(errno.EBUSY, "still held")]
    with pytest.raises(HostError, match="still held"):
        await bench.device.give_up_socket(0)

    assert await bench.device.stop_vring(0) == 42
    assert bench.engine.calls == ["detach 0", "free 0", "stop 0"]


async def test_reset_waits_for_the_queue(bench: Bench) -> None:
    await bench.device.reset()
    assert bench.engine.calls == ["detach 0", "free 0"]


async def test_queue_once_proven_is_not_asked_about_again(bench: Bench) -> None:
    await bench.device.reset()
    await bench.device.map_memory(())
    assert bench.engine.calls.count("free 0") == 1


async def test_next_socket_waits_until_the_last_one_is_gone(bench: Bench) -> None:
    bench.sockets.still_held = [HostError(errno.EBUSY, "still held")]
    with pytest.raises(HostError, match="still held"):
        await bench.device.reset()

    await bench.device.start_vring(0, VRING)
    assert bench.engine.calls == ["detach 0", "free 0", "attach 0", "bound 0 zero-copy", "start 0"]


async def test_first_socket_waits_until_what_a_dead_worker_left_is_free() -> None:
    fake = FakeEngine(zero_copy=True)
    engine = AsyncEngine(cast(Any, fake), lambda _: None)
    port = msgspec.structs.replace(configuration(), socket_mode="zero-copy", zero_copy_rules=RULES)
    device = PortDevice(
        engine, cast(Any, FakeSockets(fake.calls)), port, on_running=print, on_resumed=print, notice=print
    )

    await device.start_vring(0, VRING)
    engine.close()

    assert fake.calls.index("free 0") < fake.calls.index("attach 0") < fake.calls.index("start 0")


def test_hash_report_is_offered_only_where_it_makes_buffers_long_enough() -> None:
    def offered(rules: ZeroCopyRules | None) -> bool:
        port = msgspec.structs.replace(configuration(), zero_copy_rules=rules)
        device = PortDevice(
            cast(Any, None), cast(Any, None), port, on_running=lambda _: None, on_resumed=print, notice=lambda _: None
        )
        return bool(device.features & VirtioFeature.VIRTIO_NET_F_HASH_REPORT)

    assert offered(RULES)
    assert not offered(None)
    assert not offered(msgspec.structs.replace(RULES, rx_write_max_bytes=1524))
    assert not wants_longer_buffers(msgspec.structs.replace(RULES, direct=False))
