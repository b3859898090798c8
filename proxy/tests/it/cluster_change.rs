//! Nodes join, leave, and lose their connections under load: no request fails, and the origin sees few more loads.

use crate::support::{
    Blob, Cluster, Download, KIB, LyingOrigin, MIB, Random, assert_ledger,
    cluster::{DISK, Node, wait_for_peers},
    eventually, get, heavy, stats, within,
};
use rustix::process::Signal;
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, tcp},
    sync::watch,
    task::{JoinHandle, JoinSet},
};

/// Clients behind a load balancer: each request goes to a random node in the rotation, for a random blob.
struct Load {
    rotation: Arc<Vec<Place>>,
    stop: Arc<AtomicBool>,
    gets: Arc<AtomicU64>,
    clients: JoinSet<()>,
}

/// One node behind the load balancer.
struct Place {
    node: SocketAddr,
    open: AtomicBool,
    /// Running requests.
    busy: AtomicUsize,
}

impl Load {
    const CLIENTS: usize = 12;

    fn start(nodes: &[&Node], open: usize, blobs: &[Blob]) -> Self {
        let place =
            |(index, node): (usize, &&Node)| Place { node: node.public(), open: AtomicBool::new(index < open), busy: AtomicUsize::new(0) };
        let mut load = Self {
            rotation: Arc::new(nodes.iter().enumerate().map(place).collect()),
            stop: Arc::default(),
            gets: Arc::default(),
            clients: JoinSet::new(),
        };
        let mut random = Random::seeded();
        for _ in 0..Self::CLIENTS {
            let (rotation, stop, gets) = (load.rotation.clone(), load.stop.clone(), load.gets.clone());
            let (mut random, blobs) = (random.fork(), blobs.to_vec());
            load.clients.spawn(async move {
                while !stop.load(Ordering::SeqCst) {
                    let place = &rotation[random.below(rotation.len() as u64) as usize];
                    place.busy.fetch_add(1, Ordering::SeqCst);
                    if place.open.load(Ordering::SeqCst) {
                        let blob = &blobs[random.below(blobs.len() as u64) as usize];
                        within(Duration::from_secs(20), "an answer", Download::default().of(blob, place.node)).await.assert_is(blob);
                        gets.fetch_add(1, Ordering::SeqCst);
                    } else {
                        tokio::task::yield_now().await;
                    }
                    place.busy.fetch_sub(1, Ordering::SeqCst);
                }
            });
        }
        load
    }

    fn gets(&self) -> u64 {
        self.gets.load(Ordering::SeqCst)
    }

    async fn take_out(&self, index: usize) {
        let place = &self.rotation[index];
        place.open.store(false, Ordering::SeqCst);
        eventually("the node has answered its clients", async || (place.busy.load(Ordering::SeqCst) == 0).then_some(())).await;
    }

    fn put_in(&self, index: usize) {
        self.rotation[index].open.store(true, Ordering::SeqCst);
    }

