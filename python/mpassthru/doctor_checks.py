"""The single checks of `doctor`: each finds one thing out, judges it, and says what to do about it."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import msgspec

from mpassthru.errors import HostError, MpassthruError, RefusedError
from mpassthru.locked_memory import RUNTIME_DIR, default_host_max_bytes, holdings
from mpassthru.netdev import (
    ZERO_COPY,
    Interface,
    Refusal,
    UmemCost,
    check_queue,
    format_bytes,
    frame_max_bytes,
    kernel_version,
    open_xsk_socket,
    probe_bind,
    umem_cost,
    warnings_for,
)
from mpassthru.netdev.bpf_probe import check_bpf_load
from mpassthru.netdev.capabilities import Capability, effective_capabilities, missing_for_broker
from mpassthru.rules import LINUX_BUFFER_ROOM_BYTES, ZeroCopyRules

Status = Literal["ok", "warn", "fail"]

KERNEL_MIN: Final = (5, 11)
"""BPF memory is charged to the control group and not to the memlock limit; bpf_link for XDP is older (5.9)."""
HUGEPAGES: Final = Path("/sys/kernel/mm/hugepages")


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at."""

    name: str
    status: Status
    """`fail`: no guest can be attached; `warn`: it can, but something will be slower or go wrong."""
    found: str
    advice: str = ""
    """What to do; empty where nothing is to be done."""


# ---- machine and process ----------------------------------------------------------------------------------


def process_checks() -> list[Check]:
    """Kernel, AF_XDP, capabilities, BPF."""
    return [kernel(os.uname().release), af_xdp(), capabilities(), bpf()]


def kernel(release: str) -> Check:
    """Whether the kernel is young enough."""
    if kernel_version(release) < KERNEL_MIN:
        return Check(
            name="kernel",
            status="fail",
            found=f"Linux {release}",
            advice=f"Linux {KERNEL_MIN[0]}.{KERNEL_MIN[1]} or later is needed",
        )
    return Check(name="kernel", status="ok", found=f"Linux {release}")


def af_xdp() -> Check:
    """Whether this process can open an AF_XDP socket."""
    try:
        open_xsk_socket().close()
    except HostError as error:
        return _refused("AF_XDP", error)
    return Check(name="AF_XDP", status="ok", found="sockets can be opened")


def capabilities() -> Check:
    """Whether the broker's capabilities are there."""
    missing = missing_for_broker()
    if missing:
        return Check(
            name="capabilities",
            status="fail",
            found=f"missing: {', '.join(missing)}",
            advice="run as root, or give them",
        )
    have = sorted(capability.name for capability in effective_capabilities())
    return Check(name="capabilities", status="ok", found=", ".join(have))


def bpf() -> Check:
    """Whether an XDP program can be loaded."""
    try:
        check_bpf_load()
    except HostError as error:
        return _refused("BPF", error)
    return Check(name="BPF", status="ok", found="XDP programs can be loaded")


def _refused(name: str, error: HostError) -> Check:
    found, _, advice = str(error).partition(": ")
    return Check(name=name, status="fail", found=found, advice=advice)


# ---- memory -----------------------------------------------------------------------------------------------


def guest_cost(guest_bytes: int, *, queues: int = 1, zero_copy: bool = False) -> tuple[UmemCost | None, Check]:
    """What a guest of that size costs on so many queues."""
    try:
        cost = umem_cost(guest_bytes, queues=queues, zero_copy=zero_copy)
    except RefusedError as error:
        found, _, advice = str(error).partition(": ")
        return None, Check(name="guest cost", status="fail", found=found, advice=advice)
    shared_bytes = cost.kernel_bytes - queues * cost.kernel_bytes_per_queue
    found = (
        f"{format_bytes(guest_bytes)} guest: all of its memory pinned at once, and {format_bytes(cost.kernel_bytes)} "
        f"of kernel memory ({queues} x {format_bytes(cost.kernel_bytes_per_queue)} + {format_bytes(shared_bytes)})"
    )
    available = _available_bytes()
    if cost.kernel_bytes > available:
        return cost, Check(
            name="guest cost",
            status="fail",
            found=f"{found}; {format_bytes(available)} are available",
            advice="use a smaller guest, or free memory",
        )
    return cost, Check(name="guest cost", status="ok", found=found)


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024


