"""What the user pastes, word for word."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

from mpassthru.cli.recipe import GuestRecipe

PLAIN = GuestRecipe(
    socket_path=Path("/run/mpassthru/vm1.sock"),
    queue_pairs=1,
    guest_size="4G",
    mtu_bytes=1500,
    frontend_listens=False,
)
FULL = replace(
    PLAIN,
    socket_path=Path("/run/a,b & 'c'.sock"),
    queue_pairs=4,
    frontend_listens=True,
    mac="52:54:00:12:34:56",
)


def test_qemu_options_of_a_plain_guest() -> None:
    assert PLAIN.qemu_options() == (
        "  -accel kvm -cpu host \\\n"
        "  -m 4G -object memory-backend-memfd,id=mem0,size=4G,share=on \\\n"
        "  -machine memory-backend=mem0 \\\n"
        "  -chardev socket,id=mpassthru0,path=/run/mpassthru/vm1.sock,reconnect=1 \\\n"
        "  -netdev vhost-user,id=net0,chardev=mpassthru0 \\\n"
        "  -device virtio-net-pci,netdev=net0,host_mtu=1500"
    )


def test_qemu_options_with_everything() -> None:
    assert FULL.qemu_options() == (
        "  -accel kvm -cpu host \\\n"
        "  -m 4G -object memory-backend-memfd,id=mem0,size=4G,share=on \\\n"
        "  -machine memory-backend=mem0 \\\n"
        "  -chardev socket,id=mpassthru0,path=/run/a,,b & 'c'.sock,server=on,wait=off \\\n"
        "  -netdev vhost-user,id=net0,chardev=mpassthru0,queues=4 \\\n"
        "  -device virtio-net-pci,netdev=net0,mac=52:54:00:12:34:56,host_mtu=1500,mq=on,vectors=10"
    )


def test_libvirt_xml_of_a_plain_guest() -> None:
    assert PLAIN.libvirt_xml() == (
        "  <!-- in <domain>: -->\n"
        "  <memoryBacking>\n"
        "    <source type='memfd'/>\n"
        "    <access mode='shared'/>\n"
        "  </memoryBacking>\n"
        "  <!-- in <devices>: -->\n"
        "  <interface type='vhostuser'>\n"
        "    <source type='unix' path=\"/run/mpassthru/vm1.sock\" mode='client'>\n"
        "      <reconnect enabled='yes' timeout='1'/>\n"
        "    </source>\n"
        "    <model type='virtio'/>\n"
        "    <mtu size='1500'/>\n"
        "  </interface>"
    )


def test_libvirt_xml_with_everything_is_well_formed() -> None:
    domain = ElementTree.fromstring(f"<domain>{FULL.libvirt_xml()}</domain>")

    interface = domain.find("interface")
    assert interface is not None
    source, driver, mac = interface.find("source"), interface.find("driver"), interface.find("mac")
    assert source is not None
    assert source.attrib == {"type": "unix", "path": "/run/a,b & 'c'.sock", "mode": "server"}
    assert driver is not None
    assert driver.attrib == {"queues": "4"}
    assert mac is not None
    assert mac.attrib == {"address": "52:54:00:12:34:56"}


def test_recipe_says_what_helps_without_kvm() -> None:
    assert (
        "without KVM, QEMU 7.2 crashes on MSI-X of a vhost-user device: give virtio-net-pci vectors=0" in PLAIN.text()
    )


def test_recipe_names_the_newer_option_where_the_older_one_is_used() -> None:
    assert "reconnect-ms=1000 instead of reconnect=1" in PLAIN.text()
    assert "reconnect" not in FULL.text()


def test_readme_shows_the_recipe_that_is_printed() -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text()

    assert replace(PLAIN, socket_path=Path("/run/vm1.sock")).qemu_options() in readme
