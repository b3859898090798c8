//! Many nodes as one cache: one load for each blob, for any node that is asked, and while nodes fail.

use crate::support::{
    Blob, Cluster, Conn, Download, Gate, KIB, Lie, LyingOrigin, MIB, Request, assert_ledger,
    client::Outcome,
    cluster::{DISK, Node, wait_for_peers},
    eventually, get, heavy, light, stats, within,
};
use rustix::process::Signal;
use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};
use tokio::task::JoinSet;

/// The ledger of every node balances.
async fn assert_ledgers(cluster: &Cluster) {
    for node in &cluster.nodes {
        assert_ledger(node.castier()).await;
    }
}

/// 10,000 clients of 20 blobs at three nodes. The origin answers only when all of them wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_clients_cost_one_load_for_each_blob() {
    const CLIENTS: usize = 10_000;
    const BLOBS: usize = 20;
    let _turn = heavy().await;
    let origin = LyingOrigin::start().await;
    let cluster = Cluster::start(3, &origin.url(), "limits.header_timeout = \"1m\"\nlog.level = \"warn\"").await;
    let gate = Gate::new();
    let blobs: Vec<Blob> = (0..BLOBS).map(|_| origin.blob_with(20 * KIB, [Lie::honest().hold(&gate)])).collect();
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        let (blob, from) = (blobs[client % BLOBS].clone(), cluster.nodes[client / BLOBS % 3].public());
        clients.spawn(async move { (Download::default().of(&blob, from).await, blob) });
    }
    // Every client's get, and one from each node to each owner that is another.
    let gets = (CLIENTS + 2 * BLOBS) as u64;
    eventually("everybody waits", async || (cluster.sum("castier_gets_total", &[]).await == gets).then_some(())).await;
    eventually("the loads are at the origin", async || (gate.arrived() == BLOBS).then_some(())).await;
    assert_eq!(clients.len(), CLIENTS, "nobody got an answer before the origin gave one");
    gate.open();
    let all = async {
        while let Some(client) = clients.join_next().await {
            let (outcome, blob) = client.unwrap();
            outcome.assert_is(&blob);
        }
    };
    within(Duration::from_secs(120), "every answer", all).await;
    assert!(blobs.iter().all(|blob| origin.gets(blob) == 1), "{:?}", blobs.iter().map(|blob| origin.gets(blob)).collect::<Vec<_>>());
    assert_eq!(origin.seen().iter().filter(|seen| seen.method == "GET").count(), BLOBS);
    assert_ledgers(&cluster).await;
    assert_eq!(cluster.sum("castier_source_loads_total", &[("source", "origin"), ("result", "ok")]).await, BLOBS as u64);
    assert_eq!(cluster.sum("castier_source_loads_total", &[("source", "peer"), ("result", "ok")]).await, 2 * BLOBS as u64);
    assert_eq!(cluster.sum("castier_gets_from_peers_total", &[]).await, 2 * BLOBS as u64);
    assert_eq!(cluster.sum("castier_peer_errors_total", &[]).await, 0);
}

/// A large size with TEST_FULL, otherwise a moderate one.
fn large() -> u64 {
    if std::env::var_os("TEST_FULL").is_some() { 500 * MIB } else { 64 * MIB }
}

/// A blob that this node owns.
fn owned_by(origin: &LyingOrigin, cluster: &Cluster, node: usize) -> Blob {
    loop {
        let blob = origin.blob(1000);
        if cluster.owner(&blob) == node {
            return blob;
        }
    }
}

