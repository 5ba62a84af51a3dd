"""Which mode a port gets: the best that is safe, or the one asked for; and every refusal says why and what else."""

from __future__ import annotations

import errno
from typing import Any

import msgspec
import pytest

from mpassthru.broker import mode as mode_module
from mpassthru.broker.mode import ZeroCopyOptions, choose_rules, confirmed, outgrown
from mpassthru.errors import HostError, RefusedError
from mpassthru.netdev import Interface, Offloads, QueueCounts, XdpFeatures
from mpassthru.rules import ZeroCopyRules

NIC = Interface(
    name="eth9",
    ifindex=9,
    mac="02:00:00:00:00:09",
    mtu_bytes=1500,
    up=True,
    operstate="up",
    driver="igb",
    bus_address="0000:3b:00.0",
    queues=QueueCounts(rx=2, tx=2, rx_max=8, tx_max=8),
    offloads=Offloads(rx_vlan_strip=False, lro=False, gro_hw=False),
    xdp_features=XdpFeatures(native=True, zero_copy=True, zero_copy_max_segments=1),
    xsk_queues=(),
)
UNKNOWN = msgspec.structs.replace(NIC, driver="newnic")


class Lines(list[str]):
    """What the user was told."""

    def say(self, line: str) -> None:
        self.append(line)


@pytest.fixture(autouse=True)
def _dma_is_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpassthru.netdev.pci.dma_is_bounced", lambda: False)


def choose(
    mode: Any, interface: Interface = NIC, options: ZeroCopyOptions | None = None, **others: Any
) -> tuple[ZeroCopyRules | None, Lines]:
    lines = Lines()
    return choose_rules(mode, interface, options or ZeroCopyOptions(), lines, **others), lines


def test_auto_takes_zero_copy_where_every_rule_holds_and_tells_its_bound_and_its_price() -> None:
    rules, lines = choose("auto")
    assert rules is not None
    assert "1552 bytes" in lines[0]
    assert "goes down and up" in lines[1]


@pytest.mark.parametrize(
    ("interface", "others", "reason"),
    [
        (UNKNOWN, {}, "nobody has yet read"),
        (NIC, {"steer": "mac"}, "ethtool -N eth9"),
        (NIC, {"xdp": "generic"}, "generic XDP"),
    ],
)
def test_what_stands_against_zero_copy_is_said_by_auto_and_refuses_a_forced_mode(
    interface: Interface, others: dict[str, str], reason: str
) -> None:
    rules, lines = choose("auto", interface, **others)
    assert rules is None
    assert reason in lines[0]
    with pytest.raises(RefusedError, match="or use --mode copy") as raised:
        choose("zero-copy", interface, **others)
    assert reason in str(raised.value)


def test_copy_mode_needs_no_rules() -> None:
    assert choose("copy") == (None, [])


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("copy", ZeroCopyOptions(bounce_only=True)),
        ("auto", ZeroCopyOptions(bounce_only=True)),
        ("copy", ZeroCopyOptions(frame_max_bytes=1518)),
    ],
)
def test_options_of_zero_copy_mode_are_refused_without_it(mode: str, options: ZeroCopyOptions) -> None:
    with pytest.raises(RefusedError, match="zero-copy mode"):
        choose(mode, NIC, options)


def test_unknown_driver_may_be_forced_to_bounce_everything() -> None:
    rules, lines = choose("zero-copy", UNKNOWN, ZeroCopyOptions(bounce_only=True))
    assert rules is not None
    assert rules.direct is False
    assert "bounce only" in lines[0]


def test_promise_is_named_where_it_sets_the_bound() -> None:
    rules, lines = choose("auto", NIC, ZeroCopyOptions(frame_max_bytes=1518))
    assert rules is not None
    assert rules.rx_write_max_bytes == 1518
    assert "as promised" in lines[0]


async def _unbindable(*_: object) -> None:
    raise HostError(errno.EINVAL, "cannot bind")


async def test_driver_that_does_not_take_the_socket_makes_auto_fall_back_and_a_forced_mode_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mode_module, "probe_bind", _unbindable)
    rules, lines = choose("auto")
    assert await confirmed(rules, "auto", NIC, (0,), lines, xdp_mode="native") is None
    assert "copy after all: cannot bind" in lines[-1]
    with pytest.raises(HostError, match="cannot bind"):
        await confirmed(rules, "zero-copy", NIC, (0,), lines, xdp_mode="native")


async def test_program_that_is_not_in_the_driver_rules_zero_copy_out() -> None:
    rules, lines = choose("auto")
    assert await confirmed(rules, "auto", NIC, (0,), lines, xdp_mode="generic") is None
    assert "not in its driver" in lines[-1]


async def test_bindable_queues_confirm_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[tuple[str, int, str]] = []

    async def probe(ifname: str, queue_id: int, mode: str) -> None:
        probed.append((ifname, queue_id, mode))

    monkeypatch.setattr(mode_module, "probe_bind", probe)
    rules, lines = choose("auto")
    assert await confirmed(rules, "auto", NIC, (0, 1), lines, xdp_mode="native") is rules
    assert probed == [("eth9", 0, "zero-copy"), ("eth9", 1, "zero-copy")]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mtu_bytes": 9000}, "mtu 1508"),
        ({"iommu": "translating"}, "another way"),
        ({"offloads": Offloads(rx_vlan_strip=False, lro=False, gro_hw=False, rx_fcs=True)}, "rx-fcs"),
        ({"driver": "virtio_net", "virtio_header_bytes": 12}, "another way"),
    ],
)
def test_interface_that_was_changed_so_that_its_nic_could_write_further_is_noticed(
    changes: dict[str, object], reason: str
) -> None:
    rules, _ = choose("auto")
    assert rules is not None
    assert reason in (outgrown(rules, msgspec.structs.replace(NIC, **changes), ZeroCopyOptions()) or "")


def test_interface_that_is_as_it_was_or_bounded_closer_keeps_its_rules() -> None:
    rules, _ = choose("auto")
    assert rules is not None
    for interface in (NIC, msgspec.structs.replace(NIC, mtu_bytes=1400), msgspec.structs.replace(NIC, up=False)):
        assert outgrown(rules, interface, ZeroCopyOptions()) is None
