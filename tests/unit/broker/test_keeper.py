"""What the keeper does in which order, where a model that looks only when all is at rest would not see it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
from keeper_world import QUEUES, UP, Host, ModelMonitor, ModelPort, Nic

from mpassthru.broker import binding as binding_module
from mpassthru.broker import keeper as keeper_module
from mpassthru.broker.binding_state import BindingState, Need
from mpassthru.broker.keeper import FLAP_PATIENCE_S, Keeper
from mpassthru.broker.options import AttachOptions
from mpassthru.errors import HostError, RefusedError
from mpassthru.netdev import Interface
from mpassthru.netdev.link_events import (
    CarrierChanged,
    LinkEvent,
    MtuChanged,
    NotificationsLost,
    Renamed,
    SetUp,
)

TIMEOUT_S = 5.0
SOON_S = 0.002


@dataclass
class Kept:
    """A kept port on eth0."""

    host: Host
    port: ModelPort
    keeper: Keeper
    monitor: ModelMonitor
    task: asyncio.Task[None]
    links: list[bool] = field(default_factory=list)
    moves: list[str] = field(default_factory=list)

    @property
    def nic(self) -> Nic:
        return self.host.nics["eth0"]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():  # noqa: ASYNC110 - nobody sets an Event
                await asyncio.sleep(SOON_S / 4)

    async def until_waiting(self, need: Need) -> str:
        def waits() -> bool:
            lack = self.port.status.lack
            return lack is not None and lack.need is need

        await self.until(waits)
        assert self.port.status.lack is not None
        return self.port.status.lack.reason

    def carrier(self, there: bool) -> None:
        self.monitor.state = replace(UP, carrier=there)
        self.monitor.hear((CarrierChanged(there),))

    async def until_bound(self) -> None:
        await self.until(lambda: self.keeper.state is BindingState.BOUND and self.port.binding is not None)


@contextlib.asynccontextmanager
async def kept(options: AttachOptions, nic: Nic) -> AsyncIterator[Kept]:
    host = Host({"eth0": nic, "eth1": Nic(3)})
    port = ModelPort(host)
    links: list[bool] = []
    moves: list[str] = []
    monitors: list[ModelMonitor] = []

    def make_monitor(hear: Callable[[tuple[LinkEvent, ...]], None], _trouble: object) -> ModelMonitor:
        monitors.append(ModelMonitor(hear))
        return monitors[0]

    interface = await host.find("eth0")
    assert interface is not None
    taken = await host.take(interface, options, 1, port)
    keeper = Keeper(
        options,
        port,
        taken,
        on_link=links.append,
        on_moved=moves.append,
        find=host.find,
        take=cast(Any, host.take),
        make_monitor=make_monitor,
    )
    await keeper.start()
    task = asyncio.create_task(keeper.run())
    try:
        yield Kept(host, port, keeper, monitors[0], task, links, moves)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        keeper.close()
        assert host.ours() == {}


COPY = AttachOptions(interface="eth0", queues=QUEUES, mode="copy")


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOOK_INTERVAL_S", "SECOND_LOOK_S", "DOWN_PATIENCE_S"):
        monkeypatch.setattr(keeper_module, name, SOON_S)
    monkeypatch.setattr(binding_module, "RELEASE_TIMEOUT_S", 0.0)
    monkeypatch.setattr("mpassthru.netdev.pci.dma_is_bounced", lambda: False)

    async def takes_every_socket(ifname: str, queue_id: int, mode: str) -> None:
        """No NIC is there to ask."""

    monkeypatch.setattr("mpassthru.broker.mode.probe_bind", takes_every_socket)


async def test_link_is_told_when_it_goes_and_comes() -> None:
    async with kept(COPY, Nic(2)) as k:
        assert (k.links, k.port.status.link) == ([], True)
        k.carrier(False)
        await k.until(lambda: k.links == [False])
        assert k.keeper.state is BindingState.BOUND
        k.carrier(True)
        await k.until(lambda: k.links == [False, True])
        await k.keeper.unbind()
        assert k.links == [False, True, False]


async def test_guest_that_moves_does_not_lose_its_link() -> None:
    async with kept(COPY, Nic(2)) as k:
        await k.keeper.bind("eth1")
        assert (k.links, k.port.status.link) == ([], True)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets seconds pass for keepers."""
    now_s = 0.0
    monkeypatch.setattr(Keeper, "_now_s", lambda _: now_s)

    def passes(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    return passes


async def test_link_that_flaps_in_zero_copy_mode_is_not_told_and_one_that_is_gone_is(
    clock: Callable[[float], None],
) -> None:
    async with kept(replace(COPY, mode="zero-copy"), Nic(2, driver="igc")) as k:
        for _ in range(3):
            k.carrier(False)
            await k.until(lambda: not k.port.status.link)
            clock(0.9 * FLAP_PATIENCE_S)
            k.carrier(True)
            await k.until(lambda: k.port.status.link)
        assert k.links == []
        k.carrier(False)
        await k.until(lambda: not k.port.status.link)
        assert k.links == []
        clock(1.1 * FLAP_PATIENCE_S)
        await k.until(lambda: k.links == [False])
        k.carrier(True)
        await k.until(lambda: k.links == [False, True])


async def test_link_that_goes_as_the_port_takes_a_nic_is_not_told(clock: Callable[[float], None]) -> None:
    async with kept(replace(COPY, mode="zero-copy"), Nic(2, driver="igc")) as k:
        await k.keeper.unbind()
        clock(2 * FLAP_PATIENCE_S)
        k.monitor.comes_with = replace(UP, carrier=False)
        await k.keeper.bind("eth0")
        assert (k.links, k.port.status.link) == ([False, True], False)
        clock(1.1 * FLAP_PATIENCE_S)
        await k.until(lambda: k.links == [False, True, False])


async def test_sockets_of_an_interface_that_is_down_are_closed_after_a_while_and_its_program_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeper_module, "DOWN_PATIENCE_S", 3600.0)
    async with kept(COPY, Nic(2)) as k:
        first = k.port.binding
        k.nic.up = False
        k.monitor.hear((SetUp(False),))
        await k.until_waiting(Need.UP)
        assert k.port.bindings == [first]
        k.nic.up = True
        k.monitor.hear((SetUp(True),))
        await k.until_bound()
        assert k.port.bindings == [first, first], "for a queue pair that tried in between"

        monkeypatch.setattr(keeper_module, "DOWN_PATIENCE_S", 0.0)
        k.nic.up = False
        k.monitor.hear((SetUp(False),))
        await k.until(lambda: k.port.binding is None)
        assert k.nic.program is not None
        k.nic.up = True
        k.monitor.hear((SetUp(True),))
        await k.until_bound()
        assert k.port.bindings == [first, first, None, first]


