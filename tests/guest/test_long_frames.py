"""A Linux guest in QEMU at MTU 9000: the MTU it is offered, echoes that may not be cut, and TCP both ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from mpassthru.demo.qemu import find_kernel
from mpassthru.testing.attached_port import attached_port
from mpassthru.testing.initramfs import find_program
from mpassthru.testing.netns import veth_namespace
from mpassthru.testing.qemu import QemuGuest
from mpassthru.testing.qemu_config import GuestConfig, GuestNic, VhostUserBackend
from mpassthru.testing.scenario_qemu import Peer, configure_interface, iperf3, ping

MTU = 9000
ECHO_BYTES = 8900
PEER_ADDRESS = "10.77.0.1"
GUEST_ADDRESS = "10.77.0.2"
SECONDS = 3


@pytest.mark.slow
async def test_guest_with_mtu_9000_moves_long_frames_both_ways(
    tmp_path: Path, record_figure: Callable[[str, object], None]
) -> None:
    with veth_namespace(mtu=MTU) as namespace:
        namespace.run("ip", "address", "add", f"{PEER_ADDRESS}/24", "dev", namespace.peer)
        async with attached_port(namespace, tmp_path / "s") as port:
            recipe = await port.until_said("host_mtu=")
            assert f"host_mtu={MTU}" in recipe
            await port.until_said("is ready")
            nic = GuestNic(backend=VhostUserBackend(socket_path=tmp_path / "s"), properties={"host_mtu": str(MTU)})
            config = GuestConfig(kernel=find_kernel(), nics=(nic,), programs=(find_program("iperf3", "iperf3"),))
            async with QemuGuest(config) as guest:
                await configure_interface(guest, f"{GUEST_ADDRESS}/24")
                assert (await guest.run("cat /sys/class/net/eth0/mtu")).output.strip() == str(MTU)
                echoes = await ping(guest, PEER_ADDRESS, payload_bytes=ECHO_BYTES)
                assert echoes.received == echoes.sent
                echoed = await port.until(lambda report: report.rx.bytes >= echoes.sent * ECHO_BYTES)
                # Not cut: as few frames as there are echoes, and what finds the other's address.
                assert echoed.rx.frames < 2 * echoes.sent
                assert echoed.tx.bytes >= echoes.sent * ECHO_BYTES
                assert echoed.tx.frames < 2 * echoes.sent + 20
                peer = Peer(namespace, PEER_ADDRESS)
                rx = await iperf3(guest, peer, "rx", duration_s=SECONDS)
                received = await port.until(lambda report: report.rx.bytes > rx.bytes)
                tx = await iperf3(guest, peer, "tx", duration_s=SECONDS)
            report = await port.stop()
    assert rx.bytes > 0
    assert tx.bytes > 0
    assert received.rx.bytes / received.rx.frames > 8000
    assert set(report.rx.bounced) <= {"long_frame"}
    assert report.rx.copied_bytes < 0.9 * report.rx.bytes
    assert report.tx.bounced == {}
    assert report.tx.copied_bytes == report.tx.header_bytes
    record_figure("rx", msgspec.to_builtins(rx))
    record_figure("tx", msgspec.to_builtins(tx))
    record_figure("rx_copied_share", report.rx.copied_bytes / report.rx.bytes)
