"""A path that is taken over, or left alone: nobody who lives notices that somebody asked."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

import pytest

from mpassthru.broker.stale_socket import has_owner, stale_removed
from mpassthru.errors import RefusedError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "port.sock"


def bound(path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(str(path))
    return sock


def test_socket_of_a_killed_process_is_removed(path: Path) -> None:
    bound(path).close()

    with stale_removed(path):
        bound(path).close()

    assert os.listdir(path.parent) == [path.name], "the lock left something"


def test_path_that_went_away_meanwhile_is_free(path: Path) -> None:
    with stale_removed(path):
        bound(path).close()


def test_listener_is_left_alone_and_notices_nothing(path: Path) -> None:
    with bound(path) as listener:
        listener.listen(1)
        listener.setblocking(False)

        with pytest.raises(RefusedError, match="taken by a running process"), stale_removed(path):
            pytest.fail("it was removed")

        with pytest.raises(BlockingIOError):
            listener.accept()
    assert path.is_socket()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_bound_socket_has_an_owner_though_it_does_not_listen(path: Path, kind: socket.SocketKind) -> None:
    with bound(path, kind):
        assert has_owner(path)
    assert not has_owner(path)


def test_file_is_left_alone(path: Path) -> None:
    path.write_text("precious")

    with pytest.raises(RefusedError, match="not a socket"), stale_removed(path):
        pytest.fail("it was removed")

    assert path.read_text() == "precious"


def test_two_who_take_over_at_once_do_not_remove_each_others_socket(path: Path) -> None:
    bound(path).close()
    directory = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)

    with pytest.raises(RefusedError, match="try again"), stale_removed(path):
        pytest.fail("it was removed")

    os.close(directory)
    assert path.is_socket()
