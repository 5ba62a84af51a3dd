"""`mpassthru attach` as a whole: who may do what, what is left behind, and SIGKILL at any moment."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import textwrap
import venv
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

import mpassthru
from mpassthru.broker.status import AttachReport
from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.child import running_child, until_gone
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import GuestConfig, Pattern, Source
from mpassthru.testing.netns import Namespace
from mpassthru.vhost_user import Frontend
from mpassthru.worker.privileges import CAP_IPC_LOCK, permitted_capabilities

KILLS = 5
TIMEOUT_S = 10.0
FRAMES = 1000
GUEST_MAC = bytes.fromhex("020000000001")
WIRE_MAC = bytes.fromhex("0200000000ff")
ETHERTYPE = 0x88B6  # IEEE local experimental, the second


def make_frame(destination: bytes = GUEST_MAC, size_bytes: int = 60) -> bytes:
    return (destination + WIRE_MAC + ETHERTYPE.to_bytes(2)).ljust(size_bytes, b"\x5a")


def send_frames(namespace: Namespace, frame: bytes, count: int = 1) -> None:
    with namespace.entered(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
        wire.bind((namespace.peer, 0))
        for _ in range(count):
            wire.send(frame)


def status_of(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def mapped_files(pid: int) -> set[tuple[int, int]]:
    """Device and inode of every file that a process has mapped."""
    files = set()
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        _, _, _, device, inode, *_ = line.split()
        major, minor = (int(number, 16) for number in device.split(":"))
        files.add((os.makedev(major, minor), int(inode)))
    return files


def has_restarted(times: int, report: AttachReport) -> bool:
    return report.worker_restarts == times and report.worker_pid is not None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "port.sock"


def worker_of(report: AttachReport) -> int:
    assert report.worker_pid is not None
    return report.worker_pid


@asynccontextmanager
async def running_guest(port: AttachedPort, path: Path) -> AsyncIterator[BuiltinGuest]:
    await port.until_said("is ready")
    async with BuiltinGuest.connect(path, timeout_s=TIMEOUT_S) as guest:
        guest.start(rx="sink")
        await port.until(lambda report: report.guest == "running" and report.mode == "copy")
        yield guest


async def check_traffic(namespace: Namespace, guest: BuiltinGuest) -> None:
    """Frames go both ways, all of them."""
    before = guest.counters()
    guest.start(rx="sink", source=Source(pattern=Pattern(), count=FRAMES))
    await guest.wait_for(lambda counters: counters.tx_frames >= before.tx_frames + FRAMES, deadline_s=TIMEOUT_S)
    guest.start(rx="sink")
    send_frames(namespace, make_frame(), 100)
    await guest.wait_for(lambda counters: counters.rx_frames >= before.rx_frames + 100, deadline_s=TIMEOUT_S)


# ---- traffic and modes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("xdp", ["native", "generic"])
async def test_frames_go_both_ways_directly(veth: Namespace, path: Path, xdp: str) -> None:
    async with attached_port(veth, path, "--xdp", xdp) as port, running_guest(port, path) as guest:
        await check_traffic(veth, guest)

        report = await port.until(lambda report: report.rx.frames >= 100 and report.tx.frames >= FRAMES)

    assert report.xdp_mode == xdp
    assert (report.rx.direct, report.tx.direct) == (100, FRAMES)
    assert report.rx.copied_bytes == report.tx.copied_bytes == 0


async def test_steering_by_mac_leaves_other_frames_to_the_host(veth: Namespace, path: Path) -> None:
    options = ("--steer", "mac", "--mac", GUEST_MAC.hex(":"), "--no-broadcast")
    async with attached_port(veth, path, *options) as port, running_guest(port, path):
        for destination in (GUEST_MAC, WIRE_MAC, b"\xff" * 6):
            send_frames(veth, make_frame(destination))

        report = await port.until(lambda report: report.steering.get("0", {}).get("passed", 0) >= 2)

        assert report.steering["0"]["redirected"] == 1
        await port.until(lambda report: report.rx.frames == 1)


async def test_each_queue_pair_has_its_hardware_queue(veth_two_queues: Namespace, path: Path) -> None:
    async with attached_port(veth_two_queues, path, "--queues", "2") as port:
        await port.until_said("is ready")
        async with BuiltinGuest.connect(path, GuestConfig(queue_pairs=2), timeout_s=TIMEOUT_S) as guest:
            guest.start(rx="sink", source=Source(pattern=Pattern(), count=FRAMES))

            await guest.wait_for(lambda counters: counters.tx_frames >= 2 * FRAMES, deadline_s=TIMEOUT_S)
            report = await port.until(lambda report: report.tx.frames >= 2 * FRAMES)

    assert report.queue_ids == (0, 1)
    assert not report.troubles


async def test_second_frontend_gets_its_turn(veth: Namespace, path: Path) -> None:
    async with attached_port(veth, path) as port:
        for _ in range(3):
            async with running_guest(port, path) as guest:
                await check_traffic(veth, guest)
            await port.until(lambda report: report.guest == "waiting" and report.mode == "detached")


async def test_guest_sends_on_when_its_receiving_virtqueue_alone_is_stopped(veth: Namespace, path: Path) -> None:
    async with attached_port(veth, path) as port, running_guest(port, path) as guest:
        await check_traffic(veth, guest)
        before = guest.counters()

        await guest.frontend.get_vring_base(0)

        guest.start(rx="idle", source=Source(pattern=Pattern(), count=FRAMES))
        await guest.wait_for(lambda counters: counters.tx_frames >= before.tx_frames + FRAMES, deadline_s=TIMEOUT_S)


async def test_connect_mode_waits_for_a_frontend_that_listens(veth: Namespace, path: Path) -> None:
    command = (sys.executable, "-m", "mpassthru", "attach", veth.ifname, "--connect", str(path), "--json")
    async with running_child(*command, namespace=veth), BuiltinGuest.listen(path, timeout_s=TIMEOUT_S) as guest:
        await check_traffic(veth, guest)


async def test_inherited_socket_serves_its_one_frontend_and_ends(veth: Namespace) -> None:
    ours, theirs = socket.socketpair()
    command = (sys.executable, "-m", "mpassthru", "attach", veth.ifname, "--fd", str(theirs.fileno()))
    async with running_child(*command, namespace=veth, pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        async with BuiltinGuest.over(Frontend.from_socket(ours, timeout_s=TIMEOUT_S)) as guest:
            await check_traffic(veth, guest)
        async with asyncio.timeout(TIMEOUT_S):
            await process.communicate()

    assert process.returncode == 0


# ---- who may do what ---------------------------------------------------------------------------------------


def fields_of(status: str) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(":") for line in status.splitlines())}


@pytest.mark.parametrize(("options", "user_id"), [((), 65534), (("--user", "daemon"), 1)])
async def test_worker_is_a_user_without_groups_and_any_capability_but_ipc_lock(
    veth: Namespace, path: Path, options: tuple[str, ...], user_id: int
) -> None:
    async with attached_port(veth, path, *options) as port, running_guest(port, path) as guest:
        await check_traffic(veth, guest)
        status = status_of(worker_of(await port.until(lambda report: report.worker_pid is not None)))

    fields = fields_of(status)
    assert fields["Uid"].split() == [str(user_id)] * 4
    assert fields["Gid"].split() == [str(user_id)] * 4
    assert fields["Groups"] == ""
    assert permitted_capabilities(status) <= {CAP_IPC_LOCK}
    for name in ("CapInh", "CapBnd", "CapAmb"):
        assert int(fields[name], 16) == 0, name
    assert fields["NoNewPrivs"] == "1"


@pytest.fixture
def private_python(tmp_path: Path) -> str:
    """The interpreter of a virtual environment that only root can read, as one below /root."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    venv.create(private / "venv", symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(private / "venv")}))
    packages = {entry.name: entry for entry in Path(sysconfig.get_path("purelib")).iterdir() if entry.suffix != ".pth"}
    packages["mpassthru"] = Path(mpassthru.__file__).parent
    for name, origin in packages.items():
        (site / name).symlink_to(origin)
    return str(private / "venv" / "bin" / "python")


