"""Results as pictures, drawn by gnuplot: bars of the medians, with whiskers from the least to the greatest."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench.load import Direction
from bench.results import Results, Row

_FIGURES: Final = {
    "throughput": ("mframes_per_s", "Mframes/s"),
    "cpu": ("backend_ns", "CPU time of the back-end, ns/frame"),
}
_PANEL_WIDTH, _HEIGHT = 700, 520
_COLORS: Final = ("#808080", "#1b6ca8", "#d1495b", "#edae49", "#66a182", "#6a4c93")


def plot(results: Results, folder: Path) -> Iterator[Path]:
    """Draw one picture for each of throughput and CPU time, a panel for each direction, as fast as it goes.

    Args:
        results: A run.
        folder: Where the pictures go, named after the run.

    Yields:
        The pictures' paths; nothing without gnuplot.

    Raises:
        subprocess.CalledProcessError: gnuplot failed.
    """
    if shutil.which("gnuplot") is None:
        return
    rows = [row for row in results.rows if row.load.rate_frames_per_s is None]
    for name, (figure, label) in _FIGURES.items():
        path = folder / f"{results.target}-{name}.png"
        script = "\n".join(_script(rows, figure, label, results.machine, path))
        subprocess.run(("gnuplot", "-"), input=script, text=True, check=True)
        yield path


def _script(rows: list[Row], figure: str, label: str, machine: dict[str, str], path: Path) -> Iterator[str]:
    directions = list(dict.fromkeys(row.load.direction for row in rows))
    yield f"set terminal pngcairo size {_PANEL_WIDTH * len(directions)},{_HEIGHT} noenhanced font 'sans,11'"
    yield f"set output {_quoted(str(path))}"
    title = f"{machine['cpu']}; Linux {machine['kernel']}"
    yield f"set multiplot layout 1,{len(directions)} title {_quoted(title)}"
    yield "set style data histograms"
    yield "set style histogram errorbars gap 1 linewidth 1"
    yield "set style fill solid 0.85 noborder"
    yield "set yrange [0:*]"
    yield "set offsets graph 0, 0, 0.15, 0"
    yield "set errorbars linecolor black"
    yield "set grid ytics"
    yield "set key top left horizontal"
    yield "set xlabel 'frame size in bytes'"
    yield f"set ylabel {_quoted(label)}"
    for index, direction in enumerate(directions):
        yield from _panel([row for row in rows if row.load.direction == direction], index, direction, figure)


def _panel(rows: list[Row], index: int, direction: Direction, figure: str) -> Iterator[str]:
    peers = list(dict.fromkeys(row.peer for row in rows))
    sizes = list(dict.fromkeys(row.load.frame_bytes for row in rows))
    by_place = {(row.load.frame_bytes, row.peer): row.figures[figure] for row in rows}
    yield f"set title {_quoted(f'{direction}, as fast as it goes')}"
    yield f"$panel{index} << EOD"
    for size in sizes:
        spreads = (by_place.get((size, peer)) for peer in peers)
        words = (f"{it.median:g} {it.min:g} {it.max:g}" if it else "? ? ?" for it in spreads)
        yield f"{size} {' '.join(words)}"
    yield "EOD"
    bars = (
        f"$panel{index} using {3 * at + 2}:{3 * at + 3}:{3 * at + 4}:xtic(1) title {_quoted(peer)} "
        f"lc rgb '{_COLORS[at % len(_COLORS)]}'"
        for at, peer in enumerate(peers)
    )
    yield f"set datafile missing '?'\nplot {', '.join(bars)}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
