//! `ogctl key` and `ogctl env`: what a program needs to use the OpenAI endpoint.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use opengateway::api::keys::key_option;
use opengateway::api::names::{HTTP_INTERFACE, ROOT_PATH, exit};
use opengateway::api::proxy::{HttpProxy, Options};
use serde::Serialize;
use zbus::Variant;
use zbus::proxy::CacheProperties;

use crate::args::{Dialect, Key};
use crate::bus::Bus;
use crate::details::Read as _;
use crate::errors::{Failure, Stop};
use crate::output::Output;
use crate::term;

/// What `OPENAI_API_KEY` is where no key is wanted: clients refuse to start without one.
const NO_KEY: &str = "none";

#[derive(Debug, Serialize)]
struct KeyView {
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    file: Option<String>,
    renewed: bool,
}

/// Writes the key of this user where only it reads it, or prints it.
pub async fn key(bus: &mut Bus, out: &Output, options: &Key) -> Result<(), Stop> {
    // Before the daemon is asked: a renewed key that cannot be kept would be lost.
    let file = if options.print { None } else { Some(options.file.clone().map_or_else(default_file, Ok)?) };
    let key = get_key(bus, options.renew).await?;
    if let Some(path) = &file {
        write(path, &key).map_err(|error| {
            let hint = "name another file with --file, or print it with --print";
            Failure::new("System", format!("{}: cannot be written: {error}", path.display()), hint, exit::FAILED)
        })?;
    }
    if out.json {
        let (key, file) = (options.print.then_some(key), file.map(|path| path.display().to_string()));
        return out.object(KeyView { key, file, renewed: options.renew });
    }
    match file {
        Some(path) => out.text(&format!("{}\n", term::line(&path.display().to_string()))),
        None => out.text(&format!("{key}\n")),
    }
}

async fn get_key(bus: &mut Bus, renew: bool) -> Result<String, Failure> {
    // Finds the bus that has the daemon.
    bus.ask(async |manager| manager.version().await).await?;
    let mut options = Options::new();
    if renew {
        options.insert(key_option::RENEW, Variant::from(true));
    }
    bus.change_at(ROOT_PATH, HTTP_INTERFACE, "GetKey", &(options,)).await
}

/// `$XDG_CONFIG_HOME/opengateway/api-key`, `~/.config` without it.
fn default_file() -> Result<PathBuf, Failure> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let config = absolute("XDG_CONFIG_HOME").or_else(|| absolute("HOME").map(|home| home.join(".config")));
    config.map(|config| config.join("opengateway/api-key")).ok_or_else(|| {
        let message = "neither XDG_CONFIG_HOME nor HOME says where to keep the key";
        Failure::new("System", message, "name a file with --file, or print it with --print", exit::FAILED)
    })
}

/// Whole or not at all, and readable by its owner alone from its first moment.
fn write(path: &Path, key: &str) -> io::Result<()> {
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
    }
    if fs::symlink_metadata(path).is_ok_and(|found| found.is_dir()) {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(key.as_bytes())?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[derive(Debug, Serialize)]
struct EnvView<'a> {
    #[serde(rename = "OPENAI_BASE_URL")]
    base_url: &'a str,
    #[serde(rename = "OPENAI_API_KEY")]
    api_key: &'a str,
}

/// Prints the two lines that let a program find the endpoint.
pub async fn env(bus: &mut Bus, out: &Output, dialect: Dialect) -> Result<(), Stop> {
    let status = bus.ask(async |manager| manager.get_status().await).await?;
    let url = base_url(&status.texts("HttpAddresses"))?;
    let key = if key_required(bus).await? { get_key(bus, false).await? } else { NO_KEY.to_owned() };
    if out.json {
        return out.object(EnvView { base_url: &url, api_key: &key });
    }
    let line = |name: &str, value: &str| match dialect {
        Dialect::Sh => format!("export {name}={value}\n"),
        Dialect::Fish => format!("set -gx {name} {value}\n"),
    };
    out.text(&(line("OPENAI_BASE_URL", &url) + &line("OPENAI_API_KEY", &key)))
}

async fn key_required(bus: &Bus) -> Result<bool, Failure> {
    let proxy = HttpProxy::builder(bus.connection()).cache_properties(CacheProperties::No).build().await;
    let proxy = proxy.map_err(|error| Failure::from_zbus(&error))?;
    let asked = tokio::time::timeout(bus.limit(), proxy.key_required()).await;
    let timeout = |_| Failure::new("Timeout", "the daemon did not answer in time", "", exit::TIMEOUT);
    asked.map_err(timeout)?.map_err(|error| Failure::from_zbus(&error))
}

/// The first address that is a URL, as a program on this machine writes it.
fn base_url(addresses: &[String]) -> Result<String, Failure> {
    // What is pasted into a shell holds nothing that a shell reads.
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b":/.[]".contains(&byte);
    let url = addresses.iter().find(|address| address.starts_with("http://") && address.bytes().all(plain));
    if let Some(url) = url {
        let url = url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:");
        // Brackets are patterns to some shells.
        return Ok(if url.contains('[') { format!("'{url}'") } else { url });
    }
    Err(match addresses.first() {
        Some(socket) => Failure::new(
            "NoAddress",
            format!("the OpenAI endpoint has no URL: it listens on {} alone", term::line(socket)),
            "use the socket as with: curl --unix-socket PATH http://localhost/v1/models",
            exit::FAILED,
        ),
        None => Failure::new(
            "EndpointOff",
            "the OpenAI endpoint is off",
            "switch it on with: sudo systemctl stop opengatewayd && sudo systemctl enable --now opengatewayd-http.socket && \
             sudo systemctl start opengatewayd, \
             or with listen = \"127.0.0.1:11480\" under [http] in opengatewayd.toml, and restart opengatewayd",
            exit::FAILED,
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn the_key_is_its_owners_alone_and_replaces_the_old_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/opengateway/api-key");
        write(&path, "og-1-a").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        write(&path, "og-1-b").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "og-1-b\n");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let parent = path.parent().unwrap();
        assert_eq!(fs::metadata(parent).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(fs::read_dir(parent).unwrap().count(), 1);
        assert!(write(parent, "x").is_err());
    }

    #[test]
    fn the_url_is_one_that_can_be_pasted() {
        let of = |addresses: &[&str]| base_url(&addresses.iter().map(|&text| text.to_owned()).collect::<Vec<_>>());
        assert_eq!(of(&["unix:/s", "http://127.0.0.1:1/v1"]).unwrap(), "http://127.0.0.1:1/v1");
        assert_eq!(of(&["http://0.0.0.0:1/v1"]).unwrap(), "http://127.0.0.1:1/v1");
        assert_eq!(of(&["http://[::]:1/v1"]).unwrap(), "'http://[::1]:1/v1'");
        assert_eq!(of(&[]).unwrap_err().name, "EndpointOff");
        assert_eq!(of(&["unix:/s"]).unwrap_err().name, "NoAddress");
        assert_eq!(of(&["http://$(reboot)/v1"]).unwrap_err().name, "NoAddress");
    }
}
