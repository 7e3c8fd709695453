//! The lab does what it says: each fault bites, and the same probe passes before it and after its end.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Family, Lab, Nat, Weather};

const ECHO: u16 = 7001;
const MDNS: u16 = 5353;
const GROUP: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 251);
/// Long enough for anything to come that is going to come, also on a busy machine.
const SILENCE: Duration = Duration::from_millis(600);
const PATIENCE: Duration = Duration::from_secs(20);

/// Sends back what it gets over UDP, and takes connections over TCP, until it is dropped.
struct Echo {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Echo {
    fn at(lab: &Lab, host: &str, port: u16) -> Self {
        let any = SocketAddr::new(if lab.family == Family::Ipv6 { IpAddr::from([0u16; 8]) } else { IpAddr::from([0; 4]) }, port);
        let (udp, tcp) = lab.within(host, || (UdpSocket::bind(any).unwrap(), TcpListener::bind(any).unwrap()));
        udp.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        tcp.set_nonblocking(true).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, stopped_too) = (stop.clone(), stop.clone());
        let echo = std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((count, sender)) = udp.recv_from(&mut buffer) {
                    let _ = udp.send_to(&buffer[..count], sender);
                }
            }
        });
        let accept = std::thread::spawn(move || {
            while !stopped_too.load(Ordering::Relaxed) {
                let _ = tcp.accept();
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        Self { stop, threads: vec![echo, accept] }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn socket(lab: &Lab, host: &str) -> UdpSocket {
    let any = if lab.family == Family::Ipv6 { "[::]:0" } else { "0.0.0.0:0" };
    lab.within(host, || UdpSocket::bind(any).unwrap())
}

/// One question and its own answer: the round trip.
fn ask(socket: &UdpSocket, to: SocketAddr, wait: Duration) -> Option<Duration> {
    static ASKED: AtomicU32 = AtomicU32::new(0);
    let word = ASKED.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    let begun = Instant::now();
    socket.send_to(&word, to).ok()?;
    loop {
        socket.set_read_timeout(Some(wait.checked_sub(begun.elapsed()).filter(|left| !left.is_zero())?)).unwrap();
        let mut heard = [0; 4];
        // A port that answers "unreachable" is an error here, and no answer.
        if socket.recv_from(&mut heard).is_ok() && heard == word {
            return Some(begun.elapsed());
        }
    }
}

/// Whether a question to an echo is answered.
fn reaches(lab: &Lab, from: &str, to: &str, port: u16) -> bool {
    let to: SocketAddr = SocketAddr::new(to.parse().unwrap(), port);
    let socket = socket(lab, from);
    ask(&socket, to, SILENCE).is_some()
}

/// Whether one is answered within [`PATIENCE`].
fn comes_to_reach(lab: &Lab, from: &str, to: &str, port: u16) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if reaches(lab, from, to, port) {
            return true;
        }
    }
    false
}

fn connects(lab: &Lab, from: &str, to: &str, port: u16) -> std::io::Result<()> {
    let to: SocketAddr = SocketAddr::new(to.parse().unwrap(), port);
    lab.within(from, || TcpStream::connect_timeout(&to, SILENCE)).map(drop)
}

/// Whether multicast of mDNS from one host is heard at another.
fn multicast_reaches(lab: &Lab, from: &str, to: &str) -> bool {
    let listener = lab.within(to, || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, MDNS)).unwrap());
    let at: Ipv4Addr = lab.ipv4(to).parse().unwrap();
    listener.join_multicast_v4(&GROUP, &at).unwrap();
    listener.set_read_timeout(Some(SILENCE)).unwrap();
    let sender = lab.within(from, || UdpSocket::bind((lab.ipv4(from).parse::<Ipv4Addr>().unwrap(), 0)).unwrap());
    for _ in 0..5 {
        sender.send_to(b"who", (GROUP, MDNS)).unwrap();
    }
    listener.recv_from(&mut [0; 16]).is_ok()
}

