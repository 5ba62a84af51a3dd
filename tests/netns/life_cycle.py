"""The life of an interface: ports come and go, guests come and go, everything that may happen to them happens.

Each step is drawn at random from those that are possible. After each, frames have to get through both ways, if there is
a guest. Whenever a port is idle, and whenever it has ended, what is left of it is counted.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from traces import InterfaceTraces, ProcessTraces
from veths import make_veth
from xdp_links import detach_program

from mpassthru.broker.binding_state import BindingState
from mpassthru.broker.status import AttachReport
from mpassthru.locked_memory import RUNTIME_DIR
from mpassthru.port_commands import Bind, StatusWanted, Unbind, ask
from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.child import until_gone
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import DEFAULT_PROTOCOL_FEATURES, GuestConfig, Pattern, Region, Source
from mpassthru.testing.netns import Namespace, empty_namespace, move_interface
from mpassthru.vhost_user import Frontend, MemoryRegion, ProtocolFeature

TIMEOUT_S = 15.0
FRAMES = 16
GUEST_BYTES = 1 << 20
PLUGGED_BYTES = 256 << 10
PLUGGED_PHYS, PLUGGED_USER = 0x1_0000_0000, 0x7000_0000_0000
PLUGGED_MAX = 2
USER = "games"
"""Of the workers: nobody else's on the machine, for pages count as locked by user."""
MEMLOCK_BYTES = 8 << 20
"""Enough for one guest, what is plugged in and our own frames, and not for two: pages that stay locked are missed."""
LIMITED = (
    *("prlimit", f"--memlock={MEMLOCK_BYTES}:{MEMLOCK_BYTES}"),
    *("setpriv", "--bounding-set=-ipc_lock,-sys_resource", "--inh-caps=-all"),
)
PORTS = ((), ("--poll", "busy"), ("--poll", "interrupt"), ("--xdp", "generic"))
FRAME = (b"\x02\0\0\0\0\x01" + b"\x02\0\0\0\0\xff" + b"\x88\xb6").ljust(60, b"\x5a")
EXPECTED_TROUBLES = ("was killed by SIGKILL", "ENETDOWN", "ENXIO", "waiting for ")
OTHER_PAIR = ("mpt2", "mpt3")
"""A second interface, to be bound to, and its peer."""

CONFIG = GuestConfig(
    regions=(Region(size_bytes=GUEST_BYTES),),
    queue_size=64,
    protocol_features=DEFAULT_PROTOCOL_FEATURES | ProtocolFeature.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
)

Step = Callable[[], Awaitable[None]]


