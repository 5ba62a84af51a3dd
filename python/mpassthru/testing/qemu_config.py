"""What a QEMU guest consists of, and the QEMU command line that says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mpassthru.testing.initramfs import GuestKernel
from mpassthru.testing.netns import Namespace

Accelerator = Literal["kvm", "tcg"]
_ACCELERATOR: dict[Accelerator, list[str]] = {
    "kvm": ["-accel", "kvm", "-cpu", "host"],
    "tcg": ["-accel", "tcg,thread=multi", "-cpu", "max"],
}


@dataclass(frozen=True, kw_only=True)
class VhostUserBackend:
    """A NIC served by a vhost-user back-end.

    Attributes:
        socket_path: The back-end's socket.
        queue_pairs: More than one needs a back-end that offers VHOST_USER_PROTOCOL_F_MQ.
        qemu_listens: QEMU makes the socket and waits for the back-end (`server=on`); otherwise QEMU connects.
        reconnect_s: Seconds between QEMU's attempts to connect again; 0: never.
    """

    socket_path: Path
    queue_pairs: int = 1
    qemu_listens: bool = False
    reconnect_s: int = 0

    def arguments(self, name: str) -> list[str]:
        """Return QEMU's options for the back-end `name`."""
        chardev = f"socket,id={name}-socket,path={self.socket_path}"
        if self.qemu_listens:
            chardev += ",server=on,wait=off"
        if self.reconnect_s:
            chardev += f",reconnect={self.reconnect_s}"
        netdev = f"vhost-user,id={name},chardev={name}-socket,queues={self.queue_pairs}"
        return ["-chardev", chardev, "-netdev", netdev]


@dataclass(frozen=True, kw_only=True)
class TapBackend:
    """A NIC on a tap interface that exists in QEMU's network namespace, served by QEMU itself."""

    interface: str
    queue_pairs: int = 1

    def arguments(self, name: str) -> list[str]:
        """Return QEMU's options for the back-end `name`."""
        return ["-netdev", f"tap,id={name},ifname={self.interface},script=no,downscript=no,queues={self.queue_pairs}"]


@dataclass(frozen=True, kw_only=True)
class GuestNic:
    """A virtio-net device; the first is the guest's eth0.

    Attributes:
        backend: What serves it.
        mac: Its address.
        properties: Of QEMU's virtio-net-pci, such as ``{"mrg_rxbuf": "off", "rx_queue_size": "1024"}``.
    """

    backend: VhostUserBackend | TapBackend
    mac: str = "52:54:00:12:34:56"
    properties: Mapping[str, str] = field(default_factory=dict)

    def arguments(self, name: str, accelerator: Accelerator) -> list[str]:
        """Return QEMU's options for the NIC `name`."""
        # Guests boot from -kernel; the boot ROM for network cards is in a package that need not be there.
        properties = {"netdev": name, "mac": self.mac, "romfile": ""}
        if self.backend.queue_pairs > 1:
            # One interrupt vector per virtqueue, one for configuration changes, one for the control virtqueue.
            properties |= {"mq": "on", "vectors": str(2 * self.backend.queue_pairs + 2)}
        if accelerator == "tcg" and isinstance(self.backend, VhostUserBackend):
            # Without KVM, QEMU 7.2 crashes as soon as the guest unmasks an MSI-X vector of a vhost-user device: it
            # sets up an irqfd that only KVM has. No vectors means the legacy interrupt.
            properties["vectors"] = "0"
        device = ["virtio-net-pci", *(f"{key}={value}" for key, value in (properties | dict(self.properties)).items())]
        return [*self.backend.arguments(name), "-device", ",".join(device)]


@dataclass(frozen=True, kw_only=True)
class GuestConfig:
    """What to boot.

    Attributes:
        kernel: The guest's kernel.
        nics: Its network interfaces.
        memory_mib: Its memory, in MiB, shared with back-ends.
        odd_memory: 8 KiB more, for a guest that migrates. QEMU before 9.0 without KVM loses writes of the guest's CPUs
            while it copies memory whose size is a multiple of 256 KiB: taking the bits of many pages at once, it
            forgets to tell the CPUs (fixed by "physmem: Fix migration dirty bitmap coherency with TCG memory access").
        cpus: Its virtual CPUs.
        hugepages: Take its memory from 2 MiB huge pages, which must be free.
        accelerator: `auto` is KVM where guests really run under it, else TCG.
        namespace: The network namespace that QEMU runs in; None for ours.
        qemu: The program.
        programs: Host programs to have in the guest's PATH beside busybox's.
        modules: Kernel modules to load beside virtio's.
        incoming: Boot nothing, but wait for a guest that migrates here (`mpassthru.testing.migration`).
        extra_arguments: More of QEMU's options.
    """

    kernel: GuestKernel
    nics: Sequence[GuestNic] = ()
    memory_mib: int = 512
    odd_memory: bool = False
    cpus: int = 2
    hugepages: bool = False
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    namespace: Namespace | None = None
    qemu: str = "qemu-system-x86_64"
    programs: Sequence[Path] = ()
    modules: Sequence[str] = ()
    incoming: bool = False
    extra_arguments: Sequence[str] = ()


def qemu_arguments(config: GuestConfig, *, accelerator: Accelerator, initramfs: str) -> list[str]:
    """Return QEMU's command line for a guest, but for its connections to us."""
    size = f"{config.memory_mib * 1024 + (8 if config.odd_memory else 0)}K"
    memory = f"memory-backend-memfd,id=memory,size={size},share=on"
    if config.hugepages:
        memory += ",hugetlb=on,hugetlbsize=2M"
    arguments = [config.qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    arguments += ["-machine", "q35,memory-backend=memory", "-object", memory]
    arguments += ["-m", size, "-smp", str(config.cpus)]
    arguments += _ACCELERATOR[accelerator]
    arguments += ["-kernel", str(config.kernel.image), "-initrd", initramfs]
    arguments += ["-append", "console=ttyS0 quiet panic=-1", "-serial", "stdio"]
    for index, nic in enumerate(config.nics):
        arguments += nic.arguments(f"net{index}", accelerator)
    if config.incoming:
        arguments += ["-incoming", "defer"]
    return arguments + list(config.extra_arguments)
