//! The body of an answer, as a flight of the cache: the first answer is at hand when the flight begins, and a transfer that broke goes on with a range.

use super::{
    Route, Shared,
    client::{Asking, Head},
};
use bytes::Bytes;
use castier_blob::Digest;
use castier_cache::{
    Answer, Ask, Asker, Fault, Incoming, Key, Location, Outcome, Owner, Plan, Source, SourceKind, Stat, Step, Then, Visibility,
};
use castier_routes::{
    if_range,
    metadata::{Checker, Expected},
};
use castier_upstream::TracedPlan;
use futures::{
    FutureExt as _, StreamExt as _,
    future::{BoxFuture, ready},
    stream,
};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use parking_lot::Mutex;
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// Notes a body that has verified: its digest and its size.
pub(super) type Done = Arc<dyn Fn(&Digest, u64) + Send + Sync>;

/// What a flight asks the upstream for.
#[derive(Clone)]
pub(super) struct Load {
    pub(super) shared: Arc<Shared>,
    pub(super) route: Arc<Route>,
    pub(super) repository: String,
    pub(super) target: String,
    /// Another server than the upstream.
    pub(super) far: Option<url::Url>,
    /// The headers of the request, as the upstream gets them.
    pub(super) headers: HeaderMap,
    /// The name whose entry is set when the body has verified; none for a blob that needs no headers.
    pub(super) name: Option<Digest>,
    /// The size that the body must have.
    pub(super) size: Option<u64>,
    /// The hash that metadata names, if it is not the key.
    pub(super) expected: Option<Expected>,
    /// Called with the digest and the size once the body has verified.
    pub(super) done: Done,
}

/// The upstream's repository, as a location of the cache.
pub(super) struct Place {
    load: Load,
    head: Option<Arc<Head>>,
    /// The answer that came before the flight began. The first step of the plan takes it.
    first: Mutex<Option<Incoming>>,
    /// Tiers may keep it.
    is_kept: bool,
    /// The first answer comes from another node, which owns the name.
    is_peers: bool,
}

impl Place {
    /// `head` and `first`: the answer that has come already.
    pub(super) fn new(load: Load, head: Option<Arc<Head>>, first: Option<Incoming>, is_peers: bool) -> Arc<Self> {
        Arc::new(Self { load, head, first: Mutex::new(first), is_kept: true, is_peers })
    }

    /// The same place, whose body must have this SHA-256. For a flight by name of a body whose digest is claimed: its own flight would be another
    /// location's.
    pub(super) fn expecting(&self, claim: Digest) -> Arc<Self> {
        let load = Load { expected: Some(Expected::Sha256(claim)), ..self.load.clone() };
        Arc::new(Self {
            load,
            head: self.head.clone(),
            first: Mutex::new(self.first.lock().take()),
            is_kept: self.is_kept,
            is_peers: self.is_peers,
        })
    }

    /// The same, for a body that no tier may keep.
    pub(super) fn unkept(load: Load, head: Arc<Head>, first: Incoming) -> Arc<Self> {
        Arc::new(Self { load, head: Some(head), first: Mutex::new(Some(first)), is_kept: false, is_peers: false })
    }
}

impl Location for Place {
    fn plan(&self, key: &Key) -> Box<dyn Plan> {
        let source = Arc::new(Upstream {
            load: self.load.clone(),
            is_blob: matches!(key, Key::Blob(_)),
            strong: self.head.as_ref().and_then(|head| if_range(&head.headers)),
            modified: self.head.as_ref().and_then(|head| head.headers.get(header::LAST_MODIFIED).cloned()),
            status: self.head.as_ref().map_or(StatusCode::OK, |head| head.status),
            first: Mutex::new(self.first.lock().take()),
            is_wrong: Arc::new(AtomicBool::new(false)),
        });
        let plan = Box::new(OneUpstream {
            source,
            is_peers: self.is_peers,
            done: self.load.done.clone(),
            coming: self.load.name.zip(self.head.clone()).map(|(name, head)| (self.load.shared.clone(), name, head)),
        });
        let (Key::Blob(id) | Key::Name(id)) = key;
        Box::new(TracedPlan::new(plan, *id))
    }

    fn id(&self) -> u64 {
        self.load.route.location(&self.load.repository)
    }

    fn is_kept(&self) -> bool {
        self.is_kept
    }

    fn visibility(&self) -> Visibility {
        if self.load.route.is_private { Visibility::Private } else { Visibility::Public }
    }
}

/// Reads the first answer, and then asks the upstream.
struct OneUpstream {
    source: Arc<Upstream>,
    /// The next step reads the answer of another node.
    is_peers: bool,
    done: Done,
    coming: Option<(Arc<Shared>, Digest, Arc<Head>)>,
}

impl Plan for OneUpstream {
    fn next(&mut self, waiting: Asker) -> Step {
        // Only the first step, and only while no peer waits: what follows asks the upstream itself, so no two nodes wait for each other.
        if std::mem::take(&mut self.is_peers) && waiting == Asker::Client {
            return Step { source: self.source.clone(), from: SourceKind::Peer, owner: Owner::Peer };
        }
        Step { source: self.source.clone(), from: SourceKind::Origin, owner: Owner::ThisNode }
    }

    fn report(&mut self, outcome: Outcome<'_>, _: u64) -> Then {
        if let Outcome::Verified(digest, size) = outcome {
            // Before the flight leaves the map: from here on the name table answers.
            (self.done)(&digest, size);
        }
        Then::Retry
    }

    fn blame(&mut self, _: &Fault) -> bool {
        false
    }
}

impl Drop for OneUpstream {
    fn drop(&mut self) {
        if let Some((shared, name, head)) = &self.coming {
            shared.coming.remove(name, head);
        }
    }
}

