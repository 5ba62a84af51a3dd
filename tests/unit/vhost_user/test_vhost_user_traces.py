"""Recorded start sequences of real front-ends: replies exact to the byte, and an end at any point leaves nothing."""

from __future__ import annotations

import array
import asyncio
import os
import socket

import pytest
from vhost_user_fakes import FakeDevice, memory_fd, open_fds
from vhost_user_traces import DPDK_START, DPDK_STOP, QEMU_START, QEMU_STOP, Step, step, u64

from mpassthru.errors import ProtocolError
from mpassthru.vhost_user import Request, Session
from mpassthru.vhost_user.connection import Connection

TRACES = {"qemu": QEMU_START + QEMU_STOP, "dpdk": DPDK_START + DPDK_STOP}
MEMORY_REQUESTS = (Request.VHOST_USER_ADD_MEM_REG, Request.VHOST_USER_SET_MEM_TABLE)


class Replay:
    """A front-end that sends recorded bytes."""

    def __init__(self, device: FakeDevice) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.memory = memory_fd(), memory_fd()
        self.task = asyncio.create_task(Session(Connection(theirs), device).run())

    async def play(self, steps: list[Step]) -> None:
        for each in steps:
            self.send(each.data, each)
            if each.reply:
                assert await asyncio.wait_for(self.read(len(each.reply)), 5) == each.reply

    def send(self, data: bytes, origin: Step) -> None:
        of_memory = int.from_bytes(origin.data[:4], "little") in MEMORY_REQUESTS
        kick_or_call = os.eventfd(0)
        slot = int.from_bytes(origin.data[20:28], "little") >> 20 & 1  # of the (first) region's guest address
        fds = [self.memory[slot] if of_memory else kick_or_call] * origin.fds
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([data], ancillary)
        os.close(kick_or_call)

    async def read(self, size_bytes: int) -> bytes:
        data = b""
        while len(data) < size_bytes:
            chunk = await asyncio.get_running_loop().sock_recv(self.sock, size_bytes - len(data))
            assert chunk, "the back-end hung up"
            data += chunk
        return data

    def close(self) -> None:
        self.sock.close()
        for fd in self.memory:
            os.close(fd)

    async def hang_up(self) -> None:
        self.close()
        await asyncio.wait_for(self.task, 5)


@pytest.mark.parametrize(
    ("start", "stop", "running", "enabled"),
    [(QEMU_START, QEMU_STOP, {0, 1}, {0, 1}), (DPDK_START, DPDK_STOP, {0, 1, 2, 3}, {0, 1})],
    ids=["qemu", "dpdk"],
)
async def test_recorded_start_and_stop_get_the_replies_they_got(
    start: list[Step], stop: list[Step], running: set[int], enabled: set[int]
) -> None:
    device = FakeDevice(next_base=7)
    replay = Replay(device)
    await replay.play(start)
    await replay.play([step(Request.VHOST_USER_GET_STATUS, reply=u64(15))])
    assert device.running.keys() == running
    assert {index for index, vring in device.running.items() if vring.enabled} == enabled
    await replay.play(stop)
    assert not device.running
    await replay.hang_up()
    assert not device.regions


@pytest.mark.parametrize("trace", TRACES)
async def test_driver_that_starts_again_keeps_its_memory_mapped(trace: str) -> None:
    device = FakeDevice(next_base=7)
    replay = Replay(device)
    await replay.play(TRACES[trace])
    await replay.play(TRACES[trace])
    assert device.calls.count("start_vring 0") == 2
    assert device.calls.count("map_memory") == {"qemu": 2, "dpdk": 1}[trace]
    await replay.hang_up()


@pytest.mark.parametrize("trace", TRACES)
async def test_disconnect_after_any_message_leaves_nothing(trace: str) -> None:
    steps = TRACES[trace]
    before = open_fds()
    for length in range(len(steps) + 1):
        device = FakeDevice(next_base=7)
        replay = Replay(device)
        await replay.play(steps[:length])
        await replay.hang_up()
        assert not device.running
        assert not device.regions
        assert open_fds() == before


@pytest.mark.parametrize("trace", TRACES)
async def test_disconnect_inside_any_message_leaves_nothing(trace: str) -> None:
    steps = TRACES[trace]
    before = open_fds()
    for position, cut in enumerate(steps):
        device = FakeDevice(next_base=7)
        replay = Replay(device)
        await replay.play(steps[:position])
        replay.send(cut.data[: 1 + position % (len(cut.data) - 1)], cut)
        with pytest.raises(ProtocolError, match="the connection ended"):
            await replay.hang_up()
        assert not device.running
        assert not device.regions
        assert open_fds() == before


@pytest.mark.parametrize("trace", TRACES)
async def test_cancellation_inside_any_device_call_leaves_no_descriptor(trace: str) -> None:
    before = open_fds()
    for number in range(100):
        device = FakeDevice(next_base=7, block_at=number)
        replay = Replay(device)
        playing = asyncio.create_task(replay.play(TRACES[trace]))
        blocked = asyncio.create_task(device.blocked.wait())
        await asyncio.wait([playing, blocked], return_when=asyncio.FIRST_COMPLETED)
        device.block_at = -1
        playing.cancel()
        blocked.cancel()
        replay.task.cancel()
        await asyncio.wait_for(asyncio.gather(replay.task, playing, blocked, return_exceptions=True), 5)
        assert replay.task.cancelled()
        replay.close()
        assert not device.running
        assert not device.starting
        assert not device.regions
        assert open_fds() == before
        if not device.blocked.is_set():
            break
    assert number > 10
