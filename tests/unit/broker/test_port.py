"""A port against a worker played by the test: its sockets, front-ends, reports, death, and nonsense from it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import pytest

from mpassthru import control
from mpassthru.broker import port as port_module
from mpassthru.broker.port import Port, WaitQueueFree
from mpassthru.broker.worker_process import WorkerProcess
from mpassthru.control import BrokerMessage, ControlChannel, WorkerMessage
from mpassthru.errors import HostError, MpassthruError, RefusedError
from mpassthru.locked_memory import Budget
from mpassthru.log import LINES_MAX
from mpassthru.report import DirectionReport

BINDING = control.Binding(
    serial=1,
    interface="eth9",
    ifindex=7,
    queue_ids=(3, 4),
    mtu_bytes=1500,
    frame_max_bytes=1518,
    room_bytes=1518,
    socket_mode="copy",
)
ZERO_COPY = msgspec.structs.replace(BINDING, socket_mode="zero-copy")
OTHER = msgspec.structs.replace(BINDING, serial=2, interface="eth8", ifindex=8, queue_ids=(0, 1))
CONFIGURATION = control.Configure(queue_pairs=2, poll="adaptive", binding=None)
TIMEOUT_S = 5.0


class PlayedWorker:
    """Stands for a `WorkerProcess`; `far` is the channel's other end, which the test speaks through."""

    pid = 4711
    exit_text = "was killed by SIGKILL"

    def __init__(self, say: Callable[[str], None], *, may_raise_memlock: bool = True) -> None:
        self.say = say
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel = control.broker_channel(ours)
        self.far: ControlChannel[WorkerMessage, BrokerMessage] = control.worker_channel(theirs)
        self.killed = False
        self.ended = False
        self.has_ended = False
        """Whether it died by itself."""
        self._may_raise_memlock = may_raise_memlock
        self.memory_max_bytes = 0

    def limit_locked_memory(self, max_bytes: int) -> bool:
        self.memory_max_bytes = max_bytes
        return self._may_raise_memlock

    def kill(self) -> None:
        self.killed = True

    async def end(self) -> None:
        self.ended = True
        self.channel.close()

    async def expect(self, kind: type[Any]) -> tuple[Any, list[int]]:
        async with asyncio.timeout(TIMEOUT_S):
            received = await self.far.receive()
        assert received is not None, f"end of file instead of {kind.__name__}"
        assert isinstance(received[0], kind), received[0]
        return received

    async def is_granted(self, queue_pair: int, *, binding: int = 1) -> None:
        """Ask for a socket, and get one."""
        self.far.send(control.SocketWanted(queue_pair=queue_pair, binding=binding))
        _, fds = await self.expect(control.SocketGranted)
        control.close_fds(fds)


@dataclass
class RecordedMemory:
    """Stands for the accounts of locked memory, in which this port has some already."""

    budget: Budget = field(default_factory=lambda: Budget(host_max_bytes=1 << 40))
    locked_bytes: int = 4096
    locks: list[int] = field(default_factory=list)
    fail: MpassthruError | None = None

    def lock(self, wanted_bytes: int) -> None:
        if self.fail is not None and wanted_bytes:
            raise self.fail
        self.locks.append(wanted_bytes)


@dataclass
class RecordedSteering:
    """Stands for the XDP program: which queue has a socket, known by its inode."""

    slots: dict[int, int] = field(default_factory=dict)
    fail: HostError | None = None

    def set_socket(self, queue_id: int, socket_fd: int) -> None:
        if self.fail is not None:
            raise self.fail
        self.slots[queue_id] = os.fstat(socket_fd).st_ino

    def clear_socket(self, queue_id: int) -> None:
        self.slots.pop(queue_id, None)

    def counters(self) -> dict[int, dict[str, int]]:
        return {3: {"redirected": 5}}


class PlayedEndpoint:
    """Hands out what the test puts into it."""

    def __init__(self, *, single: bool = False) -> None:
        self.single = single
        self.connections: asyncio.Queue[socket.socket] = asyncio.Queue()

    async def next_connection(self) -> socket.socket | None:
        return await self.connections.get()

    def close(self) -> None:
        """Nothing to close."""

    def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        self.connections.put_nowait(ours)
        return theirs


