"""In zero-copy mode nobody gets memory back before the hardware queue was seen free."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import pytest
from fake_engine import FakeEngine
from test_device import TIMEOUT_S, VRING, binding, configuration

from mpassthru import control
from mpassthru.errors import HostError, ProtocolError
from mpassthru.rules import ZeroCopyRules, wants_longer_buffers
from mpassthru.vhost_user import Connection, Frontend, Session, StillInUseError, VirtioFeature
from mpassthru.worker import port_sockets
from mpassthru.worker.async_engine import AsyncEngine
from mpassthru.worker.device import PortDevice

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


def zero_copy_port(queues: int = 1, *, unproven: tuple[int, ...] = ()) -> control.Configure:
    bound = msgspec.structs.replace(
        binding(queues, ifindex=9), driver="nic", socket_mode="zero-copy", zero_copy_rules=RULES
    )
    return msgspec.structs.replace(configuration(queues), binding=bound, unproven=unproven)


@dataclass
class FakeSockets:
    """The broker's answers; `calls` is shared with the engine, so that their order shows."""

    calls: list[str]
    still_held: list[HostError] = field(default_factory=list)

    async def lock_memory(self, locked_bytes: int) -> None:
        self.calls.append(f"lock {locked_bytes}")

    async def want(self, _queue_pair: int, _binding: int) -> int:
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
    troubles: list[str]


@pytest.fixture
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    fake = FakeEngine(zero_copy=True, kernel_has_buffers=True)
    sockets = FakeSockets(fake.calls)
    engine = AsyncEngine(cast(Any, fake), lambda _: None)
    port = zero_copy_port(getattr(request, "param", 1))
    troubles: list[str] = []
    device = PortDevice(
        engine,
        cast(Any, sockets),
        port,
        on_running=lambda _: None,
        on_resumed=print,
        notice=lambda _: None,
        trouble=troubles.append,
    )
    await device.start_vring(0, VRING)
    fake.calls.clear()
    yield Bench(device, fake, sockets, troubles)
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


async def test_session_that_ends_before_the_queue_comes_free_says_that_the_device_is_still_in_use(
    bench: Bench,
) -> None:
    ours, theirs = socket.socketpair()
    bench.sockets.still_held = [HostError(errno.EBUSY, "still held")] * 2
    session = Session(Connection(theirs), bench.device)
    running = asyncio.create_task(session.run())
    with Frontend.from_socket(ours) as frontend:
        await frontend.get_features()
        # As after a SET_VRING_KICK: the bench has started it already.
        session.rings[0]._started = True
        with pytest.raises(ProtocolError, match="closed the connection"):
            await frontend.get_vring_base(0)

    with pytest.raises(StillInUseError, match="still held"):
        await asyncio.wait_for(running, TIMEOUT_S)
    assert bench.engine.calls[:2] == ["stop 0", "detach 0"]


async def test_stop_waits_for_the_queue_of_a_socket_that_somebody_else_closed(bench: Bench) -> None:
    bench.sockets.still_held = [HostError(errno.EBUSY, "still held")]
    with pytest.raises(HostError, match="still held"):
        await bench.device._sockets.give_up(0)

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
    port = zero_copy_port(unproven=(0,))
    device = PortDevice(
        engine,
        cast(Any, FakeSockets(fake.calls)),
        port,
        on_running=print,
        on_resumed=print,
        notice=print,
        trouble=print,
    )

    await device.start_vring(0, VRING)
    engine.close()

    assert fake.calls.index("free 0") < fake.calls.index("attach 0") < fake.calls.index("start 0")


@pytest.mark.parametrize("cancels", [1, 2])
async def test_bind_that_was_cancelled_gives_no_buffer_back_before_the_queue_was_seen_free(
    bench: Bench, cancels: int
) -> None:
    await bench.device.rebind(None)
    bench.engine.calls.clear()
    bench.engine.held = {"attach"}
    moving = asyncio.create_task(bench.device.rebind(zero_copy_port().binding))
    while "attach 0" not in bench.engine.calls:  # noqa: ASYNC110 - a list wakes nobody
        await asyncio.sleep(0.001)

    for _ in range(cancels):
        moving.cancel()
        await asyncio.sleep(0)
    stopping = asyncio.create_task(bench.device.stop_vring(0))
    await asyncio.sleep(0.01)
    bench.engine.held = set()
    bench.engine.end_held()
    await asyncio.wait({moving, stopping}, timeout=TIMEOUT_S)

    assert moving.cancelled()
    assert await stopping == 42
    assert bench.engine.calls[:2] == ["attach 0", "detach 0"]
    assert bench.engine.calls[-2:] == ["free 0", "stop 0"]