def memlock(needed_bytes: int) -> Check:
    """Whether that much memory may be pinned: by the limit, by raising it, or by CAP_IPC_LOCK."""
    have = effective_capabilities()
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = f"limit {_limit(soft)}, {format_bytes(needed_bytes)} needed"
    if soft == resource.RLIM_INFINITY or soft >= needed_bytes:
        return Check(name="memlock", status="ok", found=found)
    if hard == resource.RLIM_INFINITY or hard >= needed_bytes:
        return Check(name="memlock", status="ok", found=f"{found}; the hard limit {_limit(hard)} allows to raise it")
    if Capability.CAP_SYS_RESOURCE in have:
        return Check(name="memlock", status="ok", found=f"{found}; CAP_SYS_RESOURCE allows to raise it")
    if Capability.CAP_IPC_LOCK in have:
        return Check(
            name="memlock", status="ok", found=f"{found}; it cannot be raised, the worker keeps CAP_IPC_LOCK instead"
        )
    return Check(
        name="memlock",
        status="fail",
        found=f"{found}; neither CAP_SYS_RESOURCE nor CAP_IPC_LOCK is there",
        advice="raise the limit (ulimit -l, LimitMEMLOCK=), or give CAP_IPC_LOCK",
    )


def locked_memory(needed_bytes: int, host_max_bytes: int | None = None, runtime_dir: Path = RUNTIME_DIR) -> Check:
    """Whether the budget for locked memory has room for that much more, and who has what of it."""
    max_bytes = default_host_max_bytes() if host_max_bytes is None else host_max_bytes
    try:
        held = [holding for holding in holdings(runtime_dir) if holding.locked_bytes]
    except MpassthruError as error:
        return Check(name="locked memory", status="warn", found=str(error), advice="run as root")
    held_bytes = sum(holding.locked_bytes for holding in held)
    names = ", ".join(f"{format_bytes(one.locked_bytes)} for {one.interface} (pid {one.pid})" for one in held)
    found = f"all ports may lock {format_bytes(max_bytes)}; they have locked {names or 'nothing'}"
    if held_bytes + needed_bytes <= max_bytes:
        return Check(name="locked memory", status="ok", found=found)
    return Check(
        name="locked memory",
        status="fail",
        found=f"{found}; {format_bytes(needed_bytes)} more are needed",
        advice="use a smaller guest, end another one, or raise --locked-memory-all",
    )


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else format_bytes(value)


def hugepages(guest_bytes: int, *, directory: Path = HUGEPAGES) -> Check:
    """Free huge pages by size. A guest does without, but pins and bounces in smaller pieces."""
    free = dict(sorted(_free_hugepages(directory)))
    found = ", ".join(f"{count} x {format_bytes(size)} free" for size, count in free.items()) or "none configured"
    if any(size * count >= guest_bytes for size, count in free.items()):
        return Check(name="hugepages", status="ok", found=found)
    return Check(
        name="hugepages",
        status="warn",
        found=f"{found}; too few for a guest of {format_bytes(guest_bytes)}",
        advice=f"sysctl vm.nr_hugepages={-(-guest_bytes // (2 << 20))}; or let the guest use a plain shared memfd",
    )


def _free_hugepages(directory: Path) -> Iterator[tuple[int, int]]:
    """Size in bytes, and how many are free."""
    for entry in directory.glob("hugepages-*kB"):
        size_kib = int(entry.name.removeprefix("hugepages-").removesuffix("kB"))
        yield size_kib * 1024, int((entry / "free_hugepages").read_text())


# ---- interface --------------------------------------------------------------------------------------------


async def interface_checks(interface: Interface, wanted_queues: int = 1) -> list[Check]:
    """Everything about one interface but the mode, which follows from it."""
    return [
        link(interface),
        driver(interface),
        queues(interface, wanted_queues),
        mtu(interface),
        xdp_program(interface),
        await xsk_sockets(interface),
        iommu(interface),
    ]


def link(interface: Interface) -> Check:
    """State of the link, and settings that would keep frames from arriving whole."""
    found = f"{interface.mac}, {'up' if interface.up else 'down'}, operstate {interface.operstate}"
    warnings = warnings_for(interface)
    if warnings:
        return Check(name="interface", status="warn", found=found, advice="; ".join(warnings))
    return Check(name="interface", status="ok", found=found)


def driver(interface: Interface) -> Check:
    """Which driver, and whether it has native XDP."""
    where = f" at {interface.bus_address}" if interface.bus_address else ""
    found = f"{interface.driver or 'none'}{where}"
    features = interface.xdp_features
    if features is None:
        return Check(name="driver", status="ok", found=f"{found}; the kernel does not say what XDP it has (before 6.3)")
    if not features.native:
        return Check(
            name="driver",
            status="warn",
            found=f"{found}, no native XDP",
            advice="generic XDP works, with an skb made for each frame",
        )
    return Check(name="driver", status="ok", found=f"{found}, native XDP")


