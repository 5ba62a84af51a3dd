use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use crate::error::Error;
use crate::fixture::Guest;
use crate::xsk::test_kernel::TestKernel;
use crate::xsk::{BindMode, FRAME_BYTES_MAX, SocketParams, Umem, UmemLayout, XskSocket};

fn params(frame_max: u32, mode: BindMode) -> SocketParams {
    let layout = UmemLayout::for_frames(frame_max.min(FRAME_BYTES_MAX)).unwrap();
    SocketParams { ifindex: 1, queue_id: 0, mode, layout, frame_max, zero_copy_rules: None }
}

#[test]
fn test_a_umem_is_shared_only_with_sockets_that_would_make_the_same_one() {
    let guest = Guest::of_pages(16);
    let ours = params(1518, BindMode::Copy);
    let (_kernel, xsk) = TestKernel::bind(&guest.memory, ours.layout, ours.mode);
    let umem = xsk.shared_umem();
    assert!(umem.serves(&ours));
    let layout = UmemLayout::for_frames(1418).unwrap();
    let others = [
        params(1418, BindMode::Copy),
        params(1518, BindMode::ZeroCopy),
        // The same layout, of frames in several pieces.
        SocketParams { frame_max: 9018, ..ours },
        SocketParams { layout, ..ours },
    ];
    for other in others {
        assert!(!umem.serves(&other), "{other:?}");
        let socket = OwnedFd::from(UnixDatagram::unbound().unwrap());
        match XskSocket::bind(socket, &guest.memory, &Umem::Of(umem.clone()), &other) {
            Err(Error::Refused(message)) => assert!(message.contains("another layout"), "{message}"),
            bound => panic!("not refused: {bound:?}"),
        }
    }
}
