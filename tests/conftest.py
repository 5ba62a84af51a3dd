"""What all tests share: the report that `make` targets leave in build/reports."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

Figure = float | str | bool | None | list["Figure"] | dict[str, "Figure"]
RecordFigure = Callable[[str, Figure], None]
FIGURE = "figure:"


class Report:
    """Counts outcomes, keeps the reasons of skips, and the figures that tests measured; written as JSON at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start_s = time.monotonic()
        self._outcomes: Counter[str] = Counter()
        self._skips: dict[str, str] = {}
        self._figures: dict[str, dict[str, object]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test once: by its call, or by the phase that kept it from being called or failed after it."""
        if report.when == "call" or report.outcome != "passed":
            outcome = "errors" if report.failed and report.when != "call" else report.outcome
            self._outcomes[outcome] += 1
        if report.skipped and isinstance(report.longrepr, tuple):
            self._skips[report.nodeid] = str(report.longrepr[2])
        if report.when == "teardown":
            figures = {
                name.removeprefix(FIGURE): value for name, value in report.user_properties if name.startswith(FIGURE)
            }
            if figures:
                self._figures[report.nodeid] = figures

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Write the report."""
        document = {
            "target": self._path.stem,
            "ok": exitstatus == pytest.ExitCode.OK,
            "seconds": round(time.monotonic() - self._start_s, 2),
            **{name: self._outcomes[name] for name in ("passed", "failed", "errors", "skipped")},
            "kernel": os.uname().release,
            "skips": self._skips,
            "figures": self._figures,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(document, indent=2) + "\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--report PATH` and `--seed N`."""
    parser.addoption("--report", type=Path, default=None, help="write outcomes and measured figures to this JSON file")
    parser.addoption("--seed", type=int, default=None, help="of tests that draw at random; they print theirs")


def pytest_configure(config: pytest.Config) -> None:
    """Start the report, if one is asked for, and undo what a shell does to jobs in the background.

    Such a job ignores SIGINT, and so would the programs that tests start and interrupt.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    path: Path | None = config.getoption("--report")
    if path is not None and not hasattr(config, "workerinput"):  # of several processes (xdist), the first hears all
        config.pluginmanager.register(Report(path), "mpassthru-report")


@pytest.fixture
def record_figure(request: pytest.FixtureRequest) -> RecordFigure:
    """Put a measured figure into the target's report: ``record_figure("tx.frames", 10_000_000)``."""

    def record(name: str, value: Figure) -> None:
        request.node.user_properties.append((FIGURE + name, value))

    return record


@pytest.fixture
def seed(pytestconfig: pytest.Config, record_figure: RecordFigure) -> int:
    """The seed of a test that draws at random, printed where it fails: `--seed`, or another each time."""
    given: int | None = pytestconfig.getoption("--seed")
    value = int.from_bytes(os.urandom(4)) if given is None else given
    record_figure("seed", value)
    print(f"again with: --seed {value}")
    return value
