"""`python -m mpassthru.worker`: started by the broker, never by hand."""

from __future__ import annotations

import argparse
import sys

from mpassthru import _core
from mpassthru.control import Configure
from mpassthru.errors import EXHAUSTED, MpassthruError, host_error
from mpassthru.worker.main import start


def main() -> int:
    """Run a worker; 1 if it could not do its job."""
    parser = argparse.ArgumentParser(prog="mpassthru-worker")
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--broker-pid", type=int, required=True)
    arguments = parser.parse_args()
    try:
        start(arguments.control_fd, arguments.broker_pid, make_engine)
    except MpassthruError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in EXHAUSTED:
            raise
        print(host_error("go on", error), file=sys.stderr)
        return 1
    return 0


def make_engine(configuration: Configure) -> _core.Engine:
    """The engine of a port."""
    return _core.Engine(
        queue_pairs=configuration.queue_pairs,
        poll=configuration.poll,
        source_addresses=configuration.source_addresses,
    )


if __name__ == "__main__":
    sys.exit(main())
