"""`doctor` says of each interface what a port on it turns out to be."""

from __future__ import annotations

import pytest
from zero_copy_port import PortSlot

from conftest import DRIVERS
from mpassthru.doctor import examine
from mpassthru.netdev import umem_cost
from mpassthru.testing.child import run_child

pytestmark = pytest.mark.asyncio(loop_scope="session")

GUEST_BYTES = 256 << 20
WRITE_MAX_BYTES = 1536
VIRTIO_HEADER_BYTES = 12


async def test_interface_whose_driver_has_zero_copy(slot: PortSlot) -> None:
    await slot.leave()
    await run_child("ip", "link", "set", "dev", "virtio", "mtu", "1500", "up")
    report = await examine("virtio", GUEST_BYTES)
    assert report.mode == "zero-copy"
    assert report.interface is not None
    assert report.interface.driver == "virtio_net"
    assert report.zero_copy is not None
    assert (report.zero_copy.rx_write_max_bytes, report.zero_copy.rx_write_before_bytes) == (
        WRITE_MAX_BYTES,
        VIRTIO_HEADER_BYTES,
    )
    assert report.zero_copy.contiguity == "backing-page"
    found = {check.name: check for check in report.checks}
    assert found["IOMMU"].found == "none"
    assert "free" in found["hugepages"].found
    assert found["hugepages"].status == "ok"
    assert str(WRITE_MAX_BYTES) in found["zero-copy"].found
    assert report.guest == umem_cost(GUEST_BYTES, zero_copy=True)


async def test_interface_whose_driver_was_seen_to_fail_is_left_in_copy_mode_with_the_reason(slot: PortSlot) -> None:
    await slot.leave()
    await run_child("ip", "link", "set", "dev", "igb", "mtu", "1500", "up")
    report = await examine("igb", GUEST_BYTES)
    assert report.interface is not None
    assert report.interface.driver == "igb"
    assert (report.mode, report.zero_copy) == ("copy", None)
    mode = next(check for check in report.checks if check.name == "mode")
    assert "runs out of buffers" in mode.advice
    assert report.guest == umem_cost(GUEST_BYTES, zero_copy=False)


@pytest.mark.parametrize("name", [f"{driver}-peer" for driver in DRIVERS])
async def test_virtio_device_without_the_dma_api_has_none_and_the_advice_says_how(name: str, slot: PortSlot) -> None:
    await slot.leave()
    await run_child("ip", "link", "set", "dev", name, "mtu", "1500", "up")
    report = await examine(name, GUEST_BYTES)
    assert report.zero_copy is None
    mode = next(check for check in report.checks if check.name == "mode")
    assert (report.mode, mode.status) == ("copy", "ok")
    assert "iommu_platform=on" in mode.advice
