"""The XDP steering program on a real veth, in native and generic mode: what goes to the guest, the host, nowhere."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Literal

import pytest

from mpassthru._core import SteeringProgram
from mpassthru.errors import HostError
from mpassthru.steering import Filter
from mpassthru.testing.netns import Namespace
from mpassthru.testing.xsk import Xsk, bound_xsk

XdpMode = Literal["native", "generic"]

GUEST_MAC = bytes.fromhex("020000000001")
OTHER_MAC = bytes.fromhex("020000000002")
BROADCAST = b"\xff" * 6
MULTICAST = bytes.fromhex("01005e000001")
SOURCE_MAC = bytes.fromhex("0200000000ff")
ETHERTYPE = 0x88B5  # IEEE local experimental
ETH_P_ALL = 3


def make_frame(destination: bytes, mark: int = 0, size_bytes: int = 60) -> bytes:
    return (destination + SOURCE_MAC + ETHERTYPE.to_bytes(2) + bytes([mark])).ljust(size_bytes, b"\x5a")


def guests(
    *unicast: bytes,
    multicast: tuple[bytes, ...] | None = None,
    broadcast: bool = True,
    vlans: tuple[int, ...] | None = None,
) -> Filter:
    return Filter(unicast=unicast or (GUEST_MAC,), multicast=multicast, broadcast=broadcast, vlans=vlans)


def steer_by_mac(program: SteeringProgram, wanted: Filter) -> None:
    program.set_filter(wanted)
    program.steer_queue(0, steer="mac")


def packet_socket(ifname: str) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    sock.bind((ifname, ETH_P_ALL))
    return sock


def received_by_host(host: socket.socket, count: int, timeout_s: float = 2.0) -> list[bytes]:
    """`count` frames that reached the host stack; fewer only after `timeout_s`."""
    frames: list[bytes] = []
    while len(frames) < count and select.select([host], [], [], timeout_s)[0]:
        frame, address = host.recvfrom(4096)
        if address[2] != socket.PACKET_OUTGOING:
            frames.append(frame)
    return frames


@pytest.fixture
def wire(veth: Namespace) -> Iterator[socket.socket]:
    with packet_socket(veth.peer) as sock:
        yield sock


@pytest.fixture
def host(veth: Namespace) -> Iterator[socket.socket]:
    with packet_socket(veth.ifname) as sock:
        yield sock


@pytest.fixture(params=["native", "generic"])
def xdp_mode(request: pytest.FixtureRequest) -> XdpMode:
    mode: XdpMode = request.param
    return mode


@pytest.fixture
def program(veth: Namespace, xdp_mode: XdpMode) -> Iterator[SteeringProgram]:
    with closing(SteeringProgram.attach(veth.ifindex, xdp_mode=xdp_mode, queue_count=1)) as program:
        yield program


@contextmanager
def guest_on(program: SteeringProgram, veth: Namespace) -> Iterator[Xsk]:
    with bound_xsk(veth.ifindex) as xsk:
        program.set_socket(0, xsk.socket.fileno())
        yield xsk


def xdp_program_of(veth: Namespace) -> str:
    link = veth.run("ip", "-o", "link", "show", veth.ifname)
    return link.partition("xdp")[2]


def test_unclaimed_queue_passes_every_frame_to_the_host(
    program: SteeringProgram, wire: socket.socket, host: socket.socket
) -> None:
    frames = [make_frame(mac, mark) for mark, mac in enumerate((GUEST_MAC, OTHER_MAC, BROADCAST, MULTICAST))]
    for frame in frames:
        wire.send(frame)

    assert received_by_host(host, 4) == frames
    assert program.counters() == {}


def test_passthru_redirects_every_frame_and_the_host_sees_none(
    program: SteeringProgram, veth: Namespace, wire: socket.socket, host: socket.socket
) -> None:
    program.steer_queue(0, steer="passthru")
    frames = [make_frame(mac, mark) for mark, mac in enumerate((GUEST_MAC, OTHER_MAC, BROADCAST, MULTICAST))]
    with guest_on(program, veth) as guest:
        for frame in frames:
            wire.send(frame)

        assert [guest.receive() for _ in frames] == frames
        assert received_by_host(host, 1, timeout_s=0) == []
        assert program.counters() == {0: {"redirected": 4, "passed": 0, "dropped_no_guest": 0}}


def test_passthru_delivers_every_size_byte_for_byte(
    program: SteeringProgram, veth: Namespace, wire: socket.socket
) -> None:
    program.steer_queue(0, steer="passthru")
    with guest_on(program, veth) as guest:
        for size_bytes in (14, 15, 60, 61, 1513, 1514):
            frame = make_frame(GUEST_MAC, size_bytes & 0xFF, size_bytes)[:size_bytes]
            wire.send(frame)
            assert guest.receive() == frame


@pytest.mark.parametrize("groups", [(True, True), (True, False), (False, True), (False, False)])
def test_mac_gives_the_guest_its_own_frames_and_the_chosen_groups_only(
    program: SteeringProgram,
    veth: Namespace,
    wire: socket.socket,
    host: socket.socket,
    groups: tuple[bool, bool],
) -> None:
    broadcast, multicast = groups
    steer_by_mac(program, guests(broadcast=broadcast, multicast=None if multicast else ()))
    near_misses = [GUEST_MAC[:i] + bytes([GUEST_MAC[i] ^ 0x10]) + GUEST_MAC[i + 1 :] for i in range(6)]
    for_guest = [make_frame(GUEST_MAC, 0)]
    for_host = [make_frame(mac, mark) for mark, mac in enumerate([OTHER_MAC, *near_misses], 1)]
    (for_guest if broadcast else for_host).append(make_frame(BROADCAST, 100))
    (for_guest if multicast else for_host).append(make_frame(MULTICAST, 101))
    with guest_on(program, veth) as guest:
        for frame in [*for_guest, *for_host]:
            wire.send(frame)

        assert [guest.receive() for _ in for_guest] == for_guest
        assert received_by_host(host, len(for_host)) == for_host
        assert received_by_host(host, 1, timeout_s=0) == []
        assert guest.receive(timeout_s=0) is None
    assert program.counters() == {0: {"redirected": len(for_guest), "passed": len(for_host), "dropped_no_guest": 0}}


def test_frames_are_dropped_and_counted_while_no_guest_is_there(
    program: SteeringProgram, veth: Namespace, wire: socket.socket, host: socket.socket
) -> None:
    steer_by_mac(program, guests())
    for mac in (GUEST_MAC, BROADCAST, OTHER_MAC):
        wire.send(make_frame(mac))
    assert program.counters() == {0: {"redirected": 0, "passed": 1, "dropped_no_guest": 2}}

    with guest_on(program, veth) as guest:
        wire.send(make_frame(GUEST_MAC, 1))
        assert guest.receive() == make_frame(GUEST_MAC, 1)
        program.clear_socket(0)
        wire.send(make_frame(GUEST_MAC, 2))
        program.set_socket(0, guest.socket.fileno())
    wire.send(make_frame(GUEST_MAC, 3))  # closing the socket emptied its slot

    assert program.counters() == {0: {"redirected": 1, "passed": 1, "dropped_no_guest": 4}}
    assert received_by_host(host, 2, timeout_s=0) == [make_frame(OTHER_MAC)]


def test_released_queue_is_the_hosts_again_and_a_new_claim_counts_from_zero(
    program: SteeringProgram, veth: Namespace, wire: socket.socket, host: socket.socket
) -> None:
    program.steer_queue(0, steer="passthru")
    with guest_on(program, veth):
        wire.send(make_frame(GUEST_MAC))
        program.release_queue(0)
        assert program.counters() == {}
        wire.send(make_frame(GUEST_MAC, 1))
        assert received_by_host(host, 1) == [make_frame(GUEST_MAC, 1)]

        program.steer_queue(0, steer="passthru")
        wire.send(make_frame(GUEST_MAC, 2))
        assert program.counters() == {0: {"redirected": 0, "passed": 0, "dropped_no_guest": 1}}


def test_steering_a_claimed_queue_anew_keeps_its_counters(program: SteeringProgram, wire: socket.socket) -> None:
    program.steer_queue(0, steer="passthru")
    wire.send(make_frame(OTHER_MAC))
    steer_by_mac(program, guests())
    wire.send(make_frame(OTHER_MAC))

    assert program.counters() == {0: {"redirected": 0, "passed": 1, "dropped_no_guest": 1}}


def test_claiming_one_queue_leaves_the_other_to_the_host(veth_two_queues: Namespace) -> None:
    # Native only: in generic mode a veth shows every frame as one of queue 0 (see bpf/README.md).
    veth = veth_two_queues
    flows = 64
    with (
        closing(SteeringProgram.attach(veth.ifindex, xdp_mode="native", queue_count=2)) as program,
        packet_socket(veth.peer) as wire,
        packet_socket(veth.ifname) as host,
    ):
        program.steer_queue(1, steer="passthru")
        for port in range(flows):
            wire.send(udp_frame(GUEST_MAC, source_port=port))
        dropped = program.counters()[1]["dropped_no_guest"]
        passed = len(received_by_host(host, flows - dropped))

    assert passed + dropped == flows
    assert passed > 0
    assert dropped > 0


def udp_frame(destination: bytes, source_port: int) -> bytes:
    """An IPv4 UDP frame: the sender's transmit queue, and so the receive queue, follows from a hash of its ports."""
    udp = source_port.to_bytes(2) + (9).to_bytes(2) + (8).to_bytes(2) + bytes(2)
    ip = bytes.fromhex("4500001c000000004011") + bytes(2) + bytes([10, 0, 0, 1]) + bytes([10, 0, 0, 2])
    return (destination + SOURCE_MAC + b"\x08\x00" + ip + udp).ljust(60, b"\0")


