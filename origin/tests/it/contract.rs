//! Reading: the request table, headers, conditions, ranges, and what HTTP itself promises.

use crate::support::*;
use castier_blob::Digest;
use castier_wire::blob_path;
use std::{
    io::{BufReader, Read as _, Write as _},
    net::Shutdown,
};

#[test]
fn every_request_has_its_answer() {
    let node = Node::start();
    let small = blob(100, 1);
    let (digest, absent) = (Digest::of(&small), blob_path(&Digest::of(b"absent")));
    let path = blob_path(&digest);
    node.get(&digest).problem(404);
    assert_eq!(node.ask("HEAD", &path, &[], b"").status, 404);
    let stored = node.ask("PUT", &path, &[], &small);
    assert_eq!((stored.status, stored.header("location")), (201, path.as_str()));
    assert_eq!(node.put(&small), 200);
    for method in ["GET", "HEAD"] {
        let answer = node.ask(method, &path, &[], b"");
        assert_eq!((answer.status, answer.complete, answer.body.len()), (200, true, if method == "GET" { 100 } else { 0 }));
        for (name, value) in [
            ("content-type", "application/octet-stream"),
            ("content-length", "100"),
            ("etag", &digest.etag()),
            ("cache-control", "public, max-age=31536000, immutable"),
            ("accept-ranges", "bytes"),
            ("repr-digest", &digest.repr_digest()),
            ("x-content-type-options", "nosniff"),
        ] {
            assert_eq!(answer.header(name), value, "{method} {name}");
        }
        assert!(answer.header("date").ends_with("GMT"));
    }
    assert_eq!(node.get(&digest).body, small);
    for (method, path, status, allow) in [
        ("GET", "/cas/abc", 400, ""),
        ("PUT", "/cas/abc", 400, ""),
        ("GET", "/cas/", 400, ""),
        ("GET", "/cas/../../etc/passwd", 400, ""),
        ("GET", "/cas/%2e%2e", 400, ""),
        ("GET", &path.to_uppercase().replace("CAS", "cas"), 400, ""),
        ("GET", &format!("{path}/x"), 400, ""),
        ("GET", "/", 404, ""),
        ("POST", "/elsewhere", 404, ""),
        ("GET", "/cas", 405, "POST"),
        ("DELETE", &path, 405, "GET, HEAD, PUT"),
        ("DELETE", &absent, 405, "GET, HEAD, PUT"),
        ("POST", &path, 405, "GET, HEAD, PUT"),
        ("BREW", &path, 405, "GET, HEAD, PUT"),
    ] {
        let answer = node.ask(method, path, &[], b"");
        answer.problem(status);
        assert_eq!(answer.header("allow"), allow, "{method} {path}");
    }
    assert_eq!(node.metric("castier_origin_requests_total{code=\"405\",method=\"OTHER\"}"), 1.0);
    assert_eq!(node.metric("castier_origin_requests_total{code=\"200\",method=\"GET\"}"), 2.0);
    assert_eq!(node.metric("castier_origin_request_duration_seconds_count{method=\"HEAD\"}"), 2.0);
    assert!(node.metric("process_resident_memory_bytes") > 0.0);
}

