//! The peer listener: authentication, answers, and no requests to further nodes.

use crate::support::{
    Blob, Cluster, Conn, Gate, KIB, Lie, LyingOrigin, Reply, Request, assert_ledger,
    cluster::{Node, SECRET, wait_for_peers},
    disk::{Cache, kept, scanned},
    eventually, get, light, metrics,
};
use rustix::process::Signal;
use std::fs;
use tokio::net::TcpStream;

const HEADER: &str = "Castier-Proof";

/// Starts nodes with the secret.
async fn cluster(size: usize, origin: &LyingOrigin, config: &str) -> Cluster {
    Cluster::with_secret(size, &origin.url(), config).await
}

fn signed(method: &'static str, path: impl Into<String>) -> Request {
    Request::new(method, path).proved(SECRET)
}

fn kept_only(method: &'static str, blob: &Blob) -> Request {
    signed(method, blob.path()).header("Cache-Control", "no-transform, Only-If-Cached")
}

/// The number of requests at the peer listener with this code.
async fn answered(node: &Node, code: &str) -> u64 {
    node.metrics().await.sum("castier_http_requests_total", &[("listener", "peer"), ("code", code)])
}

#[tokio::test]
async fn only_peers_are_let_in() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let cluster = cluster(1, &origin, "log.level = \"debug\"").await;
    let node = &cluster.nodes[0];
    let (blob, other) = (origin.blob(10 * KIB), Blob::new(1000));
    get(node.public(), &blob).await.assert_is(&blob);
    let wrong = ["", "x", SECRET, "v1 ", "v1 00", &format!("v1 {}", "0".repeat(96)), &format!("v2 {}", "0".repeat(96))];
    let unknown = ["the-secret-of-this-clusteR", "the-secret-of-this-cluster2", "the-secret-of-this-cluste"];
    let refuse = async |request: Request, why: &str| {
        let mut conn = Conn::open(node.peer()).await;
        let detail = conn.ask(&request).await.assert_problem(403);
        assert!(!detail.contains("secret"), "{why}: what would be right is not told: {detail}");
        assert!(conn.closed().await, "{why}");
    };
    let mut refused = 1;
    assert_eq!(Request::new("HEAD", blob.path()).send(node.peer()).await.status, 403);
    for request in [
        // What memory keeps goes by the fast lane.
        Request::get(blob.path()),
        Request::get(blob.path()).header("Range", "bytes=0-9"),
        Request::new("PUT", other.path()).body(other.whole()),
        Request::new("POST", format!("/purge/{}", blob.digest)),
        Request::new("POST", "/healthz"),
        Request::get("/anything"),
    ] {
        refuse(request.clone(), "without a secret").await;
        for proof in wrong {
            refuse(request.clone().header(HEADER, proof), proof).await;
        }
        for secret in unknown {
            refuse(request.clone().proved(secret), secret).await;
        }
        refuse(request.clone().proved(SECRET).header(HEADER, "v1 00"), "twice").await;
        // Asked for something else than was proved.
        let proved = String::from_utf8(Request::get("/anything/else").proved(SECRET).head_bytes()).unwrap();
        let stolen = proved.lines().find_map(|line| line.strip_prefix("castier-proof: ")).unwrap();
        refuse(request.header(HEADER, stolen), "of another request").await;
        refused += 3 + (wrong.len() + unknown.len()) as u64;
    }
    // A refusal is recorded when the other end has closed too.
    eventually("each refusal is counted", async || (answered(node, "403").await == refused).then_some(())).await;
    assert!(!origin.holds(&other));
    signed("GET", blob.path()).send(node.peer()).await.assert_is(&blob);
    let health = Request::get("/healthz").send(node.peer()).await;
    assert_eq!((health.status, &health.body[..]), (200, &b"ok\n"[..]));
    assert!(health.header("castier-node").is_some_and(|node| node.len() == 16), "{:?}", health.head);
    assert!(!node.castier().output().contains(SECRET), "the secret stands in the log");
}

