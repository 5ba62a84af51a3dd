"""All that can happen to a port's interface: it waits, comes back by itself, and its guest notices only loss."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from veths import make_veth
from xdp_links import detach_program

from mpassthru import _core
from mpassthru.broker.binding_state import BindingState, Need
from mpassthru.broker.status import AttachReport
from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import GuestConfig, Pattern, Source
from mpassthru.testing.netns import Namespace, empty_namespace, move_interface
from mpassthru.testing.wire import PacketWire
from mpassthru.vhost_user import Frontend

TIMEOUT_S = 15.0
FRAMES, ENDLESS = 200, 1 << 31
SIZES = (60, 1300, 1000)
SEEDS = itertools.count(1, step=2)
"""Of patterns: no frame is to be taken for an earlier one."""


@pytest.fixture
def elsewhere() -> Iterator[int]:
    with empty_namespace() as fd:
        yield fd


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "port.sock"


def is_bound(report: AttachReport) -> bool:
    return report.binding is BindingState.BOUND and report.mode == "copy"


def waits_for(need: Need, report: AttachReport) -> bool:
    return report.binding is BindingState.WAITING and report.waiting_for is need


async def until_waiting(port: AttachedPort, need: Need) -> AttachReport:
    return await port.until(partial(waits_for, need), timeout_s=TIMEOUT_S)


async def until_bound(port: AttachedPort) -> AttachReport:
    return await port.until(is_bound, timeout_s=TIMEOUT_S)


@asynccontextmanager
async def guest_on(
    namespace: Namespace, path: Path, *options: str, queue_pairs: int = 1
) -> AsyncIterator[tuple[AttachedPort, BuiltinGuest]]:
    """A port with a guest whose account of every buffer has to be right in the end."""
    config = GuestConfig(queue_pairs=queue_pairs, canaries=True)
    async with attached_port(namespace, path, "--guest-size", "64M", *options) as port:
        await port.until_said("is ready")
        async with BuiltinGuest.connect(path, config, timeout_s=TIMEOUT_S) as guest:
            guest.start(rx="check")
            await until_bound(port)
            yield port, guest
            await guest.stop()
            check_account(guest)
        report = port.report
        assert report is not None
        assert (report.sessions, report.worker_restarts) == (1, 0), "the session goes on"


def check_account(guest: BuiltinGuest) -> None:
    """No head was lost or used twice, and nothing was written but buffers."""
    assert guest.violations() == {}
    assert guest.driver.changed_gap_bytes() == 0
    # Not behind received frames: a socket that was closed may have written to a buffer that came back later.
    assert guest.counters().tx_bytes_changed == 0


async def check_traffic(namespace: Namespace, guest: BuiltinGuest, peer: str = "") -> None:
    """Frames get through both ways, none of them broken; some may be lost before."""
    seed = next(SEEDS)
    with namespace.entered():
        wire = PacketWire(socket.if_nametoindex(peer or namespace.peer))
    async with wire:
        good = guest.counters().check_good
        guest.start(rx="check", source=Source(pattern=Pattern(seed=seed, sizes=SIZES), count=FRAMES))
        await wire.wait_for(lambda counters: counters.check_good >= FRAMES, deadline_s=TIMEOUT_S)
        assert wire.counters().check_corrupt == 0
        to_guest = Pattern(seed=seed + 1, sizes=SIZES)
        wire.start_sending(to_guest, count=ENDLESS, rate_frames_per_s=2000)
        await guest.wait_for(lambda counters: counters.check_good >= good + FRAMES, deadline_s=TIMEOUT_S)
    assert guest.counters().check_corrupt == 0


async def test_link_that_goes_down_for_a_moment_costs_nothing_but_frames(veth: Namespace, path: Path) -> None:
    async with guest_on(veth, path) as (port, guest):
        await check_traffic(veth, guest)
        veth.run("ip", "link", "set", "dev", veth.ifname, "down")
        report = await until_waiting(port, Need.UP)
        assert report.waiting_because == f"it is down; 'ip link set dev {veth.ifname} up'"
        assert not report.link
        assert veth.has_xdp_program(), "nobody else is to take the hook meanwhile"
        veth.run("ip", "link", "set", "dev", veth.ifname, "up")
        await until_bound(port)
        await check_traffic(veth, guest)


async def test_what_is_sent_to_a_link_that_stays_down_is_dropped(veth: Namespace, path: Path) -> None:
    async with guest_on(veth, path) as (port, guest):
        veth.run("ip", "link", "set", "dev", veth.ifname, "down")
        guest.start(rx="check", source=Source(pattern=Pattern(seed=next(SEEDS)), count=2000))
        await guest.wait_for(lambda counters: counters.tx_frames == 2000, deadline_s=TIMEOUT_S)
        report = await port.until(lambda report: report.tx.dropped.get("no_link", 0) > 0)
        assert (report.mode, report.binding) == ("detached", BindingState.WAITING)
        veth.run("ip", "link", "set", "dev", veth.ifname, "up")
        await until_bound(port)
        await check_traffic(veth, guest)


async def test_link_that_flaps_faster_than_anybody_looks_keeps_its_port(veth: Namespace, path: Path) -> None:
    async with guest_on(veth, path) as (port, guest):
        for _ in range(20):
            veth.run("sh", "-c", f"ip link set dev {veth.ifname} down; ip link set dev {veth.ifname} up")
        await until_bound(port)
        await check_traffic(veth, guest)


async def test_lost_carrier_is_told_and_the_port_stays_bound(veth: Namespace, path: Path) -> None:
    async with guest_on(veth, path) as (port, guest):
        await port.until(lambda report: report.link)
        veth.run("ip", "link", "set", "dev", veth.peer, "down")
        report = await port.until(lambda report: not report.link)
        assert report.binding is BindingState.BOUND
        veth.run("ip", "link", "set", "dev", veth.peer, "up")
        await port.until(lambda report: report.link)
        await check_traffic(veth, guest)


async def test_interface_that_is_made_anew_is_taken_again(veth: Namespace, path: Path) -> None:
    async with guest_on(veth, path) as (port, guest):
        await check_traffic(veth, guest)
        veth.run("ip", "link", "del", "dev", veth.ifname)
        await until_waiting(port, Need.INTERFACE)
        guest.start(rx="check", source=Source(pattern=Pattern(seed=next(SEEDS)), count=1000))
        await guest.wait_for(lambda counters: counters.tx_frames >= FRAMES + 1000, deadline_s=TIMEOUT_S)
        make_veth(veth, veth.ifname, veth.peer)
        await until_bound(port)
        await check_traffic(veth, guest)


async def test_interface_that_is_made_anew_before_anybody_looks_is_taken_again(veth: Namespace, path: Path) -> None:
    async with guest_on(veth, path) as (port, guest):
        veth.run("ip", "link", "del", "dev", veth.ifname)
        make_veth(veth, veth.ifname, veth.peer)
        await port.until_said(f"bound to {veth.ifname}")
        await until_bound(port)
        await check_traffic(veth, guest)


async def test_interface_that_is_moved_away_gets_rid_of_our_program_and_is_taken_when_it_returns(
    veth: Namespace, path: Path, elsewhere: int
) -> None:
    async with guest_on(veth, path) as (port, guest):
        move_interface(veth.ifname, source=veth.fd, target=elsewhere)
        report = await until_waiting(port, Need.INTERFACE)
        assert report.waiting_because == "it was moved to another network namespace"
        assert not replace(veth, fd=elsewhere).has_xdp_program()
        move_interface(veth.ifname, source=elsewhere, target=veth.fd)
        await until_waiting(port, Need.UP)
        veth.run("ip", "link", "set", "dev", veth.ifname, "up")
        await until_bound(port)
        await check_traffic(veth, guest)


async def test_interface_that_was_away_between_two_looks_has_its_sockets_again(
    veth: Namespace, path: Path, elsewhere: int
) -> None:
    async with guest_on(veth, path) as (port, guest):
        move_interface(veth.ifname, source=veth.fd, target=elsewhere)
        move_interface(veth.ifname, source=elsewhere, target=veth.fd)
        veth.run("ip", "link", "set", "dev", veth.ifname, "up")
        await port.until_said(f"bound to {veth.ifname}")
        await check_traffic(veth, guest)


async def test_renamed_interface_is_still_the_ports(veth: Namespace, path: Path) -> None:
    async with guest_on(veth, path) as (port, guest):
        veth.run("ip", "link", "set", "dev", veth.ifname, "name", "other0")
        await port.until(lambda report: report.interface == "other0" and is_bound(report))
        await check_traffic(veth, guest)
        veth.run("ip", "link", "del", "dev", "other0")
        await until_waiting(port, Need.INTERFACE)
        make_veth(veth, "other0", veth.peer)
        await until_bound(port)
        await check_traffic(veth, guest)


async def test_mtu_may_shrink_and_grow_within_what_a_port_carries(veth: Namespace, path: Path) -> None:
    async with guest_on(veth, path) as (port, guest):
        for mtu in (1400, 3000, 9000, 1500):
            set_mtu(veth, mtu)
            await port.until_said(f"the MTU of {veth.ifname} is {mtu} now")
            await until_bound(port)
            await check_traffic(veth, guest)
        report = await port.until(lambda report: report.rx.frames >= 4 * FRAMES)
        assert report.rx.dropped.get("oversize", 0) == 0


async def test_port_waits_while_frames_may_be_longer_than_it_carries(veth: Namespace, path: Path) -> None:
    async with guest_on(veth, path, "--xdp", "generic") as (port, guest):
        set_mtu(veth, 9217)
        report = await until_waiting(port, Need.MTU)
        assert "cannot use mpt0 with MTU 9217" in (report.waiting_because or "")
        set_mtu(veth, 1500)
        await until_bound(port)
        await check_traffic(veth, guest)


async def test_port_waits_for_a_queue_that_was_taken_away_and_has_it_back(
    veth_two_queues: Namespace, path: Path
) -> None:
    veth = veth_two_queues
    async with attached_port(veth, path, "--queues", "2", "--guest-size", "64M") as port:
        await port.until_said("is ready")
        # The kernel takes no queue away that has a socket, nor as long as a peer with more of them could send to it.
        veth.run("ethtool", "-L", veth.peer, "tx", "1")
        veth.run("ethtool", "-L", veth.ifname, "rx", "1")
        report = await until_waiting(port, Need.QUEUE)
        assert "numbered from 0; 'ethtool -L mpt0' makes up to 2" in (report.waiting_because or "")
        config = GuestConfig(queue_pairs=2)
        async with BuiltinGuest.connect(path, config, timeout_s=TIMEOUT_S) as guest:
            guest.start(rx="check")
            await port.until(lambda report: report.guest == "running")
            veth.run("ethtool", "-L", veth.ifname, "rx", "2")
            await until_bound(port)
            await check_traffic(veth, guest)
            await guest.stop()
            assert guest.violations() == {}


async def test_program_that_cannot_be_taken_off_stays(veth: Namespace, path: Path) -> None:
    async with guest_on(veth, path) as (port, guest):
        for mode in ("xdp", "xdpdrv"):
            with pytest.raises(subprocess.CalledProcessError):
                veth.run("ip", "link", "set", "dev", veth.ifname, mode, "off")
        veth.run("ip", "link", "set", "dev", veth.ifname, "xdpgeneric", "off")  # there is none
        assert veth.has_xdp_program()
        await check_traffic(veth, guest)
        assert not any("waiting" in line for line in port.lines)


async def test_program_that_is_detached_is_attached_again(veth: Namespace, path: Path) -> None:
    async with guest_on(veth, path) as (port, guest):
        detach_program(veth)
        await port.until_said("somebody took our XDP program off it")
        await port.until_said(f"bound to {veth.ifname}")
        assert veth.has_xdp_program()
        await check_traffic(veth, guest)


async def test_program_that_another_takes_the_place_of_is_waited_out(veth: Namespace, path: Path) -> None:
    async with guest_on(veth, path) as (port, guest):
        detach_program(veth)
        with closing(_core.SteeringProgram.attach(veth.ifindex, xdp_mode="native", queue_count=1)):
            await until_waiting(port, Need.PROGRAM)
        await until_bound(port)
        await check_traffic(veth, guest)


async def test_worker_that_dies_while_the_port_waits_is_followed_by_one_that_waits_too(
    veth: Namespace, path: Path
) -> None:
    async with attached_port(veth, path, "--guest-size", "64M") as port:
        await port.until_said("is ready")
        async with BuiltinGuest.connect(path, timeout_s=TIMEOUT_S) as guest:
            guest.start(rx="check")
            await until_bound(port)
            veth.run("ip", "link", "del", "dev", veth.ifname)
            report = await until_waiting(port, Need.INTERFACE)
            assert report.worker_pid is not None
            os.kill(report.worker_pid, signal.SIGKILL)
            await port.until(lambda report: report.worker_restarts == 1 and report.worker == "ready")
            await guest.reconnect(await Frontend.connect(path, timeout_s=TIMEOUT_S))
            guest.start(rx="check")
            await port.until(lambda report: report.guest == "running")
            make_veth(veth, veth.ifname, veth.peer)
            await until_bound(port)
            await check_traffic(veth, guest)
            await guest.stop()
            assert guest.violations() == {}


@pytest.mark.parametrize("mode", ["copy", "packet"])
async def test_every_mode_comes_back(veth: Namespace, path: Path, mode: str) -> None:
    async with attached_port(veth, path, "--guest-size", "64M", "--mode", mode) as port:
        await port.until_said("is ready")
        async with BuiltinGuest.connect(path, timeout_s=TIMEOUT_S) as guest:
            guest.start(rx="check")
            await port.until(lambda report: report.mode == mode)
            veth.run("ip", "link", "set", "dev", veth.ifname, "down")
            await port.until(lambda report: report.mode == "detached", timeout_s=TIMEOUT_S)
            veth.run("ip", "link", "del", "dev", veth.ifname)
            await until_waiting(port, Need.INTERFACE)
            make_veth(veth, veth.ifname, veth.peer)
            await port.until(lambda report: report.mode == mode, timeout_s=TIMEOUT_S)
            await check_traffic(veth, guest)
            await guest.stop()
            assert guest.violations() == {}


async def test_port_that_waits_ends_in_good_order(veth: Namespace, path: Path) -> None:
    async with guest_on(veth, path) as (port, _):
        veth.run("ip", "link", "del", "dev", veth.ifname)
        await until_waiting(port, Need.INTERFACE)
    async with attached_port(veth, path, "--guest-size", "64M") as port:
        pass


def set_mtu(namespace: Namespace, mtu: int) -> None:
    """A veth with a native XDP program limits what its peer may send."""
    for ifname in (namespace.peer, namespace.ifname):
        namespace.run("ip", "link", "set", "dev", ifname, "mtu", str(mtu))
