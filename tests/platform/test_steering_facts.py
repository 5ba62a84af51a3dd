"""Kernel facts that steering and the end of a port lean on. Where one fails, the kernel changed: read the caller again.

Each test names who relies on it.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing

import pytest

from mpassthru._core import SteeringProgram
from mpassthru.errors import HostError
from mpassthru.netdev import af_xdp, probe_bind
from mpassthru.netdev.capabilities import Capability, effective_capabilities, missing_for_broker
from mpassthru.netdev.netdev_family import xsk_queues
from mpassthru.testing.netns import Namespace, veth_namespace
from mpassthru.testing.xsk import bound_xsk

pytestmark = pytest.mark.skipif(
    bool(missing_for_broker()) or Capability.CAP_SYS_ADMIN not in effective_capabilities(),
    reason="needs CAP_BPF, CAP_NET_ADMIN, CAP_NET_RAW and CAP_SYS_ADMIN: run as root",
)

FRAME = bytes.fromhex("02000000000102000000000288b5").ljust(60, b"\0")


@pytest.fixture
def veth() -> Iterator[Namespace]:
    with veth_namespace() as namespace, namespace.entered():
        yield namespace


@pytest.fixture
def program(veth: Namespace) -> Iterator[SteeringProgram]:
    with closing(SteeringProgram.attach(veth.ifindex, xdp_mode="native", queue_count=1)) as program:
        program.steer_queue(0, steer="passthru")
        yield program


def send(veth: Namespace, frame: bytes = FRAME) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
        wire.bind((veth.peer, 0))
        wire.send(frame)


def test_program_held_by_a_link_cannot_be_taken_off_or_replaced_by_netlink(
    program: SteeringProgram, veth: Namespace
) -> None:
    """crates/steering: nobody can put another program in our place while a guest is attached."""
    with pytest.raises(subprocess.CalledProcessError) as refusal:
        veth.run("ip", "link", "set", "dev", veth.ifname, "xdp", "off")
    assert "active BPF XDP link" in refusal.value.stderr
    send(veth)
    assert program.counters()[0]["dropped_no_guest"] == 1


def test_closed_socket_leaves_its_slot_before_its_queue(program: SteeringProgram, veth: Namespace) -> None:
    """The broker: when a worker is killed, frames are dropped at once, with a count; nothing is to be cleaned up."""
    with bound_xsk(veth.ifindex) as xsk:
        program.set_socket(0, xsk.socket.fileno())
        send(veth)
    send(veth)
    assert program.counters()[0] == {"redirected": 1, "passed": 0, "dropped_no_guest": 1}


def test_socket_in_the_map_that_is_not_bound_loses_frames_and_they_count_as_redirected(
    program: SteeringProgram, veth: Namespace
) -> None:
    """The broker fills the slot only after the worker's bind."""
    with af_xdp.open_xsk_socket() as sock:
        try:
            program.set_socket(0, sock.fileno())
        except HostError:
            pytest.skip("this kernel refuses such a socket, which is as good")
        send(veth)
        assert program.counters()[0] == {"redirected": 1, "passed": 0, "dropped_no_guest": 0}


def test_frame_too_large_for_the_chunk_is_dropped_by_the_socket_which_counts_it(
    program: SteeringProgram, veth: Namespace
) -> None:
    """bpf/README.md: what is redirected may still be lost, in XDP_STATISTICS; copy mode never writes past a chunk."""
    headroom_bytes = 3392
    room = af_xdp.CHUNK_SIZE_BYTES - af_xdp.XDP_PACKET_HEADROOM_BYTES - headroom_bytes
    with bound_xsk(veth.ifindex, headroom_bytes=headroom_bytes) as xsk:
        program.set_socket(0, xsk.socket.fileno())
        send(veth, FRAME.ljust(room + 1, b"\0"))
        send(veth, FRAME.ljust(room, b"\0"))

        received = xsk.receive()
        assert received is not None
        assert len(received) == room
        assert xsk.receive(timeout_s=0) is None
        assert xsk.statistics()[0] == 1
        assert program.counters()[0]["redirected"] == 2


async def test_mapped_rings_hold_a_closed_socket_on_its_queue(veth: Namespace) -> None:
    """The engine unmaps the rings before it closes a socket (kernel-facts: teardown)."""
    with bound_xsk(veth.ifindex) as xsk:
        xsk.socket.close()
        with pytest.raises(HostError, match="EBUSY"):
            await probe_bind(veth.ifname, 0, "copy", timeout_s=0.2)
        assert await xsk_queues(veth.ifindex) in ((0,), None)
    await probe_bind(veth.ifname, 0, "copy")


async def test_queue_shows_its_socket_until_it_can_be_bound_again(veth: Namespace) -> None:
    """`probe_bind` and attach: a queue that netlink shows as free is free."""
    for _ in range(5):
        with bound_xsk(veth.ifindex):
            if await xsk_queues(veth.ifindex) is None:
                pytest.skip("this kernel does not show which queue has a socket (before 6.14)")
        async with asyncio.timeout(5):
            while await xsk_queues(veth.ifindex):
                pass
    with bound_xsk(veth.ifindex):
        pass
