//! What is counted and timed: every path, at three bursts; frames of both ends of the scale where nobody copies them; frames
//! that are merged.

use mpassthru_datapath::microbench::{Path, Plan, Way};

const BURSTS: [u32; 3] = [1, 8, 32];
/// Bursts with something to merge.
const MERGED_BURSTS: [u32; 2] = [8, 32];

/// All plans.
pub fn plans() -> impl Iterator<Item = Plan> {
    let paths = [Path::Direct, Path::Bounce].into_iter();
    let ways = paths.flat_map(|path| [Way::Rx, Way::Tx].map(|way| (way, path)));
    let sizes = ways.flat_map(|(way, path)| [64, 1514].map(|frame_bytes| (way, path, frame_bytes)));
    let plain = sizes.flat_map(|(way, path, frame_bytes)| BURSTS.map(|burst| Plan { way, path, frame_bytes, burst }));
    let merged = |burst| Plan { way: Way::Rx, path: Path::Merged, frame_bytes: 1514, burst };
    plain.chain(MERGED_BURSTS.map(merged))
}

/// `rx`, `direct`.
pub fn words(plan: Plan) -> (&'static str, &'static str) {
    let way = if plan.way == Way::Rx { "rx" } else { "tx" };
    let path = match plan.path {
        Path::Direct => "direct",
        Path::Bounce => "bounce",
        Path::Merged => "merged",
    };
    (way, path)
}
