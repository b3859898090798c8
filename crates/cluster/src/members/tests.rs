//! Tests of the cluster with scripted look-ups and probes. They do not wait for time to pass: each call waits for the test's answer, and
//! the next call proves that the answer before it has been processed.

use super::*;
use async_trait::async_trait;
use castier_config::Span;
use std::collections::VecDeque;
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

const DEADLINE: Duration = Duration::from_secs(20);
const SELF: &str = "10.0.0.1:8081";
const OTHER: &str = "10.0.0.2:8081";
const THIRD: &str = "10.0.0.3:8081";

type Answer<T> = oneshot::Sender<Result<T, String>>;

/// Sends every call to the test.
struct Script<T>(mpsc::UnboundedSender<(String, Answer<T>)>);

impl<T> Script<T> {
    async fn call(&self, name: &str) -> Result<T, String> {
        let (answer, answered) = oneshot::channel();
        self.0.send((name.to_owned(), answer)).map_err(|_| "the test is over")?;
        answered.await.unwrap_or_else(|_| Err("the test gave no answer".into()))
    }
}

#[async_trait]
impl Probe for Script<Option<String>> {
    async fn probe(&self, member: &Member) -> Result<Option<String>, String> {
        self.call(&member.name).await
    }
}

#[async_trait]
impl Resolve for Script<Vec<Peer>> {
    async fn resolve(&self) -> Result<Vec<Peer>, String> {
        self.call("dns").await
    }
}

/// The calls of a script.
struct Calls<T> {
    coming: mpsc::UnboundedReceiver<(String, Answer<T>)>,
    /// Calls about members that the test has not asked for yet.
    postponed: VecDeque<(String, Answer<T>)>,
}

impl<T> Calls<T> {
    fn new() -> (Arc<Script<T>>, Self) {
        let (sender, coming) = mpsc::unbounded_channel();
        (Arc::new(Script(sender)), Self { coming, postponed: VecDeque::new() })
    }

    /// The next call about this member. Postpones calls about others.
    async fn next(&mut self, name: &str) -> Answer<T> {
        if let Some(at) = self.postponed.iter().position(|(of, _)| of == name) {
            return self.postponed.remove(at).unwrap().1;
        }
        loop {
            let (of, answer) = timeout(DEADLINE, self.coming.recv()).await.expect("a call in time").expect("someone to call");
            if of == name {
                return answer;
            }
            self.postponed.push_back((of, answer));
        }
    }

    /// Answers the next call about this member. Waits for the call after it, which proves that the answer has been processed.
    async fn answer(&mut self, name: &str, answer: Result<T, String>) {
        self.next(name).await.send(answer).ok().unwrap();
        let next = self.next(name).await;
        self.postponed.push_front((name.to_owned(), next));
    }
}

fn peers(names: &[&str]) -> Vec<Peer> {
    names.iter().map(|name| name.parse().unwrap()).collect()
}

fn config(names: &[&str]) -> Cluster {
    let soon = Span::millis(2);
    Cluster {
        advertise: SELF.into(),
        peers: peers(names),
        refresh: soon,
        probe_interval: soon,
        probe_timeout: Span::new(DEADLINE),
        ..Cluster::default()
    }
}

struct Fixture {
    members: Arc<Members>,
    probes: Calls<Option<String>>,
    registry: prometheus::Registry,
}

fn start(config: &Cluster, resolve: Option<Arc<dyn Resolve>>) -> Fixture {
    let (script, probes) = Calls::new();
    let registry = prometheus::Registry::new();
    let metrics = Arc::new(Metrics::new(&registry).unwrap());
    Fixture { members: Members::start_with(config, resolve, script, metrics).unwrap(), probes, registry }
}

impl Fixture {
    fn names(&self) -> Vec<String> {
        self.members.view().members().iter().map(|member| member.name.to_string()).collect()
    }

    fn is_up(&self, name: &str) -> bool {
        let view = self.members.view();
        let up = view.members()[view.find(name).unwrap()].up;
        let asked = (0..100u32).any(|i| view.order(&Digest::of(&i.to_le_bytes())).any(|member| &*member.name == name));
        assert_eq!(up, asked, "a member is asked exactly if it is up");
        up
    }

    /// Changes, peers up, peers down.
    fn series(&self) -> [u64; 3] {
        let text = prometheus::TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap();
        let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().parse().unwrap();
        ["castier_cluster_changes_total", "castier_cluster_peers{state=\"up\"}", "castier_cluster_peers{state=\"down\"}"].map(value)
    }
}

