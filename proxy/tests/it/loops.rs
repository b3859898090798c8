//! Loops, in which requests come back to the node that sent them, and chains of castiers without loops.

use crate::support::{Blob, Castier, KIB, LyingOrigin, Reply, Request, get, light};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;

/// A port that is free for now.
async fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port()
}

async fn at(port: u16, origin: &str) -> Castier {
    Castier::start_with(origin, "origin.retries = 0", &[("CASTIER_LISTEN__PUBLIC", &format!("127.0.0.1:{port}"))]).await
}

#[tokio::test]
async fn two_castiers_that_name_each_other() {
    let _turn = light().await;
    let (one, other) = (port().await, port().await);
    let (a, b) = (at(one, &format!("http://127.0.0.1:{other}")).await, at(other, &format!("http://127.0.0.1:{one}")).await);
    let start = Instant::now();
    let reply = Request::get("/x").send(a.public).await;
    assert_eq!(reply.status, 508, "the relay of a relay: {:?}", reply.head);
    let upload = Blob::new(200 * KIB);
    let replies: Vec<Reply> = vec![
        get(a.public, &Blob::new(10)).await,
        Request::new("HEAD", Blob::new(10).path()).send(b.public).await,
        Request::new("PUT", upload.path()).body(upload.whole()).send(a.public).await,
    ];
    for reply in replies {
        assert_eq!(reply.status, 502, "{:?}", reply.head);
    }
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_chain_of_castiers_is_no_loop() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let inner = Castier::start(&origin.url(), "").await;
    let outer = Castier::start(&format!("http://{}", inner.public), "").await;
    let blob = origin.blob(100 * KIB);
    for _ in 0..2 {
        let reply = Request::get(blob.path()).header("Via", "1.1 edge").send(outer.public).await;
        reply.assert_is(&blob);
    }
    let via = origin.requests("GET", &blob)[0].head.header("via").unwrap().to_owned();
    let hops: Vec<_> = via.split(", ").collect();
    assert!(hops.len() == 3 && hops[0] == "1.1 edge" && hops[1..].iter().all(|hop| hop.starts_with("1.1 castier-")), "{via}");
    assert_ne!(hops[1], hops[2]);
    for size in [10, 200 * KIB] {
        let upload = Blob::new(size);
        assert_eq!(Request::new("PUT", upload.path()).body(upload.whole()).send(outer.public).await.status, 201);
        let via = origin.requests("PUT", &upload)[0].head.header("via").unwrap().to_owned();
        assert_eq!(via.matches("castier-").count(), 2, "{via}");
    }
    let text = String::from_utf8(Request::get("/who").send(outer.public).await.body).unwrap();
    assert_eq!(text.matches("castier-").count(), 2, "{text}");
}
