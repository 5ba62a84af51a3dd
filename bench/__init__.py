"""Benches: a port beside what a user would pick instead, and beside the limit of its socket, in one run.

`make bench-quick` and `make bench` run `python -m bench`; bench/README.md says what is measured, and how.
"""
