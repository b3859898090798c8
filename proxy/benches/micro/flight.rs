//! One flight, many readers.

use castier::metrics::Metrics;
use castier_blob::Digest;
use castier_cache::{Asker, Budget, Cache, Memory, OneSource, Part, Spools, Tiers};
use castier_config::{Castier, Size};
use castier_upstream::Upstream;
use criterion::{BenchmarkId, Criterion, Throughput};
use std::{
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use tokio::task::JoinSet;

const SIZE: usize = 1 << 20;

/// From the first reader's joining to the last one's last byte of a cold blob of 1 MiB, which streams (it is larger than
/// `verify.buffer_up_to` here). The tier runs on one thread; an origin on another sends the blob over a kept-alive loopback
/// connection, as fast as it is taken. Hashing, the spool and waking the readers are in it; writing to clients is not: what readers get they drop.
pub(crate) fn fan_out(criterion: &mut Criterion) {
    let loads = Arc::new(AtomicU64::new(0));
    let blob: Arc<[u8]> = (0..SIZE).map(|at| ((at * at) >> 7) as u8).collect();
    let digest = Digest::of(&blob);
    let origin = origin(blob, loads.clone());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (cache, memory) = runtime.block_on(async { tier(origin) });
    let mut group = criterion.benchmark_group("flight fan-out");
    group.sample_size(20);
    for readers in [1, 100, 1000] {
        group.throughput(Throughput::Elements(readers));
        group.bench_function(BenchmarkId::from_parameter(readers), |bencher| {
            bencher.iter_custom(|times| {
                let before = loads.load(Ordering::Relaxed);
                let took = (0..times).map(|_| runtime.block_on(one_flight(&cache, &memory, &digest, readers))).sum();
                assert_eq!(loads.load(Ordering::Relaxed) - before, times, "one load for each flight");
                took
            });
        });
    }
}

async fn one_flight(cache: &Arc<Cache>, memory: &Memory, digest: &Digest, readers: u64) -> Duration {
    let started = Instant::now();
    let mut reading = JoinSet::new();
    for _ in 0..readers {
        reading.spawn(read(cache.clone(), *digest));
    }
    while let Some(size) = reading.join_next().await {
        assert_eq!(size.unwrap(), SIZE);
    }
    let took = started.elapsed();
    while cache.is_filling(digest) || cache.in_progress(0).0 > 0 {
        tokio::task::yield_now().await;
    }
    assert!(memory.forget(digest));
    took
}

async fn read(cache: Arc<Cache>, digest: Digest) -> usize {
    let mut hit = cache.get(&digest, Asker::Client, |_| Part::Whole).await.unwrap().unwrap();
    assert_eq!(hit.size, Some(SIZE as u64));
    let mut size = 0;
    while let Some(piece) = hit.reader.next().await.unwrap() {
        size += piece.len();
    }
    size
}

/// As `main` puts it together, without a disk.
fn tier(origin: SocketAddr) -> (Arc<Cache>, Arc<Memory>) {
    let mut config = Castier::default();
    config.verify.buffer_up_to = Size::new(64 << 10);
    let budget = Budget::new(config.fill.memory.get());
    let memory = Arc::new(Memory::new(&config.memory, &budget));
    let metrics = Arc::new(Metrics::new().unwrap());
    let spools = Spools::new(&config, budget, metrics.cache.clone());
    let origin = Upstream::origin(&format!("http://{origin}").parse().unwrap(), &config.origin, metrics.upstream.clone()).unwrap();
    let retry_budget = origin.retry_budget().unwrap().clone();
    let limits = Arc::new(arc_swap::ArcSwap::from_pointee(config.limits.clone()));
    let tiers = Tiers { memory: memory.clone(), mirror: None, disk: None };
    let origin = Arc::new(origin.store());
    let planner = Box::new(move |_: &Digest| Box::new(OneSource(origin.clone())) as Box<dyn castier_cache::Plan>);
    (Cache::new(&config, limits, tiers, spools, planner, metrics.cache.clone(), retry_budget), memory)
}

/// Answers every request with the blob, and counts how often.
fn origin(blob: Arc<[u8]>, loads: Arc<AtomicU64>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for connection in listener.incoming() {
            let (blob, loads) = (blob.clone(), loads.clone());
            thread::spawn(move || answer(&connection.unwrap(), &blob, &loads));
        }
    });
    address
}

fn answer(mut connection: &TcpStream, blob: &[u8], loads: &AtomicU64) {
    connection.set_nodelay(true).unwrap();
    let mut lines = BufReader::new(connection).lines();
    while let Some(Ok(line)) = lines.next() {
        if line.is_empty() {
            loads.fetch_add(1, Ordering::Relaxed);
            write!(connection, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", blob.len()).unwrap();
            connection.write_all(blob).unwrap();
        }
    }
}
