"""What the monitor tells of a real interface, while it is changed in every way that a port has to hear of."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest

from mpassthru import _core
from mpassthru.errors import HostError
from mpassthru.netdev import link_monitor
from mpassthru.netdev.link_events import (
    Appeared,
    CarrierChanged,
    LinkEvent,
    LinkState,
    Moved,
    MtuChanged,
    NotificationsLost,
    QueuesChanged,
    Removed,
    Renamed,
    SetUp,
    XdpProgramChanged,
)
from mpassthru.netdev.link_monitor import LinkMonitor
from mpassthru.testing.netns import Namespace, empty_namespace, move_interface

TIMEOUT_S = 10.0
NEVER_S = 3600.0
"""Between two looks: only notifications are a reason."""


@dataclass
class Heard:
    """What a monitor tells."""

    monitor: LinkMonitor = field(init=False)
    events: list[LinkEvent] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def hear(self, events: tuple[LinkEvent, ...]) -> None:
        self.events += events
        self.news.set()

    def hear_trouble(self, line: str) -> None:
        self.troubles.append(line)
        self.news.set()

    async def until(self, *events: LinkEvent) -> None:
        """Wait for these events, and forget them."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while len(self.events) < len(events):
                    self.news.clear()
                    await self.news.wait()
        except TimeoutError:
            raise AssertionError(f"heard only {self.events}, not {events}") from None
        assert tuple(self.events) == events
        self.events.clear()


@contextlib.asynccontextmanager
async def listening(namespace: Namespace, *, interval_s: float = NEVER_S) -> AsyncIterator[Heard]:
    heard = Heard()
    heard.monitor = LinkMonitor(heard.hear, heard.hear_trouble, interval_s=interval_s)
    heard.monitor.follow(namespace.ifname, namespace.ifindex)
    running = asyncio.create_task(heard.monitor.run())
    try:
        await asyncio.wait_for(heard.news.wait(), TIMEOUT_S)  # the first look
        yield heard
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
def elsewhere() -> Iterator[int]:
    with empty_namespace() as fd:
        yield fd


async def test_link_and_carrier_are_told_apart(veth: Namespace) -> None:
    async with listening(veth) as heard:
        assert heard.events == []
        veth.run("ip", "link", "set", "dev", veth.peer, "down")
        await heard.until(CarrierChanged(False))
        veth.run("ip", "link", "set", "dev", veth.peer, "up")
        await heard.until(CarrierChanged(True))
        veth.run("ip", "link", "set", "dev", veth.ifname, "down")
        await heard.until(SetUp(False), CarrierChanged(False))


async def test_a_renamed_interface_is_still_the_one(veth: Namespace) -> None:
    async with listening(veth) as heard:
        veth.run("ip", "link", "set", "dev", veth.ifname, "name", "other0")
        await heard.until(Renamed("other0"))
        veth.run("ip", "link", "set", "dev", "other0", "mtu", "1400")
        await heard.until(MtuChanged(1400))
        veth.run("ip", "link", "set", "dev", "other0", "name", veth.ifname)
        await heard.until(Renamed(veth.ifname))


