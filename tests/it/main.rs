//! In-process and private-bus tests; one binary, a module for each part.

mod ogctl;
