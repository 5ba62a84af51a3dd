"""Live migration between two hosts, each with its own port, under load both ways; beside it the same guest on tap.

TCP sends again what did not arrive, so that streams alone could hide a page that was written and not marked. For that
reason memory is compared too, page by page, before the guest goes on.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import socket
import statistics
import sys
import termios
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import pytest
from log_losing_relay import log_losing_relay

from mpassthru.demo.qemu import find_kernel
from mpassthru.qmp import QmpCommandError
from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.bridge import add_tap, bridged_hosts
from mpassthru.testing.echo_probe import EchoProbe, echo_probe
from mpassthru.testing.migration import Migration, MigrationResult, differing_pages
from mpassthru.testing.netns import Namespace
from mpassthru.testing.qemu import QemuGuest
from mpassthru.testing.qemu_config import GuestConfig, GuestNic, TapBackend, VhostUserBackend
from mpassthru.testing.scenario_qemu import Peer, configure_interface, ping, random_file
from mpassthru.testing.streams import StreamFigures, Streams, running_streams

PEER_ADDRESS = "10.77.0.1"
GUEST_ADDRESS = "10.77.0.2"
ETHERTYPE_ARP, ETHERTYPE_RARP = 0x0806, 0x8035
MEMORY_MIB = 192
HOSTS = 2
SLOW_BYTES_PER_S = 32 << 20
COPIED_SHARE = 0.5
"""Receive buffers are in the lower half of memory: a driver that starts with the guest gets its pages there."""
LATE_BYTES = 256 * 1024
ACKED_BYTES = 32 * 1024
"""What a guest takes at least on a connection that nobody reads from: its receive window."""

RecordFigure = Callable[[str, object], None]

few_and_many = pytest.mark.parametrize("times", [2, pytest.param(10, marks=[pytest.mark.soak])])


class Downtime(msgspec.Struct, frozen=True, kw_only=True):
    """One migration: the longest time without an answer that the peer saw, and what QEMU says."""

    longest_gap_ms: float
    qemu: MigrationResult


class Journey(msgspec.Struct, frozen=True, kw_only=True):
    """Several migrations of one guest under load."""

    downtimes: list[Downtime]
    streams: StreamFigures

    @property
    def median_gap_ms(self) -> float:
        return statistics.median(downtime.longest_gap_ms for downtime in self.downtimes)


@dataclass
class Traveller:
    """A guest that moves between two places, and the traffic that it has meanwhile."""

    places: list[GuestConfig]
    folder: Path
    qemu: QemuGuest
    """Where it is now."""
    probe: EchoProbe
    streams: Streams
    resources: AsyncExitStack
    at: int = 0
    downtimes: list[Downtime] = field(default_factory=list)

    async def move(self) -> None:
        """Migrate to the other place, see that both streams go on, and note how long nobody was there."""
        await self.streams.until_more()
        self.at = 1 - self.at
        there = QemuGuest(replace(self.places[self.at], incoming=True))
        migration = Migration(self.qemu, await self.resources.enter_async_context(there))
        self.qemu = there
        await self.probe.figures()
        await migration.begin(self.folder / "migration.sock")
        result = await migration.finish()
        await self.streams.until_more()
        gap_ms = (await self.probe.figures()).longest_gap_ms
        self.downtimes.append(Downtime(longest_gap_ms=gap_ms, qemu=result))
        await migration.source.kill()

    async def arrive(self) -> Journey:
        """End the streams and hear what both ends have received."""
        return Journey(downtimes=self.downtimes, streams=await self.streams.end(self.qemu))


@asynccontextmanager
async def travelling(places: list[GuestConfig], wire: Namespace, folder: Path) -> AsyncIterator[Traveller]:
    """Boot a guest at the first place, and start traffic both ways."""
    wire.run("ip", "address", "add", f"{PEER_ADDRESS}/24", "dev", wire.ifname)
    async with AsyncExitStack() as resources:
        guest = await resources.enter_async_context(QemuGuest(places[0]))
        await configure_interface(guest, f"{GUEST_ADDRESS}/24")
        probe = await resources.enter_async_context(echo_probe(wire, GUEST_ADDRESS))
        streams = await resources.enter_async_context(running_streams(guest, Peer(wire, PEER_ADDRESS)))
        yield Traveller(places, folder, guest, probe, streams, resources)


def place(backend: VhostUserBackend | TapBackend, namespace: Namespace) -> GuestConfig:
    nic = GuestNic(backend=backend)
    return GuestConfig(kernel=find_kernel(), nics=(nic,), memory_mib=MEMORY_MIB, odd_memory=True, namespace=namespace)


@dataclass
class Hosts:
    """Two hosts with a port each, joined by a bridge."""

    wire: Namespace
    namespaces: list[Namespace]
    ports: list[AttachedPort]
    sockets: list[Path]

    def place(self, number: int, *, path: Path | None = None) -> GuestConfig:
        return place(VhostUserBackend(socket_path=path or self.sockets[number]), self.namespaces[number])

    def places(self) -> list[GuestConfig]:
        return [self.place(number) for number in range(HOSTS)]

    async def stop(self) -> None:
        """End both ports; nothing went wrong there."""
        for port in self.ports:
            await port.until(lambda report: report.guest == "waiting")
            report = await port.stop()
            assert (report.troubles, report.faults, report.worker_restarts) == ((), 0, 0)


@asynccontextmanager
async def two_hosts(folder: Path) -> AsyncIterator[Hosts]:
    with bridged_hosts(HOSTS) as (wire, namespaces):
        sockets = [folder / f"host{number}.sock" for number in range(HOSTS)]
        async with AsyncExitStack() as resources:
            ports = [
                await resources.enter_async_context(attached_port(namespace, path))
                for namespace, path in zip(namespaces, sockets, strict=True)
            ]
            for port in ports:
                await port.until_said("is ready")
            yield Hosts(wire, namespaces, ports, sockets)


async def journey_on_tap(folder: Path, times: int) -> Journey:
    """Migrate the same guest with the same traffic, on tap interfaces of the same kind of bridge."""
    with bridged_hosts(0) as (wire, _):
        names = [f"tap{number}" for number in range(HOSTS)]
        for name in names:
            add_tap(wire, name)
        async with travelling([place(TapBackend(interface=name), wire) for name in names], wire, folder) as guest:
            for _ in range(times):
                await guest.move()
            return await guest.arrive()


@pytest.mark.slow
@pytest.mark.timeout(600)
@few_and_many
async def test_migrations_under_load_lose_no_byte_of_any_stream(
    tmp_path: Path, record_figure: RecordFigure, times: int
) -> None:
    async with two_hosts(tmp_path) as hosts:
        async with travelling(hosts.places(), hosts.wire, tmp_path) as guest:
            for _ in range(times):
                await guest.move()
            here = await guest.arrive()
        await hosts.stop()
    on_tap = await journey_on_tap(tmp_path, times)
    print(f"\ndowntime, median of {times}: {here.median_gap_ms} ms, on tap {on_tap.median_gap_ms} ms")
    assert len(here.downtimes) == times
    record_figure("mpassthru", msgspec.to_builtins(here))
    record_figure("tap", msgspec.to_builtins(on_tap))


@asynccontextmanager
async def unread_connection(guest: QemuGuest, peer: Peer) -> AsyncIterator[socket.socket]:
    """A connection from the guest whose reader stands still; gives the peer's end of it."""
    with peer.listen() as listener:
        host, port = listener.getsockname()
        listener.setblocking(False)
        await guest.run(f"nc {host} {port} < /dev/null > /tmp/late & echo $! > /tmp/reader")
        connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        await guest.run("kill -STOP $(cat /tmp/reader)")
    with connection:
        yield connection