async def test_a_rename_between_two_parts_of_a_look_is_no_removal(
    veth: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = "mpassthru.netdev.reader.ethtool.read_queues"
    read_queues = link_monitor.read_link.__globals__["ethtool"].read_queues
    names: list[str] = []

    def rename_first(ifname: str, **counts: int) -> object:
        names.append(ifname)
        if len(names) == 1:
            veth.run("ip", "link", "set", "dev", ifname, "name", "other0")
        return read_queues(ifname, **counts)

    monkeypatch.setattr(reader, rename_first)
    state = await link_monitor.read_link(veth.ifname, veth.ifindex)
    assert state is not None
    assert names == [veth.ifname, "other0"]
    assert (state.name, state.ifindex) == ("other0", veth.ifindex)


async def test_queues_are_told_of(veth_two_queues: Namespace) -> None:
    veth = veth_two_queues
    async with listening(veth) as heard:
        veth.run("ethtool", "-L", veth.ifname, "rx", "1", "tx", "1")
        await heard.until(QueuesChanged(rx=1, tx=1))
        veth.run("ethtool", "-L", veth.ifname, "rx", "2")
        await heard.until(QueuesChanged(rx=2, tx=1))


async def test_removal_is_told_of_and_a_successor_is_found_by_its_name(veth: Namespace) -> None:
    async with listening(veth) as heard:
        veth.run("ip", "link", "del", "dev", veth.ifname)
        await heard.until(Removed())
        assert heard.monitor.state is None
        heard.monitor.follow(veth.ifname, None)
        veth.run("ip", "link", "add", "unrelated", "type", "veth")
        veth.run("ip", "link", "add", veth.ifname, "type", "veth", "peer", "name", veth.peer)
        await heard.until(Appeared(veth.ifname))
        state: LinkState | None = heard.monitor.state
        assert state is not None
        assert (state.up, state.ifindex != veth.ifindex) == (False, True)


async def test_a_move_to_another_namespace_is_no_removal(veth: Namespace, elsewhere: int) -> None:
    async with listening(veth) as heard:
        move_interface(veth.ifname, source=veth.fd, target=elsewhere)
        await heard.until(Moved())
        move_interface(veth.ifname, source=elsewhere, target=veth.fd)
        await heard.until(Appeared(veth.ifname))


async def test_an_interface_that_was_away_between_two_looks_is_told_of(veth: Namespace, elsewhere: int) -> None:
    async with listening(veth) as heard:
        move_interface(veth.ifname, source=veth.fd, target=elsewhere)
        move_interface(veth.ifname, source=elsewhere, target=veth.fd)
        await heard.until(Moved(), Appeared(veth.ifname))
        assert heard.monitor.state is not None
        assert heard.monitor.state.ifindex == veth.ifindex, "all that could tell is gone"


async def test_a_program_that_comes_or_goes_by_a_link_is_found_without_a_notification(veth: Namespace) -> None:
    async with listening(veth, interval_s=0.01) as heard:
        program = _core.SteeringProgram.attach(veth.ifindex, xdp_mode="native", queue_count=1)
        async with asyncio.timeout(TIMEOUT_S):
            while not heard.events:
                heard.news.clear()
                await heard.news.wait()
        (event,) = heard.events
        assert isinstance(event, XdpProgramChanged)
        assert event.program_id is not None
        heard.events.clear()
        program.close()
        await heard.until(XdpProgramChanged(None))


async def test_lost_notifications_are_a_reason_to_look(veth: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = link_monitor._open_link_group

    def with_little_room() -> socket.socket:
        sock = opened()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)  # the least that there is
        return sock

    monkeypatch.setattr(link_monitor, "_open_link_group", with_little_room)
    async with listening(veth) as heard:
        for mtu in range(1000, 1010):
            veth.run("ip", "link", "set", "dev", veth.ifname, "mtu", str(mtu))
        await heard.until(NotificationsLost(), MtuChanged(1009))


async def test_what_cannot_be_read_is_told_once_and_tried_again(
    veth: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0
    read_link = link_monitor.read_link

    async def failing(ifname: str, ifindex: int | None = None) -> LinkState | None:
        nonlocal tries
        tries += 1
        if tries % 5:
            raise HostError(105, "cannot read interface mpt0 (ENOBUFS): free some memory")
        return await read_link(ifname, ifindex)

    async with listening(veth, interval_s=0.01) as heard:
        monkeypatch.setattr(link_monitor, "read_link", failing)
        veth.run("ip", "link", "set", "dev", veth.ifname, "mtu", "1400")
        await heard.until(MtuChanged(1400))
        veth.run("ip", "link", "set", "dev", veth.ifname, "mtu", "1401")
        await heard.until(MtuChanged(1401))
        assert tries >= 10
        assert set(heard.troubles) == {
            "cannot read interface mpt0 (ENOBUFS): free some memory; trying again every 0.01 s"
        }
        assert len(heard.troubles) <= tries // 5 + 1
