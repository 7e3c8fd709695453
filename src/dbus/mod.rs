//! The bus objects: translate, authorise, delegate.
