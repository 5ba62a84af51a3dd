"""Where front-ends come from: a listening socket, a peer to connect to, or a socket that was passed in.

The broker makes the connection and hands it to the worker unread, so that a listening socket outlives its workers and
a worker needs no access to the file system. One front-end at a time; others wait in the listen queue.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mpassthru.broker.stale_socket import stale_removed
from mpassthru.errors import HostError, RefusedError, attempting, errno_name

CONNECT_RETRY_S = 0.25
"""Pause between two tries to reach a front-end that does not listen yet."""

_CONNECT_LATER = {errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN}


class Endpoint(Protocol):
    """A source of connected vhost-user sockets."""

    @property
    def single(self) -> bool:
        """Whether there is only ever one connection."""

    async def next_connection(self) -> socket.socket | None:
        """Wait for a front-end; None if there will never be another."""

    def somebody_waits(self) -> bool:
        """Whether a front-end has connected that nobody accepted yet."""

    def close(self) -> None:
        """Stop listening and remove the socket path, if it is ours."""


@dataclass(frozen=True, kw_only=True)
class SocketAccess:
    """Who may connect to a socket path: to connect is to write (unix(7))."""

    mode: int = 0o660
    uid: int = -1
    """Owner; -1 for the user of this process."""
    gid: int = -1


class ListeningEndpoint:
    """`--socket-path`: the front-end connects to us.

    Raises:
        RefusedError: the path is in use by a live process, or is not a socket.
        HostError: it cannot be bound, or not be given to its owner.
    """

    single = False

    def __init__(self, path: Path, access: SocketAccess | None = None) -> None:
        self._path = path
        self._sock = _bind(path, access or SocketAccess())
        self._identity = _identity(path)
        try:
            self._sock.listen(1)
        except OSError as error:
            self.close()
            raise _path_error("listen on", path, error) from error
        self._sock.setblocking(False)

    async def next_connection(self) -> socket.socket:
        """Accept a front-end.

        Raises:
            HostError: too many files are open.
        """
        with attempting(f"accept a front-end on {self._path}"):
            connection, _ = await asyncio.get_running_loop().sock_accept(self._sock)
        return connection

    def somebody_waits(self) -> bool:
        """Whether a front-end is in the listen queue."""
        return _is_readable(self._sock)

    def close(self) -> None:
        """Close the socket and remove its path, unless somebody has put another one there.

        Raises:
            HostError: the path cannot be removed; the next one to listen there takes it over.
        """
        try:
            # Before it is closed, while nobody may take the path over, nor its inode's number be given to another.
            if _identity(self._path) == self._identity:
                with attempting(f"remove {self._path}"):
                    self._path.unlink(missing_ok=True)
        finally:
            self._sock.close()


class ConnectingEndpoint:
    """`--connect`: the front-end listens, we connect, and again after each session.

    Args:
        path: Where it listens.
        say: Called with one line when nobody listens there, once for each time that we want to connect.
    """

    single = False

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path = path
        self._say = say

    async def next_connection(self) -> socket.socket:
        """Connect, trying again while nobody listens.

        Raises:
            HostError: the path can never be connected to, as things are.
        """
        said = False
        while True:
            with attempting(f"connect to {self._path}"):
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                # Not loop.sock_connect: EAGAIN from a Unix socket means a full listen queue, not a connect in progress.
                sock.connect(str(self._path))
            except OSError as error:
                sock.close()
                if error.errno not in _CONNECT_LATER:
                    raise _path_error("connect to", self._path, error) from error
                if not said:
                    self._say(f"nobody listens on {self._path} yet; trying again every {CONNECT_RETRY_S:g} s")
                    said = True
                await asyncio.sleep(CONNECT_RETRY_S)
            else:
                return sock

    def somebody_waits(self) -> bool:
        """Never: we connect to it."""
        return False

    def close(self) -> None:
        """Nothing to do: the path is the front-end's."""


class InheritedEndpoint:
    """`--fd`: a listening or a connected socket that was passed in.

    Raises:
        RefusedError: the fd is not a Unix stream socket.
    """

    def __init__(self, fd: int) -> None:
        self._sock: socket.socket | None = _adopt(fd)
        self.single = not self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)

    async def next_connection(self) -> socket.socket | None:
        """Accept a front-end, or give out the only connection once."""
        if self._sock is None:
            return None
        if self.single:
            connection, self._sock = self._sock, None
            return connection
        with attempting("accept a front-end on the socket that was passed in"):
            connection, _ = await asyncio.get_running_loop().sock_accept(self._sock)
        return connection

    def somebody_waits(self) -> bool:
        """Whether a front-end is in the listen queue."""
        return not self.single and self._sock is not None and _is_readable(self._sock)

    def close(self) -> None:
        """Close the socket if it was not given out."""
        if self._sock is not None:
            self._sock.close()


def _adopt(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise RefusedError(f"cannot use fd {fd} ({errno_name(error.errno)}): pass an open socket to --fd") from error
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.close()
        raise RefusedError(f"cannot use fd {fd}: it is not a Unix stream socket")
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock


def _is_readable(sock: socket.socket) -> bool:
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(0))


def _bind(path: Path, access: SocketAccess) -> socket.socket:
    """A bound socket; nobody can connect before it listens, so that its owner is set in time."""
    with attempting(f"listen on {path}"):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            _try_bind(sock, path, access.mode)
        except _AddressInUse:
            with stale_removed(path):
                _try_bind(sock, path, access.mode)
        _give_away(path, access)
    except _AddressInUse as error:
        sock.close()
        raise RefusedError(f"cannot listen on {path}: the path was taken just now; choose another") from error
    except BaseException:
        sock.close()
        raise
    return sock


class _AddressInUse(Exception):  # noqa: N818 - a condition, not an error
    pass


def _try_bind(sock: socket.socket, path: Path, mode: int) -> None:
    # The kernel makes the path with the mode that the socket itself has, less the umask.
    with attempting(f"give {path} the mode {mode:o}"):
        os.fchmod(sock.fileno(), mode)
    umask = os.umask(0)
    try:
        sock.bind(str(path))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _AddressInUse from error
        raise _path_error("listen on", path, error) from error
    finally:
        os.umask(umask)


def _give_away(path: Path, access: SocketAccess) -> None:
    if (access.uid, access.gid) == (-1, -1):
        return
    try:
        os.chown(path, access.uid, access.gid, follow_symlinks=False)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise HostError(
            error.errno or 0,
            f"cannot give {path} to {access.uid}:{access.gid} ({errno_name(error.errno)}): "
            "run as root, or leave --socket-owner out",
        ) from error


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _path_error(attempt: str, path: Path, error: OSError) -> HostError | RefusedError:
    if error.errno is None:  # the path is too long for a sockaddr_un
        return RefusedError(f"cannot {attempt} {path} ({error}): choose a shorter path")
    advice = {
        errno.ENOENT: "create its directory first",
        errno.EACCES: "check the directory's permissions",
    }.get(error.errno, "choose another path")
    return HostError(error.errno, f"cannot {attempt} {path} ({errno_name(error.errno)}): {advice}")
