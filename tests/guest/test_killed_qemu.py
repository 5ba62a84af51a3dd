"""SIGKILL of QEMU at any moment: the port takes the next guest, and leaves no XDP program when it ends."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mpassthru.demo.qemu import find_kernel
from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.child import ChildError
from mpassthru.testing.netns import veth_namespace
from mpassthru.testing.qemu import QemuGuest
from mpassthru.testing.qemu_config import GuestConfig, GuestNic, VhostUserBackend
from mpassthru.testing.scenario_qemu import configure_interface, ping

KILLS = 3
PEER_ADDRESS = "10.77.0.1"
GUEST_ADDRESS = "10.77.0.2"


async def kill_at(moment: str, guest: QemuGuest, port: AttachedPort) -> None:
    """Kill QEMU at a moment of its life."""
    if moment == "booting":
        boot = asyncio.create_task(guest.__aenter__())
        await port.until(lambda report: report.guest != "waiting")
        await guest.kill()
        with pytest.raises(ChildError, match="status -9"):
            await boot
        return
    async with guest:
        if moment == "flooded":
            await configure_interface(guest, f"{GUEST_ADDRESS}/24")
            answered_before = (await port.until(lambda report: report.guest == "running")).tx.frames
            flood = asyncio.create_task(guest.run(f"ping -A -s 1400 {PEER_ADDRESS}", timeout_s=30))
            await port.until(lambda report: report.tx.frames > answered_before + 100)
            await guest.kill()
            with pytest.raises(ChildError, match="status -9"):
                await flood
        await guest.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", [pytest.param("booting", marks=pytest.mark.soak), pytest.param("up", marks=pytest.mark.soak), "flooded"]
)
async def test_killed_qemu_leaves_nothing_that_stops_the_next_guest(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "port.sock"
    config = GuestConfig(kernel=find_kernel(), nics=(GuestNic(backend=VhostUserBackend(socket_path=path)),))
    with veth_namespace() as namespace:
        namespace.run("ip", "address", "add", f"{PEER_ADDRESS}/24", "dev", namespace.peer)
        async with attached_port(namespace, path) as port:
            await port.until_said("is ready")
            for sessions in range(1, KILLS + 1):
                await kill_at(moment, QemuGuest(config), port)
                await port.until_idle(after_sessions=sessions)
            async with QemuGuest(config) as guest:
                await configure_interface(guest, f"{GUEST_ADDRESS}/24")
                answers = await ping(guest, PEER_ADDRESS)
            report = await port.stop()
        assert answers.received == answers.sent
        assert not report.troubles
        assert not namespace.has_xdp_program()
