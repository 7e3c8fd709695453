//! Many prompts: ten thousand one after the other, and hundreds at once.

use std::time::Instant;

use super::*;

const PROMPTS: usize = 10_000;
/// Asked at once, each over a connection of its own.
const STREAMS: usize = 8;
/// Prompts between two looks at what the processes hold.
const STEP: usize = 1_000;
/// Looks that are left out: allocators and pools grow to what eight streams need.
const WARM: usize = 3;
/// KiB that a process may grow by per thousand prompts: ten times what was measured. A leak of a hundred bytes a prompt is more.
const SLOPE: f64 = 64.0;
/// KiB that hundreds of prompts at once may leave behind; 4 MiB were measured.
const RISE: u32 = 32 * 1024;
/// Threads and descriptors that may be there by chance: a worker that is not idle for long enough yet, a file being read.
const CHANCE: usize = 2;

/// What a process holds.
#[derive(Debug, Clone, Copy)]
struct Held {
    rss: u32,
    threads: usize,
    /// `None` where the process lets nobody look.
    descriptors: Option<usize>,
}

impl Held {
    fn by(pid: u32) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process lives");
        let number = |key: &str| -> u32 {
            let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).unwrap();
            line.trim().trim_end_matches(" kB").parse().unwrap()
        };
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok().map(Iterator::count);
        Self { rss: number("VmRSS"), threads: number("Threads") as usize, descriptors }
    }
}

/// KiB per step, by least squares.
fn slope(held: &[Held]) -> f64 {
    let points: Vec<(f64, f64)> = (0_u32..).zip(held).map(|(at, one)| (f64::from(at), f64::from(one.rss))).collect();
    let count: f64 = points.iter().map(|_| 1.0).sum();
    let (x, y) = points.iter().fold((0.0, 0.0), |(x, y), point| (x + point.0 / count, y + point.1 / count));
    let together: f64 = points.iter().map(|point| (point.0 - x) * (point.1 - y)).sum();
    together / points.iter().map(|point| (point.0 - x).powi(2)).sum::<f64>()
}

fn is_flat(who: &str, held: &[Held]) {
    let warm = &held[WARM..];
    let slope = slope(warm);
    let rss: Vec<u32> = held.iter().map(|one| one.rss).collect();
    println!("{who}: {slope:.0} KiB per {STEP} prompts after {WARM} steps; {rss:?} KiB");
    assert!(slope <= SLOPE, "{who} grows by {slope:.0} KiB per {STEP} prompts: {rss:?}");
    let (first, last) = (warm[0], warm[warm.len() - 1]);
    assert!(last.threads <= first.threads + CHANCE, "{who}: {first:?} {last:?}");
    assert!(last.descriptors <= first.descriptors.map(|count| count + CHANCE), "{who}: {first:?} {last:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_prompts_leave_nothing_behind() {
    let Some(answering) = Answering::start("N", &["--http", "127.0.0.1:0"]).await else { return };
    let endpoint = answering.endpoint().await;
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        streams.push(endpoint.connect().await);
    }
    let (mut daemon, mut engine) = (Vec::new(), Vec::new());
    let begun = Instant::now();
    for _ in 0..PROMPTS / STEP {
        let asking = streams.iter_mut().map(async |stream| {
            for _ in 0..STEP / STREAMS {
                let reply = endpoint.ask(stream, QUESTION).await;
                assert_eq!((reply.status, content(&reply)), (200, json!("4")), "{}", reply.text());
            }
        });
        futures::future::join_all(asking).await;
        answering.is_idle().await;
        daemon.push(Held::by(answering.node.pid()));
        engine.push(Held::by(answering.engine));
    }
    println!("{PROMPTS} prompts in {:.1} s", begun.elapsed().as_secs_f64());
    is_flat("daemon", &daemon);
    is_flat("engine", &engine);
    let local = answering.local().await;
    assert_eq!(
        (&local["answered"], &local["crashes"], &local["engine_pid"]),
        (&json!(PROMPTS), &json!(0), &json!(answering.engine))
    );
    assert!(!answering.node.log().contains(QUESTION), "no text of prompts in the log");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_and_fifty_six_prompts_at_once_are_answered_or_told_to_come_back() {
    let Some(answering) = Answering::start("N", &["--http", "127.0.0.1:0"]).await else { return };
    let endpoint = answering.endpoint().await;
    let before = Held::by(answering.node.pid());
    let asking = (0..256).map(|_| {
        let endpoint = endpoint.clone();
        tokio::spawn(async move {
            let mut stream = endpoint.connect().await;
            let (mut refused, begun) = (0_u32, Instant::now());
            loop {
                let reply = endpoint.ask(&mut stream, QUESTION).await;
                if reply.status == 200 {
                    assert_eq!(content(&reply), "4", "{}", reply.text());
                    return refused;
                }
                assert_eq!((reply.status, reply.code()), (429, json!("busy")), "{}", reply.text());
                assert!(reply.header("retry-after").is_some_and(|after| after.parse::<u32>().is_ok()), "{}", reply.head);
                assert!(begun.elapsed() < DEADLINE, "refused {refused} times");
                refused += 1;
                // Far sooner than it was told: the worst of clients.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
    });
    let begun = Instant::now();
    let refused: Vec<u32> = futures::future::join_all(asking).await.into_iter().map(|task| task.expect("an answer")).collect();
    answering.is_idle().await;
    let after = Held::by(answering.node.pid());
    let at_first = refused.iter().filter(|&&refused| refused == 0).count();
    println!(
        "256 at once: {at_first} answered at first, {} refusals, {:?}, {before:?} {after:?}",
        refused.iter().sum::<u32>(),
        begun.elapsed()
    );
    assert!(after.rss < before.rss + RISE, "{before:?} {after:?}");
    let local = answering.local().await;
    assert_eq!((&local["answered"], &local["crashes"]), (&json!(256), &json!(0)));
}
