//! What is shared between locations, and what is not: bytes are, absences and faults are not, and private blobs are hidden.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should stop where it is")]

use bytes::Bytes;
use castier_blob::Digest;
use castier_cache::{Answer, Ask, Asker, Cache, Fault, Hit, Incoming, Key, Location, OneSource, Part, Plan, Resource, Source, Visibility};
use futures::{FutureExt as _, future::BoxFuture, future::join_all, stream};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{sync::Semaphore, time::timeout};

/// A source that answers when it may: one answer for each permit.
#[derive(Clone)]
struct Gated {
    body: Option<Bytes>,
    asked: Arc<AtomicUsize>,
    may: Arc<Semaphore>,
}

impl Gated {
    fn new(body: Option<&Bytes>, may: usize) -> Self {
        Self { body: body.cloned(), asked: Arc::default(), may: Arc::new(Semaphore::new(may)) }
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Acquire)
    }

    fn source(&self) -> Arc<dyn Source> {
        let this = self.clone();
        let source = move |ask: Ask| -> BoxFuture<'static, Result<Answer, Fault>> {
            let this = this.clone();
            async move {
                this.asked.fetch_add(1, Ordering::AcqRel);
                this.may.acquire().await.unwrap().forget();
                Ok(match this.body {
                    Some(body) => {
                        let rest = body.slice(ask.from as usize..);
                        Answer::Bytes(Incoming::new(Some(body.len() as u64), stream::iter([Ok(rest)])))
                    }
                    None => Answer::Absent,
                })
            }
            .boxed()
        };
        Arc::new(source)
    }
}

/// A repository of another server.
struct Repository {
    id: u64,
    visibility: Visibility,
    source: Arc<dyn Source>,
}

impl Location for Repository {
    fn plan(&self, _: &Key) -> Box<dyn Plan> {
        Box::new(OneSource(self.source.clone()))
    }

    fn id(&self) -> u64 {
        self.id
    }

    fn visibility(&self) -> Visibility {
        self.visibility
    }
}

fn at(id: u64, visibility: Visibility, source: &Gated, key: Key) -> Resource {
    Resource { key, at: Arc::new(Repository { id, visibility, source: source.source() }) }
}

async fn read(hit: Option<Hit>) -> Option<Vec<u8>> {
    let (mut hit, mut bytes) = (hit?, Vec::new());
    while let Some(piece) = hit.reader.next().await.unwrap() {
        bytes.extend_from_slice(&piece);
    }
    Some(bytes)
}

async fn in_time<T>(work: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(30), work).await.expect("in time")
}

