"""AF_XDP sockets as the broker makes them: created with its privileges, configured and bound by the worker."""

from __future__ import annotations

import errno
import socket
from typing import Final

from mpassthru.errors import HostError

AF_XDP: Final = 44
_SO_SNDBUFFORCE: Final = 32
SEND_BUFFER_BYTES: Final = 16 << 20
"""Bytes of frames that may be on their way in copy mode; the default is about 92 full frames (truesize 2304)."""


def create_socket(interface: str) -> socket.socket:
    """Create an AF_XDP socket in the current network namespace.

    Args:
        interface: Only for the message.

    Raises:
        HostError: EPERM without CAP_NET_RAW; EAFNOSUPPORT if the kernel has no AF_XDP.
    """
    try:
        sock = socket.socket(AF_XDP, socket.SOCK_RAW | socket.SOCK_CLOEXEC)
    except OSError as error:
        number = error.errno or 0
        advice = {
            errno.EPERM: "run as root or give CAP_NET_RAW",
            errno.EAFNOSUPPORT: "the kernel needs CONFIG_XDP_SOCKETS",
        }.get(number, "see mpassthru doctor")
        raise HostError(
            number, f"cannot create an AF_XDP socket for {interface} ({error.strerror}): {advice}"
        ) from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SEND_BUFFER_BYTES)
    except PermissionError:
        # Without CAP_NET_ADMIN the limit of net.core.wmem_max holds: slower under load, not wrong.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    return sock
