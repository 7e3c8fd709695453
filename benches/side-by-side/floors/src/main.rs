//! Floors: echo round trips over bare TCP and bare QUIC, with nothing of the gateway in between.
//!
//! ```text
//! floors tcp-serve ADDR                   prints {"ev":"ready"}, then echoes
//! floors quic-serve ADDR
//! floors tcp   ADDR N SIZE INFLIGHT       prints one {"ev":"floor",…}
//! floors quic  ADDR N SIZE INFLIGHT       one stream for all messages
//! floors quic-streams ADDR N SIZE INFLIGHT  a new stream for each message
//! ```
//!
//! One thread each, as the daemon has. The QUIC client trusts any certificate: this measures time, not trust.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow, bail};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// Round trips before the clock starts.
const WARM_UP: usize = 200;
/// As many bytes as a message may have.
const BUFFER: usize = 1 << 16;

async fn echo(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) -> Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..read]).await?;
    }
}

/// Messages over one ordered stream, `in_flight` at a time. Gives the microseconds of each, and the seconds of all.
async fn ping(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    n: usize,
    size: usize,
    in_flight: usize,
) -> Result<(Vec<f64>, f64)> {
    let message = vec![b'a'; size];
    let mut answer = vec![0; size];
    for _ in 0..WARM_UP {
        to.write_all(&message).await?;
        from.read_exact(&mut answer).await?;
    }
    let begun = Instant::now();
    let mut sent_at = Vec::with_capacity(n);
    let mut times = Vec::with_capacity(n);
    while times.len() < n {
        while sent_at.len() < n && sent_at.len() - times.len() < in_flight {
            sent_at.push(Instant::now());
            to.write_all(&message).await?;
        }
        from.read_exact(&mut answer).await?;
        times.push(sent_at[times.len()].elapsed().as_secs_f64() * 1e6);
    }
    Ok((times, begun.elapsed().as_secs_f64()))
}

async fn serve_tcp(address: &str) -> Result<()> {
    let listener = TcpListener::bind(address).await?;
    println!(r#"{{"ev":"ready"}}"#);
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::task::spawn_local(async move {
            let (from, to) = stream.into_split();
            echo(from, to).await
        });
    }
}

async fn serve_quic(address: &str) -> Result<()> {
    let pair = rcgen::generate_simple_self_signed(vec!["floor".into()])?;
    let key = PrivateKeyDer::try_from(pair.signing_key.serialize_der()).map_err(|error| anyhow!("{error}"))?;
    let config = quinn::ServerConfig::with_single_cert(vec![pair.cert.der().clone()], key)?;
    let endpoint = quinn::Endpoint::server(config, address.parse()?)?;
    println!(r#"{{"ev":"ready"}}"#);
    while let Some(incoming) = endpoint.accept().await {
        tokio::task::spawn_local(async move {
            let connection = incoming.await?;
            loop {
                let (mut to, from) = connection.accept_bi().await?;
                tokio::task::spawn_local(async move {
                    echo(from, &mut to).await?;
                    to.finish()?;
                    anyhow::Ok(())
                });
            }
            #[allow(unreachable_code)]
            anyhow::Ok(())
        });
    }
    Ok(())
}

#[derive(Debug)]
struct AnyCertificate;

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

async fn connect_quic(address: &str) -> Result<(quinn::Endpoint, quinn::Connection)> {
    let tls = rustls::ClientConfig::builder()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate))
        .with_no_client_auth();
    let mut endpoint = quinn::Endpoint::client("0.0.0.0:0".parse()?)?;
    let tls = quinn::crypto::rustls::QuicClientConfig::try_from(tls)?;
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(tls)));
    let connection = endpoint.connect(address.parse()?, "floor")?.await?;
    Ok((endpoint, connection))
}

async fn one_stream(connection: &quinn::Connection, message: &[u8]) -> Result<f64> {
    let begun = Instant::now();
    let (mut to, mut from) = connection.open_bi().await?;
    to.write_all(message).await?;
    to.finish()?;
    if from.read_to_end(BUFFER).await?.len() != message.len() {
        bail!("the echo is short");
    }
    Ok(begun.elapsed().as_secs_f64() * 1e6)
}

async fn ping_streams(connection: quinn::Connection, n: usize, size: usize, in_flight: usize) -> Result<(Vec<f64>, f64)> {
    let message: Rc<[u8]> = vec![b'a'; size].into();
    for _ in 0..WARM_UP {
        one_stream(&connection, &message).await?;
    }
    let left = Rc::new(Cell::new(n));
    let begun = Instant::now();
    let workers: Vec<_> = (0..in_flight)
        .map(|_| {
            let (connection, left, message) = (connection.clone(), Rc::clone(&left), Rc::clone(&message));
            tokio::task::spawn_local(async move {
                let mut times = Vec::new();
                while left.get() > 0 {
                    left.set(left.get() - 1);
                    times.push(one_stream(&connection, &message).await?);
                }
                anyhow::Ok(times)
            })
        })
        .collect();
    let mut times = Vec::with_capacity(n);
    for worker in workers {
        times.extend(worker.await??);
    }
    Ok((times, begun.elapsed().as_secs_f64()))
}

async fn run(arguments: &[&str]) -> Result<()> {
    let (mode, address, numbers) = match arguments {
        [mode, address, numbers @ ..] => (*mode, *address, numbers),
        _ => bail!("usage: floors MODE ADDR [N SIZE INFLIGHT]"),
    };
    match mode {
        "tcp-serve" => return serve_tcp(address).await,
        "quic-serve" => return serve_quic(address).await,
        _ => {}
    }
    let number = |at: usize| numbers.get(at).context("too few numbers")?.parse::<usize>().context("no number");
    let (n, size, in_flight) = (number(0)?, number(1)?, number(2)?);
    let (mut times, seconds) = match mode {
        "tcp" => {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let (from, to) = stream.into_split();
            ping(from, to, n, size, in_flight).await?
        }
        "quic" => {
            let (_endpoint, connection) = connect_quic(address).await?;
            let (to, from) = connection.open_bi().await?;
            ping(from, to, n, size, in_flight).await?
        }
        "quic-streams" => {
            let (_endpoint, connection) = connect_quic(address).await?;
            ping_streams(connection, n, size, in_flight).await?
        }
        other => bail!("no such mode: {other}"),
    };
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
    println!(
        r#"{{"ev":"floor","n":{n},"p50_us":{:.1},"p99_us":{:.1},"per_s":{:.0}}}"#,
        at(0.5),
        at(0.99),
        n as f64 / seconds
    );
    Ok(())
}

fn main() -> Result<()> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // A task: waking the outermost future costs two system calls more.
    tokio::task::LocalSet::new().block_on(&runtime, async {
        tokio::task::spawn_local(async move { run(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).await }).await?
    })
}
