"""`mpassthru demo`: the whole thing on this machine, without touching its network."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpassthru.demo import DemoReport, run_builtin, run_qemu
from mpassthru.errors import RefusedError
from mpassthru.live_view import JsonView, LineView, TerminalView, View, by_reason, share

INTERVAL_TERMINAL_S = 0.25
INTERVAL_LINES_S = 1.0
EXIT_INTERRUPTED = 130


def demo_command(
    *,
    guest: Annotated[
        Literal["builtin", "qemu"], typer.Option(help="A driver in this process, or a Linux kernel in QEMU.")
    ] = "builtin",
    seconds: Annotated[float, typer.Option(metavar="N", min=0.1, help="How long traffic flows.")] = 5.0,
    kernel: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For --guest qemu: where the guest's kernel is unpacked.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    report_path: Annotated[
        Path | None, typer.Option("--report", metavar="PATH", help="Also write the report to this file.")
    ] = None,
) -> None:
    """Show a guest exchange real frames with a host interface, in a network namespace made for it, and check them.

    Exit status 0 only if every check passed. Nothing is left behind. Needs root.
    """
    view, interval_s = _view(as_json)
    run = (
        run_builtin(view, seconds=seconds, interval_s=interval_s)
        if guest == "builtin"
        else run_qemu(view, seconds=seconds, interval_s=interval_s, kernel_root=kernel)
    )
    try:
        report = asyncio.run(_until_signalled(run))
    except TimeoutError as error:
        raise RefusedError(f"the demo got stuck: {error}") from error
    except (asyncio.CancelledError, KeyboardInterrupt):
        typer.echo("mpassthru: interrupted; everything was given back", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        view.close()
    if report_path is not None:
        report_path.parent.mkdir(parents=True, exist_ok=True)
        report_path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    if as_json:
        typer.echo(msgspec.json.encode(report).decode())
    else:
        _print_report(report)
    if not report.ok:
        raise typer.Exit(1)


async def _until_signalled(run: Coroutine[Any, Any, DemoReport]) -> DemoReport:
    """Run; SIGTERM and SIGINT cancel it, so that everything is given back."""
    task = asyncio.ensure_future(run)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    return await task


def _view(as_json: bool) -> tuple[View, float]:
    if as_json:
        return JsonView(sys.stdout, sys.stderr, each_interval=False), INTERVAL_LINES_S
    if sys.stdout.isatty():
        return TerminalView(Console()), INTERVAL_TERMINAL_S
    return LineView(sys.stdout), INTERVAL_LINES_S


def _print_report(report: DemoReport) -> None:
    console = Console()
    title = Text(f"demo: {report.guest} guest, mode {report.mode}, XDP {report.xdp_mode}; rx is towards the guest")
    figures = Table(title=title, title_justify="left")
    for heading in ("", "frames", "bytes", "direct", "bounced", "dropped", "copied"):
        figures.add_column(heading, justify="right" if heading else "left")
    for name, direction in (("rx", report.rx), ("tx", report.tx)):
        figures.add_row(
            name,
            f"{direction.frames:,}",
            f"{direction.bytes:,}",
            share(direction.direct, direction.frames),
            by_reason(direction.bounced),
            by_reason(direction.dropped),
            f"{direction.copied_bytes:,}",
        )
    console.print(figures)
    for check in report.checks:
        mark = Text("ok    ", style="green") if check.ok else Text("FAILED", style="bold red")
        console.print(mark, Text(f"{check.name}: {check.found}"), soft_wrap=True)
    verdict = Text("PASSED", style="bold green") if report.ok else Text("FAILED", style="bold red")
    console.print(verdict, Text(f"in {report.seconds:.1f} s"))
