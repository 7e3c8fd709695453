//! One membership stream: the hello in the role of opener or accepter, then frames both ways until it ends.
//!
//! A session runs as its own task. It reports to `net::Task`, which alone decides who is a member; it never touches the
//! member table. The reading half and the writing half are two futures, so no half-read frame is ever dropped.

use std::time::Duration;

use futures::{AsyncReadExt as _, AsyncWriteExt as _};
use libp2p::PeerId;
use libp2p::swarm::{ConnectionId, Stream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};

use crate::domain::cluster::ClusterId;
use crate::wire::control::{ByeReason, Control, Heartbeat};
use crate::wire::frame::{self, FrameReader};
use crate::wire::hello::{self, HelloError};
use crate::wire::keys::Root;
use crate::wire::limits::{
    CONTROL_BURST, CONTROL_PER_SECOND, CONTROL_STALL, H1_BYTES, HELLO_DEADLINE, MAX_CONTROL_FRAME_BYTES, MAX_HELLO_FRAME_BYTES,
};
use crate::wire::version::{MEMBER_VERSION_THREE, Versions};

/// Control frames that may wait for a slow reader; a heartbeat more is left out, a state more ends the session.
const OUTBOX: usize = 16;
/// A goodbye that cannot be written within this time is not waited for.
const CLOSE: Duration = Duration::from_millis(200);

/// Names one session for its whole life; never used twice by a daemon.
pub(crate) type Generation = u64;

/// What a session sends.
#[derive(Debug)]
pub(crate) enum Outgoing {
    /// An encoded control frame.
    Frame(Vec<u8>),
    /// The last one: written, then the stream is closed.
    Bye(ByeReason),
}

/// A hello that succeeded.
#[derive(Debug)]
pub(crate) struct Up {
    pub generation: Generation,
    pub cluster: ClusterId,
    pub peer: PeerId,
    pub connection: ConnectionId,
    /// We opened the stream.
    pub opened_here: bool,
    pub protocol: u16,
    /// Names the run of the node at the other end; from version 3 on.
    pub run: Option<u64>,
    /// Where frames for this session go.
    pub outbox: mpsc::Sender<Outgoing>,
}

/// Why a session ended, or never began. Some of it is for the log alone.
#[derive(Debug)]
#[allow(dead_code)]
pub(crate) enum End {
    /// The other side said goodbye.
    Bye(ByeReason),
    /// We said goodbye.
    Closed,
    /// The other side is not in the cluster, or does not answer strangers.
    Refused,
    /// No common protocol version; what the other side speaks, if it said so.
    VersionMismatch(Option<(u16, u16)>),
    /// The stream broke.
    Io(String),
    /// The other side broke the protocol.
    Violation(String),
    /// Another machine with our identity is a member there already, at this address.
    SameIdentity(Vec<u8>),
    /// The hello was not done in time.
    TimedOut,
}

/// What sessions tell `net::Task`.
#[derive(Debug)]
pub(crate) enum Report {
    /// The peer proved that it is in the cluster. `entered` is answered when it is in the member table: the accepter's
    /// first heartbeat goes out after that, so that a prompt sent on its arrival finds the member entered.
    Up(Up, oneshot::Sender<()>),
    /// A control frame arrived.
    Frame(Generation, Control),
    /// The session is over.
    Down { generation: Generation, peer: PeerId, connection: ConnectionId, cluster: Option<ClusterId>, end: End },
}

/// What both roles need to know.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    pub generation: Generation,
    pub local: PeerId,
    pub peer: PeerId,
    pub connection: ConnectionId,
    pub reports: mpsc::Sender<Report>,
    pub versions: Versions,
    /// Names this run of the node.
    pub run: u64,
}

impl From<HelloError> for End {
    fn from(error: HelloError) -> Self {
        match error {
            HelloError::VersionMismatch { min, max } => Self::VersionMismatch((max > 0).then_some((min, max))),
            HelloError::NoMatch => Self::Refused,
            other => Self::Violation(other.to_string()),
        }
    }
}

impl From<frame::FrameError> for End {
    fn from(error: frame::FrameError) -> Self {
        match error {
            frame::FrameError::Io(error) => Self::Io(error.to_string()),
            // A node that dies in the middle of a frame has broken no rule.
            other if !other.is_violation() => Self::Io(other.to_string()),
            other => Self::Violation(other.to_string()),
        }
    }
}

/// A new nonce that names the run of this node.
fn nonce(context: &Context) -> Result<[u8; 32], End> {
    let mut nonce = [0; 32];
    getrandom::fill(&mut nonce).map_err(|error| End::Io(format!("the system gives no random numbers: {error}")))?;
    nonce[..hello::RUN_BYTES].copy_from_slice(&context.run.to_be_bytes());
    Ok(nonce)
}

