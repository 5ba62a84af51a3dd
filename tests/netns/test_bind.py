"""`mpassthru bind`, `unbind` and `status` on a running port: its guest moves, and notices only loss."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_link_events import ENDLESS, SIZES, TIMEOUT_S, check_account, check_traffic, is_bound
from traces import InterfaceTraces
from veths import make_veth

from mpassthru import _core
from mpassthru.broker.binding_state import BindingState
from mpassthru.errors import MpassthruError
from mpassthru.port_commands import Bind, Unbind, ask
from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.child import running_child, until_gone
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import DEFAULT_FEATURES, GuestConfig, Pattern, Source
from mpassthru.testing.netns import Namespace
from mpassthru.testing.wire import PacketWire
from mpassthru.vhost_user import Frontend, VirtioFeature
from mpassthru.worker.device import rarp_frame

OTHER, OTHER_PEER = "mpt2", "mpt3"
MOVES = 6


@dataclass
class Scene:
    """A port, its guest, a second interface, and the command line."""

    namespace: Namespace
    folder: Path
    port: AttachedPort
    guest: BuiltinGuest

    async def command(self, *words: str) -> str:
        """Run `mpassthru`; its output."""
        status, output, error = await self.run(*words)
        assert status == 0, error
        return output

    async def bind(self, ifname: str, queue: int | None = None) -> None:
        await ask(self.control, Bind(interface=ifname, queue=queue))

    async def refused(self, ifname: str, queue: int | None = None) -> str:
        """The line with which a move is refused."""
        with pytest.raises(MpassthruError) as raised:
            await self.bind(ifname, queue)
        return str(raised.value)

    async def unbind(self) -> None:
        await ask(self.control, Unbind())

    @property
    def control(self) -> Path:
        (path,) = (self.folder / "run").glob(f"control-{self.port.pid}-*")
        return path

    async def run(self, *words: str) -> tuple[int | None, str, str]:
        # Not by Namespace.run: the port would wait for somebody to read what it prints.
        command = (sys.executable, "-m", "mpassthru", *words, "--runtime-dir", str(self.folder / "run"))
        async with running_child(*command, namespace=self.namespace, stderr=PIPE) as process:
            output, error = await process.communicate()
        return process.returncode, output.decode(), error.decode()

    @property
    def path(self) -> str:
        return str(self.port.socket_path)


@asynccontextmanager
async def scene(
    namespace: Namespace,
    folder: Path,
    *options: str,
    queue_pairs: int = 1,
    features: VirtioFeature = DEFAULT_FEATURES,
) -> AsyncIterator[Scene]:
    runtime = ("--runtime-dir", str(folder / "run"), "--guest-size", "64M")
    path = folder / "port.sock"
    async with attached_port(namespace, path, *runtime, *options) as port:
        await port.until_said("is ready")
        config = GuestConfig(queue_pairs=queue_pairs, features=features, canaries=True)
        async with BuiltinGuest.connect(path, config, timeout_s=TIMEOUT_S) as guest:
            guest.start(rx="check")
            await port.until(is_bound)
            yield Scene(namespace, folder, port, guest)
            await guest.stop()
            check_account(guest)


async def until_on(scene: Scene, ifname: str) -> None:
    await scene.port.until(lambda report: report.interface == ifname and is_bound(report))


@pytest.mark.parametrize("rings", [VirtioFeature(0), VirtioFeature.VIRTIO_F_RING_PACKED], ids=["split", "packed"])
async def test_guest_is_moved_under_traffic_and_its_account_of_every_buffer_stays_right(
    veth: Namespace, tmp_path: Path, rings: VirtioFeature
) -> None:
    make_veth(veth, OTHER, OTHER_PEER)
    with veth.entered():
        wires = [PacketWire(socket.if_nametoindex(peer)) for peer in (veth.peer, OTHER_PEER)]
    async with scene(veth, tmp_path, features=DEFAULT_FEATURES | rings) as s, wires[0], wires[1]:
        for number, wire in enumerate(wires):
            wire.start_sending(Pattern(seed=101 + number, sizes=SIZES), count=ENDLESS, rate_frames_per_s=3000)
        s.guest.start(rx="check", source=Source(pattern=Pattern(seed=103, sizes=SIZES), rate_frames_per_s=3000))
        for move in range(MOVES):
            here, wire = ((OTHER, wires[1]), (veth.ifname, wires[0]))[move % 2]
            await s.bind(here)
            received, sent = s.guest.counters().rx_frames, wire.counters().check_good
            await s.guest.wait_for(lambda counters, n=received: counters.rx_frames > n + 300, deadline_s=TIMEOUT_S)  # type: ignore[misc]
            await wire.wait_for(lambda counters, n=sent: counters.check_good > n + 300, deadline_s=TIMEOUT_S)  # type: ignore[misc]
        for wire in wires:
            wire.stop_sending()
            assert wire.counters().check_corrupt == wire.counters().check_duplicate == 0
        assert (s.guest.counters().check_corrupt, s.guest.counters().check_duplicate) == (0, 0)
        await until_on(s, veth.ifname)
        assert s.port.report is not None
        assert s.port.report.sessions == 1


async def test_former_interface_is_as_it_was_and_the_guests_address_is_announced(
    veth: Namespace, tmp_path: Path
) -> None:
    make_veth(veth, OTHER, OTHER_PEER)
    with veth.entered():
        wire = PacketWire(socket.if_nametoindex(OTHER_PEER), all_ethertypes=True, capture_frames=8)
    async with scene(veth, tmp_path) as s, wire:
        await check_traffic(veth, s.guest)
        s.guest.start(rx="check")
        await s.bind(OTHER)
        await wire.wait_for(lambda counters: counters.received > 0, deadline_s=TIMEOUT_S)
        (frame,) = wire.take_captured()
        assert frame == rarp_frame(frame[6:12])
        assert frame[6:12] == Pattern().source
        left = json.loads(veth.run("ip", "-json", "-details", "link", "show", "dev", veth.ifname))[0]
        assert "xdp" not in left
        assert left["promiscuity"] == 0
        await check_traffic(veth, s.guest, OTHER_PEER)


async def test_what_cannot_be_had_leaves_the_guest_where_it_is(veth_two_queues: Namespace, tmp_path: Path) -> None:
    veth = veth_two_queues
    make_veth(veth, OTHER, OTHER_PEER, mtu=1400)
    async with scene(veth, tmp_path, "--queues", "2", queue_pairs=2) as s:
        assert "cannot find interface nothing0 (ENODEV)" in await s.refused("nothing0")
        assert f"cannot use queue 1 of {OTHER}: it has 1 receive queue(s)" in await s.refused(OTHER)
        veth.run("ip", "link", "del", "dev", OTHER)
        make_veth(veth, OTHER, OTHER_PEER, queues=2, mtu=1400)
        assert f"'ip link set dev {OTHER} mtu 1500'" in await s.refused(OTHER)
        for end in (OTHER_PEER, OTHER):
            veth.run("ip", "link", "set", "dev", end, "mtu", "1500")
        veth.run("ip", "link", "set", "dev", OTHER, "down")
        assert "it is down" in await s.refused(OTHER)
        veth.run("ip", "link", "set", "dev", OTHER, "up")
        with closing(_core.SteeringProgram.attach(socket.if_nametoindex(OTHER), xdp_mode="native", queue_count=2)):
            assert "of another guest's port or another program" in await s.refused(OTHER)
        assert "unbind it first" in await s.refused(veth.ifname, 1)
        await s.bind(veth.ifname)
        await check_traffic(veth, s.guest)
        assert not any("waiting" in line or "bound to" in line for line in s.port.lines)

        await s.bind(OTHER)
        await check_traffic(veth, s.guest, OTHER_PEER)


async def test_unbound_port_holds_nothing_and_can_be_bound_again(veth: Namespace, tmp_path: Path) -> None:
    make_veth(veth, OTHER, OTHER_PEER)
    async with scene(veth, tmp_path) as s:
        await check_traffic(veth, s.guest)
        await s.unbind()
        assert InterfaceTraces.of(veth).xdp_programs == 0
        report = await s.port.until(lambda report: report.binding is BindingState.UNBOUND)
        assert (report.mode, report.link) == ("detached", False)
        sent = s.guest.counters().tx_frames
        s.guest.start(rx="check", source=Source(pattern=Pattern(seed=201), count=1000))
        await s.guest.wait_for(lambda counters: counters.tx_frames == sent + 1000, deadline_s=TIMEOUT_S)
        await s.port.until(lambda report: report.tx.dropped.get("no_link", 0) == 1000)
        veth.run("ip", "link", "set", "dev", veth.ifname, "down")
        veth.run("ip", "link", "set", "dev", veth.ifname, "up")
        await s.unbind()

        await s.bind(OTHER)
        await check_traffic(veth, s.guest, OTHER_PEER)


async def test_port_that_waits_for_one_interface_can_be_bound_to_another(veth: Namespace, tmp_path: Path) -> None:
    make_veth(veth, OTHER, OTHER_PEER)
    async with scene(veth, tmp_path) as s:
        veth.run("ip", "link", "del", "dev", veth.ifname)
        await s.port.until(lambda report: report.binding is BindingState.WAITING)
        assert "cannot find interface" in await s.refused("nothing0")
        await s.bind(OTHER)
        await check_traffic(veth, s.guest, OTHER_PEER)


async def test_worker_killed_while_unbound_is_followed_by_one_that_is_unbound(veth: Namespace, tmp_path: Path) -> None:
    async with scene(veth, tmp_path) as s:
        await s.unbind()
        report = await s.port.until(lambda report: report.binding is BindingState.UNBOUND)
        assert report.worker_pid is not None
        os.kill(report.worker_pid, signal.SIGKILL)
        await s.port.until(lambda report: report.worker_restarts == 1 and report.worker == "ready")
        await s.guest.reconnect(await Frontend.connect(s.path, timeout_s=TIMEOUT_S))
        await s.port.until(lambda report: report.guest == "running")
        await s.bind(veth.ifname)
        await check_traffic(veth, s.guest)


async def test_broker_killed_while_unbound_leaves_nothing_that_the_next_does_not_remove(
    veth: Namespace, tmp_path: Path
) -> None:
    runtime = tmp_path / "run"
    options = ("--guest-size", "64M", "--runtime-dir", str(runtime))
    async with attached_port(veth, tmp_path / "port.sock", *options) as port:
        worker = (await port.until(lambda report: report.worker_pid is not None)).worker_pid
        assert worker is not None
        (listening,) = runtime.glob("control-*")
        assert stat.S_IMODE(listening.stat().st_mode) == 0o600
        await ask(listening, Unbind())
        port.kill()
        await port.wait()
        await until_gone(worker)
    assert InterfaceTraces.of(veth) == InterfaceTraces()

    async with attached_port(veth, tmp_path / "port.sock", *options) as port:
        await port.until_said("is ready")
        assert len(list(runtime.glob("control-*"))) == 1
        await port.stop()
    assert list(runtime.glob("control-*")) == []


async def test_commands_find_a_port_by_its_socket_its_interface_and_its_process(
    veth: Namespace, tmp_path: Path
) -> None:
    make_veth(veth, OTHER, OTHER_PEER)
    async with scene(veth, tmp_path) as s:
        second = tmp_path / "second.sock"
        other = Namespace(veth.fd, OTHER, socket.if_nametoindex(OTHER), OTHER_PEER, socket.if_nametoindex(OTHER_PEER))
        options = ("--runtime-dir", str(tmp_path / "run"), "--guest-size", "64M")
        async with attached_port(other, second, *options) as port:
            await port.until_said("is ready")
            lines = [json.loads(line) for line in (await s.command("status", "--json")).splitlines()]
            known = {(line["pid"], line["socket_path"], line["report"]["interface"]) for line in lines}
            assert known == {(s.port.pid, s.path, veth.ifname), (port.pid, str(second), OTHER)}
            assert await s.command("unbind", str(port.pid)) == f"unbound from {OTHER}\n"
            text = await s.command("status")
            assert f"{veth.ifname} bound, copy mode, native XDP; guest running" in text
            assert f"{OTHER} unbound; guest waiting" in text
            assert await s.command("bind", s.path, OTHER) == f"bound to {OTHER}\n"
            status, _, error = await s.run("unbind", OTHER)
            assert (status, "2 ports are known as mpt2: " in error) == (1, True)
            await port.stop()
        assert await s.command("bind", OTHER, veth.ifname, "--queue", "0") == f"bound to {veth.ifname}\n"
        status, _, error = await s.run("status", "nothing0")
        assert (status, f"no running port is known as nothing0; there are {s.path}" in error) == (1, True)