async def until_acked(connection: socket.socket, acked_bytes: int) -> None:
    """Wait until the other end's kernel has so many of the `LATE_BYTES` that were sent."""
    async with asyncio.timeout(10):
        while LATE_BYTES - unacked_bytes(connection) < acked_bytes:  # noqa: ASYNC110 - it wakes nobody
            await asyncio.sleep(0.01)


def unacked_bytes(connection: socket.socket) -> int:
    answer = fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4))
    return int.from_bytes(answer, sys.byteorder)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("marks", ["kept", "lost"])
async def test_pages_that_were_written_unmarked_would_be_seen(tmp_path: Path, marks: str) -> None:
    """Data that the guest has acknowledged and not read lies in receive buffers, and nobody sends it again.

    The buffers were posted, and copied, long before: only a mark makes them be copied once more.
    """
    relayed = tmp_path / "relayed.sock"
    late = random_file(LATE_BYTES)
    async with AsyncExitStack() as resources:
        hosts = await resources.enter_async_context(two_hosts(tmp_path))
        relay = await resources.enter_async_context(log_losing_relay(relayed, hosts.sockets[0]))
        here = hosts.place(0, path=relayed if marks == "lost" else None)
        hosts.wire.run("ip", "address", "add", f"{PEER_ADDRESS}/24", "dev", hosts.wire.ifname)
        guest = await resources.enter_async_context(QemuGuest(here))
        await configure_interface(guest, f"{GUEST_ADDRESS}/24")
        peer = Peer(hosts.wire, PEER_ADDRESS)
        connection = await resources.enter_async_context(unread_connection(guest, peer))
        there = await resources.enter_async_context(QemuGuest(replace(hosts.place(1), incoming=True)))

        migration = Migration(guest, there, paused=True)
        await migration.begin(tmp_path / "migration.sock", bandwidth_bytes_per_s=SLOW_BYTES_PER_S)
        await migration.hold(COPIED_SHARE)
        sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(connection, late))
        await until_acked(connection, ACKED_BYTES)
        await migration.finish()
        pages = differing_pages(guest, there)
        assert relay.lost_logs == (1 if marks == "lost" else 0)
        assert (pages != []) == (marks == "lost")

        if marks == "kept":
            await there.qmp.execute("cont")
            await there.run("kill -CONT $(cat /tmp/reader)")
            await sending
            connection.shutdown(socket.SHUT_WR)
            await there.run("while [ -d /proc/$(cat /tmp/reader) ]; do usleep 10000; done")
            answer = await there.run("sha256sum /tmp/late")
            assert answer.output.split()[0] == hashlib.sha256(late).hexdigest()
        sending.cancel()


