"""The device on an engine without a data plane: order of memory, socket, steering and virtqueue; what is given back."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import msgspec
import pytest
from fake_engine import FakeEngine

from mpassthru import control
from mpassthru.control import BrokerMessage, ControlChannel, WorkerMessage
from mpassthru.errors import HostError, QueueFault, RefusedError
from mpassthru.vhost_user import MemoryRegion, VirtioFeature
from mpassthru.vhost_user.device import Vring
from mpassthru.vhost_user.message import VHOST_VRING_F_LOG
from mpassthru.worker import device as device_module
from mpassthru.worker import port_sockets
from mpassthru.worker.async_engine import AsyncEngine
from mpassthru.worker.device import PortDevice, rarp_frame
from mpassthru.worker.socket_client import SocketClient

TIMEOUT_S = 5.0
MAC = bytes.fromhex("525400123456")
VRING = Vring(
    size=256,
    base=0,
    desc_user_address=0,
    used_user_address=0,
    avail_user_address=0,
    flags=0,
    log_guest_address=0,
    features=0,
    enabled=True,
    kick_fd=0,
)


def configuration(queues: int = 1) -> control.Configure:
    return control.Configure(queue_pairs=queues, poll="adaptive", binding=binding(queues))


def binding(queues: int = 1, *, serial: int = 1, ifindex: int = 7) -> control.Binding:
    return control.Binding(
        serial=serial,
        interface=f"eth{ifindex}",
        ifindex=ifindex,
        queue_ids=tuple(range(queues)),
        mtu_bytes=1500,
        frame_max_bytes=1518,
        room_bytes=1518,
        socket_mode="copy",
    )


@dataclass
class Bench:
    device: PortDevice
    engine: FakeEngine
    broker: ControlChannel[BrokerMessage, WorkerMessage]
    notices: list[str]
    heard: list[str]
    refuse: control.SocketRefused | None = None
    refuse_memory: control.MemoryRefused | None = None
    locked: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    """What sockets were to be bound to, by serial number."""

    async def play_broker(self, client: SocketClient, far: ControlChannel[WorkerMessage, BrokerMessage]) -> None:
        """Grant and steer whatever is asked for; carry the answers to the client as the worker's loop does."""
        while (received := await self.broker.receive()) is not None:
            message, _ = received
            if not isinstance(message, control.MemoryWanted):
                self.heard.append(type(message).__name__)
            match message:
                case control.SocketWanted(queue_pair=pair, binding=serial):
                    self.wanted.append(serial)
                    fd = os.open("/dev/null", os.O_RDWR)
                    self.broker.send(control.SocketGranted(queue_pair=pair), (fd,))
                    os.close(fd)
                case control.SocketBound(queue_pair=pair):
                    self.broker.send(self.refuse or control.SocketSteered(queue_pair=pair))
                case control.MemoryWanted(locked_bytes=locked_bytes):
                    self.locked.append(locked_bytes)
                    self.broker.send(self.refuse_memory or control.MemoryGranted())
                case _:
                    continue
            answer = await far.receive()
            assert answer is not None
            client.answered(cast(Any, answer[0]), answer[1])


@pytest.fixture
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    broker, far = control.broker_channel(ours), control.worker_channel(theirs)
    client, fake = SocketClient(far), FakeEngine()
    engine = AsyncEngine(cast(Any, fake), lambda event: None)
    notices: list[str] = []
    device = PortDevice(
        engine,
        client,
        configuration(getattr(request, "param", 1)),
        on_running=lambda running: notices.append("running" if running else "idle"),
        on_resumed=lambda index, buffers: notices.append(f"{buffers} of virtqueue {index}"),
        notice=notices.append,
        trouble=notices.append,
    )
    bench = Bench(device, fake, broker, notices, [])
    playing = asyncio.create_task(bench.play_broker(client, far))
    yield bench
    far.close()
    await playing
    broker.close()
    engine.close()


async def heard(bench: Bench, *names: str) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while bench.heard != list(names):  # noqa: ASYNC110 - a list wakes nobody
            await asyncio.sleep(0.001)


