"""AF_XDP sockets as far as the control plane needs them: open one, and ask whether a queue can be had.

The data plane's sockets are made of these by the worker; rings and frames are its business. What is here follows
Documentation/networking/af_xdp.rst and `linux/if_xdp.h`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import socket
import struct
from typing import Final, Literal

from mpassthru.errors import HostError

AF_XDP: Final = 44
SOL_XDP: Final = 283

XDP_MMAP_OFFSETS: Final = 1
XDP_RX_RING: Final = 2
XDP_TX_RING: Final = 3
XDP_UMEM_REG: Final = 4
XDP_UMEM_FILL_RING: Final = 5
XDP_UMEM_COMPLETION_RING: Final = 6
XDP_STATISTICS: Final = 7
XDP_OPTIONS: Final = 8
XDP_OPTIONS_ZEROCOPY: Final = 1 << 0

XDP_COPY: Final = 1 << 1
XDP_ZEROCOPY: Final = 1 << 2
XDP_USE_NEED_WAKEUP: Final = 1 << 3

CHUNK_SIZE_BYTES: Final = 4096
XDP_PACKET_HEADROOM_BYTES: Final = 256
"""What the kernel keeps free in front of every frame."""

Mode = Literal["copy", "zero-copy"]

_UMEM_REG: Final = struct.Struct("=QQIIII")
"""`struct xdp_umem_reg`: addr, len, chunk_size, headroom, flags, tx_metadata_len."""
_SOCKADDR_XDP: Final = struct.Struct("=HHIII")
"""`struct sockaddr_xdp`: family, flags, ifindex, queue_id, shared_umem_fd."""

_BIND_FLAGS: Final[dict[Mode, int]] = {"copy": XDP_COPY, "zero-copy": XDP_ZEROCOPY}

_libc = ctypes.CDLL(None, use_errno=True)


def open_xsk_socket() -> socket.socket:
    """Open an AF_XDP socket in the current network namespace: unbound, without a UMEM.

    Raises:
        HostError: EPERM without CAP_NET_RAW, EAFNOSUPPORT if the kernel has no AF_XDP.
    """
    try:
        return socket.socket(AF_XDP, socket.SOCK_RAW | socket.SOCK_CLOEXEC)
    except OSError as error:
        number = error.errno or 0
        advice = {
            errno.EPERM: "run as root, or give the process CAP_NET_RAW",
            errno.EAFNOSUPPORT: "the kernel needs CONFIG_XDP_SOCKETS",
        }.get(number, "see 'mpassthru doctor'")
        raise HostError(number, f"cannot open an AF_XDP socket ({_errno_name(number)}): {advice}") from error


def register_umem(sock: socket.socket, memory: mmap.mmap, *, headroom_bytes: int = 0) -> None:
    """Register memory as the socket's UMEM, in aligned chunks of 4096 bytes; it is pinned until the socket is closed.

    Args:
        sock: An unbound AF_XDP socket.
        memory: Page aligned, a multiple of the chunk size; must outlive the socket.
        headroom_bytes: Extra bytes kept free in front of each frame.

    Raises:
        HostError: ENOBUFS if the memlock limit is too small, EINVAL for a size that does not fit.
    """
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    value = _UMEM_REG.pack(address, len(memory), CHUNK_SIZE_BYTES, headroom_bytes, 0, 0)
    try:
        sock.setsockopt(SOL_XDP, XDP_UMEM_REG, value)
    except OSError as error:
        number = error.errno or 0
        advice = "raise the memlock limit (ulimit -l)" if number == errno.ENOBUFS else "see 'mpassthru doctor'"
        raise HostError(
            number, f"cannot register {len(memory)} bytes as a UMEM ({_errno_name(number)}): {advice}"
        ) from error


def bind(sock: socket.socket, *, ifindex: int, queue_id: int, mode: Mode) -> None:
    """Bind a socket that has its UMEM and rings to a receive queue.

    Args:
        sock: With a UMEM, a fill and a completion ring, and an rx or a tx ring.
        ifindex: Of the interface, in the namespace where the socket was opened.
        queue_id: 0-based.
        mode: `zero-copy` may take the link down for a moment, as the driver changes the queue's memory.

    Raises:
        OSError: EBUSY if another socket has the queue, ENETDOWN if the interface is down, EOPNOTSUPP or EINVAL if the
            driver has no zero-copy (for this MTU), EINVAL if there is no such queue.
    """
    address = _SOCKADDR_XDP.pack(AF_XDP, _BIND_FLAGS[mode] | XDP_USE_NEED_WAKEUP, ifindex, queue_id, 0)
    # The socket module has no address format for AF_XDP.
    if _libc.bind(sock.fileno(), address, len(address)):
        number = ctypes.get_errno()
        raise OSError(number, f"bind ({_errno_name(number)})")


def set_ring_sizes(sock: socket.socket, size_descs: int) -> None:
    """Give the socket all four rings, each of `size_descs` descriptors (a power of two)."""
    for ring in (XDP_RX_RING, XDP_TX_RING, XDP_UMEM_FILL_RING, XDP_UMEM_COMPLETION_RING):
        sock.setsockopt(SOL_XDP, ring, size_descs)


def _errno_name(number: int) -> str:
    return errno.errorcode.get(number, f"errno {number}")
