//! Requests over a limit get a clear answer, and others are served.

use crate::support::{
    Blob, Castier, Conn, Gate, KIB, Lie, LyingOrigin, MIB, Reply, Request, assert_ledger, eventually, get, light, metrics,
};

async fn world(config: &str) -> (LyingOrigin, Castier) {
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), config).await;
    (origin, castier)
}

#[track_caller]
fn assert_shed(reply: &Reply) {
    reply.assert_problem(503);
    let after = reply.header("retry-after").and_then(|value| value.parse::<u64>().ok());
    assert!(after.is_some_and(|seconds| (1..=60).contains(&seconds)), "{:?}", reply.head);
}

#[tokio::test]
async fn connections() {
    let _turn = light().await;
    let (origin, castier) = world("limits.max_connections = 10").await;
    let blob = origin.blob(1000);
    let mut held = Vec::new();
    for _ in 0..10 {
        let mut conn = Conn::open(castier.public).await;
        conn.ask(&Request::get(blob.path())).await.assert_is(&blob);
        held.push(conn);
    }
    for _ in 0..20 {
        assert_shed(&get(castier.public, &blob).await);
    }
    assert!(metrics(&castier).await.total("castier_shed_requests_total") >= 20);
    // Those that are in go on being served, and admin is not part of it.
    for conn in &mut held {
        conn.ask(&Request::get(blob.path())).await.assert_is(&blob);
    }
    held.pop();
    eventually("a place is free", async || (get(castier.public, &blob).await.status == 200).then_some(())).await;
    assert_ledger(&castier).await;
}

#[tokio::test]
async fn fills() {
    let _turn = light().await;
    let (origin, castier) = world("fill.max_in_flight = 2\nfill.max_wait = \"300ms\"").await;
    let gate = Gate::new();
    let held: Vec<_> = (0..2).map(|_| origin.blob_with(100 * KIB, [Lie::honest().hold(&gate)])).collect();
    let ask = |blob: &Blob| {
        let (blob, from) = (blob.clone(), castier.public);
        tokio::spawn(async move { get(from, &blob).await })
    };
    let clients: Vec<_> = held.iter().map(|blob| (blob.clone(), ask(blob))).collect();
    eventually("both places are taken", async || (gate.arrived() == 2).then_some(())).await;
    let third = origin.blob(100 * KIB);
    assert_shed(&get(castier.public, &third).await);
    assert_eq!(origin.gets(&third), 0);
    assert!(metrics(&castier).await.total("castier_shed_requests_total") >= 1);
    let joined = ask(&held[0]);
    gate.open();
    for (blob, client) in clients {
        client.await.unwrap().assert_is(&blob);
    }
    joined.await.unwrap().assert_is(&held[0]);
    get(castier.public, &third).await.assert_is(&third);
}

#[tokio::test]
async fn a_fill_waits_for_its_place() {
    let _turn = light().await;
    let (origin, castier) = world("fill.max_in_flight = 1\nfill.max_wait = \"50s\"").await;
    let gate = Gate::new();
    let mut blobs = vec![origin.blob_with(100 * KIB, [Lie::honest().hold(&gate)])];
    blobs.extend((0..20).map(|_| origin.blob(100 * KIB)));
    let ask = |blob: &Blob| {
        let (blob, from) = (blob.clone(), castier.public);
        tokio::spawn(async move { get(from, &blob).await.assert_is(&blob) })
    };
    let mut clients = vec![ask(&blobs[0])];
    eventually("the only place is taken", async || (gate.arrived() == 1).then_some(())).await;
    clients.extend(blobs[1..].iter().map(ask));
    eventually("everybody is waiting", async || (metrics(&castier).await.total("castier_flights_total") == 21).then_some(())).await;
    assert!(blobs[1..].iter().all(|blob| origin.gets(blob) == 0));
    gate.open();
    for client in clients {
        client.await.unwrap();
    }
    assert_eq!(assert_ledger(&castier).await.source_loads(), [21, 0, 0]);
}

#[tokio::test]
async fn requests_at_the_origin() {
    let _turn = light().await;
    let (origin, castier) = world("origin.max_requests = 2\norigin.read_timeout = \"1s\"").await;
    let gate = Gate::new();
    origin.freeze(&gate);
    let ask = |request: Request| {
        let to = castier.public;
        tokio::spawn(async move { request.send(to).await })
    };
    let blobs: Vec<_> = (0..12).map(|n| Blob::of(format!("upload {n}").as_bytes())).collect();
    let clients: Vec<_> = blobs
        .iter()
        .flat_map(|blob| [Request::new("PUT", blob.path()).body(blob.whole()), Request::new("HEAD", blob.path())])
        .map(ask)
        .collect();
    let mut shed = 0;
    for client in clients {
        let reply = client.await.unwrap();
        match reply.status {
            503 => shed += 1,
            status => assert_eq!(status, 504),
        }
    }
    // As the first two are given up, two more may come in, if they have not been given up at the same moment. castier's own question
    // whether the origin lives may be among them.
    let arrived = blobs.iter().map(|blob| origin.requests("PUT", blob).len() + origin.requests("HEAD", blob).len()).sum::<usize>();
    assert!((1..=4).contains(&arrived), "{arrived}");
    assert_eq!(shed, 2 * blobs.len() - arrived);
    assert!(metrics(&castier).await.sum("castier_shed_requests_total", &[("reason", "requests")]) >= shed as u64);
    gate.open();
    for blob in &blobs {
        // Some of what was given up has been stored all the same.
        assert!(matches!(Request::new("PUT", blob.path()).body(blob.whole()).send(castier.public).await.status, 200 | 201));
    }
    assert_ledger(&castier).await;
}