async def test_rules_that_no_longer_hold_close_the_sockets_first_and_auto_goes_on_in_copy_mode() -> None:
    async with kept(replace(COPY, mode="auto"), Nic(2, driver="igc")) as k:
        assert k.port.binding is not None
        assert k.port.binding.socket_mode == "zero-copy"
        k.nic.rx_fcs = True  # of which no event tells
        await k.until(lambda: len(k.port.bindings) == 3)
        _, none, last = k.port.bindings
        assert none is None
        assert last is not None
        assert (last.socket_mode, last.serial) == ("copy", 2)
        assert k.keeper.state is BindingState.BOUND


async def test_mode_that_was_forced_and_cannot_be_had_any_more_is_waited_for() -> None:
    async with kept(replace(COPY, mode="zero-copy"), Nic(2, driver="igc")) as k:
        k.nic.rx_fcs = True
        reason = await k.until_waiting(Need.MODE)
        assert "cannot use zero-copy mode on eth0: with rx-fcs frames are longer than they may be" in reason
        assert k.nic.program is None
        k.nic.rx_fcs = False
        await k.until_bound()
        assert k.port.binding is not None
        assert k.port.binding.socket_mode == "zero-copy"


async def test_mtu_that_allows_zero_copy_again_brings_it_back() -> None:
    async with kept(replace(COPY, mode="auto"), Nic(2, driver="igc")) as k:
        for mtu_bytes, mode in ((2000, "copy"), (1500, "zero-copy")):
            k.nic.mtu_bytes = mtu_bytes
            k.monitor.hear((MtuChanged(mtu_bytes),))
            await k.until(lambda mode=mode: k.port.binding is not None and k.port.binding.socket_mode == mode)  # type: ignore[misc]


async def test_sockets_that_the_kernel_took_away_unheard_are_had_again() -> None:
    async with kept(COPY, Nic(2, sockets=(0, 1))) as k:
        k.port.status.socket_steered(1, "copy")
        k.monitor.hear(())
        await asyncio.sleep(5 * SOON_S)
        assert len(k.port.bindings) == 1
        k.nic.sockets = (0,)
        k.monitor.hear((NotificationsLost(),))
        await k.until(lambda: len(k.port.bindings) == 3)
        assert k.port.bindings[1] is None
        assert "waiting for eth0: it was away for a moment" in k.port.said


async def test_socket_that_is_just_being_exchanged_is_not_taken_for_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "SECOND_LOOK_S", 0.05)
    async with kept(COPY, Nic(2)) as k:
        k.port.status.socket_steered(0, "copy")
        k.monitor.hear(())
        await asyncio.sleep(0.02)
        k.nic.sockets = (0,)
        await asyncio.sleep(0.1)
        assert len(k.port.bindings) == 1


async def test_lost_notifications_count_where_the_kernel_does_not_name_sockets() -> None:
    async with kept(COPY, Nic(2, names_sockets=False)) as k:
        k.monitor.hear((NotificationsLost(),))
        await k.until(lambda: len(k.port.bindings) == 3)


async def test_renamed_interface_is_waited_for_by_its_last_name() -> None:
    async with kept(COPY, Nic(2)) as k:
        k.host.nics["new0"] = k.host.nics.pop("eth0")
        k.monitor.hear((Renamed("new0"),))
        await k.until(lambda: k.port.status.interface == "new0")
        assert k.moves == ["new0"]
        del k.host.nics["new0"]
        k.monitor.hear(())
        await k.until_waiting(Need.INTERFACE)
        assert k.monitor.followed == ("new0", None)


