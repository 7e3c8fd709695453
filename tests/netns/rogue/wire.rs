//! Bare connections: transport, encryption, streams, and not a word that libp2p would say by itself.

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{AsyncReadExt as _, AsyncWriteExt as _};
use libp2p::core::Endpoint;
use libp2p::core::muxing::{StreamMuxerBox, StreamMuxerExt as _, SubstreamBox};
use libp2p::core::transport::{Boxed, DialOpts, ListenerId, PortUse, TransportError, TransportEvent};
use libp2p::core::upgrade::Version;
use libp2p::identity::Keypair;
use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId, Transport, noise, quic, yamux};
use opengateway::domain::cluster::ClusterId;
use opengateway::domain::node::ModelOffer;
use opengateway::wire::control::{Control, Heartbeat, State};
use opengateway::wire::frame::{self, FrameReader};
use opengateway::wire::hello::Initiator;
use opengateway::wire::keys::Root;
use opengateway::wire::limits::{MAX_CONTROL_FRAME_BYTES, MAX_HELLO_FRAME_BYTES};
use opengateway::wire::version::{MEMBER_PROTOCOL, Versions};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt as _};

/// Where every daemon of a lab listens.
pub const PORT: u16 = 4001;
/// How long a rogue waits for anything.
const PATIENCE: Duration = Duration::from_secs(15);

/// TCP from an address of our choice, with a receive buffer of our choice. It only dials.
struct Bound {
    from: IpAddr,
    receive_buffer: Option<u32>,
}

impl Transport for Bound {
    type Output = Compat<TcpStream>;
    type Error = io::Error;
    type ListenerUpgrade = std::future::Pending<io::Result<Self::Output>>;
    type Dial = BoxFuture<'static, io::Result<Self::Output>>;

    fn listen_on(&mut self, _: ListenerId, at: Multiaddr) -> Result<(), TransportError<io::Error>> {
        Err(TransportError::MultiaddrNotSupported(at))
    }

    fn remove_listener(&mut self, _: ListenerId) -> bool {
        false
    }

    fn dial(&mut self, at: Multiaddr, _: DialOpts) -> Result<Self::Dial, TransportError<io::Error>> {
        let parts: Vec<Protocol<'_>> = at.iter().collect();
        let to = match parts[..] {
            [Protocol::Ip4(ip), Protocol::Tcp(port)] => SocketAddr::from((ip, port)),
            [Protocol::Ip6(ip), Protocol::Tcp(port)] => SocketAddr::from((ip, port)),
            _ => return Err(TransportError::MultiaddrNotSupported(at)),
        };
        let socket = socket(self.from, self.receive_buffer).map_err(TransportError::Other)?;
        Ok(Box::pin(async move { Ok(socket.connect(to).await?.compat()) }))
    }

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<TransportEvent<Self::ListenerUpgrade, io::Error>> {
        Poll::Pending
    }
}

/// A socket that dials from `from`.
pub fn socket(from: IpAddr, receive_buffer: Option<u32>) -> io::Result<TcpSocket> {
    let socket = if from.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    if let Some(bytes) = receive_buffer {
        socket.set_recv_buffer_size(bytes)?;
    }
    socket.bind((from, 0).into())?;
    Ok(socket)
}

/// What dials: one identity at one address.
pub struct Dialer {
    pub keypair: Keypair,
    tcp: Boxed<(PeerId, StreamMuxerBox)>,
    quic: Boxed<(PeerId, StreamMuxerBox)>,
}

/// Over which transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over {
    Tcp,
    Quic,
}

/// `OVER` in the settings of an attack.
pub fn over() -> Over {
    if super::setting("OVER").is_some_and(|over| over == "tcp") { Over::Tcp } else { Over::Quic }
}

impl Dialer {
    /// With default windows.
    pub fn new(from: Ipv4Addr) -> Self {
        Self::with(Keypair::generate_ed25519(), from, None)
    }

