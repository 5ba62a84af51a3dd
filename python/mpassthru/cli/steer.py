"""Which frames are the guest's, as options say it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

import typer

from mpassthru.broker.guest_filter import Steer
from mpassthru.steering import TABLE_MAX, VLAN_MAX, Filter

_BROADCAST = b"\xff" * 6


def steer_by(
    kind: Literal["passthru", "mac"],
    macs: list[str],
    *,
    groups: list[str],
    vlans: str,
    broadcast: bool,
    multicast: bool,
    follows: bool = False,
) -> Steer:
    """Read the options that say which frames are the guest's; with `follows` (`--qmp`) which may be.

    Raises:
        typer.BadParameter: one cannot be read, or they do not fit together.
    """
    if kind == "mac" and not macs and not follows:
        raise typer.BadParameter("--steer mac needs --mac, the guest's address, or --qmp, which tells it")
    if kind == "passthru" and (groups or vlans != "all" or not broadcast or not multicast):
        raise typer.BadParameter(
            "--multicast-group, --vlans, --no-broadcast and --no-multicast are about --steer mac; "
            "without it the guest gets all"
        )
    if groups and not multicast:
        raise typer.BadParameter("--multicast-group and --no-multicast do not fit together")
    return Steer(
        kind=kind,
        allowed=Filter(
            unicast=parse_macs("--mac", macs) if macs else None,
            multicast=_table("--multicast-group", map(parse_group, groups)) if groups or not multicast else None,
            broadcast=broadcast,
            vlans=parse_vlans(vlans),
        ),
    )


def parse_macs(option: str, texts: Iterable[str]) -> tuple[bytes, ...]:
    """What an option said of stations' addresses.

    Raises:
        typer.BadParameter: one is none, or they are too many.
    """
    return _table(option, map(parse_mac, texts))


def parse_mac(text: str) -> bytes:
    """A station's MAC address.

    Raises:
        typer.BadParameter: not six pairs of hexadecimal digits, or a group address.
    """
    mac = _parse_address(text)
    if mac[0] & 1:
        raise typer.BadParameter(f"{text} is a group address; a guest has a station address")
    return mac


def parse_group(text: str) -> bytes:
    """The address of a multicast group.

    Raises:
        typer.BadParameter: not six pairs of hexadecimal digits, or another kind of address.
    """
    mac = _parse_address(text)
    if not mac[0] & 1 or mac == _BROADCAST:
        raise typer.BadParameter(f"{text} is not the address of a multicast group, such as 01:00:5e:00:00:fb")
    return mac


def parse_vlans(text: str) -> tuple[int, ...] | None:
    """VLANs: `all` (None), `none`, or numbers and ranges.

    Raises:
        typer.BadParameter: anything else.
    """
    if text in ("all", "none"):
        return None if text == "all" else ()
    if not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", text):
        raise typer.BadParameter(f"{text!r} is not a list of VLANs; write it like 5,7,100-199, or all, or none")
    vlans: set[int] = set()
    for part in text.split(","):
        first, last = (int(end) for end in (part.split("-") * 2)[:2])
        if not 1 <= first <= last <= VLAN_MAX:
            raise typer.BadParameter(f"VLANs are numbered from 1 to {VLAN_MAX}; {part} is not of them")
        vlans.update(range(first, last + 1))
    return tuple(sorted(vlans))


def _parse_address(text: str) -> bytes:
    if not re.fullmatch(r"[0-9A-Fa-f]{2}([:-][0-9A-Fa-f]{2}){5}", text):
        raise typer.BadParameter(f"{text!r} is not a MAC address; write it like 52:54:00:12:34:56")
    return bytes.fromhex(text.replace(":", "").replace("-", ""))


def _table(option: str, addresses: Iterable[bytes]) -> tuple[bytes, ...]:
    table = tuple(dict.fromkeys(addresses))
    if len(table) > TABLE_MAX:
        raise typer.BadParameter(f"{option} can be given {TABLE_MAX} times, not {len(table)}")
    return table