ERROR = "queue pair 0: the kernel has received into a buffer that was not given to it"
SUSPECT = f"{ERROR}; suspect its driver, nic of eth9"


async def test_distrusted_zero_copy_goes_on_in_copy_mode_once_the_queue_is_free(bench: Bench) -> None:
    await bench.device.distrust(0, ERROR, zero_copy=True)

    assert bench.engine.calls == ["detach 0", "free 0", "attach 0", "bound 0 copy"]
    assert bench.troubles == [f"{SUSPECT}; going on in copy mode, as long as this worker lives"]

    bench.engine.calls.clear()
    await bench.device.stop_vring(0)
    await bench.device.start_vring(0, VRING)
    assert bench.engine.calls[-3:] == ["attach 0", "bound 0 copy", "start 0"], "for the guests to come, too"


async def test_distrusted_copy_mode_leaves_the_pair_without_socket_until_the_guest_starts_it(bench: Bench) -> None:
    await bench.device.distrust(0, ERROR, zero_copy=False)

    assert bench.engine.calls == ["detach 0", "free 0"]
    assert bench.troubles == [f"{SUSPECT}; both virtqueues of the pair stand still until the guest starts them anew"]

    await bench.device.stop_vring(0)
    await bench.device.start_vring(0, VRING)
    assert bench.engine.socket_attached(0)


@pytest.mark.parametrize("bench", [2], indirect=True)
async def test_all_queue_pairs_of_a_distrusted_driver_leave_zero_copy_before_one_has_a_new_socket(bench: Bench) -> None:
    await bench.device.start_vring(2, VRING)
    bench.engine.calls.clear()

    await bench.device.distrust(1, ERROR, zero_copy=True)

    attached = [call for call in bench.engine.calls if call.startswith(("detach", "attach"))]
    assert attached == ["detach 0", "detach 1", "attach 0", "attach 1"]


@pytest.mark.parametrize("bench", [2], indirect=True)
async def test_socket_that_is_just_being_bound_leaves_the_zero_copy_mode_of_a_distrusted_driver_too(
    bench: Bench,
) -> None:
    bench.engine.held = {"attach"}
    starting = asyncio.create_task(bench.device.start_vring(2, VRING))
    while "attach 1" not in bench.engine.calls:  # noqa: ASYNC110 - a list wakes nobody
        await asyncio.sleep(0.001)
    distrusting = asyncio.create_task(bench.device.distrust(0, ERROR, zero_copy=True))
    await asyncio.sleep(0.01)
    bench.engine.held = set()
    bench.engine.end_held()
    await asyncio.wait_for(asyncio.gather(starting, distrusting), TIMEOUT_S)

    assert bench.engine.attached == {0, 1}
    bound = {call.split()[1]: call.split()[2] for call in bench.engine.calls if call.startswith("bound")}
    assert bound == {"0": "copy", "1": "copy"}, "whatever they were before"


async def test_socket_that_was_prepared_leaves_the_zero_copy_mode_of_a_distrusted_driver_too(bench: Bench) -> None:
    bench.engine.held = {"detach"}
    bench.engine.lacking = {0}
    bench.device._sockets.renewal.start()
    while "detach 0" not in bench.engine.calls:  # noqa: ASYNC110 - a list wakes nobody
        await asyncio.sleep(0.001)
    distrusting = asyncio.create_task(bench.device.distrust(0, ERROR, zero_copy=True))
    await asyncio.sleep(0.01)
    bench.engine.held = set()
    bench.engine.end_held()
    await asyncio.wait_for(distrusting, TIMEOUT_S)

    async with asyncio.timeout(TIMEOUT_S):
        while not any(call.startswith("bound") for call in bench.engine.calls):  # noqa: ASYNC110 - a list wakes nobody
            await asyncio.sleep(0.001)
    assert bench.engine.calls == ["prepare 0", "detach 0", "discard 0", "free 0", "attach 0", "bound 0 copy"]


