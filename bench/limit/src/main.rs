//! The limit that a port is measured against: the same AF_XDP socket, with nobody behind it.
//!
//! `mpassthru-limit IFINDEX FRAME_MAX_BYTES` attaches the steering program and binds a socket to queue 0, as a port does:
//! the same rings, UMEM flags, headroom, budget and way of waiting. Then it takes commands, a line each, and answers
//! each with a line of JSON, the totals so far:
//!
//! - `tx SIZE [RATE]`: send frames of SIZE bytes, RATE a second at most; size 0 ends that;
//! - `read`: nothing but the answer.
//!
//! What is received is dropped at all times (rx-drop); while `tx` is on, frames are sent too (tx-only). It ends at end of
//! file.

mod socket;
mod traffic;

use std::error::Error;
use std::io::{BufRead, Write};
use std::sync::Arc;

use traffic::{Orders, Totals, Traffic};

const USAGE: &str = "usage: mpassthru-limit IFINDEX FRAME_MAX_BYTES";

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<u32> = std::env::args().skip(1).map(|word| word.parse()).collect::<Result<_, _>>()?;
    let [ifindex, frame_max] = arguments[..] else { return Err(USAGE.into()) };
    let bound = socket::open(ifindex, frame_max)?;
    let (orders, totals) = (Arc::new(Orders::new()?), Arc::new(Totals::default()));
    let umem = bound.xsk.shared_umem();
    let traffic = Traffic::new(bound, Arc::clone(&orders), Arc::clone(&totals))?;
    let thread = std::thread::Builder::new().name("limit".into()).spawn(move || traffic.run())?;
    answer(&totals.json(&umem))?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["read"] => {}
            ["tx", size] => orders.send(size.parse()?, 0)?,
            ["tx", size, rate] => orders.send(size.parse()?, rate.parse()?)?,
            _ => return Err(format!("no such command: {line}").into()),
        }
        answer(&totals.json(&umem))?;
    }
    orders.quit();
    thread.join().map_err(|_| "the traffic thread panicked")?;
    Ok(())
}

fn answer(line: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}