#[tokio::test]
async fn blobs_are_answered_as_to_clients() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let cluster = cluster(1, &origin, "").await;
    let node = &cluster.nodes[0];
    let (blob, large) = (origin.blob(100 * KIB), origin.blob(9 << 20));
    for (blob, keep) in [(&blob, "; stored"), (&large, "")] {
        let reply = signed("GET", blob.path()).send(node.peer()).await;
        reply.assert_is(blob);
        assert_eq!(reply.cache_status(), format!("castier; fwd=uri-miss{keep}; detail=origin"));
    }
    // The fast lane, and then what is too special for it, on one connection.
    let mut conn = Conn::open(node.peer()).await;
    for _ in 0..3 {
        let reply = conn.ask(&signed("GET", blob.path())).await;
        reply.assert_is(&blob);
        assert_eq!(reply.cache_status(), "castier; hit; detail=memory");
    }
    let part = conn.ask(&signed("GET", blob.path()).header("Range", "bytes=1000-1999")).await;
    assert_eq!((part.status, part.body), (206, blob.bytes(1000, 2000)));
    assert_eq!(conn.ask(&signed("GET", blob.path()).header("If-None-Match", format!("\"{}\"", blob.digest))).await.status, 304);
    let head = conn.ask(&signed("HEAD", blob.path())).await;
    assert_eq!((head.status, head.header("content-length")), (200, Some("102400")));
    let absent = conn.ask(&signed("GET", Blob::new(77).path())).await;
    absent.assert_problem(404);
    assert!(absent.cache_status().starts_with("castier; "), "it says whose word that is: {:?}", absent.head);
    conn.ask(&signed("GET", "/cas/abc")).await.assert_problem(400);

    let new = Blob::new(50 * KIB);
    let put = |body: Vec<u8>| signed("PUT", new.path()).body(body);
    put(vec![0; 100]).send(node.peer()).await.assert_problem(422);
    assert_eq!(put(new.whole()).send(node.peer()).await.status, 201);
    assert_eq!(put(new.whole()).send(node.peer()).await.status, 200);
    assert_eq!(signed("GET", new.path()).send(node.peer()).await.cache_status(), "castier; hit; detail=memory");
    assert_eq!(signed("DELETE", new.path()).send(node.peer()).await.status, 204);
    signed("GET", new.path()).send(node.peer()).await.assert_problem(404);
    assert_ledger(node.castier()).await;
    let told = crate::support::stats(node.castier()).await;
    assert_eq!(told["ServerRequests"], told["Gets"], "all gets came from peers: {told}");
}

#[tokio::test]
async fn nothing_goes_further_than_the_origin() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    // A peek is no hop: it asks for what is kept, and starts nothing. Here it would hide who asks the origin.
    let cluster = cluster(2, &origin, "cluster.peek_for = \"0s\"").await;
    for request in [
        signed("GET", "/ac/abc"),
        signed("POST", "/cas").body(b"bytes".to_vec()),
        signed("OPTIONS", "*"),
        signed("BREW", "/pot"),
        signed("GET", "/metrics"),
        signed("POST", "/purge/abc"),
        signed("GET", format!("/purge/{}", Blob::new(1).digest)),
        signed("POST", Blob::new(1).path()),
    ] {
        request.send(cluster.nodes[0].peer()).await.assert_problem(404);
    }
    assert!(origin.seen().iter().all(|seen| seen.digest.is_some()), "something was relayed: {:?}", origin.seen());
    // For any owner, the requested node asks the origin.
    for _ in 0..8 {
        let blob = origin.blob(1000);
        for (asked, node) in cluster.nodes.iter().enumerate() {
            signed("GET", blob.path()).send(node.peer()).await.assert_is(&blob);
            assert_eq!(origin.gets(&blob), asked + 1);
        }
        signed("PUT", blob.path()).body(blob.whole()).send(cluster.nodes[0].peer()).await;
        assert_eq!(origin.requests("PUT", &blob).len(), 1);
    }
    assert_eq!(cluster.sum("castier_source_loads_total", &[("source", "peer")]).await, 0);
}

#[tokio::test]
async fn a_damaged_disk_sends_nothing_further_than_the_origin_either() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let cache = Cache::new();
    let mut cluster = cluster(2, &origin, "cluster.peek_for = \"0s\"").await;
    // Alone, a node keeps everything; then half of it belongs to the other.
    let names = cluster.names();
    let node = &mut cluster.nodes[0];
    node.terminate().await;
    node.add_config(&cache.config("1GiB", ""));
    node.configure(&names[..1]);
    node.start().await;
    let blobs: Vec<_> = (0..30).map(|_| origin.blob(300 * KIB)).collect();
    for blob in &blobs {
        get(node.public(), blob).await.assert_is(blob);
    }
    kept(node.castier(), blobs.len() as u64).await;
    node.terminate().await;
    for file in cache.files() {
        let mut bytes = fs::read(&file.path).unwrap();
        bytes[200 * KIB as usize] ^= 1;
        fs::write(&file.path, bytes).unwrap();
    }
    node.configure(&names);
    node.start().await;
    scanned(node.castier()).await;
    cluster.wait_until_whole().await;
    let node = &cluster.nodes[0];
    let foreign: Vec<_> = blobs.iter().filter(|blob| cluster.owner(blob) == 1).collect();
    assert!(!foreign.is_empty());
    for (blob, range) in foreign.iter().zip([Some("bytes=100000-"), None].into_iter().cycle()) {
        let request = signed("GET", blob.path());
        let reply = range.map_or_else(|| request.clone(), |range| request.clone().header("Range", range)).send(node.peer()).await;
        assert!(reply.complete && reply.body == blob.bytes(blob.size - reply.body.len() as u64, blob.size), "{:?}", reply.head);
        assert_eq!(origin.gets(blob), 2);
    }
    assert_eq!(cluster.sum("castier_source_loads_total", &[("source", "peer")]).await, 0);
}