    /// Waits for a number of further gets.
    async fn run(&self, more: u64) {
        let until = self.gets() + more;
        let enough = async {
            while self.gets() < until {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        within(Duration::from_secs(120), "the load", enough).await;
    }

    /// Stops the clients. Panics if a request has failed.
    async fn end(mut self) {
        self.stop.store(true, Ordering::SeqCst);
        while let Some(client) = self.clients.join_next().await {
            client.unwrap();
        }
    }
}

/// Without mirrors, which would hide wrong behaviour.
fn config() -> String {
    format!("log.level = \"castier=info,castier::access=warn\"\ncluster.mirror_share = 0\n{DISK}")
}

fn gets_at(origin: &LyingOrigin) -> u64 {
    origin.seen().iter().filter(|seen| seen.method == "GET").count() as u64
}

/// Blobs of several sizes, requested from all nodes.
async fn warm(origin: &LyingOrigin, cluster: &Cluster) -> Vec<Blob> {
    let blobs: Vec<Blob> = (0..60).map(|at| origin.blob(if at % 10 == 0 { 2 * MIB } else { 20 * KIB + at })).collect();
    for blob in &blobs {
        for node in &cluster.nodes {
            get(node.public(), blob).await.assert_is(blob);
        }
    }
    assert_eq!(gets_at(origin), blobs.len() as u64, "one load each");
    blobs
}

#[track_caller]
fn assert_hardly_noticed(loads: u64, gets: u64) {
    println!("{loads} loads at the origin, {gets} gets");
    assert!(gets >= 1000, "no load to speak of: {gets}");
    assert!(loads * 100 < gets, "{loads} loads at the origin during {gets} gets");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_costs_no_request_and_hardly_a_load() {
    let _turn = heavy().await;
    let origin = LyingOrigin::start().await;
    let mut cluster = Cluster::start(3, &origin.url(), &config()).await;
    let blobs = warm(&origin, &cluster).await;
    let load = Load::start(&cluster.nodes.iter().collect::<Vec<_>>(), 3, &blobs);
    load.run(500).await;
    let (gets, loads) = (load.gets(), gets_at(&origin));
    for index in 0..3 {
        load.take_out(index).await;
        cluster.nodes[index].terminate().await;
        load.run(500).await;
        cluster.nodes[index].start().await;
        cluster.wait_until_whole().await;
        load.put_in(index);
        load.run(500).await;
    }
    assert_hardly_noticed(gets_at(&origin) - loads, load.gets() - gets);
    load.end().await;
    for node in &cluster.nodes {
        assert_ledger(node.castier()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fourth_node_comes_and_goes() {
    let _turn = heavy().await;
    let origin = LyingOrigin::start().await;
    let config = config();
    let mut cluster = Cluster::start(3, &origin.url(), &config).await;
    let blobs = warm(&origin, &cluster).await;
    let mut fourth = Node::new(&origin.url(), &config);
    let (three, four) = (cluster.names(), [cluster.names(), vec![fourth.name.clone()]].concat());
    let load = Load::start(&cluster.nodes.iter().chain([&fourth]).collect::<Vec<_>>(), 3, &blobs);
    load.run(500).await;
    let (gets, loads) = (load.gets(), gets_at(&origin));

    fourth.configure(&four);
    fourth.start().await;
    let tell = async |nodes: &[Node], names: &[String]| {
        for node in nodes {
            node.configure(names);
            node.signal(Signal::HUP);
            let known = async || stats(node.castier()).await["cluster"]["members"].as_array().map(Vec::len);
            eventually("the list is taken", async || (known().await == Some(names.len())).then_some(())).await;
        }
    };
    tell(&cluster.nodes, &four).await;
    load.put_in(3);
    load.run(3000).await;
    let owned = fourth.metrics().await.sum("castier_tier_blobs", &[("tier", "memory")]);
    assert!(owned > 0, "the fourth has its share");

    tell(&cluster.nodes, &three).await;
    load.take_out(3).await;
    fourth.terminate().await;
    load.run(3000).await;
    assert_hardly_noticed(gets_at(&origin) - loads, load.gets() - gets);
    // A quarter of the blobs had a new owner.
    assert!(gets_at(&origin) - loads <= blobs.len() as u64 / 10, "new owners get blobs from the former ones");
    load.end().await;
    cluster.wait_until_whole().await;
    for node in &mut cluster.nodes {
        assert_ledger(node.castier()).await;
    }
}

/// A bridge to a node's peer listener. While closed, it drops all bytes without closing connections, like a broken switch.
struct Bridge {
    address: SocketAddr,
    open: watch::Sender<bool>,
    accepting: JoinHandle<()>,
}

impl Drop for Bridge {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Bridge {
    async fn to(node: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let open = watch::Sender::new(true);
        let gate = open.clone();
        let accepting = tokio::spawn(async move {
            let mut passing = JoinSet::new();
            while let Ok((from, _)) = listener.accept().await {
                let gate = gate.clone();
                passing.spawn(async move {
                    if gate.subscribe().wait_for(|open| *open).await.is_err() {
                        return;
                    }
                    let Ok(to) = TcpStream::connect(node).await else { return };
                    let ((from_read, from_write), (to_read, to_write)) = (from.into_split(), to.into_split());
                    tokio::select! {
                        () = pass(from_read, to_write, &gate) => {}
                        () = pass(to_read, from_write, &gate) => {}
                    }
                });
            }
        });
        Self { address, open, accepting }
    }

    fn set_open(&self, open: bool) {
        self.open.send_replace(open);
    }
}

/// Forwards bytes while the bridge is open.
async fn pass(mut from: tcp::OwnedReadHalf, mut to: tcp::OwnedWriteHalf, gate: &watch::Sender<bool>) {
    let mut part = [0; 64 << 10];
    let mut open = gate.subscribe();
    while let Ok(read) = from.read(&mut part).await {
        if read == 0 || open.wait_for(|open| *open).await.is_err() || to.write_all(&part[..read]).await.is_err() {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_is_served_on_both_sides_and_heals_by_itself() {
    let _turn = heavy().await;
    let origin = LyingOrigin::start().await;
    let mut cluster = Cluster { nodes: (0..3).map(|_| Node::new(&origin.url(), DISK)).collect() };
    let mut bridges = Vec::new();
    for node in &mut cluster.nodes {
        let bridge = Bridge::to(node.peer()).await;
        node.name = bridge.address.to_string();
        bridges.push(bridge);
    }
    cluster.configure();
    cluster.start_all().await;
    cluster.wait_until_whole().await;
    let blobs = warm(&origin, &cluster).await;
    let load = Load::start(&cluster.nodes.iter().collect::<Vec<_>>(), 3, &blobs);
    load.run(500).await;
    // First one node is cut off from the others, then each node is alone.
    for out_of_sight in [&[2][..], &[0, 1, 2]] {
        let started = Instant::now();
        for index in out_of_sight {
            bridges[*index].set_open(false);
        }
        // Requests before the failure is noticed wait for their own timeout, and not for that of others.
        let cold: Vec<Blob> = (0..30).map(|_| origin.blob(10 * KIB)).collect();
        let mut clients = JoinSet::new();
        for blob in &cold {
            for node in &cluster.nodes {
                let (blob, node) = (blob.clone(), node.public());
                clients.spawn(async move { get(node, &blob).await.assert_is(&blob) });
            }
        }
        within(Duration::from_secs(15), "answers in a partition", clients.join_all()).await;
        println!("all had answers {:?} after the cut", started.elapsed());
        for blob in &cold {
            assert!(origin.gets(blob) <= 3, "at most one load on each side");
        }
        for (index, node) in cluster.nodes.iter().enumerate() {
            let down = out_of_sight.iter().filter(|out| **out != index).count() as u64;
            wait_for_peers(node, 2 - down, down).await;
        }
        load.run(500).await;
        for bridge in &bridges {
            bridge.set_open(true);
        }
        cluster.wait_until_whole().await;
        let new: Vec<Blob> = (0..30).map(|_| origin.blob(10 * KIB)).collect();
        for blob in &new {
            for node in &cluster.nodes {
                get(node.public(), blob).await.assert_is(blob);
            }
            assert_eq!(origin.gets(blob), 1, "healed");
        }
    }
    load.end().await;
    for node in &cluster.nodes {
        assert_ledger(node.castier()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_stops_for_a_while_is_missed_by_nobody() {
    let _turn = heavy().await;
    let origin = LyingOrigin::start().await;
    let cluster = Cluster::start(3, &origin.url(), DISK).await;
    let blobs = warm(&origin, &cluster).await;
    let load = Load::start(&cluster.nodes.iter().collect::<Vec<_>>(), 3, &blobs);
    load.run(500).await;
    for round in 0..2 {
        load.take_out(2).await;
        cluster.nodes[2].signal(Signal::STOP);
        for index in 0..2 {
            wait_for_peers(&cluster.nodes[index], 1, 1).await;
        }
        load.run(500).await;
        cluster.nodes[2].signal(Signal::CONT);
        cluster.wait_until_whole().await;
        load.put_in(2);
        load.run(500).await;
        let blob = origin.blob(1000);
        for node in &cluster.nodes {
            get(node.public(), &blob).await.assert_is(&blob);
        }
        assert_eq!(origin.gets(&blob), 1, "round {round}");
    }
    load.end().await;
    for node in &cluster.nodes {
        assert_ledger(node.castier()).await;
    }
}
