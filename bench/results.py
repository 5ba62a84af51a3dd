"""What was measured, and the figures made of it. Plain data: bench*.json is `Results`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from bench.load import Load, Plan

LIMIT: Final = "limit"


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One load on one back-end, once."""

    peer: str
    round: int
    load: Load
    seconds: float
    frames: int
    """That reached their end (the guest, or the wire) in these seconds."""
    backend_user_s: float
    backend_system_s: float
    """User and system time of the back-end's process, by the kernel's ticks."""
    backend_s: float
    """Its CPU time, by the scheduler's clock."""
    machine_s: float
    """CPU time of everything on the machine."""
    offered: int
    """Frames that were sent, before and after these seconds too."""
    delivered: int
    """How many of those reached their end."""
    lost: dict[str, int]
    """Where the others went, as far as a counter knows."""

    def figure(self, name: str) -> float | None:
        """One of `FIGURES`; None if there is none."""
        return FIGURES[name](self)


def _per_frame_ns(seconds: float, sample: Sample) -> float | None:
    return 1e9 * seconds / sample.frames if sample.frames else None


def _share(sample: Sample, ticks_s: float) -> float:
    """The part of the scheduler's sum that the ticks give to user or system time."""
    ticks = sample.backend_user_s + sample.backend_system_s
    return sample.backend_s * ticks_s / ticks if ticks else 0.0


FIGURES: Final[dict[str, Callable[[Sample], float | None]]] = {
    "mframes_per_s": lambda sample: sample.frames / sample.seconds / 1e6,
    "gbit_per_s": lambda sample: 8e-9 * sample.load.frame_bytes * sample.frames / sample.seconds,
    "backend_ns": lambda sample: _per_frame_ns(sample.backend_s, sample),
    "backend_user_ns": lambda sample: _per_frame_ns(_share(sample, sample.backend_user_s), sample),
    "backend_system_ns": lambda sample: _per_frame_ns(_share(sample, sample.backend_system_s), sample),
    "machine_ns": lambda sample: _per_frame_ns(sample.machine_s, sample),
    "lost_share": lambda sample: max(0.0, 1 - sample.delivered / sample.offered) if sample.offered else None,
}
"""Made of a sample. CPU times are nanoseconds for each frame that was delivered; bytes are without FCS."""


class Spread(msgspec.Struct, frozen=True):
    """A figure over the rounds."""

    min: float
    median: float
    max: float


def spread(values: Iterable[float | None]) -> Spread | None:
    """The spread of the values that there are; None if there are none."""
    known = [value for value in values if value is not None]
    return Spread(min(known), statistics.median(known), max(known)) if known else None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One load on one back-end, over all rounds."""

    peer: str
    load: Load
    figures: dict[str, Spread | None]
    of_limit: dict[str, Spread | None]
    """The same figures divided by the limit's of the same round; above 1 is more, be that good or bad."""
    lost: dict[str, int]
    """Frames lost in all rounds, by reason."""


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """A back-end of the comparison."""

    name: str
    what: str
    missing: str | None = None
    """Why it is not in the rows, or not in all of them."""
    start_s: Spread | None = None
    """From the start of its process until it could carry frames, its guest's connection included."""
    peak_memory_bytes: Spread | None = None
    """Resident, the guest's memory of 64 MiB included where it is mapped."""


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """A run."""

    target: str
    ok: bool
    """The limit and the modes of a port were measured under every load."""
    seconds: float
    command: str
    machine: dict[str, str]
    plan: Plan
    peers: tuple[Peer, ...]
    rows: tuple[Row, ...]
    samples: tuple[Sample, ...]


def rows_of(samples: tuple[Sample, ...]) -> tuple[Row, ...]:
    """The rows, in the order in which their first samples were taken, load by load."""
    limits = {(sample.load, sample.round): sample for sample in samples if sample.peer == LIMIT}
    loads = dict.fromkeys(sample.load for sample in samples)
    peers = dict.fromkeys(sample.peer for sample in samples)
    return tuple(
        _row(peer, load, mine, limits)
        for load in loads
        for peer in peers
        if (mine := [sample for sample in samples if (sample.peer, sample.load) == (peer, load)])
    )


def _row(peer: str, load: Load, samples: list[Sample], limits: dict[tuple[Load, int], Sample]) -> Row:
    lost: dict[str, int] = {}
    for sample in samples:
        for reason, count in sample.lost.items():
            lost[reason] = lost.get(reason, 0) + count
    return Row(
        peer=peer,
        load=load,
        figures={name: spread(sample.figure(name) for sample in samples) for name in FIGURES},
        of_limit={
            name: spread(_ratio(sample, limits.get((load, sample.round)), name) for sample in samples)
            for name in FIGURES
            if name != "lost_share"
        },
        lost=lost,
    )


def _ratio(sample: Sample, limit: Sample | None, name: str) -> float | None:
    mine, limits = sample.figure(name), limit.figure(name) if limit else None
    return mine / limits if mine is not None and limits else None
