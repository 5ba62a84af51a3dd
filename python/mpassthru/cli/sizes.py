"""Sizes as people write them."""

from __future__ import annotations

import re

import typer

_UNITS = {"": 1 << 20, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """A guest's memory in bytes, from `4G`, `512M`, or a number of MiB as for QEMU's `-m`.

    Raises:
        typer.BadParameter: not a size.
    """
    match = re.fullmatch(r"([1-9][0-9]*)\s*([MGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size; write it like 4G or 512M")
    return int(match[1]) * _UNITS[match[2].upper()]
