"""`mpassthru bind`, `unbind` and `status`: commands to a port that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from mpassthru import event_loop
from mpassthru.broker.binding_state import BindingState
from mpassthru.cli.locked_memory import RuntimeDir
from mpassthru.live_view import reason_lines
from mpassthru.locked_memory import RUNTIME_DIR
from mpassthru.port_commands import Bind, Command, Done, Unbind, ask, find_port, find_ports

PortName = Annotated[
    str,
    typer.Argument(
        metavar="PORT", help="The port: the path of its front-end's socket, its interface, or its process id."
    ),
]


def bind_command(
    port: PortName,
    interface: Annotated[str, typer.Argument(metavar="IFACE", help="Host interface to go to.")],
    *,
    queue: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="First hardware receive queue to take; that of before if left out."),
    ] = None,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Move the guest of a running port to IFACE.

    IFACE is checked first; if it cannot be had, everything stays as it is. The guest's session and its virtqueues go
    on, frames are lost for a moment, and the guest's address is announced at the new place.
    """
    done = event_loop.run(_tell(runtime_dir, port, Bind(interface=interface, queue=queue)))
    typer.echo(f"bound to {done.report.interface}")


def unbind_command(port: PortName, *, runtime_dir: RuntimeDir = None) -> None:
    """Give the interface of a running port back.

    The guest goes on without: it receives nothing, and what it sends is dropped, until 'mpassthru bind'.
    """
    done = event_loop.run(_tell(runtime_dir, port, Unbind()))
    typer.echo(f"unbound from {done.report.interface}")


def status_command(
    port: Annotated[
        str | None, typer.Argument(metavar="[PORT]", help="One port only, by its socket, interface or process id.")
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each port, a line each.")] = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Show the ports that run on this host."""
    ports = event_loop.run(_find(runtime_dir, port))
    for done in ports:
        typer.echo(msgspec.json.encode(done).decode() if as_json else "\n".join(_lines(done)))
    if not ports and not as_json:
        typer.echo("no port runs")


async def _tell(runtime_dir: Path | None, name: str, command: Command) -> Done:
    path, _ = await find_port(runtime_dir or RUNTIME_DIR, name)
    return await ask(path, command)


async def _find(runtime_dir: Path | None, name: str | None) -> list[Done]:
    directory = runtime_dir or RUNTIME_DIR
    if name is not None:
        return [(await find_port(directory, name))[1]]
    return [done for _, done in await find_ports(directory)]


def _lines(done: Done) -> list[str]:
    report = done.report
    state = f"{report.interface} {report.binding.value}"
    match report.binding:
        case BindingState.BOUND:
            state += f", {report.mode} mode, {report.xdp_mode} XDP{'' if report.link else ', no carrier'}"
        case BindingState.WAITING:
            state += f" for {report.waiting_for.value if report.waiting_for else '?'}: {report.waiting_because}"
    frames = f"rx {report.rx.frames:,} frames, tx {report.tx.frames:,} frames"
    return [
        f"{state}; guest {report.guest}; {frames}",
        f"  pid {done.pid}, {done.socket_path or 'socket passed in'}",
        *(f"  {line}" for line in reason_lines(report)),
    ]
