//! Whom the request says to be for, and which web page it comes from. A page in a browser may send requests to loopback: it
//! cannot forge these two headers.

use hyper::HeaderMap;
use hyper::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS,
    ACCESS_CONTROL_MAX_AGE, HOST, HeaderValue, ORIGIN, VARY,
};
use hyper::{Request, Response, StatusCode};

use super::body::Reply;
use super::errors::Refusal;
use crate::config::HttpSettings;

/// Refuses a request by TCP whose `Host` is a name that somebody may have pointed here (DNS rebinding).
///
/// # Errors
/// 400 or 403.
pub(super) fn check_host<B>(request: &Request<B>, settings: &HttpSettings) -> Result<(), Refusal> {
    let mut hosts = request.headers().get_all(HOST).iter();
    let (host, more) = (hosts.next(), hosts.next());
    if more.is_some() {
        return Err(Refusal::bad_request("invalid_host", "there are several Host headers"));
    }
    let Some(host) = host else {
        return Err(Refusal::bad_request("invalid_host", "there is no Host header"));
    };
    let named = request.uri().authority().map(hyper::http::uri::Authority::as_str);
    for host in host.to_str().ok().into_iter().chain(named) {
        if !is_ours(host, settings) {
            return Err(Refusal::forbidden(
                "host_not_allowed",
                "this endpoint is asked as localhost or by its address; other names are those in http.hosts of the configuration",
            ));
        }
    }
    if host.to_str().is_err() {
        return Err(Refusal::bad_request("invalid_host", "the Host header is no name"));
    }
    Ok(())
}

fn is_ours(host: &str, settings: &HttpSettings) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, port)) if port.is_empty() || is_port(port) => {
                return address
                    .parse::<std::net::Ipv6Addr>()
                    .is_ok_and(|ip| settings.allow_remote || ip.to_canonical().is_loopback());
            }
            _ => return false,
        },
        None => match host.split_once(':') {
            Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
            Some(_) => return false,
            None => host,
        },
    };
    if let Ok(address) = name.parse::<std::net::Ipv4Addr>() {
        // An address is no name that somebody points elsewhere.
        return settings.allow_remote || address.is_loopback();
    }
    name.eq_ignore_ascii_case("localhost") || settings.hosts.iter().any(|known| name.eq_ignore_ascii_case(known))
}

fn is_port(text: &str) -> bool {
    text.strip_prefix(':').is_some_and(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The web page that a request comes from, where it may.
///
/// # Errors
/// 403: a page that the configuration does not name.
pub(super) fn check_origin(headers: &HeaderMap, settings: &HttpSettings) -> Result<Option<HeaderValue>, Refusal> {
    let Some(origin) = headers.get(ORIGIN) else { return Ok(None) };
    if headers.get_all(ORIGIN).iter().count() == 1 && settings.origins.iter().any(|known| origin.as_bytes() == known.as_bytes()) {
        return Ok(Some(origin.clone()));
    }
    Err(Refusal::forbidden("origin_not_allowed", "web pages may call this endpoint only from http.origins of the configuration"))
}

/// Lets the page read the response.
pub(super) fn open_to(origin: HeaderValue, response: &mut Response<Reply>) {
    let headers = response.headers_mut();
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.insert(VARY, HeaderValue::from_static("Origin"));
    let exposed = "retry-after, x-opengateway-served-by, x-opengateway-peer, x-opengateway-model";
    headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(exposed));
}

/// What a browser asks before it lets a page send a request.
pub(super) fn preflight() -> Response<Reply> {
    let mut response = Response::new(Reply::whole(""));
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    headers.insert(ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST"));
    let taken = "authorization, content-type, x-opengateway-node, x-opengateway-cluster, x-opengateway-timeout";
    headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static(taken));
    headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_and_what_is_configured_are_ours_and_nothing_else() {
        let mut settings = HttpSettings { hosts: vec!["gateway.lan".into()], ..HttpSettings::default() };
        for ours in
            ["localhost", "LocalHost:11480", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:11480", "127.8.9.1:1", "Gateway.LAN:1"]
        {
            assert!(is_ours(ours, &settings), "{ours}");
        }
        let theirs = [
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "192.0.2.1",
            "[2001:db8::1]:1",
            "",
            "[::1",
            "::1",
            "localhost:80@evil.example",
            "user@localhost",
            "localhost:x",
            "0.0.0.0",
            "[::1]x",
            "127.1",
            "2130706433",
        ];
        for theirs in theirs {
            assert!(!is_ours(theirs, &settings), "{theirs}");
        }
        settings.allow_remote = true;
        for ours in ["192.0.2.1:11480", "[2001:db8::1]:11480"] {
            assert!(is_ours(ours, &settings), "{ours}");
        }
        assert!(!is_ours("evil.example", &settings));
    }

    #[test]
    fn a_page_is_let_in_by_its_exact_origin() {
        let settings = HttpSettings { origins: vec!["https://app.example".into()], ..HttpSettings::default() };
        let with = |origins: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for origin in origins {
                headers.append(ORIGIN, HeaderValue::from_static(origin));
            }
            check_origin(&headers, &settings).map(|origin| origin.is_some())
        };
        assert_eq!(with(&[]), Ok(false));
        assert_eq!(with(&["https://app.example"]), Ok(true));
        for foreign in [
            &["https://evil.example"][..],
            &["null"],
            &["https://app.example:444"],
            &["http://app.example"],
            &["https://app.example", "https://app.example"],
        ] {
            assert!(with(foreign).is_err(), "{foreign:?}");
        }
    }
}
