//! Uploads through castier: acknowledged when the origin has the blob, in the tiers at once, and always verified.

use crate::support::{
    Blob, Castier, Cluster, Conn, Gate, KIB, Lie, LyingOrigin, MIB, RealOrigin, Request, assert_ledger, eventually, get, light, metrics,
};
use castier_blob::Digest;
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

async fn world(config: &str) -> (LyingOrigin, Castier) {
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), config).await;
    (origin, castier)
}

fn put(blob: &Blob) -> Request {
    Request::new("PUT", blob.path()).body(blob.whole())
}

fn post(blob: &Blob) -> Request {
    Request::new("POST", "/cas").body(blob.whole())
}

#[tokio::test]
async fn a_put_fills_the_cache() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    for size in [0, 1, 100 * KIB, 3 * MIB, 8 * MIB] {
        let blob = Blob::new(size);
        assert_eq!(put(&blob).send(castier.public).await.status, 201, "{size}");
        assert!(origin.holds(&blob));
        assert_eq!(put(&blob).send(castier.public).await.status, 200, "{size}");
        let hit = get(castier.public, &blob).await;
        hit.assert_is(&blob);
        assert_eq!((hit.cache_status(), origin.gets(&blob)), ("castier; hit; detail=memory", 0), "{size}");
    }
    let large = Blob::new(9 * MIB);
    assert_eq!(put(&large).send(castier.public).await.status, 201);
    get(castier.public, &large).await.assert_is(&large);
    assert_eq!(origin.gets(&large), 1, "too large to keep");
    assert_ledger(&castier).await;
}

#[tokio::test]
async fn a_chunked_put_and_both_kinds_of_post() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let blob = Blob::new(2 * MIB + 3);
    let chunked = Request::new("PUT", blob.path()).chunks(&blob.whole(), 10_000);
    assert_eq!(chunked.send(castier.public).await.status, 201);
    assert!(origin.holds(&blob));
    let form = |blob: &Blob| {
        let mut body = b"--XX\r\nContent-Disposition: form-data; name=\"note\"\r\n\r\nnot the file\r\n".to_vec();
        body.extend_from_slice(b"--XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\n");
        body.extend_from_slice(&blob.whole());
        body.extend_from_slice(b"\r\n--XX--\r\n");
        Request::new("POST", "/cas").header("Content-Type", "multipart/form-data; boundary=XX").body(body)
    };
    for size in [0, 5, 200 * KIB, 3 * MIB] {
        for request in [post as fn(&Blob) -> Request, form] {
            let blob = Blob::new(size);
            let reply = request(&blob).send(castier.public).await;
            assert_eq!(reply.status, 201, "{}", String::from_utf8_lossy(&reply.body));
            assert!(reply.header("location").is_some_and(|place| place.ends_with(&blob.path())), "{:?}", reply.head);
            let told: serde_json::Value = serde_json::from_slice(&reply.body).unwrap();
            assert_eq!(told, serde_json::json!({"digest": blob.digest.to_string(), "size": size}));
            assert!(origin.holds(&blob));
            get(castier.public, &blob).await.assert_is(&blob);
            assert_eq!(origin.gets(&blob), 0, "a POST fills the cache too");
        }
    }
    let no_file = b"--XX\r\nContent-Disposition: form-data; name=\"note\"\r\n\r\nnot a file\r\n--XX--\r\n";
    let request = Request::new("POST", "/cas").header("Content-Type", "multipart/form-data; boundary=XX").body(*no_file);
    request.send(castier.public).await.assert_problem(400);
    let request = Request::new("POST", "/cas").header("Content-Type", "multipart/form-data").body(*no_file);
    request.send(castier.public).await.assert_problem(400);
}

#[tokio::test]
async fn bytes_of_another_blob_are_refused() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    for size in [0, 100, 3 * MIB] {
        let (wanted, other) = (Blob::new(500), Blob::new(size));
        for request in
            [Request::new("PUT", wanted.path()).body(other.whole()), Request::new("PUT", wanted.path()).chunks(&other.whole(), 64 * 1024)]
        {
            let detail = request.send(castier.public).await.assert_problem(422);
            assert!(detail.contains(&other.digest.to_string()), "says what the bytes are: {detail}");
            assert!(!origin.holds(&wanted));
            get(castier.public, &wanted).await.assert_problem(404);
        }
    }
    let books = assert_ledger(&castier).await;
    assert_eq!((books.corrupt("client"), books.kept()), (6, 0));
}