async def test_worker_needs_no_file_that_its_user_cannot_read(veth: Namespace, path: Path, private_python: str) -> None:
    async with attached_port(veth, path, python=private_python) as port, running_guest(port, path) as guest:
        await check_traffic(veth, guest)
        guest.ring(1).set_avail_idx(guest.ring(1).avail_idx + guest.ring(1).size + 1)
        guest.ring(1).kick()

        await port.until_said("virtqueue 1 was stopped, for the guest broke it")

        await port.stop()
    assert not any("Traceback" in line for line in port.lines)


async def test_guest_memory_is_mapped_by_the_worker_and_not_by_the_broker(veth: Namespace, path: Path) -> None:
    async with attached_port(veth, path) as port, running_guest(port, path) as guest:
        worker = worker_of(await port.until(lambda report: report.worker_pid is not None))
        memory = {
            (status.st_dev, status.st_ino) for status in (os.fstat(region[4]) for region in guest.driver.regions())
        }

        assert memory <= mapped_files(worker)
        assert not memory & mapped_files(port.pid)


async def test_broker_keeps_no_copy_of_the_queues_socket(veth: Namespace, path: Path) -> None:
    def socket_count(pid: int) -> int:
        links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
        return sum(link.startswith("socket:") for link in links)

    async with attached_port(veth, path) as port:
        await port.until_said("is ready")
        idle = socket_count(port.pid)
        async with running_guest(port, path):
            assert socket_count(port.pid) == idle + 1, "the channel to the worker in reserve"


# ---- what is left behind -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("with_guest", [False, True])
async def test_ending_leaves_nothing_behind(
    veth: Namespace, path: Path, number: signal.Signals, with_guest: bool
) -> None:
    async with attached_port(veth, path) as port:
        await port.until_said("is ready")
        worker = worker_of(await port.until(lambda report: report.worker_pid is not None))
        assert veth.has_xdp_program()
        if with_guest:
            async with running_guest(port, path):
                os.kill(port.pid, number)
                assert await port.wait() == 0
        else:
            os.kill(port.pid, number)
            assert await port.wait() == 0

    await until_gone(worker)
    assert not veth.has_xdp_program()
    assert os.listdir(path.parent) == []


