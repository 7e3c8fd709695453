//! Opens the addresses of the endpoint, and says what may be opened.

use std::io;
use std::net::{SocketAddr, TcpListener as StdTcp};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener as StdUnix, UnixStream as StdUnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketType};
use tokio::net::{TcpListener, UnixListener};

use crate::config::{HttpAddress, HttpSettings, refuses_remote};

/// Who may use a socket of ours besides the daemon's own user.
const GROUP: &str = "opengateway-users";
const FOR_GROUP: u32 = 0o660;
const FOR_USER: u32 = 0o600;

/// Something that clients connect to.
#[derive(Debug)]
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, Option<Made>),
}

/// A socket file of ours; removed with its listener.
#[derive(Debug)]
pub(super) struct Made(PathBuf);

impl Drop for Made {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Listener {
    /// The address as clients write it.
    pub fn shown(&self) -> String {
        match self {
            Self::Tcp(listener) => listener.local_addr().map_or_else(|_| String::new(), |address| format!("http://{address}/v1")),
            Self::Unix(listener, _) => {
                let path = listener.local_addr().ok().and_then(|address| address.as_pathname().map(Path::to_owned));
                let path = match self {
                    // Its name was another one when it was bound.
                    Self::Unix(_, Some(made)) => Some(made.0.clone()),
                    _ => path,
                };
                path.map_or_else(String::new, |path| format!("unix:{}", path.display()))
            }
        }
    }
}

/// Opens an address.
///
/// # Errors
/// A sentence that names the address.
pub(super) fn open(address: &HttpAddress) -> Result<Listener, String> {
    let opened = match address {
        HttpAddress::Tcp(address) => tcp(*address).map(Listener::Tcp),
        HttpAddress::Unix(path) => unix(path),
    };
    opened.map_err(|error| format!("the HTTP endpoint cannot listen on {address}: {error}"))
}

fn tcp(address: SocketAddr) -> io::Result<TcpListener> {
    // Sets SO_REUSEADDR: a daemon that was restarted has its port back at once.
    let listener = StdTcp::bind(address)?;
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

fn unix(path: &Path) -> io::Result<Listener> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is something that is no socket"));
        }
        Ok(_) if StdUnixStream::connect(path).is_ok() => {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another program listens there"));
        }
        Ok(_) | Err(_) => {}
    }
    // Under another name until its mode and group are right: nobody connects before that.
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let _ = std::fs::remove_file(&temporary);
    let listener = StdUnix::bind(&temporary)?;
    let made = Made(temporary.clone());
    listener.set_nonblocking(true)?;
    // Without the group it is for the daemon's user alone: whose group that user has by default is not ours to know.
    let given = group(GROUP).map(|group| std::os::unix::fs::chown(&temporary, None, Some(group)));
    let mode = if matches!(given, Some(Ok(()))) { FOR_GROUP } else { FOR_USER };
    if let Some(Err(error)) = given {
        let path = path.display();
        tracing::warn!(%error, "{path} is for the daemon's user alone: it cannot be given to the group {GROUP}: {error}");
    }
    std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(mode))?;
    std::fs::rename(&temporary, path)?;
    // The name that it had is gone.
    std::mem::forget(made);
    Ok(Listener::Unix(UnixListener::from_std(listener)?, Some(Made(path.to_owned()))))
}

/// The number of a group of this machine, as `/etc/group` has it.
fn group(name: &str) -> Option<u32> {
    let groups = std::fs::read_to_string("/etc/group").ok()?;
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten()
    })
}

/// Takes over a socket that the service manager opened.
///
/// # Errors
/// A sentence: it is none that connections can be accepted from, or other machines reach it and may not.
pub(super) fn adopt(socket: OwnedFd, settings: &HttpSettings) -> Result<Listener, String> {
    let failed = |error: io::Error| format!("a socket that the service manager passed cannot be used: {error}");
    let kind = rustix::net::sockopt::socket_type(&socket).map_err(|error| failed(error.into()))?;
    let accepts = rustix::net::sockopt::socket_acceptconn(&socket).unwrap_or(false);
    if kind != SocketType::STREAM || !accepts {
        return Err("a socket that the service manager passed is no ListenStream=: see opengatewayd-http.socket".to_owned());
    }
    let family = rustix::net::sockopt::socket_domain(&socket).map_err(|error| failed(error.into()))?;
    if family == AddressFamily::UNIX {
        let listener = StdUnix::from(socket);
        listener.set_nonblocking(true).map_err(failed)?;
        return UnixListener::from_std(listener).map(|listener| Listener::Unix(listener, None)).map_err(failed);
    }
    let listener = StdTcp::from(socket);
    let address = listener.local_addr().map_err(failed)?;
    if let Some(why) = refuses_remote(address.ip(), settings) {
        return Err(format!("the socket {address} that the service manager passed is not used: {why}"));
    }
    listener.set_nonblocking(true).map_err(failed)?;
    TcpListener::from_std(listener).map(Listener::Tcp).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_is_for_its_group_and_a_stale_one_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("http.sock");
        drop(StdUnix::bind(&path).unwrap());
        let address = HttpAddress::Unix(path.clone());
        let listener = open(&address).unwrap();
        assert_eq!(listener.shown(), format!("unix:{}", path.display()));
        let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert!(mode == FOR_USER || (mode == FOR_GROUP && group(GROUP).is_some()), "{mode:o}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        assert!(open(&address).unwrap_err().contains("another program"));
        drop(listener);
        assert!(!path.exists());
        std::fs::write(&path, "kept").unwrap();
        assert!(open(&address).unwrap_err().contains("no socket"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "kept");
    }

    #[tokio::test]
    async fn what_the_service_manager_passes_is_held_to_the_same_rules() {
        let settings = HttpSettings::default();
        let far = StdTcp::bind("0.0.0.0:0").unwrap();
        assert!(adopt(far.into(), &settings).unwrap_err().contains("allow_remote"));
        let near = StdTcp::bind("127.0.0.1:0").unwrap();
        assert!(adopt(near.into(), &settings).unwrap().shown().starts_with("http://127.0.0.1:"));
        let far = StdTcp::bind("0.0.0.0:0").unwrap();
        assert!(adopt(far.into(), &HttpSettings { allow_remote: true, ..settings.clone() }).is_ok());
        let datagram = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(adopt(datagram.into(), &settings).unwrap_err().contains("ListenStream"));
    }
}
