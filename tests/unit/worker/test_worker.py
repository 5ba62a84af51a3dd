"""A worker's life, with a fake engine and the test as its broker and its front-end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, cast

import pytest
from fake_engine import FakeEngine, FakeEvent

from mpassthru import control
from mpassthru.control import BrokerMessage, ControlChannel, ControlError, WorkerMessage
from mpassthru.errors import HostError, QueueFault
from mpassthru.vhost_user import Frontend, MemoryRegion, VirtioFeature, VringAddress
from mpassthru.worker.main import Worker

TIMEOUT_S = 5.0
FEATURES = int(VirtioFeature.VIRTIO_F_VERSION_1 | VirtioFeature.VHOST_USER_F_PROTOCOL_FEATURES)
BINDING = control.Binding(
    serial=1,
    interface="eth9",
    ifindex=7,
    queue_ids=(0,),
    mtu_bytes=1500,
    frame_max_bytes=1518,
    room_bytes=1518,
    socket_mode="copy",
)
CONFIGURATION = control.Configure(queue_pairs=1, poll="adaptive", binding=BINDING)


@dataclass
class Bench:
    broker: ControlChannel[BrokerMessage, WorkerMessage]
    engine: FakeEngine
    running: asyncio.Task[None]

    async def expect(self, kind: type[Any]) -> Any:
        async with asyncio.timeout(TIMEOUT_S):
            received = await self.broker.receive()
        assert received is not None, f"end of file instead of {kind.__name__}"
        assert isinstance(received[0], kind), received[0]
        return received[0]

    def connect(self) -> Frontend:
        ours, theirs = socket.socketpair()
        with theirs:
            self.broker.send(control.FrontendConnected(), (theirs.fileno(),))
        return Frontend.from_socket(ours, timeout_s=TIMEOUT_S)

    async def ended(self) -> None:
        await asyncio.wait_for(self.running, TIMEOUT_S)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    engine = FakeEngine()
    far = control.worker_channel(theirs)
    worker = Worker(far, CONFIGURATION, cast(Any, engine))
    running = asyncio.create_task(worker.run())
    bench = Bench(control.broker_channel(ours), engine, running)
    await bench.expect(control.Ready)
    yield bench
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError, ControlError):
        await running
    far.close()
    bench.broker.close()


async def test_stop_gives_everything_back_and_reports_a_last_time(bench: Bench) -> None:
    bench.broker.send(control.Stop())

    report = await bench.expect(control.WorkerReport)

    await bench.ended()
    assert report.rx.dropped == {"runt": 2}
    assert bench.engine.closed


async def test_broker_that_is_gone_ends_the_worker(bench: Bench) -> None:
    bench.broker.close()

    await bench.ended()

    assert bench.engine.closed


async def test_report_is_answered_with_the_engines_counters(bench: Bench) -> None:
    bench.broker.send(control.ReportWanted())

    assert (await bench.expect(control.WorkerReport)).tx.frames == 1


async def test_session_is_told_from_beginning_to_end(bench: Bench) -> None:
    with bench.connect() as frontend:
        assert (await bench.expect(control.SessionChanged)).state == "connected"
        assert await frontend.get_features()

    assert await bench.expect(control.SessionChanged) == control.SessionChanged(state="waiting")


async def test_broken_frontend_ends_its_session_with_a_reason_and_the_next_may_come(bench: Bench) -> None:
    with bench.connect() as frontend:
        await bench.expect(control.SessionChanged)
        await frontend.set_vring_num(99, 256)
        ended = await bench.expect(control.SessionChanged)
    assert ended.state == "waiting"
    assert "vring 99" in ended.error

    with bench.connect() as frontend:
        assert (await bench.expect(control.SessionChanged)).state == "connected"
        assert await frontend.get_features()


async def test_stop_during_a_session_ends_it(bench: Bench) -> None:
    with bench.connect() as frontend:
        await bench.expect(control.SessionChanged)
        assert await frontend.get_features()
        bench.broker.send(control.Stop())

        await bench.expect(control.WorkerReport)
        await bench.ended()

    assert bench.engine.closed


async def test_worker_that_cannot_take_guest_memory_back_ends_before_it_asks_for_another_frontend(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: asyncio.Queue[str] = asyncio.Queue()

    def end(line: str) -> None:
        ends.put_nowait(line)
        raise asyncio.CancelledError  # nothing comes after it

    monkeypatch.setattr("mpassthru.worker.main.end_process", end)
    with bench.connect() as frontend:
        await bench.expect(control.SessionChanged)
        await frontend.negotiate(FEATURES, -1)
        memory, kick = os.memfd_create("guest"), os.eventfd(0)
        os.ftruncate(memory, 1 << 20)
        mapping = asyncio.create_task(frontend.set_mem_table([MemoryRegion(0, 1 << 20, 0, 0, memory)]))
        await bench.expect(control.MemoryWanted)
        bench.broker.send(control.MemoryGranted())
        await asyncio.wait_for(mapping, TIMEOUT_S)
        await frontend.set_vring_num(0, 256)
        await frontend.set_vring_base(0, 0)
        await frontend.set_vring_addr(VringAddress(0, 0, 0, 0x2000, 0x1000, 0))
        kicking = asyncio.create_task(frontend.set_vring_kick(0, kick))
        await bench.expect(control.SocketWanted)
        bench.broker.send(control.SocketGranted(queue_pair=0), (kick,))
        await bench.expect(control.SocketBound)
        bench.broker.send(control.SocketSteered(queue_pair=0))
        await asyncio.wait_for(kicking, TIMEOUT_S)
        os.close(memory)
        os.close(kick)
        assert (await bench.expect(control.SessionChanged)).state == "running"
        bench.engine.stop_errors = [HostError(errno.EIO, "the queue is still held")]

    await bench.expect(control.SocketReleased)
    await bench.expect(control.MemoryWanted)
    bench.broker.send(control.MemoryGranted())
    line = await asyncio.wait_for(ends.get(), TIMEOUT_S)
    assert line.startswith("what the front-end gave is still in use: the queue is still held; ending this worker")
    bench.broker.send(control.ReportWanted())
    while not isinstance(told := await bench.expect(object), control.WorkerReport):
        assert not isinstance(told, control.SessionChanged), "it would be given another front-end"


async def test_fault_is_told_and_touches_no_socket(bench: Bench) -> None:
    bench.engine.attached.add(0)
    bench.engine.emit(FakeEvent(kind="fault", vring=1, error=QueueFault("chain loops")))

    fault = await bench.expect(control.Fault)

    assert fault == control.Fault(vring=1, error="chain loops")
    assert bench.engine.calls == []


async def test_host_error_of_a_queue_pair_is_told_and_the_engine_left_to_recover(bench: Bench) -> None:
    bench.engine.attached.add(0)
    bench.engine.emit(FakeEvent(kind="host-error", vring=1, error=HostError(100, "network is down")))

    assert await bench.expect(control.Notice) == control.Notice(text="network is down", trouble=True)
    assert bench.engine.calls == []


async def test_answer_of_the_kernel_that_nobody_asked_for_is_told_and_the_socket_given_up(bench: Bench) -> None:
    bench.engine.attached.add(0)
    error = HostError(errno.EIO, "the kernel has sent what was not given to it")
    bench.engine.emit(FakeEvent(kind="distrusted", vring=1, value=0, error=error))

    notice = await bench.expect(control.Notice)

    assert notice.trouble
    assert notice.text.startswith("the kernel has sent what was not given to it; suspect its driver, ")
    assert await bench.expect(control.SocketReleased) == control.SocketReleased(queue_pair=0)
    assert bench.engine.calls == ["detach 0"]


async def test_broker_that_does_not_read_ends_the_worker(bench: Bench) -> None:
    for _ in range(10_000):
        bench.engine.emit(FakeEvent(kind="fault", vring=1, error=QueueFault("chain loops")))

    with pytest.raises(ControlError, match="cannot send Fault"):
        await bench.ended()

    assert bench.engine.closed


async def test_nonsense_from_the_broker_ends_the_worker(bench: Bench) -> None:
    bench.broker.send(CONFIGURATION)

    with pytest.raises(ControlError, match="unexpected control message Configure"):
        await bench.ended()

    assert bench.engine.closed
