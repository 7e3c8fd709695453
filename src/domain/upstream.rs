//! Servers of models beside this node: which kinds there are, and where text may be sent.

use std::net::{IpAddr, Ipv6Addr};

/// What a server speaks besides the OpenAI API: it decides where the facts about its models are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Api {
    /// The OpenAI API and nothing else.
    OpenAi,
    /// Ollama.
    Ollama,
    /// The server of llama.cpp.
    LlamaServer,
    /// vLLM.
    Vllm,
    /// LM Studio.
    LmStudio,
    /// EXO, where a model is placed before it answers.
    Exo,
    /// mesh-llm.
    MeshLlm,
}

impl Api {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::OpenAi, Self::Ollama, Self::LlamaServer, Self::Vllm, Self::LmStudio, Self::Exo, Self::MeshLlm];

    /// The word of the configuration, and for people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::OpenAi => "openai",
            Self::Ollama => "ollama",
            Self::LlamaServer => "llama-server",
            Self::Vllm => "vllm",
            Self::LmStudio => "lm-studio",
            Self::Exo => "exo",
            Self::MeshLlm => "mesh-llm",
        }
    }

    /// The kind with this word.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|api| api.as_str() == name)
    }

    /// The port on which it listens when nobody says otherwise; none for a server of no known kind.
    pub const fn usual_port(self) -> Option<u16> {
        match self {
            Self::OpenAi => None,
            Self::Ollama => Some(11434),
            Self::LlamaServer => Some(8080),
            Self::Vllm => Some(8000),
            Self::LmStudio => Some(1234),
            Self::Exo => Some(52415),
            Self::MeshLlm => Some(9337),
        }
    }

    /// What starts it.
    pub const fn start_hint(self) -> Option<&'static str> {
        match self {
            Self::OpenAi => None,
            Self::Ollama => Some("systemctl start ollama"),
            Self::LlamaServer => Some("llama-server -m FILE.gguf"),
            Self::Vllm => Some("vllm serve MODEL"),
            Self::LmStudio => Some("lms server start"),
            Self::Exo => Some("uv run exo, in its directory"),
            Self::MeshLlm => Some("mesh-llm serve"),
        }
    }

    /// What gives it a model.
    pub const fn model_hint(self) -> Option<&'static str> {
        match self {
            Self::Ollama => Some("ollama pull llama3.2"),
            Self::LmStudio => Some("lms get MODEL"),
            Self::Exo => Some("download one in its window, http://127.0.0.1:52415"),
            Self::OpenAi | Self::LlamaServer | Self::Vllm | Self::MeshLlm => None,
        }
    }

    /// Prompts that it answers at once, where it does not say so itself: Ollama's `OLLAMA_NUM_PARALLEL` cannot be asked for,
    /// vLLM batches what comes.
    pub const fn usual_slots(self) -> usize {
        match self {
            Self::Vllm => 32,
            Self::OpenAi | Self::Ollama | Self::LlamaServer | Self::LmStudio | Self::Exo | Self::MeshLlm => 4,
        }
    }
}

/// Longest URL of a server.
pub const MAX_URL_BYTES: usize = 2048;

/// The parts of `http://HOST[:PORT][/PATH]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// By `https`.
    pub secure: bool,
    /// Name or address, an IPv6 one without brackets.
    pub host: String,
    /// Where it listens.
    pub port: u16,
    /// Host and port as written.
    pub authority: String,
    /// Without a slash at the end.
    pub path: String,
}

impl Location {
    /// Reads a URL.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(url: &str) -> Result<Self, String> {
        if url.len() > MAX_URL_BYTES {
            return Err(format!("it is longer than {MAX_URL_BYTES} bytes"));
        }
        let (secure, rest) = match (url.strip_prefix("http://"), url.strip_prefix("https://")) {
            (Some(rest), _) => (false, rest),
            (_, Some(rest)) => (true, rest),
            _ => return Err("it begins with http:// or https://".to_owned()),
        };
        let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
        if authority.contains('@') {
            return Err("a password in a URL ends up in logs: use api_key_file".to_owned());
        }
        if path.contains(['?', '#']) {
            return Err("it has a query".to_owned());
        }
        if !path.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("its path has characters that belong in no URL".to_owned());
        }
        let (host, port) = match authority.strip_prefix('[') {
            Some(bracketed) => {
                let (host, port) = bracketed.split_once(']').ok_or("its address has no closing bracket")?;
                host.parse::<Ipv6Addr>().map_err(|_| "what is in the brackets is no IPv6 address")?;
                (host, port)
            }
            None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
        };
        let is_host = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:".contains(&byte);
        if host.is_empty() || !host.bytes().all(is_host) {
            return Err("it names no host".to_owned());
        }
        let port = match port.strip_prefix(':') {
            Some(port) => port.parse().ok().filter(|port| *port != 0).ok_or("its port is between 1 and 65535")?,
            None if port.is_empty() => {
                if secure {
                    443
                } else {
                    80
                }
            }
            None => return Err("it names no host".to_owned()),
        };
        let path = path.trim_end_matches('/').to_owned();
        Ok(Self { secure, host: host.to_owned(), port, authority: authority.to_owned(), path })
    }

    /// It names this machine, without asking anybody.
    pub fn is_loopback(&self) -> bool {
        self.host.eq_ignore_ascii_case("localhost") || self.host.parse::<IpAddr>().is_ok_and(|ip| canonical(ip).is_loopback())
    }

    /// Whether text may go there at all: encrypted, or to this machine, or where the owner says that the network between is
    /// to be trusted.
    ///
    /// # Errors
    /// Why not, and what to do.
    pub fn check(&self, allow_http: bool) -> Result<(), String> {
        if self.secure || allow_http || self.is_loopback() {
            return match self.host.parse::<IpAddr>() {
                Ok(ip) => self.check_address(ip, allow_http),
                Err(_) => Ok(()),
            };
        }
        Err("prompts would cross the network in clear text: use https://, or set allow_http = true where every machine between \
             is trusted"
            .to_owned())
    }

    /// Whether an address that the host name was resolved to may be dialled. Asked for every address, right before the dial: a
    /// name cannot change its mind in between.
    ///
    /// # Errors
    /// Why not.
    pub fn check_address(&self, ip: IpAddr, allow_http: bool) -> Result<(), String> {
        let ip = canonical(ip);
        if ip.is_unspecified() || ip.is_multicast() {
            return Err(format!("{ip} is no address of a server"));
        }
        if is_link_local(ip) {
            return Err(format!("{ip} is a link-local address, where clouds keep their secrets and no model is served"));
        }
        if is_metadata(ip) {
            return Err(format!("{ip} is where clouds keep their secrets"));
        }
        if ip.is_loopback() && !self.is_loopback() {
            return Err(format!("{} turned out to be this machine, {ip}: write 127.0.0.1 if that is meant", self.host));
        }
        if !self.secure && !allow_http && !ip.is_loopback() {
            return Err(format!(
                "{} turned out to be {ip}, which is another machine: text goes there by https:// alone",
                self.host
            ));
        }
        Ok(())
    }
}

