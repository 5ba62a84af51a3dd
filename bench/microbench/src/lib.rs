//! What is counted and timed: every path, at three bursts; frames of both ends of the scale where nobody copies them.

use mpassthru_datapath::microbench::{Path, Plan, Way};

const BURSTS: [u32; 3] = [1, 8, 32];

/// All plans.
pub fn plans() -> impl Iterator<Item = Plan> {
    let paths = [Path::Direct, Path::Bounce].into_iter();
    let ways = paths.flat_map(|path| [Way::Rx, Way::Tx].map(|way| (way, path)));
    let sizes = ways.flat_map(|(way, path)| [64, 1514].map(|frame_bytes| (way, path, frame_bytes)));
    sizes.flat_map(|(way, path, frame_bytes)| BURSTS.map(|burst| Plan { way, path, frame_bytes, burst }))
}

/// `rx`, `direct`.
pub fn words(plan: Plan) -> (&'static str, &'static str) {
    let way = if plan.way == Way::Rx { "rx" } else { "tx" };
    (way, if plan.path == Path::Direct { "direct" } else { "bounce" })
}
