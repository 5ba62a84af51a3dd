"""What ports leave behind, counted: in processes, on an interface, in the kernel."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mpassthru.testing.netns import Namespace


@dataclass(frozen=True, slots=True)
class ProcessTraces:
    """What a process holds.

    Attributes:
        fds: What its descriptors are open on, sorted, without numbers.
        guest_mappings: Mappings of memory that a front-end sent.
        ring_mappings: Mappings of AF_XDP rings.
        threads: Its threads.
        locked_kib: VmLck and VmPin (proc(5)).
    """

    fds: tuple[str, ...]
    guest_mappings: int
    ring_mappings: int
    threads: int
    locked_kib: int

    @classmethod
    def of(cls, pid: int) -> ProcessTraces:
        """Count them.

        Raises:
            FileNotFoundError: there is no such process.
        """
        folder = Path(f"/proc/{pid}")
        fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        maps = (folder / "maps").read_text()
        return cls(
            fds=tuple(sorted(_targets(folder / "fd"))),
            guest_mappings=maps.count("/memfd:"),
            ring_mappings=maps.count("socket:"),
            threads=int(fields["Threads"]),
            locked_kib=sum(int(fields[name].split()[0]) for name in ("VmLck", "VmPin")),
        )


@dataclass(frozen=True, slots=True)
class InterfaceTraces:
    """What is on the interfaces of a namespace; made without arguments, nothing.

    Attributes:
        xdp_programs: Interfaces with an XDP program.
        xdp_sockets: AF_XDP sockets that are open, whatever process has them.
        promiscuous: Interfaces that receive what is not addressed to them.
    """

    xdp_programs: int = 0
    xdp_sockets: int = 0
    promiscuous: int = 0

    @classmethod
    def of(cls, namespace: Namespace) -> InterfaceTraces:
        """Count them."""
        links = json.loads(namespace.run("ip", "-json", "-details", "link", "show"))
        protocols = namespace.run("cat", "/proc/net/protocols")
        sockets = re.search(r"^XDP +\d+ +(\d+)", protocols, re.MULTILINE)
        return cls(
            xdp_programs=sum("xdp" in link for link in links),
            xdp_sockets=int(sockets[1]) if sockets else 0,
            promiscuous=sum(link.get("promiscuity", 0) for link in links),
        )


def _targets(folder: Path) -> Iterator[str]:
    for name in os.listdir(folder):
        with suppress(FileNotFoundError):  # our own, of reading the folder
            yield os.readlink(folder / name).split(":[")[0]
