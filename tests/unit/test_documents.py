"""What documents promise to be complete about."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from mpassthru.broker.status import AttachReport
from mpassthru.netdev import ZERO_COPY

ROOT = Path(__file__).parents[2]
REASONS = re.findall(r'=> "(\w+)",', (ROOT / "crates/datapath/src/stats.rs").read_text())
COUNTERS = (ROOT / "bpf/steer.bpf.c").read_text().partition("struct queue_counters {")[2].partition("}")[0]
STEERING = re.findall(r"__u64 (\w+);", COUNTERS)
PORT = [
    "interface",
    "binding",
    "link",
    "filter",
    "guest",
    "mode",
    "sessions",
    "faults",
    "worker_restarts",
    "troubles",
    "final",
]


def test_reasons_are_found_in_the_source() -> None:
    assert {"short_buffer", "no_buffer", "runt"} <= set(REASONS)
    assert "redirected" in STEERING
    assert set(PORT) <= {field.name for field in msgspec.structs.fields(AttachReport)}


@pytest.mark.parametrize("name", [*REASONS, *STEERING, *PORT])
def test_operations_explains_every_figure(name: str) -> None:
    assert f"\n| `{name}` |" in (ROOT / "docs/operations.md").read_text()


def test_readme_lists_every_driver_whose_zero_copy_is_used() -> None:
    section = (ROOT / "README.md").read_text().partition("\n## Zero-copy\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]

    listed = {name: "| tested |" in row for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert listed == {name: facts.tested for name, facts in ZERO_COPY.items() if facts.proven}
