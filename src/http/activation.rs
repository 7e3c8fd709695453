//! Sockets that the service manager opened for us (`opengatewayd-http.socket`).

use std::os::fd::{FromRawFd as _, OwnedFd};

/// `FileDescriptorName=` of the socket unit.
const NAME: &str = "http";

/// The sockets called "http" that the service manager passed to this process; others are left alone. Call it once.
pub fn passed_sockets() -> Vec<OwnedFd> {
    let passed = match sd_notify::listen_fds_with_names() {
        Ok(passed) => passed,
        Err(error) => {
            tracing::warn!(%error, "what the service manager says of its sockets cannot be read: {error}");
            return Vec::new();
        }
    };
    let ours = passed.filter(|(_, name)| name == NAME);
    // SAFETY: the service manager gave these descriptors to this very process ($LISTEN_PID), nobody else here takes them,
    // and this is called once, before anything could have closed one and got its number for something else.
    #[allow(unsafe_code)]
    ours.map(|(fd, _)| unsafe { OwnedFd::from_raw_fd(fd) }).collect()
}
