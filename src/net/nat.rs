//! The part of the network task that makes this node reachable: what AutoNAT found, reservations at relays, hole punching.