#[tokio::test]
async fn nothing_is_acknowledged_before_the_origin_has_it() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    for request in [put as fn(&Blob) -> Request, post] {
        let (blob, gate) = (Blob::new(200 * KIB), Gate::new());
        origin.next_upload(Lie::honest().hold(&gate));
        let upload = tokio::spawn({
            let (request, to) = (request(&blob), castier.public);
            async move { request.send(to).await }
        });
        eventually("the origin has the bytes", async || (gate.arrived() == 1).then_some(())).await;
        let early = Request::new("HEAD", blob.path()).send(castier.public).await;
        assert_eq!(early.status, 404, "nobody sees what the origin does not have");
        assert!(!upload.is_finished());
        gate.open();
        assert_eq!(upload.await.unwrap().status, 201);
    }
}

#[tokio::test]
async fn an_upload_that_the_origin_does_not_take() {
    let _turn = light().await;
    let (origin, castier) = world("origin.read_timeout = \"500ms\"").await;
    let never = Gate::new();
    for (lie, status) in [
        (Lie::honest().status(507), 507),
        (Lie::honest().status(500), 502),
        (Lie::honest().status(301), 502),
        (Lie::honest().hold(&never), 504),
    ] {
        for request in [put as fn(&Blob) -> Request, post] {
            let blob = Blob::new(500 * KIB);
            origin.next_upload(lie.clone());
            request(&blob).send(castier.public).await.assert_problem(status);
            get(castier.public, &blob).await.assert_problem(404);
        }
    }
    assert_eq!(metrics(&castier).await.kept(), 0);
    // A connection that breaks before any answer may have been kept alive and closed meanwhile. Then the upload begins again.
    for request in [put as fn(&Blob) -> Request, post] {
        let blob = Blob::new(500 * KIB);
        origin.next_upload(Lie::honest().truncate(1));
        let status = request(&blob).send(castier.public).await.status;
        assert!([201, 502].contains(&status), "{status}");
        assert_eq!(origin.holds(&blob), status == 201);
    }
    let blob = Blob::new(500 * KIB);
    assert_eq!(put(&blob).send(castier.public).await.status, 201);
}

#[tokio::test]
async fn a_small_upload_has_a_second_try() {
    let _turn = light().await;
    let (mut origin, castier) = world("").await;
    for request in [put as fn(&Blob) -> Request, post] {
        for (breaks, status) in [(1, 201), (2, 502)] {
            // Over a new connection: one that was idle may have been closed meanwhile, and counts for nothing.
            origin.down().await;
            origin.up().await;
            let blob = Blob::new(30 * KIB);
            (0..breaks).for_each(|_| origin.next_upload(Lie::honest().truncate(1)));
            assert_eq!(request(&blob).send(castier.public).await.status, status, "{breaks}");
            assert_eq!(origin.holds(&blob), status == 201);
        }
    }
}

#[tokio::test]
async fn a_client_that_leaves_in_the_middle_stores_nothing() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let blob = Blob::new(4 * MIB);
    let mut conn = Conn::open(castier.public).await;
    let bytes = put(&blob).bytes();
    assert!(conn.send(&bytes[..bytes.len() - 1000]).await);
    drop(conn);
    eventually("castier has noticed", async || castier.output().contains(&blob.path()).then_some(())).await;
    assert!(!origin.holds(&blob));
    get(castier.public, &blob).await.assert_problem(404);
}

#[tokio::test]
async fn an_absence_is_remembered_until_something_is_stored() {
    let _turn = light().await;
    let (origin, castier) = world("limits.negative_ttl = \"1h\"").await;
    for upload in [put as fn(&Blob) -> Request, post] {
        let blob = Blob::new(1000);
        get(castier.public, &blob).await.assert_problem(404);
        origin.add(&blob);
        for _ in 0..5 {
            get(castier.public, &blob).await.assert_problem(404);
        }
        assert_eq!(origin.gets(&blob), 1, "the origin was asked once");
        origin.forget(&blob);
        assert_eq!(upload(&blob).send(castier.public).await.status, 201);
        get(castier.public, &blob).await.assert_is(&blob);
    }
    let books = assert_ledger(&castier).await;
    assert_eq!(books.source_loads(), [0, 2, 0]);
    assert_eq!(books.total("castier_gets_total"), 14);
}

#[tokio::test]
async fn an_upload_that_need_not_be_sent_ends_an_absence_too() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let cluster = Cluster::start(3, &origin.url(), "limits.negative_ttl = \"1h\"").await;
    for asked in &cluster.nodes {
        let blob = Blob::new(1000);
        for node in &cluster.nodes {
            get(node.public(), &blob).await.assert_problem(404);
        }
        origin.add(&blob);
        let reply = put(&blob).header("Expect", "100-continue").send(asked.public()).await;
        assert_eq!(reply.status, 200, "it is at the origin, past castier");
        for node in &cluster.nodes {
            get(node.public(), &blob).await.assert_is(&blob);
        }
    }
}