    /// With receive windows of so many bytes.
    pub fn with(keypair: Keypair, from: Ipv4Addr, window: Option<u32>) -> Self {
        let tcp = Bound { from: from.into(), receive_buffer: window }
            .upgrade(Version::V1)
            .authenticate(noise::Config::new(&keypair).unwrap())
            .multiplex(yamux::Config::default())
            .boxed();
        let mut config = quic::Config::new(&keypair);
        config.handshake_timeout = PATIENCE;
        if let Some(bytes) = window {
            config.max_stream_data = bytes;
            config.max_connection_data = bytes;
        }
        let mut quic = quic::tokio::Transport::new(config).map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer))).boxed();
        // What listens at an address dials from it.
        quic.listen_on(ListenerId::next(), format!("/ip4/{from}/udp/0/quic-v1").parse().unwrap()).unwrap();
        Self { keypair, tcp, quic }
    }

    pub fn peer(&self) -> PeerId {
        self.keypair.public().to_peer_id()
    }

    /// The future does not borrow the dialer: many dials may run at once.
    pub fn dial(&mut self, over: Over, to: IpAddr) -> impl Future<Output = io::Result<Wire>> + use<> {
        let ip = match to {
            IpAddr::V4(ip) => format!("/ip4/{ip}"),
            IpAddr::V6(ip) => format!("/ip6/{ip}"),
        };
        let (transport, rest) = match over {
            Over::Tcp => (&mut self.tcp, format!("/tcp/{PORT}")),
            Over::Quic => (&mut self.quic, format!("/udp/{PORT}/quic-v1")),
        };
        let options = DialOpts { role: Endpoint::Dialer, port_use: PortUse::Reuse };
        let dial = transport.dial(format!("{ip}{rest}").parse().unwrap(), options);
        let local = self.peer();
        async move {
            let dial = dial.map_err(|error| io::Error::other(error.to_string()))?;
            let (peer, muxer) = tokio::time::timeout(PATIENCE, dial).await.map_err(|_| io::ErrorKind::TimedOut)??;
            Ok(Wire::new(local, peer, muxer))
        }
    }
}

type Reply = oneshot::Sender<io::Result<SubstreamBox>>;

/// A connection. Streams that the other side opens are dropped. It ends with this.
pub struct Wire {
    pub local: PeerId,
    pub peer: PeerId,
    openings: mpsc::UnboundedSender<Reply>,
    driver: JoinHandle<()>,
}

impl Wire {
    fn new(local: PeerId, peer: PeerId, mut muxer: StreamMuxerBox) -> Self {
        let (openings, mut wanted) = mpsc::unbounded_channel::<Reply>();
        let mut opening: Option<Reply> = None;
        // A connection moves only when it is polled.
        let driver = tokio::spawn(poll_fn(move |cx| {
            loop {
                match muxer.poll_inbound_unpin(cx) {
                    Poll::Ready(Ok(_)) => {}
                    Poll::Ready(Err(_)) => return Poll::Ready(()),
                    Poll::Pending => break,
                }
            }
            loop {
                match muxer.poll_unpin(cx) {
                    Poll::Ready(Ok(_)) => {}
                    Poll::Ready(Err(_)) => return Poll::Ready(()),
                    Poll::Pending => break,
                }
            }
            loop {
                if opening.is_none() {
                    opening = match wanted.poll_recv(cx) {
                        Poll::Ready(Some(reply)) => Some(reply),
                        Poll::Ready(None) => return Poll::Ready(()),
                        Poll::Pending => return Poll::Pending,
                    };
                }
                match muxer.poll_outbound_unpin(cx) {
                    Poll::Ready(stream) => {
                        if let Some(reply) = opening.take() {
                            let _ = reply.send(stream);
                        }
                    }
                    Poll::Pending => return Poll::Pending,
                }
            }
        }));
        Self { local, peer, openings, driver }
    }

    /// Whether the connection is up.
    pub fn is_open(&self) -> bool {
        !self.driver.is_finished()
    }

    /// A stream on which nothing was said yet.
    pub async fn stream(&self) -> io::Result<SubstreamBox> {
        let (reply, stream) = oneshot::channel();
        let _ = self.openings.send(reply);
        stream.await.unwrap_or_else(|_| Err(io::ErrorKind::ConnectionAborted.into()))
    }

    /// A stream on which `protocol` is spoken.
    pub async fn speak(&self, protocol: &str) -> io::Result<SubstreamBox> {
        let mut stream = self.stream().await?;
        negotiate(&mut stream, protocol).await?;
        Ok(stream)
    }