async def test_first_vring_of_a_pair_brings_a_socket_that_is_steered_to_before_the_start(bench: Bench) -> None:
    await bench.device.start_vring(0, VRING)
    await bench.device.start_vring(1, VRING)

    assert bench.engine.calls == ["attach 0", "start 0", "start 1"]
    assert bench.heard == ["SocketWanted", "SocketBound"]
    assert bench.notices == ["running"]


async def test_buffers_that_an_earlier_worker_had_are_told(bench: Bench) -> None:
    bench.engine.resumed = {1: 17}
    await bench.device.start_vring(0, VRING)
    await bench.device.start_vring(1, VRING)

    assert bench.notices == ["running", "17 of virtqueue 1"]


async def test_concurrent_starts_of_a_pair_share_one_socket(bench: Bench) -> None:
    await asyncio.gather(bench.device.start_vring(0, VRING), bench.device.start_vring(1, VRING))

    assert bench.engine.calls.count("attach 0") == 1


async def test_bind_error_ends_the_start_with_its_errno(bench: Bench) -> None:
    bench.engine.attach_errors = [HostError(16, "another socket owns this queue")]

    with pytest.raises(HostError, match="another socket") as raised:
        await bench.device.start_vring(0, VRING)

    assert raised.value.errno == 16
    assert bench.engine.calls == ["attach 0"]


async def test_socket_that_cannot_be_bound_is_given_back_by_the_broker_too(bench: Bench) -> None:
    bench.engine.attach_errors = [HostError(16, "another socket owns this queue")]

    with pytest.raises(HostError):
        await bench.device.start_vring(0, VRING)

    await heard(bench, "SocketWanted", "SocketReleased")


async def test_start_that_is_cancelled_while_binding_gives_the_socket_back(bench: Bench) -> None:
    bench.engine.held = {"attach"}
    starting = asyncio.create_task(bench.device.start_vring(0, VRING))
    while "attach 0" not in bench.engine.calls:  # noqa: ASYNC110 - a list wakes nobody
        await asyncio.sleep(0.001)

    starting.cancel()
    bench.engine.end_held()

    await heard(bench, "SocketWanted", "SocketReleased")
    assert bench.engine.calls == ["attach 0", "detach 0"]


async def test_start_that_failed_leaves_nothing_running(bench: Bench) -> None:
    bench.engine.start_errors = [QueueFault("ring outside memory")]
    with pytest.raises(QueueFault):
        await bench.device.start_vring(0, VRING)
    assert bench.notices == []
    assert not bench.device.looks_unshared()

    await bench.device.start_vring(0, VRING)

    assert bench.notices == ["running"]


async def test_socket_that_cannot_be_steered_to_is_given_back(bench: Bench) -> None:
    bench.refuse = control.SocketRefused(queue_pair=0, errno=0, error="no slot")

    with pytest.raises(RefusedError, match="no slot"):
        await bench.device.start_vring(0, VRING)

    assert bench.engine.calls == ["attach 0", "detach 0"]
    await heard(bench, "SocketWanted", "SocketBound", "SocketReleased")


async def test_stop_returns_the_base_and_keeps_the_socket_where_the_engine_does(bench: Bench) -> None:
    await bench.device.start_vring(1, VRING)

    assert await bench.device.stop_vring(1) == 42

    assert "SocketReleased" not in bench.heard


async def test_device_says_when_its_last_virtqueue_has_stopped(bench: Bench) -> None:
    for index in (0, 1):
        await bench.device.start_vring(index, VRING)
    await bench.device.stop_vring(0)
    assert bench.notices == ["running"]

    await bench.device.stop_vring(1)
    assert bench.notices == ["running", "idle"]


async def test_virtqueue_that_could_not_be_stopped_is_still_to_be_stopped(bench: Bench) -> None:
    await bench.device.start_vring(1, VRING)
    bench.engine.stop_errors = [HostError(5, "the kernel does not let go")]
    with pytest.raises(HostError, match="does not let go"):
        await bench.device.stop_vring(1)

    assert await bench.device.stop_vring(1) == 42
    assert bench.notices == ["running", "idle"]


