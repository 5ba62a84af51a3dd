"""`doctor` says of each interface what a port on it turns out to be."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from zero_copy_port import PortSlot

from conftest import DRIVERS
from mpassthru.doctor import examine
from mpassthru.netdev import umem_cost
from mpassthru.testing.attached_port import attached_port
from mpassthru.testing.child import run_child
from mpassthru.testing.netns import Namespace

pytestmark = pytest.mark.asyncio(loop_scope="session")

GUEST_BYTES = 256 << 20
INTERFACES = (*DRIVERS, *(f"{driver}-peer" for driver in DRIVERS))
TIMEOUT_S = 60
EXPECTED = {"virtio": ("virtio_net", 1536, 12), "igb": ("igb", 1552, 0)}


@pytest.mark.parametrize("name", DRIVERS)
async def test_interface_whose_driver_has_zero_copy(name: str, slot: PortSlot) -> None:
    await slot.leave()
    await run_child("ip", "link", "set", "dev", name, "mtu", "1500", "up")
    report = await examine(name, GUEST_BYTES)
    driver, write_max_bytes, before_bytes = EXPECTED[name]
    assert report.mode == "zero-copy"
    assert report.interface is not None
    assert report.interface.driver == driver
    assert report.zero_copy is not None
    assert (report.zero_copy.rx_write_max_bytes, report.zero_copy.rx_write_before_bytes) == (
        write_max_bytes,
        before_bytes,
    )
    assert report.zero_copy.contiguity == "backing-page"
    found = {check.name: check for check in report.checks}
    assert found["IOMMU"].found == "none"
    assert "free" in found["hugepages"].found
    assert found["hugepages"].status == "ok"
    assert str(write_max_bytes) in found["zero-copy"].found
    assert report.guest == umem_cost(GUEST_BYTES, zero_copy=True)


@pytest.mark.parametrize("name", [f"{driver}-peer" for driver in DRIVERS])
async def test_virtio_device_without_the_dma_api_has_none_and_the_advice_says_how(name: str, slot: PortSlot) -> None:
    await slot.leave()
    await run_child("ip", "link", "set", "dev", name, "mtu", "1500", "up")
    report = await examine(name, GUEST_BYTES)
    assert report.zero_copy is None
    mode = next(check for check in report.checks if check.name == "mode")
    assert (report.mode, mode.status) == ("copy", "ok")
    assert "iommu_platform=on" in mode.advice


@pytest.mark.parametrize("name", INTERFACES)
async def test_port_that_may_choose_its_mode_takes_the_one_that_doctor_names(
    name: str, slot: PortSlot, tmp_path: Path
) -> None:
    await slot.leave()
    await run_child("ip", "link", "set", "dev", name, "mtu", "1500", "up")
    report = await examine(name, GUEST_BYTES)
    fd, ifindex = os.open("/proc/self/ns/net", os.O_RDONLY), socket.if_nametoindex(name)
    try:
        here = Namespace(fd, name, ifindex, name, ifindex)
        async with attached_port(here, tmp_path / "port.sock", "--mode", "auto") as port:
            assert await port.until_said(f"mode: {report.mode}", timeout_s=TIMEOUT_S)
            await port.until_said("ready", timeout_s=TIMEOUT_S)
            await port.stop(timeout_s=TIMEOUT_S)
        assert not any("after all" in line for line in port.lines)
    finally:
        os.close(fd)
