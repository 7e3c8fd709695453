//! A system bus of a test's own: the installed bus policy, the installed polkit files, the real polkitd, and the daemon as a
//! user that is not root. Users and groups are the test's too: bus and polkitd see an `/etc/passwd` and `/etc/group` of their
//! own. Nothing of it touches the machine's bus, its users or its polkit. Only root can make such a thing.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::thread::{Gid, Uid, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use zbus::message::Flags;
use zbus::{Connection, Message, MessageStream};

use super::node::{DEADLINE, NAME, skipped};

/// The user of the service, as `sysusers.d` makes it.
pub const SERVICE: u32 = 64_801;
/// Two people.
pub const ALICE: u32 = 64_802;
pub const BOB: u32 = 64_803;
const USERS: [(&str, u32); 3] = [("opengateway", SERVICE), ("og-alice", ALICE), ("og-bob", BOB)];
const GROUP: u32 = 64_810;

const POLKIT: &str = "org.freedesktop.PolicyKit1";
/// Where distributions put polkitd.
const POLKITD: [&str; 3] = ["/usr/lib/polkit-1/polkitd", "/usr/libexec/polkitd", "/usr/libexec/polkit-1/polkitd"];

/// As `/usr/share/dbus-1/system.conf`, with a socket of its own and nothing to activate.
const CONFIG: &str = r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path=@DIR@/socket</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><deny own="*"/><deny send_type="method_call"/><allow send_type="signal"/>
<allow send_requested_reply="true" send_type="method_return"/><allow send_requested_reply="true" send_type="error"/>
<allow receive_type="method_call"/><allow receive_type="method_return"/><allow receive_type="error"/><allow receive_type="signal"/>
<allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"/>
<allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Introspectable"/>
<allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Properties"/></policy>
<include>/usr/share/dbus-1/system.d/org.freedesktop.PolicyKit1.conf</include>
<include>@DIR@/org.opengateway.Gateway1.conf</include></busconfig>"#;

/// Makes the test's files those of the processes it starts.
const NAMESPACE: &str = r#"mount --bind "$0/passwd" /etc/passwd && mount --bind "$0/group" /etc/group &&
mount --bind "$0/actions" /usr/share/polkit-1/actions && mount --bind "$0/rules" /usr/share/polkit-1/rules.d && exec "$@""#;

/// The bus, and what is on it; all of it ends with this.
pub struct SystemBus {
    dir: tempfile::TempDir,
    bus: Child,
    polkitd: Option<Child>,
    daemon: Option<Child>,
}

impl SystemBus {
    /// A bus with polkitd and the daemon, started with `args`. `None`, said aloud, where that is not possible.
    pub async fn start(args: &[&str], rules: &str) -> Option<Self> {
        let mut system = Self::without_polkit(rules).await?;
        system.start_polkit().await;
        system.start_daemon(args).await;
        Some(system)
    }

    /// A bus with nobody on it. `rules` are polkit rules besides the installed ones.
    pub async fn without_polkit(rules: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            skipped("only root can make a system bus with users of its own");
            return None;
        }
        if polkitd().is_none() {
            skipped("there is no polkitd: apt-get install polkitd");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path(), rules);
        let command = within(dir.path(), &["dbus-daemon", "--nofork", "--nopidfile", "--print-address=1", "--config-file"])
            .arg(dir.path().join("bus.conf"))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut bus = command.unwrap();
        let mut address = String::new();
        BufReader::new(bus.stdout.take().unwrap()).read_line(&mut address).unwrap();
        if address.is_empty() {
            let _ = bus.wait();
            skipped("there is no dbus-daemon, or no mount namespace is to be had");
            return None;
        }
        Some(Self { dir, bus, polkitd: None, daemon: None })
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn address(&self) -> String {
        format!("unix:path={}", self.dir().join("socket").display())
    }

    pub async fn start_polkit(&mut self) {
        let program = polkitd().unwrap();
        let log = std::fs::File::create(self.dir().join("polkitd.log")).unwrap();
        let child = within(self.dir(), &[program, "--no-debug"])
            .env("DBUS_SYSTEM_BUS_ADDRESS", self.address())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        self.polkitd = Some(child.unwrap());
        self.owned(POLKIT).await;
    }

