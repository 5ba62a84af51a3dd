"""Programs of the benches that are written in Rust."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]


def target_folder() -> Path:
    """Where cargo builds."""
    return Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))


def build(package: str) -> Path:
    """Build a package of one program; the program's path.

    Raises:
        subprocess.CalledProcessError: it does not build.
    """
    subprocess.run(("cargo", "build", "--quiet", "--locked", "--release", "-p", package), cwd=ROOT, check=True)
    return target_folder() / "release" / package
