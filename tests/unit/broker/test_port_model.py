"""A stateful model of a port's life: whatever workers and front-ends do in whatever order, the port does what follows.

After each step the worker is asked for a report: its answer has to be the next thing that passes, so that a message
which the model does not know of is found at once.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any, cast

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_port import (
    BINDING,
    CONFIGURATION,
    PlayedEndpoint,
    PlayedWorker,
    RecordedMemory,
    RecordedSteering,
    free_at_once,
)

from mpassthru import control
from mpassthru.broker import port as port_module
from mpassthru.broker.port import Port
from mpassthru.broker.worker_process import WorkerProcess
from mpassthru.errors import HostError, RefusedError
from mpassthru.report import DirectionReport

QUEUE_PAIRS = range(CONFIGURATION.queue_pairs)
FRONTENDS_MAX = 3
LIFE_MIN_STEPS = 5
"""Before a worker dies or is killed: lives that are all short show little."""
TIMEOUT_S = 5.0

queue_pairs = st.sampled_from(QUEUE_PAIRS)
NONSENSE: tuple[control.WorkerMessage, ...] = (
    control.SocketWanted(queue_pair=len(QUEUE_PAIRS), binding=1),
    control.SocketReleased(queue_pair=-1),
    control.WorkerReport(rx=DirectionReport(dropped={"\x1b[2J": 1}), tx=DirectionReport()),
)


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


class PortModel(RuleBasedStateMachine):
    """One port with two queue pairs, and the worker that it has at the moment."""

    def __init__(self) -> None:
        super().__init__()
        self.before = open_fds()
        self.loop = asyncio.new_event_loop()

    @initialize()
    def start(self) -> None:
        self.started: list[PlayedWorker] = []
        self.unmet: list[PlayedWorker] = []
        """Started, and not configured yet."""
        self.met = 0
        self.reserve = False
        self.made: list[socket.socket] = []
        self.frontends: list[socket.socket] = []
        self.steering, self.endpoint = RecordedSteering(), PlayedEndpoint()
        self.no_sockets = False
        self.troubles = self.sessions = self.frames = 0
        self.serial = BINDING.serial
        self.granted = {self.serial}
        """Serial numbers of the bindings that sockets can be had for."""
        self.port = Port(
            CONFIGURATION,
            self.endpoint,
            cast(Any, RecordedMemory()),
            say=lambda _line: None,
            start_worker=self._start_worker,
            new_socket=self._new_socket,
            wait_free=free_at_once,
        )
        self.run(self.port.rebind(BINDING, cast(Any, self.steering)))
        self.task = self.loop.create_task(self.port.run())
        self._meet_worker()

    def _start_worker(self, say: Callable[[str], None]) -> WorkerProcess:
        self.started.append(PlayedWorker(say))
        self.unmet.append(self.started[-1])
        return cast(WorkerProcess, self.started[-1])

    def _new_socket(self, ifindex: int) -> socket.socket:
        assert ifindex == BINDING.ifindex
        if self.no_sockets:
            raise HostError(24, "cannot open an AF_XDP socket (EMFILE): raise ulimit -n")
        self.made.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        return self.made[-1]

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, TIMEOUT_S))

    def expect(self, kind: type[Any]) -> tuple[Any, list[int]]:
        received: tuple[Any, list[int]] = self.run(self.worker.expect(kind))
        return received

    def say(self, message: control.WorkerMessage) -> None:
        self.worker.far.send(message)

    def _meet_worker(self) -> None:
        async def appears() -> None:
            while not self.unmet:  # noqa: ASYNC110 - a list wakes nobody
                await asyncio.sleep(0.0005)

        self.run(appears())
        self.worker = self.unmet.pop(0)
        self.met += 1
        self.reserve = False
        self.ready = self.busy = False
        self.steps_of_worker = 0
        self.reported = 0
        self.held: set[int] = set()
        self.steered: set[int] = set()
        _, (records_fd,) = self.expect(control.Configure)
        os.close(records_fd)

    def _meet_frontend(self) -> None:
        """A front-end that waits is handed to a worker that is idle, and no other."""
        if self.ready and not self.busy and self.endpoint.connections.qsize():
            _, (fd,) = self.expect(control.FrontendConnected)
            os.close(fd)
            self.busy = True
            self.sessions += 1

    def _lose_worker(self) -> None:
        self.frames += self.reported
        self.troubles += 1
        self._meet_worker()

    # ---- what a worker may do ----

    @precondition(lambda self: not self.ready)
    @rule()
    def becomes_ready(self) -> None:
        self.say(control.Ready())
        self.ready = True
        self._meet_frontend()

    @precondition(lambda self: self.busy)
    @rule(state=st.sampled_from(["connected", "running"]))
    def session_goes_on(self, state: control.GuestState) -> None:
        self.say(control.SessionChanged(state=state))
        self.reserve |= state == "running"

    @precondition(lambda self: self.busy)
    @rule(error=st.sampled_from([None, "it broke the protocol"]))
    def session_ends(self, error: str | None) -> None:
        self.say(control.SessionChanged(state="waiting", error=error))
        self.troubles += error is not None
        self.held.clear()
        self.busy = False
        self.unmet.clear()
        self.reserve = False
        self._meet_frontend()

    @rule(queue_pair=queue_pairs, exist=st.booleans(), of_before=st.booleans())
    def wants_a_socket(self, queue_pair: int, exist: bool, of_before: bool) -> None:
        self.no_sockets = not exist
        serial = self.serial - of_before
        self.say(control.SocketWanted(queue_pair=queue_pair, binding=serial))
        if exist and serial in self.granted:
            _, (fd,) = self.expect(control.SocketGranted)
            os.close(fd)
            self.held.add(queue_pair)
        else:
            self.expect(control.SocketRefused)
            self.held.discard(queue_pair)

    @precondition(lambda self: self.held)
    @rule(may_steer=st.booleans())
    def has_bound_a_socket(self, may_steer: bool) -> None:
        queue_pair = self.held.pop()
        self.steering.fail = None if may_steer else HostError(22, "cannot put it there")
        self.say(control.SocketBound(queue_pair=queue_pair, mode="copy"))
        if may_steer:
            self.expect(control.SocketSteered)
            self.steered.add(queue_pair)
        else:
            self.expect(control.SocketRefused)

    @rule(queue_pair=queue_pairs, await_free=st.booleans())
    def has_released_a_socket(self, queue_pair: int, await_free: bool) -> None:
        self.say(control.SocketReleased(queue_pair=queue_pair, await_free=await_free))
        self.steered.discard(queue_pair)
        if await_free:
            self.expect(control.SocketFreed)
        else:
            self.held.discard(queue_pair)

    @rule(away=st.booleans(), error=st.sampled_from([None, "the queue is held"]))
    def is_bound_anew(self, away: bool, error: str | None) -> None:
        self.serial += 1
        binding = None if away else msgspec.structs.replace(BINDING, serial=self.serial)
        task = self.loop.create_task(self.port.rebind(binding, None if away else cast(Any, self.steering)))
        self.expect(control.Rebind)
        self.say(control.Rebound(error=error))
        self.granted = (self.granted if error else set()) | (set() if away else {self.serial})
        if error is None:
            self.run(cast(Any, task))
        else:
            with pytest.raises(RefusedError, match=error):
                self.run(cast(Any, task))

    @precondition(lambda self: self.steps_of_worker > LIFE_MIN_STEPS)
    @rule(message=st.sampled_from(NONSENSE))
    def talks_nonsense(self, message: control.WorkerMessage) -> None:
        worker = self.worker
        self.say(message if 0 in self.held else control.SocketBound(queue_pair=0, mode="copy"))
        self._lose_worker()
        assert worker.killed

    @precondition(lambda self: self.steps_of_worker > LIFE_MIN_STEPS)
    @rule()
    def dies(self) -> None:
        self.worker.far.close()
        self._lose_worker()

    # ---- what a front-end may do ----

    @precondition(lambda self: self.endpoint.connections.qsize() < FRONTENDS_MAX)
    @rule()
    def frontend_connects(self) -> None:
        self.frontends.append(self.endpoint.connect())
        self._meet_frontend()

    # ---- what must hold ----

    @invariant()
    def port_is_as_the_model_says(self) -> None:
        refreshing = self.loop.create_task(self.port.refresh())
        self.expect(control.ReportWanted)
        self.steps_of_worker += 1
        self.reported += 1
        self.say(control.WorkerReport(rx=DirectionReport(frames=self.reported), tx=DirectionReport()))
        status = self.run(cast(Any, refreshing))
        assert status.rx.frames == self.frames + self.reported, "frames of earlier workers count"
        assert set(status.modes) == self.steered
        assert sum(sock.fileno() >= 0 for sock in self.made) == len(self.held), "the broker's copies of sockets"
        assert status.sessions == self.sessions
        assert len(status.troubles) == min(self.troubles, status.troubles.maxlen)
        assert status.worker_restarts == self.met - 1
        assert len(self.unmet) == self.reserve, "while a guest runs, one worker is in reserve"
        living = [worker for worker in self.started if not worker.ended]
        assert living == [self.worker, *self.unmet]

    def teardown(self) -> None:
        if hasattr(self, "task"):
            self.port.stop()
            self.expect(control.Stop)
            self.worker.far.close()
            self.run(cast(Any, self.task))
            assert all(worker.ended for worker in self.started)
            assert all(sock.fileno() < 0 for sock in self.made)
            for worker in self.started:
                worker.far.close()
            for sock in self.frontends:
                sock.close()
            while not self.endpoint.connections.empty():
                self.endpoint.connections.get_nowait().close()
        self.loop.close()
        assert open_fds() <= self.before


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_module, "RESTART_PAUSE_MIN_S", 0.0)
    monkeypatch.setattr(port_module, "RESTART_PAUSE_MAX_S", 0.0)


class PortModelForLong(PortModel):
    """The same, with more of it."""


TestPortModel = pytest.mark.slow(PortModel.TestCase)
TestPortModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPortModelForLong = pytest.mark.soak(pytest.mark.timeout(3600)(PortModelForLong.TestCase))
TestPortModelForLong.settings = settings(max_examples=5000, stateful_step_count=100, deadline=None)
