"""Where a PCI device stands in the machine: its IOMMU domain and its NUMA node, from sysfs."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from mpassthru.netdev.facts import IommuKind

PCI_DEVICES: Final = Path("/sys/bus/pci/devices")


def iommu_kind(bus_address: str | None, *, devices: Path = PCI_DEVICES) -> IommuKind:
    """How the device's DMA addresses come about.

    Only without an IOMMU, or with an identity domain (``iommu=pt``), are addresses inside a huge page contiguous for
    the device, so that a frame may cross a 4 KiB page in zero-copy mode.

    Args:
        bus_address: As ethtool gives it; None, or another bus's, for a device that does no DMA of its own.
        devices: For tests.
    """
    if bus_address is None or not (devices / bus_address).exists():
        return "none"
    group = devices / bus_address / "iommu_group"
    if not group.exists():
        return "none"
    try:
        kind = (group / "type").read_text().strip()
    except FileNotFoundError:
        return "unknown"  # before Linux 5.11
    return "identity" if kind == "identity" else "translating"


def numa_node(bus_address: str | None, *, devices: Path = PCI_DEVICES) -> int | None:
    """The NUMA node of the device; None where the machine has one only, or it is no PCI device."""
    if bus_address is None:
        return None
    path = devices / bus_address / "numa_node"
    if not path.exists():
        return None
    node = int(path.read_text())
    return node if node >= 0 else None
