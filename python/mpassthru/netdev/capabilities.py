"""Which capabilities this process has (capabilities(7)), by the names that a user would grant."""

from __future__ import annotations

import enum
from pathlib import Path

from mpassthru.errors import attempting


class Capability(enum.IntEnum):
    """The capabilities that some part of mpassthru asks for."""

    CAP_KILL = 5
    CAP_SETGID = 6
    CAP_SETUID = 7
    CAP_NET_ADMIN = 12
    CAP_NET_RAW = 13
    CAP_IPC_LOCK = 14
    CAP_SYS_ADMIN = 21
    CAP_SYS_RESOURCE = 24
    CAP_BPF = 39


BROKER_NEEDS = frozenset({Capability.CAP_NET_ADMIN, Capability.CAP_NET_RAW, Capability.CAP_BPF})
"""To attach the XDP program, fill its maps, and open AF_XDP sockets."""

WORKER_USER_NEEDS = frozenset({Capability.CAP_KILL, Capability.CAP_SETGID, Capability.CAP_SETUID})
"""To start a process of another user, and to end it."""


def effective_capabilities() -> frozenset[Capability]:
    """The effective capabilities of this process, as far as mpassthru knows them."""
    with attempting("read this process's capabilities from /proc/self/status"):
        status = Path("/proc/self/status").read_text()
    effective = int(next(line for line in status.splitlines() if line.startswith("CapEff:")).split()[1], 16)
    return frozenset(capability for capability in Capability if effective >> capability & 1)


def missing_for_broker() -> list[str]:
    """Names of the capabilities that the broker needs and this process has not; CAP_SYS_ADMIN stands in for CAP_BPF."""
    have = effective_capabilities()
    if Capability.CAP_SYS_ADMIN in have:
        have |= {Capability.CAP_BPF}
    return sorted(capability.name for capability in BROKER_NEEDS - have)


def missing_for_worker_user() -> list[str]:
    """Names of the capabilities that this process would need, and has not, to run a worker as another user."""
    return sorted(capability.name for capability in WORKER_USER_NEEDS - effective_capabilities())
