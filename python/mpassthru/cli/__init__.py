"""The `mpassthru` command: one file per noun, and one place where errors become a line and an exit status."""

from __future__ import annotations

import os
import sys

from mpassthru.cli.app import app
from mpassthru.errors import MpassthruError

__all__ = ["app", "main"]

EXIT_REFUSED = 1


def main() -> None:
    """Run the command line: 0 if it did its job, 1 if something was refused or failed, 2 for wrong usage."""
    try:
        app(prog_name="mpassthru")
    except MpassthruError as error:
        print(f"mpassthru: {error}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    except BrokenPipeError:
        # Whoever read our output has gone; nobody is left to tell, and the interpreter must not try at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_REFUSED)
