"""What QEMU's conventions for back-end programs ask for (vhost-user.rst, "Backend program conventions").

`--print-capabilities` says what kind of back-end this is; the JSON file in /usr/share/qemu/vhost-user lets management
tools find it. For type `net` the schema (vhost-user.json) defines no features.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

CAPABILITIES = {"type": "net", "features": []}
DESCRIPTION = "mpassthru vhost-user-net: guest memory as the UMEM of an AF_XDP socket"


def _print_capabilities(wanted: bool) -> None:
    """Print and exit before any other option is looked at, as the conventions ask."""
    if wanted:
        typer.echo(json.dumps(CAPABILITIES))
        raise typer.Exit


PrintCapabilities = Annotated[
    bool,
    typer.Option(
        "--print-capabilities",
        is_eager=True,
        callback=_print_capabilities,
        help="Print what kind of vhost-user back-end this is, as JSON, and exit.",
    ),
]


def backend_json_command() -> None:
    """Print QEMU's description of this back-end.

    It belongs into /usr/share/qemu/vhost-user/50-mpassthru.json.
    """
    typer.echo(json.dumps({"description": DESCRIPTION, "type": "net", "binary": str(_binary())}, indent=2))


def _binary() -> Path:
    """Where this program is installed."""
    return Path(shutil.which(sys.argv[0]) or "/usr/bin/mpassthru").absolute()
