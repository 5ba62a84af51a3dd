"""An unmodified Linux guest in zero-copy mode: with hash=on its buffers are long enough, else they become so.

A guest in QEMU in a machine in QEMU, without KVM: it takes a minute to boot, and so there is one of each kind only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from zero_copy_port import ZeroCopyPort

from conftest import DRIVERS
from mpassthru.testing.child import run_child
from mpassthru.testing.figures import difference
from mpassthru.testing.initramfs import GuestKernel
from mpassthru.testing.qemu import QemuGuest
from mpassthru.testing.qemu_config import GuestConfig, GuestNic, VhostUserBackend

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.long, pytest.mark.timeout(600)]

KERNEL = Path(__file__).resolve().parents[2] / "build/guest-kernel/bookworm.linux-image-cloud-amd64"
BOOT_TIMEOUT_S = 400
PINGS = 40
PAYLOAD_BYTES = 1472
"""Makes frames of 1514 bytes."""


@pytest.mark.parametrize("hash_report", ["off", "on"])
async def test_frames_go_direct_if_the_guests_buffers_are_long_enough(
    port: ZeroCopyPort, hash_report: str, record_figure: Callable[[str, object], None]
) -> None:
    if (port.ifname, hash_report) == ("igb", "off"):
        pytest.skip("as with the other NIC, and a minute long")
    network = f"10.9.{DRIVERS.index(port.ifname)}"
    await run_child("ip", "address", "replace", f"{network}.1/24", "dev", f"{port.ifname}-peer")
    if port.ifname == "igb":  # it has two queues, and spreads IPv4 over them
        await run_child("ethtool", "-X", "igb", "equal", "1")
    nic = GuestNic(backend=VhostUserBackend(socket_path=port.socket_path), properties={"hash": hash_report})
    config = GuestConfig(
        kernel=GuestKernel.find(KERNEL), nics=(nic,), memory_mib=256, cpus=1, hugepages=True, accelerator="tcg"
    )
    before = await port.figures()
    async with QemuGuest(config, boot_timeout_s=BOOT_TIMEOUT_S) as guest:
        await guest.run(f"ip address add {network}.2/24 dev eth0; ip link set dev eth0 up", timeout_s=60)
        features = (await guest.run("cat /sys/class/net/eth0/device/features", timeout_s=60)).output.strip()
        pinged = await guest.run(f"ping -c {PINGS} -i 0.2 -s {PAYLOAD_BYTES} {network}.1", timeout_s=120)
    rx, tx = (difference(now, then) for now, then in zip(await port.figures(), before, strict=True))
    assert f"{PINGS} packets received" in pinged.output
    assert features[57] == ("1" if hash_report == "on" else "0")
    assert tx.direct / tx.frames > 0.9
    if hash_report == "on":
        assert rx.direct / rx.frames >= 0.95
    else:
        # The driver makes its buffers as long as the frames that it saw: those posted first are too short.
        assert rx.bounced.keys() == {"short_buffer"}
        assert rx.direct > 0
    record_figure(f"{port.ifname}.linux-6.1-hash-{hash_report}.rx_direct_share", rx.direct / rx.frames)
    record_figure(f"{port.ifname}.linux-6.1-hash-{hash_report}.tx_direct_share", tx.direct / tx.frames)