def heard(wire: Namespace, ethertype: int) -> socket.socket:
    """A socket that hears all frames of one kind that reach the peer."""
    with wire.entered():
        listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ethertype))
        listener.bind((wire.ifname, ethertype))
    listener.setblocking(False)
    return listener


@pytest.mark.slow
@pytest.mark.parametrize("announcer", ["guest", "port"])
async def test_network_hears_where_the_guest_is_now(tmp_path: Path, announcer: str) -> None:
    """A guest with VIRTIO_NET_F_GUEST_ANNOUNCE says so by itself; for any other QEMU asks the port to (SEND_RARP)."""
    properties = {"guest_announce": "on" if announcer == "guest" else "off"}
    async with AsyncExitStack() as resources:
        hosts = await resources.enter_async_context(two_hosts(tmp_path))
        nic = hosts.place(0).nics[0]
        places = [replace(place, nics=(replace(place.nics[0], properties=properties),)) for place in hosts.places()]
        hosts.wire.run("ip", "address", "add", f"{PEER_ADDRESS}/24", "dev", hosts.wire.ifname)
        guest = await resources.enter_async_context(QemuGuest(places[0]))
        await configure_interface(guest, f"{GUEST_ADDRESS}/24")
        await ping(guest, PEER_ADDRESS, count=1)
        there = await resources.enter_async_context(QemuGuest(replace(places[1], incoming=True)))
        listener = resources.enter_context(heard(hosts.wire, ETHERTYPE_ARP if announcer == "guest" else ETHERTYPE_RARP))
        migration = Migration(guest, there)
        await migration.begin(tmp_path / "migration.sock")
        await migration.finish()
        async with asyncio.timeout(10):
            while not is_announcement(await asyncio.get_running_loop().sock_recv(listener, 2048), nic.mac):
                pass


def is_announcement(frame: bytes, mac: str) -> bool:
    """Whether a station asks everybody for its own address (RFC 903, RFC 5227)."""
    ours = bytes.fromhex(mac.replace(":", ""))
    sender, asked = frame[22:32], frame[32:42]
    is_rarp = int.from_bytes(frame[12:14], "big") == ETHERTYPE_RARP
    return frame[:12] == b"\xff" * 6 + ours and (sender == asked if is_rarp else sender[6:] == asked[6:])


@pytest.mark.slow
async def test_postcopy_is_refused_before_it_begins(tmp_path: Path) -> None:
    """QEMU asks whether the back-end can take page faults. That is not offered: all of a guest's memory is pinned."""
    async with two_hosts(tmp_path) as hosts, QemuGuest(replace(hosts.place(0), incoming=True)) as qemu:
        with pytest.raises(QmpCommandError, match="Postcopy"):
            await qemu.qmp.execute(
                "migrate-set-capabilities", capabilities=[{"capability": "postcopy-ram", "state": True}]
            )
        async with asyncio.timeout(10):
            while "vhost-user backend not capable of postcopy" not in qemu.console:  # noqa: ASYNC110 - it wakes nobody
                await asyncio.sleep(0.01)
