//! Removes a blob from the tiers of every node.
//!
//! It takes two rounds, since nodes copy blobs from each other:
//! 1. node A removes the blob;
//! 2. node A gets the blob again, from node B, which has not removed it yet;
//! 3. node B removes the blob.
//!
//! After the first round, only such copies are left. The second round removes them.

use crate::{members::Member, peers::Peers};
use backon::{ExponentialBuilder, Retryable as _};
use castier_blob::Digest;
use castier_cache::{Cache, Store};
use futures::future::join_all;
use serde::Serialize;
use std::{sync::Arc, time::Duration};

/// How often a purge is repeated at a node that does not answer.
const RETRIES: usize = 2;
/// The pause before the first retry. It doubles with each retry.
const PAUSE: Duration = Duration::from_millis(200);

/// Purges blobs on this node and its peers.
pub struct Purge {
    cache: Arc<Cache>,
    /// It may remember what is stored.
    origin: Arc<dyn Store>,
    /// `None` if this node is not in a cluster.
    peers: Option<Arc<Peers>>,
    /// This node's name in answers.
    name: String,
}

/// The result of a purge, as `POST /purge/<digest>` gives it.
#[derive(Debug, Default, Serialize)]
pub struct Purged {
    /// The names of the nodes that have removed the blob.
    purged: Vec<String>,
    /// The names of the nodes that did not answer. They may still have the blob.
    failed: Vec<String>,
}

impl Purge {
    /// Purges on this node, called `name`, and on `peers` if there are any.
    pub fn new(cache: Arc<Cache>, origin: Arc<dyn Store>, peers: Option<Arc<Peers>>, name: String) -> Arc<Self> {
        Arc::new(Self { cache, origin, peers, name })
    }

    /// Removes the blob from every member, including those that are down. Runs to its end even if the caller drops the future.
    pub async fn everywhere(self: &Arc<Self>, digest: &Digest) -> Purged {
        let (this, digest) = (self.clone(), *digest);
        let done = tokio::spawn(async move {
            let members = this.others();
            let reached = this.round(&digest, &members).await;
            let reached = this.round(&digest, &reached).await;
            let has = |member: &&Member| reached.iter().any(|reached| reached.name == member.name);
            let names = |members: Vec<&Member>| members.into_iter().map(|member| member.name.to_string()).collect::<Vec<_>>();
            let (purged, failed): (Vec<_>, Vec<_>) = members.iter().partition(has);
            let (mut purged, failed) = (names(purged), names(failed));
            purged.insert(0, this.name.clone());
            if failed.is_empty() {
                tracing::info!(%digest, ?purged, "purged");
            } else {
                tracing::warn!(%digest, ?failed, "purged, except from the failed nodes: they did not answer, and may still serve the blob; purge again");
            }
            Purged { purged, failed }
        });
        done.await.unwrap_or_default()
    }

    fn others(&self) -> Vec<Member> {
        let view = self.peers.as_ref().map(|peers| peers.members().view());
        view.map(|view| view.members().iter().filter(|member| !member.itself).cloned().collect()).unwrap_or_default()
    }

    /// Removes the blob here and at these members. Returns the members that have removed it.
    async fn round(&self, digest: &Digest, members: &[Member]) -> Vec<Member> {
        self.origin.forget(digest);
        self.cache.forget(digest).await;
        let Some(peers) = &self.peers else { return Vec::new() };
        let backoff = ExponentialBuilder::new().with_min_delay(PAUSE).with_max_times(RETRIES).with_jitter();
        let purge = async |member: &Member| {
            let answer = (|| peers.purge(member, digest)).retry(backoff).await;
            answer
                .inspect_err(|fault| tracing::debug!(peer = &*member.name, %fault, "a peer did not confirm a purge"))
                .is_ok()
                .then(|| member.clone())
        };
        join_all(members.iter().map(purge)).await.into_iter().flatten().collect()
    }
}
