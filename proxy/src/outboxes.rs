//! The outboxes of the cluster: what a node asks the others about what is acknowledged and not yet uploaded, and the answers.
//!
//! A node asks only when the store does not have a blob or does not answer, and before it reads an entry. It asks all members that are up, at once. A
//! member answers from its own outbox and tiers, and asks nobody.

use crate::reply::Reply;
use async_trait::async_trait;
use bytes::Bytes;
use castier_blob::Digest;
use castier_cache::{Answer, Ask, Fault};
use castier_cluster::{Member, Only, Peers};
use castier_outbox::{Others, Outbox, PendingEntry};
use castier_wire::entry::Name;
use futures::future::{join_all, try_join_all};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde::{Deserialize, Serialize};
use std::{sync::Arc, time::Duration};

/// The path of a question about an entry; its name follows, percent-encoded as one segment.
pub(crate) const ENTRY: &str = "/outbox/entry/";
/// The path of the notice that a client deletes a blob; its digest follows.
pub(crate) const DELETED: &str = "/outbox/deleted/";
/// The path of the question how long something has waited.
pub(crate) const STATE: &str = "/outbox";
/// When an entry was accepted, in milliseconds since 1970.
const ACCEPTED: HeaderName = HeaderName::from_static("castier-accepted");
/// The most bytes of a [`State`].
const MOST_STATE: usize = 1024;

/// How much waits in an outbox.
#[derive(Serialize, Deserialize)]
struct State {
    /// How long the oldest blob has waited, in milliseconds.
    oldest_blob_ms: Option<u64>,
}

/// The outboxes of the peers.
pub struct PeerOutboxes {
    peers: Arc<Peers>,
    /// `limits.max_entry`.
    most_entry: usize,
}

impl PeerOutboxes {
    /// The outboxes of these peers. `most_entry`: `limits.max_entry`.
    pub const fn new(peers: Arc<Peers>, most_entry: usize) -> Self {
        Self { peers, most_entry }
    }

    fn up(&self) -> Vec<Member> {
        self.peers.members().view().members().iter().filter(|member| !member.itself && member.up).cloned().collect()
    }

    /// Asks all members that are up, and returns what the first of those says that has something. One that fails makes the whole fail only if none has.
    async fn first<T, F: Future<Output = Result<Option<T>, Fault>> + Send>(&self, ask: impl Fn(Member) -> F) -> Result<Option<T>, Fault> {
        let mut failed = None;
        for answer in join_all(self.up().into_iter().map(ask)).await {
            match answer {
                Ok(Some(found)) => return Ok(Some(found)),
                Ok(None) => {}
                Err(fault) => failed = Some(fault),
            }
        }
        failed.map_or(Ok(None), Err)
    }
}

#[async_trait]
impl Others for PeerOutboxes {
    async fn open(&self, ask: Ask) -> Result<Option<Answer>, Fault> {
        let digest = ask.digest()?;
        let holder = self.first(|member| async move { Ok(self.peers.kept_size(&member, &digest).await?.map(|_| member)) }).await?;
        let Some(member) = holder else { return Ok(None) };
        let answer = self.peers.source(&member, Only::Kept, self.peers.stall_timeout()).open(ask).await?;
        Ok(matches!(answer, Answer::Bytes(_)).then_some(answer))
    }

    async fn stat(&self, digest: &Digest) -> Result<Option<u64>, Fault> {
        self.first(|member| async move { self.peers.kept_size(&member, digest).await }).await
    }

    async fn entry(&self, name: &Name) -> Result<Option<PendingEntry>, Fault> {
        let path = format!("{ENTRY}{}", utf8_percent_encode(name.as_str(), NON_ALPHANUMERIC));
        let (path, most) = (path.as_str(), self.most_entry);
        let ask = |member: Member| async move {
            let (status, headers, body) = self.peers.ask(&member, Method::GET, path, most).await?;
            let at = || headers.get(ACCEPTED)?.to_str().ok()?.parse::<u64>().ok();
            Ok::<_, Fault>(match (status, at()) {
                (StatusCode::OK, Some(at)) => Some(PendingEntry { bytes: Some(body), at }),
                (StatusCode::GONE, Some(at)) => Some(PendingEntry { bytes: None, at }),
                _ => None,
            })
        };
        let answers = try_join_all(self.up().into_iter().map(ask)).await?;
        Ok(answers.into_iter().flatten().max_by_key(|version| version.at))
    }

    async fn take_out(&self, digest: &Digest) -> Result<bool, Fault> {
        let path = format!("{DELETED}{digest}");
        let ask = |member: Member| {
            let path = &path;
            async move { Ok::<_, Fault>(self.peers.ask(&member, Method::POST, path, MOST_STATE).await?.0 == StatusCode::NO_CONTENT) }
        };
        Ok(try_join_all(self.up().into_iter().map(ask)).await?.contains(&true))
    }

    async fn oldest_blob(&self) -> Option<Duration> {
        let ask = |member: Member| async move {
            match self.peers.ask(&member, Method::GET, STATE, MOST_STATE).await {
                Ok((StatusCode::OK, _, body)) => serde_json::from_slice::<State>(&body).ok()?.oldest_blob_ms.map(Duration::from_millis),
                // It has no outbox.
                Ok(_) => None,
                Err(_) => Some(Duration::MAX),
            }
        };
        join_all(self.up().into_iter().map(ask)).await.into_iter().flatten().max()
    }
}

/// The answer to the question of a peer about an entry. `encoded`: its name.
pub(crate) async fn answer_entry(outbox: &Arc<Outbox>, encoded: &str) -> Result<Reply, Fault> {
    let name = percent_decode_str(encoded).decode_utf8().ok().and_then(|name| Name::from_stored(&name));
    let Some(name) = name else { return Ok(Reply::error(StatusCode::BAD_REQUEST, "this is no name of an entry")) };
    let Some(PendingEntry { bytes, at }) = outbox.pending_entry(&name).await? else {
        return Ok(Reply::error(StatusCode::NOT_FOUND, "the outbox has no such entry"));
    };
    let mut headers = HeaderMap::new();
    headers.insert(ACCEPTED, HeaderValue::from(at));
    Ok(match bytes {
        Some(bytes) => Reply::whole(headers, bytes),
        None => Reply { status: StatusCode::GONE, ..Reply::whole(headers, Bytes::new()) },
    })
}

/// The answer to the notice of a peer that a client deletes a blob: whether it was here.
pub(crate) async fn take_out(outbox: &Arc<Outbox>, digest: &Digest) -> Result<Reply, Fault> {
    let was_here = outbox.take_out(digest).await?;
    Ok(if was_here { Reply::done() } else { Reply::error(StatusCode::NOT_FOUND, "the outbox has no such blob") })
}

/// The answer to the question of a peer how long something has waited.
pub(crate) fn answer_state(outbox: &Outbox) -> Reply {
    let oldest = outbox.oldest_blob().map(|waited| u64::try_from(waited.as_millis()).unwrap_or(u64::MAX));
    let body = serde_json::to_vec(&State { oldest_blob_ms: oldest }).unwrap_or_default();
    Reply::whole(HeaderMap::new(), body.into())
}
