"""The filter of a port on a real interface: NIC and program follow what the guest asks for, as far as it is allowed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import msgspec
import pytest
from test_address_filter import groups, promiscuity

from mpassthru.broker.guest_filter import GuestFilter, Steer
from mpassthru.netdev import read_address, read_interface
from mpassthru.steering import EVERYTHING, NOTHING, Filter
from mpassthru.testing.netns import Namespace

STATION = bytes.fromhex("525400123456")
OTHER = bytes.fromhex("525400123457")
GROUP = bytes.fromhex("01005e010203")


@dataclass
class RecordedProgram:
    filters: list[Filter] = field(default_factory=list)

    def set_filter(self, filter: Filter) -> None:
        self.filters.append(filter)


def asks(*unicast: bytes, multicast: tuple[bytes, ...] | None = (), vlans: tuple[int, ...] | None = ()) -> Filter:
    return Filter(unicast=unicast, multicast=multicast, broadcast=True, vlans=vlans)


def allowed(**changes: object) -> Filter:
    return msgspec.structs.replace(EVERYTHING, **changes)


async def test_guest_gets_nothing_before_it_is_known_and_then_what_it_asks_for(veth: Namespace) -> None:
    guest, program = GuestFilter(Steer(kind="mac"), follows=True), RecordedProgram()
    host = read_address(veth.ifindex)
    with guest.applied_to(await read_interface(veth.ifname), program):
        assert program.filters == [msgspec.structs.replace(NOTHING, host_address=host)]
        assert promiscuity(veth) == 0
        guest.ask(asks(STATION, multicast=(GROUP,)))
        assert program.filters[-1] == msgspec.structs.replace(asks(STATION, multicast=(GROUP,)), host_address=host)
        assert GROUP.hex(":") in groups(veth)
        guest.ask(EVERYTHING)
        assert promiscuity(veth) == 1
        assert GROUP.hex(":") not in groups(veth)
    assert promiscuity(veth) == 0


async def test_what_is_asked_for_again_is_not_set_again_but_a_new_address_of_the_host_is(veth: Namespace) -> None:
    guest, program = GuestFilter(Steer(kind="mac"), follows=True), RecordedProgram()
    with guest.applied_to(await read_interface(veth.ifname), program):
        for _ in range(3):
            guest.ask(asks(STATION))
        assert len(program.filters) == 2
        veth.run("ip", "link", "set", "dev", veth.ifname, "address", OTHER.hex(":"))
        guest.ask(asks(STATION))
        assert program.filters[-1].host_address == OTHER


@pytest.mark.parametrize("asked", [EVERYTHING, asks(STATION, OTHER, multicast=None, vlans=(5, 7))])
async def test_options_bound_what_a_guest_can_ask_for(veth: Namespace, asked: Filter) -> None:
    bounds = allowed(unicast=(STATION,), multicast=(GROUP,), broadcast=False, vlans=(5,))
    guest, program = GuestFilter(Steer(kind="mac", allowed=bounds), follows=True), RecordedProgram()
    with guest.applied_to(await read_interface(veth.ifname), program):
        assert guest.in_force == bounds
        guest.ask(asked)
        assert guest.in_force == bounds
        guest.ask(asks(OTHER, vlans=(7,)))
        assert guest.in_force == Filter(unicast=(), multicast=(), broadcast=False, vlans=())


async def test_hosts_own_address_is_the_guests_only_if_it_was_given_by_name(veth: Namespace) -> None:
    host = read_address(veth.ifindex)
    for bounds, kept in ((EVERYTHING, host), (allowed(unicast=(host,)), None)):
        program = RecordedProgram()
        with GuestFilter(Steer(kind="mac", allowed=bounds)).applied_to(await read_interface(veth.ifname), program):
            assert program.filters[-1].host_address == kept


async def test_queue_of_the_guests_own_has_a_filter_at_the_nic_alone(veth: Namespace) -> None:
    guest, program = GuestFilter(Steer(kind="passthru"), follows=True), RecordedProgram()
    with guest.applied_to(await read_interface(veth.ifname), program):
        assert promiscuity(veth) == 1  # nobody knows yet whom it is for
        guest.ask(asks(multicast=(GROUP,)))
        assert promiscuity(veth) == 0
        assert GROUP.hex(":") in groups(veth)
    assert program.filters == []


async def test_port_that_moves_has_its_filter_on_both_interfaces(veth: Namespace) -> None:
    guest, programs = GuestFilter(Steer(kind="mac"), follows=True), (RecordedProgram(), RecordedProgram())
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(guest.applied_to(await read_interface(veth.ifname), programs[0]))
        guest.ask(asks(STATION))
        second.enter_context(guest.applied_to(await read_interface(veth.peer), programs[1]))
        assert programs[1].filters[-1].unicast == (STATION,)
        first.close()
        guest.ask(asks(OTHER))
        assert programs[0].filters[-1].unicast == (STATION,)
        assert programs[1].filters[-1].unicast == (OTHER,)
