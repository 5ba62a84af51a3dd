"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from bench.results import LIMIT, Results, Row, Spread

_HEADINGS = (
    "bytes | back-end | Mframes/s | Gbit/s | of limit | back-end ns/frame | user | system | of limit | "
    "machine ns/frame | lost"
)


def markdown(results: Results) -> str:
    """The whole report: the machine, the back-ends, and a table for each direction and rate."""
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Results) -> Iterator[str]:
    yield f"# {results.target}"
    yield ""
    yield f"`{results.command}`, {results.seconds:.0f} s, {results.plan.rounds} rounds of {results.plan.seconds:g} s."
    yield ""
    for name, value in results.machine.items():
        yield f"- {name}: {value}"
    yield ""
    yield "Each figure is the median of the rounds, with the least and the greatest. rx is towards the guest. Bytes"
    yield "are without FCS. CPU times are for each frame that was delivered. Ratios are made within each round."
    yield ""
    yield "| back-end | what | ready after | peak memory | missing |"
    yield "|---|---|---|---|---|"
    for peer in results.peers:
        memory = f"{peer.peak_memory_bytes.median / (1 << 20):.0f} MiB" if peer.peak_memory_bytes else ""
        start = f"{peer.start_s.median:.2f} s" if peer.start_s else ""
        yield f"| {peer.name} | {peer.what} | {start} | {memory} | {peer.missing or 'no'} |"
    loads = dict.fromkeys((row.load.direction, row.load.rate_frames_per_s) for row in results.rows)
    for direction, rate in loads:
        yield ""
        yield f"## {direction}, {f'{rate:,} frames/s offered' if rate else 'as fast as it goes'}"
        yield ""
        yield f"| {_HEADINGS} |"
        yield "|" + "---|" * (_HEADINGS.count("|") + 1)
        for row in results.rows:
            if (row.load.direction, row.load.rate_frames_per_s) == (direction, rate):
                yield _row(row)


def _row(row: Row) -> str:
    figures, ratios = row.figures, row.of_limit if row.peer != LIMIT else {}
    cells = (
        str(row.load.frame_bytes),
        row.peer,
        _cell(figures["mframes_per_s"], 3),
        _cell(figures["gbit_per_s"], 2),
        _cell(ratios.get("mframes_per_s"), 2),
        _cell(figures["backend_ns"], 0),
        _cell(figures["backend_user_ns"], 0),
        _cell(figures["backend_system_ns"], 0),
        _cell(ratios.get("backend_ns"), 2),
        _cell(figures["machine_ns"], 0),
        _lost(row),
    )
    return f"| {' | '.join(cells)} |"


def _cell(spread: Spread | None, digits: int) -> str:
    if spread is None:
        return ""
    return f"{spread.median:.{digits}f} ({spread.min:.{digits}f}-{spread.max:.{digits}f})"


def _lost(row: Row) -> str:
    share = row.figures["lost_share"]
    if share is None or not share.max:
        return "0"
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(row.lost.items(), key=lambda item: -item[1]))
    return f"{100 * share.median:.1f} % ({reasons or 'uncounted'})"
