"""DPDK's dpdk-testpmd, driven from asyncio: its virtio-user driver is a guest without a VM.

Options of the driver that are not given are not passed on: it runs as it comes. See DPDK's "Testpmd Runtime
Functions" and "Virtio_user" pages. The prompt on its standard output marks the end of each command.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Literal, Self

from mpassthru.errors import RefusedError
from mpassthru.testing.child import ChildError, last_lines, running_child
from mpassthru.testing.initramfs import find_program
from mpassthru.testing.netns import Namespace

ForwardMode = Literal["io", "mac", "macswap", "rxonly", "txonly", "flowgen", "icmpecho"]

_PROMPT = b"testpmd> "
_MEMORY_MIB = 1024
"""What testpmd's default pool of 155,456 buffers and its drivers' rings need: 600 is too little on some machines."""


@dataclass(frozen=True, kw_only=True)
class VirtioUser:
    """A virtio-user port (`net_virtio_user`): the driver side of a vhost-user socket. None: the driver's default."""

    path: Path
    queues: int | None = None
    queue_size: int | None = None
    mrg_rxbuf: bool | None = None
    in_order: bool | None = None
    packed_vq: bool | None = None
    server: bool | None = None
    mac: str | None = None

    def vdev(self, index: int) -> str:
        """Return EAL's `--vdev` option for port `index`."""
        return _vdev(
            f"net_virtio_user{index}",
            path=self.path,
            queues=self.queues,
            queue_size=self.queue_size,
            mrg_rxbuf=self.mrg_rxbuf,
            in_order=self.in_order,
            packed_vq=self.packed_vq,
            server=self.server,
            mac=self.mac,
        )


@dataclass(frozen=True, kw_only=True)
class VhostPort:
    """A vhost port (`net_vhost`): DPDK's own back-end, to compare with."""

    path: Path
    queues: int | None = None
    client: bool | None = None

    def vdev(self, index: int) -> str:
        """Return EAL's `--vdev` option for port `index`."""
        return _vdev(f"net_vhost{index}", iface=self.path, queues=self.queues, client=self.client)


@dataclass(frozen=True, kw_only=True)
class AfXdpPort:
    """An interface through AF_XDP (`net_af_xdp`): what DPDK's own back-end forwards to and from."""

    iface: str
    start_queue: int | None = None
    queue_count: int | None = None
    busy_budget: int | None = None

    def vdev(self, index: int) -> str:
        """Return EAL's `--vdev` option for port `index`."""
        return _vdev(
            f"net_af_xdp{index}",
            iface=self.iface,
            start_queue=self.start_queue,
            queue_count=self.queue_count,
            busy_budget=self.busy_budget,
        )


def _vdev(name: str, **options: Path | str | int | None) -> str:
    words = {
        key: str(int(value) if isinstance(value, bool) else value)
        for key, value in options.items()
        if value is not None
    }
    return ",".join([name, *(f"{key}={word}" for key, word in words.items())])


@dataclass(frozen=True, kw_only=True)
class PortStats:
    """A port's counters since it was started or they were cleared. Bytes are without FCS and virtio-net header."""

    rx_frames: int
    rx_missed: int
    rx_bytes: int
    rx_errors: int
    rx_no_buffer: int
    tx_frames: int
    tx_errors: int
    tx_bytes: int


@dataclass(frozen=True, kw_only=True)
class ForwardStats:
    """What the forwarding engine did on all ports between `start` and `stop`; dropped is what a full ring refused."""

    rx_frames: int
    rx_dropped: int
    tx_frames: int
    tx_dropped: int


def parse_port_stats(output: str) -> dict[int, PortStats]:
    """Read the output of `show port stats all`, by port.

    Raises:
        ChildError: It is not that.
    """
    return {int(section.split()[0]): _port_stats(section) for section in output.split("NIC statistics for port ")[1:]}


