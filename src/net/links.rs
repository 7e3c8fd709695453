//! Watches the machine for what makes connections worthless and old failures meaningless: links and routes that come and go,
//! clocks that jump. `net::Task` sees it through a watch channel: any number of changes that it has not looked at is one.
//!
//! Addresses are not watched here: the listeners tell them (`net::listen`).

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{LinkFlags, LinkMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType};
use rtnetlink::{MulticastGroup, new_multicast_connection};
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime, timerfd_create,
    timerfd_settime,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::time::sleep;

use super::address::is_link_local;

/// Routes that are remembered, to tell a new one from one that is told again. A machine with more of them is a router: its
/// routes change all the time, and only default routes count then.
const MAX_ROUTES: usize = 1024;
/// Between two tries to listen to the kernel, first and at most.
const AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];
/// The table of addresses of this machine: it follows the addresses, which are watched.
const LOCAL_TABLE: u8 = 255;

/// What the node stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Ground {
    /// Links and routes that came, went or changed since the start.
    pub changes: u64,
    /// Jumps of the wall clock, those at the end of a suspend among them.
    pub jumps: u64,
    /// No link but the loopback is up.
    pub offline: bool,
}

/// Starts watching, for as long as somebody listens.
pub(crate) fn watch() -> watch::Receiver<Ground> {
    let (tell, ground) = watch::channel(Ground::default());
    tokio::spawn(supervise(tell.clone(), "links and routes", |tell| async move { follow_links(&tell).await }));
    tokio::spawn(supervise(tell, "clocks", |tell| async move { follow_clock(&tell).await }));
    ground
}

/// Runs `work` again and again: what it watches may be refused for a while, and the code below it may panic
/// (<https://github.com/rust-netlink/netlink-proto>, an overrun while links are listed).
async fn supervise<F, W>(tell: watch::Sender<Ground>, what: &'static str, work: W)
where
    W: Fn(watch::Sender<Ground>) -> F,
    F: Future<Output = io::Result<()>>,
{
    let [first, longest] = AGAIN;
    let mut pause = first;
    loop {
        let begun = tokio::time::Instant::now();
        let ended = tokio::select! {
            ended = AssertUnwindSafe(work(tell.clone())).catch_unwind() => ended,
            () = tell.closed() => return,
        };
        // Who may not listen at all has missed nothing that it would have heard.
        let listened = matches!(ended, Ok(Ok(()))) || begun.elapsed() > first;
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "changes of {what} are not heard of for a while: {error}"),
            Err(_) => tracing::debug!("changes of {what} are not heard of for a while: the watcher panicked"),
        }
        pause = if begun.elapsed() > longest { first } else { (pause * 2).min(longest) };
        sleep(pause).await;
        if listened {
            // Whatever happened meanwhile was missed.
            tell.send_modify(|ground| ground.changes += 1);
        }
    }
}

async fn follow_links(tell: &watch::Sender<Ground>) -> io::Result<()> {
    let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Route, MulticastGroup::Ipv6Route];
    let (connection, handle, mut messages) = new_multicast_connection(&groups)?;
    let hearing = async {
        let mut footing = Footing::default();
        let mut links = handle.link().get().execute();
        while let Some(link) = links.try_next().await.map_err(io::Error::other)? {
            footing.on_link(&link, true);
        }
        tell.send_if_modified(|ground| std::mem::replace(&mut ground.offline, footing.offline()) != footing.offline());
        while let Some((message, _)) = messages.next().await {
            let changed = match message.payload {
                NetlinkPayload::InnerMessage(message) => footing.hears(&message),
                // More than the socket holds: what was lost is not known, so the links are listed again.
                NetlinkPayload::Overrun(_) => return Ok(()),
                _ => false,
            };
            if changed {
                tell.send_modify(|ground| {
                    ground.changes += 1;
                    ground.offline = footing.offline();
                });
            }
        }
        Err(io::Error::other("the kernel's socket was closed"))
    };
    tokio::select! {
        () = connection => Err(io::Error::other("the kernel's socket failed")),
        ended = hearing => ended,
    }
}

/// Where a route leads, as far as it tells one from another.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Route {
    to: Option<IpAddr>,
    prefix: u8,
    table: u8,
    via: Option<IpAddr>,
    interface: Option<u32>,
}

/// What the kernel told of links and routes: enough to know whether a message says something new. Pure.
#[derive(Debug, Default)]
struct Footing {
    /// Links but the loopback, and whether they carry.
    links: HashMap<u32, bool>,
    routes: HashSet<Route>,
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

impl Footing {
    /// True when the message changes where packets can go.
    fn hears(&mut self, message: &RouteNetlinkMessage) -> bool {
        match message {
            RouteNetlinkMessage::NewLink(link) => self.on_link(link, true),
            RouteNetlinkMessage::DelLink(link) => self.on_link(link, false),
            RouteNetlinkMessage::NewRoute(route) => self.on_route(route, true),
            RouteNetlinkMessage::DelRoute(route) => self.on_route(route, false),
            _ => false,
        }
    }