/// Sends `count` questions, no more at once than buffers hold, and counts the answers.
fn answers(lab: &Lab, from: &str, to: &str, count: usize) -> usize {
    let to: SocketAddr = SocketAddr::new(to.parse().unwrap(), ECHO);
    let socket = socket(lab, from);
    let mut got = 0;
    let mut hear = |wait| {
        socket.set_read_timeout(Some(wait)).unwrap();
        while socket.recv_from(&mut [0; 16]).is_ok() {
            got += 1;
        }
    };
    for at in 1..=count {
        socket.send_to(b"x", to).unwrap();
        if at % 50 == 0 {
            hear(Duration::from_millis(20));
        }
    }
    hear(SILENCE);
    got
}

/// The shortest of some round trips: what the machine adds by being busy does not count.
fn round_trip(lab: &Lab, from: &str, to: &str) -> Duration {
    let to: SocketAddr = SocketAddr::new(to.parse().unwrap(), ECHO);
    let socket = socket(lab, from);
    (0..8).filter_map(|_| ask(&socket, to, Duration::from_secs(2))).min().expect("an answer")
}

#[test]
fn what_is_cut_split_or_dead_is_silent_and_what_is_healed_speaks() {
    let Some(lab) = Lab::one_lan(3, Family::Both) else { return };
    let _echoes = [Echo::at(&lab, "a2", ECHO), Echo::at(&lab, "a3", ECHO)];
    let [a2, a3] = ["a2", "a3"].map(|host| lab.ipv4(host));
    assert!(comes_to_reach(&lab, "a1", &a2, ECHO));
    assert!(multicast_reaches(&lab, "a1", "a2"));
    lab.split(&["a1"], &["a2", "a3"]);
    assert!(!reaches(&lab, "a1", &a2, ECHO));
    assert!(!multicast_reaches(&lab, "a1", "a2"));
    assert!(reaches(&lab, "a3", &a2, ECHO));
    lab.unsplit();
    assert!(comes_to_reach(&lab, "a1", &a2, ECHO));
    lab.cut("a2");
    assert!(!reaches(&lab, "a1", &a2, ECHO));
    lab.heal("a2");
    assert!(comes_to_reach(&lab, "a1", &a2, ECHO));
    lab.one_way("a2", "a1");
    assert!(!reaches(&lab, "a1", &a2, ECHO), "the answer does not come");
    assert!(multicast_reaches(&lab, "a1", "a2"), "the question does");
    assert!(!multicast_reaches(&lab, "a2", "a1"));
    lab.both_ways("a2", "a1");
    assert!(comes_to_reach(&lab, "a1", &a2, ECHO));
    lab.no_multicast('a');
    assert!(!multicast_reaches(&lab, "a1", "a2"));
    assert!(reaches(&lab, "a1", &a2, ECHO));
    lab.no_udp("a2", true);
    assert!(!reaches(&lab, "a1", &a2, ECHO));
    connects(&lab, "a1", &a2, ECHO).unwrap();
    lab.no_udp("a2", false);
    assert!(comes_to_reach(&lab, "a1", &a2, ECHO));
    lab.firewall("a3");
    assert!(!reaches(&lab, "a1", &a3, ECHO));
    assert!(connects(&lab, "a1", &a3, ECHO).is_err());
    assert!(reaches(&lab, "a3", &a2, ECHO), "what it asked for comes back");
    lab.renumber("a2");
    assert!(!reaches(&lab, "a1", &a2, ECHO));
    assert!(comes_to_reach(&lab, "a1", "10.71.0.212", ECHO));
    lab.dead("a2");
    assert!(!reaches(&lab, "a1", "10.71.0.212", ECHO));
}

