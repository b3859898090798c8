//! The course of a flight on which everybody fails. No time passes here, and nobody is connected to.

use super::*;
use crate::{
    members::{Members, Probe, Report},
    metrics::Metrics,
    secret::Secrets,
};
use castier_blob::Verifier;
use castier_config::{Castier, Cluster, Span};

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
    let metrics = Arc::new(Metrics::new().unwrap());
    let members = Members::start(&cluster, Arc::new(NoProbe), metrics.clone()).unwrap();
    let secrets = Arc::new(Secrets::open(&cluster).unwrap());
    Peers::new(&Castier { cluster: Some(cluster), ..Castier::default() }, members, secrets, metrics).unwrap()
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

/// The legs of a flight on which everybody fails, up to the origin.
fn legs(course: &mut Course, home: bool) -> String {
    let mut legs = Vec::new();
    loop {
        let (what, member) = match course.next(home) {
            Leg::Origin => return legs.join(", "),
            Leg::Peer(member) => ("get", member),
            Leg::Peek(member) => ("peek", member),
        };
        legs.push(format!("{what} {}", short(&member)));
        course.failed(&member, &broken());
    }
}

#[tokio::test]
async fn the_way_to_the_origin() {
    // This node, the digest's order, whether a peer asks; who is asked long after a change of the cluster, and who shortly after.
    for (node, order, home, late, early) in [
        ("a", "a b", false, "", "peek b"),
        ("a", "a b", true, "", "peek b"),
        ("a", "b a c", false, "get b", "get b, peek c"),
        ("a", "b a c", true, "", "peek b"),
        ("a", "b c a d", false, "get b, get c", "get b, get c"),
        ("a", "b c d a", false, "get b, get c", "get b, get c"),
        ("x", "b c d a", false, "get b, get c", "get b, get c"),
        ("x", "b c", true, "", "peek b"),
    ] {
        for (peek_for, expected) in [(Span::secs(0), late), (Span::secs(600), early)] {
            let peers = cluster(&format!("{node}:1"), &NODES, peek_for);
            let mut course = Course::new(Some(peers.clone()), ordered(&peers, order));
            assert_eq!(legs(&mut course, home), expected, "{node}: {order}, {home}, {peek_for}");
            assert!(matches!(course.next(home), Leg::Origin), "and never back");
        }
    }
    assert!(matches!(Course::new(None, Digest::of(b"")).next(false), Leg::Origin));
    let alone = cluster("a:1", &["a:1"], Span::secs(600));
    assert!(matches!(Course::new(Some(alone), Digest::of(b"")).next(false), Leg::Origin));
}

#[tokio::test]
async fn who_is_down_or_lies_is_passed_over() {
    let peers = cluster("a:1", &NODES, Span::secs(0));
    let digest = ordered(&peers, "b c d a");
    let member = |name: &str| peers.members().view().members().iter().find(|member| &*member.name == name).unwrap().clone();
    peers.members().report("b:1", Report::Unreachable);
    assert_eq!(legs(&mut Course::new(Some(peers.clone()), digest), false), "get c, get d");
    // Wrong bytes: all that gave some are at fault, and are not asked again, by this flight or another.
    let mut course = Course::new(Some(peers.clone()), digest);
    let mut verifier = Verifier::of(digest);
    verifier.update(b"lies");
    let fault = Fault::Corrupt { source_name: "peer", mismatch: verifier.finish(()).unwrap_err() };
    assert!(!course.blame_peers(&fault), "there are none yet");
    course.gives(&Leg::Peer(member("c:1")));
    assert!(course.has_peers_bytes() && course.blame_peers(&fault) && !course.has_peers_bytes());
    assert_eq!(legs(&mut course, false), "get d");
    assert_eq!(legs(&mut Course::new(Some(peers.clone()), digest), false), "get d");
}

#[tokio::test]
async fn turned_home_or_sent_straight() {
    let peers = cluster("a:1", &NODES, Span::secs(600));
    let digest = ordered(&peers, "b c d a");
    let mut course = Course::new(Some(peers.clone()), digest);
    assert!(matches!(course.next(false), Leg::Peer(owner) if &*owner.name == "b:1"));
    assert!(matches!(course.next(true), Leg::Peek(_)) && matches!(course.next(true), Leg::Origin));
    let mut course = Course::new(Some(peers), digest);
    course.next(false);
    course.go_straight();
    assert!(matches!(course.next(false), Leg::Origin));
}
