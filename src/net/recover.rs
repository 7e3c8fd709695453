//! The part of the network task that notices that the network has changed, and is back before the user notices.