async def test_interface_that_goes_down_and_up_again_carries_on(veth: Namespace, path: Path) -> None:
    async with attached_port(veth, path) as port, running_guest(port, path) as guest:
        guest.start(rx="sink", source=Source(pattern=Pattern(), rate_frames_per_s=10_000.0))
        veth.run("ip", "link", "set", veth.ifname, "down")
        await port.until_said("ENETDOWN")
        veth.run("ip", "link", "set", veth.ifname, "up")
        guest.start(rx="sink")

        await check_traffic(veth, guest)


# ---- SIGKILL at any moment ---------------------------------------------------------------------------------


async def test_killed_worker_is_replaced_and_the_guest_comes_back(veth: Namespace, path: Path) -> None:
    async with attached_port(veth, path) as port, running_guest(port, path) as guest, AsyncExitStack() as frontends:
        for restarts in range(1, KILLS + 1):
            guest.start(rx="sink", source=Source(pattern=Pattern()))
            os.kill(worker_of(await port.until(lambda report: report.mode == "copy")), signal.SIGKILL)
            await port.until(partial(has_restarted, restarts))
            guest.pause()
            await guest.reconnect(frontends.enter_context(await Frontend.connect(path, timeout_s=TIMEOUT_S)))
            await check_traffic(veth, guest)
        assert not guest.violations()


async def test_worker_killed_before_any_frontend_is_replaced(veth: Namespace, path: Path) -> None:
    async with attached_port(veth, path) as port:
        report = await port.until(lambda report: report.worker_pid is not None)
        os.kill(worker_of(report), signal.SIGKILL)

        await port.until(lambda report: report.worker_restarts == 1 and report.worker_pid is not None)
        async with running_guest(port, path) as guest:
            await check_traffic(veth, guest)


@pytest.mark.parametrize("moment", ["at once", "ready", "connected", "running"])
async def test_killed_broker_leaves_nothing_that_stops_the_next_start(veth: Namespace, path: Path, moment: str) -> None:
    for _ in range(KILLS):
        async with attached_port(veth, path, interval_s=0.05) as port:
            await kill_at(moment, port, path, veth)
    assert not veth.has_xdp_program()

    async with attached_port(veth, path) as port, running_guest(port, path) as guest:
        await check_traffic(veth, guest)


async def kill_at(moment: str, port: AttachedPort, path: Path, namespace: Namespace) -> None:
    """Kill the broker at a moment of its life and wait until it and its worker are gone."""
    if moment == "at once":
        port.kill()
        await port.wait()
        return
    await port.until_said("is ready")
    worker = worker_of(await port.until(lambda report: report.worker_pid is not None))
    match moment:
        case "ready":
            port.kill()
        case "connected":
            async with BuiltinGuest.connect(path, start_device=False, timeout_s=TIMEOUT_S):
                port.kill()
                await port.wait()
        case _:
            async with running_guest(port, path) as guest:
                guest.start(rx="sink", source=Source(pattern=Pattern()))
                send_frames(namespace, make_frame(), 10)
                port.kill()
                await port.wait()
    await port.wait()
    await until_gone(worker)


GUEST_PROGRAM = textwrap.dedent("""
    import asyncio, sys
    from mpassthru.testing.guest import BuiltinGuest
    from mpassthru.testing.guest_config import Pattern, Source

    async def main():
        async with BuiltinGuest.connect(sys.argv[1]) as guest:
            guest.start(rx="echo", source=Source(pattern=Pattern(sizes=(60, 1514))))
            await guest.wait_for(lambda counters: counters.tx_frames > 1000)
            print("running", flush=True)
            await asyncio.sleep(3600)

    asyncio.run(main())
""")


async def test_killed_frontend_makes_room_for_the_next(veth: Namespace, path: Path) -> None:
    async with attached_port(veth, path) as port:
        await port.until_said("is ready")
        for sessions in range(1, KILLS + 1):
            async with running_child(sys.executable, "-c", GUEST_PROGRAM, str(path)) as process:
                assert process.stdout is not None
                assert await process.stdout.readline() == b"running\n"
                process.kill()
                await process.wait()
            await port.until_idle(after_sessions=sessions)
        async with running_guest(port, path) as guest:
            await check_traffic(veth, guest)
        report = await port.stop()
    assert not report.troubles


def test_pid_of_a_dead_parent_ends_a_worker(veth: Namespace) -> None:
    """A worker whose broker died before it could ask for its parent's death signal ends by itself."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        worker = [sys.executable, "-m", "mpassthru.worker", "--control-fd", str(theirs.fileno()), "--broker-pid", "1"]
        done = subprocess.run(worker, pass_fds=[theirs.fileno()], capture_output=True, timeout=TIMEOUT_S, check=False)

    assert done.returncode == 0
