"""What the zero-copy machine is told to do, as text; it runs in make test-zerocopy."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
from pathlib import Path

import pytest

from mpassthru.errors import RefusedError
from mpassthru.testing import zerocopy_machine
from mpassthru.testing.child import ChildError
from mpassthru.testing.initramfs import GuestKernel
from mpassthru.testing.zerocopy_machine import NICS, MachineConfig, init_script, qemu_arguments, run_in_machine


def config(tmp_path: Path, *, share: Path | None = None) -> MachineConfig:
    return MachineConfig(qemu=tmp_path / "q", kernel=GuestKernel(tmp_path / "vmlinuz", tmp_path / "1.2.3"), share=share)


def test_init_script_is_a_shell_script_and_quotes_the_command(tmp_path: Path) -> None:
    script = init_script(config(tmp_path, share=tmp_path / "re ports"), ["echo", "it's", "$HOME"], tmp_path)
    subprocess.run(["busybox", "sh", "-n"], input=script, text=True, check=True)
    assert "$HOME" in script
    for nic in NICS:
        assert f"{nic.mac}) ip link set dev ${{nic##*/}} name {nic.name};;" in script


def test_wires_join_a_nic_under_test_with_a_plain_one(tmp_path: Path) -> None:
    arguments = qemu_arguments(config(tmp_path), "/initramfs", kvm=False)
    netdevs = [value for option, value in itertools.pairwise(arguments) if option == "-netdev"]
    assert len(netdevs) == len(NICS)
    assert {wire.partition("hubid=")[2] for wire in netdevs} == {"1", "2"}
    devices = [value for option, value in itertools.pairwise(arguments) if option == "-device"]
    under_test = next(device for device in devices if "netdev=virtio," in device)
    assert "iommu_platform=on" in under_test
    assert "guest_csum=off" in under_test


def test_file_system_of_the_host_is_read_only_and_one_folder_is_not(tmp_path: Path) -> None:
    arguments = qemu_arguments(config(tmp_path, share=tmp_path), "/initramfs", kvm=False)
    host, share = (value for option, value in itertools.pairwise(arguments) if option == "-fsdev")
    assert "path=/," in host
    assert "readonly=on" in host
    assert f"path={tmp_path}," in share
    assert "readonly=off" in share


async def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, timeout_s: float = 10
) -> tuple[int, list[str]]:
    """Run a shell script in place of QEMU."""
    monkeypatch.setattr(zerocopy_machine, "build_initramfs", lambda *_, **__: b"")
    monkeypatch.setattr(zerocopy_machine, "qemu_arguments", lambda *_, **__: ["sh", "-c", machine])
    lines: list[str] = []
    status = await run_in_machine(config(tmp_path), ["true"], timeout_s=timeout_s, say=lines.append, cwd=tmp_path)
    return status, lines


async def test_exit_status_and_output_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = "echo one; echo 'zerocopy-machine: ended with status 7'; exec sleep 60"
    status, lines = await run(tmp_path, monkeypatch, machine)
    assert (status, lines) == (7, ["one"])


async def test_machine_that_ends_early_is_an_error_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ChildError, match="kernel panic"):
        await run(tmp_path, monkeypatch, "echo kernel panic")


async def test_machine_is_ended_at_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(30):
            await run(tmp_path, monkeypatch, "exec sleep 60", timeout_s=0.2)


def test_kernel_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no kernel"):
        GuestKernel.find(tmp_path)
