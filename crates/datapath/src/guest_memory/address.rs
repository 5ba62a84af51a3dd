//! Address spaces as types: mixing two of them up does not compile.

use std::fmt;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `bytes` further on; `None` past the end of the address space.
            pub fn checked_add(self, bytes: u64) -> Option<Self> {
                self.0.checked_add(bytes).map(Self)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

address! {
    /// An address on the guest's memory bus; what descriptors hold.
    GuestPhysAddr
}
address! {
    /// An address of the front-end's process; what SET_VRING_ADDR holds.
    UserAddr
}
address! {
    /// A byte offset in the UMEM: what fill, tx and completion rings hold, and where our mapping has the byte.
    UmemAddr
}

impl UmemAddr {
    /// The address `bytes` further on. The caller has checked that it is inside the mapping.
    pub fn plus(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}