def _port_stats(section: str) -> PortStats:
    counters = _counters(section)
    try:
        return PortStats(
            rx_frames=counters["RX-packets"],
            rx_missed=counters["RX-missed"],
            rx_bytes=counters["RX-bytes"],
            rx_errors=counters["RX-errors"],
            rx_no_buffer=counters["RX-nombuf"],
            tx_frames=counters["TX-packets"],
            tx_errors=counters["TX-errors"],
            tx_bytes=counters["TX-bytes"],
        )
    except KeyError as missing:
        raise ChildError(f"testpmd's port statistics have no {missing}: {last_lines(section)}") from None


def parse_forward_stats(output: str) -> ForwardStats:
    """Read the accumulated statistics in the output of `stop`.

    Raises:
        ChildError: There are none: forwarding was not started.
    """
    counters = _counters(output.partition("Accumulated forward statistics for all ports")[2])
    try:
        return ForwardStats(
            rx_frames=counters["RX-packets"],
            rx_dropped=counters["RX-dropped"],
            tx_frames=counters["TX-packets"],
            tx_dropped=counters["TX-dropped"],
        )
    except KeyError as missing:
        raise ChildError(f"testpmd's forward statistics have no {missing}: {last_lines(output)}") from None


def _counters(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"([RT]X-\w+):\s+(\d+)", text)}


def memory_arguments(meminfo: str) -> list[str]:
    """Return EAL's memory options: huge pages if enough are free, else ordinary memory; both in memfds.

    vhost-user passes memory as fds, a few at most, hence one file for all of it. Ordinary memory is one file anyway.

    Args:
        meminfo: The text of /proc/meminfo.
    """
    values = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+)", meminfo, re.MULTILINE)}
    free_mib = values.get("HugePages_Free", 0) * values.get("Hugepagesize", 0) // 1024
    if free_mib >= _MEMORY_MIB:
        return ["--in-memory", "--single-file-segments"]
    return ["--no-huge", "-m", str(_MEMORY_MIB), "--no-shconf"]


def _check_start(output: str) -> None:
    """Refuse a testpmd that goes on without a port that it could not make."""
    if "vdev) probe failed" in output:
        failures = "\n".join(line for line in output.splitlines() if "(): " in line)
        raise ChildError(f"testpmd cannot make its ports: {last_lines(failures)}")


