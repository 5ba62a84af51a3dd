"""Options that all ports of a host should be given alike: how much memory they may lock together, and its accounts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

LockedMemoryAll = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        envvar="MPASSTHRU_LOCKED_MEMORY_ALL",
        help="Most memory that all ports of this host may lock together; by default all but 1 GiB or a tenth.",
    ),
]
RuntimeDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        envvar="MPASSTHRU_RUNTIME_DIR",
        help="Where all ports of this host keep their accounts and are talked to; /run/mpassthru if left out.",
    ),
]