/// The upstream as the source of one body.
struct Upstream {
    load: Load,
    /// The bytes have a SHA-256 that is known before they come.
    is_blob: bool,
    /// A strong validator of the first answer, for going on with a range.
    strong: Option<HeaderValue>,
    /// The first answer's `Last-Modified`.
    modified: Option<HeaderValue>,
    status: StatusCode,
    first: Mutex<Option<Incoming>>,
    /// The bytes that came do not have the hash that metadata names.
    is_wrong: Arc<AtomicBool>,
}

impl Upstream {
    async fn again(&self, from: u64) -> Result<Answer, Fault> {
        if from > 0 && (self.is_wrong.swap(false, Ordering::AcqRel) || (!self.is_blob && self.strong.is_none())) {
            return Ok(Answer::StartOver);
        }
        let mut headers = self.load.headers.clone();
        if from > 0 {
            headers.insert(
                header::RANGE,
                HeaderValue::try_from(format!("bytes={from}-")).map_err(|error| Fault::Internal(error.to_string()))?,
            );
            if let Some(strong) = self.strong.as_ref().filter(|_| !self.is_blob) {
                headers.insert(header::IF_RANGE, strong.clone());
            }
        }
        let Load { shared, route, repository, target, far, .. } = &self.load;
        let asking = Asking { route, repository, method: Method::GET, target, far: far.as_ref(), headers: &headers, body: &[] };
        let answered = shared.client.ask(&asking).await?;
        match answered.head.status {
            // It does not go on: its body has changed, or it knows no ranges.
            StatusCode::OK if from > 0 && !self.is_blob => Ok(Answer::StartOver),
            // Some servers do not look at `If-Range` (RFC 9110, section 15.3.7.3: parts of different answers must not be combined).
            StatusCode::PARTIAL_CONTENT if from > 0 && !self.is_blob && !self.is_of_first(&answered.head) => Ok(Answer::StartOver),
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => answered.body(from).map(Answer::Bytes),
            status if from == 0 && status == self.status => answered.body(0).map(Answer::Bytes),
            StatusCode::NOT_FOUND | StatusCode::GONE => Ok(Answer::Absent),
            status => Err(super::client::unusable(format!("status {}", status.as_u16()))),
        }
    }

    /// Whether a part is of the same body as the first answer, as far as its headers tell.
    fn is_of_first(&self, head: &Head) -> bool {
        match (head.headers.get(header::ETAG), &self.modified, head.headers.get(header::LAST_MODIFIED)) {
            (Some(etag), ..) => Some(etag) == self.strong.as_ref(),
            (None, Some(before), Some(now)) => before == now,
            (None, ..) => true,
        }
    }

    /// Cuts a body that is too large for the route, or has another size than it must have.
    fn limit(&self, from: u64, incoming: Incoming) -> Result<Incoming, Fault> {
        let (most, unusable) = (self.load.route.max_body, super::client::unusable);
        match (incoming.size, self.load.size) {
            (Some(size), Some(expected)) if expected != size => Err(unusable(format!("a body of {size} bytes in place of {expected}"))),
            (Some(size), _) if size > most => Err(unusable(format!("a body of {size} bytes, over route.max_body"))),
            (Some(_), _) => Ok(incoming),
            (None, _) => {
                let counted = incoming.bytes.scan(from, move |seen, part| {
                    *seen += part.as_ref().map_or(0, |part| part.len() as u64);
                    let is_over = *seen > most;
                    ready(Some(if is_over { Err(unusable(format!("a body of over {most} bytes (route.max_body)"))) } else { part }))
                });
                Ok(Incoming::new(None, counted))
            }
        }
    }

    /// Checks the bytes on their way against the hash that metadata names. The last of them do not arrive if they are wrong.
    fn check(&self, from: u64, incoming: Incoming) -> Incoming {
        let Some(expected) = self.load.expected.filter(|_| from == 0) else { return incoming };
        let (size, is_wrong) = (incoming.size, self.is_wrong.clone());
        let state = (incoming.bytes, Some(Checker::new(expected)), 0_u64);
        let checked = stream::try_unfold(state, move |(mut bytes, mut checker, mut seen)| {
            let is_wrong = is_wrong.clone();
            async move {
                let next: Option<Bytes> = bytes.next().await.transpose()?;
                let ended = match &next {
                    Some(part) => {
                        if let Some(checker) = &mut checker {
                            checker.update(part);
                        }
                        seen += part.len() as u64;
                        size == Some(seen)
                    }
                    None => true,
                };
                if ended && checker.take().is_some_and(|checker| !checker.matches()) {
                    is_wrong.store(true, Ordering::Release);
                    return Err(super::client::unusable("bytes that do not have the hash that the metadata names"));
                }
                Ok(next.map(|part| (part, (bytes, checker, seen))))
            }
        });
        Incoming::new(size, checked)
    }
}

impl Source for Upstream {
    fn open(&self, ask: Ask) -> BoxFuture<'_, Result<Answer, Fault>> {
        async move {
            let first = self.first.lock().take();
            let answer = match first.filter(|_| ask.from == 0) {
                Some(incoming) => Answer::Bytes(incoming),
                None => self.again(ask.from).await?,
            };
            Ok(match answer {
                Answer::Bytes(incoming) => Answer::Bytes(self.check(ask.from, self.limit(ask.from, incoming)?)),
                other => other,
            })
        }
        .boxed()
    }

    fn stat<'a>(&'a self, _: &'a [Digest]) -> BoxFuture<'a, Result<Vec<Stat>, Fault>> {
        async { Err(Fault::Internal("the upstream of a route is not asked for sizes this way".into())) }.boxed()
    }

    fn url(&self) -> Option<String> {
        Some(self.load.route.base.to_string())
    }
}
