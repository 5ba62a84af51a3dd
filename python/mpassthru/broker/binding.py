"""An interface in a port's hands: what has to hold for it, what is taken of it, and how it is given back.

Everything that can be refused is refused before anything is changed. What is taken is given back in the opposite order,
whatever happens; the XDP program goes by itself even if this process is killed (bpf_link).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from mpassthru import _core
from mpassthru.broker.binding_state import Lack, Need
from mpassthru.broker.guest_filter import GuestFilter
from mpassthru.broker.hints import steering_notice
from mpassthru.broker.mode import Say, choose_rules, confirmed
from mpassthru.broker.options import AttachOptions, XdpChoice
from mpassthru.broker.packet import NoSteering
from mpassthru.broker.socket_grants import Steering
from mpassthru.control import Binding
from mpassthru.errors import HostError, MpassthruError, RefusedError
from mpassthru.netdev import (
    Interface,
    check_queue,
    find_interface,
    frame_max_bytes,
    has_multi_buffer,
    no_such_interface,
    other_queues_warning,
    read_link,
    room_bytes,
    warnings_for,
)
from mpassthru.rules import ZeroCopyRules

Find = Callable[[str, int | None], Awaitable[Interface | None]]
"""`mpassthru.netdev.find_interface`."""
XdpMode = Literal["native", "generic"]
PortXdpMode = XdpMode | Literal["no"]
"""`no` in mode `packet`."""

RELEASE_TIMEOUT_S: Final = 1.5
RELEASE_PAUSE_S: Final = 0.02


class InUseError(RefusedError):
    """Somebody else has what a port needs; that may pass."""


@dataclass(frozen=True)
class TakenInterface:
    """An interface that is ready for a port's sockets."""

    interface: Interface
    """As it was when it was taken, or last looked at."""
    program_id: int | None
    xdp_mode: PortXdpMode
    steering: Steering
    binding: Binding
    """What workers are told."""
    _undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def close(self) -> None:
        """Give everything back. An interface that is gone has nothing left to give back."""
        self._undo.close()

    def seen_as(self, interface: Interface) -> TakenInterface:
        """The same, with newer facts."""
        return replace(self, interface=interface)

    def bound_as(self, interface: Interface, binding: Binding) -> TakenInterface:
        """The same program on the same interface, with sockets of another kind."""
        return replace(self, interface=interface, binding=binding)


def lacks(
    interface: Interface, queue_ids: tuple[int, ...], *, program_id: int | None = None, own_sockets: bool = False
) -> Lack | None:
    """The first thing that an interface lacks for a port on these queues; None if it is fit.

    Args:
        interface: As read now.
        queue_ids: Of the port.
        program_id: Of the port's own XDP program, if it is attached.
        own_sockets: The port may have sockets on these queues itself.
    """
    name = interface.name
    if not interface.up:
        return Lack(Need.UP, f"it is down; 'ip link set dev {name} up'")
    for need, check in ((Need.QUEUE, _check_queues), (Need.MTU, _check_frames)):
        try:
            check(interface, queue_ids)
        except RefusedError as error:
            return Lack(need, str(error))
    program = interface.xdp_program
    if program is not None and program.id != program_id:
        return Lack(
            Need.PROGRAM,
            f"XDP program {program.id} is there already, of another guest's port or another program "
            "('bpftool link' shows whose), and an interface has one; take another interface",
        )
    if program is None and program_id is not None:
        return Lack(Need.PROGRAM, "somebody took our XDP program off it")
    taken = sorted(set(interface.xsk_queues or ()) & set(queue_ids))
    if taken and not own_sockets:
        return Lack(
            Need.FREE_QUEUE,
            f"another AF_XDP socket owns queue {taken[0]}; end its owner, or choose another with --queue",
        )
    return None


def _check_queues(interface: Interface, queue_ids: tuple[int, ...]) -> None:
    for queue_id in queue_ids:
        check_queue(interface, queue_id)


def _check_frames(interface: Interface, _queue_ids: tuple[int, ...]) -> None:
    frame_max_bytes(interface)


def refuse_unfit(interface: Interface, queue_ids: tuple[int, ...]) -> None:
    """Refuse an interface that cannot have a port on these queues.

    Raises:
        RefusedError: it is down, has no such queues, or carries frames too large.
        InUseError: another XDP program or AF_XDP socket is there.
    """
    lack = lacks(interface, queue_ids)
    if lack is None:
        return
    reason = lack.reason if lack.reason.startswith("cannot") else f"cannot attach to {interface.name}: {lack.reason}"
    if lack.need in (Need.PROGRAM, Need.FREE_QUEUE):
        raise InUseError(reason)
    raise RefusedError(reason)


