//! For any number of concurrent clients the origin sees one load: normally, when clients leave, and when the origin breaks off.

use crate::support::{
    Blob, Castier, Conn, Download, Gate, KIB, Lie, LyingOrigin, MIB, Random, RealOrigin, Request, assert_ledger, client::Outcome,
    eventually, get, heavy, metrics, within,
};
use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::task::JoinSet;

/// Clients of the one large blob.
const HERD: usize = 1000;
const LARGE: u64 = 20 * MIB;
/// The number of clients of the other blobs, and the number of those blobs.
const OTHERS: usize = 200;
const OTHER_BLOBS: usize = 20;
/// Room for the large blob in memory.
const KEEPS_LARGE: &str = "memory.max_blob = \"32MiB\"\nmemory.capacity = \"256MiB\"";

/// The number of clients that upload, and the size of an upload.
const WRITERS: usize = 2000;
const WRITES: usize = 3;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    None,
    LeaderLeaves,
    ThirdLeaves,
    OriginResetsTwice,
}

/// A running client.
struct Client {
    /// The index of its blob; 0 is the large one.
    blob: usize,
    /// Whether it leaves before the end.
    leaves: bool,
    outcome: Outcome,
}

struct Herd {
    origin: LyingOrigin,
    castier: Castier,
    /// The large one, then the others.
    blobs: Vec<Blob>,
    /// The gate before the origin's first answer.
    start: Gate,
    /// The gate in the middle of the large blob.
    middle: Gate,
    clients: JoinSet<Client>,
    /// The number of clients of the large blob that have bytes.
    started: Arc<std::sync::atomic::AtomicU64>,
}

impl Herd {
    async fn new(config: &str, trouble: Trouble) -> Self {
        let origin = LyingOrigin::start().await;
        let castier = Castier::start(&origin.url(), config).await;
        let (start, middle) = (Gate::new(), Gate::new());
        let large = Blob::new(LARGE);
        origin.add(&large);
        let held = Lie::honest().hold(&start);
        if trouble == Trouble::OriginResetsTwice {
            let second = Lie::honest().stall(LARGE / 2, &middle).reset_after(14 * MIB);
            origin.next(&large, [held.clone().reset_after(7 * MIB), second]);
        } else {
            origin.next(&large, [held.clone().stall(LARGE / 2, &middle)]);
        }
        let mut blobs = vec![large];
        blobs.extend((0..OTHER_BLOBS).map(|_| origin.blob_with(2 * MIB + 77 * KIB, [held.clone()])));
        Self { origin, castier, blobs, start, middle, clients: JoinSet::new(), started: Arc::default() }
    }

    fn client(&mut self, blob: usize, hang_up_after: Option<u64>) {
        let started = if blob == 0 { Arc::clone(&self.started) } else { Arc::default() };
        let download = Download { hang_up_after, started, ..Download::default() };
        let (wanted, from) = (self.blobs[blob].clone(), self.castier.public);
        self.clients.spawn(async move { Client { blob, leaves: hang_up_after.is_some(), outcome: download.of(&wanted, from).await } });
    }

    /// Starts all clients and waits until they are at the barrier: the leader of the large blob first, the others in any order.
    async fn gather(&mut self, trouble: Trouble) {
        let mut random = Random::seeded();
        self.client(0, (trouble == Trouble::LeaderLeaves).then_some(MIB));
        eventually("the leader's load is at the origin", async || (self.origin.gets(&self.blobs[0]) == 1).then_some(())).await;
        let mut wanted: Vec<usize> = (1..HERD).map(|_| 0).chain((0..OTHERS).map(|client| 1 + client % OTHER_BLOBS)).collect();
        while !wanted.is_empty() {
            let blob = wanted.swap_remove(random.below(wanted.len() as u64) as usize);
            let leaves = trouble == Trouble::ThirdLeaves && random.below(3) == 0;
            let after = leaves.then(|| 1 + random.below(self.blobs[blob].size - 128 * KIB));
            self.client(blob, after);
        }
        let followers = (HERD + OTHERS - self.blobs.len()) as u64;
        eventually("everybody has joined a flight", async || {
            (metrics(&self.castier).await.total("castier_collapsed_total") == followers).then_some(())
        })
        .await;
        assert_eq!(self.clients.len(), HERD + OTHERS, "nobody got an answer before the origin gave one");
    }

