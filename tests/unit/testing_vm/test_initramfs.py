from __future__ import annotations

import gzip
import lzma
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest

from mpassthru.errors import RefusedError
from mpassthru.testing.initramfs import GuestKernel, _Archive, build_initramfs, module_dependencies

RELEASE = "6.1.0-1-amd64"


@dataclass(frozen=True)
class Entry:
    """What a reader of the archive sees."""

    mode: int
    content: bytes


def read_newc(archive: bytes) -> dict[str, Entry]:
    """Read a cpio archive independently of its writer: names in order, the trailer checked and left out."""
    entries: dict[str, Entry] = {}
    offset = 0
    while True:
        assert archive[offset : offset + 6] == b"070701"
        fields = [int(archive[offset + 6 + 8 * index : offset + 14 + 8 * index], 16) for index in range(13)]
        mode, size_bytes, name_bytes = fields[1], fields[6], fields[11]
        name_start = offset + 110
        name = archive[name_start : name_start + name_bytes - 1].decode()
        content_start = (name_start + name_bytes + 3) & ~3
        offset = (content_start + size_bytes + 3) & ~3
        if name == "TRAILER!!!":
            assert offset == len(archive)
            return entries
        assert name not in entries
        entries[name] = Entry(mode, archive[content_start : content_start + size_bytes])


def module(*depends: str) -> bytes:
    return b"\x7fELF...\0license=GPL\0depends=" + ",".join(depends).encode() + b"\0retpoline=Y\0"


@pytest.fixture
def kernel(tmp_path: Path) -> GuestKernel:
    """A kernel tree as Debian unpacks it: two plain modules, one compressed, one built in."""
    modules = tmp_path / "lib/modules" / RELEASE
    (modules / "kernel").mkdir(parents=True)
    (tmp_path / "boot").mkdir()
    (tmp_path / "boot" / f"vmlinuz-{RELEASE}").write_bytes(b"kernel")
    (modules / "modules.builtin").write_text("kernel/drivers/virtio/virtio_ring.ko\n")
    (modules / "kernel" / "virtio_net.ko").write_bytes(module("net_failover", "virtio_ring"))
    (modules / "kernel" / "net-failover.ko.xz").write_bytes(lzma.compress(module("failover")))
    (modules / "kernel" / "failover.ko").write_bytes(module())
    return GuestKernel.find(tmp_path)


def test_kernel_is_found_where_debian_puts_it(kernel: GuestKernel) -> None:
    assert kernel.release == RELEASE
    assert kernel.image.read_bytes() == b"kernel"


def test_kernel_is_found_beside_its_modules(tmp_path: Path) -> None:
    modules = tmp_path / "usr/lib/modules/7.3"
    modules.mkdir(parents=True)
    (modules / "vmlinuz").touch()
    assert GuestKernel.find(tmp_path) == GuestKernel(modules / "vmlinuz", modules)


def test_missing_kernel_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="run tools/guest-kernel"):
        GuestKernel.find(tmp_path)


def test_modules_come_after_what_they_depend_on(kernel: GuestKernel) -> None:
    names = [name for name, _ in kernel.load_order(["virtio_net"])]
    assert names == ["failover", "net_failover", "virtio_net"]


def test_compressed_module_is_put_in_plain(kernel: GuestKernel) -> None:
    assert dict(kernel.load_order(["net_failover"]))["net_failover"] == module("failover")


def test_unknown_module_is_refused_by_name(kernel: GuestKernel) -> None:
    with pytest.raises(RefusedError, match="no module igb"):
        kernel.load_order(["igb"])


@pytest.mark.parametrize(
    ("object_file", "names"),
    [(module(), []), (module("a"), ["a"]), (module("a-b", "c"), ["a_b", "c"]), (b"no section", [])],
)
def test_dependencies_are_read_from_the_module(object_file: bytes, names: list[str]) -> None:
    assert module_dependencies(object_file) == names


def test_archive_holds_folders_before_what_is_in_them() -> None:
    archive = _Archive()
    archive.add("usr/lib/a", b"12345", stat.S_IFREG | 0o644)
    archive.add("usr/lib/b", b"", stat.S_IFREG | 0o755)
    entries = read_newc(gzip.decompress(archive.compressed()))
    assert list(entries) == ["usr", "usr/lib", "usr/lib/a", "usr/lib/b"]
    assert entries["usr/lib/a"] == Entry(stat.S_IFREG | 0o644, b"12345")
    assert stat.S_ISDIR(entries["usr"].mode)


def test_name_that_is_there_already_keeps_its_content() -> None:
    archive = _Archive()
    archive.add("lib.so", b"first", stat.S_IFREG | 0o755)
    archive.add("lib.so", b"second", stat.S_IFREG | 0o755)
    assert read_newc(gzip.decompress(archive.compressed()))["lib.so"].content == b"first"


@pytest.fixture
def busybox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A program that is found as busybox and needs no library."""
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / "busybox").write_bytes(b"#!/bin/sh\n")
    (folder / "busybox").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return b"#!/bin/sh\n"


def test_initramfs_has_init_shell_modules_and_files(kernel: GuestKernel, busybox: bytes) -> None:
    image = build_initramfs("#!/bin/sh\n", kernel=kernel, modules=["net_failover"], files={"etc/a": b"b"})
    entries = read_newc(gzip.decompress(image))
    assert entries["init"] == Entry(stat.S_IFREG | 0o755, b"#!/bin/sh\n")
    assert entries["bin/busybox"].content == busybox
    assert entries["bin/sh"] == Entry(stat.S_IFLNK | 0o777, b"busybox")
    assert [name for name in entries if name.endswith(".ko")] == [
        "modules/00-failover.ko",
        "modules/01-net_failover.ko",
    ]
    assert entries["etc/a"].content == b"b"


def test_initramfs_has_a_program_with_its_libraries(kernel: GuestKernel, busybox: bytes) -> None:
    entries = read_newc(gzip.decompress(build_initramfs("", kernel=kernel, programs=[Path("/bin/ls")])))
    assert entries["bin/ls"].content == Path("/bin/ls").read_bytes()
    assert any("libc.so" in name for name in entries)
    assert any("ld-linux" in name for name in entries)


def test_same_inputs_give_the_same_bytes(kernel: GuestKernel, busybox: bytes) -> None:
    first, second = (build_initramfs("x", kernel=kernel, modules=["virtio_net"]) for _ in range(2))
    assert first == second


def test_dynamic_busybox_is_refused(kernel: GuestKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "busybox").symlink_to("/bin/ls")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(RefusedError, match="busybox-static"):
        build_initramfs("", kernel=kernel)
