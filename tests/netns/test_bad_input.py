"""Bad input of every kind: one line that says what failed, on what, and what to do; an exit status; nothing left over.

What the user or the host gets wrong is refused before anything is attached. What a front-end or a guest gets wrong ends
its session or its virtqueue, and `--once` turns that into an exit status.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Literal

import pytest

from mpassthru._core import SteeringProgram
from mpassthru.errors import MpassthruError
from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import GuestConfig, Region
from mpassthru.testing.netns import Namespace
from mpassthru.testing.xsk import bound_xsk
from mpassthru.vhost_user import Frontend, MemoryRegion, Request, VringAddress

TIMEOUT_S = 15.0
NO_IPC_LOCK = ("setpriv", "--bounding-set=-ipc_lock,-sys_resource", "--inh-caps=-all")
VHOST_USER_VERSION = 1
NEED_REPLY = 1 << 3
RX, TX = 0, 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "port.sock"


def assert_nothing_left(namespace: Namespace, path: Path) -> None:
    assert "prog/xdp" not in namespace.run("ip", "link", "show", "dev", namespace.ifname)
    assert not path.is_socket()


# ---- what the user or the host gets wrong --------------------------------------------------------------------


def refused(namespace: Namespace, *arguments: str, prefix: tuple[str, ...] = ()) -> str:
    """Run `mpassthru attach`, which has to be refused with one line on stderr; returns the line."""
    with namespace.entered():
        done = subprocess.run(
            [*prefix, sys.executable, "-m", "mpassthru", "attach", *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert done.returncode == 1, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("mpassthru: ")
    return line


def test_no_such_interface(veth: Namespace, path: Path) -> None:
    line = refused(veth, "nosuch0", "--socket-path", str(path))

    assert "cannot find interface nosuch0 (ENODEV)" in line
    assert "'ip link'" in line


def test_no_privilege(veth: Namespace, path: Path) -> None:
    prefix = ("setpriv", "--bounding-set=-net_admin,-bpf,-sys_admin", "--inh-caps=-all")
    line = refused(veth, veth.ifname, "--socket-path", str(path), prefix=prefix)

    assert "cannot attach without CAP_BPF, CAP_NET_ADMIN: run as root" in line
    assert_nothing_left(veth, path)


def test_interface_that_is_down(veth: Namespace, path: Path) -> None:
    veth.run("ip", "link", "set", veth.ifname, "down")
    line = refused(veth, veth.ifname, "--socket-path", str(path))

    assert f"it is down; 'ip link set dev {veth.ifname} up'" in line
    assert_nothing_left(veth, path)


def test_interface_with_frames_too_large(veth: Namespace, path: Path) -> None:
    veth.run("ip", "link", "set", veth.ifname, "mtu", "9217")
    line = refused(veth, veth.ifname, "--socket-path", str(path))

    assert "MTU 9217" in line
    assert "mtu 9216" in line
    assert_nothing_left(veth, path)


def test_queue_that_does_not_exist(veth: Namespace, path: Path) -> None:
    line = refused(veth, veth.ifname, "--socket-path", str(path), "--queue", "3")

    assert f"queue 3 of {veth.ifname}" in line
    assert_nothing_left(veth, path)


def test_mode_that_cannot_be_had(veth: Namespace, path: Path) -> None:
    line = refused(veth, veth.ifname, "--socket-path", str(path), "--mode", "zero-copy")

    assert f"cannot use zero-copy mode on {veth.ifname}: veth has no zero-copy" in line
    assert "--mode copy" in line
    assert_nothing_left(veth, path)


def test_user_that_does_not_exist(veth: Namespace, path: Path) -> None:
    line = refused(veth, veth.ifname, "--socket-path", str(path), "--user", "no-such-user")

    assert "cannot run the worker as no-such-user" in line
    assert_nothing_left(veth, path)


def test_user_that_is_root(veth: Namespace, path: Path) -> None:
    line = refused(veth, veth.ifname, "--socket-path", str(path), "--user", "root")

    assert "cannot run the worker as root: uid 0 opens root's files without any capability" in line
    assert_nothing_left(veth, path)


def test_socket_path_that_is_taken(veth: Namespace, path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as owner:
        owner.bind(str(path))
        owner.listen(1)

        line = refused(veth, veth.ifname, "--socket-path", str(path))

        assert f"cannot listen on {path}: the socket path is taken" in line
        assert path.is_socket(), "the owner's socket was removed"


def test_socket_path_without_a_directory(veth: Namespace, path: Path) -> None:
    line = refused(veth, veth.ifname, "--socket-path", str(path.parent / "missing" / "s"))

    assert "create its directory first" in line
    assert_nothing_left(veth, path)


@pytest.mark.parametrize("theirs", ["native", "generic"])
@pytest.mark.parametrize("ours", ["native", "generic", "auto"])
def test_another_xdp_program(veth: Namespace, path: Path, theirs: Literal["native", "generic"], ours: str) -> None:
    with closing(SteeringProgram.attach(veth.ifindex, xdp_mode=theirs, queue_count=1)):
        line = refused(veth, veth.ifname, "--socket-path", str(path), "--xdp", ours)

        assert f"cannot attach to {veth.ifname}: XDP program" in line
        assert "take another interface" in line
        assert "prog/xdp" in veth.run("ip", "link", "show", "dev", veth.ifname), "the other program was detached"
    assert_nothing_left(veth, path)


def test_another_af_xdp_socket_on_the_queue(veth: Namespace, path: Path) -> None:
    with bound_xsk(veth.ifindex):
        line = refused(veth, veth.ifname, "--socket-path", str(path))

    assert f"cannot attach to {veth.ifname}: another AF_XDP socket owns queue 0" in line
    assert_nothing_left(veth, path)


def test_expected_guest_too_large_for_a_umem(veth: Namespace, path: Path) -> None:
    line = refused(veth, veth.ifname, "--socket-path", str(path), "--guest-size", "128G")

    assert "cannot make 128 GiB of guest memory a UMEM" in line
    assert "give the guest at most" in line
    assert_nothing_left(veth, path)


# ---- what a front-end gets wrong -----------------------------------------------------------------------------


@asynccontextmanager
async def one_session(
    namespace: Namespace, path: Path, *options: str, prefix: tuple[str, ...] = ()
) -> AsyncIterator[AttachedPort]:
    """A port that serves one front-end. Afterwards it has failed, and left nothing."""
    async with attached_port(namespace, path, "--once", *options, prefix=prefix) as port:
        await port.until_said("is ready")
        yield port
        assert await port.wait(timeout_s=TIMEOUT_S) == 1
    assert port.report is not None
    assert len(port.report.troubles) == 1, port.report.troubles
    assert port.report.worker_restarts == 0
    assert_nothing_left(namespace, path)


def header(request: int, size_bytes: int, flags: int = VHOST_USER_VERSION) -> bytes:
    return struct.pack("=III", request, flags, size_bytes)


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)


MALFORMED: dict[str, tuple[bytes, str]] = {
    "wrong version": (header(Request.VHOST_USER_GET_FEATURES, 0, flags=2), "version"),
    "payload too large": (header(Request.VHOST_USER_SET_FEATURES, 1 << 30), "bytes"),
    "payload too short": (header(Request.VHOST_USER_SET_FEATURES, 4) + bytes(4), "SET_FEATURES"),
    "truncated header": (header(Request.VHOST_USER_SET_FEATURES, 8)[:5], "5 of the 12 bytes of a header"),
    "truncated payload": (header(Request.VHOST_USER_SET_FEATURES, 8) + bytes(3), "3 of the 8 bytes"),
    "unknown request": (header(4000, 0), "4000"),
    "features not offered": (header(Request.VHOST_USER_SET_FEATURES, 8) + u64(1 << 35), "not offered"),
    "vring out of range": (
        header(Request.VHOST_USER_SET_VRING_NUM, 8) + struct.pack("=II", 99, 256),
        "vring 99 of a device with 2",
    ),
    "kick without its fd": (header(Request.VHOST_USER_SET_VRING_KICK, 8) + u64(0), "0 descriptors"),
    "memory without its fd": (
        header(Request.VHOST_USER_SET_MEM_TABLE, 40) + struct.pack("=II4Q", 1, 0, 0, 4096, 0, 0),
        "0 descriptors came along with 1 regions",
    ),
    "more memory than sent": (
        header(Request.VHOST_USER_SET_MEM_TABLE, 8) + struct.pack("=II", 8, 0),
        "SET_MEM_TABLE",
    ),
}


@pytest.mark.parametrize("kind", MALFORMED)
async def test_malformed_message(veth: Namespace, path: Path, kind: str) -> None:
    data, said = MALFORMED[kind]
    async with one_session(veth, path) as port:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as frontend:
            frontend.connect(str(path))
            frontend.sendall(data)
            frontend.shutdown(socket.SHUT_WR)
            line = await port.until_said("session ended: ")

    assert said in line


async def test_descriptor_that_is_no_memory(veth: Namespace, path: Path) -> None:
    reading, writing = os.pipe()
    async with one_session(veth, path) as port:
        with await Frontend.connect(path) as frontend:
            await frontend.set_owner()
            await frontend.set_mem_table([MemoryRegion(0, 1 << 20, 0, 0, reading)])
            line = await port.until_said("session ended: ")
    os.close(reading)
    os.close(writing)

    assert "SET_MEM_TABLE" in line
    assert "cannot map" in line


async def test_rings_outside_memory(veth: Namespace, path: Path) -> None:
    kick = os.eventfd(0)
    memory = os.memfd_create("guest")
    os.ftruncate(memory, 1 << 20)
    async with one_session(veth, path) as port:
        with await Frontend.connect(path) as frontend:
            await frontend.set_owner()
            await frontend.set_features(await frontend.get_features())
            await frontend.set_mem_table([MemoryRegion(0, 1 << 20, 0x10000, 0, memory)])
            await frontend.set_vring_num(RX, 256)
            await frontend.set_vring_base(RX, 0)
            await frontend.set_vring_addr(
                VringAddress(
                    index=RX,
                    flags=0,
                    desc_user_address=0x10000,
                    used_user_address=0x20000000,
                    avail_user_address=0x12000,
                )
            )
            await frontend.set_vring_kick(RX, kick)
            line = await port.until_said("session ended: ")
    os.close(kick)
    os.close(memory)

    assert "vring 0: used ring at 0x20000000" in line
    assert "outside the memory" in line


async def test_guest_too_large_for_a_umem(veth: Namespace, path: Path) -> None:
    memory = os.memfd_create("guest")
    os.ftruncate(memory, 65 << 30)
    async with one_session(veth, path, "--locked-memory-all", "128G") as port:
        with await Frontend.connect(path) as frontend:
            await frontend.set_owner()
            await frontend.set_mem_table([MemoryRegion(0, 65 << 30, 0x10000, 0, memory)])
            line = await port.until_said("session ended: ")
    os.close(memory)

    assert "SET_MEM_TABLE" in line
    assert "64 GiB" in line


async def test_memlock_limit_too_small(veth: Namespace, path: Path) -> None:
    limit = ("prlimit", f"--memlock={8 << 20}:{8 << 20}", *NO_IPC_LOCK)
    async with one_session(veth, path, prefix=limit) as port:
        with pytest.raises(Exception, match=r"SET_MEM_TABLE|closed|refused"):
            async with BuiltinGuest.connect(path, GuestConfig(regions=(Region(size_bytes=64 << 20),))):
                pytest.fail("the port took more memory than it may lock")
        line = await port.until_said("cannot pin 69 MiB")

    assert "the memlock limit is 8 MiB" in line
    assert "ulimit -l" in line


async def test_memory_that_is_not_shared(veth: Namespace, path: Path) -> None:
    config = GuestConfig(regions=(Region(backing="private-memfd"),))
    async with one_session(veth, path) as port, BuiltinGuest.connect(path, config) as guest:
        said = asyncio.create_task(port.until_said("its memory is not shared"))
        while not said.done():  # a driver that waits for answers kicks again, and one kick is QEMU's own
            guest.ring(0).kick()
            await asyncio.wait({said}, timeout=0.05)
        line = said.result()

    assert "share=on" in line


async def test_memory_in_a_file_that_cannot_be_pinned(veth: Namespace, path: Path) -> None:
    config = GuestConfig(regions=(Region(backing="file"),))
    async with one_session(veth, path) as port:
        with pytest.raises(MpassthruError, match=r"SET_MEM_TABLE|closed"):
            async with BuiltinGuest.connect(path, config):
                pytest.fail("the port runs on memory that cannot be a UMEM")
        line = await port.until_said("cannot map guest memory region")

    assert "cannot be pinned: use memfd" in line


# ---- what a guest gets wrong ---------------------------------------------------------------------------------


def loop_chain(guest: BuiltinGuest) -> None:
    ring = guest.ring(TX)
    ring.set_descriptor(0, address=0x4000_0000, length=64, flags=1, next=1)
    ring.set_descriptor(1, address=0x4000_0000, length=64, flags=1, next=0)
    ring.set_avail_entry(0, 0)
    ring.set_avail_idx(1)


def head_out_of_range(guest: BuiltinGuest) -> None:
    ring = guest.ring(TX)
    ring.set_avail_entry(0, ring.size + 5)
    ring.set_avail_idx(1)


def buffer_outside_memory(guest: BuiltinGuest) -> None:
    ring = guest.ring(TX)
    ring.set_descriptor(0, address=0xDEAD_0000_0000, length=64)
    ring.set_avail_entry(0, 0)
    ring.set_avail_idx(1)


def avail_index_beyond_the_ring(guest: BuiltinGuest) -> None:
    guest.ring(TX).set_avail_idx(guest.ring(TX).size + 1)


@pytest.mark.parametrize("misdeed", [loop_chain, head_out_of_range, buffer_outside_memory, avail_index_beyond_the_ring])
async def test_broken_ring_stops_its_virtqueue_alone(
    veth: Namespace, path: Path, misdeed: Callable[[BuiltinGuest], None]
) -> None:
    async with one_session(veth, path) as port, BuiltinGuest.connect(path) as guest:
        await port.until(lambda report: report.guest == "running")
        misdeed(guest)
        guest.ring(TX).kick()

        line = await port.until_said(f"virtqueue {TX} was stopped, for the guest broke it: ")

        assert guest.ring(TX).take_errors() == 1
        with veth.entered(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
            wire.bind((veth.peer, 0))
            wire.send(b"\xff" * 60)
        async with asyncio.timeout(TIMEOUT_S):
            while guest.ring(RX).used_idx != 1:  # noqa: ASYNC110 - the other queue goes on, in guest memory
                await asyncio.sleep(0.001)

    assert not line.endswith("None")