#[tokio::test]
async fn only_if_cached_starts_nothing() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let cluster = cluster(1, &origin, "limits.negative_ttl = \"0s\"").await;
    let node = &cluster.nodes[0];
    let gate = Gate::new();
    let blob = origin.blob_with(10 * KIB, [Lie::honest().hold(&gate)]);
    let ask = async |method| kept_only(method, &blob).send(node.peer()).await;
    let flying = |reply: &Reply| reply.header("castier-flight").map(str::to_owned);
    let nothing = ask("HEAD").await;
    assert_eq!((nothing.status, flying(&nothing)), (504, None));
    ask("GET").await.assert_problem(504);
    assert!(origin.requests("GET", &blob).is_empty() && origin.requests("HEAD", &blob).is_empty());

    let client = tokio::spawn({
        let (blob, from) = (blob.clone(), node.public());
        async move { get(from, &blob).await }
    });
    eventually("the flight is on its way", async || (gate.arrived() == 1).then_some(())).await;
    let filling = ask("HEAD").await;
    assert_eq!((filling.status, flying(&filling).as_deref()), (504, Some("filling")));
    ask("GET").await.assert_problem(504);
    gate.open();
    client.await.unwrap().assert_is(&blob);
    let head = ask("HEAD").await;
    assert_eq!((head.status, head.header("content-length")), (200, Some("10240")));
    ask("GET").await.assert_is(&blob);
    let part = kept_only("GET", &blob).header("Range", "bytes=5-9").send(node.peer()).await;
    assert_eq!((part.status, part.body), (206, blob.bytes(5, 10)));
    assert_eq!(origin.gets(&blob), 1);
    let books = assert_ledger(node.castier()).await;
    assert_eq!((books.total("castier_gets_total"), books.total("castier_hits_total")), (3, 2), "not finding it is no get");
}

#[tokio::test]
async fn a_peer_may_say_that_a_blob_is_stored_or_to_be_forgotten() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let cluster = cluster(1, &origin, "limits.negative_ttl = \"1h\"").await;
    let node = &cluster.nodes[0];
    let blob = Blob::new(1000);
    get(node.public(), &blob).await.assert_problem(404);
    origin.add(&blob);
    get(node.public(), &blob).await.assert_problem(404);
    let tell = async |what: &str| signed("POST", format!("/{what}/{}", blob.digest)).send(node.peer()).await.status;
    assert_eq!(tell("stored").await, 204);
    get(node.public(), &blob).await.assert_is(&blob);
    assert_eq!(origin.gets(&blob), 2);
    assert_eq!(tell("purge").await, 204);
    get(node.public(), &blob).await.assert_is(&blob);
    assert_eq!(origin.gets(&blob), 3);
    assert_eq!(tell("stored").await, 204, "a blob that is kept is none the worse for it");
    get(node.public(), &blob).await.assert_is(&blob);
    assert_eq!(origin.gets(&blob), 3);
}

