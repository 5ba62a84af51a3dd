"""Keeps a port bound: follows its interface, gives way when it goes, and comes back when it does.

The keeper alone decides about `Port.rebind`. It acts on what an interface is when it looks, not on what it is told:
news of the monitor are only a reason to look, and whatever fails is tried again. States: `BindingState`.

What the guest notices: nothing but that frames are lost. Its virtqueues go on; what it sends while there is no socket
is dropped and counted (`no_link`). Whoever can tell a guest about its link is told of it by `on_link`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final, Protocol

from mpassthru.broker.binding import (
    RELEASE_PAUSE_S,
    RELEASE_TIMEOUT_S,
    TakenInterface,
    describe_binding,
    fit_interface,
    lacks,
)
from mpassthru.broker.binding_state import BindingState, Lack, Need
from mpassthru.broker.mode import choose_rules, outgrown
from mpassthru.broker.options import AttachOptions
from mpassthru.broker.socket_grants import Steering
from mpassthru.broker.status import PortStatus
from mpassthru.control import Binding
from mpassthru.errors import HostError, MpassthruError, RefusedError
from mpassthru.event_loop import ungrouped
from mpassthru.netdev import Interface, find_interface
from mpassthru.netdev.link_events import LinkEvent, LinkState, Moved, NotificationsLost, Removed
from mpassthru.netdev.link_monitor import LinkMonitor

DOWN_PATIENCE_S: Final = 1.0
"""An interface that is down for longer has its sockets closed: the buffers that wait in them go back to the guest."""
LOOK_INTERVAL_S: Final = 1.0
"""How often to look where nothing tells of changes: for another's socket, and for offloads in zero-copy mode."""
SECOND_LOOK_S: Final = 0.2
RETRY_PAUSE_MAX_S: Final = 30.0
"""Taking an interface that then fails may take its link down: tried after 1 s, then after twice as long each time."""

FLAP_PATIENCE_S: Final = 10.0
"""A NIC's link may flap with every zero-copy socket. A guest that were told would have its queues stopped by its VMM,
which closes the sockets, and started again with the link: that would never end."""

Take = Callable[[Interface, AttachOptions, int, "KeptPort"], Awaitable[TakenInterface]]


class KeptPort(Protocol):
    """What the keeper needs of `mpassthru.broker.port.Port`."""

    status: PortStatus

    def say(self, line: str) -> None:
        """Tell the user something."""

    def trouble(self, line: str) -> None:
        """Tell the user of something that went wrong."""

    async def rebind(self, binding: Binding | None, steering: Steering | None = None) -> None:
        """Have the port's sockets elsewhere, or nowhere."""


class Monitor(Protocol):
    """`mpassthru.netdev.link_monitor.LinkMonitor`."""

    state: LinkState | None

    def follow(self, name: str | None, ifindex: int | None = None) -> None:
        """Watch another interface."""

    async def look(self) -> None:
        """Tell what there is to tell by now."""

    async def run(self) -> None:
        """Watch until cancelled."""


