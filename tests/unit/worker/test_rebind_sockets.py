"""Sockets that go to another interface, or none, under running virtqueues: in what order, and what is given back."""

from __future__ import annotations

import asyncio
import errno
from typing import Any, cast

import msgspec
import pytest
from fake_engine import FakeEngine
from test_device import MAC, MEMORY, MORE, TIMEOUT_S, VRING, Bench, bench, binding, configuration, heard
from test_zero_copy_teardown import RULES, FakeSockets

from mpassthru import control
from mpassthru.errors import HostError, RefusedError
from mpassthru.worker import port_sockets
from mpassthru.worker.async_engine import AsyncEngine
from mpassthru.worker.device import PortDevice, rarp_frame

__all__ = ["bench"]

ELSEWHERE = binding(serial=2, ifindex=8)


async def running(bench: Bench, *indices: int) -> None:
    for index in indices:
        await bench.device.start_vring(index, VRING)
    bench.engine.calls.clear()
    bench.heard.clear()


async def test_memory_is_pinned_for_the_next_interface_before_the_present_one_is_left(bench: Bench) -> None:
    await running(bench, 0, 1)

    await bench.device.rebind(ELSEWHERE)

    assert bench.engine.calls == ["prepare 0", "detach 0", "attach-prepared 0"]
    assert bench.wanted == [1, 2]
    assert bench.heard == ["SocketWanted", "SocketBound"]


async def test_memory_that_cannot_be_locked_twice_is_pinned_after_the_present_interface_is_left(bench: Bench) -> None:
    await running(bench, 0)
    bench.engine.prepare_errors = [HostError(errno.ENOBUFS, "the memlock limit is too small")]

    await bench.device.rebind(ELSEWHERE)

    assert bench.engine.calls == ["prepare 0", "detach 0", "attach 0"]


async def test_interface_that_takes_no_socket_to_begin_with_leaves_all_as_it_was(bench: Bench) -> None:
    await running(bench, 0)
    bench.engine.prepare_errors = [HostError(errno.ENOMEM, "not enough memory")]

    with pytest.raises(HostError, match="not enough"):
        await bench.device.rebind(ELSEWHERE)

    assert bench.engine.calls == ["prepare 0"]
    assert bench.engine.attached == {0}
    await bench.device.rebind(binding())
    assert bench.engine.calls == ["prepare 0"], "it is there already"


@pytest.mark.parametrize("bench", [2], indirect=True)
async def test_failure_for_one_queue_pair_goes_on_with_the_others(bench: Bench) -> None:
    await running(bench, 0, 2)
    bench.engine.attach_errors = [HostError(errno.EBUSY, "the queue is held")]

    with pytest.raises(HostError, match="is held"):
        await bench.device.rebind(binding(2, serial=2, ifindex=8))
    assert bench.engine.attached == {1}

    await bench.device.rebind(binding(2, serial=2, ifindex=8))
    assert bench.engine.attached == {0, 1}
    assert bench.engine.calls.count("attach 1") == 1


@pytest.mark.parametrize("bench", [2], indirect=True)
async def test_only_queue_pairs_that_run_get_a_socket(bench: Bench) -> None:
    await running(bench, 0, 2)
    await bench.device.stop_vring(0)
    assert bench.engine.attached == {0, 1}
    bench.engine.calls.clear()

    await bench.device.rebind(binding(2, serial=2, ifindex=8))

    assert bench.engine.calls == ["prepare 1", "detach 0", "detach 1", "attach-prepared 1"]
    await heard(bench, "SocketWanted", "SocketReleased", "SocketBound")


async def test_without_an_interface_the_guest_has_its_buffers_back_and_runs_on(bench: Bench) -> None:
    await running(bench, 0, 1)

    await bench.device.rebind(None)

    assert bench.engine.calls == ["detach 0", "reclaim 0"]
    assert bench.heard == ["SocketReleased"]
    await bench.device.stop_vring(1)
    await bench.device.start_vring(1, VRING)
    assert bench.engine.attached == set(), "it runs without"

    await bench.device.rebind(ELSEWHERE)
    assert bench.engine.attached == {0}
    assert bench.wanted == [1, 2]


@pytest.mark.parametrize("number", sorted(port_sockets.INTERFACE_AWAY))
async def test_virtqueue_starts_without_a_socket_while_the_interface_is_away(
    bench: Bench, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port_sockets, "ATTACH_AGAIN_AFTER_S", 0.001)
    bench.engine.attach_errors = [HostError(number, "cannot bind")]

    await bench.device.start_vring(0, VRING)

    assert bench.engine.calls[:2] == ["attach 0", "start 0"]
    async with asyncio.timeout(TIMEOUT_S):
        while bench.engine.attached != {0}:  # noqa: ASYNC110 - a set wakes nobody
            await asyncio.sleep(0.001)


async def test_guest_is_announced_where_it_goes_by_the_address_that_it_sends_from(bench: Bench) -> None:
    await running(bench, 0)
    bench.engine.address = MAC

    await bench.device.rebind(ELSEWHERE)
    assert bench.engine.calls[-1] == f"send 0 {rarp_frame(MAC).hex()}"
    bench.engine.calls.clear()
    await bench.device.rebind(ELSEWHERE)
    assert bench.engine.calls == [], "it has not moved"


async def test_guest_that_has_sent_nothing_is_announced_by_the_address_that_its_frontend_knows(bench: Bench) -> None:
    await running(bench, 0)
    await bench.device.rebind(None)
    await bench.device.send_rarp(MAC)

    await bench.device.rebind(ELSEWHERE)
    assert bench.engine.calls[-1] == f"send 0 {rarp_frame(MAC).hex()}"


