"""The demo with a Linux guest in QEMU: ping, iperf3 both ways, and a file both ways with equal SHA-256."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from mpassthru.demo.report import Check, DemoReport, port_checks
from mpassthru.demo.scene import Scene, scene
from mpassthru.errors import RefusedError
from mpassthru.live_view import View
from mpassthru.testing.initramfs import GuestKernel, find_program
from mpassthru.testing.kvm import kvm_works
from mpassthru.testing.qemu import QemuGuest
from mpassthru.testing.qemu_config import Accelerator, GuestConfig, GuestNic, VhostUserBackend
from mpassthru.testing.scenario_qemu import Peer, TrafficResult, configure_interface, exercise_guest

PEER_ADDRESS: Final = "10.77.0.1"
GUEST_ADDRESS: Final = "10.77.0.2"
PREFIX_LENGTH: Final = 24
THROUGHPUT_S: Final = 5
GUEST_MEMORY_MIB: Final = 512
HUGEPAGE_MIB: Final = 2
FREE_HUGEPAGES: Final = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
KERNELS: Final = Path("build/guest-kernel")


async def run_qemu(
    view: View, *, seconds: float = THROUGHPUT_S, interval_s: float = 0.5, kernel_root: Path | None = None
) -> DemoReport:
    """Run the demo.

    Args:
        view: Shows what goes on.
        seconds: How long iperf3 runs each way.
        interval_s: Seconds between figures.
        kernel_root: Where the guest's kernel is unpacked; None for what `make` downloaded, or else this machine's.

    Raises:
        RefusedError: QEMU, iperf3 or a kernel for the guest is missing.
        HostError: the kernel or this process cannot do it; see `mpassthru doctor`.
        MpassthruError: the port or the guest failed.
        TimeoutError: a step took too long.
    """
    started_s = time.monotonic()
    kernel = find_kernel(kernel_root)
    iperf3 = find_program("iperf3", "iperf3")
    hugepages = enough_hugepages(GUEST_MEMORY_MIB)
    async with scene(view, interval_s=interval_s) as stage:
        accelerator: Accelerator = "kvm" if await kvm_works() else "tcg"
        nic = GuestNic(backend=VhostUserBackend(socket_path=stage.socket_path))
        config = GuestConfig(
            kernel=kernel,
            nics=(nic,),
            memory_mib=GUEST_MEMORY_MIB,
            hugepages=hugepages,
            accelerator=accelerator,
            programs=(iperf3,),
        )
        memory = "2 MiB huge pages" if hugepages else "memfd"
        view.say(f"booting Linux {kernel.release} in QEMU ({accelerator}), {GUEST_MEMORY_MIB} MiB of {memory}")
        async with QemuGuest(config) as guest:
            traffic = await _exercise(stage, guest, view, seconds)
        await stage.port.until(lambda report: report.guest == "waiting")
        final = await stage.port.stop()
    checks = (*_traffic_checks(traffic), *port_checks(final))
    return DemoReport(
        mode=final.mode,
        rx=final.rx,
        tx=final.tx,
        ok=all(check.ok for check in checks),
        guest="qemu",
        seconds=round(time.monotonic() - started_s, 2),
        kernel=os.uname().release,
        xdp_mode=final.xdp_mode,
        checks=checks,
        traffic={
            "guest_kernel": kernel.release,
            "accelerator": accelerator,
            "hugepages": hugepages,
            **msgspec.to_builtins(traffic),
        },
    )


def find_kernel(root: Path | None = None) -> GuestKernel:
    """The kernel to boot.

    Raises:
        RefusedError: there is none.
    """
    roots = [root] if root is not None else [*sorted(KERNELS.glob("*.linux-image-*")), Path("/")]
    for candidate in roots:
        try:
            return GuestKernel.find(candidate)
        except RefusedError:
            continue
    raise RefusedError(
        f"no kernel for the guest in {', '.join(str(candidate) for candidate in roots)}: "
        "run tools/guest-kernel to download one, or name its folder with --kernel"
    )


def enough_hugepages(memory_mib: int) -> bool:
    """Whether the guest's memory can be had in huge pages."""
    return FREE_HUGEPAGES.exists() and int(FREE_HUGEPAGES.read_text()) * HUGEPAGE_MIB >= memory_mib


async def _exercise(stage: Scene, guest: QemuGuest, view: View, seconds: float) -> TrafficResult:
    stage.namespace.run("ip", "address", "add", f"{PEER_ADDRESS}/{PREFIX_LENGTH}", "dev", stage.namespace.peer)
    await configure_interface(guest, f"{GUEST_ADDRESS}/{PREFIX_LENGTH}")
    return await exercise_guest(
        guest, Peer(stage.namespace, PEER_ADDRESS), throughput_s=max(1, round(seconds)), announce=view.say
    )


def _traffic_checks(traffic: TrafficResult) -> Iterator[Check]:
    ping = traffic.ping
    yield Check(
        name="ping",
        ok=ping.received == ping.sent,
        found=f"{ping.received} of {ping.sent} answered, {ping.rtt_avg_ms:.2f} ms on average",
    )
    for throughput in traffic.throughput:
        yield Check(
            name=f"iperf3 {'to' if throughput.direction == 'rx' else 'from'} the guest",
            ok=throughput.bytes > 0,
            found=f"{throughput.bits_per_s / 1e6:,.0f} Mbit/s",
        )
    for file in traffic.files:
        yield Check(
            name=f"file {'to' if file.direction == 'rx' else 'from'} the guest, SHA-256 equal",
            ok=file.intact,
            found=f"{file.bytes:,} bytes, {file.sha256_received[:16]}",
        )