    /// Becomes a member of `cluster` and stays one: heartbeats go out, what comes in is dropped.
    pub async fn join(&self, cluster: &str, name: &str) -> io::Result<Membership> {
        let stream = self.speak(MEMBER_PROTOCOL).await?;
        Membership::begin(stream, self.local, self.peer, cluster, name).await
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// multistream-select by hand: lines with their length before them, which is below 128 here and so one byte.
pub async fn negotiate(stream: &mut SubstreamBox, protocol: &str) -> io::Result<()> {
    let mut expected = Vec::new();
    for line in ["/multistream/1.0.0", protocol] {
        expected.push(u8::try_from(line.len() + 1).unwrap());
        expected.extend_from_slice(line.as_bytes());
        expected.push(b'\n');
    }
    stream.write_all(&expected).await?;
    stream.flush().await?;
    let mut echoed = vec![0; expected.len()];
    stream.read_exact(&mut echoed).await?;
    if echoed == expected { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
}

/// Writes a frame.
pub async fn put<W: futures::AsyncWrite + Unpin>(stream: &mut W, body: &[u8]) -> io::Result<()> {
    let mut framed = Vec::new();
    frame::encode(body, &mut framed);
    stream.write_all(&framed).await?;
    stream.flush().await
}

/// Everything that comes until the stream ends or nothing comes for a while.
pub async fn rest(stream: &mut SubstreamBox) -> usize {
    let mut bytes = 0;
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(Ok(count)) = tokio::time::timeout(PATIENCE, stream.read(&mut buffer)).await {
        bytes += count;
        if count == 0 {
            break;
        }
    }
    bytes
}

/// A membership stream after its hello.
pub struct Membership {
    frames: mpsc::Sender<Control>,
    worker: JoinHandle<()>,
}

impl Membership {
    async fn begin(stream: SubstreamBox, local: PeerId, peer: PeerId, cluster: &str, name: &str) -> io::Result<Self> {
        let broken = |error: String| io::Error::other(error);
        let root = Root::public(&ClusterId::new(cluster).unwrap());
        let mut nonce = [0; 32];
        nonce[..16].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
        let (initiator, h1) = Initiator::new(Versions::OURS, &root, &local.to_bytes(), &peer.to_bytes(), nonce);
        let (read, mut write) = stream.split();
        let mut read = FrameReader::new(read);
        put(&mut write, &h1).await?;
        let h2 = tokio::time::timeout(PATIENCE, read.next(MAX_HELLO_FRAME_BYTES)).await.map_err(|_| io::ErrorKind::TimedOut)?;
        let h2 = h2.map_err(|error| broken(error.to_string()))?.ok_or(io::ErrorKind::UnexpectedEof)?.to_vec();
        let (_, h3) = initiator.on_h2(&h2).map_err(|error| broken(error.to_string()))?;
        put(&mut write, &h3).await?;
        let beat = |seq| Control::Heartbeat(Heartbeat { seq, serving: true, free_slots: 4, ..Heartbeat::default() });
        let models = vec![ModelOffer::named("rogue")];
        let state = State { version: 1, node_name: name.to_owned(), models, ..State::default() };
        put(&mut write, &beat(1).encode()).await?;
        put(&mut write, &Control::State(state).encode()).await?;
        let (frames, mut orders) = mpsc::channel::<Control>(64);
        let worker = tokio::spawn(async move {
            let reading = async { while let Ok(Some(_)) = read.next(MAX_CONTROL_FRAME_BYTES).await {} };
            let writing = async {
                for seq in 2.. {
                    let next = tokio::time::sleep(Duration::from_secs(4));
                    tokio::pin!(next);
                    loop {
                        let frame = tokio::select! {
                            () = &mut next => break,
                            order = orders.recv() => order,
                        };
                        let Some(frame) = frame else { return };
                        if put(&mut write, &frame.encode()).await.is_err() {
                            return;
                        }
                    }
                    if put(&mut write, &beat(seq).encode()).await.is_err() {
                        return;
                    }
                }
            };
            tokio::select! {
                () = reading => {}
                () = writing => {}
            }
        });
        Ok(Self { frames, worker })
    }

    /// Whether the stream is up.
    pub fn is_up(&self) -> bool {
        !self.worker.is_finished()
    }

    /// Says something more.
    pub async fn say(&self, control: Control) -> bool {
        self.frames.send(control).await.is_ok()
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.worker.abort();
    }
}
