//! The configuration as written (`raw`) and as checked (`settings`).
