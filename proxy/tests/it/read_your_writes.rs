//! After an acknowledgement, every node answers new requests accordingly.

use crate::support::{
    Blob, Castier, Cluster, Conn, Gate, KIB, Lie, LyingOrigin, Request, assert_ledger, client::Reply, cluster::Node, eventually, get, light,
};
use rustix::process::Signal;
use std::net::SocketAddr;
use tokio::task::JoinHandle;

fn put(blob: &Blob) -> Request {
    Request::new("PUT", blob.path()).body(blob.whole())
}

fn spawn(request: Request, to: SocketAddr) -> JoinHandle<Reply> {
    tokio::spawn(async move { request.send(to).await })
}

/// The number of gets that this node has started.
async fn gets(node: &Node) -> u64 {
    node.metrics().await.total("castier_gets_total")
}

/// A third node has a running flight of an absent blob while another node acknowledges its upload.
#[tokio::test]
async fn a_flight_from_before_an_upload_answers_no_get_from_after_it() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let cluster = Cluster::with_secret(3, &origin.url(), "cluster.peek_for = \"0s\"\nlimits.negative_ttl = \"1h\"").await;
    for (method, size) in [("PUT", 1000), ("PUT", 300 * KIB), ("POST", 1000)] {
        let (gate, blob) = (Gate::new(), Blob::new(size));
        let absent = || Lie::honest().hold(&gate).status(404);
        origin.add(&blob);
        origin.next(&blob, [absent()]);
        let order = cluster.order(&blob);
        let [owner, writer, third] = [0, 1, 2].map(|at| &cluster.nodes[order[at]]);
        let early = spawn(Request::get(blob.path()), third.public());
        eventually("the origin is about to say that it is absent", async || (gate.arrived() == 1).then_some(())).await;
        let stored = if method == "PUT" { put(&blob) } else { Request::new("POST", "/cas").body(blob.whole()) };
        let status = stored.send(writer.public()).await.status;
        assert!((200..300).contains(&status), "{status}");
        // From here on no node may answer that it is absent.
        let before = [gets(owner).await, gets(third).await];
        let late = [owner, third].map(|node| spawn(Request::get(blob.path()), node.public()));
        for (node, before) in [owner, third].into_iter().zip(before) {
            eventually("the new get has begun", async || (gets(node).await > before).then_some(())).await;
        }
        gate.open();
        for reply in late {
            reply.await.unwrap().assert_is(&blob);
        }
        early.await.unwrap();
    }
    for node in &cluster.nodes {
        assert_ledger(node.castier()).await;
    }
}

/// The owner remembers an absence, and is up, but cannot take the upload.
#[tokio::test]
async fn an_owner_that_could_not_take_an_upload_forgets_the_absence() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let config =
        "cluster.peek_for = \"0s\"\nlimits.negative_ttl = \"1h\"\ncluster.probe_interval = \"20s\"\ncluster.stall_timeout = \"800ms\"";
    let cluster = Cluster::with_secret(3, &origin.url(), config).await;
    for size in [1000, 300 * KIB] {
        let blob = Blob::new(size);
        let order = cluster.order(&blob);
        let [owner, writer, third] = [0, 1, 2].map(|at| &cluster.nodes[order[at]]);
        for node in [owner, third] {
            get(node.public(), &blob).await.assert_problem(404);
        }
        origin.next_upload(Lie::honest().status(503));
        assert_eq!(put(&blob).send(writer.public()).await.status, 201);
        for node in &cluster.nodes {
            get(node.public(), &blob).await.assert_is(&blob);
        }
        assert_eq!(origin.requests("PUT", &blob).len(), 2, "the owner failed, and this node stored it");
        let _ = (owner, third);
    }
    // One that stands still hears of it as soon as it goes on.
    let blob = Blob::new(1000);
    let order = cluster.order(&blob);
    let [owner, writer, third] = [0, 1, 2].map(|at| &cluster.nodes[order[at]]);
    get(owner.public(), &blob).await.assert_problem(404);
    owner.signal(Signal::STOP);
    // 200: the owner stored it, and stood still before it could say so.
    assert!([200, 201].contains(&put(&blob).send(writer.public()).await.status));
    owner.signal(Signal::CONT);
    eventually("the owner has heard of it", async || (get(owner.public(), &blob).await.status == 200).then_some(())).await;
    get(third.public(), &blob).await.assert_is(&blob);
}

/// A node that asked the origin instead of the owner remembers the absence.
#[tokio::test]
async fn a_stand_in_forgets_the_absence_too() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let config = "cluster.peek_for = \"0s\"\nlimits.negative_ttl = \"1h\"";
    let mut cluster = Cluster::with_secret(3, &origin.url(), config).await;
    let blob = Blob::new(1000);
    let order = cluster.order(&blob);
    // Without the owner, the next in order is the owner.
    cluster.nodes[order[0]].kill().await;
    get(cluster.nodes[order[1]].public(), &blob).await.assert_problem(404);
    cluster.nodes[order[0]].start().await;
    cluster.wait_until_whole().await;
    assert_eq!(put(&blob).send(cluster.nodes[order[2]].public()).await.status, 201);
    for at in order {
        get(cluster.nodes[at].public(), &blob).await.assert_is(&blob);
    }
}

/// The origin has stored an upload and then deleted it, before the node hears that it was stored.
#[tokio::test]
async fn an_upload_that_was_deleted_meanwhile_is_not_kept() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let dir = tempfile::TempDir::new().unwrap();
    let config = format!("disk.path = {:?}\ndisk.capacity = \"1GiB\"\nlimits.negative_ttl = \"0s\"", dir.path());
    let castier = Castier::start(&origin.url(), &config).await;
    // In memory, by PUT and by POST, and in a file of the disk tier.
    for (method, size) in [("PUT", 1000), ("PUT", 300 * KIB), ("POST", 1000), ("POST", 300 * KIB), ("PUT", 9 << 20)] {
        let (gate, blob) = (Gate::new(), Blob::new(size));
        origin.next_upload(Lie::honest().hold_answer(&gate));
        let request = if method == "PUT" { put(&blob) } else { Request::new("POST", "/cas").body(blob.whole()) };
        let upload = spawn(request, castier.public);
        eventually("the origin has stored it", async || (gate.arrived() == 1).then_some(())).await;
        assert_eq!(Request::new("DELETE", blob.path()).send(castier.public).await.status, 204);
        gate.open();
        assert_eq!(upload.await.unwrap().status, 201);
        assert!(!origin.holds(&blob));
        get(castier.public, &blob).await.assert_problem(404);
    }
    // The next upload is kept as ever.
    let blob = Blob::new(1000);
    let mut conn = Conn::open(castier.public).await;
    assert_eq!(conn.ask(&put(&blob)).await.status, 201);
    assert_eq!(conn.ask(&Request::get(blob.path())).await.cache_status(), "castier; hit; detail=memory");
}