    /// A link is told of for many reasons, of which a scan for wireless networks is the most frequent.
    fn on_link(&mut self, link: &LinkMessage, there: bool) -> bool {
        if link.header.flags.contains(LinkFlags::Loopback) {
            return false;
        }
        let carries = there && link.header.flags.contains(LinkFlags::Up | LinkFlags::LowerUp);
        let before = if there { self.links.insert(link.header.index, carries) } else { self.links.remove(&link.header.index) };
        before.unwrap_or(false) != carries
    }

    fn on_route(&mut self, route: &RouteMessage, there: bool) -> bool {
        let RouteHeader { kind, table, protocol, destination_prefix_length: prefix, .. } = route.header;
        let of_a_router = matches!(
            protocol,
            RouteProtocol::Zebra
                | RouteProtocol::Bird
                | RouteProtocol::Babel
                | RouteProtocol::Bgp
                | RouteProtocol::Isis
                | RouteProtocol::Ospf
                | RouteProtocol::Rip
                | RouteProtocol::Eigrp
        );
        if kind != RouteType::Unicast || table == LOCAL_TABLE || (of_a_router && prefix > 0) {
            return false;
        }
        let mut key = Route { to: None, prefix, table, via: None, interface: None };
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Destination(address) => key.to = ip(address),
                RouteAttribute::Gateway(address) => key.via = ip(address),
                RouteAttribute::Oif(index) => key.interface = Some(*index),
                _ => {}
            }
        }
        if key.to.is_some_and(is_link_local) {
            return false;
        }
        if !there {
            // One that was there before this began is not known, and gone all the same.
            self.routes.remove(&key);
            return true;
        }
        if self.routes.len() >= MAX_ROUTES && !self.routes.contains(&key) {
            return prefix == 0;
        }
        self.routes.insert(key)
    }

    fn offline(&self) -> bool {
        !self.links.values().any(|&carries| carries)
    }
}

/// Hears of every jump of the wall clock, at the end of a suspend too: the kernel cancels a timer of it then. Nobody has to
/// look at clocks again and again.
async fn follow_clock(tell: &watch::Sender<Ground>) -> io::Result<()> {
    let timer = timerfd_create(TimerfdClockId::Realtime, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
    #[expect(deprecated, reason = "its unsafe successor is for types whose descriptor may change; an owned one does not")]
    let timer = AsyncFd::with_interest(timer, Interest::READABLE)?;
    loop {
        arm(&timer)?;
        let mut ready = timer.readable().await?;
        match ready.try_io(|timer| Ok(rustix::io::read(timer.get_ref(), &mut [0_u8; 8])?)) {
            Ok(Err(error)) if error.raw_os_error() == Some(rustix::io::Errno::CANCELED.raw_os_error()) => {
                tell.send_modify(|ground| ground.jumps += 1);
            }
            Ok(Err(error)) => return Err(error),
            Ok(Ok(_)) | Err(_) => {}
        }
    }
}

/// A moment that never comes.
fn arm(timer: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let never = Timespec { tv_sec: i64::from(u32::MAX), tv_nsec: 0 };
    let spec = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: never };
    timerfd_settime(timer.get_ref(), TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET, &spec)?;
    Ok(())
}

/// Tells how long the machine was suspended: the clock that runs on meanwhile gains on the one that does not. Pure.
#[derive(Debug)]
pub(crate) struct Sleeper {
    ahead: Duration,
}

impl Sleeper {
    pub(crate) fn new((monotonic, boottime): (Duration, Duration)) -> Self {
        Self { ahead: boottime.saturating_sub(monotonic) }
    }

    /// How long it slept since this was asked last; not for less than a second, which is how far reading two clocks may be apart
    /// on a busy machine.
    pub(crate) fn slept(&mut self, (monotonic, boottime): (Duration, Duration)) -> Option<Duration> {
        let ahead = boottime.saturating_sub(monotonic);
        let slept = ahead.saturating_sub(self.ahead);
        (slept >= Duration::from_secs(1)).then(|| {
            self.ahead = ahead;
            slept
        })
    }
}

