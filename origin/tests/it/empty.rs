//! The empty blob: its name alone tells its bytes, so it is there even if nobody stored it.

use crate::support::*;
use castier_blob::Digest;
use castier_wire::blob_path;

#[test]
fn the_empty_blob_is_always_there() {
    let node = Node::with(&[("CASTIER_ALLOW_DELETE", "true")]);
    let path = blob_path(&Digest::EMPTY);
    for _ in ["never stored", "stored and deleted"] {
        for method in ["GET", "HEAD"] {
            let answer = node.ask(method, &path, &[], b"");
            assert_eq!((answer.status, answer.complete, answer.header("content-length")), (200, true, "0"), "{method}");
            assert_eq!(answer.header("etag"), Digest::EMPTY.etag());
        }
        node.ask("GET", &path, &["Range: bytes=0-"], b"").problem(416);
        assert_eq!(node.ask("GET", &path, &["If-None-Match: *"], b"").status, 304);
        assert_eq!(node.put(b""), 201);
        assert_eq!((node.get(&Digest::EMPTY).status, node.put(b"")), (200, 200));
        assert_eq!(node.ask("DELETE", &path, &[], b"").status, 204);
    }
}
