"""What a run consists of: which traffic, for how long, how often."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

Direction = Literal["rx", "tx", "both"]

FRAME_SIZES: Final = (64, 256, 512, 1024, 1514)
"""Bytes of an Ethernet frame without FCS."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of traffic: a row of the report for each back-end."""

    direction: Direction
    frame_bytes: int
    rate_frames_per_s: int | None = None
    """Of each direction; None for as many as go."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured. Each round starts every back-end anew and applies every load to it."""

    name: str
    rounds: int
    seconds: float
    """That each load is measured for."""
    warm_up_s: float
    loads: tuple[Load, ...]


def quick_plan() -> Plan:
    """Under three minutes."""
    loads = [Load(direction=direction, frame_bytes=size) for size in FRAME_SIZES for direction in ("rx", "tx")]
    loads += [
        Load(direction=direction, frame_bytes=size, rate_frames_per_s=100_000)
        for size in (64, 1514)
        for direction in ("rx", "tx")
    ]
    return Plan(name="bench-quick", rounds=3, seconds=0.4, warm_up_s=0.1, loads=tuple(loads))


def full_plan() -> Plan:
    """About half an hour: every size both ways at once too, three fixed rates, and times that make CPU figures firm."""
    directions: tuple[Direction, ...] = ("rx", "tx", "both")
    loads = [
        Load(direction=direction, frame_bytes=size, rate_frames_per_s=rate)
        for rate in (None, 50_000, 100_000, 200_000)
        for size in FRAME_SIZES
        for direction in directions
    ]
    return Plan(name="bench", rounds=5, seconds=1.0, warm_up_s=0.2, loads=tuple(loads))