async fn eventually(what: impl Fn() -> bool) {
    in_time(async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_private_blob_is_hidden_until_it_is_published() {
    let body = Bytes::from_static(b"secret of a repository");
    let digest = Digest::of(&body);
    let (origin, upstream) = (Gated::new(Some(&body), 0), Gated::new(Some(&body), 1));
    let cache = Cache::over(origin.source()).unwrap();
    let private = at(7, Visibility::Private, &upstream, Key::Blob(digest));
    assert_eq!(read(cache.get_at(&private, Asker::Client, |_| Part::Whole).await.unwrap()).await.unwrap(), body);
    // For those who have proved that they may.
    assert_eq!(read(cache.get_at(&private, Asker::Client, |_| Part::Whole).await.unwrap()).await.unwrap(), body);
    assert_eq!(upstream.asked(), 1);
    // For nobody else, on no way.
    assert!(cache.peek(&digest, Asker::Client, |_| Part::Whole).is_none());
    assert!(cache.kept(&digest, |_| Part::Whole).await.is_none());
    assert!(cache.kept_size(&digest).await.is_none() && cache.stat(&digest).await.is_none());
    assert!(matches!(cache.get(&digest, Asker::Client, |_| Part::Whole).await, Err(Fault::Hidden)));
    assert_eq!(origin.asked(), 0, "what is kept is not loaded again");
    assert_eq!(cache.kept_size_as(&digest, Visibility::Private).await.map(|(size, _)| size), Some(body.len() as u64));
    cache.publish(&digest);
    assert_eq!(read(cache.get(&digest, Asker::Client, |_| Part::Whole).await.unwrap()).await.unwrap(), body);
    assert_eq!(origin.asked(), 0);
}

#[tokio::test]
async fn nobody_joins_a_private_flight_without_a_proof() {
    let body = Bytes::from(vec![7; 100_000]);
    let digest = Digest::of(&body);
    let (origin, upstream) = (Gated::new(Some(&body), 0), Gated::new(Some(&body), 0));
    let cache = Cache::over(origin.source()).unwrap();
    let private = at(7, Visibility::Private, &upstream, Key::Blob(digest));
    let leading = tokio::spawn({
        let (cache, private) = (cache.clone(), private.clone());
        async move { read(cache.get_at(&private, Asker::Client, |_| Part::Whole).await.unwrap()).await }
    });
    eventually(|| upstream.asked() == 1).await;
    assert!(matches!(in_time(cache.get(&digest, Asker::Client, |_| Part::Whole)).await, Err(Fault::Hidden)));
    cache.publish(&digest);
    let joined = tokio::spawn({
        let cache = cache.clone();
        async move { read(cache.get(&digest, Asker::Client, |_| Part::Whole).await.unwrap()).await }
    });
    upstream.may.add_permits(1);
    assert_eq!((in_time(leading).await.unwrap().unwrap(), in_time(joined).await.unwrap().unwrap()), (body.to_vec(), body.to_vec()));
    assert_eq!((origin.asked(), upstream.asked()), (0, 1));
}

#[tokio::test]
async fn what_one_location_does_not_have_another_may() {
    let body = Bytes::from(vec![9; 10_000]);
    let digest = Digest::of(&body);
    for (first_has, second_has) in [(false, true), (true, false), (false, false)] {
        let origin = Gated::new(None, 0);
        let sources = [first_has, second_has].map(|has| Gated::new(has.then_some(&body), 0));
        let cache = Cache::over(origin.source()).unwrap();
        let get = |number: usize| {
            let (cache, resource) = (cache.clone(), at(number as u64 + 1, Visibility::Public, &sources[number], Key::Blob(digest)));
            tokio::spawn(async move { read(cache.get_at(&resource, Asker::Client, |_| Part::Whole).await.unwrap()).await })
        };
        let leads = get(0);
        eventually(|| sources[0].asked() == 1).await;
        let follows = get(1);
        sources.iter().for_each(|source| source.may.add_permits(1));
        let (leads, follows) = (in_time(leads).await.unwrap(), in_time(follows).await.unwrap());
        assert_eq!((leads.is_some(), follows.is_some()), (first_has, first_has || second_has), "{first_has} {second_has}");
        assert_eq!(sources[1].asked(), usize::from(!first_has), "{first_has} {second_has}");
    }
}

#[tokio::test]
async fn an_absence_of_the_origin_is_not_one_of_a_repository() {
    let body = Bytes::from_static(b"only in the repository");
    let digest = Digest::of(&body);
    let (origin, upstream) = (Gated::new(None, 9), Gated::new(Some(&body), 9));
    let cache = Cache::over(origin.source()).unwrap();
    for _ in 0..2 {
        assert!(cache.get(&digest, Asker::Client, |_| Part::Whole).await.unwrap().is_none());
    }
    assert_eq!(origin.asked(), 1, "it is remembered");
    let public = at(7, Visibility::Public, &upstream, Key::Blob(digest));
    assert_eq!(read(cache.get_at(&public, Asker::Client, |_| Part::Whole).await.unwrap()).await.unwrap(), body);
    assert_eq!(read(cache.get(&digest, Asker::Client, |_| Part::Whole).await.unwrap()).await.unwrap(), body);
}

#[tokio::test]
async fn a_name_is_loaded_once_and_its_body_is_kept_under_its_digest() {
    let body = Bytes::from(vec![3; 300_000]);
    let digest = Digest::of(&body);
    let (origin, upstream) = (Gated::new(None, 0), Gated::new(Some(&body), 0));
    let cache = Cache::over(origin.source()).unwrap();
    let named = at(7, Visibility::Public, &upstream, Key::Name(Digest::of(b"a name")));
    let begun = cache.begin(&named, Asker::Client).unwrap().unwrap();
    assert!(begun.is_at(&named) && cache.has_flight(&named));
    let herd = (0..20).map(|_| {
        let (cache, named) = (cache.clone(), named.clone());
        tokio::spawn(async move { read(cache.get_from_flight(&named, Asker::Client, |_| Part::Whole).await.unwrap()).await })
    });
    let herd: Vec<_> = herd.collect();
    eventually(|| upstream.asked() == 1).await;
    upstream.may.add_permits(1);
    assert_eq!(read(begun.open(|_| Part::Whole).await.unwrap()).await.unwrap(), body);
    // Those that came too late for the flight find the blob.
    for read in join_all(herd).await {
        assert!(read.unwrap().is_none_or(|bytes| bytes == body));
    }
    assert_eq!(read(cache.get(&digest, Asker::Client, |_| Part::Whole).await.unwrap()).await.unwrap(), body);
    assert_eq!((upstream.asked(), origin.asked()), (1, 0));
}
