"""AF_XDP sockets as far as the control plane needs them: open one, and ask whether a queue can be had.

The data plane's sockets are made of these by the worker; rings and frames are its business. What is here follows
Documentation/networking/af_xdp.rst and `linux/if_xdp.h`.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import mmap
import socket
import struct
import time
from typing import Final, Literal

from pyroute2.netlink.exceptions import NetlinkError

from mpassthru.errors import HostError, errno_name
from mpassthru.netdev import netdev_family

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

_PROBE_PERIOD_S: Final = 0.005
_RELEASE_UNSEEN_S: Final = 0.1
"""How long to wait where the kernel does not show which queue has a socket: twice what was ever measured."""

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
        raise HostError(number, f"cannot open an AF_XDP socket ({errno_name(number)}): {advice}") from error


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
            number, f"cannot register {len(memory)} bytes as a UMEM ({errno_name(number)}): {advice}"
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
        raise OSError(number, f"bind ({errno_name(number)})")


async def probe_bind(ifname: str, queue_id: int, mode: Mode, *, timeout_s: float = 2.0) -> None:
    """Bind a socket to a queue and close it again: whether a guest could be given that queue.

    A socket that was just closed holds its queue for some 50 ms, while the kernel takes its memory away; so "busy" is
    believed only after `timeout_s`, and this probe's own socket is waited for.

    Args:
        ifname: Interface of the current network namespace.
        queue_id: 0-based.
        mode: `copy` disturbs nobody. `zero-copy` has the driver set the queue up anew, which on some NICs takes the
            link down for seconds.
        timeout_s: Seconds to wait for the queue, before and after.

    Raises:
        HostError: EBUSY if another socket has the queue, ENETDOWN if the interface is down, EOPNOTSUPP without
            zero-copy, EINVAL if there is no such queue or the MTU does not fit, ENODEV without such an interface.
    """
    try:
        ifindex = socket.if_nametoindex(ifname)
    except OSError as error:  # which has no errno
        raise bind_error(ifname, queue_id, errno.ENODEV) from error
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            _bind_and_close(ifindex, queue_id, mode)
            break
        except HostError:
            raise
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise bind_error(ifname, queue_id, error.errno or 0) from error
        await asyncio.sleep(_PROBE_PERIOD_S)
    await _wait_released(ifname, ifindex, queue_id, timeout_s)


async def wait_queue_free(ifname: str, ifindex: int, queue_id: int, *, timeout_s: float) -> None:
    """Wait until the kernel has let go of a queue whose socket was closed.

    The kernel takes a socket down after its close, and a zero-copy NIC goes on writing meanwhile (28-43 ms measured).
    It first has the driver give up the socket's memory, and only then forgets the socket (net/xdp/xsk_buff_pool.c,
    xp_clear_dev): so a queue without socket is the proof. Where the kernel does not name queues with sockets, that
    another socket can be bound is. A device that is gone or down writes nothing.

    Args:
        ifname: Interface of the current network namespace.
        ifindex: Its index, which counts if the name has gone to another meanwhile.
        queue_id: 0-based.
        timeout_s: Seconds to wait.

    Raises:
        HostError: EBUSY if the queue does not come free in time.
    """
    try:
        if netdev_family.kernel_names_xsk_queues():
            await _wait_released(ifname, ifindex, queue_id, timeout_s)
        else:
            await probe_bind(ifname, queue_id, "copy", timeout_s=timeout_s)
    except (HostError, NetlinkError) as error:
        number = error.errno if isinstance(error, HostError) else error.code
        if number in (errno.ENODEV, errno.ENETDOWN):
            return
        raise HostError(
            number or 0,
            f"the kernel still holds {ifname} queue {queue_id} {timeout_s:g} s after its socket was closed "
            f"({errno_name(number or 0)}): guest memory stays mapped, as the NIC may write to it; see dmesg",
        ) from error


def bind_error(ifname: str, queue_id: int, number: int) -> HostError:
    """The error for a bind that the kernel refused with errno `number`."""
    advice = {
        errno.EBUSY: "another AF_XDP socket has this queue; end its program, or take another queue",
        errno.ENETDOWN: f"the interface is down; 'ip link set dev {ifname} up'",
        errno.ENODEV: "there is no such interface",
        errno.EOPNOTSUPP: "its driver has no zero-copy mode; use copy mode",
        errno.EINVAL: "it has no such queue, or its MTU does not fit; see 'mpassthru doctor'",
        errno.ENOMEM: "the kernel has no memory for the pool; see 'mpassthru doctor' for the cost",
    }.get(number, "see 'mpassthru doctor'")
    return HostError(
        number, f"cannot bind an AF_XDP socket to {ifname} queue {queue_id} ({errno_name(number)}): {advice}"
    )


def _bind_and_close(ifindex: int, queue_id: int, mode: Mode) -> None:
    with mmap.mmap(-1, 2 * CHUNK_SIZE_BYTES) as memory, open_xsk_socket() as sock:
        register_umem(sock, memory)
        set_ring_sizes(sock, 2)
        bind(sock, ifindex=ifindex, queue_id=queue_id, mode=mode)


async def _wait_released(ifname: str, ifindex: int, queue_id: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        queues = await netdev_family.xsk_queues(ifindex)
        if queues is None:
            await asyncio.sleep(_RELEASE_UNSEEN_S)
            return
        if queue_id not in queues:
            return
        if time.monotonic() > deadline:
            raise bind_error(ifname, queue_id, errno.EBUSY)
        await asyncio.sleep(_PROBE_PERIOD_S)


def set_ring_sizes(sock: socket.socket, size_descs: int) -> None:
    """Give the socket all four rings, each of `size_descs` descriptors (a power of two)."""
    for ring in (XDP_RX_RING, XDP_TX_RING, XDP_UMEM_FILL_RING, XDP_UMEM_COMPLETION_RING):
        sock.setsockopt(SOL_XDP, ring, size_descs)
