//! What peers say to each other.
