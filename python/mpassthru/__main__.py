"""`python -m mpassthru`: the same as the `mpassthru` command."""

from mpassthru.cli import main

main()