/// The clock that stands still in suspend, and the one that does not.
pub(crate) fn clocks() -> (Duration, Duration) {
    let read = |clock| {
        let now = clock_gettime(clock);
        Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
    };
    (read(ClockId::Monotonic), read(ClockId::Boottime))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn link(index: u32, flags: LinkFlags) -> LinkMessage {
        let mut link = LinkMessage::default();
        (link.header.index, link.header.flags) = (index, flags);
        link
    }

    fn route(to: &str, prefix: u8, interface: u32) -> RouteMessage {
        let mut route = RouteMessage::default();
        (route.header.kind, route.header.table, route.header.destination_prefix_length) = (RouteType::Unicast, 254, prefix);
        route.attributes = vec![RouteAttribute::Oif(interface)];
        if prefix > 0 {
            route.attributes.push(RouteAttribute::Destination(RouteAddress::Inet(to.parse().unwrap())));
        }
        route
    }

    #[test]
    fn only_a_carrier_that_comes_or_goes_is_news_of_a_link() {
        let (up, down) = (LinkFlags::Up | LinkFlags::LowerUp, LinkFlags::Up);
        let mut footing = Footing::default();
        assert!(!footing.on_link(&link(1, up | LinkFlags::Loopback), true));
        assert!(footing.offline(), "the loopback leads nowhere");
        assert!(!footing.on_link(&link(2, down), true), "a link without a carrier is no link");
        assert!(footing.on_link(&link(2, up), true));
        assert!(!footing.on_link(&link(2, up), true), "told again: nothing new");
        assert!(!footing.offline());
        assert!(footing.on_link(&link(2, down), true));
        assert!(footing.offline());
        footing.on_link(&link(2, up), true);
        assert!(footing.on_link(&link(2, up), false) && footing.offline());
        assert!(!footing.on_link(&link(3, down), false), "nobody stood on it");
    }

    #[test]
    fn a_route_is_news_when_it_comes_and_when_it_goes() {
        let mut footing = Footing::default();
        assert!(footing.on_route(&route("", 0, 2), true));
        assert!(!footing.on_route(&route("", 0, 2), true), "told again: nothing new");
        assert!(footing.on_route(&route("", 0, 3), true), "by another link");
        assert!(footing.on_route(&route("10.0.0.0", 8, 2), true));
        assert!(footing.on_route(&route("", 0, 2), false));
        assert!(footing.on_route(&route("10.9.0.0", 16, 2), false), "it was there before we were");
        let mut local = route("10.0.0.1", 32, 2);
        local.header.table = LOCAL_TABLE;
        assert!(!footing.on_route(&local, true));
        assert!(!footing.on_route(&route("169.254.0.0", 16, 2), true), "nobody is dialled there");
        let mut learned = route("10.1.0.0", 16, 2);
        learned.header.protocol = RouteProtocol::Bgp;
        assert!(!footing.on_route(&learned, true), "the world's routes are not ours");
    }

    #[test]
    fn of_a_router_that_has_more_routes_than_are_remembered_only_the_default_ones_count() {
        let mut footing = Footing::default();
        let nth = |at: usize| route(&format!("10.{}.{}.0", at / 256, at % 256), 24, 2);
        assert!((0..MAX_ROUTES).all(|at| footing.on_route(&nth(at), true)), "up to the limit each is news");
        assert!(!footing.on_route(&nth(MAX_ROUTES), true), "one past it is not");
        assert!(footing.on_route(&route("", 0, 2), true));
        assert_eq!(footing.routes.len(), MAX_ROUTES);
    }

    #[test]
    fn a_suspend_is_what_one_clock_gained_on_the_other() {
        let at = |seconds: u64, ahead: u64| (SECOND * u32::try_from(seconds).unwrap(), Duration::from_secs(seconds + ahead));
        let mut sleeper = Sleeper::new(at(100, 7));
        assert_eq!(sleeper.slept(at(200, 7)), None, "awake all the time");
        let (monotonic, boottime) = at(201, 7);
        assert_eq!(sleeper.slept((monotonic, boottime + Duration::from_millis(999))), None);
        assert_eq!(sleeper.slept(at(202, 8)), Some(SECOND));
        assert_eq!(sleeper.slept(at(203, 8)), None, "told once");
        assert_eq!(sleeper.slept(at(204, 3608)), Some(SECOND * 3600));
        assert_eq!(sleeper.slept(at(205, 0)), None, "a clock that went back is no sleep");
    }

    #[test]
    fn the_clocks_of_this_machine_are_read() {
        let (monotonic, boottime) = clocks();
        assert!(monotonic > Duration::ZERO && boottime + Duration::from_millis(1) >= monotonic);
    }

    #[tokio::test]
    async fn a_machine_that_nothing_happens_to_is_quiet_and_the_watchers_end_with_the_listener() {
        let ground = watch();
        let tell = {
            let mut changes = ground.clone();
            let quiet = tokio::time::timeout(Duration::from_millis(300), changes.wait_for(|ground| ground.jumps > 0)).await;
            assert!(quiet.is_err(), "no clock jumped");
            ground
        };
        drop(tell);
    }
}