    pub async fn kill_polkit(&mut self) {
        let mut polkitd = self.polkitd.take().unwrap();
        polkitd.kill().unwrap();
        polkitd.wait().unwrap();
        let root = self.connect(0).await;
        let deadline = Instant::now() + DEADLINE;
        while has_owner(&root, POLKIT).await {
            assert!(Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    pub fn signal_polkit(&mut self, signal: rustix::process::Signal) {
        let pid = i32::try_from(self.polkitd.as_ref().unwrap().id()).unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), signal).unwrap();
    }

    /// The daemon as the service's user, on the system bus.
    pub async fn start_daemon(&mut self, args: &[&str]) {
        let log = std::fs::File::create(self.dir().join("daemon.log")).unwrap();
        let child = Command::new("setpriv")
            .args([&format!("--reuid={SERVICE}"), &format!("--regid={SERVICE}"), "--clear-groups"])
            .arg(self.program(env!("CARGO_BIN_EXE_opengatewayd")))
            .args(["--bus", "system", "--listen", "/ip4/127.0.0.1/udp/0/quic-v1", "--no-mdns", "--no-discover", "--state-dir"])
            .arg(self.dir().join("state"))
            .args(args)
            .env("DBUS_SYSTEM_BUS_ADDRESS", self.address())
            .env_remove("OPENGATEWAY_POC_ROOT")
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        self.daemon = Some(child.unwrap());
        self.owned(NAME).await;
    }

    /// The program, where every user can start it: a checkout may be where others have no access.
    pub fn program(&self, program: &str) -> PathBuf {
        let other = format!("--reuid={ALICE}");
        let reached = Command::new("setpriv").args([&other, "--clear-groups", "test", "-x", program]).status();
        if reached.is_ok_and(|status| status.success()) {
            return program.into();
        }
        let copy = self.dir().join(Path::new(program).file_name().unwrap());
        std::fs::copy(program, &copy).unwrap();
        copy
    }

    /// `ogctl` of this user.
    pub fn ogctl_as(&self, uid: u32, args: &[&str]) -> std::process::Output {
        Command::new("setpriv")
            .args([&format!("--reuid={uid}"), &format!("--regid={uid}"), "--clear-groups"])
            .arg(self.program(env!("CARGO_BIN_EXE_ogctl")))
            .args(args)
            .env("DBUS_SYSTEM_BUS_ADDRESS", self.address())
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    async fn owned(&mut self, name: &str) {
        let root = self.connect(0).await;
        let deadline = Instant::now() + DEADLINE;
        while !has_owner(&root, name).await {
            let ended =
                [&mut self.polkitd, &mut self.daemon].into_iter().flatten().any(|child| child.try_wait().unwrap().is_some());
            assert!(Instant::now() < deadline && !ended, "{name} is not there: {}{}", self.log(), self.polkit_log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir().join("daemon.log")).unwrap_or_default()
    }

    fn polkit_log(&self) -> String {
        std::fs::read_to_string(self.dir().join("polkitd.log")).unwrap_or_default()
    }

    /// A connection of this user: the kernel tells the bus whose it is. All are of one process, and that is root's: who
    /// judged callers by their process would let everybody in.
    pub async fn connect(&self, uid: u32) -> Connection {
        let path = self.dir().join("socket");
        // Of one thread alone, which ends here.
        let stream = std::thread::spawn(move || {
            if uid != 0 {
                set_thread_groups(&[]).unwrap();
                let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
                set_thread_res_gid(group, group, group).unwrap();
                set_thread_res_uid(user, user, user).unwrap();
            }
            std::os::unix::net::UnixStream::connect(path).unwrap()
        });
        let stream = stream.join().unwrap();
        zbus::connection::Builder::unix_stream(stream).user_id(uid).build().await.unwrap()
    }

    /// Makes these users the members of `opengateway-users`, and nobody else.
    pub fn members(&self, users: &[&str]) {
        let group = std::fs::read_to_string(self.dir().join("group.base")).unwrap();
        // The same file: it is mounted elsewhere.
        std::fs::write(self.dir().join("group"), format!("{group}opengateway-users:x:{GROUP}:{}\n", users.join(","))).unwrap();
    }

    /// A number of the daemon's `/proc/PID/status`, in KiB.
    pub fn kib(&self, key: &str) -> u64 {
        let pid = self.daemon.as_ref().unwrap().id();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}

impl Drop for SystemBus {
    fn drop(&mut self) {
        for child in [self.daemon.as_mut(), self.polkitd.as_mut(), Some(&mut self.bus)].into_iter().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn polkitd() -> Option<&'static str> {
    POLKITD.into_iter().find(|path| Path::new(path).exists())
}

/// A command in a mount namespace of its own, with the test's users, actions and rules.
fn within(dir: &Path, command: &[&str]) -> Command {
    let mut unshare = Command::new("unshare");
    unshare.args(["-m", "--propagation", "private", "sh", "-c", NAMESPACE]).arg(dir).args(command);
    unshare
}

fn prepare(dir: &Path, rules: &str) {
    use std::os::unix::fs::PermissionsExt as _;
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    let write = |name: &str, text: String| std::fs::write(dir.join(name), text).unwrap();
    let copy = |from: &Path, to: &str| {
        std::fs::copy(from, dir.join(to)).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
    };
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    write("bus.conf", CONFIG.replace("@DIR@", dir.to_str().unwrap()));
    copy(&repository.join("dbus/org.opengateway.Gateway1.conf"), "org.opengateway.Gateway1.conf");
    // What the machine has, and what we install.
    for (of_machine, name) in [("/usr/share/polkit-1/actions", "actions"), ("/usr/share/polkit-1/rules.d", "rules")] {
        std::fs::create_dir(dir.join(name)).unwrap();
        for entry in std::fs::read_dir(of_machine).into_iter().flatten().flatten() {
            copy(&entry.path(), &format!("{name}/{}", entry.file_name().to_str().unwrap()));
        }
    }
    copy(&repository.join("dbus/org.opengateway.gateway1.policy"), "actions/org.opengateway.gateway1.policy");
    copy(&repository.join("dbus/50-opengateway.rules"), "rules/50-opengateway.rules");
    write("rules/60-test.rules", rules.to_owned());
    let (mut passwd, mut group) = ["/etc/passwd", "/etc/group"].map(|file| std::fs::read_to_string(file).unwrap()).into();
    for (name, id) in USERS {
        passwd += &format!("{name}:x:{id}:{id}::/nonexistent:/usr/sbin/nologin\n");
        group += &format!("{name}:x:{id}:\n");
    }
    write("passwd", passwd);
    write("group.base", group.clone());
    write("group", format!("{group}opengateway-users:x:{GROUP}:\n"));
    std::fs::create_dir(dir.join("state")).unwrap();
    std::os::unix::fs::chown(dir.join("state"), Some(SERVICE), Some(SERVICE)).unwrap();
}

async fn has_owner(connection: &Connection, name: &str) -> bool {
    let bus = "org.freedesktop.DBus";
    let reply = connection.call_method(Some(bus), "/org/freedesktop/DBus", Some(bus), "NameHasOwner", &name).await.unwrap();
    reply.body().deserialize().unwrap()
}

/// Whether somebody may be asked for a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    May,
    MayNot,
}

/// Calls a method; the error's name and message.
pub async fn ask<B>(
    connection: &Connection,
    path: &str,
    interface: &str,
    method: &str,
    body: &B,
    ask: Ask,
) -> Result<Message, (String, String)>
where
    B: serde::Serialize + zbus::wire::DynamicType + Sync,
{
    use futures::StreamExt as _;
    let flags = if ask == Ask::May { Flags::ALLOW_INTERACTIVE_AUTH } else { Flags::empty() };
    let call = Message::method_call(path, method).destination(NAME).interface(interface).with_flags(flags).build(body).unwrap();
    let serial = call.header().primary().serial_num();
    let mut replies = MessageStream::from(connection);
    connection.send(&call).await.unwrap();
    let reply = async {
        loop {
            let message = replies.next().await.expect("the bus lives").unwrap();
            if message.header().reply_serial() == Some(serial) {
                return message;
            }
        }
    };
    let reply = tokio::time::timeout(DEADLINE, reply).await.unwrap_or_else(|_| panic!("{method}: no reply"));
    match reply.header().error_name() {
        None => Ok(reply.clone()),
        Some(name) => Err((name.to_string(), reply.body().deserialize::<String>().unwrap_or_default())),
    }
}
