//! Asks rtnetlink which XDP program an interface has (`IFLA_XDP`), to say so when ours cannot be attached.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::error::last_errno;

const IFLA_XDP: u16 = 43;
const IFLA_XDP_ATTACHED: u16 = 2;
const IFLA_XDP_PROG_ID: u16 = 4;
const NLA_TYPE_MASK: u16 = 0x3fff;
const NLMSG_HEADER_BYTES: usize = 16;
const IFINFOMSG_BYTES: usize = 16;

/// An XDP program that is attached to an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AttachedProgram {
    pub(crate) id: u32,
    /// `XDP_ATTACHED_*`: 1 native, 2 generic, 3 offloaded, 4 several at once.
    pub(crate) attached: u8,
}

impl AttachedProgram {
    pub(crate) fn mode_name(self) -> &'static str {
        match self.attached {
            1 => "native",
            2 => "generic",
            3 => "offloaded",
            _ => "mixed",
        }
    }
}

/// The program that is attached to `ifindex`, if one is.
///
/// # Errors
/// The errno of the netlink exchange.
pub(crate) fn attached_program(ifindex: u32) -> Result<Option<AttachedProgram>, i32> {
    let reply = request_link(ifindex)?;
    if reply.len() < NLMSG_HEADER_BYTES + IFINFOMSG_BYTES || u16_at(&reply, 4) != libc::RTM_NEWLINK {
        return Err(libc::ENODEV);
    }
    let length = (u32_at(&reply, 0) as usize).min(reply.len());
    Ok(parse_attributes(&reply[NLMSG_HEADER_BYTES + IFINFOMSG_BYTES..length]))
}

/// Sends RTM_GETLINK for one interface and returns the answering datagram.
fn request_link(ifindex: u32) -> Result<Vec<u8>, i32> {
    let mut request = Vec::with_capacity(NLMSG_HEADER_BYTES + IFINFOMSG_BYTES);
    request.extend(((NLMSG_HEADER_BYTES + IFINFOMSG_BYTES) as u32).to_ne_bytes());
    request.extend(libc::RTM_GETLINK.to_ne_bytes());
    request.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    request.extend([0; 8]); // sequence number and port: one request, one answer
    request.extend([0; 4]); // ifi_family, padding, ifi_type
    request.extend(ifindex.to_ne_bytes());
    request.extend([0; 8]); // ifi_flags, ifi_change

    // SAFETY: no pointers are passed; the result is checked before it is owned.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_ROUTE) };
    if fd < 0 {
        return Err(last_errno());
    }
    // SAFETY: socket() returned a new descriptor that nobody else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: the buffer is live and its own length is passed.
    if unsafe { libc::send(socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) } < 0 {
        return Err(last_errno());
    }
    let mut reply = vec![0_u8; 64 * 1024]; // an interface with many virtual functions has a long answer
    // SAFETY: the buffer is live, writable, and its own length is passed.
    let received = unsafe { libc::recv(socket.as_raw_fd(), reply.as_mut_ptr().cast(), reply.len(), 0) };
    reply.truncate(usize::try_from(received).map_err(|_| last_errno())?);
    Ok(reply)
}

fn parse_attributes(link: &[u8]) -> Option<AttachedProgram> {
    let xdp = attributes(link).find(|(kind, _)| *kind == IFLA_XDP)?.1;
    let mut program = AttachedProgram { id: 0, attached: 0 };
    for (kind, value) in attributes(xdp) {
        match (kind, value.len()) {
            (IFLA_XDP_PROG_ID, 4) => program.id = u32_at(value, 0),
            (IFLA_XDP_ATTACHED, 1) => program.attached = value[0],
            _ => {}
        }
    }
    (program.attached != 0).then_some(program)
}

/// Walks netlink attributes: length, type, payload, padded to 4 bytes. Ends at the first that does not fit.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        if bytes.len() < 4 {
            return None;
        }
        let length = usize::from(u16_at(bytes, 0));
        let kind = u16_at(bytes, 2) & NLA_TYPE_MASK;
        let payload = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    })
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = (4 + payload.len() as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn program_is_found_among_other_attributes() {
        let nested = [attribute(IFLA_XDP_ATTACHED, &[2]), attribute(IFLA_XDP_PROG_ID, &77_u32.to_ne_bytes())].concat();
        let link = [attribute(3, b"veth0\0"), attribute(IFLA_XDP | 0x8000, &nested)].concat();
        let program = parse_attributes(&link).unwrap();
        assert_eq!((program.id, program.mode_name()), (77, "generic"));
    }

    #[test]
    fn no_program_is_none() {
        let link = attribute(IFLA_XDP, &attribute(IFLA_XDP_ATTACHED, &[0]));
        assert_eq!(parse_attributes(&link), None);
    }

    #[test]
    fn truncated_attributes_end_the_walk() {
        assert_eq!(parse_attributes(&[200, 0, 43, 0, 1]), None);
        assert_eq!(parse_attributes(&[2, 0, 43, 0]), None);
    }

    #[test]
    fn loopback_has_no_program() {
        assert_eq!(attached_program(1), Ok(None));
    }
}
