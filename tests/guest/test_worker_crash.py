"""SIGKILL of the worker under TCP load, several times: the guest's connections live, and no byte of them is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mpassthru.demo.qemu import find_kernel
from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.netns import veth_namespace
from mpassthru.testing.qemu import QemuGuest
from mpassthru.testing.qemu_config import GuestConfig, GuestNic, VhostUserBackend
from mpassthru.testing.scenario_qemu import (
    FILE_BYTES,
    Peer,
    configure_interface,
    ping,
    random_file,
    send_file_from_guest,
    send_file_to_guest,
)

KILLS = 3
"""In each direction."""
PEER_ADDRESS = "10.77.0.1"
GUEST_ADDRESS = "10.77.0.2"


@dataclass
class Killer:
    """Kills the port's worker each time that another part of a file is on its way, until there were `limit` kills."""

    port: AttachedPort
    kills: int = 0
    limit: int = KILLS
    killed_pid: int | None = None
    """The last one, which the port's figures may still name."""

    def __call__(self, moved_bytes: int) -> None:
        if moved_bytes < (self.kills % KILLS + 1) * FILE_BYTES // (KILLS + 1) or self.kills == self.limit:
            return
        assert self.port.report is not None
        pid = self.port.report.worker_pid
        if pid is None or pid == self.killed_pid:
            return  # the next part brings us here again
        os.kill(pid, signal.SIGKILL)
        self.killed_pid = pid
        self.kills += 1


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_tcp_connections_of_a_guest_outlive_workers(
    tmp_path: Path, record_figure: Callable[[str, object], None]
) -> None:
    path = tmp_path / "port.sock"
    backend = VhostUserBackend(socket_path=path, reconnect_s=1)
    config = GuestConfig(kernel=find_kernel(), nics=(GuestNic(backend=backend),))
    with veth_namespace() as namespace:
        namespace.run("ip", "address", "add", f"{PEER_ADDRESS}/24", "dev", namespace.peer)
        peer = Peer(namespace, PEER_ADDRESS)
        async with attached_port(namespace, path) as port:
            await port.until_said("is ready")
            async with QemuGuest(config) as guest:
                await configure_interface(guest, f"{GUEST_ADDRESS}/24")
                await ping(guest, PEER_ADDRESS)
                killer = Killer(port)
                rx = await send_file_to_guest(guest, peer, random_file(), progress=killer)
                killer.limit = 2 * KILLS
                tx = await send_file_from_guest(guest, peer, progress=killer)
                answers = await ping(guest, PEER_ADDRESS)
            report = await port.stop()
    assert (rx.intact, tx.intact) == (True, True)
    assert rx.bytes == tx.bytes == FILE_BYTES
    assert answers.received == answers.sent
    assert killer.kills == report.worker_restarts == 2 * KILLS
    assert report.buffers_resumed > 0
    assert report.faults == 0
    record_figure("kills", killer.kills)
    record_figure("buffers_resumed", report.buffers_resumed)
    record_figure("seconds", {"rx": round(rx.seconds, 1), "tx": round(tx.seconds, 1)})