async def test_driver_is_distrusted_whose_socket_it_was_though_the_port_has_moved_since(bench: Bench) -> None:
    elsewhere = msgspec.structs.replace(
        zero_copy_port().binding, serial=2, interface="eth8", ifindex=8, driver="other-nic"
    )
    bench.engine.held = {"prepare"}
    moving = asyncio.create_task(bench.device.rebind(elsewhere))
    while "prepare 0" not in bench.engine.calls:  # noqa: ASYNC110 - a list wakes nobody
        await asyncio.sleep(0.001)
    distrusting = asyncio.create_task(bench.device.distrust(0, ERROR, zero_copy=True))
    await asyncio.sleep(0)
    bench.engine.held = set()
    bench.engine.end_held()
    await asyncio.wait_for(asyncio.gather(moving, distrusting), TIMEOUT_S)

    assert bench.engine.calls[-1] == "bound 0 zero-copy", "the other driver has done nothing"
    assert bench.troubles == [f"{SUSPECT}; going on in copy mode, as long as this worker lives"]
    await bench.device.rebind(zero_copy_port().binding)
    assert bench.engine.modes[-1] == "copy"


@pytest.mark.parametrize("bench", [2], indirect=True)
async def test_driver_is_distrusted_whose_socket_it_was_though_another_queue_pair_could_not_move(bench: Bench) -> None:
    await bench.device.start_vring(2, VRING)
    elsewhere = msgspec.structs.replace(
        zero_copy_port(2).binding, serial=2, interface="eth8", ifindex=8, driver="other-nic"
    )
    bench.engine.attach_errors = [HostError(errno.EBUSY, "the queue is held")]
    with pytest.raises(HostError, match="is held"):
        await bench.device.rebind(elsewhere)
    assert bench.engine.attached == {1}

    await bench.device.distrust(1, ERROR, zero_copy=True)

    assert bench.engine.calls[-1] == "bound 1 copy"
    assert bench.troubles[0].startswith(f"{ERROR}; suspect its driver, other-nic of eth8")


async def test_driver_is_distrusted_whose_socket_it_was_though_the_port_is_leaving_it(bench: Bench) -> None:
    bench.engine.held = {"detach"}
    leaving = asyncio.create_task(bench.device.rebind(None))
    while "detach 0" not in bench.engine.calls:  # noqa: ASYNC110 - a list wakes nobody
        await asyncio.sleep(0.001)
    distrusting = asyncio.create_task(bench.device.distrust(0, ERROR, zero_copy=True))
    bench.engine.held = set()
    bench.engine.end_held()
    await asyncio.wait_for(asyncio.gather(leaving, distrusting), TIMEOUT_S)
    assert bench.engine.attached == set()

    await bench.device.rebind(zero_copy_port().binding)
    assert bench.engine.calls[-1] == "bound 0 copy"


async def test_failure_to_go_on_is_told_and_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_sockets, "ATTACH_AGAIN_AFTER_S", 0.001)
    bench.sockets.still_held = [HostError(errno.EBUSY, "still held")] * 2

    await bench.device.distrust(0, ERROR, zero_copy=True)

    assert bench.troubles[1:] == ["queue pair 0 stands still: still held"]
    async with asyncio.timeout(TIMEOUT_S):
        while "bound 0 copy" not in bench.engine.calls:  # noqa: ASYNC110 - a list wakes nobody
            await asyncio.sleep(0.001)


def test_hash_report_is_offered_only_where_it_makes_buffers_long_enough() -> None:
    def offered(rules: ZeroCopyRules | None) -> bool:
        port = msgspec.structs.replace(configuration(), longer_buffers=wants_longer_buffers(rules))
        device = PortDevice(
            cast(Any, None), cast(Any, None), port, on_running=print, on_resumed=print, notice=print, trouble=print
        )
        return bool(device.features & VirtioFeature.VIRTIO_NET_F_HASH_REPORT)

    assert offered(RULES)
    assert not offered(None)
    assert not offered(msgspec.structs.replace(RULES, rx_write_max_bytes=1524))
    assert not wants_longer_buffers(msgspec.structs.replace(RULES, direct=False))
