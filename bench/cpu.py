"""CPU time of processes and of the machine, and who runs where.

A process's total is the scheduler's own sum, in nanoseconds (its CPU clock, clock_getcpuclockid(3)); how much of it was
user time is known by ticks only (`stat`), so that part needs seconds, not fractions, to be exact to a per cent.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_BUSY = (0, 1, 2, 5, 6)
"""Columns of /proc/stat: user, nice, system, irq, softirq; not idle, iowait, steal, and guest is in user."""


@dataclass(frozen=True, slots=True)
class CpuTime:
    """CPU seconds since some start; only differences mean anything."""

    user_s: float
    system_s: float
    total_s: float
    machine_s: float
    """Of all processes and interrupts on all CPUs."""


def cpu_time(pid: int) -> CpuTime:
    """CPU time of a process and of the machine now.

    Raises:
        OSError: there is no such process.
    """
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return CpuTime(
        user_s=int(stat[11]) * _TICK_S,
        system_s=int(stat[12]) * _TICK_S,
        total_s=time.clock_gettime(_cpu_clock(pid)),
        machine_s=machine_time_s(),
    )


def _cpu_clock(pid: int) -> int:
    """The clock's id (include/linux/posix-timers_types.h: CPUCLOCK_SCHED)."""
    return (~pid << 3) | 2


def machine_time_s() -> float:
    """CPU seconds that the machine has spent on anything."""
    columns = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
    return sum(int(columns[index]) for index in _BUSY) * _TICK_S


def peak_memory_bytes(pid: int) -> int:
    """The most memory that a process has had resident, shared memory included."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def pin_process(pid: int, cpus: set[int]) -> None:
    """Keep every thread of a process on some CPUs."""
    for task in _tasks(pid):
        os.sched_setaffinity(int(task.name), cpus)


def pin_own_threads(name: str, cpus: set[int]) -> None:
    """Keep this process's threads whose name begins with `name` on some CPUs."""
    for task in _tasks(os.getpid()):
        if (task / "comm").read_text().startswith(name):
            os.sched_setaffinity(int(task.name), cpus)


def _tasks(pid: int) -> Iterator[Path]:
    return Path(f"/proc/{pid}/task").iterdir()
