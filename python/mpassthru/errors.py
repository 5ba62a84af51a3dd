"""Every error that mpassthru raises on purpose, in four kinds kept apart by type.

* `HostError`: the kernel or the machine refused something. An `OSError`; `errno` is kept.
* `ProtocolError`: the front-end broke the vhost-user protocol. Ends that connection.
* `QueueFault`: the guest's driver broke the virtqueue protocol. Ends that virtqueue.
* `RefusedError`: what was asked for cannot be had or would not be safe. Nothing was changed.

Messages say what was attempted, on what, and what to try: one line, fit for a terminal.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from errno import errorcode


class MpassthruError(Exception):
    """Base of every error raised on purpose."""


def errno_name(number: int | None) -> str:
    """How messages name an errno: `ENOENT`, as the man pages do and the Rust side too."""
    return errorcode.get(number or 0, f"errno {number or 0}")


class HostError(MpassthruError, OSError):
    """A system call failed: `errno` is set, `str()` is the whole message with its advice."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(errno, message)

    def __str__(self) -> str:
        return str(self.args[1])


EXHAUSTED = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC, errno.ETOOMANYREFS}
)
"""What the kernel answers, to whatever call, when it or this user has run out of something."""

_ADVICE = {
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "the whole machine has too many open files (fs.file-max)",
    errno.EAGAIN: "raise the limit on processes (ulimit -u, pids.max)",
    errno.ENOMEM: "free some memory",
    errno.ENOBUFS: "free some memory",
    errno.ENOSPC: "raise the limit on what epoll watches (fs.epoll.max_user_watches)",
    errno.EACCES: "check its permissions",
    errno.EPERM: "run as root",
    errno.ETOOMANYREFS: "too many file descriptors are on their way between processes of this user (ulimit -n)",
}


def host_error(attempt: str, error: OSError) -> HostError:
    """The error for a system call that nothing special is known about.

    Args:
        attempt: What was attempted, on what: `read interface eth0`.
        error: What came of it.
    """
    advice = _ADVICE.get(error.errno or 0, "see the kernel's log")
    return HostError(error.errno or 0, f"cannot {attempt} ({errno_name(error.errno)}): {advice}")


@contextmanager
def attempting(attempt: str) -> Iterator[None]:
    """Turn a failed system call in the block into a `HostError` that says what was attempted; see `host_error`."""
    try:
        yield
    except HostError:
        raise
    except OSError as error:
        raise host_error(attempt, error) from error


class ProtocolError(MpassthruError):
    """A vhost-user message is malformed, or not allowed in this state."""


class QueueFault(MpassthruError):  # noqa: N818 - a fault of the guest's, named as in Rust
    """The driver broke the ring protocol (VIRTIO 1.3 section 2.7)."""


class RefusedError(MpassthruError):
    """A request cannot be met, or not safely; the message names the cause and the way out."""
