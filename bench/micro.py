"""`python -m bench.micro`: what the pump's loop costs for a frame, without kernel and driver.

Instructions are counted by callgrind: the same in each run, whatever else the machine does. Times are criterion's.
Both are of `bench/microbench`, in Rust: the pump over a model of the kernel, of whose work nothing counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from bench.cargo import ROOT, build, target_folder
from bench.machine import toolchain
from mpassthru.errors import MpassthruError

REPORT: Final = ROOT / "build/reports/microbench.json"
_PACKAGE: Final = "mpassthru-microbench"
_COUNTED: Final = "*::counted"
_END_OF_SCENE: Final = "*::counted_to_here"


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """One way, path, frame size and burst."""

    way: str
    path: str
    frame_bytes: int
    burst: int
    """Frames of each round of the pump's loop."""
    instructions: float
    """Of the loop in user space, for each frame."""
    ns: float | None = None
    """Time of the loop for each frame, wake-ups of the model kernel included; the median."""
    ns_range: tuple[float, float] | None = None
    """Its 95 % confidence interval."""

    @property
    def name(self) -> str:
        """As the Rust side has it."""
        return f"{self.way} {self.path}, {self.frame_bytes} bytes, burst {self.burst}"


def count_instructions() -> list[Scene]:
    """Count in every scene.

    Raises:
        MpassthruError: valgrind is missing, or found nothing to count.
        subprocess.CalledProcessError: the program does not build or fails.
    """
    program = build(_PACKAGE)
    with tempfile.TemporaryDirectory(prefix="mpassthru-callgrind-") as folder:
        out = Path(folder) / "out"
        count = ("--tool=callgrind", f"--callgrind-out-file={out}", f"--toggle-collect={_COUNTED}")
        command = ("valgrind", *count, f"--dump-after={_END_OF_SCENE}", str(program))
        try:
            ran = subprocess.run(command, capture_output=True, text=True, check=True)
        except FileNotFoundError:
            raise MpassthruError("cannot count instructions: valgrind is not installed; run make setup") from None
        # Valgrind's dumps are numbered from 1, in the order of the scenes.
        return [
            _scene(json.loads(line), out.with_name(f"out.{n}")) for n, line in enumerate(ran.stdout.splitlines(), 1)
        ]


def _scene(told: dict[str, Any], dump: Path) -> Scene:
    total = int(dump.read_text().partition("\ntotals: ")[2].split()[0])
    if not total:
        raise MpassthruError(f"callgrind counted nothing in {told}: were the program's symbols stripped?")
    frames = told.pop("frames")
    return Scene(**told, instructions=round(total / frames, 1))


def measure_time(scenes: list[Scene]) -> Iterator[Scene]:
    """Add times, criterion's estimates.

    Raises:
        subprocess.CalledProcessError: the program does not build or fails.
    """
    command = ("cargo", "bench", "--quiet", "--locked", "-p", _PACKAGE, "--features", "time", "--bench", "time")
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    medians: dict[str, Any] = {}
    for described in (target_folder() / "criterion").glob("*/*/new/benchmark.json"):
        name = json.loads(described.read_text())["function_id"]
        medians[name] = json.loads(described.with_name("estimates.json").read_text())["median"]
    for scene in scenes:
        median = medians[scene.name]
        interval = median["confidence_interval"]
        low, high = (round(interval[f"{end}_bound"] / scene.burst, 1) for end in ("lower", "upper"))
        yield msgspec.structs.replace(scene, ns=round(median["point_estimate"] / scene.burst, 1), ns_range=(low, high))


def table(scenes: list[Scene]) -> str:
    """As Markdown: a row for each way, path and size, a column for each burst."""
    bursts = sorted({scene.burst for scene in scenes})
    lines = [f"| for each frame | {' | '.join(f'burst {burst}' for burst in bursts)} |"]
    lines.append("|---|" + "---|" * len(bursts))
    for place in dict.fromkeys((scene.way, scene.path, scene.frame_bytes) for scene in scenes):
        row = {scene.burst: scene for scene in scenes if (scene.way, scene.path, scene.frame_bytes) == place}
        cells = (_cell(row.get(burst)) for burst in bursts)
        lines.append(f"| {place[0]} {place[1]}, {place[2]} bytes | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(scene: Scene | None) -> str:
    if scene is None:
        return ""
    return f"{scene.instructions:.0f} instructions" + (f", {scene.ns:.0f} ns" if scene.ns is not None else "")


def main() -> int:
    """Measure, print, and write the report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.micro", description=__doc__)
    parser.add_argument("--no-time", action="store_true", help="instructions only: half a minute instead of two")
    arguments = parser.parse_args()
    try:
        scenes = count_instructions()
    except MpassthruError as error:
        print(f"bench.micro: {error}", file=sys.stderr)
        return 1
    if not arguments.no_time:
        scenes = list(measure_time(scenes))
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    report = {"target": "microbench", "ok": True, "machine": toolchain(), "scenes": msgspec.to_builtins(scenes)}
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    print(table(scenes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
