"""The `mpassthru` command: one file per noun, and one place where errors become a line and an exit status."""

from __future__ import annotations

import errno
import os
import signal
import sys

from mpassthru.errors import EXHAUSTED, MpassthruError, host_error

__all__ = ["main"]

EXIT_REFUSED = 1
EXIT_SIGNALLED = 128
"""Plus the signal's number, as shells count."""


def main() -> None:
    """Run the command line: 0 if it did its job, 1 if something was refused or failed, 2 for wrong usage."""
    # Until a command has taken something that it must give back, Ctrl-C just ends it, imports included.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mpassthru.cli.app import app  # noqa: PLC0415 - takes a while

    try:
        app(prog_name="mpassthru")
    except MpassthruError as error:
        print(f"mpassthru: {error}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    except OSError as error:
        if error.errno in EXHAUSTED:
            print(f"mpassthru: {host_error('go on', error)}", file=sys.stderr)
            sys.exit(EXIT_REFUSED)
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        # Whoever read our output has gone, or the terminal has; nobody is left to tell, and the interpreter must not
        # try at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_REFUSED)
    except KeyboardInterrupt:
        sys.exit(EXIT_SIGNALLED + signal.SIGINT)
