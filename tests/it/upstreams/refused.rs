//! Where no text goes: not a byte, not even a connection.

use std::net::{IpAddr, UdpSocket};

use opengateway::domain::prompt::FailureKind;
use opengateway::domain::upstream::Api;
use opengateway::serve::OpenAi;

use super::stand::{Reply, Stand};
use super::{answer, ask, backend, models, settings};

const LIST: &str = r#"{"object":"list","data":[{"id":"m"}]}"#;

/// The address of this machine that others use; nothing is sent to find it out.
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    socket.local_addr().ok().map(|address| address.ip()).filter(|ip| !ip.is_loopback() && !ip.is_unspecified())
}

#[tokio::test]
async fn addresses_of_nobody_get_no_byte() {
    let stand = Stand::listen("0.0.0.0:0".parse().unwrap(), None, |_| Reply::ok(LIST)).await;
    for host in ["0.0.0.0", "[::]", "[::ffff:0.0.0.0]", "169.254.169.254", "[fe80::1]", "[fd00:ec2::254]", "224.0.0.1"] {
        let mut settings = settings(&format!("http://{host}:{}/v1", stand.port), Some(Api::OpenAi));
        settings.allow_http = true;
        let error = OpenAi::start(settings).unwrap_err();
        assert!(error.to_string().contains(host.trim_matches(['[', ']'])), "{error}");
    }
    assert_eq!((stand.connections(), stand.bytes()), (0, 0));
}

#[tokio::test]
async fn another_machine_gets_clear_text_only_by_its_owners_word() {
    let Some(address) = own_address() else {
        return super::super::common::node::skipped("this machine has no address but loopback");
    };
    let list = |asked: &super::stand::Asked| if asked.path.ends_with("/models") { Reply::ok(LIST) } else { Reply::four() };
    let stand = Stand::listen("0.0.0.0:0".parse().unwrap(), None, list).await;
    let url = format!("http://{address}:{}/v1", stand.port);
    let error = OpenAi::start(settings(&url, Some(Api::OpenAi))).unwrap_err();
    assert!(error.to_string().contains("allow_http = true"), "{error}");
    assert_eq!((stand.connections(), stand.bytes()), (0, 0));
    let mut allowed = settings(&url, Some(Api::OpenAi));
    allowed.allow_http = true;
    let backend = OpenAi::start(allowed).unwrap();
    models(&backend).await;
    assert_eq!(answer(&backend, "m", ask("x")).await.unwrap().0, "4");
}

#[tokio::test]
async fn a_name_that_turns_out_to_be_this_machine_is_refused_before_a_byte() {
    let Ok(host) = rustix::system::uname().nodename().to_str().map(str::to_owned) else { return };
    let here =
        tokio::net::lookup_host((host.as_str(), 1)).await.is_ok_and(|mut found| found.all(|address| address.ip().is_loopback()));
    // Debian gives a machine its name at 127.0.1.1; others do not.
    if !here {
        return super::super::common::node::skipped("the name of this machine is not at a loopback address");
    }
    let stand = Stand::listen("0.0.0.0:0".parse().unwrap(), None, |_| Reply::ok(LIST)).await;
    let mut turned = settings(&format!("http://{host}:{}/v1", stand.port), Some(Api::OpenAi));
    turned.allow_http = true;
    let failure = answer(&OpenAi::start(turned).unwrap(), "m", ask("x")).await.unwrap_err();
    assert!(failure.detail.contains("UpstreamRefused"), "{failure}");
    assert_eq!((stand.connections(), stand.bytes()), (0, 0));
}

#[tokio::test]
async fn no_redirect_is_followed() {
    let other = Stand::start(|_| Reply::four()).await;
    for target in [format!("http://127.0.0.1:{}/v1/chat/completions", other.port), "file:///etc/passwd".to_owned()] {
        let redirect = move |asked: &super::stand::Asked| {
            if asked.path.ends_with("/models") {
                return Reply::ok(LIST);
            }
            Reply::Raw(format!("HTTP/1.1 307 Temporary Redirect\r\nlocation: {target}\r\ncontent-length: 0\r\n\r\n"))
        };
        let stand = Stand::start(redirect).await;
        let backend = backend(&stand.url(), Some(Api::OpenAi));
        models(&backend).await;
        assert_eq!(answer(&backend, "m", ask("x")).await.unwrap_err().kind, FailureKind::BackendFailed);
    }
    assert_eq!((other.connections(), other.bytes()), (0, 0));
}
