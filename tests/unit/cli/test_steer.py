"""Options that say which frames are the guest's: read in the usual forms, refused with a reason."""

from __future__ import annotations

import pytest
import typer

from mpassthru.broker.guest_filter import Steer
from mpassthru.cli.steer import parse_group, parse_mac, parse_vlans, steer_by
from mpassthru.steering import EVERYTHING, TABLE_MAX, Filter

MAC = "52:54:00:12:34:56"
GROUP = "01:00:5e:00:00:fb"


@pytest.mark.parametrize("text", [MAC, "52-54-00-12-34-56", "52:54:00:AB:cd:EF"])
def test_mac_is_read_in_the_usual_forms(text: str) -> None:
    assert parse_mac(text) == bytes.fromhex(text.replace(":", "").replace("-", ""))


@pytest.mark.parametrize(
    ("text", "said"),
    [(MAC, "not the address of a multicast"), ("ff:ff:ff:ff:ff:ff", "multicast"), ("01:00", "not a MAC")],
)
def test_other_addresses_are_no_groups(text: str, said: str) -> None:
    with pytest.raises(typer.BadParameter, match=said):
        parse_group(text)
    assert parse_group(GROUP) == bytes.fromhex("01005e0000fb")


@pytest.mark.parametrize(
    ("text", "vlans"),
    [("all", None), ("none", ()), ("5", (5,)), ("7,5,5", (5, 7)), ("1-3,4094", (1, 2, 3, 4094)), ("9-9", (9,))],
)
def test_vlans_are_numbers_and_ranges(text: str, vlans: tuple[int, ...] | None) -> None:
    assert parse_vlans(text) == vlans


@pytest.mark.parametrize("text", ["", "5,", "-5", "five", "0", "4095", "7-5", "5,9-8", "1-", "1-2-3", "5 7", "99999"])
def test_what_is_no_list_of_vlans_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="VLANs"):
        parse_vlans(text)


def steer(
    kind: str,
    *macs: str,
    groups: tuple[str, ...] = (),
    vlans: str = "all",
    multicast: bool = True,
    follows: bool = False,
) -> Steer:
    assert kind in ("passthru", "mac")
    return steer_by(
        "mac" if kind == "mac" else "passthru",
        list(macs),
        groups=list(groups),
        vlans=vlans,
        broadcast=True,
        multicast=multicast,
        follows=follows,
    )


def test_nothing_said_is_everything_of_the_queue() -> None:
    assert steer("passthru") == Steer(kind="passthru", allowed=EVERYTHING)


def test_each_address_counts_once() -> None:
    mac, group = bytes.fromhex("525400123456"), bytes.fromhex("01005e0000fb")
    given = steer("mac", MAC, MAC.upper(), groups=(GROUP, GROUP), vlans="none")

    assert given.allowed == Filter(unicast=(mac,), multicast=(group,), broadcast=True, vlans=())


def test_guest_that_is_followed_needs_no_address_and_may_have_any() -> None:
    assert steer("mac", follows=True) == Steer(kind="mac", allowed=EVERYTHING)
    assert steer("mac", MAC, follows=True) == steer("mac", MAC)


def test_no_multicast_is_an_empty_table() -> None:
    assert steer("mac", MAC, multicast=False).allowed.multicast == ()
    assert steer("mac", MAC).allowed.multicast is None


def test_more_addresses_than_the_program_has_room_for_are_refused() -> None:
    macs = [f"02:00:00:00:00:{index:02x}" for index in range(TABLE_MAX + 1)]

    assert len(steer("mac", *macs[:-1]).allowed.unicast or ()) == TABLE_MAX
    with pytest.raises(typer.BadParameter, match="64 times, not 65"):
        steer("mac", *macs)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "passthru", "groups": (GROUP,)}, "are about --steer mac"),
        ({"kind": "passthru", "vlans": "5"}, "are about --steer mac"),
        ({"kind": "mac"}, "--steer mac needs --mac"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options: dict[str, str], said: str) -> None:
    with pytest.raises(typer.BadParameter, match=said):
        steer(**options)  # type: ignore[arg-type]
    with pytest.raises(typer.BadParameter, match="do not fit together"):
        steer("mac", MAC, groups=(GROUP,), multicast=False)
