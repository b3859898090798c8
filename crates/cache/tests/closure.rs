//! A closure over a map, held to the contract of sources.

use bytes::Bytes;
use castier_blob::Digest;
use castier_cache::{Answer, Ask, Fault, Incoming, contract};
use futures::{FutureExt as _, future::BoxFuture, stream};
use std::collections::HashMap;

#[tokio::test]
async fn a_closure_is_a_source() {
    let blobs = contract::blobs();
    let map: HashMap<Digest, Bytes> = blobs.iter().map(|blob| (Digest::of(blob), blob.clone())).collect();
    let source = move |ask: Ask| -> BoxFuture<'static, Result<Answer, Fault>> {
        let answer = match map.get(&ask.digest().unwrap()) {
            Some(blob) => {
                let rest = blob.slice(usize::try_from(ask.from).unwrap()..);
                Answer::Bytes(Incoming::new(Some(blob.len() as u64), stream::iter([Ok(rest)])))
            }
            None => Answer::Absent,
        };
        async { Ok(answer) }.boxed()
    };
    contract::source(&source, &blobs).await;
}