/// Disturbs the owner when 30 clients at the two other nodes have half of a large blob.
async fn owner_fails(what: impl AsyncFnOnce(&mut Node)) {
    const CLIENTS: u64 = 30;
    let origin = LyingOrigin::start().await;
    let mut cluster = Cluster::start(3, &origin.url(), "log.level = \"info\"").await;
    let gate = Gate::new();
    let blob = origin.blob_with(large(), [Lie::honest().stall(large() / 2, &gate)]);
    let order = cluster.order(&blob);
    let download = Download::default();
    let mut clients: JoinSet<Outcome> = JoinSet::new();
    for client in 0..CLIENTS as usize {
        let (download, blob, from) = (download.clone(), blob.clone(), cluster.nodes[order[1 + client % 2]].public());
        clients.spawn(async move { download.of(&blob, from).await });
    }
    let most = CLIENTS * (large() / 2 - 4 * MIB);
    eventually("everybody has about half", async || (download.received.load(Ordering::Relaxed) >= most).then_some(())).await;
    assert_eq!((clients.len() as u64, origin.gets(&blob)), (CLIENTS, 1));
    let started = Instant::now();
    what(&mut cluster.nodes[order[0]]).await;
    // The origin still holds the owner's load. Nodes that go on without the owner need another one.
    let all = async {
        while let Some(client) = clients.join_next().await {
            client.unwrap().assert_is(&blob);
        }
    };
    within(Duration::from_secs(240), "every client's blob", all).await;
    println!("all had the rest after {:?}", started.elapsed());
    gate.open();
    let seen = origin.requests("GET", &blob);
    assert!((2..=3).contains(&seen.len()), "the next in order loads the rest, or both others do: {seen:?}");
    for resumed in &seen[1..] {
        let from: u64 = resumed.range().and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()).expect("a resume");
        assert!(from > large() / 4, "from the middle: {from}");
    }
    for node in [order[1], order[2]].map(|index| &cluster.nodes[index]) {
        assert_ledger(node.castier()).await;
        // Once the owner is known to be down, no node asks it.
        wait_for_peers(node, 1, 1).await;
        let other = owned_by(&origin, &cluster, order[0]);
        let errors = node.metrics().await.total("castier_peer_errors_total");
        let started = Instant::now();
        get(node.public(), &other).await.assert_is(&other);
        assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
        assert_eq!(node.metrics().await.total("castier_peer_errors_total"), errors);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_that_is_killed_midway_is_not_missed() {
    let _turn = heavy().await;
    owner_fails(async |owner| owner.kill().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_that_stops_midway_is_not_missed() {
    let _turn = heavy().await;
    owner_fails(async |owner| owner.signal(Signal::STOP)).await;
}

/// A hot blob: soon every node has it, and its owner has no more load than the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_that_everyone_wants_is_everywhere() {
    const CLIENTS: usize = 30;
    const REQUESTS: usize = 50_000;
    let _turn = heavy().await;
    let origin = LyingOrigin::start().await;
    let cluster = Cluster::start(3, &origin.url(), "log.level = \"warn\"").await;
    let blob = origin.blob(16 * KIB);
    let owner = cluster.owner(&blob);
    // Requests at this node that a tier of its own answered, and all, of those after the first second.
    let (hits, asked) = (Arc::new(std::sync::atomic::AtomicU64::new(0)), Arc::new(std::sync::atomic::AtomicU64::new(0)));
    let mut clients = JoinSet::new();
    let start = Instant::now();
    for client in 0..CLIENTS {
        let (blob, node, hits, asked) = (blob.clone(), cluster.nodes[client % 3].public(), hits.clone(), asked.clone());
        clients.spawn(async move {
            let mut conn = Conn::open(node).await;
            let request = Request::get(blob.path());
            for _ in 0..REQUESTS.div_ceil(CLIENTS) {
                let late = start.elapsed() > Duration::from_secs(1);
                let reply = conn.ask(&request).await;
                reply.assert_is(&blob);
                asked.fetch_add(u64::from(late), Ordering::Relaxed);
                hits.fetch_add(u64::from(late && reply.cache_status().starts_with("castier; hit")), Ordering::Relaxed);
            }
        });
    }
    within(Duration::from_secs(120), "every answer", clients.join_all()).await;
    let (hits, asked) = (hits.load(Ordering::Relaxed), asked.load(Ordering::Relaxed));
    println!("{REQUESTS} requests in {:?}; {asked} of them after the first second, {hits} answered by the node asked", start.elapsed());
    let mut loads = Vec::new();
    for node in &cluster.nodes {
        loads.push(node.metrics().await.sum("castier_http_requests_total", &[("route", "blob")]));
    }
    println!("requests at each node: {loads:?}, owner {owner}");
    let others = loads.iter().enumerate().filter(|(index, _)| *index != owner).map(|(_, load)| *load);
    assert!(others.into_iter().all(|other| loads[owner] as f64 <= 1.2 * other as f64), "the owner has more to do: {loads:?}");
    assert!(asked == 0 || hits as f64 > 0.95 * asked as f64, "{hits} of {asked}");
    let peers = cluster.sum("castier_gets_from_peers_total", &[]).await;
    assert!(peers < REQUESTS as u64 / 100, "{peers} of {REQUESTS} went on to the owner");
    assert_eq!(origin.gets(&blob), 1);
    assert_ledgers(&cluster).await;
}

/// Each node has a different list of members, and all of them have clients.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_disagree_on_the_members_serve_all_the_same() {
    const BLOBS: usize = 60;
    let _turn = heavy().await;
    let origin = LyingOrigin::start().await;
    let mut cluster = Cluster { nodes: (0..3).map(|_| Node::new(&origin.url(), "cluster.peek_for = \"0s\"")).collect() };
    let names = cluster.names();
    // Without itself; with two of three; with one that does not exist.
    let nobody = Node::new(&origin.url(), "").name;
    cluster.nodes[0].configure(&[names[1].clone(), names[2].clone()]);
    cluster.nodes[1].configure(&[names[0].clone(), names[1].clone()]);
    cluster.nodes[2].configure(&[names[0].clone(), names[2].clone(), nobody]);
    cluster.start_all().await;
    for round in 0..5 {
        let gate = Gate::new();
        let blobs: Vec<Blob> = (0..BLOBS).map(|_| origin.blob_with(30 * KIB, [Lie::honest().hold(&gate)])).collect();
        let mut clients = JoinSet::new();
        for client in 0..BLOBS * 3 * 4 {
            let (blob, from) = (blobs[client % BLOBS].clone(), cluster.nodes[client / BLOBS % 3].public());
            clients.spawn(async move { get(from, &blob).await.assert_is(&blob) });
        }
        eventually("the origin is asked for all", async || (gate.arrived() == BLOBS).then_some(())).await;
        gate.open();
        within(Duration::from_secs(60), &format!("every answer of round {round}"), clients.join_all()).await;
        for blob in &blobs {
            assert!(origin.gets(blob) <= 3, "more than one load for each view: {}", origin.gets(blob));
        }
    }
    assert_ledgers(&cluster).await;
}

/// A blob that is stored, deleted or purged at one node is so on all nodes.
#[tokio::test]
async fn writes_deletes_and_purges_are_everywhere() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let mut cluster = Cluster::start(3, &origin.url(), &format!("limits.negative_ttl = \"1h\"\n{DISK}")).await;
    for (round, size) in [1000, 100 * KIB, 3 * MIB].into_iter().cycle().take(12).enumerate() {
        let blob = Blob::new(size);
        let node = |step: usize| &cluster.nodes[(round + step) % 3];
        for step in 0..3 {
            get(node(step).public(), &blob).await.assert_problem(404);
        }
        let stored = if round % 2 == 0 {
            Request::new("PUT", blob.path()).body(blob.whole()).send(node(0).public()).await
        } else {
            Request::new("POST", "/cas").body(blob.whole()).send(node(0).public()).await
        };
        assert_eq!(stored.status, 201);
        for step in 0..3 {
            get(node(step).public(), &blob).await.assert_is(&blob);
        }
        assert_eq!(origin.requests("PUT", &blob).len() + usize::from(round % 2 == 1), 1, "stored once");
        let told = Request::new("POST", format!("/purge/{}", blob.digest)).send(node(1).castier().admin).await;
        assert_eq!(told.status, 200);
        let mut told: serde_json::Value = serde_json::from_slice(&told.body).unwrap();
        told["purged"].as_array_mut().unwrap().sort_by_key(ToString::to_string);
        let mut all = cluster.names();
        all.sort();
        assert_eq!(told, serde_json::json!({ "purged": all, "failed": [] }));
        let before = origin.gets(&blob);
        for step in 0..3 {
            get(node(step).public(), &blob).await.assert_is(&blob);
        }
        assert_eq!(origin.gets(&blob), before + 1, "purged everywhere, and loaded anew by one");
        assert_eq!(Request::new("DELETE", blob.path()).send(node(2).public()).await.status, 204);
        for step in 0..3 {
            get(node(step).public(), &blob).await.assert_problem(404);
        }
        assert_eq!(origin.requests("DELETE", &blob).len(), 1);
    }
    assert_ledgers(&cluster).await;
    // The answer names the nodes that did not answer.
    let gone = cluster.nodes[2].name.clone();
    cluster.nodes[2].kill().await;
    let told = Request::new("POST", format!("/purge/{}", Blob::new(5).digest)).send(cluster.nodes[0].castier().admin).await;
    let told: serde_json::Value = serde_json::from_slice(&told.body).unwrap();
    assert_eq!((told["failed"].clone(), told["purged"].as_array().unwrap().len()), (serde_json::json!([gone]), 2), "{told}");
    // Uploads work without the owner.
    cluster.nodes.truncate(2);
    for _ in 0..8 {
        let blob = Blob::new(100 * KIB);
        assert_eq!(Request::new("PUT", blob.path()).body(blob.whole()).send(cluster.nodes[0].public()).await.status, 201);
        get(cluster.nodes[1].public(), &blob).await.assert_is(&blob);
    }
    let told = stats(cluster.nodes[0].castier()).await;
    let down = told["cluster"]["members"].as_array().unwrap().iter().filter(|member| member["state"] == "down").count();
    assert_eq!(down, 1, "{told}");
}
