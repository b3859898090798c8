//! Whom a flight asks. No time passes here, and nobody is connected to.

use super::*;
use crate::{
    members::{Members, Probe, Report},
    metrics::Metrics,
    secret::Secrets,
};
use castier_blob::Verifier;
use castier_cache::Answer;
use castier_config::{Castier, Cluster, Span};
use futures::future::BoxFuture;

/// Nobody is ever asked whether it lives.
struct NoProbe;

#[async_trait::async_trait]
impl Probe for NoProbe {
    async fn probe(&self, _: &Member) -> Result<Option<String>, String> {
        std::future::pending().await
    }
}

const NODES: [&str; 4] = ["a:1", "b:1", "c:1", "d:1"];

/// The cluster as the node `advertise` sees it, among those on the list.
fn cluster(advertise: &str, list: &[&str], peek_for: Span) -> Arc<Peers> {
    let cluster = Cluster {
        advertise: advertise.into(),
        peers: list.iter().map(|name| name.parse().unwrap()).collect(),
        peek_for,
        probe_timeout: Span::secs(3600),
        ..Cluster::default()
    };
    let metrics = Arc::new(Metrics::new(&Default::default()).unwrap());
    let members = Members::start(&cluster, Arc::new(NoProbe), metrics.clone()).unwrap();
    let cache_metrics = Arc::new(castier_cache::Metrics::new(&Default::default()).unwrap());
    let upstream_metrics = Arc::new(castier_upstream::Metrics::new(&Default::default()).unwrap());
    let secrets = Arc::new(Secrets::open(&cluster).unwrap());
    Peers::new(&Castier { cluster: Some(cluster), ..Castier::default() }, members, secrets, cache_metrics, upstream_metrics).unwrap()
}

/// A digest whose order of members begins so.
fn ordered(peers: &Peers, begins: &str) -> Digest {
    let view = peers.members().view();
    let order = |digest: &Digest| view.order(digest).map(short).collect::<Vec<_>>().join(" ");
    (0u32..).map(|i| Digest::of(&i.to_le_bytes())).find(|digest| order(digest).starts_with(begins)).unwrap()
}

/// A member's name without its port.
fn short(member: &Member) -> &str {
    member.name.trim_end_matches(":1")
}

fn broken() -> Fault {
    Fault::Unreachable { source_name: "peer", why: "test".into() }
}

fn corrupt(digest: Digest) -> Fault {
    let mut verifier = Verifier::of(digest, ());
    verifier.update(b"lies");
    Fault::Corrupt { source_name: "peer", mismatch: verifier.finish().unwrap_err() }
}

/// Whom a flight asks on which everybody fails, up to the origin.
fn asked(plan: &mut ClusterPlan, waiting: Asker) -> String {
    let mut asked = Vec::new();
    loop {
        plan.next(waiting);
        let (what, member) = match &plan.current {
            Choice::Origin => return asked.join(", "),
            Choice::Owner(member) => ("get", member),
            Choice::Kept(member) => ("peek", member),
        };
        asked.push(format!("{what} {}", short(member)));
        assert_eq!(plan.report(Outcome::Failed(&broken()), 0), Then::AskNext);
    }
}

fn plan(peers: &Arc<Peers>, digest: Digest) -> ClusterPlan {
    let origin = |_: castier_cache::Ask| -> BoxFuture<'static, Result<Answer, Fault>> { Box::pin(async { Ok(Answer::Absent) }) };
    ClusterPlan::new(peers.clone(), Arc::new(origin), digest)
}

