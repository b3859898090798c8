//! Entries and instances through castier: relayed paths, and other paths of blobs.

use crate::support::{Blob, Castier, Gate, KIB, Lie, LyingOrigin, Request, assert_ledger, eventually, light, metrics};
use castier_blob::Digest;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_embedded_origin_keeps_entries() {
    let _turn = light().await;
    let castier = Castier::start("embedded:./origin", "limits.max_entry = \"1MiB\"").await;
    let key = Digest::of(b"key");
    for path in [format!("/ac/{key}"), format!("/team/ac/{key}"), "/kv/a/b".to_owned()] {
        Request::get(&path).send(castier.public).await.assert_problem(404);
        for (bytes, status) in [(&b"one"[..], 201), (b"two, longer", 200)] {
            assert_eq!(Request::new("PUT", &path).body(bytes).send(castier.public).await.status, status, "{path}");
            let reply = Request::get(&path).send(castier.public).await;
            assert_eq!((reply.status, &reply.body[..]), (200, bytes), "{path}: never an older version");
            assert_eq!(reply.header("etag"), Some(Digest::of(bytes).etag().as_str()));
            assert_eq!(
                (reply.header("cache-control"), reply.cache_status()),
                (Some("no-cache"), "castier; fwd=uri-miss; stored; detail=origin")
            );
            // Each request asks, with a condition.
            let again = Request::get(&path).send(castier.public).await;
            assert_eq!((again.status, &again.body[..]), (200, bytes));
            assert_eq!(again.cache_status(), "castier; fwd=stale; fwd-status=304; detail=memory");
        }
        let etag = Digest::of(b"two, longer").etag();
        assert_eq!(Request::get(&path).header("If-None-Match", &etag).send(castier.public).await.status, 304);
        let head = Request::new("HEAD", &path).send(castier.public).await;
        assert_eq!((head.status, head.header("content-length")), (200, Some("11")));
        Request::new("PUT", &path).chunks(&vec![7; 1024 * 1024 + 1], 64 * 1024).send(castier.public).await.assert_problem(413);
        assert_eq!(Request::new("DELETE", &path).send(castier.public).await.status, 204);
        assert_eq!(Request::get(&path).send(castier.public).await.status, 404);
    }
    Request::get("/ac/nokey").send(castier.public).await.assert_problem(400);
    assert_eq!(Request::new("MKCOL", "/kv/c/").send(castier.public).await.status, 201);
    let list = Request::new("PROPFIND", "/kv/").header("Depth", "1").send(castier.public).await;
    assert_eq!(list.status, 207);
    assert!(String::from_utf8(list.body).unwrap().contains("<D:href>/kv/c/</D:href>"));
}

#[tokio::test]
async fn castiers_key_reaches_the_embedded_origin() {
    let _turn = light().await;
    let castier = Castier::start("embedded:./origin", "ac_validation = true").await;
    let (path, blob) = (format!("/ac/{}", Digest::of(b"key")), Blob::new(100));
    // An `ActionResult` whose standard output is that blob.
    let named = [&[10, 64], blob.digest.to_string().as_bytes(), &[16, 100]].concat();
    let entry = [&[6 << 3 | 2, u8::try_from(named.len()).unwrap()], &named[..]].concat();
    assert_eq!(Request::new("PUT", &path).body(&entry[..]).send(castier.public).await.status, 201);
    Request::get(&path).send(castier.public).await.assert_problem(404);
    assert_eq!(Request::new("PUT", blob.path()).body(blob.whole()).send(castier.public).await.status, 201);
    assert_eq!(Request::get(&path).send(castier.public).await.body, entry);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_of_an_instance_is_the_blob() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    let hold = Gate::new();
    let blob = origin.blob_with(300 * KIB, [Lie::honest().hold(&hold)]);
    let paths = [blob.path(), format!("/team{}", blob.path()), format!("/other-1{}", blob.path())];
    let ask = |path: &String, range: Option<&str>| {
        let request = Request::get(path);
        let request = if let Some(range) = range { request.header("Range", range) } else { request };
        let to = castier.public;
        tokio::spawn(async move { request.send(to).await })
    };
    // Three paths, one load.
    let replies: Vec<_> = paths.iter().map(|path| ask(path, None)).collect();
    eventually("the flight is joined", async || (metrics(&castier).await.total("castier_gets_total") == 3).then_some(())).await;
    hold.open();
    for reply in replies {
        reply.await.unwrap().assert_is(&blob);
    }
    assert_eq!(origin.gets(&blob), 1);
    for path in &paths {
        let reply = ask(path, None).await.unwrap();
        reply.assert_is(&blob);
        assert_eq!(reply.cache_status(), "castier; hit; detail=memory", "{path}");
        assert_eq!(ask(path, Some("bytes=10-19")).await.unwrap().body, blob.bytes(10, 20));
        let head = Request::new("HEAD", path).send(castier.public).await;
        assert_eq!((head.status, head.header("content-length")), (200, Some((300 * KIB).to_string().as_str())));
    }
    // So it is stored and deleted.
    let new = Blob::new(1000);
    let path = format!("/team{}", new.path());
    let put = Request::new("PUT", &path).body(new.whole()).send(castier.public).await;
    assert_eq!((put.status, put.header("location")), (201, Some(new.path().as_str())));
    assert_eq!(origin.requests("PUT", &new).len(), 1);
    let reply = Request::get(new.path()).send(castier.public).await;
    assert_eq!((reply.cache_status(), &reply.body), ("castier; hit; detail=memory", &new.whole()));
    Request::new("PUT", &path).body(b"something else".to_vec()).send(castier.public).await.assert_problem(422);
    assert_eq!(Request::new("DELETE", &path).send(castier.public).await.status, 204);
    assert_eq!(Request::get(new.path()).send(castier.public).await.status, 404);
    // Similar paths are not blobs.
    for (path, status) in [
        ("/a/b/cas/", "castier; fwd=bypass"),
        ("/v2/cas/", "castier; fwd=bypass"),
        ("/team/cas/x", "castier; fwd=bypass"),
        // An entry.
        ("/kv/cas/", "castier; fwd=uri-miss; stored; detail=origin"),
    ] {
        let reply = Request::get(format!("{path}{}", blob.digest)).send(castier.public).await;
        assert_eq!(reply.cache_status(), status, "{path}");
    }
    assert_ledger(&castier).await;
}
