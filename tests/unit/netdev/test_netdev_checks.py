"""What an interface is refused or warned for, and what a guest is said to cost."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from mpassthru.errors import HostError, RefusedError
from mpassthru.netdev import (
    CHUNK_MTU_MAX_BYTES,
    MTU_MAX_BYTES,
    NO_ZERO_COPY,
    UMEM_MAX_BYTES,
    ZERO_COPY,
    Interface,
    Offloads,
    QueueCounts,
    VethPeer,
    bind_error,
    check_queue,
    format_bytes,
    frame_max_bytes,
    kernel_version,
    other_queues_warning,
    read_interface,
    room_bytes,
    umem_cost,
    warnings_for,
)
from mpassthru.netdev.pci import iommu_kind, numa_node

PLAIN = Interface(
    name="eth9",
    ifindex=9,
    mac="02:00:00:00:00:09",
    mtu_bytes=1500,
    up=True,
    operstate="up",
    driver="ixgbe",
    bus_address="0000:3b:00.0",
    queues=QueueCounts(rx=2, tx=2, rx_max=8, tx_max=8),
    offloads=Offloads(rx_vlan_strip=False, lro=False, gro_hw=False),
)


def but(**changes: object) -> Interface:
    return msgspec.structs.replace(PLAIN, **changes)


def test_frame_is_mtu_with_ethernet_header_and_vlan_tag() -> None:
    assert frame_max_bytes(PLAIN) == 1518


@pytest.mark.parametrize(
    ("release", "limit_bytes", "advice"),
    [
        ("6.5.13", CHUNK_MTU_MAX_BYTES, "mtu 3822' or less, or Linux 6.6 or later"),
        ("6.6.0-amd64", MTU_MAX_BYTES, "mtu 9216' or less"),
    ],
)
def test_largest_mtu_is_taken_and_one_more_is_refused_with_the_mtu_that_fits(
    release: str, limit_bytes: int, advice: str
) -> None:
    assert frame_max_bytes(but(mtu_bytes=limit_bytes), release=release) == limit_bytes + 18
    with pytest.raises(RefusedError, match=rf"eth9 with MTU {limit_bytes + 1}: .*{advice}$") as refusal:
        frame_max_bytes(but(mtu_bytes=limit_bytes + 1), release=release)
    assert "\n" not in str(refusal.value)


def test_chunks_have_room_for_what_a_linux_guests_buffers_take_where_frames_may_come_in_pieces() -> None:
    assert (room_bytes(1518, release="6.6.1"), room_bytes(1518, release="6.1.0-49-amd64")) == (1518, 1518)
    assert (room_bytes(9018, release="6.6.1"), room_bytes(3840, release="6.1.0-49-amd64")) == (1524, 3840)


@pytest.mark.parametrize("queue_id", [-1, 2])
def test_queue_out_of_range_is_refused_with_the_queues_there_are(queue_id: int) -> None:
    check_queue(PLAIN, 0)
    check_queue(PLAIN, 1)
    with pytest.raises(RefusedError, match=rf"queue {queue_id} of eth9: it has 2 receive .* makes up to 8"):
        check_queue(PLAIN, queue_id)


def test_interface_in_order_has_no_warnings() -> None:
    assert warnings_for(PLAIN) == []


@pytest.mark.parametrize(
    ("interface", "warning"),
    [
        (but(up=False), "eth9 is down: 'ip link set dev eth9 up'"),
        (but(operstate="lowerlayerdown"), "no carrier"),
        (but(offloads=Offloads(rx_vlan_strip=True, lro=False, gro_hw=False)), "rxvlan off"),
        (but(offloads=Offloads(rx_vlan_strip=False, lro=True, gro_hw=False)), "lro off"),
        (
            but(veth_peer=VethPeer(ifindex=2, ifname="eth8", unfinished_offloads=("tx-checksum-ip-generic",))),
            "'ethtool -K eth8 tx off",
        ),
        (but(veth_peer=VethPeer(ifindex=2, ifname=None)), "another namespace"),
    ],
)
def test_each_trouble_is_warned_of_with_the_command_that_ends_it(interface: Interface, warning: str) -> None:
    (line,) = warnings_for(interface)
    assert warning in line


def test_guest_of_4_gib_costs_136_mib_per_queue_and_16_mib_of_tables() -> None:
    cost = umem_cost(4 << 30)
    assert cost.kernel_bytes_per_queue / (1 << 20) == pytest.approx(136, rel=0.01)
    assert (cost.kernel_bytes - cost.kernel_bytes_per_queue) / (1 << 20) == pytest.approx(16, rel=0.01)


def test_queues_share_the_umem_and_have_a_pool_each() -> None:
    one, four = umem_cost(1 << 30), umem_cost(1 << 30, queues=4)
    assert four.pinned_bytes - one.pinned_bytes == 3 * (4608 << 10)
    assert four.kernel_bytes_per_queue * 4 < four.kernel_bytes < four.kernel_bytes_per_queue * 5


def test_zero_copy_costs_a_dma_address_per_page_in_the_device_and_in_each_pool() -> None:
    copy, zero_copy = umem_cost(1 << 30, queues=2), umem_cost(1 << 30, queues=2, zero_copy=True)
    pages = copy.pinned_bytes // 4096
    assert zero_copy.kernel_bytes - copy.kernel_bytes == 3 * 8 * pages


def test_guest_larger_than_a_umem_is_refused_with_the_largest_that_fits() -> None:
    assert (64 << 30) - 2 * 4096 < UMEM_MAX_BYTES < 64 << 30
    umem_cost(65531 << 20)
    with pytest.raises(RefusedError, match=r"64 GiB of guest memory.*16777215 chunks.*at most 65531 MiB"):
        umem_cost(64 << 30)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (4 << 30, "4 GiB"), (2048 << 30, "2048 GiB")]
)
def test_bytes_are_written_as_a_person_would(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("release", "version"), [("6.18.44-amd64", (6, 18)), ("5.11", (5, 11)), ("6.1+", (6, 1)), ("7.0-rc3", (7, 0))]
)
def test_kernel_release_is_read_whatever_follows_it(release: str, version: tuple[int, int]) -> None:
    assert kernel_version(release) == version


def test_bind_error_names_interface_queue_errno_and_way_out() -> None:
    error = bind_error("eth9", 3, 16)
    assert isinstance(error, HostError)
    assert str(error) == (
        "cannot bind an AF_XDP socket to eth9 queue 3 (EBUSY): "
        "another AF_XDP socket has this queue; end its program, or take another queue"
    )


@pytest.mark.parametrize(
    ("group_type", "kind"), [("identity", "identity"), ("DMA", "translating"), ("DMA-FQ", "translating")]
)
def test_iommu_kind_follows_the_groups_type(tmp_path: Path, group_type: str, kind: str) -> None:
    group = tmp_path / "0000:3b:00.0" / "iommu_group"
    group.mkdir(parents=True)
    (group / "type").write_text(f"{group_type}\n")
    assert iommu_kind("0000:3b:00.0", devices=tmp_path) == kind


def test_no_iommu_group_is_no_iommu_and_an_untold_type_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "0000:3b:00.0").mkdir()
    assert iommu_kind("0000:3b:00.0", devices=tmp_path) == "none"
    assert iommu_kind(None, devices=tmp_path) == "none"
    (tmp_path / "0000:3b:00.0" / "iommu_group").mkdir()
    assert iommu_kind("0000:3b:00.0", devices=tmp_path) == "unknown"


def test_numa_node_of_a_machine_with_one_is_none(tmp_path: Path) -> None:
    device = tmp_path / "0000:3b:00.0"
    device.mkdir()
    assert numa_node("0000:3b:00.0", devices=tmp_path) is None
    (device / "numa_node").write_text("-1\n")
    assert numa_node("0000:3b:00.0", devices=tmp_path) is None
    (device / "numa_node").write_text("1\n")
    assert numa_node("0000:3b:00.0", devices=tmp_path) == 1


def test_no_driver_is_listed_with_and_without_zero_copy() -> None:
    assert not NO_ZERO_COPY & ZERO_COPY.keys()
    assert all(facts.source_file.endswith(".c") for facts in ZERO_COPY.values())


async def test_loopback_is_read_without_privileges() -> None:
    interface = await read_interface("lo")
    assert interface.ifindex == 1
    assert interface.driver is None
    assert interface.queues.rx == 1
    assert interface.veth_peer is None


@pytest.mark.parametrize("ifname", ["no-such-if", "a-name-longer-than-ifnamsiz", ""])
async def test_interface_that_does_not_exist_is_named(ifname: str) -> None:
    with pytest.raises(HostError, match=rf"cannot find interface {ifname} \(ENODEV\)") as refusal:
        await read_interface(ifname)
    assert refusal.value.errno == 19


async def test_reading_an_interface_leaves_no_descriptor_open() -> None:
    await read_interface("lo")
    before = set(os.listdir("/proc/self/fd"))
    await read_interface("lo")
    assert set(os.listdir("/proc/self/fd")) == before


def test_queue_that_cannot_send_is_refused_because_the_kernel_would_swallow_its_frames() -> None:
    lopsided = but(queues=QueueCounts(rx=4, tx=2, rx_max=4, tx_max=2))

    check_queue(lopsided, 1)
    with pytest.raises(RefusedError, match=r"queue 2 .*only 2 transmit"):
        check_queue(lopsided, 2)


@pytest.mark.parametrize(
    ("queue_ids", "command"), [((0,), "'ethtool -X eth9 equal 1'"), ((2, 3), "'ethtool -X eth9 start 2 equal 2'")]
)
def test_queues_beside_the_guests_are_warned_of_with_the_command(queue_ids: tuple[int, ...], command: str) -> None:
    interface = but(queues=QueueCounts(rx=4, tx=4, rx_max=8, tx_max=8))
    assert command in (other_queues_warning(interface, queue_ids) or "")


def test_guest_that_has_all_queues_gets_all_frames() -> None:
    interface = but(queues=QueueCounts(rx=2, tx=2, rx_max=8, tx_max=8))
    assert other_queues_warning(interface, (0, 1)) is None
