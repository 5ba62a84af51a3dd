"""A network namespace of one's own with a veth pair in it: the wire that tests and the demo run on.

The namespace has no name and no process: it lives as long as the descriptor that `veth_namespace` holds, so that
nothing of it is left behind however the program ends. `Namespace.entered` puts the calling thread into it; child
processes started meanwhile inherit it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyroute2.ethtool.ioctl import IoctlEthtool

from mpassthru.errors import HostError

_CLONE_NEWNET: Final = 0x40000000
_RTMGRP_LINK: Final = 1
_RTM_NEWLINK: Final = 16
_IFF_RUNNING: Final = 0x40
_NLMSG_HEADER: Final = struct.Struct("=IHHII")
_IFINFOMSG: Final = struct.Struct("=BxHiII")

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace with a veth pair: `ifname` is the host interface under test, `peer` the other end."""

    fd: int
    """Descriptor of the namespace; for `entered`, or as `--net=/proc/PID/fd/FD` of nsenter(1)."""
    ifname: str
    ifindex: int
    peer: str
    peer_ifindex: int

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Put the calling thread into the namespace, and back at the end.

        Raises:
            HostError: EPERM without CAP_SYS_ADMIN.
        """
        with entered(self.fd):
            yield

    def has_xdp_program(self) -> bool:
        """Whether an XDP program is attached to `ifname`."""
        return "prog/xdp" in self.run("ip", "link", "show", "dev", self.ifname)

    def run(self, *command: str, timeout_s: float = 30.0) -> str:
        """Run a command in the namespace and return what it printed.

        Raises:
            subprocess.CalledProcessError: it failed.
            subprocess.TimeoutExpired: it took longer than `timeout_s` seconds, and was killed.
        """
        with self.entered():
            return subprocess.run(command, check=True, capture_output=True, text=True, timeout=timeout_s).stdout


@contextmanager
def entered(fd: int) -> Iterator[None]:
    """Put the calling thread into the namespace with this descriptor, and back at the end.

    Raises:
        HostError: EPERM without CAP_SYS_ADMIN.
    """
    with _own_namespace() as home:
        _setns(fd)
        try:
            yield
        finally:
            _setns(home)


def move_interface(ifname: str, *, source: int, target: int) -> None:
    """Move an interface from one network namespace to another, both by their descriptors. It is down afterwards.

    Raises:
        HostError: EPERM without CAP_SYS_ADMIN.
        subprocess.CalledProcessError: ip(8) failed.
    """
    with entered(source):
        _ip("link", "set", "dev", ifname, "netns", f"/proc/{os.getpid()}/fd/{target}")


@contextmanager
def veth_namespace(
    *,
    ifname: str = "mpt0",
    peer: str = "mpt1",
    queues: int = 1,
    mtu: int = 1500,
    offloads: bool = False,
    timeout_s: float = 5.0,
) -> Iterator[Namespace]:
    """Make a network namespace with a veth pair, both ends up, and remove it at the end.

    Args:
        ifname: Name of the end that stands for the host's interface.
        peer: Name of the end that stands for the wire.
        queues: Receive and transmit queues of each end.
        mtu: Of both ends, in bytes.
        offloads: Leave the kernel's default offloads on.
        timeout_s: Seconds to wait for the carrier.

    Raises:
        HostError: EPERM without CAP_SYS_ADMIN and CAP_NET_ADMIN; ETIMEDOUT if there is no carrier in time.
        subprocess.CalledProcessError: ip(8) failed.
    """
    fd = _new_namespace()
    try:
        namespace = _populate(fd, ifname, peer, queues=queues, mtu=mtu, offloads=offloads, timeout_s=timeout_s)
        yield namespace
    finally:
        os.close(fd)


@contextmanager
def empty_namespace() -> Iterator[int]:
    """Make a network namespace with nothing but loopback and remove it at the end; gives a descriptor of it.

    Raises:
        HostError: EPERM without CAP_SYS_ADMIN and CAP_NET_ADMIN.
    """
    fd = _new_namespace()
    try:
        with entered(fd):
            _disable_ipv6()
            _ip("link", "set", "lo", "up")
        yield fd
    finally:
        os.close(fd)


@contextmanager
def wait_running(namespace: Namespace, ifindexes: set[int], *, timeout_s: float = 5.0) -> Iterator[None]:
    """Wait at the end of the block until each of the namespace's interfaces was announced as running in its course.

    Raises:
        HostError: ETIMEDOUT if that did not happen in time.
    """
    with namespace.entered():
        events = _open_link_events()
    with events:
        yield
        _wait_running(events, ifindexes, timeout_s)


def _populate(fd: int, ifname: str, peer: str, *, queues: int, mtu: int, offloads: bool, timeout_s: float) -> Namespace:
    size = ["mtu", str(mtu), "numrxqueues", str(queues), "numtxqueues", str(queues)]
    with _own_namespace() as home:
        _setns(fd)
        try:
            _disable_ipv6()
            _ip("link", "set", "lo", "up")
            _ip("link", "add", ifname, *size, "type", "veth", "peer", "name", peer, *size)
            namespace = Namespace(fd, ifname, socket.if_nametoindex(ifname), peer, socket.if_nametoindex(peer))
            if not offloads:
                for end in (ifname, peer):
                    set_offloads(end, enabled=False)
            with _open_link_events() as events:
                _ip("link", "set", ifname, "up")
                _ip("link", "set", peer, "up")
                _wait_running(events, {namespace.ifindex, namespace.peer_ifindex}, timeout_s)
        finally:
            _setns(home)
    return namespace


def set_offloads(ifname: str, *, enabled: bool) -> None:
    """Switch every offload on or off that makes a veth hand on frames that no wire would carry.

    These are unfinished checksums, segments of up to 64 KiB, and VLAN tags kept beside the frame: AF_XDP sees the frame
    as it is, so that they would arrive broken.

    Raises:
        OSError: ENODEV for no such interface, EPERM without CAP_NET_ADMIN.
    """
    ethtool = IoctlEthtool(ifname)
    try:
        features = ethtool.get_features()
        for name in features.keys():  # noqa: SIM118 (pyroute2's features are not iterated by name)
            if _is_offload(name) and features.is_available(name):
                features[name] = enabled
        ethtool.set_features(features)
    finally:
        ethtool.close()


def _is_offload(feature: str) -> bool:
    return feature.startswith("tx-checksum") or feature.endswith("-segmentation") or "-vlan-" in feature


def _new_namespace() -> int:
    """Make a network namespace and return a descriptor of it; the calling thread stays where it is."""
    with _own_namespace() as home:
        if _libc.unshare(_CLONE_NEWNET):
            raise _refused("make a network namespace", ctypes.get_errno())
        try:
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            _setns(home)


@contextmanager
def _own_namespace() -> Iterator[int]:
    fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        raise _refused("enter a network namespace", ctypes.get_errno())


def _refused(operation: str, number: int) -> HostError:
    name = errno.errorcode.get(number, str(number))
    advice = "run as root, or give CAP_SYS_ADMIN" if number == errno.EPERM else "its block may have ended"
    return HostError(number, f"cannot {operation} ({name}): {advice}")


def _disable_ipv6() -> None:
    """Keep the kernel's own frames (router solicitations) off the wire; a kernel without IPv6 sends none."""
    for scope in ("all", "default"):
        path = Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6")
        if path.exists():
            path.write_text("1")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _open_link_events() -> socket.socket:
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    events.bind((0, _RTMGRP_LINK))
    return events


def _wait_running(events: socket.socket, ifindexes: set[int], timeout_s: float) -> None:
    """Wait until each interface was announced as running.

    Only the announcement says that the queueing discipline is there too; the flag alone is set a moment earlier, and
    a frame sent in between is lost.
    """
    waiting = set(ifindexes)
    deadline = time.monotonic() + timeout_s
    while waiting:
        if not select.select([events], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise HostError(errno.ETIMEDOUT, f"no carrier on veth within {timeout_s} s (ETIMEDOUT): see 'ip link'")
        waiting -= _running_in(events.recv(65536))


def _running_in(datagram: bytes) -> set[int]:
    """Interfaces that the messages of a netlink datagram announce as running."""
    running: set[int] = set()
    while len(datagram) >= _NLMSG_HEADER.size + _IFINFOMSG.size:
        length, kind, *_ = _NLMSG_HEADER.unpack_from(datagram)
        _family, _type, ifindex, flags, _change = _IFINFOMSG.unpack_from(datagram, _NLMSG_HEADER.size)
        if kind == _RTM_NEWLINK and flags & _IFF_RUNNING:
            running.add(ifindex)
        datagram = datagram[(length + 3) & ~3 :]
    return running