async def test_interface_that_cannot_be_read_ends_nothing_and_is_told_once() -> None:
    async with kept(COPY, Nic(2)) as k:
        find = k.host.find
        tries = 0

        async def failing(ifname: str, ifindex: int | None = None) -> Interface | None:
            nonlocal tries
            tries += 1
            if tries < 5:
                raise HostError(105, "cannot read interface eth0 (ENOBUFS)")
            return await find(ifname, ifindex)

        k.keeper._find = failing
        k.nic.mtu_bytes = 1400
        k.monitor.hear((MtuChanged(1400),))
        await k.until(lambda: k.port.binding is not None and k.port.binding.mtu_bytes == 1400)
        assert sum("ENOBUFS" in line for line in k.port.said) == 1


async def test_what_fails_again_and_again_is_tried_ever_later(monkeypatch: pytest.MonkeyPatch) -> None:
    async with kept(COPY, Nic(2)) as k:
        k.host.fail_take = 3
        k.nic.program = None
        k.monitor.hear(())
        await k.until_waiting(Need.KERNEL)
        assert k.keeper._retry_pause_s >= 2 * SOON_S
        await k.until_bound()
        assert k.keeper._retry_pause_s == SOON_S
        assert sum("cannot attach the XDP program" in line for line in k.port.said) == 1


async def test_interface_with_a_smaller_mtu_is_not_gone_to() -> None:
    async with kept(COPY, Nic(2)) as k:
        k.host.nics["eth1"].mtu_bytes = 1400
        with pytest.raises(RefusedError, match="its MTU is 1400, and the guest may count on 1500"):
            await k.keeper.bind("eth1")
        assert len(k.port.bindings) == 1
        k.host.nics["eth1"].mtu_bytes = 3000
        await k.keeper.bind("eth1")
        assert k.moves == ["eth1"]
        assert list(k.host.ours()) == ["eth1"]


async def test_worker_that_cannot_move_goes_back_and_the_port_stays_bound() -> None:
    async with kept(COPY, Nic(2)) as k:
        first = k.port.binding
        k.port.fail = 1
        with pytest.raises(HostError, match="is held"):
            await k.keeper.bind("eth1")
        assert (k.port.bindings, k.keeper.state) == ([first, first], BindingState.BOUND)
        assert list(k.host.ours()) == ["eth0"]


async def test_worker_that_cannot_even_go_back_is_bound_again_later() -> None:
    async with kept(COPY, Nic(2)) as k:
        k.port.fail = 2
        with pytest.raises(HostError, match="is held"):
            await k.keeper.bind("eth1")
        assert k.keeper.state is BindingState.WAITING
        await k.until_bound()
        assert list(k.host.ours()) == ["eth0"]


async def test_interface_that_a_worker_cannot_leave_is_given_back_and_can_be_had_again() -> None:
    async with kept(COPY, Nic(2)) as k:
        k.port.fail_unbind = 1
        with pytest.raises(HostError, match="cannot let go"):
            await k.keeper.unbind()
        assert (k.host.ours(), k.keeper.state) == ({}, BindingState.UNBOUND)
        await k.keeper.bind("eth0")
        assert list(k.host.ours()) == ["eth0"]


async def test_interface_that_is_lost_is_given_back_though_the_worker_cannot_leave_it() -> None:
    async with kept(COPY, Nic(2)) as k:
        k.port.fail_unbind = 1
        k.nic.rx_queues = 1
        k.monitor.hear(())
        await k.until_waiting(Need.QUEUE)
        await k.until(lambda: k.host.ours() == {})
        k.nic.rx_queues = QUEUES
        k.monitor.hear(())
        await k.until_bound()


async def test_interface_that_a_worker_can_neither_go_to_nor_come_back_from_is_given_back() -> None:
    async with kept(COPY, Nic(2)) as k:
        k.port.fail, k.port.fail_unbind = 2, 1
        with pytest.raises(HostError, match="cannot let go"):
            await k.keeper.bind("eth1")
        assert k.host.ours() == {}
        await k.until_bound()
        assert list(k.host.ours()) == ["eth0"]


@pytest.mark.parametrize("step", ["bind", "regain"])
async def test_interface_that_is_just_being_bound_is_given_back_at_the_end(step: str) -> None:
    reached = asyncio.Event()

    async def never_bound(binding: object, steering: object = None) -> None:
        if binding is not None:
            reached.set()
            await asyncio.get_running_loop().create_future()

    async with kept(COPY, Nic(2)) as k:
        if step == "regain":
            await k.keeper.unbind()
            k.port.status.binding = BindingState.WAITING
        k.port.rebind = never_bound  # type: ignore[method-assign]
        task = asyncio.create_task(k.keeper.bind("eth1") if step == "bind" else k.keeper._regain())
        await asyncio.wait_for(reached.wait(), TIMEOUT_S)
        assert len(k.host.ours()) == (2 if step == "bind" else 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    # `kept` has closed the keeper, and asserts that nothing of ours is left.
