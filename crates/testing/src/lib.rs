//! The built-in guest (a virtio-net driver) and the frame generator that tests, demo and benches use.
