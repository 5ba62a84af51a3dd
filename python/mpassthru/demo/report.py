"""What a demo found: the port's figures, and checks that each passed or failed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from mpassthru.broker.status import AttachReport
from mpassthru.report import DirectionReport, PortReport

DIRECT_SHARE_MIN = 0.99
"""Of the frames each way, how many have to go without a copy in user space."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that had to be so."""

    name: str
    ok: bool
    found: str


class DemoReport(PortReport, frozen=True, kw_only=True):
    """A demo's result; the figures of the port have the same keys as everywhere."""

    target: str = "demo"
    ok: bool
    guest: Literal["builtin", "qemu"]
    seconds: float
    kernel: str
    xdp_mode: str
    checks: tuple[Check, ...]
    traffic: dict[str, Any]
    """What the guest and the wire counted."""


def port_checks(port: AttachReport) -> Iterator[Check]:
    """Check what the port itself counted."""
    for name, direction in (("rx", port.rx), ("tx", port.tx)):
        yield Check(name=f"{name}: frames moved", ok=direction.frames > 0, found=f"{direction.frames:,}")
        yield _direct_share(name, direction)
        yield _copied(name, direction)
    yield Check(name="port without errors", ok=not port.troubles, found="; ".join(port.troubles) or "none")


def _direct_share(name: str, direction: DirectionReport) -> Check:
    share = direction.direct / direction.frames if direction.frames else 0.0
    return Check(
        name=f"{name}: directly from or to guest memory",
        ok=share >= DIRECT_SHARE_MIN,
        found=f"{math.floor(10_000 * share) / 100:.2f} %",
    )


def _copied(name: str, direction: DirectionReport) -> Check:
    """Payload may be copied for frames that bounced, and for no other; of others, headers that we make."""
    bounced = sum(direction.bounced.values())
    return Check(
        name=f"{name}: bytes copied in user space",
        ok=direction.copied_bytes == direction.header_bytes or bounced > 0,
        found=f"{direction.copied_bytes:,} ({direction.header_bytes:,} of them headers; {bounced:,} frames bounced)",
    )
