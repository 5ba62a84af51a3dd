"""The command line's parts put together."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from mpassthru.cli import attach, backend, demo, doctor, running_port

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Connect virtual machines to host interfaces, frames straight into the guest's memory.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mpassthru {version('mpassthru')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
    _print_capabilities: backend.PrintCapabilities = False,
) -> None:
    """Options of the command itself."""


app.command("attach")(attach.attach_command)
app.command("bind")(running_port.bind_command)
app.command("unbind")(running_port.unbind_command)
app.command("status")(running_port.status_command)
app.command("doctor")(doctor.doctor_command)
app.command("demo")(demo.demo_command)
app.command("backend-json")(backend.backend_json_command)