    /// Opens the gates, first to the middle and then to the end, and checks every client's result.
    async fn release(&mut self, trouble: Trouble) {
        self.start.open();
        eventually("the origin is in the middle of the large blob", async || (self.middle.arrived() == 1).then_some(())).await;
        // The origin has sent no more than half, and does not go on before every client has got bytes.
        eventually("bytes reach everybody meanwhile", async || (self.started.load(Ordering::SeqCst) == HERD as u64).then_some(())).await;
        assert!(self.origin.sent(&self.blobs[0]) < LARGE);
        if trouble == Trouble::LeaderLeaves {
            let gone = async {
                loop {
                    let client = self.clients.join_next().await.unwrap().unwrap();
                    self.judge(&client);
                    if client.leaves {
                        return;
                    }
                }
            };
            within(Duration::from_secs(60), "the leader's leaving", gone).await;
        }
        self.middle.open();
        let rest = async {
            while let Some(client) = self.clients.join_next().await {
                self.judge(&client.unwrap());
            }
        };
        within(Duration::from_secs(180), "every client's answer", rest).await;
    }

    fn judge(&self, client: &Client) {
        let blob = &self.blobs[client.blob];
        if client.leaves {
            assert_eq!((client.outcome.status, client.outcome.wrong_at), (200, None), "{:?}", client.outcome);
        } else {
            client.outcome.assert_is(blob);
        }
    }

    /// Checks the origin's requests, and the ledger.
    async fn settle(&self, trouble: Trouble) {
        let resumes = if trouble == Trouble::OriginResetsTwice { 2 } else { 0 };
        let seen = self.origin.requests("GET", &self.blobs[0]);
        assert_eq!(seen.len(), 1 + resumes, "one load of the large blob: {seen:?}");
        assert!(seen[0].range().is_none() && seen[1..].iter().all(|resume| resume.range().is_some()), "{seen:?}");
        for blob in &self.blobs[1..] {
            assert_eq!(self.origin.gets(blob), 1, "one load of each other blob");
        }
        let books = assert_ledger(&self.castier).await;
        let flights = self.blobs.len() as u64;
        assert_eq!(books.total("castier_gets_total"), (HERD + OTHERS) as u64);
        assert_eq!(books.total("castier_flights_total"), flights);
        assert_eq!(books.source_loads(), [flights, 0, 0]);
        assert_eq!((books.resumes(), books.corrupt("origin")), (resumes as u64, 0));
    }
}

async fn herd(config: &str, trouble: Trouble) -> Herd {
    let mut herd = Herd::new(config, trouble).await;
    herd.gather(trouble).await;
    herd.release(trouble).await;
    herd.settle(trouble).await;
    herd
}

/// Everything was kept, so another round causes no loads.
async fn assert_kept(herd: &Herd) {
    assert_eq!(metrics(&herd.castier).await.kept(), herd.blobs.len() as u64);
    for blob in &herd.blobs {
        let reply = get(herd.castier.public, blob).await;
        reply.assert_is(blob);
        assert_eq!(reply.cache_status(), "castier; hit; detail=memory");
    }
    herd.settle_again().await;
}

impl Herd {
    /// Checks that the origin saw no new requests, and that the ledger balances.
    async fn settle_again(&self) {
        for blob in &self.blobs[1..] {
            assert_eq!(self.origin.gets(blob), 1);
        }
        let books = assert_ledger(&self.castier).await;
        assert_eq!(books.total("castier_hits_total"), self.blobs.len() as u64);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn herd_in_calm() {
    let _turn = heavy().await;
    let herd = herd(KEEPS_LARGE, Trouble::None).await;
    assert_kept(&herd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn herd_on_a_blob_too_large_to_keep() {
    let _turn = heavy().await;
    let herd = herd("", Trouble::None).await;
    assert_eq!(metrics(&herd.castier).await.kept(), OTHER_BLOBS as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn herd_whose_leader_leaves() {
    let _turn = heavy().await;
    let herd = herd(KEEPS_LARGE, Trouble::LeaderLeaves).await;
    assert_kept(&herd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn herd_of_which_a_third_leaves() {
    let _turn = heavy().await;
    let herd = herd(KEEPS_LARGE, Trouble::ThirdLeaves).await;
    assert_kept(&herd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn herd_while_the_origin_resets_twice() {
    let _turn = heavy().await;
    let herd = herd(KEEPS_LARGE, Trouble::OriginResetsTwice).await;
    assert_kept(&herd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_clients_that_store_something_small() {
    let _turn = heavy().await;
    let origin = RealOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    let mut clients = JoinSet::new();
    let start = Gate::new();
    for client in 0..WRITERS {
        let (to, start) = (castier.public, start.clone());
        clients.spawn(async move {
            start.pass().await;
            let mut conn = Conn::open(to).await;
            for write in 0..WRITES {
                let blob = Blob::of(format!("{client} stores {write}").as_bytes());
                let reply = conn.ask(&Request::new("POST", "/cas").body(blob.whole())).await;
                assert_eq!(reply.status, 201, "{}", String::from_utf8_lossy(&reply.body));
            }
        });
    }
    eventually("all stand at the start", async || (start.arrived() == WRITERS).then_some(())).await;
    start.open();
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    assert_eq!(metrics(&castier).await.kept(), (WRITERS * WRITES) as u64);
}