class Testpmd:
    """A dpdk-testpmd with its ports up, while its `async with` block runs.

    Its forwarding threads poll: they keep all but the first of its CPUs busy from `start` to `stop`.
    """

    __test__: ClassVar[bool] = False  # pytest takes a class of that name for a test

    def __init__(
        self,
        ports: Sequence[VirtioUser | VhostPort | AfXdpPort],
        *,
        cores: Sequence[int] = (0, 1),
        arguments: Sequence[str] = (),
        namespace: Namespace | None = None,
        start_timeout_s: float = 30.0,
    ) -> None:
        """Describe it; nothing runs yet.

        Args:
            ports: Its ports, in order.
            cores: CPUs: the first for commands, the others to forward; at least two.
            arguments: More options of testpmd (not of EAL), such as ``["--rxq=2", "--txq=2"]``.
            namespace: Network namespace of its interfaces; None for this process's.
            start_timeout_s: Seconds until it must take commands.

        Raises:
            RefusedError: Fewer than two CPUs.
        """
        if len(cores) < 2:
            raise RefusedError(f"testpmd needs two CPUs, one for commands and one to forward, not {list(cores)}")
        self._ports = list(ports)
        self._cores = list(cores)
        self._arguments = list(arguments)
        self._namespace = namespace
        self._start_timeout_s = start_timeout_s
        self._resources = AsyncExitStack()
        self._process: Process

    async def __aenter__(self) -> Self:
        """Start it and wait for its first prompt.

        Raises:
            ChildError: It ended; the message holds its last lines.
            RefusedError: It is not installed.
            TimeoutError: It takes no commands in time.
        """
        find_program("dpdk-testpmd", "dpdk-dev")
        runtime = self._resources.enter_context(tempfile.TemporaryDirectory(prefix="mpassthru-testpmd-"))
        # On a pipe its output would come in blocks, after the prompt that ends it.
        command = ["env", f"RUNTIME_DIRECTORY={runtime}", "stdbuf", "-oL", "dpdk-testpmd", *self._eal_arguments()]
        command += ["--", "--interactive", *self._arguments]
        try:
            self._process = await self._resources.enter_async_context(
                running_child(*command, namespace=self._namespace, stdin=PIPE)
            )
            _check_start(await self._until_prompt("(start)", self._start_timeout_s))
        except BaseException:
            await self._resources.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        await self._resources.aclose()

    def _eal_arguments(self) -> list[str]:
        lcores = ",".join(str(core) for core in self._cores)
        memory = memory_arguments(Path("/proc/meminfo").read_text())
        vdevs = [f"--vdev={port.vdev(index)}" for index, port in enumerate(self._ports)]
        return ["-l", lcores, "--main-lcore", str(self._cores[0]), "--no-pci", "--no-telemetry", *memory, *vdevs]

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def command(self, text: str, *, timeout_s: float = 10.0) -> str:
        """Give a command at its prompt and return what it printed.

        Raises:
            ChildError: It does not know the command, or ended.
            TimeoutError: There is no new prompt within `timeout_s` seconds.
        """
        assert self._process.stdin is not None
        with suppress(ConnectionError):  # it ended: reading says how
            self._process.stdin.write(text.encode() + b"\n")
            await self._process.stdin.drain()
        output = await self._until_prompt(text, timeout_s)
        if "Command not found" in output or "Bad arguments" in output:
            raise ChildError(f"testpmd does not understand `{text}`: {last_lines(output)}")
        return output

    async def _until_prompt(self, command: str, timeout_s: float) -> str:
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                output = await self._process.stdout.readuntil(_PROMPT)
        except asyncio.IncompleteReadError as error:
            status = await self._process.wait()
            tail = last_lines(error.partial.decode(errors="replace"))
            raise ChildError(f"testpmd ended with status {status} during `{command}`: {tail}") from None
        except TimeoutError:
            raise TimeoutError(f"testpmd did not end `{command}` within {timeout_s} s") from None
        return output.removesuffix(_PROMPT).decode(errors="replace")

    async def start(self, mode: ForwardMode | None = None) -> None:
        """Start forwarding, in `mode` if one is given.

        Raises:
            ChildError: It ended.
        """
        if mode is not None:
            await self.command(f"set fwd {mode}")
        await self.command("start")

    async def stop(self) -> ForwardStats:
        """Stop forwarding and return what it did.

        Raises:
            ChildError: It was not started, or ended.
        """
        return parse_forward_stats(await self.command("stop"))

    async def port_stats(self) -> dict[int, PortStats]:
        """Return the counters of every port."""
        return parse_port_stats(await self.command("show port stats all"))

    async def wait_for(
        self, condition: Callable[[PortStats], bool], *, port: int = 0, timeout_s: float = 30.0, poll_s: float = 0.05
    ) -> PortStats:
        """Return a port's counters as soon as they meet a condition; asked for every `poll_s` seconds.

        Raises:
            TimeoutError: They do not within `timeout_s` seconds; the message holds the last ones.
        """
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + timeout_s
        while not condition(stats := (await self.port_stats())[port]):
            if clock() > deadline_s:
                raise TimeoutError(f"testpmd's port {port} does not get there within {timeout_s} s: {stats}")
            await asyncio.sleep(poll_s)
        return stats

    async def quit(self, *, timeout_s: float = 10.0) -> int:
        """End it in its own way, giving its queues back; returns its exit status.

        Raises:
            TimeoutError: It did not end in time.
        """
        async with asyncio.timeout(timeout_s):
            await self._process.communicate(b"quit\n")
        assert self._process.returncode is not None
        return self._process.returncode
