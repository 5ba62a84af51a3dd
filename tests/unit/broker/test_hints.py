"""Hints: said when something has lasted, once for each session, and not to those who need none."""

from __future__ import annotations

import msgspec
import pytest

from mpassthru.broker.hints import QUEUEING_AFTER_S, UNSTARTED_AFTER_S, FrontendWatch, steering_notice
from mpassthru.broker.status import PortStatus
from mpassthru.control import GuestState
from mpassthru.steering import EVERYTHING


def looks(
    watch: FrontendWatch, guest: GuestState, times_s: list[float], *, session: int = 1, another_waits: bool = False
) -> list[str]:
    """What is said over a number of looks."""
    status = PortStatus(guest=guest, sessions=session)
    return [hint for now_s in times_s for hint in watch.look(status, now_s, another_waits=another_waits)]


def test_front_end_that_starts_nothing_is_hinted_at_once() -> None:
    watch = FrontendWatch()

    assert looks(watch, "connected", [0.0, UNSTARTED_AFTER_S - 0.1]) == []
    (hint,) = looks(watch, "connected", [UNSTARTED_AFTER_S, 100.0, 200.0])
    assert hint.startswith("connected, but not started: ")
    assert "share=on" in hint


def test_each_session_has_its_hint() -> None:
    watch = FrontendWatch()
    looks(watch, "connected", [0.0, 10.0])

    assert len(looks(watch, "connected", [20.0, 30.0], session=2)) == 1


@pytest.mark.parametrize("guest", ["running", "waiting"])
def test_guest_that_runs_and_port_that_waits_need_no_hint(guest: GuestState) -> None:
    assert looks(FrontendWatch(), guest, [0.0, 100.0, 200.0]) == []


def test_guest_that_ran_in_this_session_needs_no_hint() -> None:
    watch = FrontendWatch()
    looks(watch, "running", [0.0])

    assert looks(watch, "connected", [1.0, 100.0]) == []


def test_second_front_end_that_keeps_waiting_is_said_once() -> None:
    watch = FrontendWatch()

    assert looks(watch, "running", [0.0, QUEUEING_AFTER_S / 2], another_waits=True) == []
    (hint,) = looks(watch, "running", [QUEUEING_AFTER_S, 100.0], another_waits=True)
    assert hint.startswith("another front-end waits")


def test_successor_that_waits_for_a_moment_is_not_said() -> None:
    watch = FrontendWatch()
    looks(watch, "running", [0.0], another_waits=True)
    looks(watch, "running", [1.0])

    assert looks(watch, "running", [QUEUEING_AFTER_S], another_waits=True) == []


@pytest.mark.parametrize(
    ("broadcast", "multicast", "said"),
    [
        (True, None, ("(ARP, DHCP) goes to the guest alone", "discovery) to the guest alone")),
        (False, None, ("(ARP, DHCP) goes to the host alone", "discovery) to the guest alone")),
        (False, (), ("(ARP, DHCP) goes to the host alone", "discovery) to the host alone")),
        (
            True,
            (bytes.fromhex("01005e0000fb"),),
            ("to the guest alone", "but for the guest's groups, and these to the"),
        ),
    ],
)
def test_steering_by_address_says_who_goes_without(
    broadcast: bool, multicast: tuple[bytes, ...] | None, said: tuple[str, str]
) -> None:
    allowed = msgspec.structs.replace(EVERYTHING, broadcast=broadcast, multicast=multicast)
    notice = steering_notice("eth9", allowed)

    assert all(part in notice for part in said)
    assert "ip neigh replace" in notice
