"""`mpassthru attach`: from an interface's name to a running port, and back to an interface as it was.

Everything that can be refused is refused before anything is changed. What is set up is given back in the opposite
order, whatever happens; the XDP program goes by itself even if this process is killed (bpf_link).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, Protocol

from mpassthru import _core
from mpassthru.broker.endpoint import ConnectingEndpoint, Endpoint, InheritedEndpoint, ListeningEndpoint, SocketAccess
from mpassthru.broker.guest_filter import GuestFilter, Steer
from mpassthru.broker.hints import FrontendWatch, steering_notice
from mpassthru.broker.mode import ZeroCopyOptions, choose_rules, confirmed, outgrown, refuse_packet_options
from mpassthru.broker.packet import NoSteering, create_packet_socket
from mpassthru.broker.port import Port, Steering
from mpassthru.broker.status import AttachReport
from mpassthru.broker.tx_offloads import TxOffloads, offers_tx_offloads
from mpassthru.broker.worker_user import worker_ids
from mpassthru.broker.xsk import create_socket
from mpassthru.control import Configure, Mode, PollMode, SocketMode
from mpassthru.errors import HostError, MpassthruError, RefusedError
from mpassthru.locked_memory import RUNTIME_DIR, Budget, LockedMemory, default_host_max_bytes
from mpassthru.netdev import (
    Interface,
    check_queue,
    format_bytes,
    frame_max_bytes,
    has_multi_buffer,
    other_queues_warning,
    read_interface,
    umem_cost,
    warnings_for,
)
from mpassthru.netdev.capabilities import missing_for_broker
from mpassthru.stop_signals import on_stop_signal

XdpChoice = Literal["auto", "native", "generic"]
XdpMode = Literal["native", "generic"]
PortXdpMode = XdpMode | Literal["no"]
"""`no` in mode `packet`."""

WATCH_INTERVAL_S: Final = 1.0
RELEASE_TIMEOUT_S: Final = 1.5
RELEASE_PAUSE_S: Final = 0.02


class InUseError(RefusedError):
    """Somebody else has what a port needs; that may pass."""


@dataclass(frozen=True, kw_only=True)
class AttachOptions:
    """What the user asked for. Exactly one of `socket_path`, `connect_path` and `fd` is set."""

    interface: str
    socket_path: Path | None = None
    socket_access: SocketAccess = field(default_factory=SocketAccess)
    connect_path: Path | None = None
    fd: int | None = None
    queue: int = 0
    queues: int = 1
    mode: Mode = "auto"
    zero_copy: ZeroCopyOptions = field(default_factory=ZeroCopyOptions)
    xdp: XdpChoice = "auto"
    steer: Steer = field(default_factory=Steer)
    lock_macs: tuple[bytes, ...] | None = None
    """Source addresses that frames from the guest may have; None for any."""
    poll: PollMode = "adaptive"
    tx_offloads: TxOffloads = "auto"
    user: str | None = None
    """Whose process the worker is; None for `nobody`."""
    once: bool = False
    interval_s: float = 1.0
    guest_bytes: int = 4 << 30
    """Of the guest that is expected; refused if no kernel could take it."""
    locked_memory_bytes: int | None = None
    """Most memory that this port may lock; None for as much as all may."""
    locked_memory_all_bytes: int | None = None
    """Most memory that all ports of the host may lock together; None for most of what the host has."""
    runtime_dir: Path | None = None
    """Where ports keep the accounts of locked memory; None for `RUNTIME_DIR`."""


class View(Protocol):
    """Shows what goes on; see `mpassthru.live_view`."""

    def say(self, line: str) -> None:
        """Show one line."""

    def show(self, report: AttachReport) -> None:
        """Show the figures of now."""


@dataclass(frozen=True)
class Attached:
    """An interface that is ready for a port."""

    interface: Interface
    xdp_mode: PortXdpMode
    steering: Steering
    endpoint: Endpoint
    configuration: Configure
    memory: LockedMemory
    zero_copy: ZeroCopyOptions = field(default_factory=ZeroCopyOptions)


async def attach(options: AttachOptions, view: View, recipe: Callable[[int], str]) -> tuple[AttachReport, bool]:
    """Run a port until SIGTERM, SIGINT, SIGHUP, or the end of the one front-end of `once`.

    Args:
        options: What to do.
        view: Shows what goes on.
        recipe: Makes the text that tells the user how to start a guest, from the MTU.

    Returns:
        The figures at the end, and whether the port did what it was there for. It did not if the interface went away,
        or if `once` was asked for and anything went wrong (see the report's `troubles`).

    Raises:
        RefusedError: the interface, the options or this process are not fit for it; nothing was changed.
        HostError: the kernel refused; everything was given back.
        BrokenPipeError: nobody reads what `view` shows any more; everything was given back.
    """
    stopping = asyncio.Event()
    with on_stop_signal(lambda _: stopping.set()):
        async with attached(options, view) as ready:
            port = Port(
                ready.configuration,
                ready.steering,
                ready.endpoint,
                ready.memory,
                say=view.say,
                once=options.once,
                stopping=stopping,
                new_socket=create_packet_socket if options.mode == "packet" else create_socket,
            )
            view.say(recipe(ready.interface.mtu_bytes))
            await _run(port, ready, view, options.interval_s)
            port.status.steering = port.read_steering()
            return _report(port, ready, ended=True), not port.failed


async def _run(port: Port, ready: Attached, view: View, interval_s: float) -> None:
    """Run the port with its view and its watch beside it."""
    try:
        async with asyncio.TaskGroup() as tasks:
            helpers = (
                tasks.create_task(_show(port, ready, view, interval_s)),
                tasks.create_task(_watch(ready, port, view)),
                tasks.create_task(_watch_rules(ready, port)),
            )
            await port.run()
            for helper in helpers:
                helper.cancel()
    except* (MpassthruError, OSError) as errors:
        raise errors.exceptions[0] from None


async def _show(port: Port, ready: Attached, view: View, interval_s: float) -> None:
    while True:
        await asyncio.sleep(interval_s)
        await port.refresh()
        view.show(_report(port, ready))


def _report(port: Port, ready: Attached, *, ended: bool = False) -> AttachReport:
    return port.status.report(
        interface=ready.interface.name,
        queue_ids=ready.configuration.queue_ids,
        xdp_mode=ready.xdp_mode,
        ended=ended,
    )


@contextlib.asynccontextmanager
async def attached(options: AttachOptions, view: View) -> AsyncIterator[Attached]:
    """Check everything, then take the socket path, the XDP hook and the queues; give them back at the end."""
    refuse_without_privilege()
    if options.mode == "packet":
        refuse_packet_options(options.queues, options.steer.kind, options.xdp)
    queue_ids = tuple(range(options.queue, options.queue + options.queues))
    interface = await _fit_interface(options.interface, queue_ids)
    rules = choose_rules(options.mode, interface, options.zero_copy, view, steer=options.steer.kind, xdp=options.xdp)
    uid, gid = worker_ids(options.user)
    for line in _notices(options, interface, queue_ids, zero_copy=rules is not None):
        view.say(line)
    with contextlib.ExitStack() as undo:
        memory = undo.enter_context(open_accounts(options, view))
        endpoint = open_endpoint(options, view)
        undo.callback(endpoint.close)
        steering: Steering = NoSteering()
        xdp_mode: PortXdpMode = "no"
        program: _core.SteeringProgram | None = None
        if options.mode != "packet":
            # In zero-copy mode drivers must never put a frame into several buffers (kernel-facts, section 5.4): they
            # refuse the MTUs that would make them, as long as the program takes no such frames.
            frags = rules is None and has_multi_buffer()
            program, xdp_mode = attach_program(interface, options.xdp, view, frags=frags)
            undo.callback(program.close)
            for queue_id in queue_ids:
                program.steer_queue(queue_id, steer=options.steer.kind)
            steering = program
        undo.enter_context(GuestFilter(options.steer).applied_to(interface, program))
        if xdp_mode != "no":
            # Only now: Intel's drivers take a zero-copy socket once an XDP program is there.
            rules = await confirmed(rules, options.mode, interface, queue_ids, view, xdp_mode=xdp_mode)
        socket_mode: SocketMode = "packet" if xdp_mode == "no" else "copy" if rules is None else "zero-copy"
        yield Attached(
            interface,
            xdp_mode,
            steering,
            endpoint,
            Configure(
                interface=interface.name,
                ifindex=interface.ifindex,
                driver=interface.driver,
                queue_ids=queue_ids,
                mtu_bytes=interface.mtu_bytes,
                frame_max_bytes=frame_max_bytes(interface),
                socket_mode=socket_mode,
                zero_copy_rules=rules,
                tx_offloads=offers_tx_offloads(options.tx_offloads, socket_mode, rules, view),
                poll=options.poll,
                source_addresses=options.lock_macs,
                uid=uid,
                gid=gid,
            ),
            memory,
            options.zero_copy,
        )


def _notices(
    options: AttachOptions, interface: Interface, queue_ids: tuple[int, ...], *, zero_copy: bool
) -> Iterator[str]:
    """What the user should know of before a guest comes."""
    if options.mode == "packet":
        yield from warnings_for(interface)
        return
    yield cost_line(options.guest_bytes, options.queues, zero_copy=zero_copy)
    yield from warnings_for(interface)
    if options.steer.kind == "mac":
        yield steering_notice(interface.name, options.steer.allowed)
    if (spread := other_queues_warning(interface, queue_ids)) is not None:
        yield spread


async def _fit_interface(name: str, queue_ids: tuple[int, ...]) -> Interface:
    """Read and judge an interface, again for a moment while it is in use.

    The kernel lets go of an AF_XDP socket some 50 ms after its owner's end, so that a start right after a SIGKILL finds
    the queue taken.
    """
    deadline = asyncio.get_running_loop().time() + RELEASE_TIMEOUT_S
    while True:
        interface = await read_interface(name)
        try:
            refuse_unfit(interface, queue_ids)
        except InUseError:
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(RELEASE_PAUSE_S)
        else:
            return interface


def refuse_without_privilege() -> None:
    """Refuse to start what the kernel would refuse later.

    Raises:
        RefusedError: a capability is missing.
    """
    if missing := missing_for_broker():
        raise RefusedError(f"cannot attach without {', '.join(missing)}: run as root, or grant what is missing")


def refuse_unfit(interface: Interface, queue_ids: tuple[int, ...]) -> None:
    """Refuse an interface that cannot have a port on these queues.

    Raises:
        RefusedError: it is down, has no such queues, or carries frames too large.
        InUseError: another XDP program or AF_XDP socket is there.
    """
    name = interface.name
    if not interface.up:
        raise RefusedError(f"cannot attach to {name}: it is down; 'ip link set dev {name} up'")
    for queue_id in queue_ids:
        check_queue(interface, queue_id)
    frame_max_bytes(interface)
    if interface.xdp_program is not None:
        raise InUseError(
            f"cannot attach to {name}: XDP program {interface.xdp_program.id} is there already, of another guest's "
            "port or another program ('bpftool link' shows whose), and an interface has one; take another interface"
        )
    taken = sorted(set(interface.xsk_queues or ()) & set(queue_ids))
    if taken:
        raise InUseError(
            f"cannot attach to {name} queue {taken[0]}: another AF_XDP socket owns this queue; "
            "end its owner, or choose another with --queue"
        )


def open_accounts(options: AttachOptions, view: View) -> LockedMemory:
    """The port's place in the accounts of locked memory.

    A broker that may not write there goes on without, and says so, unless somebody asked for them.

    Raises:
        HostError: the accounts that were asked for cannot be kept.
    """
    host_max_bytes = options.locked_memory_all_bytes
    budget = Budget(
        port_max_bytes=options.locked_memory_bytes,
        host_max_bytes=default_host_max_bytes() if host_max_bytes is None else host_max_bytes,
    )
    try:
        return LockedMemory(options.runtime_dir or RUNTIME_DIR, options.interface, budget)
    except HostError as error:
        if options.runtime_dir is not None or host_max_bytes is not None:
            raise
        view.say(f"the memory that this port locks does not count against other ports' budget: {error}")
    return LockedMemory(None, options.interface, budget)


def cost_line(guest_bytes: int, queues: int, *, zero_copy: bool) -> str:
    """What the expected guest will cost.

    Raises:
        RefusedError: no kernel could take it.
    """
    cost = umem_cost(guest_bytes, queues=queues, zero_copy=zero_copy)
    return (
        f"cost of a guest of {format_bytes(guest_bytes)}: all of it pinned, "
        f"and {format_bytes(cost.kernel_bytes)} of kernel memory"
    )


def open_endpoint(options: AttachOptions, view: View) -> Endpoint:
    """Where front-ends come from.

    Raises:
        RefusedError: the path or the fd cannot be used.
        HostError: the path cannot be bound.
    """
    if options.socket_path is not None:
        return ListeningEndpoint(options.socket_path, options.socket_access)
    if options.connect_path is not None:
        return ConnectingEndpoint(options.connect_path, view.say)
    if options.fd is not None:
        return InheritedEndpoint(options.fd)
    raise RefusedError("no front-end to expect: give one of --socket-path, --connect and --fd")


def attach_program(
    interface: Interface, choice: XdpChoice, view: View, *, frags: bool
) -> tuple[_core.SteeringProgram, XdpMode]:
    """Attach the steering program: native XDP where it can be had, generic with a note otherwise.

    Args:
        interface: Where.
        choice: Which was asked for.
        view: Told if it is generic.
        frags: Take frames in several buffers.

    Raises:
        HostError: neither can be had, or the one that was forced cannot.
    """
    if choice != "auto":
        return _attach_program(interface, choice, frags=frags), choice
    try:
        return _attach_program(interface, "native", frags=frags), "native"
    except HostError as error:
        if error.errno in (errno.EBUSY, errno.EEXIST, errno.EPERM, errno.EACCES, errno.ENODEV):
            raise
        view.say(f"XDP: generic (slower: frames pass through an skb first), for native cannot be had: {error}")
    return _attach_program(interface, "generic", frags=frags), "generic"


def _attach_program(interface: Interface, xdp_mode: XdpMode, *, frags: bool) -> _core.SteeringProgram:
    return _core.SteeringProgram.attach(
        interface.ifindex, xdp_mode=xdp_mode, queue_count=interface.queues.rx, frags=frags
    )


async def _watch_rules(ready: Attached, port: Port) -> None:
    """In zero-copy mode, end the port when somebody changes the interface so that a NIC could write past buffers."""
    rules = ready.configuration.zero_copy_rules
    while rules is not None:
        await asyncio.sleep(WATCH_INTERVAL_S)
        try:
            interface = await read_interface(ready.interface.name)
        except HostError as error:
            if error.errno == errno.ENODEV:
                return  # which `_watch` tells
            raise
        if reason := outgrown(rules, interface, ready.zero_copy):
            port.fail(f"{interface.name} was changed under the port, and zero-copy is no longer safe: {reason}")
            return


async def _watch(ready: Attached, port: Port, view: View) -> None:
    """End the port when its interface goes away: the kernel detached everything from it already. Give hints."""
    frontends = FrontendWatch()
    while True:
        try:
            socket.if_indextoname(ready.interface.ifindex)
        except OSError:
            port.fail(f"interface {ready.interface.name} is gone; nothing is left to attach to")
            return
        for hint in frontends.look(port.status, time.monotonic(), another_waits=ready.endpoint.somebody_waits()):
            view.say(hint)
        await asyncio.sleep(WATCH_INTERVAL_S)