def test_second_program_is_refused_with_the_id_of_the_first(
    program: SteeringProgram, veth: Namespace, xdp_mode: XdpMode
) -> None:
    with pytest.raises(HostError) as refusal:
        SteeringProgram.attach(veth.ifindex, xdp_mode=xdp_mode, queue_count=1)

    program_id = xdp_program_of(veth).partition("prog/xdp id ")[2].split()[0]
    assert refusal.value.errno == errno.EBUSY
    assert f"XDP program id {program_id} is attached there ({xdp_mode} mode)" in str(refusal.value)
    assert str(refusal.value).startswith(f"cannot attach the XDP program to {veth.ifname} (EBUSY): ")
    assert "\n" not in str(refusal.value)


def test_program_in_the_other_mode_is_refused_too(program: SteeringProgram, veth: Namespace, xdp_mode: XdpMode) -> None:
    other: XdpMode = "generic" if xdp_mode == "native" else "native"

    with pytest.raises(HostError, match=f"is attached there \\({xdp_mode} mode\\)"):
        SteeringProgram.attach(veth.ifindex, xdp_mode=other, queue_count=1)


def test_close_takes_the_program_off_at_once(program: SteeringProgram, veth: Namespace) -> None:
    assert "prog" in xdp_program_of(veth)
    program.close()

    assert xdp_program_of(veth) == ""
    with pytest.raises(HostError, match="closed"):
        program.counters()


