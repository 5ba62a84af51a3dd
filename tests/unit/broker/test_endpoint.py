"""Where front-ends come from: paths that are free, stale, taken or no sockets; peers that listen late; passed fds."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpassthru.broker.endpoint import ConnectingEndpoint, InheritedEndpoint, ListeningEndpoint, SocketAccess
from mpassthru.errors import HostError, RefusedError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "port.sock"


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(path))
    return sock


def unix_listener(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen(1)
    return sock


async def test_listening_endpoint_gives_out_who_connects_and_removes_its_path(path: Path) -> None:
    endpoint = ListeningEndpoint(path)
    with connect(path) as frontend, await endpoint.next_connection() as connection:
        frontend.sendall(b"hello")
        assert connection.recv(5) == b"hello"

    endpoint.close()

    assert path.name not in os.listdir(path.parent)


@pytest.mark.parametrize("mode", [0o660, 0o600, 0o666])
def test_path_has_its_mode_whatever_the_umask(path: Path, mode: int) -> None:
    umask = os.umask(0o077)
    try:
        endpoint = ListeningEndpoint(path, SocketAccess(mode=mode))
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(umask)

    assert stat.S_IMODE(path.stat().st_mode) == mode
    endpoint.close()


def test_path_that_cannot_be_given_away_is_refused_and_removed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(HostError, match=r"cannot give .*port\.sock to 12:34 \(EPERM\)"):
        ListeningEndpoint(path, SocketAccess(uid=12, gid=34))

    assert not path.exists()


def test_socket_that_cannot_listen_leaves_no_path(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_self: socket.socket, _backlog: int) -> None:
        raise OSError(errno.EADDRINUSE, "Address already in use")

    monkeypatch.setattr(socket.socket, "listen", refuse)
    with pytest.raises(HostError, match=r"cannot listen on .* \(EADDRINUSE\)"):
        ListeningEndpoint(path)

    assert not path.exists()


def test_path_that_cannot_be_removed_is_said_and_the_socket_closed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_self: Path, *, missing_ok: bool) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    endpoint = ListeningEndpoint(path)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(HostError, match=r"cannot remove .* \(EROFS\)"):
        endpoint.close()

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as frontend:
        assert frontend.connect_ex(str(path)) == errno.ECONNREFUSED


async def test_front_end_that_waits_is_seen_until_it_is_accepted(path: Path) -> None:
    endpoint = ListeningEndpoint(path)
    assert not endpoint.somebody_waits()
    with connect(path):
        assert endpoint.somebody_waits()

        with await endpoint.next_connection():
            assert not endpoint.somebody_waits()
    endpoint.close()


async def test_path_of_a_killed_process_is_taken_over(path: Path) -> None:
    unix_listener(path).close()

    endpoint = ListeningEndpoint(path)

    connect(path).close()
    endpoint.close()


def test_path_of_a_living_process_is_refused_and_left_alone(path: Path) -> None:
    with unix_listener(path):
        with pytest.raises(RefusedError, match=r"port\.sock: the socket path is taken by a running process"):
            ListeningEndpoint(path)

        connect(path).close()


async def test_second_port_on_a_path_is_no_frontend_of_the_first(path: Path) -> None:
    endpoint = ListeningEndpoint(path)
    with pytest.raises(RefusedError, match="taken by a running process"):
        ListeningEndpoint(path)

    assert not endpoint.somebody_waits()

    endpoint.close()


def test_path_of_a_file_is_refused_and_left_alone(path: Path) -> None:
    path.write_text("precious")

    with pytest.raises(RefusedError, match="not a socket"):
        ListeningEndpoint(path)

    assert path.read_text() == "precious"


def test_path_without_directory_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="create its directory first"):
        ListeningEndpoint(tmp_path / "missing" / "port.sock")


def test_path_too_long_for_a_socket_says_so(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="choose a shorter path"):
        ListeningEndpoint(tmp_path / ("x" * 120))


def test_path_that_somebody_else_took_over_is_not_removed(path: Path) -> None:
    endpoint = ListeningEndpoint(path)
    path.unlink()
    with unix_listener(path):
        endpoint.close()

        assert path.exists()


async def test_connecting_endpoint_waits_for_a_peer_that_listens_later(path: Path) -> None:
    connecting = asyncio.create_task(ConnectingEndpoint(path, print).next_connection())
    await asyncio.sleep(0)

    with unix_listener(path) as listener, await connecting as connection:
        peer, _ = listener.accept()
        peer.close()
        assert connection.family == socket.AF_UNIX


async def test_connecting_endpoint_gives_up_where_no_waiting_helps(path: Path) -> None:
    with pytest.raises(RefusedError, match="cannot connect to"):
        await ConnectingEndpoint(path.with_name("x" * 120), print).next_connection()


async def test_connecting_endpoint_says_once_that_nobody_listens(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = asyncio.Semaphore(0)
    pause = asyncio.sleep

    async def count(_: float) -> None:
        tries.release()
        await pause(0)

    monkeypatch.setattr(asyncio, "sleep", count)
    lines: list[str] = []
    connecting = asyncio.create_task(ConnectingEndpoint(path, lines.append).next_connection())
    for _ in range(3):
        await tries.acquire()
    connecting.cancel()

    assert lines == [f"nobody listens on {path} yet; trying again every 0.25 s"]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        yield ours, theirs
    ours.close()


async def test_connected_fd_is_given_out_once(pair: tuple[socket.socket, socket.socket]) -> None:
    endpoint = InheritedEndpoint(os.dup(pair[0].fileno()))

    assert endpoint.single
    connection = await endpoint.next_connection()
    assert connection is not None
    connection.close()
    assert await endpoint.next_connection() is None


async def test_listening_fd_is_accepted_from(path: Path) -> None:
    with unix_listener(path) as listener:
        endpoint = InheritedEndpoint(os.dup(listener.fileno()))
        assert not endpoint.single
        with connect(path):
            connection = await endpoint.next_connection()
            assert connection is not None
            connection.close()
        endpoint.close()


def test_fd_that_is_no_socket_is_refused() -> None:
    reading, writing = os.pipe()
    with pytest.raises(RefusedError, match=f"fd {reading}"):
        InheritedEndpoint(reading)
    os.close(reading)
    os.close(writing)


def test_fd_of_another_kind_of_socket_is_refused() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fd = os.dup(sock.fileno())
    with pytest.raises(RefusedError, match="not a Unix stream socket"):
        InheritedEndpoint(fd)
