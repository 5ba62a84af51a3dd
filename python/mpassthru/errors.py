"""Every error that mpassthru raises on purpose, in four kinds kept apart by type.

* `HostError`: the kernel or the machine refused something. An `OSError`; `errno` is kept.
* `ProtocolError`: the front-end broke the vhost-user protocol. Ends that connection.
* `QueueFault`: the guest's driver broke the virtqueue protocol. Ends that virtqueue.
* `RefusedError`: what was asked for cannot be had or would not be safe. Nothing was changed.

Messages say what was attempted, on what, and what to try: one line, fit for a terminal.
"""

from __future__ import annotations

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


class ProtocolError(MpassthruError):
    """A vhost-user message is malformed, or not allowed in this state."""


class QueueFault(MpassthruError):  # noqa: N818 - a fault of the guest's, named as in Rust
    """The driver broke the ring protocol (VIRTIO 1.3 section 2.7)."""


class RefusedError(MpassthruError):
    """A request cannot be met, or not safely; the message names the cause and the way out."""
