"""Interfaces as they are read, and queues as they are probed, on a real veth."""

from __future__ import annotations

import errno
import time
from contextlib import closing

import pytest

from mpassthru import doctor
from mpassthru._core import SteeringProgram
from mpassthru.errors import HostError
from mpassthru.netdev import probe_bind, read_interface, warnings_for
from mpassthru.netdev.netdev_family import xsk_queues
from mpassthru.testing.netns import Namespace, set_offloads, veth_namespace
from mpassthru.testing.xsk import bound_xsk


async def test_veth_is_read_with_its_queues_and_peer(veth_two_queues: Namespace) -> None:
    veth = veth_two_queues
    interface = await read_interface(veth.ifname)
    assert interface.driver == "veth"
    assert interface.ifindex == veth.ifindex
    assert (interface.queues.rx, interface.queues.tx) == (2, 2)
    assert (interface.mtu_bytes, interface.up, interface.operstate) == (1500, True, "up")
    assert interface.xdp_features is not None
    assert interface.xdp_features.native
    assert not interface.xdp_features.zero_copy
    assert interface.veth_peer is not None
    assert interface.veth_peer.ifname == veth.peer
    assert interface.veth_peer.unfinished_offloads == ()


async def test_peer_that_leaves_checksums_unfinished_is_noticed(veth: Namespace) -> None:
    set_offloads(veth.peer, enabled=True)
    interface = await read_interface(veth.ifname)
    assert interface.veth_peer is not None
    assert "tx-checksum-ip-generic" in interface.veth_peer.unfinished_offloads


@pytest.mark.parametrize("xdp_mode", ["native", "generic"])
async def test_attached_program_is_read_with_its_mode(veth: Namespace, xdp_mode: str) -> None:
    mode = "native" if xdp_mode == "native" else "generic"
    with closing(SteeringProgram.attach(veth.ifindex, xdp_mode=mode, queue_count=1)):  # type: ignore[arg-type]
        program = (await read_interface(veth.ifname)).xdp_program
    assert program is not None
    assert program.mode == xdp_mode
    assert program.id > 0
    assert (await read_interface(veth.ifname)).xdp_program is None


async def test_bound_queue_is_read_as_taken_and_the_other_as_free(veth_two_queues: Namespace) -> None:
    with bound_xsk(veth_two_queues.ifindex, queue_id=1):
        assert (await read_interface(veth_two_queues.ifname)).xsk_queues == (1,)


async def test_probe_of_a_free_queue_leaves_it_free_for_the_next(veth: Namespace) -> None:
    await probe_bind(veth.ifname, 0, "copy")
    assert await xsk_queues(veth.ifindex) == ()
    with bound_xsk(veth.ifindex):  # bound at once, without EBUSY
        pass


async def test_probe_of_a_taken_queue_says_busy_after_the_timeout(veth: Namespace) -> None:
    with bound_xsk(veth.ifindex), pytest.raises(HostError, match=r"mpt0 queue 0 \(EBUSY\)") as refusal:
        await probe_bind(veth.ifname, 0, "copy", timeout_s=0.1)
    assert refusal.value.errno == errno.EBUSY


async def test_probe_waits_for_a_queue_whose_socket_was_just_closed(veth: Namespace) -> None:
    with bound_xsk(veth.ifindex):
        pass
    await probe_bind(veth.ifname, 0, "copy")  # would be EBUSY for some 50 ms


@pytest.mark.parametrize(
    ("queue_id", "mode", "number"), [(7, "copy", errno.EINVAL), (0, "zero-copy", errno.EOPNOTSUPP)]
)
async def test_probe_says_at_once_what_can_never_be_had(veth: Namespace, queue_id: int, mode: str, number: int) -> None:
    start_s = time.monotonic()
    with pytest.raises(HostError, match=f"mpt0 queue {queue_id}") as refusal:
        await probe_bind(veth.ifname, queue_id, "copy" if mode == "copy" else "zero-copy")
    assert refusal.value.errno == number
    assert time.monotonic() - start_s < 1.0


async def test_interface_that_is_down_is_warned_of(veth: Namespace) -> None:
    veth.run("ip", "link", "set", veth.ifname, "down")
    assert any("is down" in warning for warning in warnings_for(await read_interface(veth.ifname)))


async def test_probe_of_an_interface_that_is_gone_is_refused(veth: Namespace) -> None:
    veth.run("ip", "link", "del", veth.ifname)
    with pytest.raises(HostError, match="no such interface") as refusal:
        await probe_bind(veth.ifname, 0, "copy")
    assert refusal.value.errno == errno.ENODEV


def test_doctor_finds_a_veth_in_order_and_a_busy_one_not(veth: Namespace) -> None:
    report = doctor.diagnose(veth.ifname, guest_size_bytes=256 << 20)
    assert not report.failed
    assert report.mode == "copy"
    with closing(SteeringProgram.attach(veth.ifindex, xdp_mode="native", queue_count=1)), bound_xsk(veth.ifindex):
        report = doctor.diagnose(veth.ifname, guest_size_bytes=256 << 20)
    assert {check.name for check in report.checks if check.status == "fail"} == {
        "XDP program",
        "AF_XDP sockets",
    }


def test_namespace_is_gone_when_its_block_ends() -> None:
    with veth_namespace(ifname="mpta", peer="mptb") as namespace:
        assert "mpta" in namespace.run("ip", "link")
    with pytest.raises(HostError, match="EBADF"), namespace.entered():
        pass