fn canonical(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// Metadata services of clouds that are not link-local: AWS by IPv6, Alibaba, Azure.
fn is_metadata(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => [[100, 100, 100, 200], [168, 63, 129, 16]].contains(&ip.octets()),
        IpAddr::V6(ip) => ip.segments() == [0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read_or_refused_with_the_reason() {
        let place = Location::parse("http://127.0.0.1:11434/v1/").unwrap();
        assert_eq!((place.host.as_str(), place.port, place.path.as_str()), ("127.0.0.1", 11434, "/v1"));
        let place = Location::parse("https://[::1]/v1").unwrap();
        assert_eq!((place.host.as_str(), place.port, place.authority.as_str(), place.secure), ("::1", 443, "[::1]", true));
        assert_eq!(Location::parse("http://gpu.lan").unwrap().port, 80);
        for bad in [
            "",
            "127.0.0.1:80",
            "ftp://x/v1",
            "http://",
            "http://:80",
            "http://user:pass@host/v1",
            "http://host/v1?x=1",
            "http://host:0/v1",
            "http://host:70000",
            "http://host:/v1",
            "http://[::1/v1",
            "http://[x]/v1",
            "http://ho st/v1",
            "http://h\u{f6}st/v1",
            "http://host/\u{7}",
            "http://host#x",
        ] {
            assert!(Location::parse(bad).is_err(), "{bad}");
        }
        let long = |bytes: usize| format!("http://host/{}", "x".repeat(bytes - 12));
        assert!(Location::parse(&long(MAX_URL_BYTES)).is_ok() && Location::parse(&long(MAX_URL_BYTES + 1)).is_err());
    }

    #[test]
    fn text_leaves_this_machine_encrypted_or_by_its_owners_word() {
        let check = |url: &str, allow| Location::parse(url).unwrap().check(allow);
        for good in
            ["http://127.0.0.1:1/v1", "http://127.9.9.9/v1", "http://[::1]:1/v1", "http://localhost/v1", "https://x.example/v1"]
        {
            assert_eq!(check(good, false), Ok(()), "{good}");
        }
        for lan in ["http://10.0.0.5:11434/v1", "http://gpu.lan/v1", "http://[fd00::5]/v1", "http://localhost.evil.example/v1"] {
            assert!(check(lan, false).unwrap_err().contains("allow_http"), "{lan}");
            assert_eq!(check(lan, true), Ok(()), "{lan}");
        }
    }

    #[test]
    fn no_server_is_at_the_addresses_of_clouds_and_of_everybody() {
        for url in ["http://x/v1", "https://x/v1"] {
            let place = Location::parse(url).unwrap();
            for bad in [
                "169.254.169.254",
                "169.254.0.1",
                "fe80::1",
                "::ffff:169.254.169.254",
                "0.0.0.0",
                "::",
                "224.0.0.1",
                "ff02::1",
                "255.255.255.255",
                "100.100.100.200",
                "168.63.129.16",
                "fd00:ec2::254",
                "127.0.0.1",
                "::1",
                "::ffff:127.0.0.1",
            ] {
                assert!(place.check_address(bad.parse().unwrap(), true).is_err(), "{url} {bad}");
            }
            for good in ["10.0.0.5", "192.168.1.7", "203.0.113.9", "fd00::5", "2001:db8::1"] {
                assert_eq!(place.check_address(good.parse().unwrap(), true), Ok(()), "{url} {good}");
                assert_eq!(place.check_address(good.parse().unwrap(), false).is_ok(), place.secure, "{url} {good}");
            }
        }
        for forbidden in ["http://169.254.169.254/v1", "https://0.0.0.0/v1", "https://[fe80::1]/v1"] {
            assert!(Location::parse(forbidden).unwrap().check(true).is_err(), "{forbidden}");
        }
    }

    #[test]
    fn every_kind_reads_back() {
        for api in Api::ALL {
            assert_eq!(Api::from_name(api.as_str()), Some(api));
        }
        assert_eq!(Api::from_name("lmstudio"), None);
    }
}
