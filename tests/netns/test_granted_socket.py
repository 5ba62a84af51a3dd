"""The AF_XDP socket that a worker is given: good for its port's interface and no other."""

from __future__ import annotations

import errno
import mmap
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mpassthru.broker.xsk import create_socket
from mpassthru.netdev import af_xdp
from mpassthru.testing.netns import Namespace

PROGRAM = """
import os, socket, sys
from mpassthru.worker import privileges
privileges.drop(parent_pid=os.getppid(), uid=65534, gid=65534)
AF_XDP = 44
sock = socket.socket(AF_XDP, socket.SOCK_RAW, 0, fileno=int(sys.argv[1]))
SO_BINDTOIFINDEX = 62
for option, value in ((SO_BINDTOIFINDEX, 0), (SO_BINDTOIFINDEX, 1), (socket.SO_BINDTODEVICE, b"lo")):
    try:
        sock.setsockopt(socket.SOL_SOCKET, option, value)
    except PermissionError:
        continue
    print("changed by", option, value)
"""


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, 2 * af_xdp.CHUNK_SIZE_BYTES) as memory:
        yield memory


def test_socket_binds_to_its_interface(veth: Namespace, memory: mmap.mmap) -> None:
    with create_socket(veth.ifindex) as sock:
        af_xdp.register_umem(sock, memory)
        af_xdp.set_ring_sizes(sock, 2)

        af_xdp.bind(sock, ifindex=veth.ifindex, queue_id=0, mode="copy")


def test_socket_does_not_bind_to_another_interface(veth: Namespace, memory: mmap.mmap) -> None:
    with create_socket(veth.ifindex) as sock:
        af_xdp.register_umem(sock, memory)
        af_xdp.set_ring_sizes(sock, 2)

        with pytest.raises(OSError, match="EINVAL") as raised:
            af_xdp.bind(sock, ifindex=veth.peer_ifindex, queue_id=0, mode="copy")

    assert raised.value.errno == errno.EINVAL


def test_worker_cannot_change_the_interface(veth: Namespace) -> None:
    with create_socket(veth.ifindex) as sock:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(sock.fileno())],
            pass_fds=[sock.fileno()],
            capture_output=True,
            text=True,
            check=True,
        )

    assert done.stdout == ""
