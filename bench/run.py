"""A whole run: rounds of back-ends, each started anew, each under every load."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench.backends import Backend, limit, port, testpmd
from bench.cpu import peak_memory_bytes
from bench.load import Plan
from bench.machine import machine
from bench.measure import measure
from bench.placement import Placement
from bench.results import LIMIT, Peer, Results, Sample, rows_of, spread
from bench.wire import Wire
from mpassthru.errors import MpassthruError
from mpassthru.testing.netns import Namespace, veth_namespace

Start = Callable[[Namespace, Path], AbstractAsyncContextManager[Backend]]
NEEDED: Final = (LIMIT, "mpassthru copy", "mpassthru packet")
"""Without these a run has failed; any other back-end may be missing."""


@dataclass
class _Contender:
    """A back-end and what became of it."""

    name: str
    what: str
    start: Start
    missing: str | None = None
    start_s: list[float] = field(default_factory=list)
    peak_bytes: list[float] = field(default_factory=list)

    def peer(self) -> Peer:
        return Peer(
            name=self.name,
            what=self.what,
            missing=self.missing,
            start_s=spread(self.start_s),
            peak_memory_bytes=spread(self.peak_bytes),
        )


def contenders(placement: Placement, limit_program: Path) -> list[_Contender]:
    """All that is compared, the limit first."""
    return [
        _Contender(
            LIMIT,
            "the same AF_XDP socket in copy mode without a guest: rx-drop, tx-only (bench/limit)",
            lambda namespace, _: limit(namespace, placement, program=limit_program),
        ),
        _Contender(
            "mpassthru copy",
            "mpassthru attach --mode copy",
            lambda namespace, folder: port(namespace, folder, placement, mode="copy"),
        ),
        _Contender(
            "mpassthru packet",
            "mpassthru attach --mode packet: the raw-socket path, AF_PACKET both ways",
            lambda namespace, folder: port(namespace, folder, placement, mode="packet"),
        ),
        _Contender(
            "dpdk",
            "dpdk-testpmd, io forwarding between net_af_xdp and net_vhost",
            lambda namespace, folder: testpmd(namespace, folder, placement),
        ),
    ]


async def run(
    plan: Plan, *, limit_program: Path, command: str, say: Callable[[str], None], only: Collection[str] | None = None
) -> Results:
    """Measure everything in the plan.

    Args:
        plan: What to measure.
        limit_program: That of bench/limit.
        command: For the report.
        say: Told how far it is.
        only: Names of back-ends; None for all.

    Raises:
        MpassthruError: the namespace or the wire cannot be had.
    """
    started_s = time.monotonic()
    placement = Placement()
    described = machine(placement)
    compared = [it for it in contenders(placement, limit_program) if only is None or it.name in only]
    samples: list[Sample] = []
    for round_ in range(1, plan.rounds + 1):
        for contender in compared:
            if contender.missing is None:
                say(f"round {round_} of {plan.rounds}: {contender.name}")
                try:
                    await _round(contender, plan, placement, round_, samples)
                except (MpassthruError, OSError, TimeoutError) as error:
                    contender.missing = f"round {round_}: {error}"
                    say(f"{contender.name} is missing: {error}")
    taken = Counter(sample.peer for sample in samples)
    return Results(
        target=plan.name,
        ok=all(taken[name] == plan.rounds * len(plan.loads) for name in NEEDED if only is None or name in only),
        seconds=round(time.monotonic() - started_s, 1),
        command=command,
        machine=described,
        plan=plan,
        peers=tuple(contender.peer() for contender in compared),
        rows=rows_of(tuple(samples)),
        samples=tuple(samples),
    )


async def _round(contender: _Contender, plan: Plan, placement: Placement, round_: int, samples: list[Sample]) -> None:
    """One back-end under every load; samples that were taken before an error count."""
    with veth_namespace() as namespace, tempfile.TemporaryDirectory(prefix="mpassthru-bench-") as folder:
        # What has no XDP program receives as fast as veth can only so.
        namespace.run("ethtool", "-K", namespace.ifname, "gro", "on")
        async with contender.start(namespace, Path(folder)) as backend:
            with contextlib.closing(Wire(namespace, placement)) as wire:
                contender.start_s.append(backend.start_s)
                for load in plan.loads:
                    samples.append(await measure(plan, load, backend, wire, peer=contender.name, round_=round_))
                contender.peak_bytes.append(peak_memory_bytes(backend.pid))