#[tokio::test]
async fn a_list_changes_the_cluster_only_if_it_differs() {
    let fixture = start(&config(&[THIRD, SELF, OTHER]), None);
    let first = fixture.members.view();
    assert_eq!(fixture.names(), [SELF, OTHER, THIRD]);
    assert_eq!(
        first.members().iter().map(|member| (member.itself, member.up)).collect::<Vec<_>>(),
        [(true, true), (false, true), (false, true)]
    );
    assert_eq!(fixture.series(), [1, 2, 0]);
    for same in [&[SELF, OTHER, THIRD][..], &[THIRD, SELF, SELF, OTHER, THIRD], &[]] {
        fixture.members.set_peers(&peers(same));
        assert!(Arc::ptr_eq(&first, &fixture.members.view()), "{same:?}");
    }
    fixture.members.set_peers(&peers(&[SELF, "[::1]:8081"]));
    assert_eq!((fixture.names(), fixture.series()), (vec![SELF.to_owned(), "[::1]:8081".to_owned()], [2, 1, 0]));
    let second = fixture.members.view();
    assert!(second.changed_at >= first.changed_at && second.members()[1].host == "::1");
    fixture.members.set_peers(&peers(&[SELF, "[::1]:8081 weight=3"]));
    assert_eq!((fixture.members.view().ring().share(1), fixture.series()), (0.75, [3, 1, 0]));
}

#[tokio::test]
async fn a_node_that_is_not_listed_owns_nothing_and_asks_the_others() {
    let fixture = start(&config(&[OTHER, THIRD]), None);
    let view = fixture.members.view();
    for i in 0..1000u32 {
        let order: Vec<_> = view.order(&Digest::of(&i.to_le_bytes())).collect();
        assert!(order.len() == 2 && order.iter().all(|member| !member.itself));
    }
    fixture.members.set_peers(&peers(&[OTHER, THIRD, SELF]));
    assert!(fixture.members.view().members()[0].itself);
}

#[tokio::test]
async fn a_node_listed_twice_knows_itself() {
    let mut fixture = start(&config(&[SELF, OTHER, "localhost:8081"]), None);
    let node = fixture.members.node().to_owned();
    fixture.probes.answer(OTHER, Ok(Some("0000000000000000".into()))).await;
    let mut view = fixture.members.subscribe();
    fixture.probes.next("localhost:8081").await.send(Ok(Some(node))).unwrap();
    let itself = |view: &View, name: &str| view.members()[view.find(name).unwrap()].itself;
    timeout(DEADLINE, view.wait_for(|view| itself(view, "localhost:8081"))).await.unwrap().unwrap();
    let view = fixture.members.view();
    assert_eq!((itself(&view, SELF), itself(&view, OTHER)), (true, false));
    assert_eq!(fixture.members.watched.lock().keys().map(|name| &**name).collect::<Vec<_>>(), [OTHER], "a node does not probe itself");
    assert_eq!(fixture.series(), [2, 1, 0]);
}

#[tokio::test]
async fn a_peer_goes_down_after_two_failed_probes_and_comes_up_after_one_answer() {
    let mut fixture = start(&config(&[SELF, OTHER, THIRD]), None);
    let before = fixture.members.view();
    let dead = || Err("dead".to_owned());
    for _ in 0..2 {
        fixture.probes.answer(OTHER, dead()).await;
        assert!(fixture.is_up(OTHER), "one failure does not take it down");
        fixture.probes.answer(OTHER, Ok(None)).await;
    }
    assert!(Arc::ptr_eq(&before, &fixture.members.view()), "nothing has changed so far");
    fixture.probes.answer(OTHER, dead()).await;
    fixture.probes.answer(OTHER, dead()).await;
    assert!(!fixture.is_up(OTHER) && fixture.is_up(THIRD) && fixture.is_up(SELF));
    let after = fixture.members.view();
    assert!(after.changed_at > before.changed_at);
    assert_eq!(fixture.series(), [2, 1, 1]);
    for i in 0..100u32 {
        let digest = Digest::of(&i.to_le_bytes());
        let mut expected: Vec<_> = before.order(&digest).map(|member| member.name.clone()).collect();
        expected.retain(|name| &**name != OTHER);
        assert_eq!(after.order(&digest).map(|member| member.name.clone()).collect::<Vec<_>>(), expected, "the next in order takes over");
    }
    fixture.probes.answer(OTHER, dead()).await;
    assert_eq!(fixture.series(), [2, 1, 1]);
    fixture.probes.answer(OTHER, Ok(None)).await;
    assert!(fixture.is_up(OTHER));
    assert_eq!(fixture.series(), [3, 2, 0]);
}

