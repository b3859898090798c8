//! Spans at a collector: which are sent, how they are related, and the cost of a bad collector.

use crate::support::{Blob, Castier, Cluster, RealOrigin, Request, eventually, get, light, metrics};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse},
    common::v1::{KeyValue, any_value::Value},
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use parking_lot::Mutex;
use prost::Message as _;
use rustix::process::Signal;
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

/// The collector's answer to a batch.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Say {
    Take,
    Status(u16),
    /// No answer.
    Hang,
}

/// A span, and the resource of its batch.
#[derive(Clone, Debug)]
struct Seen {
    service: BTreeMap<String, String>,
    span: Span,
}

impl Seen {
    fn id(&self) -> String {
        hex(&self.span.span_id)
    }

    fn parent(&self) -> String {
        hex(&self.span.parent_span_id)
    }

    fn is(&self, service: &str, kind: SpanKind) -> bool {
        self.service["service.name"] == service && self.span.kind() == kind
    }

    fn attributes(&self) -> BTreeMap<String, String> {
        texts(&self.span.attributes)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn texts(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |attribute: &KeyValue| match attribute.value.as_ref().and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        other => panic!("{other:?}"),
    };
    attributes.iter().map(|attribute| (attribute.key.clone(), text(attribute))).collect()
}

/// A scripted collector.
#[derive(Clone)]
struct Collector {
    address: SocketAddr,
    say: Arc<Mutex<Say>>,
    taken: Arc<Mutex<Vec<Seen>>>,
    /// All received batches, accepted or not.
    asked: Arc<Mutex<usize>>,
}

impl Collector {
    async fn start(say: Say) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let collector = Self { address, say: Arc::new(Mutex::new(say)), taken: Arc::default(), asked: Arc::default() };
        let this = collector.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let this = this.clone();
                tokio::spawn(async move {
                    let mut stream = BufReader::new(stream);
                    while this.answer(&mut stream).await.is_some() {}
                });
            }
        });
        collector
    }

    /// One batch; `None` at the end of the connection.
    async fn answer(&self, stream: &mut BufReader<TcpStream>) -> Option<()> {
        let (mut first, mut length) = (String::new(), 0);
        loop {
            let mut line = String::new();
            stream.read_line(&mut line).await.ok().filter(|read| *read > 0)?;
            if first.is_empty() {
                first.clone_from(&line);
            }
            match line.trim_end().to_ascii_lowercase().split_once(": ") {
                Some(("content-length", value)) => length = value.parse().unwrap(),
                Some(("content-type", value)) => assert_eq!(value, "application/x-protobuf"),
                Some(_) => {}
                None if line.trim_end().is_empty() => break,
                None => {}
            }
        }
        assert!(first.starts_with("POST /v1/traces "), "{first}");
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.ok()?;
        let batch = ExportTraceServiceRequest::decode(&body[..]).unwrap();
        *self.asked.lock() += 1;
        let say = *self.say.lock();
        let status = match say {
            Say::Take => 200,
            Say::Status(status) => status,
            Say::Hang => return std::future::pending().await,
        };
        if say == Say::Take {
            for resource in batch.resource_spans {
                let service = texts(&resource.resource.unwrap().attributes);
                let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
                self.taken.lock().extend(spans.map(|span| Seen { service: service.clone(), span }));
            }
        }
        let answer = ExportTraceServiceResponse::default().encode_to_vec();
        let head = format!("HTTP/1.1 {status} Said\r\nContent-Type: application/x-protobuf\r\nContent-Length: {}\r\n\r\n", answer.len());
        stream.get_mut().write_all(&[head.into_bytes(), answer].concat()).await.ok()
    }

    fn config(&self, more: &str) -> String {
        format!("otlp.endpoint = \"http://{}\"\n{more}", self.address)
    }

    /// The accepted spans of a trace.
    fn of(&self, trace: &str) -> Vec<Seen> {
        self.taken.lock().iter().filter(|seen| hex(&seen.span.trace_id) == trace).cloned().collect()
    }
}

fn parent(trace: &str, flags: &str) -> String {
    format!("00-{trace}-00f067aa0ba902b7-{flags}")
}

