"""AF_XDP sockets as the broker makes them: created with its privileges, configured and bound by the worker."""

from __future__ import annotations

import socket
from typing import Final

from mpassthru.netdev.af_xdp import open_xsk_socket

SEND_BUFFER_BYTES: Final = 16 << 20
"""Bytes of frames that may be on their way in copy mode; the default is about 92 full frames (truesize 2304)."""
_SO_SNDBUFFORCE: Final = 32


def create_socket() -> socket.socket:
    """Create an AF_XDP socket in the current network namespace, with room for many frames on their way.

    Raises:
        HostError: EPERM without CAP_NET_RAW; EAFNOSUPPORT if the kernel has no AF_XDP.
    """
    sock = open_xsk_socket()
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SEND_BUFFER_BYTES)
    except PermissionError:
        # Without CAP_NET_ADMIN the limit of net.core.wmem_max holds: slower under load, not wrong.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    return sock
