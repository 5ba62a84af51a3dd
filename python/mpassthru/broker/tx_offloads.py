"""Whether a port offers tx offloads: its guest then leaves checksums and segmentation to us (docs/offloads.md).

Headers are made by us and payload stays in the guest's memory, so that a frame takes two descriptors at least. Where it
has to be one, each frame would be copied, and a guest that makes its own checksums sends it in place: there they are
offered only if asked for.
"""

from __future__ import annotations

from typing import Literal

from mpassthru.broker.mode import Say
from mpassthru.control import SocketMode
from mpassthru.errors import RefusedError
from mpassthru.netdev import has_multi_buffer
from mpassthru.rules import ZeroCopyRules

TxOffloads = Literal["auto", "on", "off"]


def offers_tx_offloads(choice: TxOffloads, mode: SocketMode, rules: ZeroCopyRules | None, view: Say) -> bool:
    """Whether to offer them. `auto` says why not, where it does not.

    Args:
        choice: What was asked for.
        mode: Of the port's sockets.
        rules: Of zero-copy mode, if that is the mode.
        view: Told about it.

    Raises:
        RefusedError: they were asked for in mode `packet`.
    """
    if mode == "packet":
        if choice == "on":
            raise RefusedError("mode packet has no tx offloads: leave --tx-offloads away, or use --mode copy")
        return False
    if choice != "auto":
        return choice == "on"
    reason = _in_one_piece(rules)
    if reason is not None:
        view.say(f"tx offloads: none, {reason}, so that each frame would be copied once; --tx-offloads on offers them")
    return reason is None


def _in_one_piece(rules: ZeroCopyRules | None) -> str | None:
    """Why no frame can be sent in several pieces; None if it can."""
    if rules is None:
        return None if has_multi_buffer() else "Linux before 6.6 sends no frame in several pieces"
    if not rules.direct:
        return "with --bounce-only no frame is sent in place"
    return None if rules.tx_pieces_max > 1 else "the driver's zero-copy mode sends no frame in several pieces"