#[tokio::test]
async fn the_spans_of_a_request_hang_together() {
    let _turn = light().await;
    let collector = Collector::start(Say::Take).await;
    let endpoint = format!("http://{}/", collector.address);
    let origin = RealOrigin::start_with(&[("CASTIER_OTLP__ENDPOINT", &endpoint), ("CASTIER_OTLP__SAMPLE", "0")]).await;
    // A new cluster would look for the blob at the other node, too.
    let cluster = Cluster::with_secret(2, &origin.url(), &collector.config("otlp.sample = 0.0\ncluster.peek_for = \"0s\"")).await;
    let blob = Blob::new(3000);
    let (owner, asker) = (cluster.owner(&blob), 1 - cluster.owner(&blob));
    let (owner, asker) = (&cluster.nodes[owner], &cluster.nodes[asker]);
    assert_eq!(Request::new("PUT", blob.path()).body(blob.whole()).send(origin.addr).await.status, 201);

    let unsampled = "11111111111111111111111111111111";
    let quiet = Request::get(Blob::new(5).path()).header("traceparent", parent(unsampled, "00")).send(asker.public()).await;
    assert_eq!(quiet.status, 404);
    let request = Request::get(blob.path()).header("traceparent", parent(TRACE, "01")).header("User-Agent", "a test");
    request.send(asker.public()).await.assert_is(&blob);
    let spans = eventually("the spans", async || Some(collector.of(TRACE)).filter(|spans| spans.len() >= 5)).await;
    assert_eq!(spans.len(), 5, "{spans:?}");
    let instances = [&asker.name, &owner.name];
    let one = |service: &str, kind: SpanKind, instance: Option<&String>| {
        let is = |seen: &&Seen| seen.is(service, kind) && instance.is_none_or(|instance| seen.service["service.instance.id"] == *instance);
        let found: Vec<_> = spans.iter().filter(is).collect();
        assert_eq!(found.len(), 1, "{service} {kind:?} {instance:?}: {spans:?}");
        found[0].clone()
    };
    let at_asker = [SpanKind::Server, SpanKind::Client].map(|kind| one("castier", kind, Some(instances[0])));
    let at_owner = [SpanKind::Server, SpanKind::Client].map(|kind| one("castier", kind, Some(instances[1])));
    let at_origin = one("castier-origin", SpanKind::Server, None);
    assert_eq!(at_asker[0].parent(), "00f067aa0ba902b7");
    for (child, parent) in
        [(&at_asker[1], &at_asker[0]), (&at_owner[0], &at_asker[1]), (&at_owner[1], &at_owner[0]), (&at_origin, &at_owner[1])]
    {
        assert_eq!(child.parent(), parent.id(), "{child:?} below {parent:?}");
        assert!(
            child.span.start_time_unix_nano >= parent.span.start_time_unix_nano.saturating_sub(5_000_000),
            "{child:?} below {parent:?}"
        );
        assert!(child.span.end_time_unix_nano >= child.span.start_time_unix_nano);
    }
    let (server, client) = (at_asker[0].attributes(), at_asker[1].attributes());
    for (name, value) in [
        ("http.request.method", "GET"),
        ("http.route", "/cas/{digest}"),
        ("url.path", &*blob.path()),
        ("http.response.status_code", "200"),
        ("network.protocol.version", "1.1"),
        ("client.address", "127.0.0.1"),
        ("user_agent.original", "a test"),
        ("castier.cache", "miss"),
        ("castier.source", "peer"),
    ] {
        assert_eq!(server.get(name).map(String::as_str), Some(value), "{name} in {server:?}");
    }
    for (name, value) in [
        ("http.request.method", "GET"),
        ("url.full", &*format!("http://{}{}", owner.name, blob.path())),
        ("server.address", &*owner.address.to_string()),
        ("server.port", "8081"),
        ("castier.source", "peer"),
        ("http.response.status_code", "200"),
        ("http.response.body.size", "3000"),
    ] {
        assert_eq!(client.get(name).map(String::as_str), Some(value), "{name} in {client:?}");
    }
    assert_eq!(at_asker[0].span.name, "GET /cas/{digest}");
    // What was not to be sampled was not, and of itself castier samples nothing here.
    let all: Vec<_> = collector.taken.lock().iter().map(|seen| hex(&seen.span.trace_id)).collect();
    assert!(all.iter().all(|trace| trace == TRACE), "{all:?}");
}

