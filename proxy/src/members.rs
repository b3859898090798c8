//! The cluster as this node sees it: who is a member, who of them is up, and so who is to be asked for a digest.
//!
//! Members come from `cluster.peers` or, looked up again and again, from `cluster.dns`; whether they are up is learnt by probing
//! them and from what the data path reports. All of it is one immutable [`View`], replaced as a whole with every change.
//!
//! - A list that could not be had, or is empty, changes nothing: a broken name server must not take a working cluster apart.
//! - This node need not be on the list (a rolling start, a list that is not everywhere yet). Then it owns nothing, and asks the others
//!   as any member does.
//! - This node may be on the list under several names. The one that is `cluster.advertise` is known at once, any other by its
//!   answer to the first probe. It matters: a fill that asked its own node for the blob would wait for itself.
//! - This node counts as up.

mod dns;
mod health;
mod status;

pub use health::{Probe, Report};
pub use status::{MemberFigures, MemberStatus, Status};

use crate::{
    metrics::{Metrics, PeerSeries},
    ring::Ring,
};
use castier_blob::Digest;
use castier_config::{Cluster, Peer};
use dns::{Dns, Resolve};
use health::{Evidence, Health, Pace};
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

/// In the answer to `GET /healthz` on the peer listener: [`Members::node`], by which a node knows itself under another name.
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
    /// It is this node.
    pub itself: bool,
    /// It answers.
    pub up: bool,
}

/// The cluster at one moment.
#[derive(Clone, Debug)]
pub struct View {
    ring: Arc<Ring>,
    /// In the order of the ring's indices.
    members: Vec<Member>,
    /// When a member last came, went, fell or rose: since then some digests have another owner.
    pub changed_at: Instant,
}

impl View {
    /// All members, up or down, in the order of their names.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// How digests are spread over [`Self::members`], by index.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// The members to ask for the digest, in this order; those that are down are left out. Behind this node itself there is no
    /// point in going on: it would be asked what it just asks.
    pub fn order(&self, digest: &Digest) -> impl Iterator<Item = &Member> {
        self.ring.order(digest).filter_map(|index| self.members.get(index)).filter(|member| member.up)
    }

    /// The member that owns the digest as things are; none only while no member is known or up.
    pub fn owner(&self, digest: &Digest) -> Option<&Member> {
        self.order(digest).next()
    }

    fn find(&self, name: &str) -> Option<usize> {
        self.members.iter().position(|member| &*member.name == name)
    }
}

/// Keeps the [`View`] true. Dropping it ends the probes and look-ups.
pub struct Members {
    /// This node's name on the ring.
    advertise: String,
    /// Made up at the start, so that no two processes ever share it.
    node: String,
    view: watch::Sender<Arc<View>>,
    /// Every peer that is probed. Whoever changes the view holds this lock, so that no change is lost.
    watched: Mutex<HashMap<Arc<str>, Watched>>,
    probe: Arc<dyn Probe>,
    pace: Pace,
    metrics: Arc<Metrics>,
    lookups: Mutex<Option<AbortOnDropHandle<()>>>,
}

struct Watched {
    health: Health,
    /// When it last fell or rose.
    since: Option<SystemTime>,
    /// How long the last probe took.
    probe: Option<Duration>,
    series: PeerSeries,
    /// Asks for a probe right now.
    doubt: Arc<Notify>,
    _probing: AbortOnDropHandle<()>,
}

