"""Where a port stands with an interface, and what it may be waiting for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class BindingState(Enum):
    """A port's life with interfaces. The guest's session, and its virtqueues, go on in each of them.

    From each of them `mpassthru bind` leads to `BOUND`, or leaves everything as it was, and `mpassthru unbind` to
    `UNBOUND`.
    """

    BOUND = "bound"
    """The XDP program is on the interface, and queue pairs have sockets there. Leads to `WAITING` when the interface
    lacks something; one that has other limits than before is bound anew without leaving this state."""
    WAITING = "waiting"
    """The interface lacks what `Need` says. No frame gets through. The XDP program and the queues are given back; of an
    interface that is only down the sockets alone, and not at once. Leads to `BOUND` by itself, as soon as the need is
    met by the interface that has the name of the last one."""
    UNBOUND = "unbound"
    """Nothing of any interface is held, and none is waited for."""


class Need(Enum):
    """What a port needs of an interface."""

    INTERFACE = "interface"
    """There is one of that name, in the broker's network namespace."""
    UP = "up"
    """It is administratively up. The one need that is met again without anything being taken anew."""
    QUEUE = "queue"
    """It has the queues."""
    MTU = "mtu"
    """Its frames fit."""
    PROGRAM = "program"
    """It has our XDP program, or none."""
    FREE_QUEUE = "free-queue"
    """Nobody else's AF_XDP socket is on the queues."""
    MODE = "mode"
    """The mode that was forced can be had."""
    KERNEL = "kernel"
    """The kernel does what it is asked for."""


@dataclass(frozen=True, slots=True)
class Lack:
    """A need that is not met, and why, in a line."""

    need: Need
    reason: str
