"""The socket by which a running port is told what to do: `mpassthru bind`, `unbind` and `status`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from typing import Final

from mpassthru.broker.keeper import Keeper
from mpassthru.broker.port import Port
from mpassthru.control import ControlError
from mpassthru.errors import MpassthruError, attempting, host_error
from mpassthru.locked_memory import locked_accounts
from mpassthru.port_commands import (
    Answer,
    Bind,
    Command,
    Done,
    StatusWanted,
    Unbind,
    own_path,
    refusal,
    remove_abandoned,
    server_channel,
)

ACCEPT_PAUSE_S: Final = 1.0
BACKLOG: Final = 8
MODE: Final = 0o600
"""To connect is to write (unix(7)): who may, may move the guest."""


class CommandSocket:
    """Listens for commands to one port.

    Args:
        directory: Where the sockets of all ports are.
        port: Asked how it is.
        keeper: Told what to do.
        frontend_path: What the port is known by; None if its front-end's socket was passed in.

    Raises:
        HostError: there can be no socket.
    """

    def __init__(self, directory: Path, port: Port, keeper: Keeper, frontend_path: Path | None) -> None:
        self._port = port
        self._keeper = keeper
        self._frontend_path = frontend_path
        self._path = own_path(directory)
        with attempting(f"listen on {self._path}"):
            directory.mkdir(mode=0o755, exist_ok=True)
        with locked_accounts(directory), attempting(f"listen on {self._path}"):
            remove_abandoned(directory)
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                # The kernel makes the path with the mode that the socket itself has.
                os.fchmod(self._sock.fileno(), MODE)
                self._sock.bind(str(self._path))
                self._sock.listen(BACKLOG)
            except BaseException:
                self.close()
                raise
        self._sock.setblocking(False)

    async def serve(self) -> None:
        """Carry out commands until cancelled, one after the other or beside each other."""
        loop, failed = asyncio.get_running_loop(), False
        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    connection, _ = await loop.sock_accept(self._sock)
                except OSError as error:
                    # A port without commands is better than none.
                    if not failed:
                        self._port.say(str(host_error(f"accept a command on {self._path}", error)))
                    failed = True
                    await asyncio.sleep(ACCEPT_PAUSE_S)
                    continue
                failed = False
                tasks.create_task(self._answer(connection))

    def close(self) -> None:
        """Listen no more, and remove the path.

        Raises:
            HostError: the path cannot be removed; the next port to start removes it.
        """
        self._sock.close()
        with attempting(f"remove {self._path}"):
            self._path.unlink(missing_ok=True)

    async def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(ControlError):  # whoever asked has gone, or talks nonsense
            channel = server_channel(connection)
            received = await channel.receive()
            if received is not None:
                channel.send(await self._carry_out(received[0]))

    async def _carry_out(self, command: Command) -> Answer:
        try:
            match command:
                case Bind(interface=interface, queue=queue):
                    await self._keeper.bind(interface, queue)
                case Unbind():
                    await self._keeper.unbind()
                case StatusWanted():
                    pass
        except (MpassthruError, OSError) as error:
            return refusal(error)
        await self._port.refresh()
        path = str(self._frontend_path.absolute()) if self._frontend_path else None
        return Done(pid=os.getpid(), socket_path=path, report=self._port.status.report())
