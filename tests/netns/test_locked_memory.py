"""The budget for locked memory, as a port and its guest meet it."""

from __future__ import annotations

import os
import re
import resource
import signal
from pathlib import Path

import pytest

from mpassthru.errors import RefusedError
from mpassthru.locked_memory import Budget, LockedMemory, holdings
from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import (
    DEFAULT_PROTOCOL_FEATURES,
    BufferLayout,
    GuestConfig,
    Pattern,
    Region,
    Source,
)
from mpassthru.testing.netns import Namespace
from mpassthru.testing.wire import PacketWire
from mpassthru.umem import slab_bytes
from mpassthru.vhost_user.features import ProtocolFeature

MIB = 1 << 20
FIRST, SECOND = 2 * MIB, 1 * MIB
GUEST = GuestConfig(
    regions=(Region(size_bytes=FIRST), Region(guest_phys_address=0x1_0000_0000, size_bytes=SECOND)),
    protocol_features=DEFAULT_PROTOCOL_FEATURES | ProtocolFeature.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    tx=BufferLayout(region=1, count=64),
)
HELD_FIRST = FIRST + slab_bytes(1)
HELD_BOTH = HELD_FIRST + SECOND


def held(directory: Path) -> int:
    return sum(holding.locked_bytes for holding in holdings(directory))


def memlock_limits(pid: int) -> list[int]:
    """Soft and hard, as getrlimit(2) would say in that process."""
    match = re.search(r"Max locked memory +(\d+) +(\d+) ", Path(f"/proc/{pid}/limits").read_text())
    assert match is not None
    return [int(text) for text in match.groups()]


async def sends(guest: BuiltinGuest, wire: PacketWire) -> None:
    """Frames go out of the guest's second region and arrive."""
    good = wire.counters().check_good
    guest.start(source=Source(pattern=Pattern(sizes=(60, 1514)), count=100))
    await wire.wait_for(lambda c: c.check_good >= good + 100)


async def ready(port: AttachedPort) -> AttachedPort:
    await port.until_said("is ready")
    return port


async def test_guest_beyond_its_ports_budget_is_refused_before_anything_is_locked(
    veth: Namespace, tmp_path: Path
) -> None:
    accounts = tmp_path / "accounts"
    options = ("--locked-memory", "7M", "--runtime-dir", str(accounts))
    async with attached_port(veth, tmp_path / "port.sock", *options) as port:
        await ready(port)
        async with BuiltinGuest.connect(port.socket_path, GUEST, start_device=False) as guest:
            with pytest.raises(RefusedError, match="SET_MEM_TABLE"):
                await guest.set_memory()
            await port.until_said("this port's budget is 7 MiB; give the guest less memory, or raise --locked-memory")
            assert held(accounts) == 0


async def test_memory_that_is_added_beyond_the_budget_is_refused_and_the_guest_goes_on(
    veth: Namespace, tmp_path: Path
) -> None:
    accounts = tmp_path / "accounts"
    options = ("--locked-memory-all", "17M", "--runtime-dir", str(accounts))
    with LockedMemory(accounts, "eth7", Budget(host_max_bytes=1 << 40)) as other:
        other.lock(10 * MIB)
        async with (
            attached_port(veth, tmp_path / "port.sock", *options) as port,
            BuiltinGuest.connect((await ready(port)).socket_path, GUEST, start_device=False) as guest,
            PacketWire(veth.peer_ifindex) as wire,
        ):
            await guest.start_device(regions=[0])
            assert held(accounts) == 10 * MIB + HELD_FIRST
            with pytest.raises(RefusedError, match="ADD_MEM_REG"):
                await guest.frontend.add_mem_reg(guest.memory[1])
            await port.until_said(f"others hold 10 MiB (10 MiB for eth7 (pid {os.getpid()}))")
            assert held(accounts) == 10 * MIB + HELD_FIRST

            other.lock(0)
            await guest.frontend.add_mem_reg(guest.memory[1])
            await sends(guest, wire)
            assert held(accounts) == HELD_BOTH
            await guest.stop()
        assert held(accounts) == 0


async def test_worker_may_lock_no_more_than_all_ports_and_memory_is_renewed_within_that(
    veth: Namespace, tmp_path: Path
) -> None:
    """The kernel's limit leaves no room for a second UMEM beside the first: sockets go before the next are made."""
    limit_bytes = 8 * MIB
    hard_bytes = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    if hard_bytes != resource.RLIM_INFINITY and hard_bytes < limit_bytes:
        pytest.skip("the memlock limit is below 8 MiB: ulimit -Hl 8192")
    options = ("--locked-memory-all", "8M", "--runtime-dir", str(tmp_path / "accounts"))
    async with (
        attached_port(veth, tmp_path / "port.sock", *options) as port,
        BuiltinGuest.connect((await ready(port)).socket_path, GUEST, start_device=False) as guest,
        PacketWire(veth.peer_ifindex) as wire,
    ):
        worker_pid = (await port.until(lambda r: r.worker_pid is not None)).worker_pid
        assert worker_pid is not None
        assert memlock_limits(worker_pid) == [limit_bytes, limit_bytes]
        await guest.start_device(regions=[0])
        await guest.frontend.add_mem_reg(guest.memory[1])
        guest.start(source=Source(pattern=Pattern(sizes=(60, 1514)), rate_frames_per_s=2000))
        report = await port.until(lambda r: r.tx.direct > 0)
        assert set(report.tx.bounced) <= {"unregistered"}
        await wire.wait_for(lambda c: c.check_good > 0)
        await guest.stop()


async def test_killed_worker_has_nothing_locked(veth: Namespace, tmp_path: Path) -> None:
    accounts = tmp_path / "accounts"
    async with attached_port(veth, tmp_path / "port.sock", "--runtime-dir", str(accounts)) as port:
        await ready(port)
        async with BuiltinGuest.connect(port.socket_path, GUEST) as guest:
            worker_pid = (await port.until(lambda r: r.guest == "running")).worker_pid
            assert worker_pid is not None
            assert held(accounts) == HELD_BOTH
            os.kill(worker_pid, signal.SIGKILL)
            await port.until_said("starting a new worker")
            assert held(accounts) == 0
            guest.pause()