/// Runs the opener's side of a session to its end.
pub(crate) async fn open(context: Context, cluster: ClusterId, root: Root, stream: Stream) {
    let end = match timeout(HELLO_DEADLINE, greet(&context, &root, stream)).await {
        Ok(Ok((greeted, first))) => converse(&context, cluster.clone(), greeted, Some(first)).await,
        Ok(Err(end)) => end,
        Err(_) => End::TimedOut,
    };
    down(context, Some(cluster), end).await;
}

/// Runs the accepter's side of a session to its end. `roots` are all clusters that this node is in.
pub(crate) async fn accept(context: Context, roots: Vec<(ClusterId, Root)>, stream: Stream) {
    let (mut cluster, mut mismatched) = (None, None);
    let end = match timeout(HELLO_DEADLINE, answer(&context, &roots, stream, &mut mismatched)).await {
        Ok(Ok((matched, greeted))) => {
            cluster = Some(matched.clone());
            converse(&context, matched, greeted, None).await
        }
        Ok(Err(end)) => end,
        Err(_) => End::TimedOut,
    };
    down(context, cluster.or(mismatched), end).await;
}

pub(crate) async fn down(context: Context, cluster: Option<ClusterId>, end: End) {
    let Context { generation, peer, connection, reports, .. } = context;
    let _ = reports.send(Report::Down { generation, peer, connection, cluster, end }).await;
}

/// How fast the frames of one member are read: a member that floods us must not keep the loop from everybody else.
#[derive(Debug)]
struct Pace {
    /// When the frames taken so far would be paid for at the steady rate.
    paid: Instant,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { paid: now }
    }

    /// How long to wait before the next frame.
    fn wait(&mut self, now: Instant) -> Option<Duration> {
        let each = Duration::from_secs(1) / CONTROL_PER_SECOND;
        self.paid = self.paid.max(now) + each;
        self.paid.checked_duration_since(now + each * CONTROL_BURST).filter(|wait| !wait.is_zero())
    }
}

type Reader = FrameReader<futures::io::ReadHalf<Stream>>;
type Writer = futures::io::WriteHalf<Stream>;

/// A stream after its hello.
struct Greeted {
    reader: Reader,
    writer: Writer,
    protocol: u16,
    /// Of the node at the other end.
    run: Option<u64>,
    opened_here: bool,
}

impl Greeted {
    /// Before version 3 what stands in the place of the run says nothing.
    fn new(reader: Reader, writer: Writer, protocol: u16, run: Option<u64>, opened_here: bool) -> Self {
        let run = run.filter(|_| protocol >= MEMBER_VERSION_THREE);
        Self { reader, writer, protocol, run, opened_here }
    }
}

async fn put(writer: &mut Writer, body: &[u8]) -> Result<(), End> {
    let mut framed = Vec::with_capacity(body.len() + 4);
    frame::encode(body, &mut framed);
    writer.write_all(&framed).await.map_err(|error| End::Io(error.to_string()))?;
    writer.flush().await.map_err(|error| End::Io(error.to_string()))
}

/// H1 out, H2 in, H3 out, first heartbeat in.
async fn greet(context: &Context, root: &Root, stream: Stream) -> Result<(Greeted, Heartbeat), End> {
    let (read, mut writer) = stream.split();
    let mut reader = FrameReader::new(read);
    let (initiator, h1) =
        hello::Initiator::new(context.versions, root, &context.local.to_bytes(), &context.peer.to_bytes(), nonce(context)?);
    put(&mut writer, &h1).await?;
    // A reset or a close without one byte is the answer of a node that is not in the cluster.
    let h2 = match reader.next(MAX_HELLO_FRAME_BYTES).await {
        Ok(Some(frame)) => frame,
        Ok(None) | Err(frame::FrameError::Io(_) | frame::FrameError::Truncated) => return Err(End::Refused),
        Err(other) => return Err(other.into()),
    };
    let run = hello::run_of(&h2);
    let (protocol, h3) = initiator.on_h2(&h2)?;
    put(&mut writer, &h3).await?;
    let first = reader.next(MAX_CONTROL_FRAME_BYTES).await?.ok_or(End::Refused)?;
    match Control::decode(&first).map_err(|error| End::Violation(error.to_string()))? {
        control if control.since() > protocol => Err(too_new(&control, protocol)),
        Control::Heartbeat(heartbeat) => Ok((Greeted::new(reader, writer, protocol, run, true), heartbeat)),
        Control::SameIdentity(address) => Err(End::SameIdentity(address)),
        // It has another stream for this cluster and keeps that one, or it is just leaving.
        Control::Bye(reason) => Err(End::Bye(reason)),
        _ => Err(End::Violation("the first frame after the hello is no heartbeat".to_owned())),
    }
}

fn too_new(control: &Control, protocol: u16) -> End {
    End::Violation(format!("a frame of version {} in version {protocol}", control.since()))
}

