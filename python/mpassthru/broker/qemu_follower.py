"""Follows what the guest asks its network device for, through QEMU's monitor, and tells the guest about its link.

QEMU tells once that something has changed and not again before it was asked; and not at all when the guest resets the
device. So it is asked at each notice, though not more than `QUERIES_PAUSE_S` apart, for a guest can change its mind
without end; and every `LOOK_INTERVAL_S`. Nothing that QEMU does or says ends the port: what cannot be had is said once,
and what was said last goes on to hold.

A link that is down is set down again at every look, for QEMU sets it up by itself when a back-end connects. It is set
up once, and only where it may be down because of a port: after this one had set it down, or after a migration, for the
state of the link comes along. Somebody else may have reasons to have it down.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from mpassthru.broker.qemu_nic import NicNotFoundError, find_nic, is_awaited, read_filter
from mpassthru.broker.status import PortStatus
from mpassthru.errors import HostError, MpassthruError
from mpassthru.qmp import QmpClient, QmpError
from mpassthru.steering import Filter

QUERIES_PAUSE_S: Final = 0.25
LOOK_INTERVAL_S: Final = 2.0
ANSWER_TIMEOUT_S: Final = 10.0
"""A machine that is stopped by a debugger, or starved, does not answer."""
RECONNECT_PAUSE_MIN_S: Final = 0.1
RECONNECT_PAUSE_MAX_S: Final = 5.0


class FollowingFilter(Protocol):
    """What the follower needs of `mpassthru.broker.guest_filter.GuestFilter`."""

    in_force: Filter

    def ask(self, asked: Filter) -> None:
        """The guest asks for this."""


class QemuFollower:
    """Connects to QEMU's monitor, and again when it has gone away.

    Args:
        path: Of the monitor's socket.
        guest_filter: Is told what the guest asks for.
        status: Of the port: the filter in force is shown there.
        say: Called with one line for what the user should know.
        socket_path: The port's vhost-user socket, by which the device is found; None if it has no path.
        nic: What the user calls the device.
    """

    def __init__(
        self,
        path: Path,
        guest_filter: FollowingFilter,
        status: PortStatus,
        say: Callable[[str], None],
        *,
        socket_path: Path | None,
        nic: str | None = None,
    ) -> None:
        self._path = path
        self._filter = guest_filter
        self._status = status
        self._say = say
        self._socket_path = socket_path
        self._nic = nic
        self._told = ""
        self._news = asyncio.Event()
        self._link = True
        self._owes_link = False
        """It may be down because of us."""
        status.filter = str(guest_filter.in_force)

    def set_link(self, up: bool) -> None:
        """The guest's link is to be up, or down, from now on; up it was until now."""
        self._link = up
        self._news.set()

    async def run(self) -> None:
        """Follow until cancelled."""
        now_s = asyncio.get_running_loop().time
        pause_s = RECONNECT_PAUSE_MIN_S
        while True:
            since_s = now_s()
            try:
                client = await QmpClient.open(self._path)
                with contextlib.closing(client):
                    async with asyncio.timeout(ANSWER_TIMEOUT_S):
                        await client.negotiate()
                    await self._follow(client)
            except (HostError, QmpError) as error:
                self._tell(f"{error}; trying again, until then the guest's filter stays as it is")
            except TimeoutError:
                self._tell(f"QEMU's monitor {self._path} does not answer, or has another client; trying again")
            if now_s() - since_s > RECONNECT_PAUSE_MAX_S:
                pause_s = RECONNECT_PAUSE_MIN_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RECONNECT_PAUSE_MAX_S)

    async def _follow(self, client: QmpClient) -> None:
        """Follow in one session until it ends."""
        while True:
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    nic = await find_nic(client, socket_path=self._socket_path, name=self._nic)
                    await self._look(client, nic)
                self._tell(f"QEMU's monitor {self._path} tells what the guest asks {nic} for")
                await self._look_at_changes(client, nic)
            except NicNotFoundError as error:
                self._tell(f"{error}; looking again")
                await asyncio.sleep(LOOK_INTERVAL_S)

    async def _look_at_changes(self, client: QmpClient, nic: str) -> None:
        while True:
            await asyncio.sleep(QUERIES_PAUSE_S)
            await self._until_news(client)
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self._look(client, nic)

    async def _until_news(self, client: QmpClient) -> None:
        """Wait for a notice of QEMU's, for one of ours, or for as long as one may be missing.

        Raises:
            QmpError: the session has ended.
        """
        notice = asyncio.create_task(client.wait_event("NIC_RX_FILTER_CHANGED"))
        ours = asyncio.create_task(self._news.wait())
        try:
            await asyncio.wait({notice, ours}, timeout=LOOK_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            notice.cancel()
            ours.cancel()
            outcome, _ = await asyncio.gather(notice, ours, return_exceptions=True)
        if isinstance(outcome, Exception):
            raise outcome

    async def _look(self, client: QmpClient, nic: str) -> None:
        self._news.clear()
        asked = (await read_filter(client, nic)).asked()
        try:
            self._filter.ask(asked)
        except MpassthruError as error:
            self._tell(f"{error}; trying again")
        self._status.filter = str(self._filter.in_force)
        await self._tell_link(client, nic)

    async def _tell_link(self, client: QmpClient, nic: str) -> None:
        if await is_awaited(client):
            self._owes_link = True
        elif not self._link:
            await client.execute("set_link", name=nic, up=False)
            self._owes_link = True
        elif self._owes_link:
            await client.execute("set_link", name=nic, up=True)
            self._owes_link = False

    def _tell(self, line: str) -> None:
        """Say what has changed since the last line, and nothing twice in a row."""
        if line != self._told:
            self._told = line
            self._say(line)
