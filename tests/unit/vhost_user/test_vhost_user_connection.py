"""Whole messages and their descriptors over a real socket, however the bytes arrive."""

from __future__ import annotations

import array
import asyncio
import itertools
import os
import resource
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from vhost_user_fakes import open_fds

from mpassthru.errors import ProtocolError
from mpassthru.vhost_user.connection import Connection
from mpassthru.vhost_user.message import U64, Empty, encode_message

Pair = tuple[socket.socket, Connection]


@pytest.fixture
def pair() -> Iterator[Pair]:
    before = open_fds()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, Connection(theirs) as connection:
        yield ours, connection
    assert open_fds() <= before


@pytest.fixture
def null_fd() -> Iterator[int]:
    fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)


def send_with_fds(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


async def settle() -> None:
    """Let the other side run until it waits again."""
    for _ in range(3):
        await asyncio.sleep(0)


async def test_message_in_single_bytes_is_reassembled(pair: Pair) -> None:
    sock, connection = pair
    receiving = asyncio.create_task(connection.receive())
    for byte in encode_message(2, U64(0x1122334455667788)):
        sock.send(bytes([byte]))
        await settle()
    message = await receiving
    assert message is not None
    assert (message.request, message.payload) == (2, U64(0x1122334455667788).encode())


async def test_descriptors_belong_to_the_message_they_came_with(pair: Pair, null_fd: int) -> None:
    sock, connection = pair
    sock.send(encode_message(1, Empty()))
    send_with_fds(sock, encode_message(12, U64(0)), [null_fd])
    sock.send(encode_message(3, Empty()))
    for expected in (0, 1, 0):
        message = await connection.receive()
        assert message is not None
        with message:
            assert len(message.fds) == expected
            assert all(not os.get_inheritable(fd) for fd in message.fds)


async def test_descriptors_that_come_with_the_payload_are_collected(pair: Pair, null_fd: int) -> None:
    sock, connection = pair
    data = encode_message(12, U64(0))
    send_with_fds(sock, data[:12], [null_fd])
    send_with_fds(sock, data[12:], [null_fd, null_fd])
    message = await connection.receive()
    assert message is not None
    with message:
        assert len(message.fds) == 3


async def test_close_between_messages_is_the_end(pair: Pair) -> None:
    sock, connection = pair
    sock.send(encode_message(3, Empty()))
    sock.close()
    assert await connection.receive() is not None
    assert await connection.receive() is None


@pytest.mark.parametrize("length", range(1, 20))
async def test_close_inside_a_message_is_a_protocol_error_and_keeps_no_descriptor(
    pair: Pair, null_fd: int, length: int
) -> None:
    sock, connection = pair
    send_with_fds(sock, encode_message(12, U64(0))[:length], [null_fd])
    sock.close()
    with pytest.raises(ProtocolError, match=r"the connection ended after \d+ of the"):
        await connection.receive()


async def test_peer_that_resets_the_connection_is_the_end(pair: Pair) -> None:
    sock, connection = pair
    await connection.send(1, U64(0), reply=True)
    sock.close()  # with the reply unread: ECONNRESET on the other side
    assert await connection.receive() is None


@pytest.mark.parametrize("count", [9, 64])
async def test_too_many_descriptors_are_a_protocol_error_and_closed(pair: Pair, null_fd: int, count: int) -> None:
    sock, connection = pair
    send_with_fds(sock, encode_message(5, U64(0)), [null_fd] * count)
    with pytest.raises(ProtocolError, match="more than 8 were sent"):
        await connection.receive()


async def test_descriptor_limit_of_the_process_is_a_protocol_error_that_says_so(pair: Pair, null_fd: int) -> None:
    sock, connection = pair
    send_with_fds(sock, encode_message(5, U64(0)), [null_fd] * 8)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    free = (fd for fd in range(soft) if fd not in used)
    resource.setrlimit(resource.RLIMIT_NOFILE, (list(itertools.islice(free, 4))[-1], hard))
    try:
        with pytest.raises(ProtocolError, match="ulimit -n"):
            await connection.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_bad_header_closes_its_descriptors(pair: Pair, null_fd: int) -> None:
    sock, connection = pair
    send_with_fds(sock, struct.pack("=III", 1, 0, 0), [null_fd])
    with pytest.raises(ProtocolError, match="version"):
        await connection.receive()


async def test_cancelled_receive_closes_what_had_arrived(pair: Pair, null_fd: int) -> None:
    sock, connection = pair
    before = open_fds()
    receiving = asyncio.create_task(connection.receive())
    send_with_fds(sock, encode_message(12, U64(0))[:14], [null_fd])
    await settle()
    assert open_fds() == before + 1
    receiving.cancel()
    await asyncio.wait([receiving])
    assert open_fds() == before


async def test_send_waits_for_a_slow_reader(pair: Pair) -> None:
    sock, connection = pair
    count = 20_000

    async def send_all() -> None:
        for number in range(count):
            await connection.send(1, U64(number), reply=True)

    sending = asyncio.create_task(send_all())
    received = bytearray()
    sock.setblocking(False)
    while len(received) < 20 * count:
        received += await asyncio.get_running_loop().sock_recv(sock, 1 << 20)
    await sending
    assert struct.unpack_from("=Q", received, 20 * (count - 1) + 12) == (count - 1,)


async def test_descriptors_go_once_however_the_message_is_cut(null_fd: int) -> None:
    class OneByteAtATime(socket.socket):
        def sendmsg(self, buffers: Any, ancdata: Any = ()) -> int:  # type: ignore[override]
            return super().sendmsg([buffers[0][:1]], ancdata)

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with Connection(OneByteAtATime(fileno=ours.detach())) as sender, Connection(theirs) as receiver:
        await sender.send(12, U64(7), fds=[null_fd])
        message = await receiver.receive()
        assert message is not None
        with message:
            assert message.payload == U64(7).encode()
            assert len(message.fds) == 1


async def test_send_to_a_peer_that_is_gone_is_a_connection_error(pair: Pair) -> None:
    sock, connection = pair
    sock.close()
    with pytest.raises(ConnectionError):
        await connection.send(1, U64(0), reply=True)


async def test_sent_descriptors_stay_the_senders(pair: Pair) -> None:
    sock, connection = pair
    fd = os.eventfd(0)
    await connection.send(12, U64(0), fds=[fd])
    _, fds, _, _ = socket.recv_fds(sock, 100, 4)
    os.eventfd_write(fds[0], 5)
    assert os.eventfd_read(fd) == 5
    os.close(fd)
    os.close(fds[0])
