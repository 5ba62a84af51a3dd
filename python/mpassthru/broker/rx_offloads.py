"""Whether a port offers rx offloads: its guest then takes frames of a flow merged (docs/offloads.md).

Merging moves the payload of all frames but the first, which would have stayed in place. So they are offered if asked
for, and by themselves only where each frame is copied anyway.
"""

from __future__ import annotations

from typing import Literal

from mpassthru.control import SocketMode
from mpassthru.errors import RefusedError
from mpassthru.rules import ZeroCopyRules

RxOffloads = Literal["auto", "on", "off"]


def offers_rx_offloads(choice: RxOffloads, mode: SocketMode, rules: ZeroCopyRules | None) -> bool:
    """Whether to offer them.

    Args:
        choice: What was asked for.
        mode: Of the port's sockets.
        rules: Of zero-copy mode, if that is the mode.

    Raises:
        RefusedError: they were asked for in mode `packet`.
    """
    if mode == "packet":
        if choice == "on":
            raise RefusedError("mode packet has no rx offloads: leave --rx-offloads away, or use --mode copy")
        return False
    if choice == "auto":
        return rules is not None and not rules.direct
    return choice == "on"
