"""The channel between broker and worker: every message round trip, descriptors, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpassthru import control
from mpassthru.control import BrokerMessage, ControlChannel, ControlError, WorkerMessage
from mpassthru.report import DirectionReport

Pair = tuple[ControlChannel[BrokerMessage, WorkerMessage], ControlChannel[WorkerMessage, BrokerMessage]]

TIMEOUT_S = 5.0
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
CONFIGURATION = control.Configure(queue_pairs=2, poll="adaptive", binding=BINDING, unproven=(1,), uid=1000)
FROM_BROKER = [
    CONFIGURATION,
    control.Rebind(binding=BINDING),
    control.Rebind(binding=None),
    control.FrontendConnected(),
    control.SocketGranted(queue_pair=1),
    control.SocketSteered(queue_pair=1),
    control.SocketRefused(queue_pair=1, errno=16, error="busy"),
    control.ReportWanted(),
    control.Stop(),
]
FROM_WORKER = [
    control.Ready(),
    control.SocketWanted(queue_pair=0, binding=1),
    control.SocketBound(queue_pair=0, mode="copy"),
    control.SocketReleased(queue_pair=0),
    control.Rebound(errno=16, error="busy"),
    control.SessionChanged(state="waiting", error="gone"),
    control.Fault(vring=1, error="loop"),
    control.Notice(text="hello"),
    control.WorkerReport(rx=DirectionReport(frames=3, bounced={"short_buffer": 1}), tx=DirectionReport()),
]


class Exhausted(socket.socket):
    """A socket for which the kernel has no memory."""

    def sendmsg(self, *_: object) -> int:
        raise OSError(errno.ENOBUFS, "No buffer space available")


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def pair(sockets: tuple[socket.socket, socket.socket]) -> Pair:
    return control.broker_channel(sockets[0]), control.worker_channel(sockets[1])


@pytest.mark.parametrize("message", FROM_BROKER, ids=lambda message: type(message).__name__)
async def test_broker_message_arrives_as_sent(pair: Pair, message: BrokerMessage) -> None:
    pair[0].send(message)

    assert await pair[1].receive() == (message, [])


@pytest.mark.parametrize("message", FROM_WORKER, ids=lambda message: type(message).__name__)
async def test_worker_message_arrives_as_sent(pair: Pair, message: WorkerMessage) -> None:
    pair[1].send(message)

    assert await pair[0].receive() == (message, [])


async def test_descriptor_arrives_as_a_new_close_on_exec_one(pair: Pair) -> None:
    reading, writing = os.pipe()
    pair[0].send(control.FrontendConnected(), (writing,))
    os.close(writing)

    received = await pair[1].receive()

    assert received is not None
    (fd,) = received[1]
    assert not os.get_inheritable(fd)
    os.write(fd, b"same pipe")
    os.close(fd)
    assert os.read(reading, 100) == b"same pipe"
    os.close(reading)


async def test_closed_end_reads_as_end_of_file(pair: Pair) -> None:
    pair[0].close()

    assert await pair[1].receive() is None


async def test_sending_to_a_closed_end_is_an_error_not_a_signal(pair: Pair) -> None:
    pair[1].close()

    with pytest.raises(ControlError, match="cannot send Stop"):
        pair[0].send(control.Stop())


async def test_peer_that_never_reads_is_an_error_not_a_hang(pair: Pair) -> None:
    def fill() -> None:
        for _ in range(100_000):
            pair[0].send(control.ReportWanted())

    with pytest.raises(ControlError, match="EAGAIN"):
        fill()


async def test_peer_that_never_reads_ends_the_channel_wherever_the_send_failed(pair: Pair) -> None:
    receiving = asyncio.create_task(pair[0].receive())
    with contextlib.suppress(ControlError):
        for _ in range(100_000):
            pair[0].send(control.ReportWanted())

    with pytest.raises(ControlError, match="EAGAIN"):
        await asyncio.wait_for(receiving, TIMEOUT_S)


async def test_first_message_that_cannot_be_sent_is_what_both_directions_tell_of(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    channel = control.broker_channel(Exhausted(fileno=os.dup(sockets[0].fileno())))
    with pytest.raises(ControlError, match=r"cannot send ReportWanted .*ENOBUFS"):
        channel.send(control.ReportWanted())

    with pytest.raises(ControlError, match=r"cannot send ReportWanted .*ENOBUFS"):
        channel.send(control.Stop())
    with pytest.raises(ControlError, match=r"cannot send ReportWanted .*ENOBUFS"):
        await asyncio.wait_for(channel.receive(), TIMEOUT_S)
    channel.close()


async def test_messages_without_end_leave_other_tasks_their_turn(pair: Pair) -> None:
    for _ in range(50):
        pair[1].send(control.Ready())
    turns = 0

    async def receive_all() -> None:
        for _ in range(50):
            await pair[0].receive()

    receiving = asyncio.create_task(receive_all())
    while not receiving.done():
        await asyncio.sleep(0)
        turns += 1

    assert turns >= 50


async def test_message_of_the_other_direction_is_refused_and_its_descriptors_closed(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    broker = control.broker_channel(sockets[0])
    reading, writing = os.pipe()
    ControlChannel[BrokerMessage, WorkerMessage](sockets[1], WorkerMessage).send(control.Stop(), (writing,))
    os.close(writing)

    with pytest.raises(ControlError, match="cannot decode"):
        await broker.receive()

    assert os.read(reading, 1) == b"", "the write end that came with the message is still open"
    os.close(reading)


async def test_too_many_descriptors_are_refused_and_closed(sockets: tuple[socket.socket, socket.socket]) -> None:
    broker = control.broker_channel(sockets[0])
    reading, writing = os.pipe()
    fds = [writing] * (control.MESSAGE_MAX_FDS + 5)
    socket.send_fds(sockets[1], [msgspec.msgpack.encode(control.Ready())], fds)
    os.close(writing)

    with pytest.raises(ControlError, match="fds"):
        await broker.receive()

    assert os.read(reading, 1) == b""
    os.close(reading)


@given(data=st.binary(min_size=1, max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
async def test_random_bytes_are_refused(pair: Pair, sockets: tuple[socket.socket, socket.socket], data: bytes) -> None:
    sockets[1].send(data)

    with pytest.raises(ControlError):
        await pair[0].receive()
