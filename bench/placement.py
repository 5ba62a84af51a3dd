"""Who runs on which CPU. On a small machine threads share them, and who shares with whom decides what is measured."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from bench.cpu import pin_own_threads, pin_process


@dataclass(frozen=True, kw_only=True)
class Placement:
    """CPUs of the wire's sender, of the back-end and of the guest's driver.

    With three CPUs or more each has one of its own. With two, the wire has the first and the back-end the second. The
    guest shares the back-end's if that sleeps: beside the sender, which does not leave the kernel for milliseconds, it
    would wait, and its ring run empty. A back-end that polls leaves nothing of its own: there the guest may use both.
    """

    wire: set[int] = field(default_factory=lambda: _cpus(0))
    backend: set[int] = field(default_factory=lambda: _cpus(1))
    guest: set[int] = field(default_factory=lambda: _cpus(2))
    guest_of_sleeper: set[int] = field(
        default_factory=lambda: _cpus(2) if len(os.sched_getaffinity(0)) > 2 else _cpus(1)
    )

    def place_wire(self) -> None:
        """Place the wire's sending threads; called once they run."""
        for name in ("frame-generator", "wire-sender"):
            pin_own_threads(name, self.wire)

    def place_backend(self, pid: int) -> None:
        """Place a back-end's process."""
        pin_process(pid, self.backend)

    def place_guest(self, *, backend_polls: bool) -> None:
        """Place the guest's threads; called once they run."""
        pin_own_threads("guest-", self.guest if backend_polls else self.guest_of_sleeper)

    def polling_cores(self) -> tuple[int, int]:
        """For a program with a thread for commands, which sleeps, and one that polls."""
        return min(self.wire), min(self.backend)

    def text(self) -> str:
        """For the report."""
        places = {
            "wire": self.wire,
            "back-end": self.backend,
            "guest": self.guest_of_sleeper,
            "guest of a back-end that polls": self.guest,
        }
        return ", ".join(f"{name} on CPU {'+'.join(map(str, sorted(cpus)))}" for name, cpus in places.items())


def _cpus(place: int) -> set[int]:
    cpus = sorted(os.sched_getaffinity(0))
    return {cpus[place]} if place < len(cpus) else set(cpus)