@dataclass
class Harness:
    port: Port
    steering: RecordedSteering
    endpoint: PlayedEndpoint
    memory: RecordedMemory
    lines: list[str]
    workers: asyncio.Queue[PlayedWorker]
    made_sockets: list[socket.socket]
    granted_on: list[int]
    """Index of the interface that each of them was made for."""
    running: asyncio.Task[None]
    records: list[int] = field(default_factory=list)
    """Inode of the memory file that each worker was given."""
    configurations: list[control.Configure] = field(default_factory=list)

    async def worker(self) -> PlayedWorker:
        """The next worker started, which has taken its configuration."""
        async with asyncio.timeout(TIMEOUT_S):
            worker = await self.workers.get()
        configuration, fds = await worker.expect(control.Configure)
        self.configurations.append(configuration)
        self.records.append(os.fstat(fds[0]).st_ino)
        control.close_fds(fds)
        return worker

    async def until(self, line: str) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not any(line in said for said in self.lines):  # noqa: ASYNC110 - a list wakes nobody
                await asyncio.sleep(0.001)


async def free_at_once(ifname: str, ifindex: int, queue_id: int, *, timeout_s: float) -> None:
    """Nothing to wait for."""


@contextlib.asynccontextmanager
async def harness(
    *,
    once: bool = False,
    may_raise_memlock: bool = True,
    wait_free: WaitQueueFree = free_at_once,
    binding: control.Binding = BINDING,
) -> AsyncIterator[Harness]:
    workers: asyncio.Queue[PlayedWorker] = asyncio.Queue()
    lines: list[str] = []
    made: list[socket.socket] = []
    granted: list[int] = []
    steering, endpoint, memory = RecordedSteering(), PlayedEndpoint(), RecordedMemory()

    started: list[PlayedWorker] = []

    def start_worker(say: Callable[[str], None]) -> WorkerProcess:
        worker = PlayedWorker(say, may_raise_memlock=may_raise_memlock)
        started.append(worker)
        workers.put_nowait(worker)
        return cast(WorkerProcess, worker)

    def new_socket(ifindex: int) -> socket.socket:
        made.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        granted.append(ifindex)
        return made[-1]

    port = Port(
        CONFIGURATION,
        endpoint,
        cast(Any, memory),
        say=lines.append,
        once=once,
        start_worker=start_worker,
        new_socket=new_socket,
        wait_free=wait_free,
    )
    await port.rebind(binding, cast(Any, steering))
    running = asyncio.create_task(port.run())
    try:
        yield Harness(port, steering, endpoint, memory, lines, workers, made, granted, running)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        for worker in started:
            worker.far.close()
        for sock in made:
            sock.close()
        while not endpoint.connections.empty():
            endpoint.connections.get_nowait().close()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_module, "RESTART_PAUSE_MIN_S", 0.001)


@pytest.mark.parametrize("may_raise", [True, False])
async def test_worker_keeps_ipc_lock_only_where_the_limit_cannot_be_raised(may_raise: bool) -> None:
    async with harness(may_raise_memlock=may_raise) as h:
        worker = await asyncio.wait_for(h.workers.get(), TIMEOUT_S)

        configuration, fds = await worker.expect(control.Configure)
        control.close_fds(fds)

        assert configuration.keep_ipc_lock is not may_raise


async def test_frontend_is_handed_over_only_after_ready() -> None:
    async with harness() as h:
        worker = await h.worker()
        with h.endpoint.connect() as frontend:
            await asyncio.sleep(0)
            worker.far.send(control.Ready())

            _, (fd,) = await worker.expect(control.FrontendConnected)

            with socket.socket(fileno=fd) as connection:
                frontend.sendall(b"unread")
                assert connection.recv(10) == b"unread"


