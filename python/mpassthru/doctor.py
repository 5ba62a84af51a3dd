"""`mpassthru doctor`: what this machine, this process and an interface allow, and what a guest would cost.

`diagnose` looks and judges, and changes nothing; `render` shows its report on a terminal. The report is plain data:
`msgspec.json.encode(report)` is the ``--json`` output.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mpassthru import doctor_checks, event_loop
from mpassthru.doctor_checks import Check, Status
from mpassthru.locked_memory import RUNTIME_DIR
from mpassthru.netdev import Interface, UmemCost, read_interface, zero_copy_rules
from mpassthru.rules import ZeroCopyRules

GUEST_SIZE_BYTES: Final = 4 << 30
"""The guest that is priced when none is named."""

PortMode = Literal["zero-copy", "copy", "none"]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `diagnose` found."""

    kernel: str
    checks: list[Check]
    mode: PortMode | None = None
    """The mode that `attach --mode auto` would take now; None without an interface."""
    interface: Interface | None = None
    zero_copy: ZeroCopyRules | None = None
    """The rules of zero-copy mode; None where it cannot be had."""
    guest: UmemCost | None = None
    """None if no UMEM can be as large as the guest."""

    @property
    def failed(self) -> bool:
        """Whether something is in the way of a guest (for the exit status)."""
        return any(check.status == "fail" for check in self.checks)


def diagnose(
    ifname: str | None = None,
    guest_size_bytes: int = GUEST_SIZE_BYTES,
    *,
    queues: int = 1,
    host_max_bytes: int | None = None,
    runtime_dir: Path = RUNTIME_DIR,
) -> Report:
    """Examine the machine, this process and, if one is named, an interface.

    Runs an event loop of its own: inside one, await `examine`.

    Args:
        ifname: Interface of the current network namespace; None for the machine alone.
        guest_size_bytes: Memory of the guest to price.
        queues: Its queue pairs.
        host_max_bytes: What all ports of the host may lock together; None for the default.
        runtime_dir: Where ports keep the accounts of locked memory.

    Raises:
        HostError: ENODEV if there is no such interface.
    """
    return event_loop.run(
        examine(ifname, guest_size_bytes, queues=queues, host_max_bytes=host_max_bytes, runtime_dir=runtime_dir)
    )


async def examine(
    ifname: str | None = None,
    guest_size_bytes: int = GUEST_SIZE_BYTES,
    *,
    queues: int = 1,
    host_max_bytes: int | None = None,
    runtime_dir: Path = RUNTIME_DIR,
) -> Report:
    """As `diagnose`, inside a running event loop."""
    interface = await read_interface(ifname) if ifname is not None else None
    decision = zero_copy_rules(interface) if interface is not None else None
    rules = decision if isinstance(decision, ZeroCopyRules) else None
    cost, cost_check = doctor_checks.guest_cost(guest_size_bytes, queues=queues, zero_copy=rules is not None)
    needed_bytes = cost.pinned_bytes if cost else guest_size_bytes
    checks = [
        *doctor_checks.process_checks(),
        cost_check,
        doctor_checks.memlock(needed_bytes),
        doctor_checks.locked_memory(needed_bytes, host_max_bytes, runtime_dir),
        doctor_checks.hugepages(guest_size_bytes),
    ]
    kernel = os.uname().release
    if interface is None or decision is None:
        return Report(kernel=kernel, checks=checks, guest=cost)
    checks += await doctor_checks.interface_checks(interface, queues)
    if rules is not None:
        checks.append(doctor_checks.zero_copy_bound(interface, rules))
    mode: PortMode = "none"
    if not any(check.status == "fail" for check in checks):
        mode = "copy" if rules is None else "zero-copy"
        checks.append(doctor_checks.mode(interface, decision))
    return Report(kernel=kernel, checks=checks, mode=mode, interface=interface, zero_copy=rules, guest=cost)


_STYLES: Final[dict[Status, str]] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def render(report: Report) -> RenderableType:
    """The report as a table for `rich.print`: a line per check, with what to do where something is to be done."""
    table = Table(title=_title(report), title_justify="left", box=None, pad_edge=False, header_style="dim")
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    for check in report.checks:
        found = Text(check.found)
        if check.advice:
            found.append(f"\n→ {check.advice}", style="dim")
        table.add_row(check.name, Text(check.status, style=_STYLES[check.status]), found)
    return Group(table, Text(), _verdict(report))


def _title(report: Report) -> str:
    return f"mpassthru doctor · {report.interface.name if report.interface else 'this machine'}"


def _verdict(report: Report) -> Text:
    failed = [check.name for check in report.checks if check.status == "fail"]
    if failed:
        return Text(f"A guest cannot be attached: {', '.join(failed)}.", style="bold red")
    if report.interface:
        return Text(f"A guest can be attached to {report.interface.name}, in {report.mode} mode.", style="green")
    return Text("This machine can run mpassthru; name an interface to see what it allows.", style="green")
