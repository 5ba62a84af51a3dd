"""What a running port can be told, and how: one command and its answer over a Unix socket of the port's own.

The socket is in the directory where ports keep their accounts (`mpassthru.locked_memory`), for the user of the broker
alone. A port is found by asking all that there are: one whose broker was killed refuses the connection, and its socket
is removed. As in `mpassthru.control`, a message is one MessagePack object in one SOCK_SEQPACKET record.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mpassthru.broker.status import AttachReport
from mpassthru.control import ControlChannel, ControlError, Message
from mpassthru.errors import HostError, MpassthruError, RefusedError, errno_name
from mpassthru.locked_memory import LOCK, locked_accounts

PREFIX: Final = "control-"
STATUS_TIMEOUT_S: Final = 10.0
BIND_TIMEOUT_S: Final = 300.0
"""A guest of 64 GiB may have to be pinned anew."""


class StatusWanted(Message, frozen=True):
    """Asks how the port is."""


class Bind(Message, frozen=True):
    """Asks to have the port on an interface, whatever it has now."""

    interface: str
    queue: int | None = None
    """First hardware queue; None for the one that the port was started with, or bound to last."""


class Unbind(Message, frozen=True):
    """Asks to give the interface back."""


Command = StatusWanted | Bind | Unbind


class Done(Message, frozen=True):
    """Answers any command: it was carried out, and this is how the port is now."""

    pid: int
    """Of the broker."""
    socket_path: str | None
    """Where front-ends come from; None for a socket that was passed in."""
    report: AttachReport


class Refused(Message, frozen=True):
    """Answers any command: nothing has changed."""

    errno: int
    """0 if no system call failed."""
    error: str


Answer = Done | Refused


def server_channel(sock: socket.socket) -> ControlChannel[Answer, Command]:
    """The port's end of a connection."""
    return ControlChannel(sock, Command)


async def ask(path: Path, command: Command) -> Done:
    """Give a port a command.

    Args:
        path: Its socket.
        command: What to do.

    Raises:
        RefusedError: it cannot be carried out.
        HostError: the same, because of a system call; or the port does not answer.
    """
    with _connect(path) as sock:
        channel: ControlChannel[Command, Answer] = ControlChannel(sock, Answer)
        timeout_s = STATUS_TIMEOUT_S if isinstance(command, StatusWanted) else BIND_TIMEOUT_S
        try:
            async with asyncio.timeout(timeout_s):
                channel.send(command)
                received = await channel.receive()
        except TimeoutError:
            raise RefusedError(f"the port at {path} does not answer within {timeout_s:g} s") from None
    if received is None:
        raise ControlError(f"the port at {path} has ended")
    match received[0]:
        case Done() as done:
            return done
        case Refused(errno=0, error=error):
            raise RefusedError(error)
        case Refused(errno=number, error=error):
            raise HostError(number, error)


async def find_ports(directory: Path) -> list[tuple[Path, Done]]:
    """The ports of this host, and how they are. One that ends meanwhile is left out.

    Raises:
        HostError: the directory cannot be read.
    """
    if not (directory / LOCK).exists():
        return []
    with locked_accounts(directory):
        paths = list(_live_sockets(directory))
    found: list[tuple[Path, Done]] = []
    for path in paths:
        with contextlib.suppress(ControlError):
            found.append((path, await ask(path, StatusWanted())))
    return found


async def find_port(directory: Path, name: str) -> tuple[Path, Done]:
    """The port with this name: its front-end's socket, its interface, or the process id of its broker.

    Raises:
        RefusedError: there is none, or more than one.
        HostError: the directory cannot be read.
    """
    ports = await find_ports(directory)
    named = [(path, done) for path, done in ports if _is_named(done, name)]
    if len(named) == 1:
        return named[0]
    known = ", ".join(f"{done.socket_path or done.pid} ({done.report.interface})" for _, done in named or ports)
    if not known:
        raise RefusedError(
            f"no port is known as {name}: none runs that keeps its records in {directory} (--runtime-dir)"
        )
    if named:
        raise RefusedError(f"{len(named)} ports are known as {name}: {known}; name one by its socket or process id")
    raise RefusedError(f"no running port is known as {name}; there are {known}")


def _is_named(port: Done, name: str) -> bool:
    if name in (str(port.pid), port.report.interface):
        return True
    return port.socket_path is not None and Path(port.socket_path) == Path(name).absolute()


def _live_sockets(directory: Path) -> Iterator[Path]:
    """Sockets of ports that live; those of others are removed. The directory is locked: no path is half made."""
    for path in sorted(directory.glob(f"{PREFIX}*")):
        try:
            _connect(path).close()
        except HostError:
            path.unlink(missing_ok=True)
        else:
            yield path


def remove_abandoned(directory: Path) -> None:
    """Remove the sockets of ports that were killed. The directory is locked."""
    for _ in _live_sockets(directory):
        pass


def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(str(path))
    except OSError as error:
        sock.close()
        raise HostError(
            error.errno or 0, f"cannot talk to the port at {path} ({errno_name(error.errno)}): has it ended?"
        ) from error
    return sock


def refusal(error: MpassthruError | OSError) -> Refused:
    """An error as an answer."""
    number = error.errno or 0 if isinstance(error, OSError) else 0
    return Refused(errno=number, error=str(error))


def own_path(directory: Path) -> Path:
    """A path for the socket of a port of this process."""
    return directory / f"{PREFIX}{os.getpid()}-{os.urandom(3).hex()}"
