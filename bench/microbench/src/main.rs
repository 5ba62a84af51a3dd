//! Rounds of the pump for callgrind to count: `python -m bench.micro` has valgrind run this, and divides.
//!
//! Only what [`counted`] does is collected (`--toggle-collect`), and each scene's part is dumped by itself
//! (`--dump-after`): driver and model kernel cost nothing. A line for each scene says what was done.

use std::hint::black_box;

use mpassthru_datapath::microbench::{Path, Plan, Scene};
use mpassthru_microbench::{plans, words};

/// Enough for every ring to have wrapped.
const WARM_UP_ROUNDS: u32 = 512;
/// One is like the other; a hash chain is longer here than there.
const ROUNDS: u32 = 64;

fn main() {
    for plan in plans() {
        let mut scene = Scene::new(plan);
        for _ in 0..WARM_UP_ROUNDS {
            scene.prepare();
            scene.round();
        }
        let before = scene.frames();
        for _ in 0..ROUNDS {
            scene.prepare();
            counted(black_box(&mut scene));
        }
        let after = scene.frames();
        counted_to_here();
        let (frames, bounced) = (after.0 - before.0, after.1 - before.1);
        assert_eq!(frames, u64::from(ROUNDS * plan.burst), "each round is a whole burst: {plan:?}");
        assert_eq!(bounced, if plan.path == Path::Direct { 0 } else { frames }, "every frame is on its path: {plan:?}");
        let ((way, path), Plan { frame_bytes, burst, .. }) = (words(plan), plan);
        println!(r#"{{"way":"{way}","path":"{path}","frame_bytes":{frame_bytes},"burst":{burst},"frames":{frames}}}"#);
    }
}

#[inline(never)]
fn counted(scene: &mut Scene) {
    scene.round();
}

#[inline(never)]
fn counted_to_here() {
    black_box(());
}
