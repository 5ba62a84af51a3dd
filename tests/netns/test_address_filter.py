"""A port's interface takes in what is addressed to the guest, for as long as the port is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpassthru.broker.address_filter import AddressFilter
from mpassthru.errors import HostError
from mpassthru.steering import EVERYTHING, Filter
from mpassthru.testing.attached_port import attached_port
from mpassthru.testing.netns import Namespace

STATION = bytes.fromhex("525400123456")
GROUP = bytes.fromhex("01005e010203")
OTHER_GROUP = bytes.fromhex("01005e010204")


def link(namespace: Namespace) -> dict[str, int]:
    (link,) = json.loads(namespace.run("ip", "-d", "-j", "link", "show", "dev", namespace.ifname))
    return {name: link[name] for name in ("promiscuity", "allmulti")}


def promiscuity(namespace: Namespace) -> int:
    return link(namespace)["promiscuity"]


def groups(namespace: Namespace) -> set[str]:
    """Multicast addresses that the interface receives."""
    (interface,) = json.loads(namespace.run("ip", "-j", "maddress", "show", "dev", namespace.ifname))
    return {entry["link"] for entry in interface["maddr"] if "link" in entry}


async def test_attached_interface_is_promiscuous_until_the_port_ends(veth: Namespace, tmp_path: Path) -> None:
    async with attached_port(veth, tmp_path / "port.sock") as port:
        await port.until_said("ready")
        assert promiscuity(veth) == 1
        await port.stop()
    assert promiscuity(veth) == 0


def wanted(*stations: bytes, groups: tuple[bytes, ...] | None = ()) -> Filter:
    return Filter(unicast=stations, multicast=groups, broadcast=True, vlans=None)


def test_one_address_is_asked_for_until_it_is_closed(veth: Namespace) -> None:
    # A veth has no list of addresses: the kernel makes it promiscuous while it is asked for one.
    with AddressFilter(veth.ifname, veth.ifindex) as addresses:
        addresses.receive(wanted(STATION))
        assert promiscuity(veth) == 1
    assert promiscuity(veth) == 0


def test_what_is_no_longer_wanted_is_given_back_and_the_rest_stays(veth: Namespace) -> None:
    with AddressFilter(veth.ifname, veth.ifindex) as addresses:
        addresses.receive(wanted(groups=(GROUP, OTHER_GROUP)))
        assert {GROUP.hex(":"), OTHER_GROUP.hex(":")} <= groups(veth)
        addresses.receive(wanted(groups=(OTHER_GROUP,)))
        assert GROUP.hex(":") not in groups(veth)
        assert OTHER_GROUP.hex(":") in groups(veth)
        addresses.receive(EVERYTHING)
        assert promiscuity(veth) == 1
        assert OTHER_GROUP.hex(":") not in groups(veth)
        addresses.receive(wanted())
        assert promiscuity(veth) == 0


def test_all_multicast_is_asked_for_where_the_guest_has_it(veth: Namespace) -> None:
    with AddressFilter(veth.ifname, veth.ifindex) as addresses:
        addresses.receive(wanted(groups=None))
        assert link(veth)["allmulti"] == 1
    assert link(veth)["allmulti"] == 0


def test_interface_that_is_gone_is_an_error_with_its_name(veth: Namespace) -> None:
    with AddressFilter(veth.ifname, veth.ifindex) as addresses:
        addresses.receive(wanted(STATION))
        veth.run("ip", "link", "del", veth.ifname)
        with pytest.raises(HostError, match=rf"have {veth.ifname} receive frames for the guest \(ENODEV\)"):
            addresses.receive(EVERYTHING)
