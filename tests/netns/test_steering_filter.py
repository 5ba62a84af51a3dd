"""Steering by address on a real veth, native and generic: which frames a filter gives to the guest, of every kind, and
that a frame meets one whole filter while filters are replaced."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Literal

import msgspec
import pytest

from mpassthru._core import SteeringProgram
from mpassthru.steering import EVERYTHING, NOTHING, TABLE_MAX, Filter
from mpassthru.testing.child import running_child
from mpassthru.testing.netns import Namespace
from mpassthru.testing.xsk import bound_xsk

GUEST = bytes.fromhex("020000000001")
SECOND = bytes.fromhex("02000000ff01")
HOST = bytes.fromhex("0200000000aa")
OTHER = bytes.fromhex("020000000002")
GROUP = bytes.fromhex("01005e000001")
OTHER_GROUP = bytes.fromhex("333300000001")
BROADCAST = b"\xff" * 6
SOURCE = bytes.fromhex("0200000000ff")
STATIONS = tuple(bytes([2, 1, 2, 3, 4, last]) for last in range(TABLE_MAX))
GROUPS = tuple(bytes([1, 1, 2, 3, 4, last]) for last in range(TABLE_MAX))

UNICAST = {GUEST, SECOND, OTHER, HOST, STATIONS[0], STATIONS[-1]}
MULTICAST = {GROUP, OTHER_GROUP, GROUPS[0], GROUPS[-1]}
ALL = UNICAST | MULTICAST | {BROADCAST}

VLAN = 4094
FRAMES_MIN = 300_000


@pytest.fixture(params=["native", "generic"])
def program(request: pytest.FixtureRequest, veth: Namespace) -> Iterator[SteeringProgram]:
    mode: Literal["native", "generic"] = request.param
    with closing(SteeringProgram.attach(veth.ifindex, xdp_mode=mode, queue_count=1)) as program:
        program.steer_queue(0, steer="mac")
        yield program


@pytest.fixture
def wire(veth: Namespace) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind((veth.peer, 0))
        yield sock


def passed(program: SteeringProgram) -> int:
    return program.counters()[0]["passed"]


def dropped(program: SteeringProgram) -> int:
    return program.counters()[0]["dropped_no_guest"]


def frame(destination: bytes, tags: bytes = b"", ethertype: int = 0x88B5) -> bytes:
    return (destination + SOURCE + tags + ethertype.to_bytes(2)).ljust(60, b"\x5a")


def tagged(vlan: int, *, tpid: int = 0x8100, priority: int = 0) -> bytes:
    return tpid.to_bytes(2) + (priority << 13 | vlan).to_bytes(2)


def goes_to_guest(program: SteeringProgram, wire: socket.socket, sent: bytes) -> bool:
    """Where a frame goes. No guest is there: what is for one is counted as such."""
    before = program.counters()[0]
    wire.send(sent)
    after = program.counters()[0]
    assert after["passed"] + after["dropped_no_guest"] == before["passed"] + before["dropped_no_guest"] + 1
    return after["dropped_no_guest"] > before["dropped_no_guest"]


def of(
    *unicast: bytes,
    multicast: tuple[bytes, ...] | None = (),
    broadcast: bool = False,
    vlans: tuple[int, ...] | None = None,
    host: bytes | None = None,
) -> Filter:
    return Filter(unicast=unicast, multicast=multicast, broadcast=broadcast, vlans=vlans, host_address=host)


@pytest.mark.parametrize(
    ("wanted", "for_guest"),
    [
        (NOTHING, set()),
        (EVERYTHING, ALL),
        (of(GUEST), {GUEST}),
        (of(GUEST, SECOND), {GUEST, SECOND}),
        (of(*STATIONS), {STATIONS[0], STATIONS[-1]}),
        (of(multicast=(GROUP,)), {GROUP}),
        (of(multicast=GROUPS), {GROUPS[0], GROUPS[-1]}),
        (of(multicast=None), MULTICAST),
        (of(broadcast=True), {BROADCAST}),
        (
            of(*STATIONS, multicast=GROUPS, broadcast=True),
            {STATIONS[0], STATIONS[-1], GROUPS[0], GROUPS[-1], BROADCAST},
        ),
        (msgspec.structs.replace(NOTHING, unicast=None), UNICAST),
        (msgspec.structs.replace(EVERYTHING, host_address=HOST), ALL - {HOST}),
        (of(GUEST, HOST, host=HOST), {GUEST}),
    ],
)
def test_filter_gives_the_guest_what_it_names_and_the_host_the_rest(
    program: SteeringProgram, wire: socket.socket, wanted: Filter, for_guest: set[bytes]
) -> None:
    program.set_filter(wanted)

    assert {mac for mac in ALL if goes_to_guest(program, wire, frame(mac))} == for_guest


def test_near_misses_of_each_table_are_the_hosts(program: SteeringProgram, wire: socket.socket) -> None:
    program.set_filter(of(GUEST, multicast=(GROUP,)))
    for address in (GUEST, GROUP):
        for bit in range(48):
            miss = (int.from_bytes(address) ^ 1 << bit).to_bytes(6)
            assert not goes_to_guest(program, wire, frame(miss)), miss.hex(":")


def test_without_a_filter_nothing_is_the_guests(program: SteeringProgram, wire: socket.socket) -> None:
    assert not any(goes_to_guest(program, wire, frame(mac)) for mac in ALL)


@pytest.mark.parametrize("vlans", [(), (5,), (1, 63, 64, 4094), tuple(range(1, 4095)), None])
def test_tagged_frames_are_the_guests_in_its_vlans_only(
    program: SteeringProgram, wire: socket.socket, vlans: tuple[int, ...] | None
) -> None:
    program.set_filter(of(GUEST, vlans=vlans))
    for vlan in (1, 2, 5, 6, 62, 63, 64, 65, 4093, 4094):
        for priority in (0, 7):
            sent = frame(GUEST, tagged(vlan, priority=priority))
            assert goes_to_guest(program, wire, sent) == (vlans is None or vlan in vlans), vlan
    assert not goes_to_guest(program, wire, frame(OTHER, tagged(5)))


def test_tags_that_name_no_vlan_of_the_guests_network_do_not_matter(
    program: SteeringProgram, wire: socket.socket
) -> None:
    program.set_filter(of(GUEST, vlans=()))

    assert goes_to_guest(program, wire, frame(GUEST))
    assert goes_to_guest(program, wire, frame(GUEST, tagged(0, priority=5)))
    assert goes_to_guest(program, wire, frame(GUEST, tagged(7, tpid=0x88A8)))  # a provider's tag: no filter of guests
    assert not goes_to_guest(program, wire, frame(GUEST, tagged(5) + tagged(6)))


@pytest.mark.parametrize("wanted", [EVERYTHING, of(GUEST, vlans=())])
def test_frame_that_ends_in_its_tag_is_judged_without_reading_on(
    program: SteeringProgram, wire: socket.socket, wanted: Filter
) -> None:
    program.set_filter(wanted)
    cut = (GUEST + SOURCE + tagged(5))[:15]

    assert goes_to_guest(program, wire, cut) == (wanted is EVERYTHING)


def test_replaced_filter_counts_from_the_next_frame_on(
    program: SteeringProgram, veth: Namespace, wire: socket.socket
) -> None:
    with bound_xsk(veth.ifindex) as guest:
        program.set_socket(0, guest.socket.fileno())
        for mac in (GUEST, SECOND, OTHER) * 3:
            program.set_filter(of(mac))
            for sent in (GUEST, SECOND, OTHER):
                wire.send(frame(sent))
            assert guest.receive() == frame(mac)
            assert guest.receive(timeout_s=0) is None


FLOOD = """
import socket, sys
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
    sock.bind((sys.argv[1], 0))
    frame = bytes.fromhex(sys.argv[2])
    while True:
        sock.send(frame)
