"""The pure parts of tools/, which are scripts and not modules."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

UNPRIVILEGED = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")
TOOLS = Path(__file__).resolve().parents[3] / "tools"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader = SourceFileLoader(name.replace("-", "_"), str(TOOLS / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def run_steps(folder: Path, *commands: str) -> tuple[int, str, dict[str, object]]:
    """Run tools/run-steps in a folder; returns exit status, output, report."""
    command = [sys.executable, str(TOOLS / "run-steps"), "name", *commands]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, json.loads((folder / "build/reports/name.json").read_text())


def test_totals_of_pytest_and_cargo_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    output = (
        "test result: ok. 5 passed; 0 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.01s\n"
        "\x1b[32m===== \x1b[1m7 passed\x1b[0m, 1 skipped, 3 warnings in 0.12s =====\x1b[0m\n"
        "1 failed, 4 passed, 2 errors in 61.20s (0:01:01)\n"
    )
    counts = load("run-steps", monkeypatch).count_tests(output)
    assert counts == {"passed": 16, "failed": 1, "errors": 2, "skipped": 3}


def test_steps_stop_at_the_first_failure(tmp_path: Path) -> None:
    status, output, report = run_steps(tmp_path, "echo one", "exit 3", "echo three")
    assert status == 1
    assert "stopped at step 2 of 3: exit 3" in output.splitlines()[-1]
    assert "three" not in output.splitlines()
    assert report["ok"] is False


def test_green_steps_are_reported(tmp_path: Path) -> None:
    status, output, report = run_steps(tmp_path, "true", "echo '2 passed in 0.01s'")
    assert status == 0
    assert output.splitlines()[-1] == "make name: green in 0 s (2 passed)"
    assert (report["ok"], report["passed"]) == (True, 2)


def test_step_that_skipped_every_test_is_red(tmp_path: Path) -> None:
    status, output, _ = run_steps(tmp_path, "echo '2 skipped in 0.01s'")
    assert status == 1
    assert "every test of this step was skipped" in output


def test_mirrors_are_read_from_both_forms_of_apt_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/debian.sources").write_text(
        "Types: deb deb-src\n# a comment in a stanza\nURIs: http://a.example/debian\nSuites: one one-updates\n"
        "\nTypes: deb-src\nURIs: http://b.example/debian\nSuites: one\n"
        "\nEnabled: no\nTypes: deb\nURIs: http://c.example/debian\nSuites: one\n"
    )
    (tmp_path / "sources.list").write_text(
        "# deb http://d.example/debian one main\ndeb [arch=amd64 signed-by=/k] http://e.example/debian two main\n"
    )
    module = load("unpacked_debian.py", monkeypatch)
    monkeypatch.setattr(module, "APT_SOURCES", tmp_path)
    assert list(module.configured_mirrors()) == [
        ("http://a.example/debian", "one"),
        ("http://a.example/debian", "one-updates"),
        ("http://e.example/debian", "two"),
    ]


def test_setup_in_a_tree_of_somebody_else_is_one_line(tmp_path: Path) -> None:
    """As a user who may not write there; to be one, an unprivileged process is enough."""
    (tmp_path / "tools").mkdir()
    shutil.copy(TOOLS / "setup", tmp_path / "tools")
    tmp_path.chmod(0o555)
    command = [*(UNPRIVILEGED if os.geteuid() == 0 else ()), str(tmp_path / "tools/setup")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"setup: cannot write to {tmp_path} as ")


def test_setup_packages_are_one_a_line_and_sorted_by_section() -> None:
    lines = (TOOLS / "debian-packages.txt").read_text().splitlines()
    names = [line for line in lines if not line.startswith("#")]
    assert all(name == name.strip() and " " not in name for name in names)
    assert len(names) == len(set(names))
