//! Records on their way to Loki: which arrive, which are given up, and what the end of the program waits for.

use crate::support::*;
use loki_api::{logproto::PushRequest, prost::Message as _};
use std::{
    collections::BTreeMap,
    io::{BufReader, Write as _},
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

/// What the receiver says to a push.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Say {
    Take,
    Status(u16),
    /// Nothing at all.
    Hang,
}

/// A push, as it came.
#[derive(Clone)]
struct Push {
    tenant: String,
    body: Vec<u8>,
    /// Labels, and a line each.
    records: Vec<(String, String)>,
    taken: bool,
}

type Script = Box<dyn FnMut(&Push) -> Say + Send>;

/// A Loki that does as it is told.
#[derive(Clone)]
struct Loki {
    address: SocketAddr,
    pushes: Arc<Mutex<Vec<Push>>>,
}

/// An address that nobody listens on, for now.
fn reserve() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

impl Loki {
    fn start(script: impl FnMut(&Push) -> Say + Send + 'static) -> Self {
        Self::at(reserve(), script)
    }

    fn at(address: SocketAddr, script: impl FnMut(&Push) -> Say + Send + 'static) -> Self {
        let listener = wait_for("the port", || TcpListener::bind(address).ok());
        let loki = Self { address, pushes: Arc::default() };
        let (script, pushes): (Arc<Mutex<Script>>, _) = (Arc::new(Mutex::new(Box::new(script))), Arc::clone(&loki.pushes));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (script, pushes) = (Arc::clone(&script), Arc::clone(&pushes));
                thread::spawn(move || {
                    let mut from = BufReader::new(stream);
                    while let Some(mut push) = read_push(&mut from) {
                        let said = (script.lock().unwrap())(&push);
                        push.taken = said == Say::Take;
                        pushes.lock().unwrap().push(push);
                        let status = match said {
                            Say::Take => 204,
                            Say::Status(status) => status,
                            Say::Hang => {
                                thread::sleep(DEADLINE);
                                return;
                            }
                        };
                        let answer = format!("HTTP/1.1 {status} Said\r\nContent-Length: 0\r\n\r\n");
                        if from.get_mut().write_all(answer.as_bytes()).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        loki
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn pushes(&self) -> Vec<Push> {
        self.pushes.lock().unwrap().clone()
    }

    /// How often each of these texts stands in a record that was taken.
    fn taken(&self, texts: &[String]) -> Vec<usize> {
        let pushes = self.pushes();
        let lines: Vec<_> = pushes.iter().filter(|push| push.taken).flat_map(|push| &push.records).map(|(_, line)| line).collect();
        texts.iter().map(|text| lines.iter().filter(|line| line.contains(text)).count()).collect()
    }
}

fn read_push(from: &mut impl std::io::BufRead) -> Option<Push> {
    let (mut length, mut tenant, mut first) = (0, String::new(), String::new());
    loop {
        let mut line = String::new();
        from.read_line(&mut line).ok().filter(|read| *read > 0)?;
        if first.is_empty() {
            first.clone_from(&line);
        }
        match line.trim_end().split_once(": ") {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => length = value.parse().unwrap(),
            Some((name, value)) if name.eq_ignore_ascii_case("x-scope-orgid") => tenant = value.to_owned(),
            Some(_) => {}
            None if line.trim_end().is_empty() => break,
            None => {}
        }
    }
    assert!(first.starts_with("POST /loki/api/v1/push "), "{first}");
    let mut body = vec![0; length];
    from.read_exact(&mut body).ok()?;
    let request = PushRequest::decode(&snap::raw::Decoder::new().decompress_vec(&body).unwrap()[..]).unwrap();
    let records = request.streams.into_iter().flat_map(|stream| {
        let labels = stream.labels;
        stream.entries.into_iter().map(move |entry| {
            assert!(entry.timestamp.is_some_and(|at| at.seconds > 1_600_000_000));
            (labels.clone(), entry.line)
        })
    });
    Some(Push { tenant, body, records: records.collect(), taken: false })
}

/// A node that ships to this address soon.
fn node(url: &str, more: &[(&str, &str)]) -> Node {
    let mut env = vec![("CASTIER_LOG__LOKI_URL", url), ("CASTIER_LOG__LOKI__WAIT", "100ms")];
    env.extend(more);
    Node::with(&env)
}

/// Asks for paths that are recorded; gives them.
fn requests(node: &Node, name: &str, many: usize) -> Vec<String> {
    let paths: Vec<_> = (0..many).map(|i| format!("/{name}-{i}-")).collect();
    paths.iter().for_each(|path| assert_eq!(node.ask("GET", path, &[], b"").status, 404));
    paths
}

fn all_arrive_once(loki: &Loki, paths: &[String]) {
    wait_for("all records", || loki.taken(paths).iter().all(|count| *count > 0).then_some(()));
    assert!(loki.taken(paths).iter().all(|count| *count == 1), "{:?}", loki.taken(paths));
}

#[test]
fn what_is_not_taken_is_sent_again_and_arrives_once() {
    let mut script = vec![Say::Status(500), Say::Status(429), Say::Hang].into_iter();
    let loki = Loki::start(move |_| script.next().unwrap_or(Say::Take));
    let node = node(&loki.url(), &[("CASTIER_LOG__LOKI__TIMEOUT", "300ms")]);
    let paths = requests(&node, "again", 100);
    all_arrive_once(&loki, &paths);
    let pushes = loki.pushes();
    assert!(pushes[..3].iter().all(|push| push.body == pushes[3].body), "it is the same batch");
    let warned = |log: &str| log.matches("Loki takes no records").count();
    wait_for("the news", || node.log().contains("Loki takes records again").then_some(()));
    assert_eq!(warned(&node.log()), 1, "{}", node.log());
    assert_eq!(node.metric("castier_origin_log_dropped_total{sink=\"loki\"}"), 0.0);
}

#[test]
fn what_is_refused_for_good_is_in_nobodys_way() {
    let loki =
        Loki::start(|push| if push.records.iter().any(|(_, line)| line.contains("/poison-")) { Say::Status(400) } else { Say::Take });
    let node = node(&loki.url(), &[]);
    let before = requests(&node, "before", 3);
    all_arrive_once(&loki, &before);
    let poison = requests(&node, "poison", 1);
    wait_for("the refusal", || node.log().contains("Loki refused a batch").then_some(()));
    for round in 0..3 {
        let after = requests(&node, &format!("after{round}"), 3);
        all_arrive_once(&loki, &after);
    }
    let sent = loki.pushes().iter().filter(|push| push.records.iter().any(|(_, line)| line.contains(&poison[0]))).count();
    assert_eq!(sent, 1, "it is never sent again");
    assert!(node.metric("castier_origin_log_dropped_total{sink=\"loki\"}") >= 1.0);
}

#[test]
fn a_bad_loki_costs_no_request_any_time() {
    for say in [Say::Hang, Say::Status(500), Say::Status(429), Say::Status(400)] {
        let loki = Loki::start(move |_| say);
        let node = node(&loki.url(), &[("CASTIER_LOG__LOKI__TIMEOUT", "2s"), ("CASTIER_LOG__LOKI__BATCH", "1KiB")]);
        requests(&node, "first", 3);
        wait_for("a batch", || (!loki.pushes().is_empty()).then_some(()));
        let start = Instant::now();
        requests(&node, "then", 200);
        // Each batch of a few records would have taken two seconds, or as long as the pauses between attempts.
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
        // Read by nobody else, stderr has them all.
        wait_for("all records on stderr", || (node.log().matches("path=/then-").count() == 200).then_some(()));
        // The record that tells it is in a batch that is refused as well.
        let told = node.log().matches("Loki refused a batch").count();
        assert!(told <= 1, "told {told} times for one change");
    }
}

#[test]
fn six_seconds_away_lose_nothing() {
    let address = reserve();
    let node = node(&format!("http://{address}"), &[]);
    let start = Instant::now();
    let mut paths = requests(&node, "first", 20);
    wait_for("it to be missed", || node.log().contains("Loki takes no records").then_some(()));
    thread::sleep(Duration::from_secs(6).saturating_sub(start.elapsed()));
    paths.extend(requests(&node, "last", 20));
    let loki = Loki::at(address, |_| Say::Take);
    all_arrive_once(&loki, &paths);
}

#[test]
fn the_end_sends_what_is_left_and_waits_for_nothing_else() {
    // A healthy Loki.
    let loki = Loki::start(|_| Say::Take);
    let mut healthy = node(&loki.url(), &[("CASTIER_LOG__LOKI__WAIT", "1h")]);
    let paths = requests(&healthy, "healthy", 10);
    let start = Instant::now();
    healthy.signal("TERM");
    assert_eq!(healthy.exit().code(), Some(0));
    assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
    assert_eq!(loki.taken(&paths), vec![1; 10]);
    assert_eq!(loki.taken(&["finished".to_owned()]), [1]);

    // One that came back during a pause.
    let address = reserve();
    let mut pausing = node(&format!("http://{address}"), &[]);
    let paths = requests(&pausing, "pausing", 10);
    wait_for("it to be missed", || pausing.log().contains("Loki takes no records").then_some(()));
    let loki = Loki::at(address, |_| Say::Take);
    pausing.signal("TERM");
    assert_eq!(pausing.exit().code(), Some(0));
    assert_eq!(loki.taken(&paths), vec![1; 10]);

    // One that never does: two seconds, and then what is lost is told.
    let mut alone = node(&format!("http://{}", reserve()), &[]);
    requests(&alone, "alone", 10);
    let start = Instant::now();
    alone.signal("TERM");
    assert_eq!(alone.exit().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
    assert!(alone.log().contains("Loki did not take the last records"), "{}", alone.log());
}

#[test]
fn labels_tell_who_speaks() {
    let loki = Loki::start(|_| Say::Take);
    let more = [("CASTIER_LOG__LOKI__LABELS", "env=test, dc=a\"b"), ("CASTIER_LOG__LOKI__TENANT", "builds")];
    let nodes = [node(&loki.url(), &more), node(&loki.url(), &more)];
    let paths: Vec<_> = nodes.iter().enumerate().map(|(i, node)| requests(node, &format!("node{i}"), 1).remove(0)).collect();
    all_arrive_once(&loki, &paths);
    let pushes = loki.pushes();
    assert!(pushes.iter().all(|push| push.tenant == "builds"));
    let records: BTreeMap<_, _> =
        pushes.iter().flat_map(|push| &push.records).map(|(labels, line)| (line.clone(), labels.clone())).collect();
    for (node, path) in nodes.iter().zip(&paths) {
        let (line, labels) = records.iter().find(|(line, _)| line.contains(path)).unwrap();
        assert!(node.log().contains(line), "the same record is on stderr: {line}");
        for label in ["job=\"castier-origin\"", "level=\"info\"", "env=\"test\"", "dc=\"a\\\"b\"", &format!(":{}\"", node.clients.port())] {
            assert!(labels.contains(label), "{label} in {labels}");
        }
    }
}

#[test]
fn the_buffer_is_bounded_in_bytes() {
    let settings = [("CASTIER_LOG__LOKI__BATCH", "1KiB"), ("CASTIER_LOG__LOKI__BUFFER", "4KiB")];
    let node = node(&format!("http://{}", reserve()), &settings);
    requests(&node, "many", 100);
    let dropped = node.metric("castier_origin_log_dropped_total{sink=\"loki\"}");
    assert!((70.0..=100.0).contains(&dropped), "4 KiB hold a dozen records or so: {dropped}");
}
