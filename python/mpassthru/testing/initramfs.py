"""The root file system of a test guest: busybox, a few programs, the kernel's modules and an init script.

An initramfs is a cpio archive in `newc` format, here compressed by gzip; the kernel's
Documentation/driver-api/early-userspace/buffer-format.rst describes it. The same inputs give the same bytes.
"""

from __future__ import annotations

import functools
import gzip
import lzma
import re
import shutil
import stat
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mpassthru.errors import RefusedError

_NEWC_MAGIC = "070701"
_TRAILER = "TRAILER!!!"


@dataclass(frozen=True)
class GuestKernel:
    """An unmodified Linux kernel, as a Debian package unpacks it.

    Attributes:
        image: The bzImage.
        modules: Its `lib/modules/RELEASE`.
    """

    image: Path
    modules: Path

    @property
    def release(self) -> str:
        """What `uname -r` says in the guest."""
        return self.modules.name

    @classmethod
    def find(cls, root: Path) -> GuestKernel:
        """Return the kernel unpacked below `root`.

        Raises:
            RefusedError: There is none.
        """
        for modules in sorted([*root.glob("lib/modules/*"), *root.glob("usr/lib/modules/*")]):
            for image in (root / "boot" / f"vmlinuz-{modules.name}", modules / "vmlinuz"):
                if image.exists():
                    return cls(image, modules)
        raise RefusedError(f"no kernel for a test guest in {root}: run tools/guest-kernel to download one")

    @functools.cached_property
    def _module_files(self) -> dict[str, Path]:
        return {_module_name(path): path for path in self.modules.rglob("*.ko*")}

    @functools.cached_property
    def _builtin(self) -> frozenset[str]:
        return frozenset(_module_name(Path(line)) for line in (self.modules / "modules.builtin").read_text().split())

    def load_order(self, names: Iterable[str]) -> list[tuple[str, bytes]]:
        """Return the modules and all that they depend on, (name, object file), dependencies first.

        What is built into the kernel is left out. Each module names what it depends on (`modinfo -F depends`), so
        no `modules.dep` is needed; Debian makes that only when the package is installed.

        Raises:
            RefusedError: The kernel has no such module.
        """
        ordered: dict[str, bytes] = {}

        def visit(name: str) -> None:
            if name in ordered or name in self._builtin:
                return
            if name not in self._module_files:
                raise RefusedError(f"kernel {self.release} has no module {name}: choose another package of the kernel")
            content = _read_module(self._module_files[name])
            for dependency in module_dependencies(content):
                visit(dependency)
            ordered[name] = content

        for name in names:
            visit(name)
        return list(ordered.items())


def _module_name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


def _read_module(path: Path) -> bytes:
    """Return the object file, decompressed: busybox's insmod knows no xz."""
    match path.suffix:
        case ".ko":
            return path.read_bytes()
        case ".xz":
            return lzma.decompress(path.read_bytes())
        case ".gz":
            return gzip.decompress(path.read_bytes())
    raise RefusedError(f"cannot read kernel module {path}: its compression is not known here (.xz and .gz are)")


def module_dependencies(module: bytes) -> list[str]:
    """Return the names that a module's `depends=` in section .modinfo holds."""
    match = re.search(rb"\0depends=([^\0]*)\0", module)
    return [name.replace("-", "_") for name in match[1].decode().split(",") if name] if match else []


@dataclass
class _Archive:
    """A cpio archive in memory; parent folders are added as they are needed."""

    _entries: bytearray = field(default_factory=bytearray)
    _names: set[str] = field(default_factory=set)

    def add(self, name: str, content: bytes, mode: int) -> None:
        """Append an entry (path without leading slash), once; a name that is there already keeps its content."""
        if name in self._names:
            return
        parent = name.rpartition("/")[0]
        if parent:
            self.add(parent, b"", stat.S_IFDIR | 0o755)
        self._names.add(name)
        links = 2 if stat.S_ISDIR(mode) else 1
        #         ino                mode  uid gid nlink mtime filesize     dev(major, minor) rdev  namesize check
        fields = (len(self._names), mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        self._entries += (_NEWC_MAGIC + "".join(f"{value:08X}" for value in fields) + name + "\0").encode()
        self._pad()
        self._entries += content
        self._pad()

    def _pad(self) -> None:
        self._entries += bytes(-len(self._entries) % 4)

    def compressed(self) -> bytes:
        """Return the finished archive."""
        self.add(_TRAILER, b"", 0)
        return gzip.compress(self._entries, compresslevel=1, mtime=0)


def shared_libraries(program: Path) -> list[Path]:
    """Return the shared libraries that a dynamic program is loaded with, the loader included; none if it is static."""
    listing = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    return [Path(path) for path in re.findall(r"(/\S+) \(0x", listing)]


def find_program(name: str, package: str) -> Path:
    """Return the path of a program.

    Raises:
        RefusedError: It is not installed; the message names the Debian package.
    """
    path = shutil.which(name)
    if path is None:
        raise RefusedError(f"cannot find the program {name}: install Debian's {package}")
    return Path(path)


def build_initramfs(
    init: str,
    *,
    kernel: GuestKernel,
    modules: Sequence[str] = (),
    programs: Sequence[Path] = (),
    files: Mapping[str, bytes] | None = None,
) -> bytes:
    """Build the root file system of a guest.

    Args:
        init: The script that becomes /init, for busybox's sh.
        kernel: Where the modules come from.
        modules: Modules to put into /modules with what they depend on, numbered in load order.
        programs: Host programs to put into /bin, with their shared libraries.
        files: More files, by path without leading slash.

    Returns:
        A gzip-compressed cpio archive.

    Raises:
        RefusedError: busybox-static, a module or a program is missing.
    """
    archive = _Archive()
    for folder in ("dev", "proc", "sys", "tmp", "root"):
        archive.add(folder, b"", stat.S_IFDIR | 0o755)
    # The kernel opens it for init's standard streams, before init can mount /dev.
    archive.add("init", init.encode(), stat.S_IFREG | 0o755)
    busybox = find_program("busybox", "busybox-static")
    if shared_libraries(busybox):
        raise RefusedError(f"{busybox} is not static: install Debian's busybox-static")
    archive.add("bin/busybox", busybox.read_bytes(), stat.S_IFREG | 0o755)
    archive.add("bin/sh", b"busybox", stat.S_IFLNK | 0o777)
    for position, (name, content) in enumerate(kernel.load_order(modules)):
        archive.add(f"modules/{position:02}-{name}.ko", content, stat.S_IFREG | 0o644)
    for program in programs:
        archive.add(f"bin/{program.name}", program.read_bytes(), stat.S_IFREG | 0o755)
        for library in shared_libraries(program):
            archive.add(str(library).lstrip("/"), library.read_bytes(), stat.S_IFREG | 0o755)
    for name, content in sorted((files or {}).items()):
        archive.add(name, content, stat.S_IFREG | 0o644)
    return archive.compressed()