async def test_stop_of_a_queue_with_buffers_in_the_kernel_closes_the_socket_first(bench: Bench) -> None:
    await bench.device.start_vring(0, VRING)
    bench.engine.kernel_has_buffers = True

    assert await bench.device.stop_vring(0) == 42

    assert bench.engine.calls[-3:] == ["stop 0", "detach 0", "stop 0"]
    await heard(bench, "SocketWanted", "SocketBound", "SocketReleased")


@pytest.fixture
def _attached_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_sockets, "ATTACH_AGAIN_AFTER_S", 0.001)


@pytest.mark.usefixtures("_attached_again_at_once")
async def test_virtqueue_whose_pair_lost_its_socket_gets_a_new_one(bench: Bench) -> None:
    await bench.device.start_vring(0, VRING)
    await bench.device.start_vring(1, VRING)
    bench.engine.kernel_has_buffers = True

    await bench.device.stop_vring(0)

    await heard(bench, "SocketWanted", "SocketBound", "SocketReleased", "SocketWanted", "SocketBound")
    assert bench.engine.calls[-3:] == ["detach 0", "stop 0", "attach 0"]


@pytest.mark.usefixtures("_attached_again_at_once")
async def test_virtqueue_that_cannot_have_a_new_socket_is_told_of(bench: Bench) -> None:
    await bench.device.start_vring(0, VRING)
    await bench.device.start_vring(1, VRING)
    bench.engine.kernel_has_buffers = True
    bench.engine.attach_errors = [HostError(16, "another socket owns this queue")] * 2

    await bench.device.stop_vring(0)

    again = ["SocketWanted", "SocketReleased"] * 2
    await heard(bench, "SocketWanted", "SocketBound", "SocketReleased", *again, "SocketWanted", "SocketBound")
    told = "queue pair 0 stands still until it has a socket again: another socket owns this queue"
    assert bench.notices == ["running", told], "told once, and tried until it is had"


@pytest.mark.usefixtures("_attached_again_at_once")
@pytest.mark.parametrize("bench", [2], indirect=True)
async def test_exchange_that_fails_for_one_pair_goes_on_with_the_others_and_is_tried_again(bench: Bench) -> None:
    for index in (0, 2):
        await bench.device.start_vring(index, VRING)
    bench.engine.attach_errors = [HostError(16, "another socket owns this queue")] * 2

    with pytest.raises(HostError, match="owns this queue"):
        await bench.device._sockets.replace_sockets([0, 1])

    assert bench.engine.attached == {1}
    async with asyncio.timeout(TIMEOUT_S):
        while bench.engine.attached != {0, 1}:  # noqa: ASYNC110 - a set wakes nobody
            await asyncio.sleep(0.001)


@pytest.mark.usefixtures("_attached_again_at_once")
async def test_no_new_socket_for_a_pair_that_was_stopped_as_a_whole(bench: Bench) -> None:
    await bench.device.start_vring(0, VRING)
    await bench.device.start_vring(1, VRING)
    bench.engine.kernel_has_buffers = True
    others = asyncio.all_tasks()

    await bench.device.stop_vring(0)
    await bench.device.stop_vring(1)
    await asyncio.gather(*asyncio.all_tasks() - others)

    assert bench.engine.calls.count("attach 0") == 1


async def test_stop_after_a_start_that_was_cancelled_early_does_not_reach_the_engine(bench: Bench) -> None:
    bench.engine.held = {"attach"}
    starting = asyncio.create_task(bench.device.start_vring(0, VRING))
    while "attach 0" not in bench.engine.calls:  # noqa: ASYNC110 - a list wakes nobody
        await asyncio.sleep(0.001)
    starting.cancel()
    bench.engine.end_held()
    await asyncio.gather(starting, return_exceptions=True)

    await bench.device.stop_vring(0)

    assert "stop 0" not in bench.engine.calls


async def test_sockets_are_closed_before_memory_changes(bench: Bench) -> None:
    await bench.device.start_vring(0, VRING)
    await bench.device.stop_vring(0)
    region = MemoryRegion(guest_phys_address=0, size_bytes=4096, user_address=0, mmap_offset=0, fd=0)

    await bench.device.map_memory([region])

    assert bench.engine.calls[-2:] == ["detach 0", "map 1"]
    await heard(bench, "SocketWanted", "SocketBound", "SocketReleased")


