"""Every system call that can fail while a port is set up, runs and ends is made to fail, one at a time.

Which calls there are is observed, so that a new one is covered by itself. After each fault the port either goes on, or
ends with an exit status and one line that names the error; nothing is left attached, and nothing hangs.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from syscall_faults import SUPPORTED, Call, Fault, errnos_of, supervised
from traces import InterfaceTraces

from mpassthru.errors import MpassthruError, errno_name
from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.child import ChildError
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import GuestConfig, Pattern, Region, Source
from mpassthru.testing.netns import Namespace, veth_namespace

Choose = Callable[[list[Fault]], list[Fault]]

SHORT_FAULTS = 24
OCCURRENCES_MAX = 4
"""Of one kind of call: the fifth time is like the fourth."""
AT_ONCE = 2
LINES_SHOWN = 12
TOLD_AS = {
    "stack of a thread": "(EAGAIN)",  # pthread_create(3)
    "clone3": "(EAGAIN)",
    "BTF_LOAD": "(EINVAL)",  # taken for a kernel without BTF, which refuses the program then
    "SIOCGIFNAME": "is gone",
}
"""Where another error is made of it."""
FRAMES = 20
TIMEOUT_S = 10.0
GUEST = GuestConfig(regions=(Region(size_bytes=4 << 20),))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SUPPORTED, reason="system calls are known by their numbers on x86-64 only"),
]


@dataclass
class Life:
    """What became of a port that had a fault in its life."""

    calls: Counter[Call] = field(default_factory=Counter)
    injected: bool = False
    status: int | None = None
    lines: list[str] = field(default_factory=list)
    guest_ran: bool = False


async def live(namespace: Namespace, folder: Path, fault: Fault | None = None) -> Life:
    """A port for one front-end: set up, a guest connects, sends and leaves, and the port ends."""
    life = Life()
    path = folder / "port.sock"
    async with (
        supervised(folder / "launcher.sock", fault) as supervisor,
        attached_port(namespace, path, "--once", "--guest-size", "64M", prefix=supervisor.prefix) as port,
    ):
        guest = asyncio.create_task(_guest(port, path))
        try:
            life.status = await port.wait(timeout_s=TIMEOUT_S)
        finally:
            guest.cancel()
            life.lines = port.lines
            life.calls, life.injected = supervisor.calls, supervisor.injected
        (outcome,) = await asyncio.gather(guest, return_exceptions=True)
        life.guest_ran = outcome is None
        if outcome is not None and not isinstance(outcome, MpassthruError | TimeoutError | asyncio.CancelledError):
            raise outcome
    return life


async def _guest(port: AttachedPort, path: Path) -> None:
    await port.until_said("is ready")
    async with BuiltinGuest.connect(path, GUEST, timeout_s=TIMEOUT_S) as guest:
        guest.start(rx="sink", source=Source(pattern=Pattern(), count=FRAMES))
        await guest.wait_for(lambda counters: counters.tx_frames >= FRAMES, deadline_s=2.0)
        await guest.stop()


def what_is_wrong(fault: Fault, life: Life, left: InterfaceTraces, path: Path) -> str:
    """Why a port did not take a fault well; empty if it did."""
    if any("Traceback" in line or "Exception ignored" in line for line in life.lines):
        return "it is told of by a traceback"
    if left != InterfaceTraces() or (path.exists() and fault.call.name != "unlink"):
        return f"something is left: {left}"
    if life.status == 0:
        return "" if life.guest_ran else "the guest was not served, and nobody is told"
    if life.status != 1:
        return f"the exit status is {life.status}"
    words = (f"({errno_name(fault.errno)})", TOLD_AS.get(fault.call.detail) or TOLD_AS.get(fault.call.name) or "()")
    lines = [line for line in life.lines if not line.startswith("XDP: generic")]  # second best, and why
    telling = [line for line in lines if any(word in line for word in words)]
    return "" if len(telling) == 1 else f"{len(telling)} lines name the error"


async def search(namespaces: Sequence[Namespace], folder: Path, choose: Choose) -> Counter[str]:
    """Try the chosen faults, in several namespaces at once; returns what became of the ports."""
    observed = await live(namespaces[0], folder)
    assert (observed.status, observed.guest_ran) == (0, True), observed.lines
    faults = choose(
        [
            Fault(call, occurrence, number)
            for call, count in observed.calls.items()
            for occurrence in range(1, min(count, OCCURRENCES_MAX) + 1)
            for number in errnos_of(call)
        ]
    )
    bad: list[str] = []
    outcomes: Counter[str] = Counter()

    async def work(namespace: Namespace, folder: Path) -> None:
        folder.mkdir()  # noqa: ASYNC240 (takes no time)
        while faults:
            fault = faults.pop()
            try:
                life = await live(namespace, folder, fault)
            except (TimeoutError, ChildError) as error:
                bad.append(f"{fault}: {error}")
                continue
            outcomes["went on" if life.status == 0 else "refused"] += life.injected
            if wrong := what_is_wrong(fault, life, InterfaceTraces.of(namespace), folder / "port.sock"):
                bad.append(f"{fault}: {wrong}: status {life.status}, {' | '.join(life.lines[-LINES_SHOWN:])}")

    async with asyncio.TaskGroup() as tasks:
        for number, namespace in enumerate(namespaces):
            tasks.create_task(work(namespace, folder / str(number)))
    assert not bad, "\n".join(bad)
    return outcomes


@pytest.fixture
def namespaces() -> Iterator[list[Namespace]]:
    with ExitStack() as stack:
        yield [stack.enter_context(veth_namespace()) for _ in range(AT_ONCE)]


@pytest.mark.timeout(300)
async def test_some_faults(
    namespaces: list[Namespace], tmp_path: Path, seed: int, record_figure: Callable[[str, object], None]
) -> None:
    outcomes = await search(namespaces, tmp_path, lambda faults: random.Random(seed).sample(faults, SHORT_FAULTS))

    record_figure("faults", dict(outcomes))


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_all_faults(
    namespaces: list[Namespace], tmp_path: Path, record_figure: Callable[[str, object], None]
) -> None:
    outcomes = await search(namespaces, tmp_path, lambda faults: faults)

    record_figure("faults", dict(outcomes))
