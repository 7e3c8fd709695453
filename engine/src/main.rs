//! The child of `opengatewayd` that runs one GGUF model.

fn main() {}
