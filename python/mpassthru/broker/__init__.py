"""The privileged process: interface, XDP program, sockets, worker processes. It sees no byte of a guest."""
