"""Watches one interface: netlink says when to look, looking says what happened.

Two multicast groups are listened to: rtnetlink's RTNLGRP_LINK, and `monitor` of the ethtool family, which tells of a
changed number of queues (net/ethtool/netlink.c). Neither tells when a bpf_link comes or goes, so a look is taken every
`LOOK_INTERVAL_S` besides. Notifications that were lost (ENOBUFS) are a reason to look like any other.

pyroute2's own asynchronous socket ends for good when notifications are lost; so the sockets are plain ones, and
pyroute2 decodes what they receive.

Everything is seen in the network namespace that this process was in when the monitor was started.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Final

from pyroute2.netlink import genlmsg
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import AsyncGenericNetlinkSocket
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from mpassthru.errors import HostError, attempting, host_error
from mpassthru.netdev.link_events import (
    LinkEvent,
    LinkState,
    Moved,
    NotificationsLost,
    Removed,
    events_between,
)
from mpassthru.netdev.reader import read_link

LOOK_INTERVAL_S: Final = 8.0
"""A look takes 2 ms: each second, those of 16 ports that do nothing were 4 % of a core."""

_RTMGRP_LINK: Final = 1
_RTM_NEWLINK: Final = 16
_RTM_DELLINK: Final = 17
_NETLINK_GENERIC: Final = 16
_SOL_NETLINK: Final = 270
_NETLINK_ADD_MEMBERSHIP: Final = 1
_NLMSG_HEADER: Final = struct.Struct("=IHHII")
_IFINFOMSG: Final = struct.Struct("=BxHiII")
_DATAGRAM_MAX_BYTES: Final = 1 << 16


class LinkMonitor:
    """Follows one interface.

    Args:
        on_news: Called with what happened, and with nothing if something may have that is no event of ours.
        on_trouble: Called with one line when the interface cannot be read, once until it can be again.
        interval_s: Seconds between two looks without a notification.
    """

    def __init__(
        self,
        on_news: Callable[[tuple[LinkEvent, ...]], None],
        on_trouble: Callable[[str], None],
        *,
        interval_s: float = LOOK_INTERVAL_S,
    ) -> None:
        self.state: LinkState | None = None
        """As it was at the last look; None if there was no such interface."""
        self._on_news = on_news
        self._on_trouble = on_trouble
        self._interval_s = interval_s
        self._name: str | None = None
        self._ifindex: int | None = None
        self._looked = False
        self._departure: Removed | Moved | None = None
        self._lost = False
        self._in_trouble = False
        self._hint = asyncio.Event()
        self._looking = asyncio.Lock()

    def follow(self, name: str | None, ifindex: int | None = None) -> None:
        """Watch another interface from now on.

        Args:
            name: Its name; None to watch none.
            ifindex: Its index, by which it is known from then on; None to wait until one has that name.
        """
        if (name, ifindex) == (self._name, self._ifindex):
            return
        self._name, self._ifindex = name, ifindex
        self.state, self._looked = None, ifindex is None
        self._departure, self._lost = None, False
        self._hint.set()

    async def run(self) -> None:
        """Watch until cancelled.

        Raises:
            HostError: no netlink socket can be had.
        """
        with contextlib.ExitStack() as undo:
            _read(undo.enter_context(_open_link_group()), self._drain_links, undo)
            if (group := await _ethtool_group()) is not None:
                _read(undo.enter_context(_open_ethtool_group(group)), self._drain, undo)
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._interval_s):
                        await self._hint.wait()
                await self.look()

    async def look(self) -> None:
        """Look now. What the kernel has told until then, and what is seen, is told before this returns."""
        async with self._looking:
            try:
                await self._look()
            except HostError as error:
                if not self._in_trouble:
                    self._on_trouble(f"{error}; trying again every {self._interval_s:g} s")
                self._in_trouble = True
            else:
                self._in_trouble = False

    async def _look(self) -> None:
        hinted = False
        while True:
            name, ifindex, departure = self._name, self._ifindex, self._departure
            hinted |= self._hint.is_set()
            self._hint.clear()
            if name is None:
                return
            state = await read_link(name, ifindex)
            if (name, ifindex, departure) == (self._name, self._ifindex, self._departure):
                break  # otherwise it is no longer what we follow, or may not be the interface that it was
        events: tuple[LinkEvent, ...] = (NotificationsLost(),) if self._lost else ()
        if self._looked:
            events += tuple(events_between(self.state, state, departure=departure))
        hinted |= not self._looked
        self._departure, self._lost = None, False
        self.state, self._looked = state, True
        if events or hinted:
            self._on_news(events)

    def _drain_links(self, sock: socket.socket) -> None:
        for datagram in _datagrams(sock):
            if datagram is None:
                self._lost = True
                self._hint.set()
                return
            for kind, ifindex, message in _link_messages(datagram):
                self._take(kind, ifindex, message)

    def _take(self, kind: int, ifindex: int, message: bytes) -> None:
        if self._ifindex is None:
            if kind == _RTM_NEWLINK:
                self._hint.set()
        elif ifindex == self._ifindex:
            if kind == _RTM_DELLINK:
                self._departure = Moved() if _names_new_namespace(message) else Removed()
            self._hint.set()

    def _drain(self, sock: socket.socket) -> None:
        for _ in _datagrams(sock):
            self._hint.set()


def _read(sock: socket.socket, drain: Callable[[socket.socket], None], undo: contextlib.ExitStack) -> None:
    loop = asyncio.get_running_loop()
    with attempting("watch interfaces"):
        loop.add_reader(sock.fileno(), drain, sock)
    undo.callback(loop.remove_reader, sock.fileno())


def _open_link_group() -> socket.socket:
    with _opened(socket.NETLINK_ROUTE) as sock:
        sock.bind((0, _RTMGRP_LINK))
        return sock


def _open_ethtool_group(group: int) -> socket.socket:
    with _opened(_NETLINK_GENERIC) as sock:
        sock.bind((0, 0))
        sock.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        return sock


@contextlib.contextmanager
def _opened(family: int) -> Iterator[socket.socket]:
    """A netlink socket, which is closed if it cannot be set up."""
    with attempting("watch interfaces"):
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, family)
        try:
            yield sock
        except BaseException:
            sock.close()
            raise


async def _ethtool_group() -> int | None:
    """The group that tells of queues; None where the kernel has none: it would only make us quicker."""
    try:
        async with _Family() as family:
            await family.bind("ethtool", genlmsg)
            return family.mcast_groups.get("monitor")  # type: ignore[no-any-return] # pyroute2 has no types
    except NetlinkError as error:
        if error.code == errno.ENOENT:
            return None
        raise host_error("watch interfaces", OSError(error.code, "")) from error
    except OSError as error:
        raise host_error("watch interfaces", error) from error


class _Family(AsyncGenericNetlinkSocket):  # type: ignore[misc] # pyroute2 has no types
    module_err_level = "debug"  # an old kernel is no error of ours


def _datagrams(sock: socket.socket) -> Iterator[bytes | None]:
    """What there is to receive; None for what was lost."""
    while True:
        try:
            yield sock.recv(_DATAGRAM_MAX_BYTES)
        except BlockingIOError:
            return
        except OSError:
            # ENOBUFS, whatever else it says: an error is told once, and what comes after it can be received.
            yield None
            return


def _link_messages(datagram: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, interface and bytes of each link message in a datagram."""
    while len(datagram) >= _NLMSG_HEADER.size + _IFINFOMSG.size:
        length, kind, *_ = _NLMSG_HEADER.unpack_from(datagram)
        _family, _type, ifindex, *_ = _IFINFOMSG.unpack_from(datagram, _NLMSG_HEADER.size)
        if kind in (_RTM_NEWLINK, _RTM_DELLINK):
            yield kind, ifindex, datagram[:length]
        datagram = datagram[max(_NLMSG_HEADER.size, (length + 3) & ~3) :]


def _names_new_namespace(message: bytes) -> bool:
    link = ifinfmsg(message)
    link.decode()
    return link.get_attr("IFLA_NEW_NETNSID") is not None
