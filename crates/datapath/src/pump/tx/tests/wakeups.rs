use super::bench::{Bench, Chain, Piece};
use crate::xsk::BindMode;

fn bench(wakeups: bool) -> Bench {
    let bench = Bench::new(BindMode::Copy);
    bench.kernel.ask_for_tx_wakeup(wakeups);
    bench
}

#[test]
fn test_the_kernel_is_woken_once_per_burst_and_only_if_it_asked() {
    let frames = vec![Chain::of(&[Piece::Own(0, 60)]); 20];
    for asked in [false, true] {
        let mut bench = bench(asked);
        bench.post_all(&frames);
        bench.burst();
        assert_eq!(bench.kernel.tx_wakeups(), usize::from(asked));
        bench.burst();
        assert_eq!(bench.kernel.tx_wakeups(), usize::from(asked), "again while frames are left");
        bench.kernel.send(usize::MAX);
        bench.burst();
        assert_eq!(bench.kernel.tx_wakeups(), 0, "nothing to send");
        assert_eq!(bench.tx.wakeup_errno, None);
    }
}

#[test]
fn test_a_full_send_buffer_is_no_error() {
    let mut bench = bench(true);
    bench.post_all(&[Chain::of(&[Piece::Own(0, 60)])]);
    // Nobody reads the messages: after some, sendto says EAGAIN.
    for _ in 0..2000 {
        bench.burst();
        assert_eq!(bench.tx.wakeup_errno, None);
    }
    assert!(bench.kernel.tx_wakeups() < 2000);
    bench.settle_down();
    assert_eq!(bench.used, 1);
}

#[test]
fn test_a_refusal_is_remembered_until_the_kernel_sends_again() {
    let mut bench = bench(true);
    bench.kernel.refuse_sends();
    bench.post_all(&[Chain::of(&[Piece::Own(0, 60)])]);
    bench.burst();
    assert_eq!(bench.tx.wakeup_errno, Some(libc::EPIPE));
    bench.take();
    assert_eq!(bench.used, 0, "the frame waits");
    bench.kernel.ask_for_tx_wakeup(false);
    bench.burst();
    assert_eq!(bench.tx.wakeup_errno, None);
    bench.settle_down();
    assert_eq!(bench.used, 1);
}
