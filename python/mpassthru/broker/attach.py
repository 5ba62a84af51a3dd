"""`mpassthru attach`: from an interface's name to a running port, and back to an interface as it was."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mpassthru.broker.binding import TakenInterface, fit_interface, take
from mpassthru.broker.command_socket import CommandSocket
from mpassthru.broker.endpoint import ConnectingEndpoint, Endpoint, InheritedEndpoint, ListeningEndpoint
from mpassthru.broker.guest_filter import GuestFilter
from mpassthru.broker.hints import FrontendWatch
from mpassthru.broker.keeper import Keeper
from mpassthru.broker.mode import refuse_packet_options
from mpassthru.broker.options import AttachOptions, View
from mpassthru.broker.packet import create_packet_socket
from mpassthru.broker.port import Port
from mpassthru.broker.qemu_follower import QemuFollower
from mpassthru.broker.rx_offloads import offers_rx_offloads
from mpassthru.broker.status import AttachReport
from mpassthru.broker.tx_offloads import offers_tx_offloads
from mpassthru.broker.worker_user import worker_ids
from mpassthru.broker.xsk import create_socket
from mpassthru.control import Configure
from mpassthru.errors import HostError, RefusedError
from mpassthru.event_loop import ungrouped
from mpassthru.locked_memory import RUNTIME_DIR, Budget, LockedMemory, default_host_max_bytes
from mpassthru.netdev import format_bytes, umem_cost
from mpassthru.netdev.capabilities import missing_for_broker
from mpassthru.rules import wants_longer_buffers
from mpassthru.stop_signals import on_stop_signal

HINT_INTERVAL_S: Final = 1.0
FIRST_BINDING: Final = 1


@dataclass(frozen=True)
class Attached:
    """Everything that is ready for a port."""

    taken: TakenInterface
    endpoint: Endpoint
    configuration: Configure
    memory: LockedMemory
    guest_filter: GuestFilter


async def attach(options: AttachOptions, view: View, recipe: Callable[[int], str]) -> tuple[AttachReport, bool]:
    """Run a port until SIGTERM, SIGINT, SIGHUP, or the end of the one front-end of `once`.

    Args:
        options: What to do.
        view: Shows what goes on.
        recipe: Makes the text that tells the user how to start a guest, from the MTU.

    Returns:
        The figures at the end, and whether the port did what it was there for. It did not if `once` was asked for and
        anything went wrong (see the report's `troubles`).

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
                ready.endpoint,
                ready.memory,
                say=view.say,
                once=options.once,
                stopping=stopping,
                new_socket=create_packet_socket if options.mode == "packet" else create_socket,
            )
            follower = follow_qemu(options, port, ready.guest_filter)
            keeper = Keeper(
                options,
                port,
                ready.taken,
                on_link=follower.set_link if follower is not None else lambda _: None,
                on_moved=ready.memory.move,
                take=functools.partial(take, guest_filter=ready.guest_filter),
            )
            with (
                contextlib.closing(keeper),
                open_command_socket(options, port, keeper, view) as commands,
            ):
                view.say(recipe(ready.taken.interface.mtu_bytes))
                await keeper.start()
                beside = [keeper.run(), _show(port, view, options.interval_s), _hint(ready.endpoint, port, view)]
                beside += [commands.serve()] if commands is not None else []
                beside += [follower.run()] if follower is not None else []
                await _run(port, beside)
                port.status.steering = port.read_steering()
            return port.status.report(ended=True), not port.failed


def follow_qemu(options: AttachOptions, port: Port, guest_filter: GuestFilter) -> QemuFollower | None:
    """Who follows the guest through QEMU's monitor, if that was asked for."""
    if options.qmp is None:
        return None
    return QemuFollower(
        options.qmp.path,
        guest_filter,
        port.status,
        port.say,
        socket_path=options.socket_path or options.connect_path,
        nic=options.qmp.nic,
    )


async def _run(port: Port, beside: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run the port, and what never ends by itself, beside it."""
    with ungrouped():
        async with asyncio.TaskGroup() as tasks:
            helpers = [tasks.create_task(helper) for helper in beside]
            await port.run()
            for helper in helpers:
                helper.cancel()


async def _show(port: Port, view: View, interval_s: float) -> None:
    while True:
        await asyncio.sleep(interval_s)
        await port.refresh()
        view.show(port.status.report())


async def _hint(endpoint: Endpoint, port: Port, view: View) -> None:
    """Tell of front-ends that get nowhere."""
    frontends = FrontendWatch()
    while True:
        for hint in frontends.look(port.status, time.monotonic(), another_waits=endpoint.somebody_waits()):
            view.say(hint)
        await asyncio.sleep(HINT_INTERVAL_S)


@contextlib.asynccontextmanager
async def attached(options: AttachOptions, view: View) -> AsyncIterator[Attached]:
    """Check everything, then take the socket path, the XDP hook and the queues; give them back at the end."""
    refuse_without_privilege()
    if options.mode == "packet":
        refuse_packet_options(options.queues, options.steer.kind, options.xdp)
    interface = await fit_interface(options.interface, options.queue_ids)
    uid, gid = worker_ids(options.user)
    with contextlib.ExitStack() as undo:
        memory = undo.enter_context(open_accounts(options, view))
        endpoint = open_endpoint(options, view)
        undo.callback(endpoint.close)
        guest_filter = GuestFilter(options.steer, follows=options.qmp is not None)
        taken = await take(interface, options, FIRST_BINDING, view, guest_filter=guest_filter)
        undo.callback(taken.close)
        rules = taken.binding.zero_copy_rules
        if options.mode != "packet":
            view.say(cost_line(options.guest_bytes, options.queues, zero_copy=rules is not None))
        configuration = Configure(
            queue_pairs=options.queues,
            poll=options.poll,
            binding=None,
            longer_buffers=wants_longer_buffers(rules),
            tx_offloads=offers_tx_offloads(options.tx_offloads, taken.binding.socket_mode, rules, view),
            rx_offloads=offers_rx_offloads(options.rx_offloads, taken.binding.socket_mode, rules),
            source_addresses=options.lock_macs,
            pins_memory=options.mode != "packet",
            uid=uid,
            gid=gid,
        )
        yield Attached(taken, endpoint, configuration, memory, guest_filter)


def refuse_without_privilege() -> None:
    """Refuse to start what the kernel would refuse later.

    Raises:
        RefusedError: a capability is missing.
    """
    if missing := missing_for_broker():
        raise RefusedError(f"cannot attach without {', '.join(missing)}: run as root, or grant what is missing")


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


@contextlib.contextmanager
def open_command_socket(
    options: AttachOptions, port: Port, keeper: Keeper, view: View
) -> Iterator[CommandSocket | None]:
    """Where commands to the port come from. A broker that may not make a socket there goes on without, and says so.

    Raises:
        HostError: the socket cannot be made in the directory that was asked for.
    """
    frontend_path = options.socket_path or options.connect_path
    try:
        commands = CommandSocket(options.runtime_dir or RUNTIME_DIR, port, keeper, frontend_path)
    except HostError as error:
        if options.runtime_dir is not None:
            raise
        view.say(f"this port takes no commands (mpassthru bind, status): {error}")
        yield None
        return
    with contextlib.closing(commands):
        yield commands


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
