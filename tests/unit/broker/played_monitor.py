"""A QEMU of which there is only the monitor: network devices, their filters, and the notices that it gives of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GREETING = {"QMP": {"version": {}, "capabilities": ["oob"]}}


def rx_filter(**changes: Any) -> dict[str, Any]:
    """What `query-rx-filter` says of a Linux guest's device, with changes."""
    return {
        "name": "nic0",
        "promiscuous": False,
        "main-mac": "52:54:00:12:34:56",
        "unicast": "normal",
        "unicast-overflow": False,
        "unicast-table": [],
        "multicast": "normal",
        "multicast-overflow": False,
        "multicast-table": ["01:00:5e:00:00:01"],
        "broadcast-allowed": False,
        "vlan": "none",
        "vlan-table": [],
    } | {name.replace("_", "-"): value for name, value in changes.items()}


@dataclass
class Device:
    """A network device with a vhost-user back-end, its netdev and its chardev."""

    socket_path: Path
    filter: dict[str, Any] = field(default_factory=rx_filter)
    notifies: bool = False
    up: bool = True


@dataclass
class PlayedMonitor:
    """Listens, serves one client after the other, as QEMU does.

    Attributes:
        devices: By name.
        commands: What was asked, in order.
        mute: Answer nothing.
        status: Of the machine.
    """

    devices: dict[str, Device] = field(default_factory=dict)
    commands: list[dict[str, Any]] = field(default_factory=list)
    mute: bool = False
    status: str = "running"
    _clients: set[asyncio.StreamWriter] = field(default_factory=set)

    @asynccontextmanager
    async def listening(self, path: Path) -> AsyncIterator[None]:
        """There for the length of the block; then its clients are gone too."""
        server = await asyncio.start_unix_server(self._serve, path)
        try:
            yield
        finally:
            server.close()
            for writer in self._clients:
                writer.close()
            os.unlink(path)

    def change(self, name: str, **changes: Any) -> None:
        """The guest asks for something else; who has asked since the last notice gets one."""
        device = self.devices[name]
        device.filter = device.filter | {key.replace("_", "-"): value for key, value in changes.items()}
        if device.notifies:
            device.notifies = False
            for writer in self._clients:
                _say(writer, {"event": "NIC_RX_FILTER_CHANGED", "data": {"name": name, "path": "/x"}})

    def babble(self) -> None:
        """Say what is no message, unasked."""
        for writer in self._clients:
            writer.write(b"?\n")

    def count(self, command: str) -> int:
        """How often a command was given."""
        return sum(each["execute"] == command for each in self.commands)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.add(writer)
        _say(writer, GREETING)
        with contextlib.suppress(ConnectionError):
            async for line in reader:
                command = json.loads(line)
                self.commands.append(command)
                if not self.mute:
                    _say(writer, self._answer(command) | {"id": command["id"]})
        self._clients.discard(writer)
        writer.close()

    def _answer(self, command: dict[str, Any]) -> dict[str, Any]:
        arguments = command.get("arguments", {})
        device = self.devices.get(arguments.get("name"))
        result: Any = {}
        match command["execute"]:
            case "qmp_capabilities":
                pass
            case "query-status":
                result = {"status": self.status, "running": self.status == "running"}
            case "human-monitor-command":
                result = "".join(self._info_network())
            case "qom-get":
                name = arguments["path"].removeprefix("/chardevs/char-")
                result = {"type": "unix", "path": str(self.devices[name].socket_path)}
            case "query-rx-filter" if device is not None:
                device.notifies = True
                result = [device.filter | {"name": arguments["name"]}]
            case "set_link" if device is not None:
                device.up = arguments["up"]
            case _:
                desc = f"invalid net client name: {arguments.get('name')}"
                return {"error": {"class": "GenericError", "desc": desc}}
        return {"return": result}

    def _info_network(self) -> list[str]:
        lines = []
        for name in self.devices:
            lines.append(f"{name}: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n")
            lines.append(f" \\ host-{name}: index=0,type=vhost-user,vhost-user0 to char-{name}\r\n")
        return lines


def _say(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    if not writer.is_closing():
        writer.write(json.dumps(message).encode() + b"\r\n")