#[test]
fn ranges_and_conditions() {
    let node = Node::start();
    let big = blob(1_000_000, 2);
    let digest = Digest::of(&big);
    let (path, etag, size) = (blob_path(&digest), digest.etag(), big.len());
    assert_eq!(node.put(&big), 201);
    let matching = format!("If-Range: {etag}");
    for (headers, range) in [
        (vec!["Range: bytes=0-0"], 0..1),
        (vec!["Range: bytes=999999-"], size - 1..size),
        (vec!["Range: bytes=-5"], size - 5..size),
        (vec!["Range: bytes=10-700000"], 10..700_001),
        (vec!["Range: bytes=0-99999999"], 0..size),
        (vec!["Range: bytes=2-5", &matching], 2..6),
    ] {
        let answer = node.ask("GET", &path, &headers, b"");
        assert_eq!((answer.status, answer.complete), (206, true), "{headers:?}");
        assert!(answer.body == big[range.clone()], "{headers:?}");
        assert_eq!(answer.header("content-range"), format!("bytes {}-{}/{size}", range.start, range.end - 1));
    }
    for headers in [
        vec!["Range: bytes=9-3"],
        vec!["Range: bytes=0-1,5-6"],
        vec!["Range: lines=1-2"],
        vec!["Range: bytes=x"],
        vec!["Range: bytes=2-5", "If-Range: \"x\""],
        vec!["If-None-Match: \"zz\""],
    ] {
        let answer = node.ask("GET", &path, &headers, b"");
        assert!(answer.status == 200 && answer.body == big, "{headers:?}");
    }
    for range in ["Range: bytes=1000000-", "Range: bytes=-0"] {
        let answer = node.ask("GET", &path, &[range], b"");
        answer.problem(416);
        assert_eq!(answer.header("content-range"), "bytes */1000000");
    }
    for tag in [format!("If-None-Match: W/{etag}"), format!("If-None-Match: \"zz\", {etag}"), "If-None-Match: *".to_owned()] {
        assert_eq!(node.ask("GET", &path, &[&tag], b"").status, 304, "{tag}");
    }
    // Who holds the validator holds the blob: no look-up, so that even one that is not here is "not modified".
    let absent = Digest::of(b"absent");
    let answer = node.ask("GET", &blob_path(&absent), &[&format!("If-None-Match: {}", absent.etag())], b"");
    assert_eq!((answer.status, answer.header("etag")), (304, absent.etag().as_str()));
}

#[test]
fn keep_alive_pipelining_and_old_clients() {
    let node = Node::start();
    let (one, two) = (blob(10, 3), blob(700_000, 4));
    let paths = [&one, &two].map(|bytes| {
        assert_eq!(node.put(bytes), 201);
        blob_path(&Digest::of(bytes))
    });
    let mut stream = connect(node.clients);
    let ask = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
    stream.write_all((ask(&paths[1]) + &ask(&paths[0]) + &ask("/") + &ask(&paths[1])).as_bytes()).unwrap();
    let mut answers = BufReader::new(stream.try_clone().unwrap());
    let mut next = || read_answer(&mut answers, "GET").unwrap();
    assert!(next().body == two);
    assert_eq!(next().body, one);
    next().problem(404);
    assert!(next().body == two);
    stream.write_all(ask(&paths[0]).as_bytes()).unwrap();
    assert_eq!(next().body, one);

    // HTTP/1.0, by a client that says it is done before it listens.
    let mut stream = connect(node.clients);
    stream.write_all(format!("GET {} HTTP/1.0\r\n\r\n", paths[1]).as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert!(all.ends_with(&two));
}

#[test]
fn deleting_is_for_those_who_allowed_it() {
    let node = Node::with(&[("CASTIER_ALLOW_DELETE", "true")]);
    let bytes = blob(10, 5);
    let path = blob_path(&Digest::of(&bytes));
    assert_eq!(node.put(&bytes), 201);
    assert_eq!(node.ask("DELETE", &path, &[], b"").status, 204);
    node.ask("DELETE", &path, &[], b"").problem(404);
    node.ask("GET", &path, &[], b"").problem(404);
    assert_eq!(node.ask("PATCH", &path, &[], b"").header("allow"), "GET, HEAD, PUT, DELETE");
    assert_eq!(node.put(&bytes), 201);
}

#[test]
fn admin_tells_how_it_is() {
    let node = Node::start();
    assert_eq!(ask(node.admin, "GET", "/healthz", &[], b"").status, 200);
    wait_for("ready", || (ask(node.admin, "GET", "/readyz", &[], b"").status == 200).then_some(()));
    ask(node.admin, "GET", "/cas", &[], b"").problem(404);
    ask(node.admin, "POST", "/metrics", &[], b"x").problem(405);
    for seed in 0..3 {
        assert_eq!(node.put(&blob(1000, seed)), 201);
    }
    wait_for("the totals", || (node.metric("castier_origin_blobs") == 3.0 && node.metric("castier_origin_bytes") == 3000.0).then_some(()));
}
