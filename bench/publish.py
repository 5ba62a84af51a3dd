"""`python -m bench.publish [RUN]`: keep a run's results in bench/results, and print the short table that README shows.

RUN is a `bench*.json` that `python -m bench` has written; its picture of throughput and bench-idle.json come along if
they lie beside it.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from bench.cargo import ROOT
from bench.results import LIMIT, Results, Row

RESULTS: Final = ROOT / "bench/results"
_SIZES: Final = (64, 1514)


def short_table(results: Results) -> str:
    """Throughput and CPU time for each frame, as fast as it goes, of the shortest and the longest frames."""
    return "\n".join(_lines(results))


def _lines(results: Results) -> Iterator[str]:
    peers = list(dict.fromkeys(row.peer for row in results.rows))
    yield f"| | {' | '.join(peers)} |"
    yield "|---" * (1 + len(peers)) + "|"
    rows = {(row.load.direction, row.load.frame_bytes, row.peer): row for row in results.rows if _is_flood(row)}
    for direction in dict.fromkeys(direction for direction, *_ in rows):
        for size in _SIZES:
            cells = (_cell(rows.get((direction, size, peer))) for peer in peers)
            yield f"| {direction}, {size} bytes | {' | '.join(cells)} |"


def _is_flood(row: Row) -> bool:
    return row.load.rate_frames_per_s is None


def _cell(row: Row | None) -> str:
    if row is None or (rate := row.figures["mframes_per_s"]) is None:
        return "missing"
    share = row.of_limit["mframes_per_s"] if row.peer != LIMIT else None
    of_limit = f" ({100 * share.median:.0f} %)" if share else ""
    cpu = row.figures["backend_ns"]
    return f"{rate.median:.2f} M/s{of_limit}" + (f", {cpu.median:.0f} ns" if cpu else "")


def main() -> int:
    """Copy and print."""
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build/reports/bench-quick.json"
    results = msgspec.json.decode(run.read_bytes(), type=Results)
    RESULTS.mkdir(exist_ok=True)
    for path in (
        run,
        run.with_suffix(".md"),
        run.with_name(f"{run.stem}-throughput.png"),
        run.with_name("bench-idle.json"),
    ):
        if path.exists():
            shutil.copy(path, RESULTS)
    print(short_table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
