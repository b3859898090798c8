//! Forgetting a blob on every node.
//!
//! Two rounds, since blobs travel between nodes: one that has forgotten can get the blob anew from one that is still to forget. After
//! the first round nobody has it but from such a transfer, and the second catches that.

use crate::{members::Member, upstream::Peers};
use backon::{ExponentialBuilder, Retryable as _};
use castier_blob::Digest;
use castier_cache::Cache;
use futures::future::join_all;
use serde::Serialize;
use std::{sync::Arc, time::Duration};

/// How often a node is told that does not answer, beyond the first time.
const RETRIES: usize = 2;
/// The pause before the first of those; it doubles.
const PAUSE: Duration = Duration::from_millis(200);

/// Makes nodes forget blobs.
pub struct Purge {
    cache: Arc<Cache>,
    /// None: this node is alone.
    peers: Option<Arc<Peers>>,
    /// This node's name in answers.
    name: String,
}

/// Which nodes have forgotten a blob.
#[derive(Debug, Default, Serialize)]
pub struct Purged {
    /// Those that have.
    purged: Vec<String>,
    /// Those that did not answer, and may still keep it.
    failed: Vec<String>,
}

impl Purge {
    /// At this node, and at `peers` if there are any.
    pub fn new(cache: Arc<Cache>, peers: Option<Arc<Peers>>, name: String) -> Arc<Self> {
        Arc::new(Self { cache, peers, name })
    }

    /// Makes every node forget the blob, members that are down included. Goes on to its end even if whoever asked for it has left.
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
                tracing::warn!(%digest, ?failed, "purged, but not from these nodes, which did not answer and may still serve it");
            }
            Purged { purged, failed }
        });
        done.await.unwrap_or_default()
    }

    fn others(&self) -> Vec<Member> {
        let view = self.peers.as_ref().map(|peers| peers.members().view());
        view.map(|view| view.members().iter().filter(|member| !member.itself).cloned().collect()).unwrap_or_default()
    }

    /// Forgets here, and tells these members to; gives those that have.
    async fn round(&self, digest: &Digest, members: &[Member]) -> Vec<Member> {
        self.cache.forget(digest).await;
        let Some(peers) = &self.peers else { return Vec::new() };
        let backoff = ExponentialBuilder::new().with_min_delay(PAUSE).with_max_times(RETRIES).with_jitter();
        let tell = async |member: &Member| {
            let told = (|| peers.purge(member, digest)).retry(backoff).await;
            told.inspect_err(|fault| tracing::debug!(peer = &*member.name, %fault, "a purge did not arrive"))
                .is_ok()
                .then(|| member.clone())
        };
        join_all(members.iter().map(tell)).await.into_iter().flatten().collect()
    }
}
