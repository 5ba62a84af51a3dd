"""The machine that the figures are of."""

from __future__ import annotations

import os
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

from bench.placement import Placement


def machine(placement: Placement) -> dict[str, str]:
    """What a reader needs to know to compare."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    memory_kib = int(Path("/proc/meminfo").read_text().partition("MemTotal:")[2].split()[0])
    hypervisor = Path("/sys/hypervisor/type")
    in_vm = hypervisor.exists() or "hypervisor" in cpuinfo
    return {
        "cpu": f"{_cpu()}, {len(os.sched_getaffinity(0))} CPUs" + (" (VM)" if in_vm else ""),
        "memory": f"{memory_kib / (1 << 20):.1f} GiB",
        "kernel": os.uname().release,
        "interface": "veth pair in a network namespace, one queue, MTU 1500, GRO on, native XDP",
        "placement": placement.text(),
        "load before": f"{os.getloadavg()[0]:.2f}",
        "mpassthru": f"{version('mpassthru')} {_revision()}",
        "dpdk": _debian_version("dpdk-dev"),
    }


def toolchain() -> dict[str, str]:
    """What instruction counts depend on."""
    versions = (("rustc", "--version"), ("valgrind", "--version"), ("ldd", "--version"))
    lines = (subprocess.run(it, capture_output=True, text=True, check=True).stdout.splitlines()[0] for it in versions)
    rust, valgrind, libc = lines
    return {"cpu": _cpu(), "rust": rust, "valgrind": valgrind, "libc": libc, "mpassthru": _revision()}


def _cpu() -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return model[1] if model else "unknown"


def _revision() -> str:
    git = subprocess.run(("git", "describe", "--always", "--dirty"), capture_output=True, text=True, check=False)
    return git.stdout.strip() or "(no git)"


def _debian_version(package: str) -> str:
    query = ("dpkg-query", "-W", "-f", "${Version}", package)
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout or "not installed"
