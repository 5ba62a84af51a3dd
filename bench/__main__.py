"""`python -m bench`: measure, and write JSON, a Markdown table and plots to build/reports."""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
from pathlib import Path

import msgspec

from bench.cargo import ROOT, build
from bench.load import FRAME_SIZES, Plan, full_plan, quick_plan
from bench.plots import plot
from bench.results import Results
from bench.run import run
from bench.table import markdown
from mpassthru.errors import MpassthruError


def main() -> int:
    """Run; returns the exit status: 0 if the limit and a port were measured under every load."""
    arguments = _arguments()
    plan = _plan(arguments)
    if os.geteuid() != 0:
        print("bench: run as root: it makes network namespaces and loads BPF programs", file=sys.stderr)
        return 1
    command = shlex.join(("python", "-m", "bench", *sys.argv[1:]))
    try:
        results = asyncio.run(
            run(plan, limit_program=build("mpassthru-limit"), command=command, say=_say, only=arguments.only)
        )
    except MpassthruError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    _write(results, arguments.reports)
    print(markdown(results))
    return 0 if results.ok else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three minutes at most")
    parser.add_argument("--rounds", type=int, metavar="N", help="repeats of everything")
    parser.add_argument("--seconds", type=float, metavar="S", help="that each load is measured for")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="BYTES", choices=FRAME_SIZES, help="frame sizes")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="back-ends; the limit is what others are compared to")
    parser.add_argument("--reports", type=Path, metavar="DIR", default=ROOT / "build/reports", help="where to write")
    return parser.parse_args()


def _plan(arguments: argparse.Namespace) -> Plan:
    plan = quick_plan() if arguments.quick else full_plan()
    changes: dict[str, object] = {}
    if arguments.rounds is not None:
        changes["rounds"] = arguments.rounds
    if arguments.seconds is not None:
        changes["seconds"] = arguments.seconds
    if arguments.sizes is not None:
        changes["loads"] = tuple(load for load in plan.loads if load.frame_bytes in arguments.sizes)
    return msgspec.structs.replace(plan, **changes)


def _write(results: Results, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    encoded = msgspec.json.format(msgspec.json.encode(results), indent=2)
    (folder / f"{results.target}.json").write_bytes(encoded + b"\n")
    (folder / f"{results.target}.md").write_text(markdown(results))
    for path in plot(results, folder):
        _say(f"wrote {path}")


def _say(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
