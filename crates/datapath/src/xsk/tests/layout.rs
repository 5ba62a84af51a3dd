use super::super::{CHUNK_BYTES, FRAME_BYTES_MAX, FRAME_BYTES_MIN, RxDesc, UmemLayout, XDP_PACKET_HEADROOM};
use crate::guest_memory::UmemAddr;

/// What `xdp_umem_reg` says of a headroom (kernel-facts, section 2).
fn kernel_takes(headroom: u32) -> bool {
    u64::from(headroom) <= CHUNK_BYTES - XDP_PACKET_HEADROOM - 320 - 128
}

#[test]
fn test_every_frame_size_up_to_a_chunk_makes_a_layout_that_the_kernel_takes() {
    for frame_max in 0..=FRAME_BYTES_MAX {
        let layout = UmemLayout::for_frames(frame_max).unwrap();
        assert!(kernel_takes(layout.headroom()));
        assert!(layout.frame_max >= frame_max && layout.frame_max >= FRAME_BYTES_MIN);
        assert_eq!(layout.frame_offset() + u64::from(layout.frame_max), CHUNK_BYTES, "no byte past the chunk");
    }
    assert_eq!(UmemLayout::for_frames(FRAME_BYTES_MAX + 1), None);
    assert!(kernel_takes(3392) && !kernel_takes(3393), "the numbers that were measured");
}

#[test]
fn test_a_frame_lands_where_its_fill_address_was_computed_for() {
    let layout = UmemLayout::for_frames(1536).unwrap();
    let frame = UmemAddr(0x12_3457);
    let fill = layout.fill_address(frame);
    let desc = libc::xdp_desc { addr: fill.0 | layout.frame_offset() << 48, len: 60, options: 0 };
    assert_eq!(RxDesc::from(desc), RxDesc { fill, frame, len: 60, more: false });
    let piece = libc::xdp_desc { options: libc::XDP_PKT_CONTD, ..desc };
    assert!(RxDesc::from(piece).more, "the frame goes on in the next descriptor");
}