class LifeCycle:
    """One interface and what is attached to it.

    Attributes:
        steps: The names of the steps so far.
        counts: How often a port's leftovers were counted.
    """

    def __init__(self, namespace: Namespace, folder: Path, seed: int) -> None:
        self.steps: list[str] = []
        self.counts = 0
        self._namespace = namespace
        self._path = folder / "port.sock"
        self._random = random.Random(seed)
        self._port_stack, self._guest_stack = AsyncExitStack(), AsyncExitStack()
        self._port: AttachedPort | None = None
        self._guest: BuiltinGuest | None = None
        self._workers: set[int] = set()
        self._idle: dict[int, ProcessTraces] = {}
        self._plugged: list[MemoryRegion] = []
        self._sessions = 0
        self._pairs = [(namespace.ifname, namespace.peer), OTHER_PAIR]
        """The port's interface and its peer, and the other ones."""
        self._elsewhere = -1

    async def run(self, steps: int) -> None:
        """Take steps, then end what is there."""
        with empty_namespace() as self._elsewhere:
            make_veth(self._namespace, *OTHER_PAIR)
            await self._until(self._carrier, "the carrier is there")
            await self._take(steps)

    async def _take(self, steps: int) -> None:
        try:
            for _ in range(steps):
                step = self._random.choice(self._possible())
                self.steps.append(step.__name__)
                await step()
                await self._check_traffic()
            if self._guest is not None:
                await self.guest_leaves()
            if self._port is None:
                await self.port_starts()  # takes over what a killed one left
            await self.port_ends()
        finally:
            await self._guest_stack.aclose()
            await self._port_stack.aclose()
            self._unplug_all()

    def _possible(self) -> list[Step]:
        if self._port is None:
            return [self.port_starts]
        if self._guest is None:
            return [self.guest_comes] * 5 + [
                self.port_ends,
                self.broker_is_killed,
                self.worker_is_killed,
                self._random.choice(self._interface_steps()),
            ]
        steps: list[Step] = [
            self.guest_leaves,
            self.guest_stops_and_starts,
            self.guest_resets,
            self.guest_reboots,
            self.guest_reconnects,
            self.memory_table_is_sent_again,
            self.rings_are_disabled_and_enabled,
            *self._random.sample(self._interface_steps(), 4),
        ]
        steps += [self.memory_is_plugged] * (len(self._plugged) < PLUGGED_MAX)
        steps += [self.memory_is_unplugged] * bool(self._plugged)
        steps += [self._random.choice([self.port_ends, self.broker_is_killed, self.worker_is_killed])]
        return steps

    def _interface_steps(self) -> list[Step]:
        return [
            self.link_flaps,
            self.carrier_flaps,
            self.mtu_changes,
            self.interface_is_made_anew,
            self.interface_is_away_for_a_while,
            self.interface_is_renamed,
            self.program_is_detached,
            self.port_is_bound_elsewhere,
            self.port_is_unbound_for_a_while,
        ]

    # ---- ports -----------------------------------------------------------------------------------------------

    async def port_starts(self) -> None:
        """A port, with other options each time."""
        options = self._random.choice(PORTS)
        self._sessions = 0
        ifname, peer = self._pairs[0]
        self._port = await self._port_stack.enter_async_context(
            attached_port(
                replace(self._namespace, ifname=ifname, peer=peer),
                self._path,
                *("--user", USER, "--guest-size", "64M"),
                *options,
                prefix=LIMITED,
            )
        )
        await self._until_ready()
        await self._count_idle()

    async def port_ends(self) -> None:
        """In good order, under its guest perhaps."""
        report = await self._running_port.stop()
        unexpected = [line for line in report.troubles if not any(word in line for word in EXPECTED_TROUBLES)]
        assert not unexpected, unexpected
        await self._after_port()

    async def broker_is_killed(self) -> None:
        """Its worker goes with it; its socket stays, for the next port to take over."""
        self._running_port.kill()
        await self._running_port.wait()
        assert self._path.is_socket()
        await self._after_port()

    async def _after_port(self) -> None:
        await self._port_stack.aclose()
        await self._guest_stack.aclose()
        self._port = self._guest = None
        self._unplug_all()
        for worker in self._workers:
            await until_gone(worker)
        self._workers.clear()
        self._idle.clear()
        await self._until(lambda: InterfaceTraces.of(self._namespace) == InterfaceTraces(), "nothing is attached")
        self.counts += 1

    async def worker_is_killed(self) -> None:
        """The broker starts another, and the guest connects to it."""
        report = await self._running_port.until(lambda report: report.worker_pid is not None)
        assert report.worker_pid is not None
        restarts = report.worker_restarts
        os.kill(report.worker_pid, signal.SIGKILL)
        await until_gone(report.worker_pid)
        self._idle.pop(report.worker_pid, None)  # one that never was without a guest was not counted
        await self._running_port.until(
            lambda report: report.worker_restarts > restarts and report.worker == "ready", timeout_s=TIMEOUT_S
        )
        if self._guest is not None:
            await self.guest_reconnects()
        else:
            await self._until_ready()
            await self._count_idle()

    async def _until_ready(self) -> AttachReport:
        report = await self._running_port.until(
            lambda report: (
                (report.worker, report.guest, report.mode, report.sessions, report.binding)
                == ("ready", "waiting", "detached", self._sessions, BindingState.BOUND)
            ),
            timeout_s=TIMEOUT_S,
        )
        assert report.worker_pid is not None
        self._workers.add(report.worker_pid)
        return report

    async def _count_idle(self) -> None:
        """What broker and worker hold without a guest is what they held before the first one.

        The broker ends the worker in reserve when the guest has left.
        """
        assert self._running_port.report is not None
        worker = self._running_port.report.worker_pid
        assert worker is not None
        for pid in (self._running_port.pid, worker):
            now = ProcessTraces.of(pid)
            before = self._idle.setdefault(pid, now)
            who = "worker" if pid == worker else "broker"
            await self._until(
                lambda pid=pid, before=before: ProcessTraces.of(pid) == before,  # type: ignore[misc]
                f"{who} holds what it held before: {before}, and not {now}",
            )
        self.counts += 1

    @property
    def _running_port(self) -> AttachedPort:
        assert self._port is not None
        return self._port

    # ---- guests ----------------------------------------------------------------------------------------------

    async def guest_comes(self) -> None:
        """And starts its device."""
        self._sessions += 1
        self._guest = await self._guest_stack.enter_async_context(
            BuiltinGuest.connect(self._path, CONFIG, timeout_s=TIMEOUT_S)
        )
        self._guest.start(rx="sink")

    async def guest_leaves(self) -> None:
        """With its device running, or stopped before."""
        if self._random.random() < 0.5:
            await self._running_guest.stop()
            assert self._running_guest.violations() == {}
        await self._guest_stack.aclose()
        self._guest = None
        self._unplug_all()
        await self._until_ready()
        await self._count_idle()

    async def guest_stops_and_starts(self) -> None:
        """GET_VRING_BASE of each ring, and on from there."""
        await self._running_guest.stop()
        assert self._running_guest.violations() == {}
        await self._start_device()

    async def guest_resets(self) -> None:
        """RESET_DEVICE, and empty rings."""
        await self._running_guest.reset()
        self._unplug_all()
        self._running_guest.start(rx="sink")

    async def guest_reboots(self) -> None:
        """The virtio device status goes to 0 under running rings; then they start afresh."""
        guest = self._running_guest
        await guest.frontend.set_status(0)
        await guest.stop()
        guest.driver.reset()
        guest.bases = [0] * len(guest.bases)
        await self._start_device()

    async def guest_reconnects(self) -> None:
        """As QEMU does when a back-end was lost: the rings as they are."""
        guest = self._running_guest
        guest.pause()
        guest.frontend.close()
        self._sessions += 1
        frontend = await Frontend.connect(self._path, timeout_s=TIMEOUT_S)
        await guest.reconnect(frontend)
        self._unplug_all()
        guest.start(rx="sink")
        report = await self._running_port.until(
            lambda report: report.guest == "running" and report.sessions == self._sessions, timeout_s=TIMEOUT_S
        )
        assert report.worker_pid is not None
        self._workers.add(report.worker_pid)

    async def rings_are_disabled_and_enabled(self) -> None:
        """SET_VRING_ENABLE, one ring or all."""
        indices = self._random.sample(self._running_guest.vrings, self._random.randint(1, 2))
        for enabled in (False, True):
            for index in indices:
                await self._running_guest.frontend.set_vring_enable(index, enabled)

    async def _start_device(self) -> None:
        await self._running_guest.start_device()
        self._unplug_all()
        self._running_guest.start(rx="sink")

    @property
    def _running_guest(self) -> BuiltinGuest:
        assert self._guest is not None
        return self._guest

    # ---- memory ----------------------------------------------------------------------------------------------

    async def memory_is_plugged(self) -> None:
        """ADD_MEM_REG."""
        taken = {region.guest_phys_address for region in self._plugged}
        slot = next(slot for slot in range(PLUGGED_MAX) if PLUGGED_PHYS + slot * PLUGGED_BYTES not in taken)
        fd = os.memfd_create("plugged")
        os.ftruncate(fd, PLUGGED_BYTES)
        offset = slot * PLUGGED_BYTES
        region = MemoryRegion(PLUGGED_PHYS + offset, PLUGGED_BYTES, PLUGGED_USER + offset, 0, fd)
        self._plugged.append(region)
        await self._running_guest.frontend.add_mem_reg(region)

    async def memory_is_unplugged(self) -> None:
        """REM_MEM_REG."""
        region = self._plugged.pop(self._random.randrange(len(self._plugged)))
        await self._running_guest.frontend.rem_mem_reg(region)
        os.close(region.fd)

    async def memory_table_is_sent_again(self) -> None:
        """SET_MEM_TABLE under running rings, with what is plugged or without."""
        regions = [MemoryRegion(*region) for region in self._running_guest.driver.regions()]
        if self._random.random() < 0.5:
            regions += self._plugged
        else:
            self._unplug_all()
        await self._running_guest.frontend.set_mem_table(regions)

    def _unplug_all(self) -> None:
        """What the back-end was told of with a table of memory is all that it has."""
        while self._plugged:
            os.close(self._plugged.pop().fd)

    # ---- the interface ---------------------------------------------------------------------------------------

    async def link_flaps(self) -> None:
        """Administratively down and up."""
        await self._flap(self._pairs[0][0])

    async def carrier_flaps(self) -> None:
        """The other end goes down and up."""
        await self._flap(self._pairs[0][1])

    async def mtu_changes(self) -> None:
        """To a shorter one and back."""
        for mtu in ("1400", "1500"):
            self._namespace.run("ip", "link", "set", "dev", self._pairs[0][0], "mtu", mtu)
            await self._pause()

    async def interface_is_made_anew(self) -> None:
        """The driver is loaded again, so to say."""
        self._namespace.run("ip", "link", "del", "dev", self._pairs[0][0])
        await self._pause()
        make_veth(self._namespace, *self._pairs[0])
        await self._until_bound()

    async def interface_is_away_for_a_while(self) -> None:
        """In another network namespace."""
        ifname, _ = self._pairs[0]
        move_interface(ifname, source=self._namespace.fd, target=self._elsewhere)
        await self._pause()
        move_interface(ifname, source=self._elsewhere, target=self._namespace.fd)
        self._namespace.run("ip", "link", "set", "dev", ifname, "up")
        await self._until_bound()

    async def interface_is_renamed(self) -> None:
        """And named again as before."""
        ifname, _ = self._pairs[0]
        for before, after in ((ifname, "other0"), ("other0", ifname)):
            self._namespace.run("ip", "link", "set", "dev", before, "name", after)
            await self._pause()
        await self._until_bound()

    async def program_is_detached(self) -> None:
        """By somebody who must not."""
        await self._until_bound()
        detach_program(replace(self._namespace, ifname=self._pairs[0][0]))
        await self._until_bound()

    async def port_is_bound_elsewhere(self) -> None:
        """`mpassthru bind`."""
        await self._until_bound()
        self._pairs.reverse()
        await ask(self._control, Bind(interface=self._pairs[0][0]))

    async def port_is_unbound_for_a_while(self) -> None:
        """`mpassthru unbind` and `bind`; its worker may die meanwhile."""
        await ask(self._control, Unbind())
        await self._running_port.until(lambda report: report.binding is BindingState.UNBOUND)
        if self._guest is not None and self._random.random() < 0.5:
            await self.worker_is_killed()
        self._pairs = self._random.sample(self._pairs, 2)
        await ask(self._control, Bind(interface=self._pairs[0][0]))
        await self._until_bound()

    @property
    def _control(self) -> Path:
        (path,) = RUNTIME_DIR.glob(f"control-{self._running_port.pid}-*")
        return path

    async def _until_bound(self) -> None:
        """Seen with the eyes of a command, for the figures that were printed last may be those of before."""
        await self._until(self._carrier, "the carrier is back")
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                report = (await ask(self._control, StatusWanted())).report
                settled = report.binding is BindingState.BOUND and report.interface == self._pairs[0][0]
                if settled and replace(self._namespace, ifname=report.interface).has_xdp_program():
                    return
                await asyncio.sleep(0.02)

    async def _pause(self) -> None:
        """Long enough for the port to notice, or not."""
        if self._random.random() < 0.5:
            await asyncio.sleep(self._random.random() / 10)

    async def _flap(self, ifname: str) -> None:
        self._namespace.run("ip", "link", "set", "dev", ifname, "down")
        await self._pause()
        self._namespace.run("ip", "link", "set", "dev", ifname, "up")
        await self._until(self._carrier, "the carrier is back")

    def _carrier(self) -> bool:
        links = json.loads(self._namespace.run("ip", "-json", "link", "show"))
        return all("LOWER_UP" in link["flags"] for link in links if link["ifname"] != "lo")

    # ---- what has to hold ------------------------------------------------------------------------------------

    async def _check_traffic(self) -> None:
        """Frames get through both ways; some may be lost before."""
        if self._guest is None:
            return
        guest, before = self._guest, self._guest.counters()
        guest.start(rx="sink", source=Source(pattern=Pattern(), count=FRAMES))
        with self._namespace.entered():
            wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        with wire:
            wire.bind((self._pairs[0][1], 0))

            def arrives() -> bool:
                wire.send(FRAME)
                counters = guest.counters()
                sent = counters.tx_frames >= before.tx_frames + FRAMES * CONFIG.queue_pairs
                return sent and counters.rx_frames > before.rx_frames

            await self._until(arrives, "frames get through")
        assert guest.violations() == {}

    async def _until(self, condition: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while not condition():  # noqa: ASYNC110 - the kernel and other processes set no Event
                    await asyncio.sleep(0.005)
        except TimeoutError:
            said = self._port.lines[-5:] if self._port else ()
            raise AssertionError(f"in vain: {what}; {self._guest and self._guest.counters()}; {said}") from None