async def test_second_frontend_waits_for_the_first_to_leave() -> None:
    async with harness() as h:
        worker = await h.worker()
        worker.far.send(control.Ready())
        with h.endpoint.connect(), h.endpoint.connect():
            _, fds = await worker.expect(control.FrontendConnected)
            control.close_fds(fds)
            worker.far.send(control.SessionChanged(state="connected"))
            await h.until("guest: connected")
            assert h.endpoint.connections.qsize() == 1
            worker.far.send(control.SessionChanged(state="waiting"))

            _, fds = await worker.expect(control.FrontendConnected)
            control.close_fds(fds)


async def test_bound_socket_is_steered_to_and_the_brokers_copy_closed() -> None:
    async with harness() as h:
        worker = await h.worker()
        worker.far.send(control.SocketWanted(queue_pair=1, binding=1))
        granted, fds = await worker.expect(control.SocketGranted)
        inode = os.fstat(fds[0]).st_ino
        control.close_fds(fds)
        worker.far.send(control.SocketBound(queue_pair=granted.queue_pair, mode="copy"))

        await worker.expect(control.SocketSteered)

        assert h.steering.slots == {4: inode}
        assert h.made_sockets[0].fileno() == -1, "an open copy keeps the queue taken"
        assert h.port.status.mode == "copy"


async def test_socket_that_was_never_bound_is_closed_with_its_session() -> None:
    async with harness() as h:
        worker = await h.worker()
        worker.far.send(control.SocketWanted(queue_pair=0, binding=1))
        _, fds = await worker.expect(control.SocketGranted)
        control.close_fds(fds)
        worker.far.send(control.SessionChanged(state="waiting", error="cannot bind"))
        await h.until("cannot bind")

        assert h.made_sockets[0].fileno() == -1, "an open copy keeps guest memory pinned"


async def test_released_socket_leaves_the_xskmap() -> None:
    async with harness() as h:
        worker = await h.worker()
        await worker.is_granted(0)
        worker.far.send(control.SocketBound(queue_pair=0, mode="copy"))
        await worker.expect(control.SocketSteered)
        assert set(h.steering.slots) == {3}
        worker.far.send(control.SocketReleased(queue_pair=0))
        worker.far.send(control.Notice(text="released"))
        await h.until("released")

        assert h.steering.slots == {}
        assert h.port.status.mode == "detached"


async def test_worker_that_asks_is_told_when_the_queue_is_free() -> None:
    free = asyncio.Event()
    asked: list[tuple[str, int, int]] = []

    async def wait_free(ifname: str, ifindex: int, queue_id: int, *, timeout_s: float) -> None:
        asked.append((ifname, ifindex, queue_id))
        await asyncio.wait_for(free.wait(), timeout_s)

    async with harness(wait_free=wait_free, binding=ZERO_COPY) as h:
        worker = await h.worker()
        await worker.is_granted(1)
        worker.far.send(control.SocketReleased(queue_pair=1, await_free=True))
        worker.far.send(control.Notice(text="released"))
        await h.until("released")
        assert asked == [("eth9", 7, 4)]
        free.set()

        freed, _ = await worker.expect(control.SocketFreed)
        assert freed.queue_pair == 1


async def test_queue_that_stays_taken_is_told_of_with_the_reason() -> None:
    async def wait_free(ifname: str, ifindex: int, queue_id: int, *, timeout_s: float) -> None:
        raise HostError(16, f"the kernel still holds {ifname} queue {queue_id}")

    async with harness(wait_free=wait_free, binding=ZERO_COPY) as h:
        worker = await h.worker()
        await worker.is_granted(0)
        worker.far.send(control.SocketReleased(queue_pair=0, await_free=True))

        refused, _ = await worker.expect(control.SocketRefused)
        assert (refused.errno, refused.error) == (16, "the kernel still holds eth9 queue 3")


