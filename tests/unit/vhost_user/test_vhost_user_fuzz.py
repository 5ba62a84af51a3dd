"""Arbitrary messages, bytes and descriptors: the session ends or answers, and never leaves anything behind."""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vhost_user_fakes import FEATURES, USER_BASE, FakeDevice, memory_fd, open_fds, ring_address
from vhost_user_traces import DPDK_START, QEMU_START, Step, message

from mpassthru.errors import MpassthruError
from mpassthru.vhost_user import Request, Session
from mpassthru.vhost_user.connection import Connection

numbers = st.one_of(st.integers(0, 5), st.sampled_from([256, 0x105, 2**16, 2**32 - 1]))
addresses = st.sampled_from([0, 1, USER_BASE, USER_BASE + 0x4000, USER_BASE + (1 << 20), 2**64 - 0x1000, 2**64 - 1])
sizes = st.sampled_from([0, 0x1000, 1 << 20, 2**64 - 1])
a_region = st.builds(lambda *parts: struct.pack("=QQQQ", *parts), addresses, sizes, addresses, addresses)
plausible = st.one_of(
    st.binary(max_size=64),
    st.builds(lambda number: struct.pack("=Q", number), st.one_of(numbers, st.just(FEATURES))),
    st.builds(lambda index, number: struct.pack("=II", index, number), numbers, numbers),
    st.builds(lambda index: ring_address(index).encode(), st.integers(0, 5)),
    st.builds(lambda part: bytes(8) + part, a_region),
    st.builds(
        lambda parts: struct.pack("=II", len(parts), 0) + b"".join(parts),
        st.lists(a_region, max_size=9),
    ),
)
flags = st.sampled_from([0x1, 0x1, 0x1, 0x9, 0x9, 0x9, 0x5, 0x0, 0x11])
random_steps = st.builds(
    lambda request, payload, flag, fds: Step(message(request, payload, flags=flag), fds, b""),
    st.one_of(st.sampled_from([int(request) for request in Request]), st.integers(0, 50)),
    plausible,
    flags,
    st.sampled_from([0, 0, 1, 1, 2, 8, 9]),
)
recorded_steps = st.sampled_from(QEMU_START + DPDK_START)
prefixes: st.SearchStrategy[list[Step]] = st.one_of(
    st.just([]),
    st.builds(lambda length: QEMU_START[:length], st.integers(0, len(QEMU_START))),
    st.builds(lambda length: DPDK_START[:length], st.integers(0, len(DPDK_START))),
)


def send(sock: socket.socket, data: bytes, count: int, fds: list[int]) -> bool:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", (fds * 9)[:count]))] if count else []
    try:
        sock.sendmsg([data], ancillary)
    except ConnectionError:
        return False
    return True


async def survive(steps: list[Step], tail: bytes) -> None:
    """Send everything, hang up, and check that nothing remains of the session."""
    before = open_fds()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    fds = [memory_fd(), os.eventfd(0)]
    device = FakeDevice()
    task = asyncio.create_task(Session(Connection(theirs), device).run())
    for step in steps:
        if not send(ours, step.data, step.fds, fds):
            break
        await asyncio.sleep(0)
    send(ours, tail, 1, fds)
    ours.close()
    (result,) = await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 5)
    assert result is None or isinstance(result, MpassthruError), result
    if result is not None:
        assert "\n" not in str(result)
    for fd in fds:
        os.close(fd)
    assert not device.running
    assert not device.regions
    assert open_fds() == before


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(prefixes, st.lists(st.one_of(random_steps, recorded_steps), max_size=12), st.binary(max_size=30))
def test_any_messages_leave_nothing_behind(prefix: list[Step], steps: list[Step], tail: bytes) -> None:
    asyncio.run(survive(prefix + steps, tail))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=100), max_size=5))
def test_any_bytes_leave_nothing_behind(chunks: list[bytes]) -> None:
    asyncio.run(survive([Step(chunk, position % 3, b"") for position, chunk in enumerate(chunks)], b""))
