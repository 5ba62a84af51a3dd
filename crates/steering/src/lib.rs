//! Loads, attaches and configures the XDP steering program (`bpf/steer.bpf.c`).
