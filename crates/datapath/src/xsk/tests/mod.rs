//! Rings, layout and rules of AF_XDP, without a socket.

mod layout;
mod rings;
mod rules;
mod sharing;