async def test_socket_that_cannot_be_steered_to_is_refused_and_closed() -> None:
    async with harness() as h:
        worker = await h.worker()
        h.steering.fail = HostError(22, "cannot put it there")
        worker.far.send(control.SocketWanted(queue_pair=0, binding=1))
        _, fds = await worker.expect(control.SocketGranted)
        control.close_fds(fds)
        worker.far.send(control.SocketBound(queue_pair=0, mode="copy"))

        refused, _ = await worker.expect(control.SocketRefused)

        assert refused == control.SocketRefused(queue_pair=0, errno=22, error="cannot put it there")
        assert h.made_sockets[0].fileno() == -1


@pytest.mark.parametrize(
    "nonsense",
    [
        control.SocketWanted(queue_pair=2, binding=1),
        control.SocketReleased(queue_pair=-1),
        control.SocketBound(queue_pair=0, mode="copy"),
        control.WorkerReport(rx=DirectionReport(dropped={"\x1b[2J": 1}), tx=DirectionReport()),
        control.WorkerReport(rx=DirectionReport(), tx=DirectionReport(bounced={f"r{i}": 1 for i in range(65)})),
        control.WorkerReport(rx=DirectionReport(), tx=DirectionReport(offloaded={"\x1b[2J": 1})),
    ],
    ids=[
        "no such queue pair",
        "negative queue pair",
        "socket never given",
        "reason is no name",
        "too many reasons",
        "offload is no name",
    ],
)
async def test_nonsense_from_a_worker_gets_it_killed_and_replaced(nonsense: WorkerMessage) -> None:
    async with harness() as h:
        worker = await h.worker()
        worker.far.send(nonsense)

        await h.worker()

        assert worker.killed
        assert worker.ended


async def test_dead_worker_is_reported_replaced_and_its_sockets_closed() -> None:
    async with harness() as h:
        worker = await h.worker()
        worker.far.send(control.SocketWanted(queue_pair=0, binding=1))
        _, fds = await worker.expect(control.SocketGranted)
        control.close_fds(fds)
        worker.far.close()

        await h.worker()

        assert any("worker 4711 was killed by SIGKILL" in line for line in h.lines)
        assert h.made_sockets[0].fileno() == -1
        assert h.port.status.worker_restarts == 1


async def test_every_worker_has_the_same_records_of_what_is_in_flight() -> None:
    async with harness() as h:
        (await h.worker()).far.close()
        worker = await h.worker()
        assert len(set(h.records)) == 1

        worker.far.send(control.Resumed(vring=1, buffers=17))

        await h.until("virtqueue 1 goes on where a worker ended that had 17 of its buffers")
        assert h.port.status.buffers_resumed == 17


async def test_worker_that_lived_for_long_is_replaced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_module, "RESTART_AT_ONCE_S", 0.0)
    monkeypatch.setattr(port_module, "RESTART_PAUSE_MIN_S", 3600.0)
    async with harness() as h:
        for _ in range(3):
            (await h.worker()).far.close()
        await h.worker()
        assert sum("starting a new worker at once" in line for line in h.lines) == 3


async def test_workers_that_live_only_briefly_are_replaced_ever_later() -> None:
    async with harness() as h:
        assert h.port.status.worker == "starting"
        worker = await h.worker()
        worker.far.send(control.Ready())
        await h.until("is ready")
        assert h.port.status.worker == "ready"
        worker.far.close()
        for pause_s in (0.001, 0.002, 0.004):
            await h.until(f"starting a new worker in {pause_s:g} s")
            (await h.worker()).far.close()


async def test_port_that_is_stopped_during_a_pause_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_module, "RESTART_PAUSE_MIN_S", 5.0)
    async with harness() as h:
        (await h.worker()).far.close()
        await h.until("starting a new worker in 5 s")
        assert h.port.status.worker == "paused"

        h.port.stop()

        await asyncio.wait_for(h.running, TIMEOUT_S)
    assert h.workers.empty()


async def test_counters_go_on_when_a_worker_is_replaced() -> None:
    async with harness() as h:
        for _ in range(2):
            worker = await h.worker()
            worker.far.send(
                control.WorkerReport(rx=DirectionReport(frames=2, bounced={"x": 1}), tx=DirectionReport(bytes=7))
            )
            worker.far.close()
        await h.worker()

        assert h.port.status.rx.frames == 4
        assert h.port.status.rx.bounced == {"x": 2}
        assert h.port.status.tx.bytes == 14


