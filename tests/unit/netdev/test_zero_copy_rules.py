"""Which interface may take a guest's memory in zero-copy mode, and how far its NIC may write there."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from mpassthru.netdev import ZERO_COPY, Interface, Offloads, QueueCounts, Refusal, XdpFeatures, zero_copy_rules
from mpassthru.netdev.pci import dma_is_bounced, virtio_header_bytes, virtio_uses_dma_api
from mpassthru.netdev.zero_copy import ROOM_STEP_BYTES
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
    virtio_header_bytes=12,
)
PROVEN = sorted(name for name, facts in ZERO_COPY.items() if facts.proven)


def decide(
    *, frame_max_bytes: int | None = None, bounce_only: bool = False, **changes: object
) -> ZeroCopyRules | Refusal:
    interface = msgspec.structs.replace(NIC, **changes)
    return zero_copy_rules(interface, frame_max_bytes=frame_max_bytes, bounce_only=bounce_only, dma_is_bounced=False)


def rules(**changes: object) -> ZeroCopyRules:
    decision = decide(**changes)  # type: ignore[arg-type]
    assert isinstance(decision, ZeroCopyRules), decision
    return decision


@pytest.mark.parametrize("driver", PROVEN)
@pytest.mark.parametrize("mtu_bytes", [68, 1382, 1500])
def test_room_is_what_the_kernel_takes_and_bounds_what_is_written(driver: str, mtu_bytes: int) -> None:
    found = rules(driver=driver, mtu_bytes=mtu_bytes)
    assert found.frame_room_bytes % ROOM_STEP_BYTES == 0
    assert found.frame_room_bytes >= mtu_bytes + 26
    assert mtu_bytes + 18 <= found.rx_write_max_bytes <= found.frame_room_bytes
    assert found.tx_frame_max_bytes == mtu_bytes + 18


@pytest.mark.parametrize(
    ("driver", "room_bytes", "write_max_bytes"),
    [("virtio_net", 1536, 1536), ("igb", 2048, 1552), ("igc", 2048, 1664), ("ice", 1536, 1536), ("ixgbe", 2048, 1522)],
)
def test_bounds_at_mtu_1500_are_those_of_the_drivers_source(driver: str, room_bytes: int, write_max_bytes: int) -> None:
    found = rules(driver=driver)
    assert (found.frame_room_bytes, found.rx_write_max_bytes) == (room_bytes, write_max_bytes)


def test_virtio_net_with_a_small_mtu_fits_a_linux_guests_buffers() -> None:
    assert rules(driver="virtio_net", mtu_bytes=1382).rx_write_max_bytes == 1408


def test_virtio_net_writes_its_own_header_in_front_of_a_frame() -> None:
    assert rules(driver="virtio_net", virtio_header_bytes=20).rx_write_before_bytes == 20
    assert "cannot be read" in str(decide(driver="virtio_net", virtio_header_bytes=None))


def test_igb_is_always_given_buffers_for_a_round_of_frames() -> None:
    assert rules(driver="igb").rx_buffers_min == 64
    assert rules(driver="virtio_net").rx_buffers_min == 0


def test_operators_promise_lowers_the_bound_and_never_raises_it() -> None:
    assert rules(frame_max_bytes=1518).rx_write_max_bytes == 1518
    assert rules(frame_max_bytes=9000).rx_write_max_bytes == 1552


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"driver": "veth", "xdp_features": None}, "has no zero-copy"),
        ({"xdp_features": XdpFeatures(native=True, zero_copy=False, zero_copy_max_segments=1)}, "has no zero-copy"),
        ({"driver": "virtio_net", "virtio_dma_api": False}, "iommu_platform=on"),
        ({"driver": "newnic"}, "nobody has yet read how far newnic"),
        ({"driver": "gve"}, "nobody has yet read how far gve"),
        ({"mtu_bytes": 1509}, "'ip link set dev eth9 mtu 1508'"),
        ({"driver": "virtio_net", "mtu_bytes": 3815}, "'ip link set dev eth9 mtu 3814'"),
        ({"offloads": Offloads(rx_vlan_strip=False, lro=False, gro_hw=False, rx_fcs=True)}, "rx-fcs off"),
    ],
)
def test_what_cannot_be_bounded_is_refused_with_what_to_do(changes: dict[str, object], reason: str) -> None:
    decision = decide(**changes)  # type: ignore[arg-type]
    assert isinstance(decision, Refusal)
    assert reason in str(decision)


def test_unread_driver_may_bounce_everything_on_request() -> None:
    assert "--bounce-only" in str(decide(driver="newnic"))
    assert rules(driver="newnic", bounce_only=True).direct is False
    assert isinstance(decide(driver="veth", bounce_only=True), Refusal)


@pytest.mark.parametrize(
    ("iommu", "contiguity"),
    [("none", "backing-page"), ("identity", "backing-page"), ("translating", "base-page"), ("unknown", "base-page")],
)
def test_iommu_that_translates_or_is_not_known_bounds_a_range_to_a_base_page(iommu: str, contiguity: str) -> None:
    assert rules(iommu=iommu).contiguity == contiguity


def test_pieces_of_a_frame_are_as_many_as_the_kernel_says_or_the_table_where_it_does_not() -> None:
    assert rules(driver="ice", xdp_features=None).tx_pieces_max == 8
    assert rules(driver="ice").tx_pieces_max == 1


def test_machine_whose_dma_is_copied_gets_no_guest_memory_near_a_nic() -> None:
    assert "swiotlb" in str(zero_copy_rules(NIC, dma_is_bounced=True))
    assert isinstance(zero_copy_rules(NIC, dma_is_bounced=True, bounce_only=True), ZeroCopyRules)


@pytest.mark.parametrize(
    ("cmdline", "flags", "bounced"),
    [("quiet", "fpu sse2", False), ("swiotlb=force quiet", "fpu", True), ("quiet", "fpu tdx_guest", True)],
)
def test_copied_dma_is_known_by_boot_option_and_encrypted_memory(
    tmp_path: Path, cmdline: str, flags: str, bounced: bool
) -> None:
    (tmp_path / "cmdline").write_text(f"{cmdline}\n")
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert dma_is_bounced(proc=tmp_path) is bounced


@pytest.mark.parametrize(
    ("bits", "header_bytes"),
    [((), 10), ((15,), 12), ((32,), 12), ((15, 32, 57), 20), ((15, 32, 57, 65), 24), ((32, 67), 24)],
)
def test_virtio_header_follows_from_the_negotiated_features(
    tmp_path: Path, bits: tuple[int, ...], header_bytes: int
) -> None:
    folder = tmp_path / "0000:00:03.0/virtio2"
    folder.mkdir(parents=True)
    (folder / "features").write_text("".join("1" if bit in bits else "0" for bit in range(128)) + "\n")
    assert virtio_header_bytes("0000:00:03.0", devices=tmp_path) == header_bytes
    assert virtio_header_bytes("0000:00:04.0", devices=tmp_path) is None
    assert virtio_header_bytes(None, devices=tmp_path) is None


@pytest.mark.parametrize("bits", [(32,), (32, 33)])
def test_virtio_device_with_platform_addresses_is_driven_by_the_dma_api(tmp_path: Path, bits: tuple[int, ...]) -> None:
    folder = tmp_path / "0000:00:03.0/virtio2"
    folder.mkdir(parents=True)
    (folder / "features").write_text("".join("1" if bit in bits else "0" for bit in range(64)) + "\n")
    assert virtio_uses_dma_api("0000:00:03.0", devices=tmp_path) is (33 in bits)
    assert virtio_uses_dma_api("0000:00:04.0", devices=tmp_path) is None
