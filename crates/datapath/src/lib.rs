//! The data plane of one port: guest memory, virtqueues, AF_XDP sockets and the pump that joins them.
