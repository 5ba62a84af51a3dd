"""What is left of a process that gave its privileges up: who it is, what it may do, what ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping

import pytest

from mpassthru.worker import privileges

NOBODY = 65534
ROOTS_FILES = ("/etc/shadow", "/etc/passwd", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/root")
AS_NOBODY = f"uid={NOBODY}, gid={NOBODY}"


def run_child(program: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    text = "import os\nfrom mpassthru.worker import privileges\n" + textwrap.dedent(program)
    return subprocess.run([sys.executable, "-c", text], check=check, capture_output=True, text=True)


def status_after_drop(arguments: str) -> Mapping[str, str]:
    done = run_child(f"""
        privileges.drop(parent_pid=os.getppid(), {arguments})
        print(open("/proc/self/status").read())
    """)
    return {name: value.strip() for name, _, value in (line.partition(":") for line in done.stdout.splitlines())}


def test_drop_leaves_no_capability_and_no_way_to_get_one() -> None:
    status = status_after_drop(AS_NOBODY)

    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert status["NoNewPrivs"] == "1"


def test_drop_becomes_the_user_in_no_other_group() -> None:
    status = status_after_drop(AS_NOBODY)

    assert status["Uid"].split() == status["Gid"].split() == [str(NOBODY)] * 4
    assert status["Groups"] == ""


def test_drop_keeps_ipc_lock_alone_where_it_is_asked_for_and_there() -> None:
    had = privileges.permitted_capabilities()

    status = status_after_drop(f"{AS_NOBODY}, keep_ipc_lock=True")

    assert privileges.permitted_capabilities(f"CapPrm:\t{status['CapPrm']}") == had & {privileges.CAP_IPC_LOCK}
    assert status["CapEff"] == status["CapPrm"]
    assert int(status["CapBnd"], 16) == 0


def test_nothing_of_roots_can_be_written_and_no_secret_read() -> None:
    done = run_child(f"""
        import json
        privileges.drop(parent_pid=os.getppid(), {AS_NOBODY})
        writable = [path for path in {ROOTS_FILES!r} if os.access(path, os.W_OK)]
        print(json.dumps([writable, os.access("/etc/shadow", os.R_OK)]))
    """)

    assert json.loads(done.stdout) == [[], False]


@pytest.mark.parametrize("arguments", ["", "uid=0, gid=0"])
def test_drop_refuses_to_leave_a_process_of_roots(arguments: str) -> None:
    done = run_child(f"privileges.drop(parent_pid=os.getppid(), {arguments})", check=False)

    assert done.returncode == 1
    assert "the worker cannot run as root" in done.stderr.splitlines()[-1]


def test_parent_that_is_killed_takes_a_process_that_became_another_user_with_it() -> None:
    """Changing the user clears the parent death signal that was asked for before."""
    done = run_child(
        f"""
        import signal
        reading, writing = os.pipe()
        parent_pid = os.getpid()
        if os.fork() == 0:
            os.close(reading)
            privileges.die_with_parent(parent_pid)
            privileges.drop(parent_pid=parent_pid, {AS_NOBODY})
            os.write(writing, b"dropped")
            signal.pause()
        os.close(writing)
        assert os.read(reading, 7) == b"dropped"
        if os.fork() == 0:
            # Reads end of file when the last writer, the process that dropped its privileges, is gone.
            signal.alarm(5)
            os.read(reading, 1)
            print("gone", flush=True)
            os._exit(0)
        os.kill(parent_pid, signal.SIGKILL)
    """,
        check=False,
    )

    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "gone\n"


def test_parent_that_is_gone_already_ends_the_drop() -> None:
    pid = os.getppid() if os.getppid() != 1 else 2

    done = run_child(f"privileges.drop(parent_pid={pid}, {AS_NOBODY})\nprint('went on')", check=False)

    assert (done.returncode, done.stdout) == (0, "")