MEMORY = MemoryRegion(guest_phys_address=0, size_bytes=1 << 20, user_address=0, mmap_offset=0, fd=0)
MORE = MemoryRegion(guest_phys_address=1 << 20, size_bytes=2 << 20, user_address=1 << 20, mmap_offset=0, fd=0)
SLABS_BYTES = (4608 << 10) + 3 * 4096


async def quiet(bench: Bench) -> None:
    """Nothing goes on in the background any more."""
    renewing = bench.device._sockets.renewal._renewing
    assert renewing is not None
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.wait({renewing})


async def test_memory_that_is_added_is_prepared_for_before_the_socket_is_exchanged(bench: Bench) -> None:
    await bench.device.map_memory([MEMORY])
    await bench.device.start_vring(0, VRING)
    bench.engine.calls.clear()
    bench.heard.clear()

    assert await bench.device.add_memory([MORE])
    assert bench.engine.calls == ["add 1"]
    await quiet(bench)

    assert bench.engine.calls == ["add 1", "prepare 0", "detach 0", "attach-prepared 0"]
    await heard(bench, "SocketWanted", "SocketBound")
    assert bench.locked == [(1 << 20) + SLABS_BYTES, (3 << 20) + SLABS_BYTES]


async def test_memory_that_cannot_be_locked_twice_is_let_go_of_before_it_is_registered_again(bench: Bench) -> None:
    await bench.device.start_vring(0, VRING)
    bench.engine.prepare_errors = [HostError(errno.ENOBUFS, "the memlock limit is too small")]
    bench.engine.calls.clear()

    await bench.device.add_memory([MORE])
    await quiet(bench)

    assert bench.engine.calls == ["add 1", "prepare 0", "detach 0", "attach 0"]
    assert bench.notices == ["running"]


async def test_socket_that_cannot_be_renewed_goes_on_and_the_user_hears_of_it(bench: Bench) -> None:
    await bench.device.start_vring(0, VRING)
    bench.engine.prepare_errors = [HostError(errno.ENOMEM, "not enough free memory")]

    await bench.device.add_memory([MORE])
    await quiet(bench)

    assert bench.engine.attached == {0}
    assert bench.notices[-1].endswith("sockets cannot be renewed to use it in place: not enough free memory")


async def test_prepared_socket_that_cannot_be_bound_is_followed_by_another(bench: Bench) -> None:
    await bench.device.start_vring(0, VRING)
    bench.engine.attach_errors = [HostError(errno.EBUSY, "the queue is held")]
    bench.engine.calls.clear()

    await bench.device.add_memory([MORE])
    await quiet(bench)

    assert bench.engine.calls[-3:] == ["detach 0", "attach-prepared 0", "attach 0"]


async def test_socket_that_went_while_the_next_one_was_prepared_leaves_none(bench: Bench) -> None:
    await bench.device.start_vring(0, VRING)
    bench.engine.held = {"prepare"}
    bench.engine.kernel_has_buffers = True
    await bench.device.add_memory([MORE])
    while "prepare 0" not in bench.engine.calls:  # noqa: ASYNC110 - a list wakes nobody
        await asyncio.sleep(0.001)
    bench.engine.calls.clear()

    await bench.device.stop_vring(0)
    bench.engine.end_held()
    await quiet(bench)

    assert bench.engine.calls == ["stop 0", "detach 0", "stop 0", "discard 0"]


async def test_new_map_waits_until_no_memory_is_being_pinned(bench: Bench) -> None:
    await bench.device.start_vring(0, VRING)
    bench.engine.held = {"prepare"}
    await bench.device.add_memory([MORE])
    while "prepare 0" not in bench.engine.calls:  # noqa: ASYNC110 - a list wakes nobody
        await asyncio.sleep(0.001)
    await bench.device.stop_vring(0)
    mapping = asyncio.create_task(bench.device.map_memory([MEMORY]))
    await asyncio.sleep(0.01)
    assert "map 1" not in bench.engine.calls

    bench.engine.end_held()
    await mapping

    assert bench.engine.calls[-3:] == ["discard 0", "detach 0", "map 1"]