#[test]
fn what_is_lost_late_doubled_or_slow_is_so_as_much_as_was_said() {
    let Some(lab) = Lab::one_lan(2, Family::Both) else { return };
    let _echo = Echo::at(&lab, "a2", ECHO);
    let a2 = lab.ipv4("a2");
    assert!(comes_to_reach(&lab, "a1", &a2, ECHO));
    assert_eq!(answers(&lab, "a1", &a2, 1000), 1000);
    lab.loss("a1", 30);
    let kept = answers(&lab, "a1", &a2, 2000);
    eprintln!("MEASURED 30 % loss each way: {kept} of 2000 answered, 980 expected");
    assert!((880..1080).contains(&kept), "{kept}");
    lab.loss("a1", 0);
    let near = round_trip(&lab, "a1", &a2);
    lab.weather("a1", Some(Weather { delay_ms: 50, ..Weather::default() }));
    assert!(comes_to_reach(&lab, "a1", &a2, ECHO));
    let far = round_trip(&lab, "a1", &a2);
    eprintln!("MEASURED round trip {near:?}, with 50 ms each way {far:?}");
    assert!((Duration::from_millis(99)..Duration::from_millis(180)).contains(&(far - near)), "{far:?}");
    let doubled = Weather { delay_ms: 5, jitter_ms: 3, reorder: true, duplicate_percent: 30 };
    lab.weather("a1", Some(doubled));
    assert!(comes_to_reach(&lab, "a1", &a2, ECHO));
    let got = answers(&lab, "a1", &a2, 1000);
    eprintln!("MEASURED 30 % doubled each way: {got} answers to 1000, 1690 expected");
    assert!((1540..1840).contains(&got), "{got}");
    lab.weather("a1", None);
    assert!(comes_to_reach(&lab, "a1", &a2, ECHO));
    assert_eq!(answers(&lab, "a1", &a2, 1000), 1000);
    // The bucket holds 16 kB at once and lets 25 kB wait: some 40 packets of 1200 bytes.
    lab.rate("a1", 1000);
    let kept = burst(&lab, &a2);
    lab.rate("a1", 0);
    let all = burst(&lab, &a2);
    eprintln!("MEASURED of {BURST} packets at once at 1 Mbit/s: {kept} answered; without a limit: {all}");
    assert!(kept < BURST * 3 / 4 && all > BURST * 9 / 10, "{kept} of {BURST} pass, {all} without a limit");
    lab.mtu("a2", 1280);
    assert!(!large_passes(&lab, &a2), "1400 bytes pass an MTU of 1280");
    assert!(reaches(&lab, "a1", &a2, ECHO));
    lab.mtu("a2", 1500);
    assert!(large_passes(&lab, &a2));
}

/// Whether a packet of 1400 bytes is answered.
fn large_passes(lab: &Lab, to: &str) -> bool {
    let socket = socket(lab, "a1");
    socket.set_read_timeout(Some(SILENCE)).unwrap();
    let to: SocketAddr = SocketAddr::new(to.parse().unwrap(), ECHO);
    socket.send_to(&[7; 1400], to).unwrap();
    socket.recv_from(&mut [0; 2048]).is_ok()
}

/// Packets of 1200 bytes that the buffer of a socket holds at once.
const BURST: usize = 80;

/// Sends them at once and counts the answers.
fn burst(lab: &Lab, to: &str) -> usize {
    let to: SocketAddr = SocketAddr::new(to.parse().unwrap(), ECHO);
    let socket = socket(lab, "a1");
    for _ in 0..BURST {
        let _ = socket.send_to(&[7; 1200], to);
    }
    socket.set_read_timeout(Some(SILENCE)).unwrap();
    let mut got = 0;
    while socket.recv_from(&mut [0; 2048]).is_ok() {
        got += 1;
    }
    got
}

