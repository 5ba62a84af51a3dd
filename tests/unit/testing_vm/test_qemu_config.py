from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from mpassthru.testing.initramfs import GuestKernel
from mpassthru.testing.qemu_config import (
    Accelerator,
    GuestConfig,
    GuestNic,
    TapBackend,
    VhostUserBackend,
    qemu_arguments,
)

KERNEL = GuestKernel(Path("/k/vmlinuz"), Path("/k/modules/6.1"))
SOCKET = Path("/run/port.sock")


def options(config: GuestConfig, name: str, accelerator: Accelerator = "kvm") -> list[str]:
    """Values of every option `name` on the command line."""
    words = qemu_arguments(config, accelerator=accelerator, initramfs="/i")
    return [value for option, value in pairwise(words) if option == name]


def nic_config(backend: VhostUserBackend | TapBackend, **properties: str) -> GuestConfig:
    return GuestConfig(kernel=KERNEL, nics=[GuestNic(backend=backend, properties=properties)])


def test_memory_is_shared_with_back_ends() -> None:
    config = GuestConfig(kernel=KERNEL, memory_mib=256)
    assert options(config, "-object") == ["memory-backend-memfd,id=memory,size=262144K,share=on"]
    assert options(config, "-machine") == ["q35,memory-backend=memory"]


def test_hugepages_are_asked_for() -> None:
    (memory,) = options(GuestConfig(kernel=KERNEL, hugepages=True), "-object")
    assert memory.endswith("share=on,hugetlb=on,hugetlbsize=2M")


def test_vhost_user_nic_connects_to_the_back_end() -> None:
    config = nic_config(VhostUserBackend(socket_path=SOCKET, reconnect_s=1), mrg_rxbuf="off")
    assert options(config, "-chardev") == ["socket,id=net0-socket,path=/run/port.sock,reconnect=1"]
    assert options(config, "-netdev") == ["vhost-user,id=net0,chardev=net0-socket,queues=1"]
    (device,) = options(config, "-device")
    assert device == "virtio-net-pci,netdev=net0,mac=52:54:00:12:34:56,romfile=,mrg_rxbuf=off"


def test_qemu_can_be_the_one_that_listens() -> None:
    config = nic_config(VhostUserBackend(socket_path=SOCKET, qemu_listens=True))
    assert options(config, "-chardev") == ["socket,id=net0-socket,path=/run/port.sock,server=on,wait=off"]


def test_vhost_user_nic_has_no_msix_without_kvm() -> None:
    config = nic_config(VhostUserBackend(socket_path=SOCKET, queue_pairs=2))
    (device,) = options(config, "-device", "tcg")
    assert device.endswith("mq=on,vectors=0")


def test_tap_nic_keeps_msix_without_kvm() -> None:
    (device,) = options(nic_config(TapBackend(interface="t0")), "-device", "tcg")
    assert "vectors" not in device


def test_queue_pairs_get_their_vectors() -> None:
    (device,) = options(nic_config(VhostUserBackend(socket_path=SOCKET, queue_pairs=2)), "-device")
    assert device.endswith("mq=on,vectors=6")


def test_given_properties_win() -> None:
    (device,) = options(nic_config(VhostUserBackend(socket_path=SOCKET), vectors="4"), "-device", "tcg")
    assert device.endswith("vectors=4")
