"""`mpassthru doctor`: what this machine allows, and why not more."""

from __future__ import annotations

from typing import Annotated

import msgspec
import rich
import typer

from mpassthru import doctor
from mpassthru.cli.locked_memory import LockedMemoryAll, RuntimeDir
from mpassthru.cli.sizes import parse_size
from mpassthru.locked_memory import RUNTIME_DIR


def doctor_command(
    interface: Annotated[str | None, typer.Argument(metavar="[IFACE]", help="Host interface.")] = None,
    *,
    guest_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory of the guest whose cost is shown, such as 4G.")
    ] = "4G",
    queues: Annotated[int, typer.Option(metavar="N", min=1, max=128, help="Queue pairs of that guest.")] = 1,
    locked_memory_all: LockedMemoryAll = None,
    runtime_dir: RuntimeDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Show what this machine and IFACE allow.

    What a guest costs too, and what to do about what is not allowed. Changes nothing.
    Exit status 1 if a guest cannot be attached.
    """
    report = doctor.diagnose(
        interface,
        parse_size(guest_size),
        queues=queues,
        host_max_bytes=parse_size(locked_memory_all) if locked_memory_all is not None else None,
        runtime_dir=runtime_dir or RUNTIME_DIR,
    )
    if as_json:
        typer.echo(msgspec.json.encode(report).decode())
    else:
        rich.print(doctor.render(report))
    if report.failed:
        raise typer.Exit(1)