def queues(interface: Interface, wanted: int = 1) -> Check:
    """Receive queues: a guest takes one or more, whole."""
    counts = interface.queues
    found = f"{counts.rx} rx, {counts.tx} tx (at most {counts.rx_max} and {counts.tx_max})"
    try:
        check_queue(interface, wanted - 1)
    except RefusedError as error:
        return Check(name="queues", status="fail", found=f"{found}; {wanted} wanted", advice=str(error))
    return Check(name="queues", status="ok", found=found)


def mtu(interface: Interface) -> Check:
    """Whether frames are not longer than a port carries."""
    try:
        frame_bytes = frame_max_bytes(interface)
    except RefusedError as error:
        found, _, advice = str(error).partition("; ")
        return Check(name="MTU", status="fail", found=found, advice=advice)
    return Check(name="MTU", status="ok", found=f"{interface.mtu_bytes}: frames up to {frame_bytes} bytes")


def xdp_program(interface: Interface) -> Check:
    """Whether somebody else's XDP program is in the way."""
    program = interface.xdp_program
    if program is None:
        return Check(name="XDP program", status="ok", found="none attached")
    return Check(
        name="XDP program",
        status="fail",
        found=f"id {program.id} is attached ({program.mode} mode)",
        advice="'bpftool link' shows whose it is, perhaps another guest's port; an interface has one: take another",
    )


async def xsk_sockets(interface: Interface) -> Check:
    """Whether the queues are free; where the kernel does not show it, queue 0 is bound for a moment, in copy mode."""
    name = "AF_XDP sockets"
    if interface.xsk_queues is None:
        return await _probe_queue_0(interface)
    if not interface.xsk_queues:
        return Check(name=name, status="ok", found="none bound")
    taken = ", ".join(map(str, interface.xsk_queues))
    free = interface.queues.rx - len(interface.xsk_queues)
    return Check(
        name=name,
        status="warn" if free else "fail",
        found=f"queue {taken} has one already",
        advice="take another queue (--queue)" if free else "end the program that has it",
    )


async def _probe_queue_0(interface: Interface) -> Check:
    name = "AF_XDP sockets"
    try:
        await probe_bind(interface.name, 0, "copy")
    except HostError as error:
        status: Status = "warn" if error.errno in (errno.EPERM, errno.ENETDOWN) else "fail"
        found, _, advice = str(error).partition("): ")
        return Check(name=name, status=status, found=f"{found})", advice=advice)
    return Check(name=name, status="ok", found="queue 0 can be bound")


def iommu(interface: Interface) -> Check:
    """DMA addresses: they bound what zero-copy mode can place directly."""
    node = "" if interface.numa_node is None else f"; NUMA node {interface.numa_node}"
    if interface.iommu == "translating":
        return Check(
            name="IOMMU",
            status="warn",
            found=f"translating{node}",
            advice="in zero-copy mode most buffers would bounce; boot with iommu=pt",
        )
    return Check(name="IOMMU", status="ok", found=f"{interface.iommu}{node}")


def mode(interface: Interface, decision: ZeroCopyRules | Refusal) -> Check:
    """The mode that would be had, and why it is not a better one."""
    if isinstance(decision, ZeroCopyRules):
        return Check(name="mode", status="ok", found="zero-copy: no copy, each way")
    native = interface.xdp_features is None or interface.xdp_features.native
    found = f"copy, with {'native' if native else 'generic'} XDP: one copy each way, by the kernel"
    return Check(name="mode", status="ok", found=found, advice=f"no zero-copy: {decision}")


def zero_copy_bound(interface: Interface, rules: ZeroCopyRules) -> Check:
    """How far the NIC can write into a guest's buffer, and which guests' buffers are long enough for that."""
    note = (ZERO_COPY[interface.driver or ""]).note
    found = f"a NIC writes at most {rules.rx_write_max_bytes} bytes of a frame into a buffer"
    if rules.rx_write_align_bytes > 1:
        found += f", padded up to {rules.rx_write_align_bytes}"
    found += f"; {note}" if note else ""
    if rules.rx_write_max_bytes <= LINUX_BUFFER_ROOM_BYTES:
        return Check(name="zero-copy", status="ok", found=found)
    return Check(
        name="zero-copy",
        status="warn",
        found=found,
        advice=(
            f"a Linux guest's buffers have room for {LINUX_BUFFER_ROOM_BYTES} by default and would be copied to: "
            "hash=on of QEMU's virtio-net-pci makes that 1580; or promise with --max-frame that no longer frame comes"
        ),
    )
