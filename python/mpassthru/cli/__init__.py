"""The `mpassthru` command: one file per noun."""