/// H1 in, H2 out, H3 in. A stranger gets no byte. `mismatched` is the cluster in which there is no common version.
async fn answer(
    context: &Context,
    roots: &[(ClusterId, Root)],
    stream: Stream,
    mismatched: &mut Option<ClusterId>,
) -> Result<(ClusterId, Greeted), End> {
    let (read, mut writer) = stream.split();
    let mut reader = FrameReader::new(read);
    let h1 = reader.next(H1_BYTES).await?.ok_or(End::Refused)?;
    let run = hello::run_of(&h1);
    let candidates: Vec<&Root> = roots.iter().map(|(_, root)| root).collect();
    let (opener, accepter) = (context.peer.to_bytes(), context.local.to_bytes());
    let (matched, responder) = hello::Responder::on_h1(context.versions, &candidates, &opener, &accepter, &h1, nonce(context)?)?;
    put(&mut writer, responder.h2()).await?;
    let protocol = responder.version().inspect_err(|_| *mismatched = Some(roots[matched].0.clone()))?;
    let h3 = reader.next(MAX_HELLO_FRAME_BYTES).await?.ok_or(End::Refused)?;
    responder.on_h3(&h3)?;
    Ok((roots[matched].0.clone(), Greeted::new(reader, writer, protocol, run, false)))
}

async fn converse(context: &Context, cluster: ClusterId, greeted: Greeted, first: Option<Heartbeat>) -> End {
    let Greeted { mut reader, mut writer, protocol, run, opened_here } = greeted;
    let (outbox, mut outgoing) = mpsc::channel(OUTBOX);
    let (entered, is_entered) = oneshot::channel();
    let up = Up {
        generation: context.generation,
        cluster,
        peer: context.peer,
        connection: context.connection,
        opened_here,
        protocol,
        run,
        outbox,
    };
    if context.reports.send(Report::Up(up, entered)).await.is_err() || is_entered.await.is_err() {
        return End::Closed;
    }
    if let Some(heartbeat) = first {
        let _ = context.reports.send(Report::Frame(context.generation, Control::Heartbeat(heartbeat))).await;
    }
    let reading = async {
        let mut pace = Pace::new(Instant::now());
        loop {
            if let Some(pause) = pace.wait(Instant::now()) {
                sleep(pause).await;
            }
            let frame = match reader.next(MAX_CONTROL_FRAME_BYTES).await {
                Ok(Some(frame)) => frame,
                Ok(None) => return End::Io("the stream was closed without a goodbye".to_owned()),
                Err(error) => return error.into(),
            };
            match Control::decode(&frame) {
                Ok(control) if control.since() > protocol => return too_new(&control, protocol),
                Ok(Control::Bye(reason)) => return End::Bye(reason),
                Ok(control) => {
                    if context.reports.send(Report::Frame(context.generation, control)).await.is_err() {
                        return End::Closed;
                    }
                }
                Err(error) => return End::Violation(error.to_string()),
            }
        }
    };
    let writing = async {
        let mut buffer = Vec::new();
        loop {
            let Some(message) = outgoing.recv().await else { return End::Closed };
            buffer.clear();
            let mut last = None;
            let mut next = Some(message);
            // All that waits goes out in one write: heartbeat, state and view of a new member are one packet.
            while let Some(message) = next {
                match message {
                    Outgoing::Frame(frame) => buffer.extend_from_slice(&frame),
                    Outgoing::Bye(reason) => {
                        frame::encode(&Control::Bye(reason).encode(), &mut buffer);
                        last = Some(());
                    }
                }
                next = if last.is_some() { None } else { outgoing.try_recv().ok() };
            }
            let write = async {
                writer.write_all(&buffer).await?;
                writer.flush().await?;
                if last.is_some() { writer.close().await } else { Ok(()) }
            };
            if last.is_some() {
                let _ = timeout(CLOSE, write).await;
                return End::Closed;
            }
            match timeout(CONTROL_STALL, write).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return End::Io(error.to_string()),
                Err(_) => return End::TimedOut,
            }
        }
    };
    tokio::select! {
        end = reading => end,
        end = writing => end,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_control_frames_is_read_at_a_steady_pace() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        assert!((0..CONTROL_BURST).all(|_| pace.wait(start).is_none()), "a burst passes");
        let mut now = start;
        for _ in 0..10 * CONTROL_PER_SECOND {
            now += pace.wait(now).unwrap_or_default();
        }
        let spent = now - start;
        assert!((Duration::from_secs(9)..Duration::from_secs(11)).contains(&spent), "{spent:?}");
        assert!(pace.wait(now + Duration::from_secs(60)).is_none(), "who was quiet may burst again");
    }

    #[test]
    fn a_frame_that_was_cut_off_is_no_violation() {
        assert!(matches!(End::from(frame::FrameError::Truncated), End::Io(_)));
        assert!(matches!(End::from(frame::FrameError::Empty), End::Violation(_)));
        assert!(matches!(End::from(frame::FrameError::TooLong { announced: 9, limit: 8 }), End::Violation(_)));
    }
}