async def test_new_map_waits_until_no_socket_is_being_bound(bench: Bench) -> None:
    await bench.device.start_vring(0, VRING)
    bench.engine.held = {"attach-prepared"}
    await bench.device.add_memory([MORE])
    while "attach-prepared 0" not in bench.engine.calls:  # noqa: ASYNC110 - a list wakes nobody
        await asyncio.sleep(0.001)
    stopping = asyncio.create_task(bench.device.stop_vring(0))
    mapping = asyncio.create_task(bench.device.map_memory([MEMORY]))
    await asyncio.sleep(0.01)
    assert "map 1" not in bench.engine.calls

    bench.engine.end_held()
    await asyncio.gather(stopping, mapping)

    assert bench.engine.calls[-2:] == ["detach 0", "map 1"]


async def test_memory_beyond_the_budget_is_refused_before_the_engine_hears_of_it(bench: Bench) -> None:
    await bench.device.map_memory([MEMORY])
    bench.refuse_memory = control.MemoryRefused(errno=0, error="this port's budget is 1 MiB")
    bench.engine.calls.clear()

    for change in (bench.device.add_memory, bench.device.map_memory):
        with pytest.raises(RefusedError, match="this port's budget is 1 MiB"):
            await change([MORE])

    assert bench.engine.calls == []


async def test_memory_that_could_not_be_added_is_given_back_to_the_budget(bench: Bench) -> None:
    await bench.device.map_memory([MEMORY])
    bench.engine.add_error = HostError(errno.ENOMEM, "cannot map guest memory region")

    with pytest.raises(HostError, match="cannot map"):
        await bench.device.add_memory([MORE])

    assert bench.locked[-1] == bench.locked[0] == (1 << 20) + SLABS_BYTES


async def test_unmapped_memory_is_given_back_to_the_budget(bench: Bench) -> None:
    await bench.device.map_memory([MEMORY])

    await bench.device.map_memory([])

    assert bench.locked[-1] == 0


async def test_reset_closes_every_socket(bench: Bench) -> None:
    await bench.device.start_vring(0, VRING)
    await bench.device.stop_vring(0)

    await bench.device.reset()

    assert bench.engine.attached == set()


async def test_logging_is_switched_while_virtqueues_run(bench: Bench) -> None:
    await bench.device.start_vring(0, VRING)
    await bench.device.start_vring(1, VRING)
    bench.engine.calls.clear()

    await bench.device.set_log(0, 4096, 8)
    await bench.device.log_writes(True)
    await bench.device.set_vring_log(1, 0x3000)
    await bench.device.log_writes(False)
    await bench.device.set_vring_log(1, None)

    assert bench.engine.calls == [
        "log True 4096 8",
        "vring-log 0 False None",
        "vring-log 1 False None",
        "vring-log 0 True None",
        "vring-log 1 True None",
        "vring-log 1 True 12288",
        "vring-log 0 False None",
        "vring-log 1 False 12288",
        "vring-log 1 False None",
    ]


