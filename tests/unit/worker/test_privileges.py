"""Reading capability sets, and giving privileges up in a child process: an ordinary user has none to lose, root all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

from mpassthru.worker import privileges

STATUS = "Name:\tx\nCapInh:\t0000000000000000\nCapPrm:\t0000000000004001\nCapEff:\t0000000000004000\n"


def test_capability_sets_are_read_by_number() -> None:
    assert privileges.permitted_capabilities(STATUS) == {0, 14}
    assert privileges.effective_capabilities(STATUS) == {privileges.CAP_IPC_LOCK}


def test_status_without_capabilities_is_an_error() -> None:
    with pytest.raises(ValueError, match="no CapEff"):
        privileges.effective_capabilities("Name:\tx\n")


def status_after_drop(arguments: str) -> Mapping[str, str]:
    program = (
        "from mpassthru.worker import privileges\n"
        f"privileges.drop({arguments})\n"
        "print(open('/proc/self/status').read())"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return {name: value.strip() for name, _, value in (line.partition(":") for line in done.stdout.splitlines())}


def test_drop_leaves_no_capability_and_no_way_to_get_one() -> None:
    status = status_after_drop("")

    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert status["NoNewPrivs"] == "1"


def test_drop_keeps_ipc_lock_alone_where_it_is_asked_for_and_there() -> None:
    had = privileges.permitted_capabilities()

    status = status_after_drop("keep_ipc_lock=True")

    assert privileges.permitted_capabilities(f"CapPrm:\t{status['CapPrm']}") == had & {privileges.CAP_IPC_LOCK}
    assert status["CapEff"] == status["CapPrm"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user: run as root")
def test_drop_becomes_the_user_and_keeps_ipc_lock() -> None:
    had = privileges.permitted_capabilities()
    if 7 not in had:
        pytest.skip("CAP_SETUID is missing: run with the capabilities of root")

    status = status_after_drop("uid=65534, gid=65534, keep_ipc_lock=True")

    assert status["Uid"].split() == ["65534"] * 4
    assert status["Gid"].split() == ["65534"] * 4
    assert privileges.permitted_capabilities(f"CapPrm:\t{status['CapPrm']}") == had & {privileges.CAP_IPC_LOCK}
    assert int(status["CapBnd"], 16) == 0


def test_process_whose_parent_is_gone_ends_at_once() -> None:
    with pytest.raises(SystemExit):
        privileges.die_with_parent(parent_pid=1 if os.getppid() != 1 else 2)
