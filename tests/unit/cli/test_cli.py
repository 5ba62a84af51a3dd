"""The command line without a kernel: usage errors, exit statuses, QEMU's conventions, one line per error."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mpassthru import cli
from mpassthru.broker import attach as attach_module
from mpassthru.broker.endpoint import SocketAccess
from mpassthru.broker.status import PortStatus
from mpassthru.cli import app as app_module
from mpassthru.cli import attach as attach_command_module
from mpassthru.cli.sizes import parse_size
from mpassthru.cli.socket_access import parse_socket_access
from mpassthru.errors import HostError, MpassthruError, RefusedError

DOCUMENTED_JSON = Path(__file__).parents[3] / "docs/qemu/50-mpassthru.json"
MAC = "52:54:00:12:34:56"


@pytest.fixture(autouse=True)
def _sigint() -> Iterator[None]:
    """`main` is made for a process of its own."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app_module.app, list(arguments))
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("attach",), "IFACE"),
        (("attach", "eth9"), "exactly one of --socket-path, --fd and --connect"),
        (("attach", "eth9", "--socket-path", "/s", "--fd", "3"), "exactly one of"),
        (("attach", "eth9", "--socket-path", "/s", "--steer", "mac"), "--steer mac needs --mac"),
        (("attach", "eth9", "--socket-path", "/s", "--qmp-nic", "net0"), "--qmp-nic is about --qmp"),
        (("attach", "eth9", "--socket-path", "/s", "--mac", "nonsense"), "is not a MAC address"),
        (("attach", "eth9", "--socket-path", "/s", "--mac", "01:00:5e:00:00:01"), "group address"),
        (("attach", "eth9", "--socket-path", "/s", "--mode", "warp"), "warp"),
        (("attach", "eth9", "--socket-path", "/s", "--xdp", "offload"), "offload"),
        (("attach", "eth9", "--socket-path", "/s", "--queue", "-1"), "greater than or equal to 0"),
        (("attach", "eth9", "--socket-path", "/s", "--queues", "0"), "greater than or equal to 1"),
        (("attach", "eth9", "--socket-path", "/s", "--guest-size", "much"), "is not a size"),
        (("attach", "eth9", "--socket-path", "/s", "--socket-mode", "rw"), "is not a mode"),
        (("attach", "eth9", "--socket-path", "/s", "--socket-owner", "no such"), "there is no user"),
        (("attach", "eth9", "--socket-path", "/s", "--socket-owner", "root:no such"), "there is no group"),
        (("attach", "eth9", "--connect", "/s", "--socket-owner", "root"), "--socket-owner is about --socket-path"),
        (("doctor", "--guest-size", "0"), "is not a size"),
        (("demo", "--guest", "bhyve"), "bhyve"),
        (("nonsense",), "nonsense"),
    ],
)
def test_wrong_usage_is_status_2_and_says_what(arguments: tuple[str, ...], said: str) -> None:
    status, output = run(*arguments)

    assert status == 2
    assert said in output


@pytest.mark.parametrize("arguments", [(), ("attach",), ("attach", "eth9", "--mode", "copy")])
def test_capabilities_are_printed_whatever_else_is_said(arguments: tuple[str, ...]) -> None:
    status, output = run(*arguments, "--print-capabilities")

    assert status == 0
    assert json.loads(output)["type"] == "net"


def test_back_end_json_is_the_documented_file() -> None:
    status, output = run("backend-json")

    assert status == 0
    printed, documented = json.loads(output), json.loads(DOCUMENTED_JSON.read_text())
    assert printed.keys() == documented.keys() == {"description", "type", "binary"}
    assert (printed["type"], printed["description"]) == (documented["type"], documented["description"])
    assert Path(printed["binary"]).is_absolute()


def test_version_is_printed() -> None:
    done = subprocess.run([sys.executable, "-m", "mpassthru", "--version"], capture_output=True, text=True, check=True)

    assert done.stdout.startswith("mpassthru 0.")


@pytest.mark.parametrize(
    "error", [RefusedError("cannot do it: do this instead"), HostError(16, "cannot do it: do this instead")]
)
def test_error_is_one_line_and_status_1(
    error: MpassthruError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(app_module, "app", fail)

    with pytest.raises(SystemExit) as ended:
        cli.main()

    assert ended.value.code == 1
    assert capsys.readouterr().err == "mpassthru: cannot do it: do this instead\n"


def test_output_that_nobody_reads_any_more_is_no_traceback() -> None:
    command = [sys.executable, "-m", "mpassthru", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()

        assert process.stderr.read() == b""


@pytest.mark.parametrize("moment", ["mpassthru.errors", "typer", "mpassthru.cli.app"])
def test_interrupt_during_imports_is_no_traceback(moment: str) -> None:
    """SIGINT as soon as a certain module is looked for."""
    program = textwrap.dedent(f"""
        import os, signal, sys

        class Interrupting:
            def find_spec(self, name, path=None, target=None):
                if name == {moment!r}:
                    os.kill(os.getpid(), signal.SIGINT)

        from mpassthru.cli import main
        sys.modules.pop({moment!r}, None)
        sys.meta_path.insert(0, Interrupting())
        main()
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)

    assert done.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("owner", "mode", "access"),
    [
        (None, "0660", SocketAccess()),
        ("root", "0600", SocketAccess(mode=0o600, uid=0)),
        ("12:34", "777", SocketAccess(mode=0o777, uid=12, gid=34)),
        (":root", "0660", SocketAccess(gid=0)),
    ],
)
def test_socket_access_is_read_as_for_chown_and_chmod(owner: str | None, mode: str, access: SocketAccess) -> None:
    assert parse_socket_access(owner, mode) == access


def attach_outcome(monkeypatch: pytest.MonkeyPatch, *, succeeded: bool) -> tuple[int, str]:
    async def attach(
        options: attach_module.AttachOptions, view: attach_module.View, recipe: Callable[[int], str]
    ) -> tuple[object, bool]:
        view.say(recipe(1500))
        report = PortStatus(interface=options.interface).report(ended=True)
        return report, succeeded

    monkeypatch.setattr(attach_command_module, "attach", attach)
    result = CliRunner().invoke(app_module.app, ["attach", "eth9", "--socket-path", "/run/s", "--json"])
    return result.exit_code, result.stdout


def test_attach_prints_its_report_as_one_line_of_json(monkeypatch: pytest.MonkeyPatch) -> None:
    status, output = attach_outcome(monkeypatch, succeeded=True)

    report = json.loads(output)
    assert status == 0
    assert report["final"] is True
    assert report["interface"] == "eth9"
    assert {"mode", "rx", "tx"} <= report.keys()
    fields = {
        "frames",
        "bytes",
        "direct",
        "header_split",
        "bounced",
        "dropped",
        "offloaded",
        "copied_bytes",
        "header_bytes",
    }
    assert report["rx"].keys() == fields


def test_attach_that_failed_is_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attach_outcome(monkeypatch, succeeded=False)[0] == 1


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("4G", 4 << 30), ("512M", 512 << 20), ("2048", 2 << 30), ("1T", 1 << 40), ("4 GiB", 4 << 30), ("1gb", 1 << 30)],
)
def test_size_is_read_as_qemu_reads_it(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "G", "-4G", "4.5G", "4X", "0", "4GG"])
def test_size_that_is_none_is_a_usage_error(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_size(text)
