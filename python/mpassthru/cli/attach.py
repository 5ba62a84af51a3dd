"""`mpassthru attach`: a port in the foreground."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from mpassthru import event_loop
from mpassthru.broker.attach import attach
from mpassthru.broker.mode import ZeroCopyOptions
from mpassthru.broker.options import AttachOptions, QmpOptions
from mpassthru.broker.rx_offloads import RxOffloads
from mpassthru.broker.tx_offloads import TxOffloads
from mpassthru.cli.backend import PrintCapabilities
from mpassthru.cli.locked_memory import LockedMemoryAll, RuntimeDir
from mpassthru.cli.recipe import GuestRecipe
from mpassthru.cli.sizes import parse_size
from mpassthru.cli.socket_access import parse_socket_access
from mpassthru.cli.steer import parse_macs, steer_by
from mpassthru.live_view import JsonView, LineView, TerminalView, View

INTERVAL_TERMINAL_S = 1.0
INTERVAL_LINES_S = 10.0


def attach_command(
    interface: Annotated[str, typer.Argument(metavar="IFACE", help="Host interface.")],
    *,
    socket_path: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Listen for the front-end (QEMU) on this Unix socket.")
    ] = None,
    fd: Annotated[int | None, typer.Option(metavar="N", help="Use this inherited vhost-user socket.")] = None,
    connect: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Connect to a front-end that listens here.")
    ] = None,
    socket_owner: Annotated[
        str | None,
        typer.Option(metavar="USER[:GROUP]", help="Owner of --socket-path: the user whose QEMU is to connect."),
    ] = None,
    socket_mode: Annotated[
        str, typer.Option(metavar="MODE", help="Permissions of --socket-path; to connect is to write.")
    ] = "0660",
    queue: Annotated[int, typer.Option(metavar="N", min=0, help="First hardware receive queue to take.")] = 0,
    queues: Annotated[int, typer.Option(metavar="N", min=1, max=128, help="Queue pairs of the guest.")] = 1,
    mode: Annotated[
        Literal["auto", "zero-copy", "copy", "packet"],
        typer.Option(help="How the kernel and the guest's memory meet; packet: without XDP, slow, never by itself."),
    ] = "auto",
    max_frame: Annotated[
        int | None,
        typer.Option(
            metavar="BYTES",
            min=60,
            help="Zero-copy: a promise that the wire brings no longer frame (tags count, FCS not) and no hardware "
            "timestamps are taken, so that shorter guest buffers do. If it is broken, a frame overwrites guest memory.",
        ),
    ] = None,
    bounce_only: Annotated[
        bool, typer.Option("--bounce-only", help="Zero-copy: give the NIC no guest memory; copies each frame once.")
    ] = False,
    xdp: Annotated[
        Literal["auto", "native", "generic"], typer.Option(help="Where in the kernel frames are taken.")
    ] = "auto",
    steer: Annotated[
        Literal["passthru", "mac"],
        typer.Option(help="Frames for the guest: all of the queue, or those for --mac, broadcast and multicast."),
    ] = "passthru",
    mac: Annotated[
        list[str] | None, typer.Option(metavar="MAC", help="The guest's MAC address; once for each that it has.")
    ] = None,
    broadcast: Annotated[
        bool, typer.Option(help="With --steer mac: broadcast (ARP) goes to the guest, the host has none.")
    ] = True,
    multicast: Annotated[
        bool, typer.Option(help="With --steer mac: multicast goes to the guest, the host has none.")
    ] = True,
    multicast_group: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MAC", help="With --steer mac: of multicast only this group goes to the guest; repeatable."
        ),
    ] = None,
    vlans: Annotated[
        str, typer.Option(metavar="LIST", help="With --steer mac: VLANs of the guest: all, none, or as 5,7,100-199.")
    ] = "all",
    qmp: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="QEMU's monitor: give the guest what it asks for, of what options allow."),
    ] = None,
    qmp_nic: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --qmp: the device in QEMU, if its socket does not tell.")
    ] = None,
    lock_mac: Annotated[
        list[str] | None,
        typer.Option(metavar="MAC", help="Drop frames from the guest with another source address; repeatable."),
    ] = None,
    poll: Annotated[
        Literal["busy", "adaptive", "interrupt"], typer.Option(help="How to wait for frames.")
    ] = "adaptive",
    tx_offloads: Annotated[
        TxOffloads,
        typer.Option(help="Checksums and segmentation for the guest; auto: unless frames would be copied for it."),
    ] = "auto",
    rx_offloads: Annotated[
        RxOffloads,
        typer.Option(help="Frames of a flow merged for the guest (GRO); auto: unless frames would be moved for it."),
    ] = "auto",
    user: Annotated[
        str | None, typer.Option(metavar="NAME", help="Run the worker as this user, not root; nobody if left out.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="End when the first front-end leaves; 1 if anything failed.")] = (
        False
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON at the end.")] = False,
    interval: Annotated[
        float | None, typer.Option(metavar="S", min=0.05, help="Seconds between figures; with --json one line each.")
    ] = None,
    guest_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Guest memory for the options printed, such as 4G.")
    ] = "4G",
    locked_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Most memory that the guest of this port may have locked; all it has is."),
    ] = None,
    locked_memory_all: LockedMemoryAll = None,
    runtime_dir: RuntimeDir = None,
    _print_capabilities: PrintCapabilities = False,
) -> None:
    """Connect one virtual machine to IFACE.

    Runs in the foreground until Ctrl-C, SIGTERM or SIGHUP.

    The frames of a hardware queue of IFACE go straight into the guest's receive buffers, and its frames leave straight
    from its memory. Prints the QEMU options and the libvirt XML for the guest. Nothing stays behind at the end.
    """
    if sum(choice is not None for choice in (socket_path, fd, connect)) != 1:
        raise typer.BadParameter("exactly one of --socket-path, --fd and --connect is needed")
    if socket_path is None and socket_owner is not None:
        raise typer.BadParameter("--socket-owner is about --socket-path; a socket made elsewhere has its owner already")
    if qmp is None and qmp_nic is not None:
        raise typer.BadParameter("--qmp-nic is about --qmp")
    socket_access = parse_socket_access(socket_owner, socket_mode)
    guest_bytes = parse_size(guest_size)
    view, interval_s = _view(as_json, interval)
    options = AttachOptions(
        interface=interface,
        socket_path=socket_path,
        socket_access=socket_access,
        connect_path=connect,
        fd=fd,
        queue=queue,
        queues=queues,
        mode=mode,
        zero_copy=ZeroCopyOptions(bounce_only=bounce_only, frame_max_bytes=max_frame),
        xdp=xdp,
        steer=steer_by(
            steer,
            mac or [],
            groups=multicast_group or [],
            vlans=vlans,
            broadcast=broadcast,
            multicast=multicast,
            follows=qmp is not None,
        ),
        qmp=QmpOptions(path=qmp, nic=qmp_nic) if qmp is not None else None,
        lock_macs=parse_macs("--lock-mac", lock_mac) if lock_mac else None,
        poll=poll,
        tx_offloads=tx_offloads,
        rx_offloads=rx_offloads,
        user=user,
        once=once,
        interval_s=interval_s,
        guest_bytes=guest_bytes,
        locked_memory_bytes=parse_size(locked_memory) if locked_memory is not None else None,
        locked_memory_all_bytes=parse_size(locked_memory_all) if locked_memory_all is not None else None,
        runtime_dir=runtime_dir,
    )
    path = socket_path or connect

    def recipe(mtu_bytes: int) -> str:
        """What to paste, once the interface is known to be fit."""
        if path is None:
            return "front-end: the socket that was passed in"
        return GuestRecipe(
            socket_path=path.absolute(),
            queue_pairs=queues,
            guest_size=guest_size,
            mtu_bytes=mtu_bytes,
            frontend_listens=connect is not None,
            mac=mac[0] if mac else None,
        ).text()

    try:
        report, succeeded = event_loop.run(attach(options, view, recipe))
    except BaseException:
        view.close()
        raise
    view.finish(report)
    view.say("ended; everything was given back")
    if not succeeded:
        raise typer.Exit(1)


def _view(as_json: bool, interval: float | None) -> tuple[View, float]:
    """The view that fits where the output goes, and its interval in seconds."""
    if as_json:
        return JsonView(sys.stdout, sys.stderr, each_interval=interval is not None), interval or INTERVAL_LINES_S
    if sys.stdout.isatty():
        return TerminalView(Console()), interval or INTERVAL_TERMINAL_S
    return LineView(sys.stdout), interval or INTERVAL_LINES_S