"""


async def flipped(program: SteeringProgram, veth: Namespace, states: tuple[Filter, ...], *, flips: int) -> int:
    """Replace filters under a flood of tagged frames; how many of these went elsewhere than to the guest."""
    program.set_filter(states[0])
    sent = frame(GUEST, tagged(VLAN)).hex()
    async with running_child(sys.executable, "-c", FLOOD, veth.peer, sent, namespace=veth):
        replaced = 0
        while replaced < flips or dropped(program) < FRAMES_MIN:
            replaced += 1
            program.set_filter(states[replaced % len(states)])
    return passed(program)


# Each gives the frame to the guest for reasons of its own, which parts of two do not make: the flag that says whether
# the table of VLANs counts is at the beginning, and the frame's VLAN at the end of it.
STATES = (of(GUEST, vlans=(VLAN,)), EVERYTHING, of(*STATIONS[1:], GUEST, vlans=(VLAN,)), of(GUEST, vlans=None))


@pytest.mark.slow
async def test_frame_that_old_and_new_filter_give_to_the_guest_never_goes_elsewhere(
    program: SteeringProgram, veth: Namespace
) -> None:
    assert await flipped(program, veth, STATES, flips=1000) == 0


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_frame_never_goes_elsewhere_for_long(program: SteeringProgram, veth: Namespace) -> None:
    assert await flipped(program, veth, STATES, flips=20_000) == 0


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (of(GROUP), "01:00:5e:00:00:01 is a group address"),
        (of(BROADCAST), "ff:ff:ff:ff:ff:ff is a group address"),
        (of(host=GROUP), "group address"),
        (of(multicast=(GUEST,)), "02:00:00:00:00:01 is not the address of a multicast group"),
        (of(multicast=(BROADCAST,)), "not the address of a multicast group"),
        (of(*STATIONS, GUEST), "at most 64 addresses, not 65"),
        (of(vlans=(4096,)), "VLANs are numbered below 4096; 4096 is not"),
        (of(b""), "unicast"),
        (of(bytes(7)), "unicast"),
    ],
)
def test_filter_that_cannot_be_is_refused_and_the_old_one_stays(
    program: SteeringProgram, wire: socket.socket, refused: Filter, message: str
) -> None:
    program.set_filter(of(GUEST))
    with pytest.raises((ValueError, TypeError), match=message):
        program.set_filter(refused)
    assert goes_to_guest(program, wire, frame(GUEST))
