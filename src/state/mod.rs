//! The state directory: lock, atomic files, identity bytes, saved clusters.
