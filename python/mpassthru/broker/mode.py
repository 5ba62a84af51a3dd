"""Which mode a port runs in: the best that is safe, or the one that was asked for; always said, always with the reason.

Zero-copy mode needs a queue of the guest's own. What arrives there is in the guest's memory before any program sees it:
a frame passed on to the host could be read by the guest, and changed under the host's eyes. So steering by address is
refused, for it passes what is not the guest's; with `passthru` the queue is the guest's already, in copy mode too, and
nothing more is given away by not copying.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Literal, Protocol

from mpassthru.control import Mode
from mpassthru.errors import HostError, RefusedError
from mpassthru.netdev import ZERO_COPY, Interface, Refusal, probe_bind, zero_copy_rules
from mpassthru.rules import ZeroCopyRules


@dataclass(frozen=True, kw_only=True)
class ZeroCopyOptions:
    """What the user said about zero-copy mode."""

    bounce_only: bool = False
    """Give the NIC no guest memory."""
    frame_max_bytes: int | None = None
    """The promise that no longer frame arrives from the wire."""


class Say(Protocol):
    """Shows one line."""

    def say(self, line: str) -> None:
        """Show one line."""


def choose_rules(
    mode: Mode,
    interface: Interface,
    options: ZeroCopyOptions,
    view: Say,
    *,
    steer: Literal["passthru", "mac"] = "passthru",
    xdp: Literal["auto", "native", "generic"] = "auto",
) -> ZeroCopyRules | None:
    """The rules of zero-copy mode if it is to be used; None for copy mode. `auto` says which and why.

    Raises:
        RefusedError: zero-copy was forced and cannot be had, or options do not fit together.
    """
    if mode != "zero-copy" and options.bounce_only:
        raise RefusedError("--bounce-only copies every frame in zero-copy mode: give --mode zero-copy too, or neither")
    if mode in ("copy", "packet") and options.frame_max_bytes is not None:
        raise RefusedError(f"--max-frame is about zero-copy mode: {mode} mode writes past no buffer; leave it away")
    if mode == "packet":
        view.say("mode: packet (AF_PACKET: two copies to the guest, one from it); the host receives each frame too")
    if mode in ("copy", "packet"):
        return None
    decision = _in_the_way(interface, steer, xdp) or zero_copy_rules(
        interface, frame_max_bytes=options.frame_max_bytes, bounce_only=options.bounce_only
    )
    if isinstance(decision, ZeroCopyRules):
        view.say(f"mode: zero-copy; {describe(decision, options)}")
        if (facts := ZERO_COPY.get(interface.driver or "")) and facts.link_flaps:
            view.say(f"the link of {interface.name} goes down and up each time that a guest starts or stops")
        return decision
    if mode == "zero-copy":
        raise RefusedError(f"cannot use zero-copy mode on {interface.name}: {decision}; or use --mode copy")
    view.say(f"mode: copy (the kernel copies each frame once, into the guest's own buffer); no zero-copy: {decision}")
    return None


def refuse_packet_options(
    queues: int, steer: Literal["passthru", "mac"], xdp: Literal["auto", "native", "generic"]
) -> None:
    """Refuse what mode `packet` cannot do.

    Raises:
        RefusedError: an option that needs the XDP program, or more than one queue pair.
    """
    if queues != 1:
        raise RefusedError(f"mode packet has one queue pair, not {queues}: leave --queues away, or use --mode copy")
    if steer != "passthru" or xdp != "auto":
        raise RefusedError("mode packet has no XDP program: leave --steer and --xdp away, or use --mode copy")


def describe(rules: ZeroCopyRules, options: ZeroCopyOptions | None = None) -> str:
    """The rules in one line."""
    if not rules.direct:
        return "bounce only: every frame is copied once, from or to memory of our own"
    where = "huge page" if rules.contiguity == "backing-page" else "4 KiB page, for the IOMMU translates"
    promised = " as promised by --max-frame" if options and options.frame_max_bytes == rules.rx_write_max_bytes else ""
    return (
        f"the NIC writes at most {rules.rx_write_max_bytes} bytes of a frame{promised}: "
        f"buffers with less room, or not within one {where}, are copied to"
    )


async def refuse_unbindable(
    interface: Interface, queue_ids: tuple[int, ...], xdp_mode: Literal["native", "generic"]
) -> None:
    """Find out, before any guest comes, whether the driver takes a zero-copy socket on these queues.

    Raises:
        HostError: it does not, or a queue is taken.
    """
    if xdp_mode == "generic":
        reason = f"cannot use zero-copy mode on {interface.name}: the XDP program is not in its driver; use --mode copy"
        raise HostError(errno.EOPNOTSUPP, reason)
    for queue_id in queue_ids:
        await probe_bind(interface.name, queue_id, "zero-copy")


async def confirmed(
    rules: ZeroCopyRules | None,
    mode: Mode,
    interface: Interface,
    queue_ids: tuple[int, ...],
    view: Say,
    *,
    xdp_mode: Literal["native", "generic"],
) -> ZeroCopyRules | None:
    """The rules, if the driver takes a zero-copy socket now; None if it does not and the mode was left to us.

    Args:
        rules: As chosen before anything was changed.
        mode: What was asked for.
        interface: With the XDP program attached.
        queue_ids: Of the port.
        view: Told about a change of mind.
        xdp_mode: How the program came to be attached; a NIC in zero-copy mode never gets as far as generic XDP.

    Raises:
        HostError: zero-copy was forced and the driver does not take it.
    """
    if rules is None:
        return None
    try:
        await refuse_unbindable(interface, queue_ids, xdp_mode)
    except HostError as error:
        if mode == "zero-copy":
            raise
        view.say(f"mode: copy after all: {error}")
        return None
    return rules


def outgrown(rules: ZeroCopyRules, interface: Interface, options: ZeroCopyOptions) -> str | None:
    """Why an interface, as it is now, may write where these rules do not expect it; None as long as they hold.

    An MTU or an offload can be changed while a guest is there. The NIC is then bounded differently, at once.
    """
    now = zero_copy_rules(interface, frame_max_bytes=options.frame_max_bytes, bounce_only=options.bounce_only)
    if isinstance(now, Refusal):
        return str(now)
    if now.rx_write_max_bytes > rules.rx_write_max_bytes or now.frame_room_bytes > rules.frame_room_bytes:
        return f"its NIC may now write {now.rx_write_max_bytes} bytes of a frame, not {rules.rx_write_max_bytes}"
    if (now.rx_write_align_bytes, now.rx_write_before_bytes, now.contiguity) != (
        rules.rx_write_align_bytes,
        rules.rx_write_before_bytes,
        rules.contiguity,
    ):
        return "its driver now writes in another way"
    return None


def _in_the_way(interface: Interface, steer: Literal["passthru", "mac"], xdp: str) -> Refusal | None:
    name = interface.name
    if xdp == "generic":
        return Refusal("generic XDP has none", "use --xdp native")
    if steer == "mac":
        return Refusal(
            "--steer mac passes frames to the host out of the guest's memory, which the guest could read and change",
            "dedicate a queue to the guest and leave --steer away: a virtual function or subfunction of its own, or "
            f"'ethtool -L {name} combined 2', 'ethtool -X {name} equal 1' and "
            f"'ethtool -N {name} flow-type ether dst MAC action 1' for --queue 1",
        )
    return None
