"""Following a guest through a monitor that tells once, goes away, comes back, says nothing, or says nonsense."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from played_monitor import Device, PlayedMonitor

from mpassthru.broker import qemu_follower
from mpassthru.broker.qemu_follower import QemuFollower
from mpassthru.broker.status import PortStatus
from mpassthru.errors import HostError
from mpassthru.steering import NOTHING, Filter

MAIN = bytes.fromhex("525400123456")
SECOND = bytes.fromhex("525400000002")


@dataclass
class RecordedFilter:
    """Does what it is asked, and remembers."""

    in_force: Filter = NOTHING
    asked: list[Filter] = field(default_factory=list)
    fail: HostError | None = None

    def ask(self, asked: Filter) -> None:
        self.asked.append(asked)
        if self.fail is not None:
            raise self.fail
        self.in_force = asked


@dataclass
class Harness:
    follower: QemuFollower
    filter: RecordedFilter
    status: PortStatus
    lines: list[str]
    monitor: PlayedMonitor
    path: Path
    running: asyncio.Task[None]

    async def until(self, condition: Callable[[], object], timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                assert not self.running.done(), self.running
                await asyncio.sleep(0.001)

    async def until_said(self, text: str) -> None:
        await self.until(lambda: any(text in line for line in self.lines))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_follower, "LOOK_INTERVAL_S", 0.2)
    monkeypatch.setattr(qemu_follower, "QUERIES_PAUSE_S", 0.01)
    monkeypatch.setattr(qemu_follower, "ANSWER_TIMEOUT_S", 0.5)
    monkeypatch.setattr(qemu_follower, "RECONNECT_PAUSE_MIN_S", 0.01)
    monkeypatch.setattr(qemu_follower, "RECONNECT_PAUSE_MAX_S", 0.05)


@asynccontextmanager
async def following(folder: Path) -> AsyncIterator[Harness]:
    """A follower that runs, of a monitor that nobody has started yet."""
    status, lines, recorded = PortStatus(), [], RecordedFilter()
    follower = QemuFollower(folder / "qmp", recorded, status, lines.append, socket_path=folder / "s")
    monitor = PlayedMonitor({"nic0": Device(folder / "s")})
    running = asyncio.create_task(follower.run())
    try:
        yield Harness(follower, recorded, status, lines, monitor, folder / "qmp", running)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_guest_gets_what_it_asks_for_and_then_what_it_changes(tmp_path: Path) -> None:
    async with following(tmp_path) as h, h.monitor.listening(h.path):
        await h.until(lambda: h.filter.in_force.unicast == (MAIN,))
        for address in (SECOND, MAIN, SECOND):
            h.monitor.change("nic0", main_mac=address.hex(":"))
            await h.until(lambda address=address: h.filter.in_force.unicast == (address,))
        assert h.status.filter == "1 address, broadcast, 1 group, no VLAN"
        await h.until_said("qmp tells what the guest asks nic0 for")
        assert sum("qmp tells what" in line for line in h.lines) == 1


async def test_change_without_a_notice_is_seen_at_the_next_look(tmp_path: Path) -> None:
    async with following(tmp_path) as h, h.monitor.listening(h.path):
        await h.until(lambda: h.filter.in_force.unicast == (MAIN,))
        h.monitor.devices["nic0"].notifies = False
        h.monitor.change("nic0", promiscuous=True)
        await h.until(lambda: h.filter.in_force.unicast is None)


async def test_guest_that_changes_without_end_costs_a_query_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu_follower, "QUERIES_PAUSE_S", 0.2)
    async with following(tmp_path) as h, h.monitor.listening(h.path):
        await h.until(lambda: h.filter.asked)
        began_s = asyncio.get_running_loop().time()
        queries = h.monitor.count("query-rx-filter")
        while h.monitor.count("query-rx-filter") < queries + 5:
            h.monitor.change("nic0", main_mac=SECOND.hex(":"))
            await asyncio.sleep(0.001)
        assert asyncio.get_running_loop().time() - began_s > 4 * 0.2


async def test_monitor_that_comes_late_and_goes_is_connected_to_again_and_the_filter_holds_meanwhile(
    tmp_path: Path,
) -> None:
    async with following(tmp_path) as h:
        await h.until_said("(ENOENT)")
        async with h.monitor.listening(h.path):
            await h.until(lambda: h.filter.in_force.unicast == (MAIN,))
        await h.until_said("QEMU closed its monitor; trying again, until then the guest's filter stays as it is")
        assert h.filter.in_force.unicast == (MAIN,)
        h.monitor.devices["nic0"].filter["main-mac"] = SECOND.hex(":")
        async with h.monitor.listening(h.path):
            await h.until(lambda: h.filter.in_force.unicast == (SECOND,))


async def test_monitor_that_says_nothing_is_told_once_and_tried_again(tmp_path: Path) -> None:
    async with following(tmp_path) as h, h.monitor.listening(h.path):
        h.monitor.mute = True
        await h.until(lambda: h.monitor.count("qmp_capabilities") >= 3)
        assert sum("does not answer" in line for line in h.lines) == 1
        h.monitor.mute = False
        await h.until(lambda: h.filter.in_force.unicast == (MAIN,))


async def test_nonsense_ends_the_session_and_not_the_follower(tmp_path: Path) -> None:
    async with following(tmp_path) as h, h.monitor.listening(h.path):
        h.monitor.devices["nic0"].filter["promiscuous"] = "perhaps"
        await h.until_said("QEMU's monitor answered query-rx-filter with what was not expected")
        h.monitor.devices["nic0"].filter["promiscuous"] = True
        await h.until(lambda: h.filter.in_force.unicast is None)


async def test_nonsense_that_nobody_asked_for_is_said_and_ends_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu_follower, "LOOK_INTERVAL_S", 60.0)
    async with following(tmp_path) as h, h.monitor.listening(h.path):
        await h.until(lambda: h.filter.asked)
        h.monitor.babble()
        await h.until_said("sent what is no message of its protocol")
        await h.until(lambda: h.monitor.count("qmp_capabilities") == 2)


async def test_device_that_is_plugged_in_later_is_found(tmp_path: Path) -> None:
    async with following(tmp_path) as h:
        device = h.monitor.devices.pop("nic0")
        async with h.monitor.listening(h.path):
            await h.until_said("no vhost-user network device on")
            h.monitor.devices["nic7"] = device
            await h.until(lambda: h.filter.in_force.unicast == (MAIN,))
            del h.monitor.devices["nic7"]
            await h.until_said("invalid net client name: nic7; looking again")
            assert h.filter.in_force.unicast == (MAIN,)


async def test_filter_that_the_kernel_refuses_is_said_and_asked_for_again(tmp_path: Path) -> None:
    async with following(tmp_path) as h:
        h.filter.fail = HostError(19, "cannot have eth9 receive frames for the guest (ENODEV): no")
        async with h.monitor.listening(h.path):
            await h.until_said("(ENODEV): no; trying again")
            h.filter.fail = None
            await h.until(lambda: h.filter.in_force.unicast == (MAIN,))


async def test_guest_hears_of_its_link_going_and_coming(tmp_path: Path) -> None:
    async with following(tmp_path) as h, h.monitor.listening(h.path):
        await h.until(lambda: h.filter.asked)
        device = h.monitor.devices["nic0"]
        h.follower.set_link(False)
        await h.until(lambda: not device.up)
        device.up = True  # as QEMU does when a back-end connects
        await h.until(lambda: not device.up)
        h.follower.set_link(True)
        await h.until(lambda: device.up)


async def test_link_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_follower, "LOOK_INTERVAL_S", 60.0)
    async with following(tmp_path) as h, h.monitor.listening(h.path):
        await h.until(lambda: h.filter.asked)
        for up in (False, True):
            h.follower.set_link(up)
            await h.until(lambda up=up: h.monitor.devices["nic0"].up == up)


async def test_link_that_somebody_else_set_down_is_left_down(tmp_path: Path) -> None:
    async with following(tmp_path) as h, h.monitor.listening(h.path):
        h.monitor.devices["nic0"].up = False
        h.follower.set_link(True)
        await h.until(lambda: len(h.filter.asked) >= 4)
        assert h.monitor.count("set_link") == 0


async def test_link_that_went_while_nobody_listened_is_told_later(tmp_path: Path) -> None:
    async with following(tmp_path) as h:
        h.follower.set_link(False)
        async with h.monitor.listening(h.path):
            await h.until(lambda: not h.monitor.devices["nic0"].up)
        h.follower.set_link(True)
        async with h.monitor.listening(h.path):
            await h.until(lambda: h.monitor.devices["nic0"].up)


async def test_guest_that_arrives_with_its_link_down_gets_it_up_once_it_is_there(tmp_path: Path) -> None:
    async with following(tmp_path) as h:
        h.monitor.status = "inmigrate"
        async with h.monitor.listening(h.path):
            await h.until(lambda: len(h.filter.asked) >= 3)
            assert h.monitor.count("set_link") == 0
            h.monitor.devices["nic0"].up = False
            h.monitor.status = "running"
            await h.until(lambda: h.monitor.devices["nic0"].up)
            await h.until(lambda: len(h.filter.asked) >= 6)
            assert h.monitor.count("set_link") == 1