#[tokio::test]
async fn uploads() {
    let _turn = light().await;
    let (origin, castier) = world("limits.max_blob = \"1MiB\"\nmemory.max_blob = \"1MiB\"").await;
    let (fits, too_large) = (Blob::new(MIB), Blob::new(MIB + 1));
    assert_eq!(Request::new("PUT", fits.path()).body(fits.whole()).send(castier.public).await.status, 201);
    for request in [
        Request::new("PUT", too_large.path()).body(too_large.whole()),
        Request::new("PUT", too_large.path()).chunks(&too_large.whole(), 10_000),
        Request::new("POST", "/cas").body(too_large.whole()),
        Request::new("POST", "/cas").chunks(&too_large.whole(), 10_000),
    ] {
        request.send(castier.public).await.assert_problem(413);
    }
    assert!(!origin.holds(&too_large));
    // Said at once where the length is declared, before any of it has come.
    let mut conn = Conn::open(castier.public).await;
    conn.send(&Request::new("PUT", too_large.path()).header("Content-Length", "99999999999").bytes()).await;
    conn.reply("PUT").await.assert_problem(413);
    // An endless one is cut off at the limit: castier neither takes all of it nor waits for its end.
    let mut conn = Conn::open(castier.public).await;
    conn.send(&Request::new("PUT", too_large.path()).header("Transfer-Encoding", "chunked").bytes()).await;
    let chunk = [b"10000\r\n".as_slice(), &[b'x'; 0x10000], b"\r\n"].concat();
    for _ in 0..17 {
        conn.send(&chunk).await;
    }
    conn.reply("PUT").await.assert_problem(413);
    get(castier.public, &fits).await.assert_is(&fits);
}

#[tokio::test]
async fn a_silent_upload() {
    let _turn = light().await;
    let (origin, castier) = world("limits.idle_timeout = \"500ms\"").await;
    let blob = Blob::new(100 * KIB);
    let bytes = Request::new("PUT", blob.path()).body(blob.whole()).bytes();
    let mut conn = Conn::open(castier.public).await;
    conn.send(&bytes[..bytes.len() / 2]).await;
    conn.reply("PUT").await.assert_problem(408);
    assert!(conn.closed().await);
    assert!(!origin.holds(&blob));
}

#[tokio::test]
async fn a_client_that_takes_nothing() {
    let _turn = light().await;
    let (origin, castier) = world("limits.write_timeout = \"1s\"\nmemory.max_blob = \"32MiB\"").await;
    // More than the kernel takes on anyone's behalf: too large to keep, and then kept: from a flight and from memory.
    let (passing, kept) = (origin.blob(40 * MIB), origin.blob(32 * MIB));
    for (round, blob) in [&passing, &kept, &kept].into_iter().enumerate() {
        let mut conn = Conn::narrow(castier.public).await;
        conn.send(&Request::get(blob.path()).bytes()).await;
        assert!(conn.head().await.unwrap().first.contains(" 200 "));
        let records = || castier.output().lines().filter(|line| line.contains("/cas/")).count();
        eventually("castier gives up on it", async || (records() == round + 1).then_some(())).await;
        let mut framing = crate::support::wire::Framing::Length(blob.size);
        let end = loop {
            match conn.wire.piece(&mut framing, usize::MAX).await {
                Ok(Some(_)) => {}
                end => break end.map(|_| ()),
            }
        };
        assert!(end.is_err(), "cut, so that it cannot be mistaken for the whole");
    }
    assert_ledger(&castier).await;
}

#[tokio::test]
async fn remembered_absences() {
    let _turn = light().await;
    let (origin, castier) = world("limits.max_negative = 10\nlimits.negative_ttl = \"1h\"").await;
    let blobs: Vec<_> = (0..100).map(|n| Blob::of(format!("absent {n}").as_bytes())).collect();
    for blob in &blobs {
        get(castier.public, blob).await.assert_problem(404);
    }
    let asked = async || {
        let mut asked = 0;
        for blob in &blobs {
            get(castier.public, blob).await.assert_problem(404);
            asked += origin.gets(blob) - 1;
        }
        asked
    };
    assert!(asked().await >= 80, "no more than ten are remembered");
    assert_ledger(&castier).await;
}