class Keeper:
    """Keeps one port.

    Args:
        options: What the user asked for.
        port: The port; bound by `start`.
        taken: The interface that it is to have first. Owned from here on.
        take: Takes what a port needs of an interface: `mpassthru.broker.binding.take`.
        on_link: Called when the guest's link should go up or down; it is up until then.
        on_moved: Called with the name of another interface that the port is bound to.
    """

    def __init__(
        self,
        options: AttachOptions,
        port: KeptPort,
        taken: TakenInterface,
        *,
        take: Take,
        on_link: Callable[[bool], None] = lambda _: None,
        on_moved: Callable[[str], None] = lambda _: None,
        find: Callable[[str, int | None], Awaitable[Interface | None]] = find_interface,
        make_monitor: Callable[[Callable[[tuple[LinkEvent, ...]], None], Callable[[str], None]], Monitor] = LinkMonitor,
    ) -> None:
        self._options = options
        self._port = port
        self._taken: TakenInterface | None = taken
        self._on_link = on_link
        self._on_moved = on_moved
        self._find = find
        self._take = take
        self._monitor = make_monitor(self._hear, port.trouble)
        self._name = taken.interface.name
        self._mtu_bytes = taken.interface.mtu_bytes
        self._serials = itertools.count(taken.binding.serial + 1)
        self._lock = asyncio.Lock()
        self._news = asyncio.Event()
        self._departure: Removed | Moved | None = None
        self._unsure = False
        self._suspecting = False
        """Sockets seemed to be lost at the last look; a socket that was just being exchanged may seem so."""
        self._open = True
        """The sockets of an interface that is down are not closed yet."""
        self._down_at_s = 0.0
        self._in_use_until_s = 0.0
        """Up to then, what is in use may be what we had ourselves."""
        self._retry_pause_s = LOOK_INTERVAL_S
        self._told = ""
        self._guests_link = True
        self._had_link_at_s = 0.0
        port.status.binding = BindingState.WAITING

    @property
    def state(self) -> BindingState:
        """Where the port stands."""
        return self._port.status.binding

    async def run(self) -> None:
        """Keep the port until cancelled.

        Raises:
            HostError: no netlink socket can be had.
        """
        with ungrouped():
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._monitor.run())
                await self._keep()

    def close(self) -> None:
        """Give back what interface there is."""
        if self._taken is not None:
            self._taken.close()

    async def start(self) -> None:
        """Bind the port to its first interface, before it has any worker."""
        assert self._taken is not None, "it was given one"
        await self._port.rebind(self._taken.binding, self._taken.steering)
        await self._hold(self._taken)

    # ---- what the user asks for ------------------------------------------------------------------------------

    async def bind(self, name: str, queue: int | None = None) -> None:
        """Have the port on an interface, whatever it has now. What can be checked is checked before anything changes.

        Args:
            name: The interface.
            queue: First hardware queue; None for the one that the port has.

        Raises:
            MpassthruError: that cannot be; everything is as it was.
        """
        async with self._lock:
            options = replace(self._options, interface=name, queue=self._options.queue if queue is None else queue)
            if self._taken is not None and self._taken.interface.name == name:
                if options.queue != self._options.queue:
                    raise RefusedError(
                        f"cannot go to other queues of {name} while the port is bound to it: unbind it first"
                    )
                if (lack := self._port.status.lack) is not None:
                    raise RefusedError(f"cannot bind to {name}: {lack.reason}")
                return
            interface = await fit_interface(name, options.queue_ids, find=self._find)
            self._refuse_smaller(interface)
            taken = await self._take(interface, options, next(self._serials), self._port)
            self._news.set()  # whatever comes of it, the wait for what was before is over
            with contextlib.ExitStack() as undo:
                undo.callback(taken.close)
                try:
                    await self._port.rebind(taken.binding, taken.steering)
                except MpassthruError:
                    await self._go_back()
                    raise
                undo.pop_all()
            former = self._taken
            self._options = options
            try:
                await self._hold(taken)
            finally:
                if former is not None:
                    former.close()
            self._tell_move(name)

    def _refuse_smaller(self, interface: Interface) -> None:
        """The guest may have been told how long its frames may be, and cannot be told again."""
        if interface.mtu_bytes < self._mtu_bytes:
            raise RefusedError(
                f"cannot bind to {interface.name}: its MTU is {interface.mtu_bytes}, and the guest may count on "
                f"{self._mtu_bytes}; 'ip link set dev {interface.name} mtu {self._mtu_bytes}'"
            )

    async def _go_back(self) -> None:
        """A worker could not have its sockets elsewhere."""
        taken = self._taken
        if taken is None or not self._open:
            await self._port.rebind(None, taken.steering if taken else None)
            return
        try:
            await self._port.rebind(taken.binding, taken.steering)
        except MpassthruError as error:
            await self._let_go(taken, Lack(Need.KERNEL, str(error)))

    async def unbind(self) -> None:
        """Give the interface back and wait for none."""
        async with self._lock:
            taken, self._taken = self._taken, None
            self._set(BindingState.UNBOUND)
            self._monitor.follow(None)
            try:
                await self._port.rebind(None)
            finally:
                if taken is not None:
                    taken.close()
            self._port.say(f"unbound from {self._name}")

    # ---- what happens by itself ------------------------------------------------------------------------------

    def _hear(self, events: tuple[LinkEvent, ...]) -> None:
        for event in events:
            if isinstance(event, Removed | Moved):
                self._departure = event
            self._unsure |= isinstance(event, NotificationsLost)
        if events:
            self._retry_pause_s = LOOK_INTERVAL_S
        self._news.set()

    async def _keep(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s()):
                    await self._news.wait()
            self._news.clear()
            async with self._lock:
                try:
                    await self._settle()
                    self._told = ""
                except (MpassthruError, OSError) as error:
                    if str(error) != self._told:
                        self._port.trouble(f"{error}; trying again every {LOOK_INTERVAL_S:g} s")
                    self._told = str(error)

    def _pause_s(self) -> float | None:
        """How long to wait for news before looking again; None for ever."""
        if self._told:
            return LOOK_INTERVAL_S
        if self._suspecting:
            return SECOND_LOOK_S
        match self.state:
            case BindingState.BOUND:
                assert self._taken is not None, "which is what it means"
                return LOOK_INTERVAL_S if self._taken.binding.zero_copy_rules else None
            case BindingState.UNBOUND:
                return None
        if self._taken is not None and self._open:
            return max(0.0, self._down_at_s + DOWN_PATIENCE_S - self._now_s())
        return RELEASE_PAUSE_S if self._now_s() < self._in_use_until_s else self._retry_pause_s

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    async def _settle(self) -> None:
        """Bring the port to where its interface lets it be."""
        if self._taken is not None:
            await self._look_after(self._taken)
        if self.state is BindingState.WAITING and self._taken is None:
            await self._regain()
        self._tell_link()

    async def _look_after(self, taken: TakenInterface) -> None:
        steered = set(self._port.status.modes)
        unsure, self._unsure = self._unsure, False
        interface = None
        if self._departure is None:
            interface = await self._find(taken.interface.name, taken.interface.ifindex)
        if interface is None:
            await self._monitor.look()  # it may know what became of it
            moved = isinstance(self._departure, Moved)
            reason = "it was moved to another network namespace" if moved else "there is no such interface any more"
            await self._let_go(taken, Lack(Need.INTERFACE, reason))
            return
        self._taken = taken = self._renamed(taken, interface)
        lost = self._lost_sockets(interface, steered & set(self._port.status.modes))
        lost_before, self._suspecting = self._suspecting, lost
        if (lost and lost_before) or (unsure and interface.xsk_queues is None):
            await self._let_go(taken, Lack(Need.INTERFACE, "it was away for a moment"))
            return
        lack = lacks(interface, taken.binding.queue_ids, program_id=taken.program_id, own_sockets=True)
        if lack is not None and lack.need is Need.UP:
            await self._wait_until_up(taken, lack)
        elif lack is not None:
            await self._let_go(taken, lack)
        elif self._is_outdated(taken, interface):
            await self._bind_anew(taken, interface)
        elif self.state is BindingState.WAITING:
            await self._bind(taken)

    def _renamed(self, taken: TakenInterface, interface: Interface) -> TakenInterface:
        if interface.name != taken.interface.name:
            self._port.say(f"{taken.interface.name} is called {interface.name} now")
            self._name = self._port.status.interface = interface.name
            self._tell_move(interface.name)
        return taken.seen_as(interface)

    def _lost_sockets(self, interface: Interface, steered: set[int]) -> bool:
        """Whether the kernel has taken our sockets off the interface, as it does when that goes away."""
        if interface.xsk_queues is None or self._options.mode == "packet":
            return False
        return any(self._options.queue_ids[pair] not in interface.xsk_queues for pair in steered)

    async def _wait_until_up(self, taken: TakenInterface, lack: Lack) -> None:
        if self.state is BindingState.BOUND:
            self._down_at_s, self._open = self._now_s(), True
            self._wait_for(lack)
        elif self._open and self._now_s() - self._down_at_s >= DOWN_PATIENCE_S:
            self._open = False
            await self._port.rebind(None, taken.steering)

    def _is_outdated(self, taken: TakenInterface, interface: Interface) -> bool:
        rules = taken.binding.zero_copy_rules
        if rules is not None and outgrown(rules, interface, self._options.zero_copy):
            return True
        return interface.mtu_bytes != taken.binding.mtu_bytes

    async def _bind_anew(self, taken: TakenInterface, interface: Interface) -> None:
        """The interface has other limits: the best mode under these, and what it allows."""
        options = self._options
        if interface.mtu_bytes != taken.binding.mtu_bytes:
            self._port.say(f"the MTU of {interface.name} is {interface.mtu_bytes} now")
        try:
            rules = choose_rules(
                options.mode, interface, options.zero_copy, _Nobody(), steer=options.steer.kind, xdp=options.xdp
            )
        except RefusedError as error:
            await self._let_go(taken, Lack(Need.MODE, str(error)))
            return
        if (rules is None) != (taken.binding.zero_copy_rules is None):
            # Each mode wants another program (see `take`).
            await self._let_go(taken, Lack(Need.MODE, "what it is now wants, or allows, another mode"))
            return
        if rules is not None:
            # At once: a NIC may by now write further than the buffers that it was given allow.
            await self._port.rebind(None, taken.steering)
        binding = describe_binding(interface, options, rules, next(self._serials))
        await self._bind(taken.bound_as(interface, binding))

    async def _bind(self, taken: TakenInterface) -> None:
        self._taken = taken  # by now, so that it is given back whatever comes
        try:
            await self._port.rebind(taken.binding, taken.steering)
        except MpassthruError as error:
            await self._let_go(taken, Lack(Need.KERNEL, str(error)))
            self._retry_pause_s = min(2 * self._retry_pause_s, RETRY_PAUSE_MAX_S)
        else:
            await self._hold(taken)

    async def _let_go(self, taken: TakenInterface, lack: Lack) -> None:
        """Give the interface back, and wait for one of its name."""
        self._taken = None
        self._in_use_until_s = self._now_s() + RELEASE_TIMEOUT_S
        self._suspecting = False
        self._wait_for(lack)
        self._monitor.follow(self._name, None)
        try:
            await self._port.rebind(None)
        finally:
            taken.close()

    async def _regain(self) -> None:
        """Take the interface that has the name, if it is fit by now."""
        interface = await self._find(self._name, None)
        if interface is None:
            status = self._port.status
            if status.lack is None or status.lack.need is not Need.INTERFACE:
                self._wait_for(Lack(Need.INTERFACE, "there is no such interface any more"))
            return
        if (lack := lacks(interface, self._options.queue_ids)) is not None:
            if self._now_s() >= self._in_use_until_s or lack.need not in (Need.PROGRAM, Need.FREE_QUEUE):
                self._wait_for(lack)
            return
        self._departure, self._unsure = None, False
        try:
            taken = await self._take(interface, self._options, next(self._serials), self._port)
        except MpassthruError as error:
            self._wait_for(_lack_of(error))
            self._retry_pause_s = min(2 * self._retry_pause_s, RETRY_PAUSE_MAX_S)
            return
        await self._bind(taken)

    # ---- where the port stands -------------------------------------------------------------------------------

    async def _hold(self, taken: TakenInterface) -> None:
        status = self._port.status
        first = not status.interface
        status.interface, status.queue_ids = taken.interface.name, taken.binding.queue_ids
        status.xdp_mode = taken.xdp_mode
        self._name, self._taken, self._open = taken.interface.name, taken, True
        self._mtu_bytes = taken.binding.mtu_bytes
        self._retry_pause_s = LOOK_INTERVAL_S
        self._had_link_at_s = self._now_s()  # what was taken just now may have taken it down for a moment
        self._monitor.follow(taken.interface.name, taken.interface.ifindex)
        await self._monitor.look()
        self._set(BindingState.BOUND)
        if not first:
            self._port.say(f"bound to {taken.interface.name}: {taken.binding.socket_mode} mode, {taken.xdp_mode} XDP")

    def _wait_for(self, lack: Lack) -> None:
        if self._port.status.lack != lack:
            self._port.trouble(f"waiting for {self._name}: {lack.reason}")
        self._set(BindingState.WAITING, lack)

    def _set(self, state: BindingState, lack: Lack | None = None) -> None:
        self._port.status.binding, self._port.status.lack = state, lack
        self._tell_link()

    def _tell_move(self, name: str) -> None:
        try:
            self._on_moved(name)
        except MpassthruError as error:
            self._port.trouble(str(error))

    def _tell_link(self) -> None:
        link = self._monitor.state
        has_link = self.state is BindingState.BOUND and link is not None and link.carrier
        self._port.status.link = has_link
        if has_link:
            self._had_link_at_s = self._now_s()
        guests_link = has_link or self._may_flap()
        if guests_link != self._guests_link:
            self._guests_link = guests_link
            self._on_link(guests_link)

    def _may_flap(self) -> bool:
        """Whether a link that is down may be no more than a flap."""
        if self.state is not BindingState.BOUND or self._taken is None:
            return False
        is_zero_copy = self._taken.binding.zero_copy_rules is not None
        return is_zero_copy and self._now_s() - self._had_link_at_s < FLAP_PATIENCE_S


class _Nobody:
    """Is told what nobody wants to know."""

    def say(self, line: str) -> None:
        """It will be said again when it is done."""


def _lack_of(error: MpassthruError) -> Lack:
    """What it says of an interface that it cannot be taken."""
    if isinstance(error, RefusedError):
        return Lack(Need.MODE, str(error))
    number = error.errno if isinstance(error, HostError) else 0
    need = {errno.ENODEV: Need.INTERFACE, errno.EBUSY: Need.PROGRAM, errno.EEXIST: Need.PROGRAM}
    return Lack(need.get(number or 0, Need.KERNEL), str(error))
