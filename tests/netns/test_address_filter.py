"""A port's interface takes in what is addressed to the guest, for as long as the port is there."""

from __future__ import annotations

import json
from pathlib import Path

from mpassthru.broker.address_filter import receive_for_guest
from mpassthru.testing.attached_port import attached_port
from mpassthru.testing.netns import Namespace


def promiscuity(namespace: Namespace) -> int:
    (link,) = json.loads(namespace.run("ip", "-d", "-j", "link", "show", "dev", namespace.ifname))
    return int(link["promiscuity"])


async def test_attached_interface_is_promiscuous_until_the_port_ends(veth: Namespace, tmp_path: Path) -> None:
    async with attached_port(veth, tmp_path / "port.sock") as port:
        await port.until_said("ready")
        assert promiscuity(veth) == 1
        await port.stop()
    assert promiscuity(veth) == 0


def test_one_address_is_asked_for_until_the_socket_is_closed(veth: Namespace) -> None:
    # A veth has no list of addresses: the kernel makes it promiscuous while it is asked for one.
    with receive_for_guest(veth.ifname, veth.ifindex, bytes.fromhex("525400123456")):
        assert promiscuity(veth) == 1
    assert promiscuity(veth) == 0
