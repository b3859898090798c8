//! The members of the cluster, and which of them are up. From this follows which peers to ask for a digest.
//!
//! The list of members comes from `cluster.peers`, or from `cluster.dns`, which is looked up periodically. Probes and the results of
//! requests show which members are up. All of it is one immutable [`View`], which each change replaces.
//!
//! - If the list cannot be fetched, or is empty, the members stay as they are: a broken name server must not break a working cluster.
//! - The list may lack this node, for example during a rolling start. Then this node owns nothing, and asks the others like any member.
//! - The list may have this node under several names. It recognises `cluster.advertise` at once, and any other name by the answer to the
//!   first probe. Otherwise a fill could ask its own node for the blob, and wait for itself.
//! - This node counts as up.

mod dns;
mod health;
mod status;

pub(crate) use health::{Probe, Report};
pub use status::{MemberFigures, MemberStatus, Status};

use crate::{
    metrics::{Metrics, PeerSeries},
    ring::Ring,
};
use castier_blob::Digest;
use castier_config::{Cluster, Peer};
use dns::{Dns, Resolve};
use health::{Evidence, PeerHealth, ProbeTiming};
use http::HeaderName;
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, HashMap},
    hash::{BuildHasher, RandomState},
    sync::{Arc, Weak},
    time::{Duration, SystemTime},
};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use tokio_util::task::AbortOnDropHandle;

/// The header with [`Members::node`] in the answer to `GET /healthz` on the peer listener. By it a node recognises itself under another
/// name.
pub const NODE: HeaderName = HeaderName::from_static("castier-node");

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// `HOST:PORT`: its name on the ring, in logs, and in `Host`.
    pub name: Arc<str>,
    /// A host name or an address, without brackets.
    pub host: String,
    /// The port of its peer listener.
    pub port: u16,
    /// Whether it is this node.
    pub itself: bool,
    /// Whether it is up.
    pub up: bool,
}

/// The members at one moment.
#[derive(Clone, Debug)]
pub struct View {
    ring: Arc<Ring>,
    /// In the order of the ring's indices.
    members: Vec<Member>,
    /// When a member last joined, left, went down or came up. Since then some digests have another owner.
    pub changed_at: Instant,
}

impl View {
    /// All members, up or down, sorted by name.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The ring. Its indices are those of [`Self::members`].
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// The members that are up, in the digest's fail-over order. A caller stops at this node itself: the members after it would ask this
    /// node.
    pub fn order(&self, digest: &Digest) -> impl Iterator<Item = &Member> {
        self.ring.order(digest).filter_map(|index| self.members.get(index)).filter(|member| member.up)
    }

    /// The member that owns the digest now; `None` if no member is up.
    pub fn owner(&self, digest: &Digest) -> Option<&Member> {
        self.order(digest).next()
    }

    fn find(&self, name: &str) -> Option<usize> {
        self.members.iter().position(|member| &*member.name == name)
    }
}

/// Keeps the [`View`] up to date. Dropping it ends the probes and look-ups.
pub struct Members {
    /// This node's name on the ring.
    advertise: String,
    /// Random for each process, so that no two processes share it.
    node: String,
    view: watch::Sender<Arc<View>>,
    /// Every peer that is probed. A thread that changes the view holds this lock, so that no change is lost.
    watched: Mutex<HashMap<Arc<str>, WatchedPeer>>,
    probe: Arc<dyn Probe>,
    timing: ProbeTiming,
    metrics: Arc<Metrics>,
    lookups: Mutex<Option<AbortOnDropHandle<()>>>,
}

struct WatchedPeer {
    health: PeerHealth,
    /// When it last went down or came up.
    since: Option<SystemTime>,
    /// How long the last probe took.
    probe: Option<Duration>,
    series: PeerSeries,
    /// Triggers a probe at once.
    probe_now: Arc<Notify>,
    _probing: AbortOnDropHandle<()>,
}

impl Members {
    /// Starts probes, and look-ups if `cluster.dns` is set. Then there are no members until the first look-up is done; see
    /// [`Self::subscribe`].
    ///
    /// # Errors
    /// A text that names the invalid key.
    pub fn start(config: &Cluster, probe: Arc<dyn Probe>, metrics: Arc<Metrics>) -> Result<Arc<Self>, String> {
        let resolve = if config.dns.is_empty() { None } else { Some(Arc::new(Dns::new(config)?) as Arc<dyn Resolve>) };
        Self::start_with(config, resolve, probe, metrics)
    }

