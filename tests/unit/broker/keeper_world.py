"""The interfaces of a host, a port, and a monitor, as a keeper sees them: without a kernel."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from mpassthru.broker.binding import TakenInterface, describe_binding
from mpassthru.broker.binding_state import Need
from mpassthru.broker.mode import choose_rules
from mpassthru.broker.options import AttachOptions
from mpassthru.broker.packet import NoSteering
from mpassthru.broker.status import PortStatus
from mpassthru.control import Binding
from mpassthru.errors import HostError
from mpassthru.netdev import MTU_MAX_BYTES, Interface, Offloads, QueueCounts, XdpFeatures, XdpProgram
from mpassthru.netdev.link_events import LinkEvent, LinkState

NAMES = ("eth0", "eth1", "eth2")
OURS, THEIRS = 1000, 1
"""Ids of XDP programs: ours are numbered from here on."""
QUEUES = 2

UP = LinkState(
    ifindex=2, name="eth0", up=True, carrier=True, mtu_bytes=1500, xdp_program_id=None, rx_queues=2, tx_queues=2
)


@dataclass
class Nic:
    """An interface of the model."""

    ifindex: int
    up: bool = True
    mtu_bytes: int = 1500
    rx_queues: int = QUEUES
    program: int | None = None
    driver: str = "veth"
    rx_fcs: bool = False
    sockets: tuple[int, ...] = ()
    """Queues with sockets of ours."""
    owned_queue: int | None = None
    """On which somebody else's AF_XDP socket is."""
    names_sockets: bool = True
    """The kernel says which queue has one."""
    away: bool = False
    """In another network namespace."""

    def lack(self) -> Need | None:
        """What it lacks for a port on all of its queues."""
        lacks = {
            Need.INTERFACE: self.away,
            Need.UP: not self.up,
            Need.QUEUE: self.rx_queues < QUEUES,
            Need.MTU: self.mtu_bytes > MTU_MAX_BYTES,
            Need.PROGRAM: self.program == THEIRS,
            Need.FREE_QUEUE: self.owned_queue is not None,
        }
        return next((need for need, lacking in lacks.items() if lacking), None)


@dataclass
class ModelPort:
    """What a keeper tells its port."""

    host: Host
    status: PortStatus = field(default_factory=PortStatus)
    binding: Binding | None = None
    fail: int = 0
    """How many of the next rebinds to an interface fail."""
    fail_unbind: int = 0
    """How many of the next rebinds to none fail."""
    said: list[str] = field(default_factory=list)
    bindings: list[Binding | None] = field(default_factory=list)

    def say(self, line: str) -> None:
        self.said.append(line)

    def trouble(self, line: str) -> None:
        self.said.append(line)

    async def rebind(self, binding: Binding | None, steering: object = None) -> None:
        await asyncio.sleep(0)
        if binding is not None and self.fail:
            self.fail -= 1
            raise HostError(16, "the queue is held")
        if binding is None and self.fail_unbind:
            self.fail_unbind -= 1
            raise HostError(5, "the worker cannot let go")
        if binding is not None:
            nic = self.host.by_index(binding.ifindex)
            if nic is None or not nic.up or nic.owned_queue is not None:
                raise HostError(16, "no socket can be bound")
        if binding is None:
            for nic in self.host.nics.values():
                nic.sockets = ()
        self.binding = binding
        self.bindings.append(binding)


@dataclass
class ModelMonitor:
    """Tells what it is told to tell."""

    hear: Callable[[tuple[LinkEvent, ...]], None]
    state: LinkState | None = None
    followed: tuple[str | None, int | None] = (None, None)
    comes_with: LinkState = UP
    """What the first look at an interface finds."""

    def follow(self, name: str | None, ifindex: int | None = None) -> None:
        if (name, ifindex) != self.followed:
            self.followed, self.state = (name, ifindex), None

    async def look(self) -> None:
        """Everything is told at once."""
        self.state = self.state or self.comes_with

    async def run(self) -> None:
        await asyncio.Event().wait()


@dataclass
class Host:
    """The interfaces by name."""

    nics: dict[str, Nic] = field(default_factory=dict)
    programs: int = 0
    fail_take: int = 0
    """How many of the next takes fail."""

    def by_index(self, ifindex: int) -> Nic | None:
        return next((nic for nic in self.nics.values() if nic.ifindex == ifindex and not nic.away), None)

    async def find(self, ifname: str, ifindex: int | None = None) -> Interface | None:
        await asyncio.sleep(0)
        for name, nic in self.nics.items():
            if not nic.away and (name == ifname if ifindex is None else nic.ifindex == ifindex):
                return describe(name, nic)
        return None

    async def take(self, interface: Interface, options: AttachOptions, serial: int, view: object) -> TakenInterface:
        await asyncio.sleep(0)
        if self.fail_take:
            self.fail_take -= 1
            raise HostError(12, "cannot attach the XDP program (ENOMEM)")
        nic = self.by_index(interface.ifindex)
        if nic is None:
            raise HostError(19, "it is gone")
        if nic.program is not None:
            raise HostError(16, "an XDP program is there")
        rules = choose_rules(options.mode, interface, options.zero_copy, ModelPort(self))
        self.programs += 1
        program = nic.program = OURS + self.programs
        undo = contextlib.ExitStack()
        undo.callback(self.take_off, program)
        binding = describe_binding(interface, options, rules, serial)
        return TakenInterface(interface, program, "native", NoSteering(), binding, undo)

    def take_off(self, program: int) -> None:
        for nic in self.nics.values():
            if nic.program == program:
                nic.program = None

    def ours(self) -> dict[str, int]:
        return {name: nic.program for name, nic in self.nics.items() if nic.program is not None and nic.program >= OURS}


def describe(name: str, nic: Nic) -> Interface:
    counts = QueueCounts(rx=nic.rx_queues, tx=QUEUES, rx_max=QUEUES, tx_max=QUEUES)
    return Interface(
        name=name,
        ifindex=nic.ifindex,
        mac="02:00:00:00:00:01",
        mtu_bytes=nic.mtu_bytes,
        up=nic.up,
        operstate="up",
        driver=nic.driver,
        bus_address=None,
        queues=counts,
        offloads=Offloads(rx_vlan_strip=False, lro=False, gro_hw=False, rx_fcs=nic.rx_fcs),
        xdp_features=XdpFeatures(native=True, zero_copy=nic.driver != "veth", zero_copy_max_segments=1),
        xdp_program=None if nic.program is None else XdpProgram(id=nic.program, mode="native"),
        xsk_queues=_named_sockets(nic),
    )


def _named_sockets(nic: Nic) -> tuple[int, ...] | None:
    if not nic.names_sockets:
        return None
    return nic.sockets if nic.owned_queue is None else (nic.owned_queue,)