async def test_stop_lets_the_worker_end_in_good_order_and_takes_its_last_report() -> None:
    async with harness() as h:
        worker = await h.worker()
        h.port.stop()
        await worker.expect(control.Stop)
        worker.far.send(control.WorkerReport(rx=DirectionReport(frames=9), tx=DirectionReport()))
        worker.far.close()

        await asyncio.wait_for(h.running, TIMEOUT_S)

        assert h.port.status.rx.frames == 9
        assert not worker.killed
        assert not h.port.status.troubles


async def test_once_ends_after_the_first_frontend() -> None:
    async with harness(once=True) as h:
        worker = await h.worker()
        worker.far.send(control.Ready())
        with h.endpoint.connect():
            _, fds = await worker.expect(control.FrontendConnected)
            control.close_fds(fds)
        worker.far.send(control.SessionChanged(state="waiting", error="ring outside memory"))
        await worker.expect(control.Stop)
        worker.far.close()

        await asyncio.wait_for(h.running, TIMEOUT_S)

        assert list(h.port.status.troubles) == ["session ended: ring outside memory"]


async def test_refresh_asks_the_worker() -> None:
    async with harness() as h:
        worker = await h.worker()
        refreshing = asyncio.create_task(h.port.refresh())
        await worker.expect(control.ReportWanted)
        worker.far.send(control.WorkerReport(rx=DirectionReport(frames=1), tx=DirectionReport()))

        status = await asyncio.wait_for(refreshing, TIMEOUT_S)

        assert status.rx.frames == 1
        assert status.steering == {"3": {"redirected": 5}}


async def test_fault_is_counted_and_its_words_are_made_printable() -> None:
    async with harness() as h:
        worker = await h.worker()
        worker.far.send(control.Fault(vring=1, error="loop\x1b[31m\nforged line"))

        await h.until("virtqueue 1 was stopped, for the guest broke it: loop [31m forged line")

        assert h.port.status.faults == 1


async def test_what_a_guest_does_often_hides_no_trouble_of_the_host() -> None:
    async with harness() as h:
        worker = await h.worker()
        for _ in range(2 * LINES_MAX):
            worker.far.send(control.Fault(vring=1, error="loop"))
            worker.far.send(control.SessionChanged(state="connected"))
            worker.far.send(control.SessionChanged(state="waiting"))
        worker.far.send(control.Notice(text="going on in copy mode", trouble=True))

        await h.until("going on in copy mode")


async def test_workers_stderr_is_said_printable() -> None:
    async with harness() as h:
        worker = await h.worker()
        worker.say("panicked at \x1b]0;forged title\x07")

        await h.until("worker: panicked at  ]0;forged title ")


async def test_memory_is_locked_once_the_accounts_allow_it_and_not_held_when_the_worker_is_gone() -> None:
    async with harness() as here:
        worker = await here.worker()
        assert worker.memory_max_bytes == here.memory.budget.host_max_bytes

        worker.far.send(control.MemoryWanted(locked_bytes=1 << 30))
        await worker.expect(control.MemoryGranted)
        here.memory.fail = RefusedError("too much for this host")
        worker.far.send(control.MemoryWanted(locked_bytes=1 << 40))
        answer, _ = await worker.expect(control.MemoryRefused)

        assert answer == control.MemoryRefused(errno=0, error="too much for this host")
        worker.far.close()
        await here.worker()
        assert here.memory.locks == [1 << 30, 0]


async def test_worker_that_binds_without_leave_to_lock_memory_is_ended() -> None:
    async with harness() as here:
        worker = await here.worker()
        here.memory.locked_bytes = 0
        worker.far.send(control.SocketWanted(queue_pair=0, binding=1))
        await worker.expect(control.SocketGranted)

        worker.far.send(control.SocketBound(queue_pair=0, mode="copy"))

        await here.until("without leave to lock memory")
        assert worker.killed
        assert here.steering.slots == {}
