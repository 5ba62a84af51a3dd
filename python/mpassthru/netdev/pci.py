"""Where a PCI device stands in the machine: IOMMU domain, NUMA node, DMA; and what its virtio device agreed on."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from mpassthru.netdev.facts import IommuKind

PCI_DEVICES: Final = Path("/sys/bus/pci/devices")

# Feature bits (VIRTIO 1.3, sections 5.1.3 and 6; those of UDP tunnels are newer) and the virtio-net header that each
# makes for (drivers/net/virtio_net.c, virtnet_probe); the first that is set counts.
_VIRTIO_HEADER_BYTES: Final = ((65, 24), (67, 24), (57, 20), (15, 12), (32, 12))
_VIRTIO_LEGACY_HEADER_BYTES: Final = 10
_VIRTIO_F_ACCESS_PLATFORM_BIT: Final = 33
_MEMORY_ENCRYPTION_FLAGS: Final = frozenset({"tdx_guest", "sev_guest"})


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


def virtio_header_bytes(bus_address: str | None, *, devices: Path = PCI_DEVICES) -> int | None:
    """Length of the virtio-net header that this machine's own virtio_net uses; None for a device that is not virtio."""
    bits = _virtio_features(bus_address, devices)
    if bits is None:
        return None
    for bit, header_bytes in _VIRTIO_HEADER_BYTES:
        if bits >> bit & 1:
            return header_bytes
    return _VIRTIO_LEGACY_HEADER_BYTES


def virtio_uses_dma_api(bus_address: str | None, *, devices: Path = PCI_DEVICES) -> bool | None:
    """Whether VIRTIO_F_ACCESS_PLATFORM was negotiated; None for a device that is not virtio."""
    bits = _virtio_features(bus_address, devices)
    return None if bits is None else bool(bits >> _VIRTIO_F_ACCESS_PLATFORM_BIT & 1)


def _virtio_features(bus_address: str | None, devices: Path) -> int | None:
    if bus_address is None:
        return None
    for path in sorted((devices / bus_address).glob("virtio*/features")):
        return int(path.read_text().strip()[::-1], 2)  # bit 0 comes first
    return None


def dma_is_bounced(*, proc: Path = Path("/proc")) -> bool:
    """Whether the kernel copies a device's data through buffers of its own (swiotlb), as it does in encrypted machines.

    What is copied back covers whole frames of the UMEM and so overwrites neighbours: nothing of a guest's memory may
    then be given to a NIC.
    """
    if "swiotlb=force" in (proc / "cmdline").read_text().split():
        return True
    cpu = (proc / "cpuinfo").read_text()
    flags = next((line for line in cpu.splitlines() if line.startswith("flags")), "")
    return bool(_MEMORY_ENCRYPTION_FLAGS & set(flags.split()))
