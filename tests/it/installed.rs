//! The files that a package installs, compared with each other and with the interface.

const BUS: &str = include_str!("../../dbus/org.opengateway.Gateway1.conf");
const POLICY: &str = include_str!("../../dbus/org.opengateway.gateway1.policy");
const RULES: &str = include_str!("../../dbus/50-opengateway.rules");
const ACTIVATION: &str = include_str!("../../dbus/org.opengateway.Gateway1.service");
const UNIT: &str = include_str!("../../systemd/opengatewayd.service");
const SYSUSERS: &str = include_str!("../../systemd/sysusers.d/opengateway.conf");
const NAME: &str = "org.opengateway.Gateway1";

/// The values between `before` and the next quotation mark.
fn quoted<'a>(text: &'a str, before: &str) -> Vec<&'a str> {
    text.split(before).skip(1).filter_map(|rest| rest.split('"').next()).collect()
}

fn setting<'a>(unit: &'a str, key: &str) -> &'a str {
    unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')).unwrap_or_else(|| panic!("{key}"))
}

#[test]
fn every_interface_is_open_on_the_bus_and_nothing_else_of_ours() {
    let mut interfaces: Vec<String> = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/dbus"))
        .unwrap()
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|end| end == "xml"))
        .flat_map(|entry| {
            let text = std::fs::read_to_string(entry.path()).unwrap();
            quoted(&text, "<interface name=\"").into_iter().map(str::to_owned).collect::<Vec<_>>()
        })
        .collect();
    interfaces.sort();
    let mut open: Vec<&str> = quoted(BUS, "send_interface=\"").into_iter().filter(|name| name.starts_with(NAME)).collect();
    open.sort_unstable();
    assert_eq!(open, interfaces);
    for standard in ["Introspectable", "Peer", "Properties", "ObjectManager"] {
        assert!(BUS.contains(&format!("send_interface=\"org.freedesktop.DBus.{standard}\"")), "{standard}");
    }
    // The last rule of the default context wins: it takes back what "Properties" opened.
    let default = BUS.split("<policy context=\"default\">").nth(1).unwrap().split("</policy>").next().unwrap();
    let last = default.rsplit("<deny").next().unwrap();
    assert!(last.contains("send_path=\"/org/freedesktop/LogControl1\"") && !last.contains("<allow"), "{last}");
    assert!(quoted(BUS, "send_destination=\"").into_iter().chain(quoted(BUS, "own=\"")).all(|name| name == NAME));
}

#[test]
fn unit_bus_policy_polkit_and_sysusers_name_one_user() {
    let user = setting(UNIT, "User");
    assert_eq!(setting(UNIT, "Group"), user);
    assert_eq!(quoted(BUS, "<policy user=\""), [user, "root", "root"]);
    let made: Vec<&str> =
        SYSUSERS.lines().filter(|line| line.starts_with("u ")).filter_map(|line| line.split_whitespace().nth(1)).collect();
    assert_eq!(made, [user]);
    let actions = quoted(POLICY, "<action id=\"");
    let owner = format!("<annotate key=\"org.freedesktop.policykit.owner\">unix-user:{user}</annotate>");
    assert_eq!(POLICY.split("</action>").filter(|action| action.contains(&owner)).count(), actions.len());
    // "manage" implies all others.
    let implied = POLICY.split("policykit.imply\">").nth(1).unwrap().split('<').next().unwrap();
    let others: Vec<&str> = actions.iter().copied().filter(|action| !action.ends_with(".manage")).collect();
    assert_eq!(implied.split_whitespace().collect::<Vec<_>>(), others);
    // The rule is about these actions and a group that sysusers makes.
    let prefix = RULES.split("action.id.indexOf(\"").nth(1).unwrap().split('"').next().unwrap();
    assert!(actions.iter().all(|action| action.starts_with(prefix)));
    let group = RULES.split("isInGroup(\"").nth(1).unwrap().split('"').next().unwrap();
    assert!(SYSUSERS.lines().any(|line| line.split_whitespace().take(2).eq(["g", group])), "{group}");
}

#[test]
fn a_call_on_the_bus_starts_the_unit_only_when_it_is_enabled() {
    assert_eq!(setting(UNIT, "BusName"), NAME);
    assert_eq!(setting(ACTIVATION, "Name"), NAME);
    assert_eq!(setting(ACTIVATION, "SystemdService"), setting(UNIT, "Alias"));
    assert_eq!(setting(ACTIVATION, "Exec"), "/bin/false");
    assert_eq!(setting(UNIT, "RestartPreventExitStatus"), opengateway::daemon::EXIT_CONFIG.to_string());
}
