"""A vhost-user back-end: one device, and the front-ends that connect to it one after the other.

Server: `serve` a listening socket. Client, or a socket inherited from a manager: `serve_connection`.
"""

from __future__ import annotations

import asyncio
import logging
import socket

from mpassthru.errors import HostError, MpassthruError, RefusedError, errno_name
from mpassthru.vhost_user.connection import Connection
from mpassthru.vhost_user.device import Device
from mpassthru.vhost_user.session import Counters, Session, StillInUseError

log = logging.getLogger(__name__)


class Backend:
    """One device behind one socket.

    Attributes:
        counters: Over all connections so far.
        session: The connection that is served now, or None.
    """

    def __init__(self, device: Device) -> None:
        self.counters = Counters()
        self.session: Session | None = None
        self._device = device

    async def serve(self, listener: socket.socket) -> None:
        """Accept one front-end at a time, for ever; the next may connect when the last is gone.

        A connection that fails is logged in one line, and the next is accepted. Ends by cancellation only, after the
        connection that is served has been left in order. The listener stays the caller's.

        Raises:
            HostError: no connection can be accepted.
            StillInUseError: the device could not be taken back from the last front-end.
        """
        listener.setblocking(False)
        while True:
            try:
                sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            except OSError as error:
                reason = f"cannot accept a front-end on {listener.getsockname()!r} ({errno_name(error.errno)})"
                raise HostError(error.errno or 0, reason) from error
            try:
                await self.serve_connection(sock)
            except StillInUseError:
                raise
            except MpassthruError as error:
                log.error("connection ended by %s: %s", type(error).__name__, error)  # noqa: TRY400

    async def serve_connection(self, sock: socket.socket) -> None:
        """Serve a front-end on a connected socket until it disconnects. The socket is owned from here on.

        Raises:
            ProtocolError: the front-end broke the protocol.
            RefusedError: another front-end is connected.
            MpassthruError: the device failed.
            StillInUseError: the device could not be taken back from the front-end, and may serve no other.
        """
        connection = Connection(sock)
        if self.session is not None:
            connection.close()
            raise RefusedError("a front-end is connected already; a back-end serves one at a time")
        self.counters.connections += 1
        self.session = Session(connection, self._device, self.counters)
        try:
            await self.session.run()
        finally:
            self.session = None