    fn start_with(
        config: &Cluster,
        resolve: Option<Arc<dyn Resolve>>,
        probe: Arc<dyn Probe>,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>, String> {
        let advertise = config.advertise.parse::<Peer>().map_err(|error| format!("cluster.advertise: {error}"))?.name();
        let empty = View { ring: Arc::default(), members: Vec::new(), changed_at: Instant::now() };
        let members = Arc::new(Self {
            advertise,
            node: format!("{:016x}", RandomState::new().hash_one(std::process::id())),
            view: watch::Sender::new(Arc::new(empty)),
            watched: Mutex::default(),
            probe,
            timing: ProbeTiming { interval: config.probe_interval.get(), timeout: config.probe_timeout.get() },
            metrics,
            lookups: Mutex::default(),
        });
        match resolve {
            None => members.set_peers(&config.peers),
            Some(resolve) => {
                let looking = look_up(Arc::downgrade(&members), resolve, config.dns.clone(), config.refresh.get());
                *members.lookups.lock() = Some(AbortOnDropHandle::new(tokio::spawn(looking)));
            }
        }
        Ok(members)
    }

    /// This process's random name, sent in the header [`NODE`].
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The members now.
    pub fn view(&self) -> Arc<View> {
        self.view.borrow().clone()
    }

    /// The members now, and each change.
    pub fn subscribe(&self) -> watch::Receiver<Arc<View>> {
        self.view.subscribe()
    }

    /// Replaces the list of members. An empty list counts as a mistake, and changes nothing.
    pub fn set_peers(self: &Arc<Self>, peers: &[Peer]) {
        let mut watched = self.watched.lock();
        let old = self.view();
        let ring = Ring::new(peers.iter().map(|peer| (peer.name(), peer.weight.into())));
        if peers.is_empty() || ring == *old.ring {
            return;
        }
        let by_name: BTreeMap<_, _> = peers.iter().map(|peer| (peer.name(), peer)).collect();
        let member = |(name, peer): (&String, &&Peer)| match old.find(name) {
            Some(known) => old.members[known].clone(),
            None => Member {
                name: name.as_str().into(),
                host: peer.host.clone(),
                port: peer.port,
                itself: *name == self.advertise,
                // A new member counts as up. A refused connection takes it down at once.
                up: true,
            },
        };
        // A BTreeMap, since the ring is sorted by name too.
        let members: Vec<_> = by_name.iter().map(member).collect();
        let names = |members: &[Member], known: &View| {
            members.iter().filter(|member| known.find(&member.name).is_none()).map(|member| member.name.to_string()).collect::<Vec<_>>()
        };
        self.metrics.set_members_hash(ring.fingerprint());
        let new = View { ring: Arc::new(ring), members, changed_at: Instant::now() };
        let (joined, left) = (names(&new.members, &old), names(&old.members, &new));
        tracing::info!(members = new.members.len(), ?joined, ?left, "the cluster changed");
        if !new.members.iter().any(|member| member.itself) {
            tracing::warn!(
                advertise = self.advertise,
                "this node is not among the members: it owns no blobs, and asks the members for them"
            );
        }
        watched.retain(|name, _| new.find(name).is_some());
        for member in new.members.iter().filter(|member| !member.itself) {
            watched.entry(member.name.clone()).or_insert_with(|| self.watch(member));
        }
        self.publish(new);
    }

    /// The data path reports the outcome of a request to this member.
    pub fn report(&self, member: &str, report: Report) {
        self.learn(member, report.into(), "reported by a request");
    }

    /// Counts a failed request to this member in the metrics only; see [`Self::report`]. Does nothing if the member has left.
    pub fn failed(&self, member: &str) {
        if let Some(peer) = self.watched.lock().get(member) {
            self.metrics.peer_failed(&peer.series);
        }
    }

    fn watch(self: &Arc<Self>, member: &Member) -> WatchedPeer {
        let probe_now = Arc::new(Notify::new());
        let learn = {
            let (members, name) = (Arc::downgrade(self), member.name.clone());
            move |answer, took| members.upgrade().and_then(|members| members.probed(&name, answer, took))
        };
        let probing = health::keep_probing(member.clone(), self.probe.clone(), self.timing, probe_now.clone(), learn);
        let _probing = AbortOnDropHandle::new(tokio::spawn(probing));
        WatchedPeer {
            health: PeerHealth::default(),
            since: None,
            probe: None,
            series: self.metrics.peer(&member.name),
            probe_now,
            _probing,
        }
    }

    /// Records the result of a probe, and how long it took. Returns whether the member is up, or `None` if it must not be probed any more.
    fn probed(&self, name: &str, answer: Result<Option<String>, String>, took: Duration) -> Option<bool> {
        if let Some(peer) = self.watched.lock().get_mut(name) {
            peer.probe = Some(took);
            peer.series.set_probe(took);
        }
        match answer {
            Ok(node) if node.as_deref() == Some(&self.node) => {
                self.recognise(name);
                None
            }
            Ok(_) => self.learn(name, Evidence::ProbeAnswered, "it answers"),
            Err(why) => self.learn(name, Evidence::ProbeFailed, &why),
        }
    }

    /// Records evidence about a member. Returns whether the member is up, or `None` if it is not watched any more.
    fn learn(&self, name: &str, evidence: Evidence, why: &str) -> Option<bool> {
        let mut watched = self.watched.lock();
        let peer = watched.get_mut(name)?;
        let before = peer.health;
        peer.health.learn(evidence);
        let after = peer.health;
        if evidence == Evidence::Reported(Report::Broken) && after.is_suspect() && !before.is_suspect() {
            peer.probe_now.notify_one();
        }
        if after.is_up() != before.is_up() {
            peer.since = Some(SystemTime::now());
            peer.series.set_up(after.is_up());
            match after.is_up() {
                true => tracing::info!(peer = name, "the peer is up again"),
                false => {
                    tracing::warn!(peer = name, why, "the peer is down: the next peers in order take over its blobs until it is up again")
                }
            }
            self.change(name, |member| member.up = after.is_up());
        }
        Some(after.is_up())
    }

    /// Records that the member is this node under another name.
    fn recognise(&self, name: &str) {
        let mut watched = self.watched.lock();
        if watched.remove(name).is_some() {
            tracing::warn!(name, advertise = self.advertise, "this node is listed under another name too; list each node once");
            self.change(name, |member| (member.itself, member.up) = (true, true));
        }
    }

    /// Changes one member. The caller holds the lock of `watched`.
    fn change(&self, name: &str, change: impl FnOnce(&mut Member)) {
        let mut view = View::clone(&self.view());
        if let Some(index) = view.find(name) {
            change(&mut view.members[index]);
            view.changed_at = Instant::now();
            self.publish(view);
        }
    }

    fn publish(&self, view: View) {
        let peers = || view.members.iter().filter(|member| !member.itself);
        let up = peers().filter(|peer| peer.up).count();
        self.metrics.cluster_changed(up, peers().count() - up);
        self.view.send_replace(Arc::new(view));
    }
}

/// Looks up the members every `every`.
async fn look_up(members: Weak<Members>, resolve: Arc<dyn Resolve>, name: String, every: Duration) {
    // A look-up that hangs has failed when the next one is due, but not within its first second.
    let limit = every.max(Duration::from_secs(1));
    let mut failed = false;
    loop {
        let found = tokio::time::timeout(limit, resolve.resolve()).await.unwrap_or_else(|_| Err("no answer in time".into()));
        let Some(members) = members.upgrade() else { return };
        let found = found.and_then(|peers| if peers.is_empty() { Err("no such records".to_owned()) } else { Ok(peers) });
        match &found {
            Ok(peers) => {
                if failed {
                    tracing::info!(name, "cluster.dns answers again");
                }
                members.set_peers(peers);
            }
            // Logged once per outage, and not every few seconds.
            Err(why) if !failed => tracing::warn!(name, why, "cluster.dns names no members; the last known ones stay"),
            Err(_) => {}
        }
        failed = found.is_err();
        drop(members);
        tokio::time::sleep(every).await;
    }
}

#[cfg(test)]
mod tests;
