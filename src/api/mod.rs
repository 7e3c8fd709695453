//! The D-Bus contract: names, errors, types, client proxies. Imports nothing else of ours.