async def fit_interface(name: str, queue_ids: tuple[int, ...], *, find: Find = find_interface) -> Interface:
    """Read and judge an interface, again for a moment while it is in use.

    The kernel lets go of an AF_XDP socket some 50 ms after its owner's end, so that a start right after a SIGKILL finds
    the queue taken.

    Raises:
        RefusedError: it is not fit; see `refuse_unfit`.
        HostError: it cannot be read.
    """
    deadline = asyncio.get_running_loop().time() + RELEASE_TIMEOUT_S
    while True:
        interface = await find(name, None)
        if interface is None:
            raise no_such_interface(name)
        try:
            refuse_unfit(interface, queue_ids)
        except InUseError:
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(RELEASE_PAUSE_S)
        else:
            return interface


async def take(
    interface: Interface, options: AttachOptions, serial: int, view: Say, *, guest_filter: GuestFilter
) -> TakenInterface:
    """Take what a port needs of an interface that is fit: the XDP hook, a place in its address filter, a mode.

    Args:
        interface: As read now.
        options: What the user asked for; of it counts all but the interface and what front-ends and workers need.
        serial: Number of the binding, none that was there before.
        view: Told what was chosen, and what to look out for.
        guest_filter: Of the port.

    Raises:
        RefusedError: a mode that was forced cannot be had; nothing was changed.
        HostError: the kernel refused; everything was given back.
    """
    queue_ids = options.queue_ids
    rules = choose_rules(options.mode, interface, options.zero_copy, view, steer=options.steer.kind, xdp=options.xdp)
    for line in _notices(options, interface):
        view.say(line)
    with contextlib.ExitStack() as undo:
        steering: Steering = NoSteering()
        xdp_mode: PortXdpMode = "no"
        program: _core.SteeringProgram | None = None
        program_id = None
        if options.mode != "packet":
            # In zero-copy mode drivers must never put a frame into several buffers (kernel-facts, section 5.4): they
            # refuse the MTUs that would make them, as long as the program takes no such frames.
            frags = rules is None and has_multi_buffer()
            program, xdp_mode = attach_program(interface, options.xdp, view, frags=frags)
            undo.callback(_close_program, program)
            for queue_id in queue_ids:
                program.steer_queue(queue_id, steer=options.steer.kind)
            steering = program
        undo.enter_context(guest_filter.applied_to(interface, program))
        if xdp_mode != "no":
            attached = await read_link(interface.name, interface.ifindex)
            program_id = attached.xdp_program_id if attached else None
            # Only now: Intel's drivers take a zero-copy socket once an XDP program is there.
            rules = await confirmed(rules, options.mode, interface, queue_ids, view, xdp_mode=xdp_mode)
        binding = describe_binding(interface, options, rules, serial)
        return TakenInterface(interface, program_id, xdp_mode, steering, binding, undo.pop_all())


def describe_binding(interface: Interface, options: AttachOptions, rules: ZeroCopyRules | None, serial: int) -> Binding:
    """What workers are told of an interface."""
    mode: Literal["packet", "copy", "zero-copy"] = "copy" if rules is None else "zero-copy"
    frame_bytes = frame_max_bytes(interface)
    return Binding(
        serial=serial,
        interface=interface.name,
        ifindex=interface.ifindex,
        driver=interface.driver,
        queue_ids=options.queue_ids,
        mtu_bytes=interface.mtu_bytes,
        frame_max_bytes=frame_bytes,
        room_bytes=room_bytes(frame_bytes),
        socket_mode="packet" if options.mode == "packet" else mode,
        zero_copy_rules=rules,
    )


def _notices(options: AttachOptions, interface: Interface) -> Iterator[str]:
    """What the user should know of an interface before a guest comes."""
    yield from warnings_for(interface)
    if options.mode == "packet":
        return
    if options.steer.kind == "mac":
        yield steering_notice(interface.name, options.steer.allowed)
    if (spread := other_queues_warning(interface, options.queue_ids)) is not None:
        yield spread


def attach_program(
    interface: Interface, choice: XdpChoice, view: Say, *, frags: bool
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


def _close_program(program: _core.SteeringProgram) -> None:
    # The interface may be gone, or somebody may have detached the link: the program is off it then.
    with contextlib.suppress(MpassthruError):
        program.close()
