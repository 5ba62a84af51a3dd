"""The accounts of locked memory: what one port and all of them may lock, whoever dies in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpassthru.errors import HostError, RefusedError
from mpassthru.locked_memory import Budget, Holding, LockedMemory, default_host_max_bytes, holdings

GIB = 1 << 30
OTHER_BROKER = """
import sys, time
from pathlib import Path
from mpassthru.locked_memory import Budget, LockedMemory
port = LockedMemory(Path(sys.argv[1]), "eth1", Budget(host_max_bytes=16 << 30))
port.lock(6 << 30)
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another broker, which has 6 GiB locked."""
    command = (sys.executable, "-c", OTHER_BROKER, str(tmp_path))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def port(directory: Path | None, *, port_max_bytes: int | None = None, host_max_bytes: int = 16 * GIB) -> LockedMemory:
    return LockedMemory(directory, "eth0", Budget(port_max_bytes=port_max_bytes, host_max_bytes=host_max_bytes))


def test_ports_share_what_the_host_may_lock_and_learn_who_has_it(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    with port(tmp_path) as ours:
        ours.lock(10 * GIB)
        with pytest.raises(RefusedError) as refused:
            ours.lock(10 * GIB + 1)
        assert ours.locked_bytes == 10 * GIB
        assert sorted(holdings(tmp_path), key=lambda holding: holding.interface) == [
            Holding("eth0", os.getpid(), 10 * GIB),
            Holding("eth1", other.pid, 6 * GIB),
        ]
    assert str(refused.value) == (
        "cannot lock 10 GiB of memory for a guest on eth0: all ports of this host may lock 16 GiB, and others hold "
        f"6 GiB (6 GiB for eth1 (pid {other.pid})); "
        "give the guest less memory, end another one, or raise --locked-memory-all"
    )


def test_port_has_a_budget_of_its_own(tmp_path: Path) -> None:
    with port(tmp_path, port_max_bytes=4 * GIB) as ours:
        ours.lock(4 * GIB)
        with pytest.raises(RefusedError, match=r"this port's budget is 4 GiB; .* raise --locked-memory$"):
            ours.lock(5 * GIB)


def test_killed_broker_holds_nothing_and_leaves_nothing(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    with port(tmp_path) as ours:
        other.send_signal(signal.SIGKILL)
        other.wait()
        ours.lock(16 * GIB)
        assert holdings(tmp_path) == [Holding("eth0", os.getpid(), 16 * GIB)]
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_what_is_held_already_may_always_be_lessened(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    assert other.poll() is None
    with port(tmp_path, host_max_bytes=16 * GIB) as ours:
        ours.lock(8 * GIB)
        ours.budget = Budget(host_max_bytes=GIB)
        ours.lock(7 * GIB)
        ours.lock(0)
        with pytest.raises(RefusedError):
            ours.lock(1)


def test_port_without_accounts_has_its_budget_still() -> None:
    with port(None, port_max_bytes=GIB) as ours:
        ours.lock(GIB)
        with pytest.raises(RefusedError, match="this port's budget"):
            ours.lock(2 * GIB)


def test_host_without_accounts_holds_nothing(tmp_path: Path) -> None:
    assert holdings(tmp_path / "none") == []
    assert holdings(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_accounts_are_only_for_their_owner_and_group(tmp_path: Path) -> None:
    with port(tmp_path):
        modes = {path.name.partition("-")[0]: path.stat().st_mode & 0o7 for path in tmp_path.iterdir()}
    assert modes == {"lock": 0, "port": 0}


def test_directory_that_cannot_be_had_is_said_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory, name in ((tmp_path / "no" / "parent", "ENOENT"), (tmp_path / "file", "EEXIST")):
        with pytest.raises(HostError, match=rf"accounts of locked memory in .* \({name}\).*--runtime-dir"):
            port(directory)


def test_broken_accounts_are_not_counted_as_nothing(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    assert other.poll() is None
    (broken,) = tmp_path.glob("port-*")
    broken.write_text("nonsense")
    with port(tmp_path) as ours, pytest.raises(RefusedError, match="broken"):
        ours.lock(1)


def test_host_keeps_some_of_its_memory_by_default() -> None:
    total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert total_bytes - GIB <= default_host_max_bytes() < total_bytes


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), max_size=30))
def test_never_more_is_held_than_the_host_may_lock(steps: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        ports = [LockedMemory(Path(name), f"eth{index}", Budget(host_max_bytes=16)) for index in range(3)]
        model = [0, 0, 0]
        for index, wanted in steps:
            others = sum(model) - model[index]
            try:
                ports[index].lock(wanted)
            except RefusedError:
                assert wanted > model[index]
                assert wanted + others > 16
            else:
                model[index] = wanted
            assert sum(model) <= 16
            assert sorted(holding.locked_bytes for holding in holdings(Path(name))) == sorted(model)
        for one in ports:
            one.close()


def test_port_that_ends_while_another_looks_disturbs_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [*found(self, pattern), self / "port-gone"])
    with port(tmp_path) as ours:
        ours.lock(GIB)
        assert [holding.locked_bytes for holding in holdings(tmp_path)] == [GIB]