#[tokio::test]
async fn a_refused_connection_takes_a_peer_down_at_once() {
    let mut fixture = start(&config(&[SELF, OTHER]), None);
    fixture.probes.answer(OTHER, Ok(None)).await;
    fixture.members.report(OTHER, Report::Unreachable);
    assert!(!fixture.is_up(OTHER));
    assert_eq!(fixture.members.view().owner(&Digest::of(b"x")).map(|member| member.itself), Some(true));
    fixture.members.report(OTHER, Report::Answered);
    assert!(!fixture.is_up(OTHER), "an answer on an old connection does not prove that a new one can be opened");
    fixture.probes.answer(OTHER, Ok(None)).await;
    assert!(fixture.is_up(OTHER));
    // Reports about this node and about unknown members do nothing.
    fixture.members.report(SELF, Report::Unreachable);
    fixture.members.report("10.0.0.9:8081", Report::Unreachable);
    assert!(fixture.is_up(SELF) && fixture.series() == [3, 1, 0]);
}

#[tokio::test]
async fn a_stall_triggers_a_probe_at_once() {
    // Without the report, the next probe would come in an hour.
    let config = Cluster { probe_interval: Span::secs(3600), ..config(&[SELF, OTHER]) };
    let mut fixture = start(&config, None);
    let first = fixture.probes.next(OTHER).await;
    for _ in 0..100 {
        fixture.members.report(OTHER, Report::Broken);
    }
    assert!(fixture.is_up(OTHER), "a hundred requests that wait for the same origin count as one failure");
    first.send(Err("stopped".into())).unwrap();
    let second = fixture.probes.next(OTHER).await;
    assert!(!fixture.is_up(OTHER));
    second.send(Ok(None)).unwrap();
    let mut view = fixture.members.subscribe();
    timeout(DEADLINE, view.wait_for(|view| view.members()[1].up)).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_probe_that_is_not_answered_is_given_up() {
    let config = Cluster { probe_timeout: Span::millis(5), ..config(&[SELF, OTHER]) };
    let mut fixture = start(&config, None);
    let mut view = fixture.members.subscribe();
    let mut silent = fixture.probes.next(OTHER).await;
    let mut silent_too = fixture.probes.next(OTHER).await;
    timeout(DEADLINE, view.wait_for(|view| !view.members()[1].up)).await.unwrap().unwrap();
    timeout(DEADLINE, async { tokio::join!(silent.closed(), silent_too.closed()) }).await.unwrap();
}

#[tokio::test]
async fn a_member_that_has_left_is_not_probed() {
    let mut fixture = start(&config(&[SELF, OTHER, THIRD]), None);
    let mut held = fixture.probes.next(OTHER).await;
    fixture.members.report(OTHER, Report::Unreachable);
    fixture.members.set_peers(&peers(&[SELF, THIRD]));
    timeout(DEADLINE, held.closed()).await.unwrap();
    assert_eq!(fixture.series(), [3, 1, 0]);
    // A member that comes back starts as up.
    fixture.members.set_peers(&peers(&[SELF, OTHER, THIRD]));
    assert!(fixture.is_up(OTHER));
    drop(fixture.members);
    let all_gone = async { while fixture.probes.coming.recv().await.is_some() {} };
    timeout(DEADLINE, all_gone).await.unwrap();
}

#[tokio::test]
async fn a_failed_look_up_changes_nothing() {
    let (resolve, mut lookups) = Calls::new();
    let config = Cluster { peers: vec![], dns: "peers:8081".into(), ..config(&[]) };
    let fixture = start(&config, Some(resolve));
    assert_eq!(fixture.names(), [""; 0]);
    assert!(fixture.members.view().owner(&Digest::of(b"x")).is_none());
    // A look-up that hangs times out, and another follows.
    let mut hanging = lookups.next("dns").await;
    timeout(DEADLINE, hanging.closed()).await.unwrap();
    lookups.answer("dns", Err("refused".into())).await;
    assert_eq!(fixture.names(), [""; 0]);
    lookups.answer("dns", Ok(peers(&[OTHER, SELF]))).await;
    assert_eq!(fixture.names(), [SELF, OTHER]);
    let good = fixture.members.view();
    for nothing in [Err("refused".into()), Ok(vec![]), Ok(peers(&[SELF, OTHER, OTHER]))] {
        lookups.answer("dns", nothing).await;
        assert!(Arc::ptr_eq(&good, &fixture.members.view()));
    }
    lookups.answer("dns", Ok(peers(&[SELF, OTHER, THIRD]))).await;
    assert_eq!((fixture.names().len(), fixture.series()), (3, [2, 2, 0]));
    drop(fixture.members);
    let all_gone = async { while lookups.coming.recv().await.is_some() {} };
    lookups.postponed.clear();
    timeout(DEADLINE, all_gone).await.unwrap();
}