#[tokio::test]
async fn castier_samples_what_says_nothing_itself() {
    let _turn = light().await;
    let collector = Collector::start(Say::Take).await;
    let origin = RealOrigin::start().await;
    let castier = Castier::start(&origin.url(), &collector.config("otlp.sample = 1")).await;
    let blob = Blob::new(500);
    Request::new("PUT", blob.path()).body(blob.whole()).send(castier.public).await;
    for _ in 0..20 {
        // The fast lane.
        get(castier.public, &blob).await.assert_is(&blob);
    }
    Request::get("/ac/unknown").send(castier.public).await;
    let names = || {
        let mut names: BTreeMap<String, usize> = BTreeMap::new();
        collector.taken.lock().iter().for_each(|seen| *names.entry(seen.span.name.clone()).or_default() += 1);
        names
    };
    let names = eventually("all spans", async || Some(names()).filter(|names| names.values().sum::<usize>() >= 22)).await;
    assert_eq!(names, BTreeMap::from([("GET".into(), 1), ("GET /cas/{digest}".into(), 20), ("PUT /cas/{digest}".into(), 1)]));
    // A load that fails is an error, on both sides.
    drop(origin);
    let trace = "22222222222222222222222222222222";
    let failed = Request::get(Blob::new(6).path()).header("traceparent", parent(trace, "01")).send(castier.public).await;
    assert_eq!(failed.status, 502);
    let failed = eventually("the spans of a failure", async || Some(collector.of(trace)).filter(|spans| spans.len() >= 2)).await;
    assert!(
        failed.iter().any(|seen| seen.span.kind() == SpanKind::Client) && failed.iter().any(|seen| seen.span.kind() == SpanKind::Server)
    );
    for seen in &failed {
        assert_eq!(seen.span.status.as_ref().unwrap().code(), StatusCode::Error, "{seen:?}");
        assert!(seen.attributes().contains_key("error.type"), "{seen:?}");
    }
}

#[tokio::test]
async fn a_bad_collector_costs_no_request_and_little_memory() {
    let _turn = light().await;
    let away = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    for say in [Some(Say::Hang), Some(Say::Status(500)), Some(Say::Status(429)), None] {
        let collector = Collector::start(say.unwrap_or(Say::Take)).await;
        let endpoint = if say.is_none() { away } else { collector.address };
        let config = format!("otlp.endpoint = \"http://{endpoint}\"\notlp.sample = 1.0\notlp.buffer = \"64KiB\"\notlp.timeout = \"3s\"");
        let origin = crate::support::LyingOrigin::start().await;
        let castier = Castier::start(&origin.url(), &config).await;
        let blob = origin.blob(500);
        let dropped = async || metrics(&castier).await.sum("castier_log_dropped_total", &[("sink", "otlp")]);
        let start = Instant::now();
        let mut conn = crate::support::Conn::open(castier.public).await;
        for _ in 0..300 {
            assert_eq!(conn.ask(&Request::get(blob.path())).await.status, 200);
        }
        // Each would have taken three seconds.
        assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
        // 64 KiB hold some eighty spans, and what was sent in vain is gone.
        eventually("what is lost is counted", async || (dropped().await >= 150).then_some(())).await;
        eventually("a word about it", async || (castier.output().matches("the collector takes no spans").count() == 1).then_some(())).await;
        if say.is_some() {
            *collector.say.lock() = Say::Take;
            let trace = "33333333333333333333333333333333";
            // The batch under way is still to fail.
            eventually("a span that is taken", async || {
                let request = Request::get(blob.path()).header("traceparent", parent(trace, "01"));
                assert_eq!(request.send(castier.public).await.status, 200);
                (!collector.of(trace).is_empty()).then_some(())
            })
            .await;
            eventually("the news", async || castier.output().contains("the collector takes spans again").then_some(())).await;
        }
        assert_eq!(castier.output().matches("the collector takes no spans").count(), 1, "told once");
    }
}

#[tokio::test]
async fn the_end_sends_what_is_left_within_two_seconds() {
    let _turn = light().await;
    for say in [Say::Take, Say::Hang] {
        let collector = Collector::start(say).await;
        let endpoint = format!("http://{}", collector.address);
        let mut origin = RealOrigin::start_with(&[("CASTIER_OTLP__ENDPOINT", &endpoint)]).await;
        let mut castier = Castier::start(&origin.url(), &collector.config("otlp.timeout = \"30s\"")).await;
        for to in [castier.public, origin.addr] {
            Request::get("/ac/x").header("traceparent", parent(TRACE, "01")).send(to).await;
        }
        let start = Instant::now();
        castier.signal(Signal::TERM);
        assert_eq!(castier.exit().await.code(), Some(0));
        assert_eq!(origin.terminate().await.code(), Some(0));
        assert!(start.elapsed() < Duration::from_secs(15), "two seconds each: {:?}", start.elapsed());
        if say == Say::Take {
            let mut made: Vec<_> = collector.of(TRACE).iter().map(|seen| seen.service["service.name"].clone()).collect();
            made.sort();
            assert_eq!(made, ["castier", "castier-origin", "castier-origin"]);
        } else {
            for output in [castier.output(), origin.output()] {
                assert!(output.contains("the collector did not take the last spans"), "{output}");
            }
        }
    }
}