async def test_announcement_that_fails_is_said_and_the_move_is_done(bench: Bench) -> None:
    await running(bench, 0)
    bench.engine.address = MAC
    bench.engine.send_errors = [HostError(errno.ENETDOWN, "cannot send a frame")]

    await bench.device.rebind(ELSEWHERE)

    assert bench.engine.attached == {0}
    assert bench.notices[-1] == "cannot announce the guest's address: cannot send a frame"


async def test_memory_does_not_change_while_sockets_move(bench: Bench) -> None:
    await bench.device.map_memory([MEMORY])
    await running(bench, 0)
    bench.engine.held = {"prepare"}
    moving = asyncio.create_task(bench.device.rebind(ELSEWHERE))
    while "prepare 0" not in bench.engine.calls:  # noqa: ASYNC110 - a list wakes nobody
        await asyncio.sleep(0.001)
    adding = asyncio.create_task(bench.device.add_memory([MORE]))
    await asyncio.sleep(0.01)
    assert bench.engine.calls == ["prepare 0"]

    bench.engine.held = set()
    bench.engine.end_held()
    await asyncio.wait_for(asyncio.gather(moving, adding), TIMEOUT_S)

    assert bench.engine.calls[1:4] == ["detach 0", "attach-prepared 0", "add 1"]


async def test_virtqueue_that_stops_between_two_sockets_leaves_none_that_the_broker_believes_in(bench: Bench) -> None:
    await running(bench, 0)
    bench.engine.held = {"detach"}
    moving = asyncio.create_task(bench.device.rebind(ELSEWHERE))
    while "detach 0" not in bench.engine.calls:  # noqa: ASYNC110 - a list wakes nobody
        await asyncio.sleep(0.001)
    stopping = asyncio.create_task(bench.device.stop_vring(0))
    await asyncio.sleep(0)

    bench.engine.held = set()
    bench.engine.end_held()
    await asyncio.wait_for(asyncio.gather(moving, stopping), TIMEOUT_S)

    assert bench.engine.calls == ["prepare 0", "detach 0", "stop 0", "discard 0"]
    await heard(bench, "SocketWanted", "SocketReleased")


@pytest.mark.parametrize("bench", [2], indirect=True)
async def test_no_queue_pair_is_bound_elsewhere_while_a_socket_of_before_is_left(bench: Bench) -> None:
    await running(bench, 0)
    bench.engine.held = {"detach"}
    moving = asyncio.create_task(bench.device.rebind(binding(2, serial=2, ifindex=8)))
    while "detach 0" not in bench.engine.calls:  # noqa: ASYNC110 - a list wakes nobody
        await asyncio.sleep(0.001)
    starting = asyncio.create_task(bench.device.start_vring(2, VRING))
    await asyncio.sleep(0.01)
    assert bench.engine.calls == ["prepare 0", "detach 0"]

    bench.engine.held = set()
    bench.engine.end_held()
    await asyncio.wait_for(asyncio.gather(moving, starting), TIMEOUT_S)

    assert bench.engine.attached == {0, 1}
    assert set(bench.wanted[1:]) == {2}


async def test_guest_mtu_is_held_against_the_last_interface(bench: Bench) -> None:
    await bench.device.rebind(msgspec.structs.replace(ELSEWHERE, mtu_bytes=1400))
    await bench.device.rebind(None)
    with pytest.raises(RefusedError, match="does not fit eth8"):
        await bench.device.set_mtu(1500)
    await bench.device.set_mtu(1400)


# ---- zero-copy mode ------------------------------------------------------------------------------------------

ZERO_COPY = msgspec.structs.replace(binding(), socket_mode="zero-copy", zero_copy_rules=RULES)
ZERO_COPY_ELSEWHERE = msgspec.structs.replace(ZERO_COPY, serial=2, ifindex=8)


async def zero_copy_device() -> tuple[PortDevice, FakeEngine, FakeSockets, AsyncEngine]:
    fake = FakeEngine(zero_copy=True, kernel_has_buffers=True)
    sockets = FakeSockets(fake.calls)
    engine = AsyncEngine(cast(Any, fake), lambda _: None)
    port: control.Configure = msgspec.structs.replace(configuration(), binding=ZERO_COPY)
    device = PortDevice(
        engine, cast(Any, sockets), port, on_running=print, on_resumed=print, notice=print, trouble=print
    )
    await device.start_vring(0, VRING)
    fake.calls.clear()
    return device, fake, sockets, engine


async def test_queue_that_is_left_is_seen_free_before_buffers_are_posted_elsewhere() -> None:
    device, fake, _, engine = await zero_copy_device()

    await device.rebind(ZERO_COPY_ELSEWHERE)
    assert fake.calls == ["prepare 0", "detach 0", "free 0", "attach-prepared 0", "bound 0 zero-copy"]
    engine.close()


async def test_queue_that_does_not_come_free_keeps_the_guests_buffers() -> None:
    device, fake, sockets, engine = await zero_copy_device()
    sockets.still_held = [HostError(errno.EBUSY, "still held")] * 3

    await device.rebind(None)
    assert fake.calls == ["detach 0"], "nothing is given back"
    with pytest.raises(HostError, match="still held"):
        await device.rebind(ZERO_COPY_ELSEWHERE)
    assert fake.attached == set()
    with pytest.raises(HostError, match="still held"):
        await device.stop_vring(0)

    await device.rebind(ZERO_COPY_ELSEWHERE)
    assert fake.calls.index("free 0") < fake.calls.index("attach 0")
    engine.close()