#[tokio::test]
async fn clients_that_take_all_connections_do_not_part_the_nodes() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let cluster = cluster(1, &origin, "limits.max_connections = 5\nlimits.max_peer_connections = 5").await;
    let node = &cluster.nodes[0];
    let blob = origin.blob(1000);
    let mut clients = Vec::new();
    for _ in 0..5 {
        let mut conn = Conn::open(node.public()).await;
        conn.ask(&Request::get(blob.path())).await.assert_is(&blob);
        clients.push(conn);
    }
    get(node.public(), &blob).await.assert_problem(503);
    let mut peers = Vec::new();
    for _ in 0..5 {
        let mut conn = Conn::open(node.peer()).await;
        conn.ask(&signed("GET", blob.path())).await.assert_is(&blob);
        peers.push(conn);
    }
    signed("GET", blob.path()).send(node.peer()).await.assert_problem(503);
    eventually("each listener counts its own, and those that were refused are gone", async || {
        let now = metrics(node.castier()).await;
        ((now.total("castier_connections"), now.total("castier_peer_connections")) == (5, 5)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_leaving_node_says_so_before_it_is_gone() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let mut cluster = cluster(2, &origin, "shutdown.grace = \"50s\"").await;
    let mut leaving = cluster.nodes.remove(1);
    let blob = origin.blob(1000);
    leaving.signal(Signal::TERM);
    eventually("it says so", async || (Request::get("/healthz").send(leaving.peer()).await.status == 503).then_some(())).await;
    eventually("clients are told as well", async || TcpStream::connect(leaving.public()).await.is_err().then_some(())).await;
    // It still serves peers that have not heard of it.
    signed("GET", blob.path()).send(leaving.peer()).await.assert_is(&blob);
    wait_for_peers(&cluster.nodes[0], 0, 1).await;
    assert!(TcpStream::connect(leaving.peer()).await.is_ok(), "the other knew before it was gone");
    leaving.ended().await;
}

#[tokio::test]
async fn secrets_are_exchanged_under_way() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let cluster = cluster(2, &origin, "cluster.mirror_share = 0").await;
    let new = "another-secret-of-this-cluster";
    let is_in = async |node: &Node, secret: &str| Request::get(Blob::new(9).path()).proved(secret).send(node.peer()).await.status != 403;
    for (text, admitted) in
        [(format!("{SECRET}\n{new}\n"), [true, true]), (format!("{new}\n{SECRET}\n"), [true, true]), (format!("{new}\n"), [false, true])]
    {
        for node in &cluster.nodes {
            fs::write(node.path("secret"), &text).unwrap();
            node.signal(Signal::HUP);
            let now = async || [is_in(node, SECRET).await, is_in(node, new).await];
            eventually("the secrets are exchanged", async || (now().await == admitted).then_some(())).await;
            // In each step, with one node ahead of the other, they get along.
            for _ in 0..4 {
                let blob = origin.blob(1000);
                for node in &cluster.nodes {
                    get(node.public(), &blob).await.assert_is(&blob);
                }
                assert_eq!(origin.gets(&blob), 1);
            }
        }
    }
    assert_eq!(cluster.sum("castier_peer_errors_total", &[]).await, 0);
}

#[tokio::test]
async fn nodes_with_different_secrets_serve_all_the_same() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let cluster = cluster(2, &origin, "").await;
    fs::write(cluster.nodes[1].path("secret"), "quite-another-secret").unwrap();
    cluster.nodes[1].signal(Signal::HUP);
    let no_peer = async || signed("GET", Blob::new(9).path()).send(cluster.nodes[1].peer()).await.status == 403;
    eventually("the secret is another", async || no_peer().await.then_some(())).await;
    for _ in 0..8 {
        let blob = origin.blob(1000);
        for node in &cluster.nodes {
            get(node.public(), &blob).await.assert_is(&blob);
        }
    }
    for node in &cluster.nodes {
        wait_for_peers(node, 0, 1).await;
        assert!(answered(node, "403").await > 0, "it is counted by who refuses");
        assert_ledger(node.castier()).await;
    }
}

#[tokio::test]
async fn members_change_while_castier_runs() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let cluster = cluster(3, &origin, "").await;
    let node = &cluster.nodes[0];
    let all = cluster.names();
    let members = async || {
        let told = crate::support::stats(node.castier()).await;
        let text = |member: &serde_json::Value| (member["name"].as_str().unwrap().to_owned(), member["state"].as_str().unwrap().to_owned());
        assert_eq!(told["cluster"]["node"].as_str(), Some(node.name.as_str()), "{told}");
        let share: f64 = told["cluster"]["members"].as_array().unwrap().iter().map(|member| member["share"].as_f64().unwrap()).sum();
        assert!((share - 1.0).abs() < 0.01, "{told}");
        told["cluster"]["members"].as_array().unwrap().iter().map(text).collect::<Vec<_>>()
    };
    let expected = |names: &[String]| {
        let mut sorted = names.to_vec();
        sorted.sort();
        let state = |name: String| {
            let state = if name == node.name { "self" } else { "up" };
            (name, state.to_owned())
        };
        sorted.into_iter().map(state).collect::<Vec<_>>()
    };
    assert_eq!(members().await, expected(&all));
    for names in [&all[..2], &all[..], &all[1..]] {
        node.configure(names);
        node.signal(Signal::HUP);
        eventually("the members changed", async || (members().await == expected(names)).then_some(())).await;
    }
    let config = fs::read_to_string(node.path("castier.toml")).unwrap();
    fs::write(node.path("castier.toml"), config + "cluster.stall_timeout = \"3s\"\n").unwrap();
    node.signal(Signal::HUP);
    let warned = |line: &str| line.contains("level=warn") && line.contains("cluster.stall_timeout") && !line.contains("cluster.peers");
    eventually("what needs a restart is named", async || node.castier().output().lines().any(warned).then_some(())).await;
}
