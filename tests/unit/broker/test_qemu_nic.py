"""What QEMU says of a device: what of it is believed, and which device is ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from played_monitor import Device, PlayedMonitor, rx_filter

from mpassthru.broker.qemu_nic import NicNotFoundError, RxFilter, find_nic, read_filter, wired_nics
from mpassthru.qmp import QmpClient, QmpProtocolError
from mpassthru.steering import EVERYTHING, TABLE_MAX, Filter

MAIN = bytes.fromhex("525400123456")
GROUP = bytes.fromhex("01005e000001")
# As QEMU 7.2 says it of a guest with two virtio-net devices of two queue pairs each, and a third on a tap.
INFO_NETWORK = (
    "net0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n"
    " \\ hostnet0: index=0,type=vhost-user,vhost-user0 to charnet0\r\n"
    "net0: index=1,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n"
    " \\ hostnet0: index=1,type=vhost-user,vhost-user1 to charnet0\r\n"
    "virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:57\r\n"
    " \\ net1: index=0,type=vhost-user,vhost-user0 to net1-socket\r\n"
    "virtio-net-pci.1: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:59\r\n"
    " \\ #net085: index=0,type=vhost-user,vhost-user0 to char3\r\n"
    "net2: index=0,type=nic,model=e1000e,macaddr=52:54:00:12:34:58\r\n"
    " \\ hostnet2: index=0,type=tap,ifname=tap0,script=no,downscript=no\r\n"
    "lonely: index=0,type=vhost-user,vhost-user0 to lost\r\n"
)


def asked(**changes: Any) -> Filter:
    return msgspec.convert(rx_filter(**changes), RxFilter).asked()


def macs(count: int, first_byte: int = 2) -> list[str]:
    return [bytes([first_byte, 0, 0, 0, 0, number]).hex(":") for number in range(count)]


def test_linux_guest_asks_for_its_address_and_its_groups() -> None:
    assert asked() == Filter(unicast=(MAIN,), multicast=(GROUP,), broadcast=True, vlans=())


def test_tables_are_taken_whole() -> None:
    wanted = asked(unicast_table=["02:00:00:00:00:01"], vlan="normal", vlan_table=[7, 5, 0])

    assert wanted.unicast == (bytes.fromhex("020000000001"), MAIN)
    assert wanted.vlans == (5, 7)


def test_promiscuous_guest_asks_for_everything_whatever_its_tables_say() -> None:
    assert asked(promiscuous=True, unicast="none", vlan="none") == EVERYTHING


@pytest.mark.parametrize("kind", ["unicast", "multicast"])
def test_states_and_overflow_count_for_their_kind(kind: str) -> None:
    assert getattr(asked(**{kind: "all"}), kind) is None
    assert getattr(asked(**{kind: "none"}), kind) == ()
    assert getattr(asked(**{f"{kind}_overflow": True}), kind) is None
    assert getattr(asked(**{kind: "none", f"{kind}_overflow": True}), kind) == ()


def test_more_than_the_program_has_room_for_is_all_of_the_kind() -> None:
    assert len(asked(unicast_table=macs(TABLE_MAX - 1)).unicast or ()) == TABLE_MAX
    assert asked(unicast_table=macs(TABLE_MAX)).unicast is None
    assert len(asked(multicast_table=macs(TABLE_MAX, 1)).multicast or ()) == TABLE_MAX
    assert asked(multicast_table=macs(TABLE_MAX + 1, 1)).multicast is None


def test_device_that_cannot_filter_vlans_has_all() -> None:
    assert asked(vlan="all").vlans is None


def test_addresses_of_the_other_kind_and_nonsense_match_nothing() -> None:
    wanted = asked(
        main_mac="01:00:5e:00:00:01",
        unicast_table=["ff:ff:ff:ff:ff:ff", "no address", "52:54:00:12:34:56\n"],
        multicast_table=["52:54:00:12:34:56", "ff:ff:ff:ff:ff:ff", ""],
        vlan="normal",
        vlan_table=[-1, 4096, 1 << 60],
    )

    assert wanted == Filter(unicast=(), multicast=(), broadcast=True, vlans=())


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "main_mac": st.text(max_size=20),
            "unicast_table": st.lists(st.text(max_size=20) | st.sampled_from(macs(80)), max_size=90),
            "multicast_table": st.lists(st.sampled_from(macs(80, 1)), max_size=90),
            "vlan_table": st.lists(st.integers(), max_size=20),
            "vlan": st.sampled_from(["normal", "none", "all"]),
        },
    )
)
def test_whatever_a_guest_writes_makes_a_filter_that_the_program_takes(changes: dict[str, Any]) -> None:
    wanted = asked(**changes)

    for table, group_bit in ((wanted.unicast, 0), (wanted.multicast, 1)):
        assert table is None or len(table) <= TABLE_MAX
        assert all(len(mac) == 6 and mac[0] & 1 == group_bit and mac != b"\xff" * 6 for mac in table or ())
    assert all(0 < vlan < 4096 for vlan in wanted.vlans or ())


def test_devices_are_found_with_their_back_ends() -> None:
    assert [tuple(each) for each in wired_nics(INFO_NETWORK)] == [
        ("net0", "hostnet0", "charnet0"),
        ("virtio-net-pci.0", "net1", "net1-socket"),
        ("virtio-net-pci.1", "#net085", "char3"),
    ]
    assert list(wired_nics("garbage\n \\ x: index=0,type=vhost-user,vhost-user0 to y\n")) == []


async def client_of(monitor: PlayedMonitor, path: Path) -> QmpClient:
    client = await QmpClient.open(path)
    await client.negotiate()
    return client


async def test_device_is_known_by_the_socket_or_by_name(tmp_path: Path) -> None:
    monitor = PlayedMonitor({name: Device(tmp_path / f"{name}.sock") for name in ("a", "b")})
    (tmp_path / "link").symlink_to(tmp_path / "b.sock")
    async with monitor.listening(tmp_path / "qmp"):
        client = await client_of(monitor, tmp_path / "qmp")
        assert await find_nic(client, socket_path=tmp_path / "b.sock", name=None) == "b"
        assert await find_nic(client, socket_path=tmp_path / "link", name=None) == "b"
        assert await find_nic(client, socket_path=None, name="host-a") == "a"
        assert await find_nic(client, socket_path=None, name="elsewhere") == "elsewhere"
        with pytest.raises(NicNotFoundError, match=r"no vhost-user network device on .*c.sock \(it has: a, b\)"):
            await find_nic(client, socket_path=tmp_path / "c.sock", name=None)
        with pytest.raises(NicNotFoundError, match=r"more than one .* known to be ours"):
            await find_nic(client, socket_path=None, name=None)
        del monitor.devices["a"]
        assert await find_nic(client, socket_path=None, name=None) == "b"
        client.close()


async def test_device_that_is_gone_is_not_found_and_nonsense_is_a_broken_protocol(tmp_path: Path) -> None:
    monitor = PlayedMonitor({"a": Device(tmp_path / "s")})
    async with monitor.listening(tmp_path / "qmp"):
        client = await client_of(monitor, tmp_path / "qmp")
        assert (await read_filter(client, "a")).asked().unicast == (MAIN,)
        with pytest.raises(NicNotFoundError, match="invalid net client name: b"):
            await read_filter(client, "b")
        monitor.devices["a"].filter["vlan-table"] = ["five"]
        with pytest.raises(QmpProtocolError, match="Expected `int`, got `str`"):
            await read_filter(client, "a")
        client.close()
