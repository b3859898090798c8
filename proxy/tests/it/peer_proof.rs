//! Proofs between nodes: a peer proves with every answer that it knows the secret.

use crate::support::{
    Blob, Cluster, DEADLINE, KIB, Lie, LyingOrigin, MIB, Request, assert_ledger,
    cluster::{Node, SECRET, wait_for_peers},
    eventually, get, light,
    wire::{Framing, Wire},
    within,
};
use castier_cluster::Ring;
use parking_lot::Mutex;
use rustix::process::Signal;
use std::{
    fs,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio::{
    net::TcpListener,
    task::{JoinHandle, JoinSet},
};

/// An HTTP server that is not castier and answers everything with success: `200` to reads, `201` to writes.
struct Impostor {
    addr: SocketAddr,
    /// The head of every request.
    heads: Arc<Mutex<Vec<String>>>,
    /// Does not answer `/healthz`, so that probes do not detect it.
    accepting: JoinHandle<()>,
}

impl Drop for Impostor {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Impostor {
    /// Answers a HEAD or a GET with `body`.
    async fn start(body: &'static str, answers_probes: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let heads: Arc<Mutex<Vec<String>>> = Arc::default();
        let seen = heads.clone();
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (mut wire, seen) = (Wire::new(stream), seen.clone());
                connections.spawn(async move {
                    while let Ok(Some(head)) = wire.head().await {
                        seen.lock().push(format!("{}\n{:?}", head.first, head.headers));
                        if head.first.starts_with("GET /healthz") && !answers_probes {
                            std::future::pending::<()>().await;
                        }
                        let mut framing = head.framing(Framing::Length(0));
                        while let Ok(Some(_)) = wire.piece(&mut framing, usize::MAX).await {}
                        let (status, body) = match head.first.split(' ').next() {
                            Some("PUT" | "POST") => (201, ""),
                            Some("HEAD") => (200, ""),
                            _ => (200, body),
                        };
                        let length = if head.first.starts_with("HEAD") { 7 } else { body.len() };
                        let answer = format!("HTTP/1.1 {status} Fine\r\nContent-Length: {length}\r\n\r\n{body}");
                        if wire.write(answer.as_bytes()).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Self { addr, heads, accepting }
    }

    fn requests(&self, method: &str) -> usize {
        self.heads.lock().iter().filter(|head| head.starts_with(method)).count()
    }
}

/// A node with a secret, and an impostor at the address of its peer.
async fn beside(impostor: &Impostor, origin: &LyingOrigin, config: &str) -> Node {
    let mut node = Node::new(&origin.url(), config);
    node.add_secret(SECRET);
    node.configure(&[node.name.clone(), impostor.addr.to_string()]);
    node.start().await;
    node
}

async fn put(node: &Node, blob: &Blob) -> u16 {
    Request::new("PUT", blob.path()).body(blob.whole()).send(node.public()).await.status
}

/// New blobs that the impostor would own.
fn its_blobs(node: &Node, impostor: &Impostor, many: usize, size: u64) -> Vec<Blob> {
    let ring = Ring::new([node.name.clone(), impostor.addr.to_string()].map(|name| (name, 1)));
    let its_own = |blob: &Blob| ring.names()[ring.owner(&blob.digest).unwrap()] != node.name;
    std::iter::repeat_with(|| Blob::new(size)).filter(its_own).take(many).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_server_at_a_peers_address_is_no_peer() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let impostor = Impostor::start("all is well\n", true).await;
    let node = beside(&impostor, &origin, "").await;
    for round in 0..40 {
        let blob = Blob::new(1 + round * 5 * KIB);
        let status = put(&node, &blob).await;
        assert!((200..300).contains(&status), "round {round}: {status}");
        assert!(origin.holds(&blob), "round {round}: acknowledged, and the origin has it not");
        let head = Request::new("HEAD", blob.path()).send(node.public()).await;
        assert_eq!(head.header("content-length"), Some(blob.size.to_string().as_str()), "round {round}");
        get(node.public(), &blob).await.assert_is(&blob);
        let other = origin.blob(blob.size);
        let head = Request::new("HEAD", other.path()).send(node.public()).await;
        assert_eq!(head.header("content-length"), Some(other.size.to_string().as_str()), "round {round}");
        get(node.public(), &other).await.assert_is(&other);
    }
    wait_for_peers(&node, 0, 1).await;
    let told = Request::new("POST", format!("/purge/{}", Blob::new(5).digest)).send(node.castier().admin).await;
    let told: serde_json::Value = serde_json::from_slice(&told.body).unwrap();
    assert_eq!(told["failed"], serde_json::json!([impostor.addr.to_string()]), "a purge there is none");
    assert!(impostor.heads.lock().iter().all(|head| !head.contains(SECRET)), "the secret has travelled");
    let output = node.castier().output();
    let down: Vec<_> = output.lines().filter(|line| line.contains("level=warn") && line.contains("is down")).collect();
    assert!(down.len() == 1 && down[0].contains("secret"), "one line that says why: {down:#?}");
    assert!(!output.contains(SECRET));
    assert_ledger(node.castier()).await;
}

/// The same before a probe has detected it: the requests detect it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_impostor_says_is_not_believed_while_it_counts_as_up() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let config = "cluster.probe_interval = \"20s\"\ncluster.probe_timeout = \"20s\"";
    for size in [1000, 300 * KIB, 20 * MIB] {
        let impostor = Impostor::start("", false).await;
        let node = beside(&impostor, &origin, config).await;
        let blobs = its_blobs(&node, &impostor, 3, size);
        let [stored, got, headed] = [0, 1, 2].map(|at| &blobs[at]);
        for blob in [got, headed] {
            origin.add(blob);
        }
        assert_eq!(put(&node, stored).await, 201, "{size}");
        assert!(origin.holds(stored), "{size}");
        get(node.public(), got).await.assert_is(got);
        let head = Request::new("HEAD", headed.path()).send(node.public()).await;
        assert_eq!((head.status, head.header("content-length")), (200, Some(size.to_string().as_str())));
        assert!(impostor.requests("") > 0, "it was asked");
        assert!(impostor.heads.lock().iter().all(|head| !head.contains(SECRET)), "the secret has travelled");
        assert_eq!(node.metrics().await.corrupt("peer") + node.metrics().await.corrupt("origin"), 0);
        assert_ledger(node.castier()).await;
    }
}

/// Memory cannot hold a copy of the upload, so bytes that are sent to a false peer would be lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_too_large_to_repeat_goes_to_no_impostor() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let impostor = Impostor::start("", false).await;
    let config = "cluster.probe_interval = \"20s\"\ncluster.probe_timeout = \"20s\"\nfill.memory = \"1MiB\"\nmemory.max_blob = \"512KiB\"";
    let node = beside(&impostor, &origin, config).await;
    let blob = its_blobs(&node, &impostor, 1, 5 * MIB).remove(0);
    assert_eq!(within(DEADLINE, "the upload", put(&node, &blob)).await, 201);
    assert!(origin.holds(&blob));
    eventually("the failure is counted", async || (node.metrics().await.total("castier_peer_errors_total") > 0).then_some(())).await;
}

/// A node with a secret, and a peer with the secret that can send wrong proofs.
async fn beside_a_peer(origin: &LyingOrigin) -> (LyingOrigin, Node, Ring) {
    let peer = LyingOrigin::with_secret(SECRET).await;
    let mut node = Node::new(&origin.url(), "cluster.peek_for = \"0s\"");
    node.add_secret(SECRET);
    let names = [node.name.clone(), peer.addr.to_string()];
    node.configure(&names);
    node.start().await;
    wait_for_peers(&node, 1, 0).await;
    (peer, node, Ring::new(names.map(|name| (name, 1))))
}

#[tokio::test]
async fn an_answer_to_another_request_is_no_answer() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let (peer, node, ring) = beside_a_peer(&origin).await;
    let blob = |size: u64| {
        let its_own = |blob: &Blob| ring.names()[ring.owner(&blob.digest).unwrap()] != node.name;
        std::iter::repeat_with(|| Blob::new(size)).find(its_own).unwrap()
    };
    let head = async |blob: &Blob| Request::new("HEAD", blob.path()).send(node.public()).await;
    let length = |size: u64| Some(size.to_string());
    // What it proves is believed.
    let sound = blob(1000);
    peer.add(&sound);
    assert_eq!(head(&sound).await.header("content-length").map(str::to_owned), length(1000));
    assert!(origin.requests("HEAD", &sound).is_empty());
    for forge in [|_: &LyingOrigin| String::new(), LyingOrigin::last_proof] {
        // A size.
        let (lied, real) = (blob(1000), 1000);
        origin.add(&lied);
        peer.add(&lied);
        peer.always(&lied, Lie::honest().proof(forge(&peer)).wrong_length(5));
        assert_eq!(head(&lied).await.header("content-length").map(str::to_owned), length(real));
        assert_eq!((peer.requests("HEAD", &lied).len(), origin.requests("HEAD", &lied).len()), (1, 1));
        wait_for_peers(&node, 1, 0).await;
        // An absence, and the very bytes.
        for lie in [Lie::honest().castiers(404), Lie::honest(), Lie::honest().castiers(503)] {
            let wanted = blob(1000);
            origin.add(&wanted);
            peer.add(&wanted);
            peer.always(&wanted, lie.proof(forge(&peer)));
            get(node.public(), &wanted).await.assert_is(&wanted);
            assert_eq!((peer.gets(&wanted), origin.gets(&wanted)), (1, 1));
            wait_for_peers(&node, 1, 0).await;
        }
        // An acknowledgement, of an upload that is sent at once and of one that is streamed.
        for size in [1000, 300 * KIB] {
            let new = blob(size);
            peer.next_upload(Lie::honest().proof(forge(&peer)));
            assert_eq!(put(&node, &new).await, 201);
            assert!(origin.holds(&new), "{size}");
            wait_for_peers(&node, 1, 0).await;
        }
    }
    assert_ledger(node.castier()).await;
}

/// A node does not confirm a purge that is meant for another node.
#[tokio::test]
async fn a_purge_is_confirmed_by_the_node_it_names() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let cluster = Cluster::with_secret(2, &origin.url(), "").await;
    let [one, other] = [&cluster.nodes[0], &cluster.nodes[1]];
    for what in ["purge", "stored"] {
        let request = Request::new("POST", format!("/{what}/{}", Blob::new(5).digest)).body("");
        let ask = async |host: &str| request.clone().header("Host", host).proved(SECRET).send(one.peer()).await.status;
        assert_eq!([ask(&one.name).await, ask("a.name.of.its:1").await, ask(&other.name).await], [204, 204, 421], "{what}");
    }
}

/// The secret is changed on every node while clients store and read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_rotate_under_load() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let cluster = Cluster::with_secret(2, &origin.url(), "cluster.mirror_share = 0.0").await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut clients = JoinSet::new();
    for client in 0..4 {
        let (stop, to, from) = (stop.clone(), cluster.nodes[client % 2].public(), cluster.nodes[1 - client % 2].public());
        clients.spawn(async move {
            let mut rounds = 0;
            while !stop.load(Ordering::Relaxed) {
                let blob = Blob::new(if rounds % 4 == 0 { 100 * KIB } else { 1000 });
                assert_eq!(Request::new("PUT", blob.path()).body(blob.whole()).send(to).await.status, 201);
                get(from, &blob).await.assert_is(&blob);
                rounds += 1;
            }
            rounds
        });
    }
    let new = "another-secret-of-this-cluster";
    for text in [format!("{SECRET}\n{new}"), format!("{new}\n{SECRET}"), new.to_owned()] {
        for node in &cluster.nodes {
            fs::write(node.path("secret"), &text).unwrap();
            node.signal(Signal::HUP);
            // Who is let in tells which secrets are in force.
            let last = text.lines().last().unwrap();
            let first = text.lines().next().unwrap();
            let admits = async |secret: &str| Request::get(Blob::new(9).path()).proved(secret).send(node.peer()).await.status != 403;
            eventually("the secrets are in force", async || {
                (admits(first).await && admits(last).await && (text.contains(SECRET) || !admits(SECRET).await)).then_some(())
            })
            .await;
        }
    }
    stop.store(true, Ordering::Relaxed);
    let rounds: usize = within(DEADLINE, "the clients", clients.join_all()).await.into_iter().sum();
    assert!(rounds > 0);
    for node in &cluster.nodes {
        let told = node.metrics().await;
        assert_eq!((told.total("castier_peer_errors_total"), told.sum("castier_cluster_peers", &[("state", "down")])), (0, 0));
    }
}