impl Members {
    /// Starts to look after the cluster. With `cluster.dns` there are no members until the first look-up is done; see
    /// [`Self::subscribe`].
    ///
    /// # Errors
    /// A text that names the key that cannot be used.
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
        let nobody = View { ring: Arc::default(), members: Vec::new(), changed_at: Instant::now() };
        let members = Arc::new(Self {
            advertise,
            node: format!("{:016x}", RandomState::new().hash_one(std::process::id())),
            view: watch::Sender::new(Arc::new(nobody)),
            watched: Mutex::default(),
            probe,
            pace: Pace { interval: config.probe_interval.get(), timeout: config.probe_timeout.get() },
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

    /// This node's name for itself, to be told in the header [`NODE`].
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The cluster as of now.
    pub fn view(&self) -> Arc<View> {
        self.view.borrow().clone()
    }

    /// The cluster as of now and from now on.
    pub fn subscribe(&self) -> watch::Receiver<Arc<View>> {
        self.view.subscribe()
    }

    /// These are the members now. An empty list is taken for a mistake and changes nothing.
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
                // Taken for sound until it proves otherwise, which a refused connection does at once.
                up: true,
            },
        };
        // Sorted by name, as the ring is.
        let members: Vec<_> = by_name.iter().map(member).collect();
        let names = |members: &[Member], known: &View| {
            members.iter().filter(|member| known.find(&member.name).is_none()).map(|member| member.name.to_string()).collect::<Vec<_>>()
        };
        self.metrics.set_members_hash(ring.fingerprint());
        let new = View { ring: Arc::new(ring), members, changed_at: Instant::now() };
        let (joined, left) = (names(&new.members, &old), names(&old.members, &new));
        tracing::info!(members = new.members.len(), ?joined, ?left, "the cluster changed");
        if !new.members.iter().any(|member| member.itself) {
            tracing::warn!(advertise = self.advertise, "this node is not among the members: it owns no blobs, and asks those that do");
        }
        watched.retain(|name, _| new.find(name).is_some());
        for member in new.members.iter().filter(|member| !member.itself) {
            watched.entry(member.name.clone()).or_insert_with(|| self.watch(member));
        }
        self.publish(new);
    }

    /// What the data path met with when it asked this member.
    pub fn report(&self, member: &str, report: Report) {
        self.learn(member, report.into(), "reported by a request");
    }

    /// An attempt at this member failed: for the figures alone, see [`Self::report`]. Of one that has left nothing is counted.
    pub fn failed(&self, member: &str) {
        if let Some(peer) = self.watched.lock().get(member) {
            self.metrics.peer_failed(&peer.series);
        }
    }

    fn watch(self: &Arc<Self>, member: &Member) -> Watched {
        let doubt = Arc::new(Notify::new());
        let learn = {
            let (members, name) = (Arc::downgrade(self), member.name.clone());
            move |answer, took| members.upgrade().and_then(|members| members.probed(&name, answer, took))
        };
        let probing = health::keep_probing(member.clone(), self.probe.clone(), self.pace, doubt.clone(), learn);
        let _probing = AbortOnDropHandle::new(tokio::spawn(probing));
        Watched { health: Health::default(), since: None, probe: None, series: self.metrics.peer(&member.name), doubt, _probing }
    }

    /// Takes note of a probe's end. None: nobody wants to know more of this member. Else whether it is up.
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

    /// Whether the member is up, with this in mind; none if it is no longer watched.
    fn learn(&self, name: &str, evidence: Evidence, why: &str) -> Option<bool> {
        let mut watched = self.watched.lock();
        let peer = watched.get_mut(name)?;
        let before = peer.health;
        peer.health.learn(evidence);
        let after = peer.health;
        if evidence == Evidence::Reported(Report::Broken) && after.is_doubtful() && !before.is_doubtful() {
            peer.doubt.notify_one();
        }
        if after.is_up() != before.is_up() {
            peer.since = Some(SystemTime::now());
            peer.series.set_up(after.is_up());
            match after.is_up() {
                true => tracing::info!(peer = name, "the peer is up again"),
                false => tracing::warn!(peer = name, why, "the peer is down: the next in order take its blobs until it is back"),
            }
            self.change(name, |member| member.up = after.is_up());
        }
        Some(after.is_up())
    }

    /// The member turned out to be this node under another name.
    fn recognise(&self, name: &str) {
        let mut watched = self.watched.lock();
        if watched.remove(name).is_some() {
            tracing::warn!(name, advertise = self.advertise, "this node is listed under another name too; list each node once");
            self.change(name, |member| (member.itself, member.up) = (true, true));
        }
    }

    /// Changes one member. The caller holds the lock.
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

/// Asks again and again who the members are.
async fn look_up(members: Weak<Members>, resolve: Arc<dyn Resolve>, name: String, every: Duration) {
    // A look-up that hangs counts as failed when the next is due; a name server gets a second in any case.
    let patience = every.max(Duration::from_secs(1));
    let mut failed = false;
    loop {
        let found = tokio::time::timeout(patience, resolve.resolve()).await.unwrap_or_else(|_| Err("no answer in time".into()));
        let Some(members) = members.upgrade() else { return };
        let found = found.and_then(|peers| if peers.is_empty() { Err("no such records".to_owned()) } else { Ok(peers) });
        match &found {
            Ok(peers) => {
                if failed {
                    tracing::info!(name, "cluster.dns answers again");
                }
                members.set_peers(peers);
            }
            // Once per outage, not every few seconds.
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
