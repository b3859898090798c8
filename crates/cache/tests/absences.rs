//! What a cache remembers of blobs that are absent.

use bytes::Bytes;
use castier_blob::Digest;
use castier_cache::{Answer, Ask, Asker, Cache, Fault, Incoming, Part, Source};
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use tokio::sync::Semaphore;

/// A source whose first answer breaks before its first byte, whose second says, when it is let go, that the blob is absent, and which then has the blob.
fn source(blob: &Bytes) -> (Arc<dyn Source>, Arc<AtomicU32>, Arc<Semaphore>) {
    let (asked, go_on) = (Arc::new(AtomicU32::new(0)), Arc::new(Semaphore::new(0)));
    let (blob, counter, gate) = (blob.clone(), asked.clone(), go_on.clone());
    let source = move |_: Ask| -> BoxFuture<'static, Result<Answer, Fault>> {
        let (blob, gate, number) = (blob.clone(), gate.clone(), counter.fetch_add(1, Ordering::SeqCst));
        async move {
            let size = Some(blob.len() as u64);
            Ok(match number {
                0 => {
                    let broken = Fault::Unreachable { source_name: "origin", why: "it breaks".into() };
                    Answer::Bytes(Incoming::new(size, stream::iter([Err(broken)])))
                }
                1 => {
                    gate.acquire().await.map_err(|_| Fault::Internal("the gate is gone".into()))?.forget();
                    Answer::Absent
                }
                _ => Answer::Bytes(Incoming::new(size, stream::iter([Ok(blob)]).boxed())),
            })
        }
        .boxed()
    };
    (Arc::new(source), asked, go_on)
}

#[tokio::test]
async fn an_upload_overtakes_a_flight_that_has_no_byte_yet() {
    let blob = Bytes::from(vec![7; 1000]);
    let digest = Digest::of(&blob);
    let (source, asked, go_on) = source(&blob);
    let cache = Cache::over(source).unwrap();
    let early = tokio::spawn({
        let cache = cache.clone();
        async move { cache.get(&digest, Asker::Client, |_| Part::Whole).await.map(|hit| hit.is_some()) }
    });
    while asked.load(Ordering::SeqCst) < 2 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // The absence is on its way, and the blob is stored.
    cache.stored(&digest);
    assert!(cache.is_filling(&digest), "the overtaken flight goes on, and a peer that waits for it is told so");
    let late = tokio::time::timeout(Duration::from_secs(20), cache.get(&digest, Asker::Client, |_| Part::Whole));
    let late = late.await.expect("a get after the upload does not wait for what was asked before").unwrap();
    assert_eq!(late.map(|hit| hit.size), Some(Some(1000)), "a get after the upload was told of an absence from before");
    go_on.add_permits(1);
    assert!(!early.await.unwrap().unwrap(), "the get from before may be told so");
    let later = cache.get(&digest, Asker::Client, |_| Part::Whole).await.unwrap();
    assert!(later.is_some(), "and it is not remembered");
}
