"""The worker in reserve: used instead of a new one, replaced when it died, and never left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import cast

import pytest
from test_port import PlayedWorker, harness

from mpassthru import control
from mpassthru.broker.worker_process import WorkerProcess
from mpassthru.broker.worker_supply import WorkerSupply
from mpassthru.errors import HostError

TIMEOUT_S = 5.0


class Start:
    """Starts played workers, and counts them."""

    def __init__(self) -> None:
        self.started: list[PlayedWorker] = []
        self.fail: HostError | None = None

    def __call__(self, say: Callable[[str], None]) -> WorkerProcess:
        if self.fail is not None:
            raise self.fail
        self.started.append(PlayedWorker(say))
        return cast(WorkerProcess, self.started[-1])


@pytest.fixture
def start() -> Iterator[Start]:
    start = Start()
    yield start
    for worker in start.started:
        worker.channel.close()
        worker.far.close()


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def workers(start: Start, lines: list[str]) -> WorkerSupply:
    return WorkerSupply(start, lines.append, lines.append)


async def test_worker_in_reserve_is_taken_before_a_new_one_is_started(workers: WorkerSupply, start: Start) -> None:
    workers.keep_reserve()
    workers.keep_reserve()

    taken = [await workers.take(), await workers.take()]

    assert taken == start.started
    assert len(start.started) == 2


async def test_worker_that_died_in_reserve_is_reaped_and_replaced(
    workers: WorkerSupply, start: Start, lines: list[str]
) -> None:
    workers.keep_reserve()
    start.started[0].has_ended = True

    taken = await workers.take()

    assert taken is start.started[1]
    assert start.started[0].ended
    assert lines == ["worker 4711, in reserve, was killed by SIGKILL"]


async def test_want_of_a_reserve_is_told_and_stops_nothing(
    workers: WorkerSupply, start: Start, lines: list[str]
) -> None:
    start.fail = HostError(11, "cannot start a worker (EAGAIN)")

    workers.keep_reserve()

    assert lines == ["no worker is in reserve, and a new one will take longer: cannot start a worker (EAGAIN)"]
    start.fail = None
    assert await workers.take() is start.started[0]


async def test_dropping_the_reserve_ends_its_worker(workers: WorkerSupply, start: Start) -> None:
    workers.keep_reserve()

    await workers.drop_reserve()

    assert (start.started[0].killed, start.started[0].ended) == (True, True)


async def test_guest_that_runs_has_a_worker_in_reserve_that_takes_over() -> None:
    async with harness() as h:
        worker = await h.worker()
        worker.far.send(control.SessionChanged(state="running"))
        reserve = await asyncio.wait_for(h.workers.get(), TIMEOUT_S)
        assert h.port.status.worker_pid == worker.pid
        worker.far.close()

        _, fds = await reserve.expect(control.Configure)
        control.close_fds(fds)
        assert h.workers.empty(), "no other was started"


async def test_reserve_ends_with_the_guest() -> None:
    async with harness() as h:
        worker = await h.worker()
        worker.far.send(control.Ready())
        with h.endpoint.connect():
            _, fds = await worker.expect(control.FrontendConnected)
            control.close_fds(fds)
        worker.far.send(control.SessionChanged(state="running"))
        reserve = await asyncio.wait_for(h.workers.get(), TIMEOUT_S)
        worker.far.send(control.SessionChanged(state="waiting"))
        with h.endpoint.connect():
            _, fds = await worker.expect(control.FrontendConnected)
            control.close_fds(fds)

        assert reserve.ended


async def test_port_that_ends_ends_the_worker_in_reserve() -> None:
    async with harness() as h:
        worker = await h.worker()
        worker.far.send(control.SessionChanged(state="running"))
        reserve = await asyncio.wait_for(h.workers.get(), TIMEOUT_S)
        h.port.stop()
        await worker.expect(control.Stop)
        worker.far.close()

        await asyncio.wait_for(h.running, TIMEOUT_S)

        assert reserve.ended


async def test_port_for_one_frontend_has_no_reserve() -> None:
    async with harness(once=True) as h:
        worker = await h.worker()
        worker.far.send(control.SessionChanged(state="running"))
        await h.until("guest: running")

        assert h.workers.empty()
