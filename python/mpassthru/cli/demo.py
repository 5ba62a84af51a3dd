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
from rich.text import Text

from mpassthru import event_loop
from mpassthru.demo import DemoReport, run_builtin, run_qemu
from mpassthru.errors import MpassthruError, RefusedError
from mpassthru.live_view import TABLE_WIDTH, JsonView, LineView, TerminalView, View, total_lines
from mpassthru.stop_signals import on_stop_signal

INTERVAL_TERMINAL_S = 0.25
INTERVAL_LINES_S = 1.0
EXIT_SIGNALLED = 128
"""Plus the signal's number, as shells count."""
LOST_TO_TCP = (
    "no_buffer: TCP sent faster than the guest emptied its ring; it noticed, slowed down and sent those frames again"
)


class _Interrupted(Exception):  # noqa: N818 - a wish, not an error
    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


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
    """Show it at work on this machine.

    A guest exchanges real frames with a host interface, in a network namespace made for it; each frame is checked.
    Exit status 0 only if every check passed. Nothing is left behind. Needs root.
    """
    if report_path is not None and not report_path.parent.is_dir():
        raise RefusedError(f"cannot write the report to {report_path}: there is no {report_path.parent}; make it first")
    view, interval_s = _view(as_json)
    run = (
        run_builtin(view, seconds=seconds, interval_s=interval_s)
        if guest == "builtin"
        else run_qemu(view, seconds=seconds, interval_s=interval_s, kernel_root=kernel)
    )
    try:
        report = event_loop.run(_until_signalled(run, view))
    except TimeoutError as error:
        raise RefusedError(f"the demo got stuck: {error}") from error
    except _Interrupted as interrupted:
        view.close()
        typer.echo(f"mpassthru: interrupted by {interrupted}; everything was given back", err=True)
        raise typer.Exit(EXIT_SIGNALLED + interrupted.number) from None
    finally:
        view.close()
    if report_path is not None:
        report_path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    if as_json:
        typer.echo(msgspec.json.encode(report).decode())
    else:
        _print_report(report)
    if not report.ok:
        raise typer.Exit(1)


async def _until_signalled(run: Coroutine[Any, Any, DemoReport], view: View) -> DemoReport:
    """Run; the first stop signal cancels it, and what follows cannot keep it from giving everything back.

    Raises:
        _Interrupted: a signal came; everything was given back.
    """
    task = asyncio.ensure_future(run)
    received: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        if received:
            view.say("interrupted already; giving everything back takes a moment")
        else:
            task.cancel()
        received.append(number)

    with on_stop_signal(stop):
        try:
            return await task
        except (asyncio.CancelledError, MpassthruError, OSError):
            # Ctrl-C reaches the port and QEMU too, and whose end is seen first is a matter of luck.
            if received:
                raise _Interrupted(received[0]) from None
            raise


def _view(as_json: bool) -> tuple[View, float]:
    if as_json:
        return JsonView(sys.stdout, sys.stderr, each_interval=False), INTERVAL_LINES_S
    if sys.stdout.isatty():
        return TerminalView(Console()), INTERVAL_TERMINAL_S
    return LineView(sys.stdout), INTERVAL_LINES_S


def _print_report(report: DemoReport) -> None:
    console = Console()
    lines = [
        f"demo: {report.guest} guest, {report.mode} mode, {report.xdp_mode} XDP; rx is towards the guest",
        *total_lines(report, console.width if console.is_terminal else TABLE_WIDTH),
    ]
    if report.guest == "qemu" and report.rx.dropped.get("no_buffer"):
        lines.append(f"({LOST_TO_TCP})")
    for line in lines:
        console.print(Text(line), soft_wrap=not console.is_terminal)
    for check in report.checks:
        mark = Text("ok    ", style="green") if check.ok else Text("FAILED", style="bold red")
        console.print(mark, Text(f"{check.name}: {check.found}"), soft_wrap=True)
    verdict = Text("PASSED", style="bold green") if report.ok else Text("FAILED", style="bold red")
    console.print(verdict, Text(f"in {report.seconds:.1f} s"))