/// Two hosts behind two routers send to each other's outer address at the same time: whether both hear the other.
fn punches(lab: &Lab) -> bool {
    let open = |host: &str, to: &str| {
        let socket = lab.within(host, || UdpSocket::bind(("0.0.0.0", 4001)).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let to: SocketAddr = SocketAddr::new(to.parse().unwrap(), 4001);
        (socket, to)
    };
    let ends = [open("a1", "198.51.100.2"), open("b1", "198.51.100.1")];
    let mut heard = [false; 2];
    for _ in 0..8 {
        for (socket, to) in &ends {
            let _ = socket.send_to(b"punch", to);
        }
        for ((socket, _), heard) in ends.iter().zip(&mut heard) {
            *heard |= socket.recv_from(&mut [0; 16]).is_ok();
        }
    }
    heard == [true; 2]
}

#[test]
fn home_routers_keep_strangers_out_and_let_those_in_that_they_should() {
    for kind in [Nat::KeepsPorts, Nat::Rejects, Nat::Symmetric, Nat::Forwards] {
        let Some(lab) = Lab::homes([kind; 2], [1, 1], 1) else { return };
        let wan = Echo::at(&lab, "w1", ECHO);
        assert!(comes_to_reach(&lab, "a1", &lab.ipv4("w1"), ECHO), "{kind:?}: from inside to the wide network");
        assert_eq!(punches(&lab), kind != Nat::Symmetric, "{kind:?}: punching a hole by UDP");
        lab.flush_nat('a');
        lab.flush_nat('b');
        let _home = Echo::at(&lab, "a1", 4001);
        let forwarded = kind == Nat::Forwards;
        assert_eq!(reaches(&lab, "w1", "198.51.100.1", 4001), forwarded, "{kind:?}: from outside by UDP");
        let connected = connects(&lab, "b1", "198.51.100.1", 4001);
        assert_eq!(connected.is_ok(), forwarded, "{kind:?}: from the other home by TCP");
        let refused = connected.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused);
        assert_eq!(refused, kind == Nat::Rejects, "{kind:?}: refused and not dropped");
        lab.wan_cut('a');
        assert!(!reaches(&lab, "a1", &lab.ipv4("w1"), ECHO), "{kind:?}: cut off");
        lab.wan_heal('a');
        assert!(comes_to_reach(&lab, "a1", &lab.ipv4("w1"), ECHO), "{kind:?}: healed");
        drop(wan);
    }
}

#[test]
fn a_forgotten_mapping_lets_no_answer_in_until_the_host_sends_again() {
    let Some(lab) = Lab::homes([Nat::KeepsPorts; 2], [1, 1], 1) else { return };
    let inside = socket(&lab, "a1");
    inside.set_read_timeout(Some(SILENCE)).unwrap();
    let outside = lab.within("w1", || UdpSocket::bind(("0.0.0.0", ECHO)).unwrap());
    outside.set_read_timeout(Some(PATIENCE)).unwrap();
    let hello = || {
        inside.send_to(b"hello", (lab.ipv4("w1"), ECHO)).unwrap();
        outside.recv_from(&mut [0; 16]).unwrap().1
    };
    let comes = |to: SocketAddr| {
        outside.send_to(b"answer", to).unwrap();
        inside.recv_from(&mut [0; 16]).is_ok()
    };
    let at = hello();
    assert!(comes(at));
    lab.flush_nat('a');
    assert!(!comes(at));
    assert!(comes(hello()));
}

#[test]
fn a_private_network_joins_hosts_behind_routers_and_carries_no_multicast() {
    let Some(lab) = Lab::homes([Nat::Symmetric; 2], [1, 1], 1) else { return };
    let _echo = Echo::at(&lab, "b1", ECHO);
    assert!(!reaches(&lab, "a1", &lab.ipv4("b1"), ECHO));
    lab.vpn(&["a1", "b1"]);
    assert!(comes_to_reach(&lab, "a1", "10.80.0.2", ECHO));
    let link = lab.ip("a1", &["link", "show", "dev", "tun0"]);
    assert!(link.contains("POINTOPOINT") && !link.contains("MULTICAST"), "{link}");
}

#[test]
fn a_host_with_two_interfaces_is_reached_by_the_one_that_lives() {
    let Some(lab) = Lab::two_islands([2, 1]) else { return };
    lab.second_interface("a1", 'b');
    let _echo = Echo::at(&lab, "a1", ECHO);
    let (first, second) = (lab.ipv4("a1"), "10.72.0.111");
    assert!(comes_to_reach(&lab, "a2", &first, ECHO) && comes_to_reach(&lab, "b1", second, ECHO));
    lab.dead("a1");
    assert!(!reaches(&lab, "a2", &first, ECHO) && reaches(&lab, "b1", second, ECHO));
    lab.second_cable("a1", 'b', false);
    assert!(!reaches(&lab, "b1", second, ECHO));
    lab.second_cable("a1", 'b', true);
    assert!(comes_to_reach(&lab, "b1", second, ECHO));
}
