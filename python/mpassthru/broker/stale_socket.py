"""Taking over the path of a Unix socket whose owner was killed, and of no other.

Whether somebody owns a socket is asked by connecting with another type of socket than front-ends use. The kernel looks
up who is bound to the path, then compares types: ECONNREFUSED without an owner, EPROTOTYPE from a stream socket, which
notices nothing. A connection of the right type would be taken for a front-end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from mpassthru.errors import HostError, RefusedError, attempting, errno_name


@contextlib.contextmanager
def stale_removed(path: Path) -> Iterator[None]:
    """Remove a socket that nobody owns; bind to its path in the block.

    Others who do the same at the same time are kept off by a lock on the directory, or they might remove the new socket
    for the old one. The lock leaves nothing behind.

    Raises:
        RefusedError: the path is a living process's, no socket, or being taken over by somebody else.
        HostError: its directory cannot be opened, or the socket not be removed.
    """
    with _locked(path.parent):
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise RefusedError(
                    f"cannot listen on {path}: it exists and is not a socket; remove it or choose another path"
                )
        if has_owner(path):
            raise RefusedError(
                f"cannot listen on {path}: the socket path is taken by a running process; choose another"
            )
        with attempting(f"remove {path}, which nobody listens on any more"):
            path.unlink(missing_ok=True)
        yield


def has_owner(path: Path) -> bool:
    """Whether a socket is bound to the path, listening or not, of whatever network namespace."""
    with attempting(f"find out who owns {path}"), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(str(path)) not in (errno.ECONNREFUSED, errno.ENOENT)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(
            error.errno or 0, f"cannot open {directory} ({errno_name(error.errno)}): check its permissions"
        ) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RefusedError(
                f"cannot listen in {directory}: another process takes a path over there just now; try again"
            ) from error
        yield
    finally:
        os.close(fd)