async def test_queues_that_ran_without_the_log_they_should_have_had_mark_everything(bench: Bench) -> None:
    """QEMU starts queues with logging on, and sends the log afterwards; a worker before this one may have died too."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 4096)
    await bench.device.map_memory([MemoryRegion(0, 4096, 0, 0, fd)])
    await bench.device.start_vring(0, replace(VRING, features=int(VirtioFeature.VHOST_F_LOG_ALL)))
    bench.engine.calls.clear()

    await bench.device.set_log(0, 4096, 0)
    assert bench.engine.calls == ["log True 4096 0", "vring-log 0 True None", "mark-all"]
    await bench.device.set_log(0, 8192, 0)
    assert bench.engine.calls[3:] == ["log True 8192 0", "vring-log 0 True None"], "the one before had it all"
    os.close(fd)


async def test_queues_that_start_with_a_log_there_do_not_mark_everything(bench: Bench) -> None:
    await bench.device.set_log(0, 4096, 0)
    await bench.device.start_vring(0, replace(VRING, flags=VHOST_VRING_F_LOG, log_guest_address=0x3000))
    await bench.device.set_log(0, 4096, 0)
    await bench.device.set_log_fd(0)
    assert "mark-all" not in bench.engine.calls
    assert bench.engine.calls[-2:] == ["log-fd True", "vring-log 0 False 12288"]


async def test_memory_that_the_log_has_no_room_for_is_not_added(bench: Bench) -> None:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 8192)
    await bench.device.map_memory([MemoryRegion(0, 4096, 0, 0, fd)])
    await bench.device.set_log(0, 1, 0)
    await bench.device.start_vring(0, replace(VRING, features=int(VirtioFeature.VHOST_F_LOG_ALL)))
    more = [MemoryRegion(7 * 4096, 4096, 7 * 4096, 4096, fd)], [MemoryRegion(8 * 4096, 4096, 8 * 4096, 4096, fd)]

    await bench.device.add_memory(more[0])
    with pytest.raises(RefusedError, match="no room"):
        await bench.device.add_memory(more[1])
    await bench.device.log_writes(False)
    await bench.device.add_memory(more[1])
    os.close(fd)


async def test_mtu_beyond_the_interfaces_is_refused_with_the_way_out(bench: Bench) -> None:
    await bench.device.set_mtu(1500)

    with pytest.raises(RefusedError, match="host_mtu=1500 or less"):
        await bench.device.set_mtu(1501)


async def test_rarp_goes_out_of_the_first_queue(bench: Bench) -> None:
    await bench.device.start_vring(0, VRING)

    await bench.device.send_rarp(MAC)

    assert bench.engine.calls[-1] == f"send 0 {rarp_frame(MAC).hex()}"


async def test_rarp_that_cannot_be_sent_is_said_and_ends_nothing(bench: Bench) -> None:
    await bench.device.start_vring(1, VRING)
    bench.engine.send_errors = [RefusedError("cannot send: the tx ring is full")]

    await bench.device.send_rarp(bytes(6))

    assert bench.notices[-1] == "cannot announce the guest's address: cannot send: the tx ring is full"


async def test_rarp_goes_out_once_when_there_is_a_socket(bench: Bench) -> None:
    """QEMU asks for it before it starts the guest."""
    await bench.device.send_rarp(MAC)
    assert bench.engine.calls == []

    await bench.device.start_vring(0, VRING)
    await bench.device.start_vring(1, VRING)

    assert bench.engine.calls == ["attach 0", "start 0", f"send 0 {rarp_frame(MAC).hex()}", "start 1"]


async def test_rarp_of_a_guest_that_has_gone_is_forgotten(bench: Bench) -> None:
    await bench.device.send_rarp(MAC)
    await bench.device.map_memory([])

    await bench.device.start_vring(0, VRING)

    assert bench.engine.calls[-1] == "start 0"


def test_rarp_frame_has_the_layout_of_rfc_903() -> None:
    frame = rarp_frame(MAC)

    assert len(frame) == 60
    assert frame[:14] == b"\xff" * 6 + MAC + b"\x80\x35"
    assert frame[14:22] == bytes.fromhex("0001080006040003")
    assert frame[22:42] == (MAC + bytes(4)) * 2


def test_multiqueue_is_offered_only_with_several_queues() -> None:
    def features(queues: int) -> int:
        return PortDevice(
            cast(Any, None),
            cast(Any, None),
            configuration(queues),
            on_running=lambda _: None,
            on_resumed=print,
            notice=print,
            trouble=print,
        ).features

    assert not features(1) & VirtioFeature.VIRTIO_NET_F_MQ
    assert features(2) & VirtioFeature.VIRTIO_NET_F_MQ


def test_offloads_are_offered_where_the_broker_says_so() -> None:
    def features(**changed: bool) -> int:
        return PortDevice(
            cast(Any, None),
            cast(Any, None),
            msgspec.structs.replace(configuration(1), **changed),
            on_running=lambda _: None,
            on_resumed=print,
            notice=print,
            trouble=print,
        ).features

    plain, tx, rx = features(), device_module.TX_OFFLOADS, device_module.RX_OFFLOADS
    assert not plain & (tx | rx)
    assert features(tx_offloads=True) == plain | tx
    assert features(rx_offloads=True) == plain | rx


@pytest.mark.parametrize("feature", ["VIRTIO_NET_F_HOST_UFO", "VIRTIO_F_IN_ORDER"])
def test_what_is_not_built_is_not_offered(feature: str) -> None:
    assert not device_module.FEATURES & VirtioFeature[feature]
