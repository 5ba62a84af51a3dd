"""AF_XDP sockets as the broker makes them: created with its privileges, configured and bound by the worker."""

from __future__ import annotations

import socket
from typing import Final

from mpassthru.errors import attempting
from mpassthru.netdev.af_xdp import open_xsk_socket

SEND_BUFFER_BYTES: Final = 16 << 20
"""Bytes of frames that may be on their way in copy mode; the default is about 92 full frames (truesize 2304)."""
_SO_SNDBUFFORCE: Final = 32
_SO_BINDTOIFINDEX: Final = 62


def create_socket(ifindex: int) -> socket.socket:
    """Create an AF_XDP socket for an interface, with room for many frames on their way.

    From Linux 6.6 on it cannot be bound to another interface, and only CAP_NET_RAW could change that. Which of the
    interface's queues it is bound to remains the worker's choice.

    Args:
        ifindex: Of the current network namespace.

    Raises:
        HostError: EPERM without CAP_NET_RAW; EAFNOSUPPORT if the kernel has no AF_XDP.
    """
    sock = open_xsk_socket()
    try:
        with attempting("set up an AF_XDP socket"):
            _set_options(sock, ifindex)
    except BaseException:
        sock.close()
        raise
    return sock


def _set_options(sock: socket.socket, ifindex: int) -> None:
    sock.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, ifindex)
    raise_send_buffer(sock, SEND_BUFFER_BYTES)


def raise_send_buffer(sock: socket.socket, size_bytes: int) -> None:
    """Let a socket have so many bytes of frames on their way."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, size_bytes)
    except PermissionError:
        # Without CAP_NET_ADMIN the limit of net.core.wmem_max holds: slower under load, not wrong.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size_bytes)
