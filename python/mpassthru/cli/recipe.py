"""What to paste: the QEMU options and the libvirt XML of a guest for a port."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import quoteattr


@dataclass(frozen=True, kw_only=True)
class GuestRecipe:
    """How a guest reaches a port."""

    socket_path: Path
    queue_pairs: int
    guest_size: str
    """Memory of the guest, as QEMU writes sizes (`4G`)."""
    mtu_bytes: int
    frontend_listens: bool
    """`--connect`: QEMU makes the socket and waits for us."""
    mac: str | None = None

    def qemu_options(self) -> str:
        """Options for a QEMU command line; guest memory has to be shared, huge pages are optional but better."""
        multiqueue = f",mq=on,vectors={2 * self.queue_pairs + 2}" if self.queue_pairs > 1 else ""
        queues = f",queues={self.queue_pairs}" if self.queue_pairs > 1 else ""
        connection = "server=on,wait=off" if self.frontend_listens else "reconnect=1"
        mac = f",mac={self.mac}" if self.mac else ""
        return " \\\n".join(
            (
                "  -accel kvm -cpu host",
                f"  -m {self.guest_size} -object memory-backend-memfd,id=mem0,size={self.guest_size},share=on",
                "  -machine memory-backend=mem0",
                f"  -chardev socket,id=mpassthru0,path={_qemu_value(self.socket_path)},{connection}",
                f"  -netdev vhost-user,id=net0,chardev=mpassthru0{queues}",
                f"  -device virtio-net-pci,netdev=net0{mac},host_mtu={self.mtu_bytes}{multiqueue}",
            )
        )

    def libvirt_xml(self) -> str:
        """Elements for a libvirt domain."""
        path = quoteattr(str(self.socket_path))
        lines = [
            "<!-- in <domain>: -->",
            "<memoryBacking>",
            "  <source type='memfd'/>",
            "  <access mode='shared'/>",
            "</memoryBacking>",
            "<!-- in <devices>: -->",
            "<interface type='vhostuser'>",
            *([f"  <mac address={quoteattr(self.mac)}/>"] if self.mac else []),
            *self._libvirt_source(path),
            "  <model type='virtio'/>",
            *([f"  <driver queues='{self.queue_pairs}'/>"] if self.queue_pairs > 1 else []),
            f"  <mtu size='{self.mtu_bytes}'/>",
            "</interface>",
        ]
        return "\n".join(f"  {line}" for line in lines)

    def text(self) -> str:
        """Both, with headings."""
        return (
            f"QEMU:\n{self.qemu_options()}\n"
            "  (hugetlb=on,hugetlbsize=2M in the memory back-end makes it faster)\n"
            "  (without KVM, QEMU 7.2 crashes on MSI-X of a vhost-user device: give virtio-net-pci vectors=0)\n"
            f"{self._survival()}"
            f"libvirt:\n{self.libvirt_xml()}"
        )

    def _libvirt_source(self, path: str) -> list[str]:
        if self.frontend_listens:
            return [f"  <source type='unix' path={path} mode='server'/>"]
        return [
            f"  <source type='unix' path={path} mode='client'>",
            "    <reconnect enabled='yes' timeout='1'/>",
            "  </source>",
        ]

    def _survival(self) -> str:
        return "" if self.frontend_listens else "  (from QEMU 9.2 on: reconnect-ms=1000 instead of reconnect=1)\n"


def _qemu_value(path: Path) -> str:
    """A path inside an option list, where a comma is written twice."""
    return str(path).replace(",", ",,")
