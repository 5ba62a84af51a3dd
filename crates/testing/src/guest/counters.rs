//! What the guest counts. A queue pair's thread counts in plain integers and publishes them once per turn.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($(#[$doc:meta])* $plain:ident, $shared:ident { $($(#[$field_doc:meta])* $field:ident,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $plain { $($(#[$field_doc])* pub $field: u64,)* }

        impl $plain {
            /// Name and value of each counter.
            #[must_use]
            pub fn named(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($field), self.$field),)*]
            }

            /// Adds another queue pair's counters.
            pub fn add(&mut self, other: &Self) {
                $(self.$field += other.$field;)*
            }
        }

        #[derive(Debug, Default)]
        pub(super) struct $shared { $($field: AtomicU64,)* }

        impl $shared {
            // Relaxed throughout: each counter stands alone; the only writer is the queue pair's owner.
            pub(super) fn publish(&self, values: &$plain) {
                $(self.$field.store(values.$field, Ordering::Relaxed);)*
            }

            pub(super) fn snapshot(&self) -> $plain {
                $plain { $($field: self.$field.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Frames, bytes and notifications. Bytes are frame bytes, without the virtio-net header.
    Counters, SharedCounters {
        /// Frames received.
        rx_frames,
        /// Bytes received.
        rx_bytes,
        /// Frames that came in more than one buffer.
        rx_multi_buffer_frames,
        /// Buffers that came back with length 0: returned, not filled.
        rx_empty_buffers,
        /// Frames handed to the device by a source.
        tx_posted,
        /// Frames handed back to the device by an echo.
        echo_posted,
        /// Echoes that need more descriptors than a chain may have; not sent.
        echo_refused,
        /// Frames, of source and echo, that the device has used.
        tx_frames,
        /// Bytes that the device has used.
        tx_bytes,
        /// Kicks sent, both directions.
        kicks,
        /// Call notifications received, both directions.
        calls,
        /// Times the thread slept.
        sleeps,
        /// Bytes behind the used length of received buffers that lost their canary.
        rx_tail_bytes_changed,
        /// Bytes of sent buffers that were not as sent when they came back.
        tx_bytes_changed,
    }
}

counters! {
    /// What no device may do (VIRTIO 1.3 sections 2.7 and 5.1.6).
    Violations, SharedViolations {
        /// The used index ran ahead of what was made available. The queue is dead to the driver.
        used_index_jump,
        /// A used id that is no descriptor.
        used_id_out_of_range,
        /// A head was used that the device did not hold.
        used_twice,
        /// A used length beyond what was writable.
        used_length_too_large,
        /// A used length shorter than the virtio-net header.
        used_length_too_small,
        /// A used length for a buffer that the device may only read.
        tx_used_length_not_zero,
        /// `num_buffers` 0, or not 1 without mergeable buffers.
        num_buffers_wrong,
        /// Not all buffers of a frame were used at once (section 5.1.6.4.1).
        num_buffers_not_together,
        /// A buffer before a frame's last was not filled (section 5.1.6.4.1).
        buffer_not_filled,
        /// Header flags or GSO type without the feature for it.
        header_not_negotiated,
        /// Heads that a stopped device had neither used nor given back.
        never_returned,
        /// Heads that a stopped device had both used and given back.
        returned_twice,
        /// A ring base outside what was made available.
        base_impossible,
    }
}
