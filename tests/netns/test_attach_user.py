"""`mpassthru attach` as its user meets it: who may connect, what it says unasked, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import tempfile
from asyncio.subprocess import PIPE
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpassthru.testing.attached_port import attached_port
from mpassthru.testing.child import run_child, running_child
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.netns import Namespace
from mpassthru.vhost_user import Frontend

TIMEOUT_S = 15.0
NOBODY = 65534


@pytest.fixture
def path() -> Iterator[Path]:
    """A socket path whose directories everybody may pass."""
    with tempfile.TemporaryDirectory(prefix="mpassthru-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder) / "port.sock"


def may_connect(path: Path) -> bool:
    """Whether a user that is neither root nor in its group may connect."""
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            return sock.connect_ex(str(path)) == 0
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


async def test_socket_is_roots_alone(veth: Namespace, path: Path) -> None:
    async with attached_port(veth, path) as port:
        await port.until_said("is ready")

        assert not may_connect(path)


@pytest.mark.parametrize("options", [("--socket-owner", "nobody"), ("--socket-mode", "0666")])
async def test_socket_can_be_given_to_the_user_that_runs_qemu(
    veth: Namespace, path: Path, options: tuple[str, ...]
) -> None:
    async with attached_port(veth, path, *options) as port:
        await port.until_said("is ready")

        assert may_connect(path)


async def test_front_end_that_starts_nothing_is_explained(veth: Namespace, path: Path) -> None:
    async with attached_port(veth, path) as port:
        await port.until_said("is ready")
        async with BuiltinGuest.connect(path, start_device=False, timeout_s=TIMEOUT_S):
            line = await port.until_said("connected, but not started", timeout_s=TIMEOUT_S)

    assert "share=on" in line


async def test_second_front_end_waits_for_its_turn_and_the_user_is_told(veth: Namespace, path: Path) -> None:
    async with attached_port(veth, path) as port:
        await port.until_said("is ready")
        async with BuiltinGuest.connect(path, timeout_s=TIMEOUT_S):
            await port.until(lambda report: report.guest == "running")
            second = await Frontend.connect(path, timeout_s=TIMEOUT_S)
            await port.until_said("another front-end waits", timeout_s=TIMEOUT_S)
        with second:
            assert await second.get_features()
            report = await port.until(lambda report: report.sessions == 2)

    assert not report.troubles


async def test_steering_by_address_says_who_goes_without(veth: Namespace, path: Path) -> None:
    async with attached_port(veth, path, "--steer", "mac", "--mac", "02:00:00:00:00:01") as port:
        line = await port.until_said("--steer mac: ")

    assert "broadcast (ARP, DHCP) goes to the guest alone" in line


async def test_nobody_to_connect_to_is_said_once(veth: Namespace, path: Path) -> None:
    command = (sys.executable, "-m", "mpassthru", "attach", veth.ifname, "--connect", str(path), "--json")
    async with running_child(*command, namespace=veth) as process, asyncio.timeout(TIMEOUT_S):
        assert process.stdout is not None
        while b"nobody listens on" not in (line := await process.stdout.readline()):
            assert line
        async with BuiltinGuest.listen(path, timeout_s=TIMEOUT_S):
            process.terminate()
            output = await process.stdout.read()

    assert b"nobody listens on" not in output


async def test_terminal_that_is_closed_ends_it_in_good_order(veth: Namespace, path: Path) -> None:
    async with attached_port(veth, path) as port:
        await port.until_said("is ready")
        os.kill(port.pid, signal.SIGHUP)

        assert await port.wait() == 0
    assert port.report is not None
    assert port.report.final
    assert os.listdir(path.parent) == []


async def test_terminal_that_is_closed_does_not_end_it_under_nohup(veth: Namespace, path: Path) -> None:
    async with attached_port(veth, path, prefix=("nohup",)) as port:
        await port.until_said("is ready")
        os.kill(port.pid, signal.SIGHUP)
        before = await port.until(lambda report: report.worker_pid is not None)

        assert await port.until(lambda report: report is not before)


@pytest.mark.parametrize("options", [("--json",), ()], ids=["json", "lines"])
async def test_reader_that_has_gone_ends_it_without_a_traceback(
    veth: Namespace, path: Path, options: tuple[str, ...]
) -> None:
    reading, writing = socket.socketpair()
    enter = ("nsenter", f"--net=/proc/{os.getpid()}/fd/{veth.fd}", "--")
    command = (sys.executable, "-m", "mpassthru", "attach", veth.ifname, "--socket-path", str(path))
    process = await asyncio.create_subprocess_exec(
        *enter, *command, "--interval", "0.1", *options, stdout=writing, stderr=PIPE
    )
    writing.close()
    reading.setblocking(False)
    assert await asyncio.get_running_loop().sock_recv(reading, 1)
    reading.close()
    async with asyncio.timeout(TIMEOUT_S):
        _, said = await process.communicate()

    assert process.returncode == 1
    assert b"Traceback" not in said
    assert os.listdir(path.parent) == []
    assert "prog/xdp" not in veth.run("ip", "link", "show", "dev", veth.ifname)


async def test_last_line_of_json_says_that_it_is_the_last(veth: Namespace, path: Path) -> None:
    async with attached_port(veth, path) as port:
        first = await port.until(lambda report: True)

        assert (first.final, (await port.stop()).final) == (False, True)


async def test_doctor_counts_queues(veth: Namespace) -> None:
    output = await run_child(sys.executable, "-m", "mpassthru", "doctor", "--queues", "3", "--json", namespace=veth)

    assert json.loads(output)["guest"]["queues"] == 3
