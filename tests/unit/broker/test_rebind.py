"""A port whose interface changes under a worker: whose sockets are whose, and which hardware queues may be held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import msgspec
import pytest
from test_port import BINDING, OTHER, TIMEOUT_S, ZERO_COPY, Harness, PlayedWorker, RecordedSteering, harness

from mpassthru import control
from mpassthru.broker import port as port_module
from mpassthru.errors import HostError, RefusedError

Queue = tuple[str, int, int]


def rebinding(
    h: Harness, binding: control.Binding | None, steering: RecordedSteering | None = None
) -> asyncio.Task[None]:
    return asyncio.create_task(h.port.rebind(binding, cast(Any, steering)))


async def rebound(h: Harness, worker: PlayedWorker, binding: control.Binding | None) -> RecordedSteering:
    """The worker does as it is told at once."""
    steering = RecordedSteering()
    task = rebinding(h, binding, steering if binding else None)
    asked, _ = await worker.expect(control.Rebind)
    assert asked.binding == binding
    worker.far.send(control.Rebound())
    await asyncio.wait_for(task, TIMEOUT_S)
    return steering


@pytest.fixture
async def h() -> AsyncIterator[Harness]:
    async with harness() as h:
        yield h


async def test_sockets_of_before_and_after_are_each_steered_by_their_own_program(h: Harness) -> None:
    worker, steering = await h.worker(), RecordedSteering()
    await worker.is_granted(0)
    worker.far.send(control.SocketBound(queue_pair=0, mode="copy"))
    await worker.expect(control.SocketSteered)

    task = rebinding(h, OTHER, steering)
    await worker.expect(control.Rebind)
    await worker.is_granted(1, binding=1)
    worker.far.send(control.SocketBound(queue_pair=1, mode="copy"))
    await worker.expect(control.SocketSteered)
    await worker.is_granted(0, binding=2)
    worker.far.send(control.SocketReleased(queue_pair=1))
    worker.far.send(control.SocketBound(queue_pair=0, mode="copy"))
    await worker.expect(control.SocketSteered)
    worker.far.send(control.Rebound())
    await asyncio.wait_for(task, TIMEOUT_S)

    assert set(h.steering.slots) == {3}, "the kernel empties the slot of a socket that is closed"
    assert set(steering.slots) == {0}
    assert h.granted_on == [7, 7, 8]


async def test_nothing_is_granted_for_what_the_port_is_no_longer_bound_to(h: Harness) -> None:
    worker = await h.worker()
    await rebound(h, worker, OTHER)
    worker.far.send(control.SocketWanted(queue_pair=0, binding=1))
    refused, _ = await worker.expect(control.SocketRefused)
    assert (refused.errno, refused.error) == (0, "the port's interface has just changed")

    await rebound(h, worker, None)
    worker.far.send(control.SocketWanted(queue_pair=0, binding=2))
    await worker.expect(control.SocketRefused)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (control.Rebound(errno=16, error="queue 3 is\x1b[2J held"), HostError),
        (control.Rebound(error="no memory"), RefusedError),
    ],
)
async def test_what_a_worker_could_not_do_is_raised(
    h: Harness, answer: control.Rebound, error: type[Exception]
) -> None:
    worker = await h.worker()
    task = rebinding(h, OTHER, RecordedSteering())
    await worker.expect(control.Rebind)
    worker.far.send(answer)

    with pytest.raises(error) as raised:
        await asyncio.wait_for(task, TIMEOUT_S)
    assert str(raised.value) == (answer.error or "").replace("\x1b", " ")

    await worker.is_granted(0, binding=1)
    await worker.is_granted(1, binding=2)


async def test_worker_that_dies_instead_is_followed_by_one_that_is_bound_from_the_start(h: Harness) -> None:
    worker = await h.worker()
    assert h.configurations[0].binding == BINDING
    task = rebinding(h, OTHER, RecordedSteering())
    await worker.expect(control.Rebind)
    worker.far.close()

    await asyncio.wait_for(task, TIMEOUT_S)
    worker = await h.worker()
    assert h.configurations[1].binding == OTHER

    await rebound(h, worker, None)
    worker.far.close()
    await h.worker()
    assert h.configurations[2].binding is None


async def test_worker_that_does_not_answer_is_killed_and_followed_by_one_that_is_bound_from_the_start(
    h: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port_module, "REBIND_TIMEOUT_S", 0.01)
    worker = await h.worker()

    await asyncio.wait_for(h.port.rebind(OTHER, cast(Any, RecordedSteering())), TIMEOUT_S)
    assert worker.killed
    await h.until("worker 4711 has not moved its sockets within 0.01 s; killing it")
    monkeypatch.undo()
    await asyncio.wait_for(h.port.rebind(None), TIMEOUT_S)  # whether or not the kernel has ended it by now

    worker.far.close()
    worker = await h.worker()
    assert h.configurations[1].binding is None
    await rebound(h, worker, OTHER)


async def test_worker_that_says_unasked_that_it_is_bound_anew_is_replaced(h: Harness) -> None:
    worker = await h.worker()
    worker.far.send(control.Rebound())

    await h.worker()
    assert worker.killed


async def test_socket_that_was_made_ready_ahead_outlives_the_one_before_it(h: Harness) -> None:
    worker, steering = await h.worker(), RecordedSteering()
    task = rebinding(h, OTHER, steering)
    await worker.expect(control.Rebind)
    await worker.is_granted(0, binding=2)
    worker.far.send(control.SocketReleased(queue_pair=0, await_free=True))
    await worker.expect(control.SocketFreed)
    worker.far.send(control.SocketBound(queue_pair=0, mode="copy"))
    await worker.expect(control.SocketSteered)
    worker.far.send(control.Rebound())
    await asyncio.wait_for(task, TIMEOUT_S)
    assert set(steering.slots) == {0}


async def test_queue_of_a_former_interface_is_held_until_it_is_seen_free() -> None:
    free: dict[Queue, asyncio.Event] = {("eth9", 7, 3): asyncio.Event(), ("eth8", 8, 0): asyncio.Event()}
    asked: list[Queue] = []

    async def wait_free(ifname: str, ifindex: int, queue_id: int, *, timeout_s: float) -> None:
        asked.append((ifname, ifindex, queue_id))
        await free[asked[-1]].wait()

    async with harness(binding=ZERO_COPY, wait_free=wait_free) as h:
        worker = await h.worker()
        await worker.is_granted(0)
        await rebound(h, worker, msgspec.structs.replace(OTHER, socket_mode="zero-copy"))
        await worker.is_granted(0, binding=2)
        worker.far.close()
        worker = await h.worker()
        assert [configuration.unproven for configuration in h.configurations] == [(), (0,)]

        await rebound(h, worker, None)
        worker.far.send(control.SocketReleased(queue_pair=0, await_free=True))
        worker.far.send(control.Notice(text="asked"))
        await h.until("asked")
        for event in free.values():
            event.set()
        await worker.expect(control.SocketFreed)
        assert sorted(asked) == sorted(free)

        worker.far.close()
        await h.worker()
        assert h.configurations[2].unproven == (), "both were seen free, and nobody can have been given one since"


async def test_queue_that_a_worker_may_bind_any_time_counts_as_held() -> None:
    async with harness(binding=ZERO_COPY) as h:
        worker = await h.worker()
        await worker.is_granted(1)
        worker.far.send(control.SocketReleased(queue_pair=1, await_free=True))
        await worker.expect(control.SocketFreed)
        worker.far.close()
        await h.worker()
        assert h.configurations[1].unproven == (1,)


async def test_frames_steered_by_former_programs_stay_counted(h: Harness) -> None:
    worker = await h.worker()
    await rebound(h, worker, OTHER)
    assert h.port.read_steering() == {"3": {"redirected": 10}}, "RecordedSteering always says 5"
    await rebound(h, worker, None)
    assert h.port.read_steering() == {"3": {"redirected": 10}}
