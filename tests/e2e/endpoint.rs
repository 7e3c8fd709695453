//! The OpenAI endpoint as it is installed: off, then by its socket unit.

use serde_json::Value;

use crate::lab::{Bus, DEADLINE, Host};
use crate::{CLUSTER, deployed};

const URL: &str = "http://127.0.0.1:11480";

/// The status of a request.
fn status(host: &Host, curl: &str) -> String {
    host.exec(&format!("curl -s -m 60 -o /dev/null -w '%{{http_code}}' {curl}")).stdout
}

/// A chat with the demo model: what came, headers first.
fn chat(host: &Host, key: &str, question: &str) -> String {
    let body = format!("{{\"model\":\"opengateway-demo\",\"messages\":[{{\"role\":\"user\",\"content\":\"{question}\"}}]}}");
    let headers = format!("-H 'Content-Type: application/json' -H 'Authorization: Bearer {key}'");
    host.sh(&format!("curl -si -m 60 {headers} -d '{body}' {URL}/v1/chat/completions"))
}

fn is_4(answer: &str) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer}"));
    assert!(head.starts_with("HTTP/1.1 200"), "{answer}");
    let body: Value = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}"));
    assert_eq!(body["choices"][0]["message"]["content"], "4", "{answer}");
}

#[test]
fn it_is_off_until_the_socket_is_enabled_and_then_starts_with_its_first_request() {
    let Some(lab) = deployed(1, Bus::Daemon) else { return };
    let host = lab.host();
    assert_eq!(host.exec("systemctl is-enabled opengatewayd-http.socket").stdout.trim(), "disabled");
    assert_eq!(status(host, &format!("{URL}/health")), "000", "nobody listens");
    assert_eq!(host.sh("systemd-analyze verify --man=no opengatewayd-http.socket 2>&1"), "");

    host.sh("systemctl stop opengatewayd; systemctl enable --now opengatewayd-http.socket");
    assert_eq!(host.property("ActiveState"), "inactive");
    assert_eq!(status(host, &format!("{URL}/health")), "200");
    assert_eq!(host.property("ActiveState"), "active");
    let key = host.sh("ogctl key --print");
    is_4(&chat(host, &key, "What is 2+2?"));
    assert_eq!(status(host, &format!("-H 'Authorization: Bearer {key}' {URL}/v1/models")), "200");

    // The service goes, the socket stays, and the key is the same after it.
    host.sh("systemctl restart opengatewayd");
    assert_eq!(host.sh("ogctl key --print"), key);
    is_4(&chat(host, &key, "What is 2+2?"));
    // Once enabled, it is there after a boot.
    host.power_cut();
    host.power_on();
    host.until(DEADLINE, "systemctl is-active opengatewayd-http.socket");
    is_4(&chat(host, &key, "What is 2+2?"));
}

#[test]
fn a_service_that_runs_has_it_after_a_restart() {
    let Some(lab) = deployed(1, Bus::Daemon) else { return };
    let host = lab.host();
    host.sh("systemctl enable opengatewayd-http.socket; systemctl restart opengatewayd");
    assert_eq!(host.sh("systemctl is-active opengatewayd-http.socket"), "active");
    is_4(&chat(host, &host.sh("ogctl key --print"), "What is 2+2?"));
    // Off again.
    host.sh("systemctl disable --now opengatewayd-http.socket; systemctl restart opengatewayd");
    assert_eq!(status(host, &format!("{URL}/health")), "000");
}

#[test]
fn who_has_no_key_or_comes_by_another_name_is_refused() {
    let Some(lab) = deployed(1, Bus::Daemon) else { return };
    let host = lab.host();
    host.sh("systemctl stop opengatewayd; systemctl enable --now opengatewayd-http.socket");
    assert_eq!(status(host, &format!("{URL}/health")), "200");
    let key = host.sh("ogctl key --print");
    assert_eq!(status(host, &format!("{URL}/v1/models")), "401");
    let (most, last) = key.split_at(key.len() - 1);
    let other = if last == "0" { "1" } else { "0" };
    assert_eq!(status(host, &format!("-H 'Authorization: Bearer {most}{other}' {URL}/v1/models")), "401");
    let bearer = format!("-H 'Authorization: Bearer {key}'");
    assert_eq!(status(host, &format!("{bearer} {URL}/v1/models")), "200");
    // As a web page of somebody else makes a browser ask.
    for header in ["Host: evil.example", "Origin: https://evil.example"] {
        let refused = status(host, &format!("{bearer} -H '{header}' {URL}/v1/models"));
        assert!(refused.starts_with('4'), "{header}: {refused}");
    }

    // A user gets a key who may ask: one of the group, and nobody else.
    let said = host.as_user("alice", "ogctl key --print");
    assert_eq!((said.code, said.stdout.as_str()), (4, ""), "{said:?}");
    host.sh("gpasswd --add alice opengateway-users");
    let said = host.as_user("alice", "ogctl key --print");
    assert_eq!(said.code, 0, "{said:?}");
    let hers = said.stdout.trim();
    assert_ne!(hers, key);
    is_4(&chat(host, hers, "What is 2+2?"));

    // The socket file is for the group, and asks for no key.
    let by_file =
        "curl -s -m 20 -o /dev/null -w '%{http_code}' --unix-socket /run/opengateway-http.sock http://localhost/v1/models";
    assert_eq!(host.as_user("alice", by_file).stdout, "200");
    assert_eq!(host.as_user("bob", by_file).stdout, "000");
}

#[test]
fn one_host_asks_by_http_and_another_answers() {
    let Some(lab) = deployed(2, Bus::Broker) else { return };
    let [a1, a2] = lab.hosts() else { unreachable!() };
    assert_eq!(a1.ogctl(&["connect", CLUSTER, "--serve", "--wait", "0"]).code, 0);
    a2.sh("rm -rf /usr/share/opengateway/models; systemctl stop opengatewayd; systemctl enable --now opengatewayd-http.socket");
    assert_eq!(status(a2, &format!("{URL}/health")), "200");
    assert_eq!(a2.ogctl(&["connect", CLUSTER, "--consume", "--wait", "30"]).code, 0);
    a2.until(DEADLINE, "ogctl models --json | grep -q opengateway-demo");
    let answer = chat(a2, &a2.sh("ogctl key --print"), "What is 2+2?");
    is_4(&answer);
    assert!(answer.contains("a1"), "a header names the node: {answer}");
}