#[tokio::test]
async fn an_upload_is_sent_unless_the_origin_says_that_the_blob_is_durable() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let blob = origin.blob(1000);
    origin.ignore_expect();
    // Its HEAD says that the blob is there. Its sync may still go on.
    let reply = put(&blob).header("Expect", "100-continue").send(castier.public).await;
    assert_eq!(reply.status, 200, "it was there");
    let puts = origin.requests("PUT", &blob);
    let asked = puts.iter().filter(|seen| seen.head.header("expect").is_some()).count();
    assert_eq!((asked, puts.len()), (1, 2), "the question had no answer, and the upload was sent");
}

#[tokio::test]
async fn an_origin_that_fails_an_upload_is_no_failure_of_the_owner() {
    let _turn = light().await;
    let mut origin = LyingOrigin::start().await;
    let cluster = Cluster::with_secret(2, &origin.url(), "origin.retries = 0").await;
    origin.down().await;
    for node in &cluster.nodes {
        for _ in 0..10 {
            put(&Blob::new(1000)).send(node.public()).await.assert_problem(502);
        }
    }
    assert_eq!(cluster.sum("castier_peer_errors_total", &[]).await, 0);
    cluster.wait_until_whole().await;
}

#[tokio::test]
async fn an_absence_is_forgotten_in_time() {
    let _turn = light().await;
    let (origin, castier) = world("limits.negative_ttl = \"200ms\"").await;
    let blob = Blob::new(1000);
    get(castier.public, &blob).await.assert_problem(404);
    origin.add(&blob);
    eventually("the blob is found", async || (get(castier.public, &blob).await.status == 200).then_some(())).await;
    assert_eq!(origin.gets(&blob), 2);
    assert_ledger(&castier).await;
}

#[tokio::test]
async fn delete() {
    let _turn = light().await;
    // Whether blobs may be deleted is for their origin to say.
    let origin = RealOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    let blob = Blob::new(1000);
    assert_eq!(Request::new("PUT", blob.path()).body(blob.whole()).send(castier.public).await.status, 201);
    let reply = Request::new("DELETE", blob.path()).send(castier.public).await;
    reply.assert_problem(405);
    let allowed = reply.header("allow").unwrap();
    assert!(["GET", "HEAD", "PUT"].iter().all(|method| allowed.contains(method)) && !allowed.contains("DELETE"), "{allowed}");
    assert_eq!(Request::get(blob.path()).send(origin.addr).await.status, 200);
    get(castier.public, &blob).await.assert_is(&blob);

    let (origin, castier) = world("").await;
    let blob = origin.blob(1000);
    get(castier.public, &blob).await.assert_is(&blob);
    assert_eq!(Request::new("DELETE", blob.path()).send(castier.public).await.status, 204);
    assert!(!origin.holds(&blob));
    get(castier.public, &blob).await.assert_problem(404);
    Request::new("DELETE", blob.path()).send(castier.public).await.assert_problem(404);
    Request::new("DELETE", "/cas/abc").send(castier.public).await.assert_problem(400);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_of_the_origin_among_fifty_puts() {
    let _turn = light().await;
    let mut origin = RealOrigin::start().await;
    let castier = Castier::start(&origin.url(), "limits.negative_ttl = \"1ms\"\norigin.retries = 0").await;
    let acknowledged = Arc::new(AtomicUsize::new(0));
    let outcomes = Arc::new(Mutex::new(Vec::new()));
    let blobs: Vec<_> = (0..50).map(|_| Blob::new(2 * MIB)).collect();
    let uploads: Vec<_> = blobs
        .iter()
        .map(|blob| {
            let (request, to) = (put(blob), castier.public);
            let (acknowledged, outcomes, blob) = (Arc::clone(&acknowledged), Arc::clone(&outcomes), blob.clone());
            tokio::spawn(async move {
                let status = request.send(to).await.status;
                if status == 201 {
                    acknowledged.fetch_add(1, Ordering::SeqCst);
                }
                outcomes.lock().unwrap().push((blob, status));
            })
        })
        .collect();
    eventually("some are acknowledged", async || (acknowledged.load(Ordering::SeqCst) >= 5).then_some(())).await;
    origin.kill().await;
    for upload in uploads {
        upload.await.unwrap();
    }
    origin.restart().await;
    let outcomes = std::mem::take(&mut *outcomes.lock().unwrap());
    println!("{} of 50 acknowledged", acknowledged.load(Ordering::SeqCst));
    assert_eq!(outcomes.len(), 50);
    for (blob, status) in outcomes {
        assert!(matches!(status, 201 | 502 | 504), "{status}");
        for from in [origin.addr, castier.public] {
            let reply = get(from, &blob).await;
            if status == 201 || reply.status == 200 {
                reply.assert_is(&blob);
            } else {
                assert_eq!(reply.status, 404);
            }
        }
    }
    // The same digests can be stored now, though parts of them may be left.
    for blob in &blobs {
        assert!(matches!(put(blob).send(castier.public).await.status, 200 | 201));
        assert_eq!(Digest::of(&get(origin.addr, blob).await.body), blob.digest);
    }
}
