//! The empty blob always exists, for any answer of the origin.

use crate::support::{Blob, Castier, LyingOrigin, Request, assert_ledger, get, light};

#[tokio::test]
async fn the_empty_blob_is_always_there() {
    let _turn = light().await;
    let (origin, empty) = (LyingOrigin::start().await, Blob::of(b""));
    let castier = Castier::start(&origin.url(), "").await;
    assert_eq!(get(origin.addr, &empty).await.status, 404);
    for _ in 0..2 {
        let reply = get(castier.public, &empty).await;
        assert_eq!((reply.status, reply.complete, reply.header("content-length")), (200, true, Some("0")));
        assert_eq!(reply.header("etag"), Some(empty.digest.etag().as_str()));
        let head = Request::new("HEAD", empty.path()).send(castier.public).await;
        assert_eq!((head.status, head.header("content-length")), (200, Some("0")));
        Request::get(empty.path()).header("Range", "bytes=0-").send(castier.public).await.assert_problem(416);
    }
    assert_eq!(Request::new("PUT", empty.path()).body(b"".to_vec()).send(castier.public).await.status, 201);
    get(castier.public, &empty).await.assert_is(&empty);
    assert_ledger(&castier).await;
}
