"""`mpassthru doctor`: what this machine allows, and why not more."""

from __future__ import annotations

from typing import Annotated

import msgspec
import rich
import typer

from mpassthru import doctor
from mpassthru.cli.sizes import parse_size


def doctor_command(
    interface: Annotated[str | None, typer.Argument(metavar="[IFACE]", help="Host interface.")] = None,
    *,
    guest_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory of the guest whose cost is shown, such as 4G.")
    ] = "4G",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Show what this machine, this process and IFACE allow, what a guest costs, and what to do about the rest.

    Changes nothing. Exit status 1 if a guest cannot be attached.
    """
    report = doctor.diagnose(interface, parse_size(guest_size))
    if as_json:
        typer.echo(msgspec.json.encode(report).decode())
    else:
        rich.print(doctor.render(report))
    if report.failed:
        raise typer.Exit(1)