#[tokio::test]
async fn the_way_to_the_origin() {
    use Asker::{Client, Peer};
    // This node, the digest's order, who waits; who is asked long after a change of the cluster, and who shortly after.
    for (node, order, waiting, late, early) in [
        ("a", "a b", Client, "", "peek b"),
        ("a", "a b", Peer, "", "peek b"),
        ("a", "b a c", Client, "get b", "get b, peek c"),
        ("a", "b a c", Peer, "", "peek b"),
        ("a", "b c a d", Client, "get b, get c", "get b, get c"),
        ("a", "b c d a", Client, "get b, get c", "get b, get c"),
        ("x", "b c d a", Client, "get b, get c", "get b, get c"),
        ("x", "b c", Peer, "", "peek b"),
    ] {
        for (peek_for, expected) in [(Span::secs(0), late), (Span::secs(600), early)] {
            let peers = cluster(&format!("{node}:1"), &NODES, peek_for);
            let mut plan = plan(&peers, ordered(&peers, order));
            assert_eq!(asked(&mut plan, waiting), expected, "{node}: {order}, {waiting:?}, {peek_for}");
            assert_eq!(plan.next(waiting).from, SourceKind::Origin, "and never back");
        }
    }
    let alone = cluster("a:1", &["a:1"], Span::secs(600));
    assert_eq!(plan(&alone, Digest::of(b"")).next(Client).from, SourceKind::Origin);
}

#[tokio::test]
async fn peers_that_are_down_or_send_wrong_bytes_are_passed_over() {
    let peers = cluster("a:1", &NODES, Span::secs(0));
    let digest = ordered(&peers, "b c d a");
    peers.members().report("b:1", Report::Unreachable);
    assert_eq!(asked(&mut plan(&peers, digest), Asker::Client), "get c, get d");
    // After wrong bytes all peers that gave some are blamed, and not asked again, by this flight or another.
    let mut blaming = plan(&peers, digest);
    let fault = corrupt(digest);
    assert!(!blaming.blame(&fault), "there are none yet");
    blaming.next(Asker::Client);
    blaming.report(Outcome::Whole, 4);
    assert!(blaming.blame(&fault) && !blaming.blame(&fault));
    assert_eq!(asked(&mut blaming, Asker::Client), "get d");
    assert_eq!(asked(&mut plan(&peers, digest), Asker::Client), "get d");
}

#[tokio::test]
async fn only_wrong_bytes_make_a_peer_distrusted() {
    let peers = cluster("a:1", &NODES, Span::secs(0));
    let digest = ordered(&peers, "b c d a");
    let mut flight = plan(&peers, digest);
    flight.next(Asker::Client);
    flight.report(Outcome::Failed(&broken()), 4);
    // The peer broke off, and the rest came from the origin: the peer may have seen that the origin's bytes are wrong.
    assert_eq!(asked(&mut flight, Asker::Client), "get c");
    flight.report(Outcome::Whole, 4);
    assert!(flight.blame(&corrupt(digest)));
    assert_eq!(asked(&mut flight, Asker::Client), "", "this flight does without peers");
    assert_eq!(asked(&mut plan(&peers, digest), Asker::Client), "get b, get c", "others need not");
    // The origin alone has the right bytes, so the peer's were wrong.
    flight.report(Outcome::Verified(Digest::EMPTY, 0), 0);
    assert_eq!(asked(&mut plan(&peers, digest), Asker::Client), "get c, get d");
}

#[tokio::test]
async fn a_peer_that_joins_or_one_that_cannot_help_leaves_the_origin() {
    let peers = cluster("a:1", &NODES, Span::secs(600));
    let digest = ordered(&peers, "b c d a");
    let mut joined = plan(&peers, digest);
    assert_eq!(joined.next(Asker::Client).owner, Owner::Peer);
    joined.report(Outcome::Left, 0);
    let peek = joined.next(Asker::Peer);
    assert_eq!((peek.from, peek.owner), (SourceKind::Peer, Owner::ThisNode));
    joined.report(Outcome::NotKept, 0);
    assert_eq!(joined.next(Asker::Peer).from, SourceKind::Origin);
    let mut unable = plan(&peers, digest);
    unable.next(Asker::Client);
    unable.report(Outcome::Unable, 0);
    assert_eq!(unable.next(Asker::Client).from, SourceKind::Origin);
}
