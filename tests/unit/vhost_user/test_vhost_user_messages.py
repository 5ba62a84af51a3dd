"""The short run of the message fuzzer, in a process of its own: it counts descriptors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FUZZER = Path(__file__).resolve().parents[3] / "fuzz/messages.py"
CASES = 5_000


@pytest.mark.slow
def test_random_sessions_end_clean_and_leave_nothing_behind() -> None:
    run = subprocess.run(
        [sys.executable, str(FUZZER), "--cases", str(CASES)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    figures = json.loads(run.stdout)
    assert figures["cases"] == CASES
    assert set(figures["ends"]) == {"clean", "ProtocolError", "HostError", "StillInUseError"}