OWNER = """
import os, sys
from mpassthru._core import SteeringProgram
program = SteeringProgram.attach(int(sys.argv[1]), xdp_mode=sys.argv[2], queue_count=1)
program.steer_queue(0, steer="passthru")
os.write(1, b"attached")
os.read(0, 1)
"""


def test_program_goes_away_with_an_owner_that_is_killed(veth: Namespace, xdp_mode: XdpMode) -> None:
    for _ in range(5):
        owner = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(veth.ifindex), xdp_mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with owner:
            assert owner.stdout is not None
            assert os.read(owner.stdout.fileno(), 8) == b"attached"
            assert "prog" in xdp_program_of(veth)
            owner.send_signal(signal.SIGKILL)

        # The kernel closes a dead process's descriptors before its parent hears of its end.
        assert xdp_program_of(veth) == ""
        SteeringProgram.attach(veth.ifindex, xdp_mode=xdp_mode, queue_count=1).close()


def test_interface_that_goes_away_first_leaves_a_program_that_can_be_closed(
    program: SteeringProgram, veth: Namespace
) -> None:
    program.steer_queue(0, steer="passthru")
    veth.run("ip", "link", "del", veth.ifname)

    assert program.counters()[0]["redirected"] == 0
    program.close()


def test_no_such_interface_is_named(veth: Namespace) -> None:
    with pytest.raises(HostError, match=r"interface with index 4242 \(ENODEV\)") as refusal:
        SteeringProgram.attach(4242, xdp_mode="generic", queue_count=1)
    assert refusal.value.errno == errno.ENODEV


def test_native_mode_without_driver_support_says_to_use_generic(veth: Namespace) -> None:
    with pytest.raises(HostError, match=r"to lo \(EOPNOTSUPP\): .*generic") as refusal:
        SteeringProgram.attach(socket.if_nametoindex("lo"), xdp_mode="native", queue_count=1)
    assert refusal.value.errno == errno.EOPNOTSUPP


def test_mtu_that_takes_several_buffers_needs_the_program_for_it(veth: Namespace) -> None:
    for end in (veth.ifname, veth.peer):
        veth.run("ip", "link", "set", "dev", end, "mtu", "9000")
    with veth.entered():
        with pytest.raises(HostError, match="lower the MTU"):
            SteeringProgram.attach(veth.ifindex, xdp_mode="native", queue_count=1)
        SteeringProgram.attach(veth.ifindex, xdp_mode="native", queue_count=1, frags=True).close()


def test_queue_that_does_not_exist_is_refused_everywhere(program: SteeringProgram, veth: Namespace) -> None:
    operations: tuple[Callable[[], None], ...] = (
        lambda: program.steer_queue(1, steer="passthru"),
        lambda: program.release_queue(1),
        lambda: program.set_socket(1, 0),
        lambda: program.clear_socket(1),
    )
    for operation in operations:
        with pytest.raises(HostError, match=r"queue 1 \(EINVAL\): receive queues are numbered 0 to 0"):
            operation()


def test_descriptor_that_is_no_af_xdp_socket_is_refused(program: SteeringProgram) -> None:
    with open(os.devnull) as file, pytest.raises(HostError, match=r"\(ENOTSOCK\): .*not an AF_XDP socket"):
        program.set_socket(0, file.fileno())
    with socket.socket() as sock, pytest.raises(HostError, match="not an AF_XDP socket"):
        program.set_socket(0, sock.fileno())
    with pytest.raises(ValueError, match="open descriptor"):
        program.set_socket(0, -1)
