//! Every series of both programs, with the event that changes it. Each program has a table, which is compared with `/metrics` and with
//! docs/operations.md in both directions. A small cluster with a disk tier goes through all events. So the test fails for a series without an event,
//! and for a series that its event does not change.

use crate::support::{
    Blob, Castier, Cluster, Conn, Download, Gate, KIB, Lie, LyingOrigin, MIB, RealOrigin, Request, RouteUpstream,
    cluster::wait_for_peers,
    eventually, get, heavy, light,
    stats::{Metrics, metrics, metrics_at},
};
use rustix::process::Signal;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

/// A series: its name, type and labels; and the events that change it, each with the values of its labels.
type Series = (&'static str, &'static str, &'static [&'static str], &'static [(&'static str, &'static str)]);

// The events, as they come.
const START: &str = "the start";
const MISS: &str = "a get from the origin";
const HIT: &str = "a hit in memory";
const ELSEWHERE: &str = "a get at another node";
const MIRRORED: &str = "a hit in the mirror";
const ON_DISK: &str = "a hit on disk";
const ABSENT: &str = "a get of what is absent";
const HERD: &str = "two gets at once";
const UPLOAD: &str = "an upload";
const OTHER_BYTES: &str = "an upload of other bytes";
const BREAK: &str = "a transfer that breaks";
const WRONG: &str = "wrong bytes from the origin";
const TOO_MANY: &str = "more fills than permits";
const TOO_MUCH: &str = "more blobs than the tiers hold";
const ROT: &str = "a restart over a file that rotted";
const ROUTES: &str = "requests of routes";
const UPSTREAM_GONE: &str = "an upstream that is away";
const NO_DISK: &str = "a disk that cannot be written";
const NO_NAMES: &str = "a name table that cannot be written";
const NO_ORIGIN: &str = "no origin";
const NO_PEER: &str = "a node that is gone";
const LEFT: &str = "a member that leaves";

// Those of castier-origin, from its start on.
const STORED: &str = "an upload to the origin";
const ROTTED: &str = "a file of the origin that rotted";

/// The event for each result of a request for a blob.
const BY_RESULT: &[(&str, &str)] = &[
    (MISS, r#"result="miss""#),
    (HIT, r#"result="hit""#),
    (ABSENT, r#"result="absent",route="blob""#),
    (HERD, r#"result="collapsed""#),
    (WRONG, r#"result="error""#),
    (ABSENT, r#"route="relay""#),
    (ROUTES, r#"route="route""#),
];

/// All of castier's.
const SERIES: &[Series] = &[
    (
        "castier_http_requests_total",
        "counter",
        &["listener", "method", "route", "code"],
        &[
            (MISS, r#"code="200",listener="public",method="GET",route="blob""#),
            (ELSEWHERE, r#"listener="peer""#),
            (START, r#"route="control""#),
            (UPLOAD, r#"method="PUT""#),
            (ABSENT, r#"route="relay""#),
            (ROUTES, r#"listener="public",method="GET",route="route""#),
        ],
    ),
    ("castier_http_request_duration_seconds", "histogram", &["route", "result"], BY_RESULT),
    ("castier_http_first_byte_seconds", "histogram", &["route", "result"], BY_RESULT),
    ("castier_http_requests_in_flight", "gauge", &[], &[(HERD, "")]),
    ("castier_uploads_in_progress", "gauge", &[], &[(UPLOAD, "")]),
    (
        "castier_http_response_bytes_total",
        "counter",
        &["from", "listener"],
        &[
            (MISS, r#"from="flight",listener="public""#),
            (HIT, r#"from="memory",listener="public""#),
            (ELSEWHERE, r#"from="memory",listener="peer""#),
            (MIRRORED, r#"from="mirror",listener="public""#),
            (ON_DISK, r#"from="disk",listener="public""#),
        ],
    ),
    ("castier_source_bytes_total", "counter", &["source"], &[(MISS, r#"source="origin""#), (ELSEWHERE, r#"source="peer""#)]),
    ("castier_gets_total", "counter", &[], &[(MISS, "")]),
    ("castier_gets_from_peers_total", "counter", &[], &[(ELSEWHERE, "")]),
    ("castier_loads_total", "counter", &[], &[(MISS, "")]),
    ("castier_flights_total", "counter", &[], &[(MISS, "")]),
    ("castier_collapsed_total", "counter", &[], &[(HERD, "")]),
    ("castier_hits_total", "counter", &["tier"], &[(HIT, r#"tier="memory""#), (MIRRORED, r#"tier="mirror""#), (ON_DISK, r#"tier="disk""#)]),
    ("castier_hits_from_peers_total", "counter", &[], &[(ELSEWHERE, "")]),
    (
        "castier_source_loads_total",
        "counter",
        &["source", "result"],
        &[
            (MISS, r#"result="ok",source="origin""#),
            (ELSEWHERE, r#"result="ok",source="peer""#),
            (ABSENT, r#"result="absent",source="origin""#),
            (WRONG, r#"result="error",source="origin""#),
        ],
    ),
    ("castier_source_loads_given_up_total", "counter", &["source", "reason"], &[(TOO_MANY, r#"reason="limit",source="origin""#)]),
    ("castier_source_load_duration_seconds", "histogram", &["source"], &[(MISS, r#"source="origin""#), (ELSEWHERE, r#"source="peer""#)]),
    ("castier_source_resumes_total", "counter", &["source"], &[(BREAK, r#"source="origin""#)]),
    ("castier_flights_in_progress", "gauge", &[], &[(HERD, "")]),
    ("castier_flight_followers", "gauge", &[], &[(HERD, "")]),
    ("castier_fill_wait_seconds", "histogram", &[], &[(MISS, "")]),
    ("castier_origin_up", "gauge", &[], &[(NO_ORIGIN, "")]),
    ("castier_tier_bytes", "gauge", &["tier"], &[(MISS, r#"tier="memory""#), (ELSEWHERE, r#"tier="mirror""#), (MISS, r#"tier="disk""#)]),
    (
        "castier_tier_capacity_bytes",
        "gauge",
        &["tier"],
        &[(START, r#"tier="memory""#), (START, r#"tier="mirror""#), (START, r#"tier="disk""#)],
    ),
    ("castier_tier_blobs", "gauge", &["tier"], &[(MISS, r#"tier="memory""#), (ELSEWHERE, r#"tier="mirror""#), (MISS, r#"tier="disk""#)]),
    (
        "castier_tier_evictions_total",
        "counter",
        &["tier"],
        &[(TOO_MUCH, r#"tier="memory""#), (TOO_MUCH, r#"tier="mirror""#), (TOO_MUCH, r#"tier="disk""#)],
    ),
    (
        "castier_tier_evicted_age_seconds",
        "histogram",
        &["tier"],
        &[(TOO_MUCH, r#"tier="memory""#), (TOO_MUCH, r#"tier="mirror""#), (TOO_MUCH, r#"tier="disk""#)],
    ),
    (
        "castier_corrupt_blobs_total",
        "counter",
        &["source"],
        &[(WRONG, r#"source="origin""#), (OTHER_BYTES, r#"source="client""#), (ROT, r#"source="disk""#)],
    ),
    (
        "castier_route_requests_total",
        "counter",
        &["route", "result"],
        &[
            (ROUTES, r#"result="hit",route="npm /npm""#),
            (ROUTES, r#"result="miss",route="npm /npm""#),
            (ROUTES, r#"result="absent",route="npm /npm""#),
            (ROUTES, r#"result="refused",route="npm /npm""#),
            (ROUTES, r#"result="relayed",route="npm /npm""#),
            (ROUTES, r#"result="error",route="npm /npm""#),
            (ROUTES, r#"result="revalidated",route="/files/{name}""#),
            (UPSTREAM_GONE, r#"result="stale",route="/files/{name}""#),
        ],
    ),
    (
        "castier_route_questions_total",
        "counter",
        &["route", "code"],
        &[
            (ROUTES, r#"code="200",route="npm /npm""#),
            (ROUTES, r#"code="429",route="npm /npm""#),
            (ROUTES, r#"code="304",route="/files/{name}""#),
            (UPSTREAM_GONE, r#"code="503",route="/files/{name}""#),
        ],
    ),
    ("castier_route_saved_bytes_total", "counter", &["route"], &[(ROUTES, r#"route="npm /npm""#)]),
    ("castier_route_unparsed_total", "counter", &["route"], &[(ROUTES, r#"route="npm /npm""#)]),
    (
        "castier_route_upstream_up",
        "gauge",
        &["route"],
        &[(START, r#"route="npm /npm""#), (START, r#"route="/files/{name}""#), (UPSTREAM_GONE, r#"route="/files/{name}""#)],
    ),
    ("castier_names", "gauge", &[], &[(ROUTES, "")]),
    ("castier_names_bytes", "gauge", &[], &[(ROUTES, "")]),
    ("castier_names_capacity_bytes", "gauge", &[], &[(START, "")]),
    ("castier_names_write_failures", "gauge", &[], &[(NO_NAMES, "")]),
    ("castier_shed_requests_total", "counter", &["reason"], &[(TOO_MANY, r#"reason="fills""#)]),
    ("castier_disk_scan_progress_ratio", "gauge", &[], &[(START, "")]),
    ("castier_disk_scrub_last_pass_timestamp_seconds", "gauge", &[], &[(START, "")]),
    ("castier_disk_scrub_rate_bytes", "gauge", &[], &[(START, "")]),
    ("castier_disk_scrubbed_blobs_total", "counter", &[], &[(ROT, "")]),
    ("castier_disk_errors_total", "counter", &["op", "kind"], &[(NO_DISK, r#"kind="path",op="write""#)]),
    ("castier_disk_filesystem_avail_bytes", "gauge", &[], &[(START, "")]),
    ("castier_disk_filesystem_free_inodes", "gauge", &[], &[(START, "")]),
    ("castier_disk_io_seconds", "histogram", &["op"], &[(MISS, r#"op="write""#), (ON_DISK, r#"op="read""#)]),
    ("castier_disk_write_errors_total", "counter", &["reason"], &[(NO_DISK, r#"reason="path""#)]),
    ("castier_disk_skipped_writes_total", "counter", &["reason"], &[(NO_DISK, r#"reason="failed""#)]),
    ("castier_cluster_peers", "gauge", &["state"], &[(START, r#"state="up""#), (NO_PEER, r#"state="down""#)]),
    ("castier_peer_up", "gauge", &["peer"], &[(START, ""), (NO_PEER, "")]),
    ("castier_peer_probe_seconds", "gauge", &["peer"], &[(START, "")]),
    ("castier_peer_errors_total", "counter", &["peer"], &[(NO_PEER, "")]),
    ("castier_cluster_members_hash", "gauge", &[], &[(START, ""), (LEFT, "")]),
    ("castier_cluster_changes_total", "counter", &[], &[(NO_PEER, "")]),
    ("castier_connections", "gauge", &[], &[(HERD, "")]),
    ("castier_peer_connections", "gauge", &[], &[(ELSEWHERE, "")]),
    ("castier_log_dropped_total", "counter", &["sink"], &[(START, r#"sink="loki""#)]),
    ("castier_memory_planned_bytes", "gauge", &[], &[(START, "")]),
    ("castier_build_info", "gauge", &["version"], &[(START, "")]),
    ("process_cpu_seconds_total", "counter", &[], &[(START, "")]),
    ("process_max_fds", "gauge", &[], &[(START, "")]),
    ("process_open_fds", "gauge", &[], &[(START, "")]),
    ("process_resident_memory_bytes", "gauge", &[], &[(START, "")]),
    ("process_start_time_seconds", "gauge", &[], &[(START, "")]),
    ("process_threads", "gauge", &[], &[(START, "")]),
    ("process_virtual_memory_bytes", "gauge", &[], &[(START, "")]),
];

/// Series that this cluster cannot change, and the tests that change them.
const ELSEWHERE_TESTED: &[(&str, &str)] = &[
    ("castier_memory_limit_bytes", "client_memory, a_plan_that_does_not_fit_is_told: a control group with a limit"),
    ("castier_tls_certificate_expiry_seconds", "peer_tls, nodes_with_certificates_are_a_cluster_and_nobody_else_is_let_in: cluster.tls"),
    ("castier_tls_reload_failures_total", "protocols, certificates_are_read_again: listen.tls"),
    ("castier_http2_streams", "http2, heads_and_streams_have_limits: clients that speak HTTP/2"),
    ("castier_http2_floods_total", "http2, floods_close_their_connection_and_are_counted: clients that speak HTTP/2"),
    ("castier_circuit_breakers", "outage, an_origin_that_hangs_is_not_waited_for_by_everybody: an origin that hangs"),
    ("castier_circuit_breaker_refusals_total", "outage, an_origin_that_hangs_is_not_waited_for_by_everybody: an origin that hangs"),
    ("castier_retries_refused_total", "outage, retries_do_not_multiply_an_outage: an origin that fails"),
    ("castier_bucket_retries_refused_total", "castier-cache, retries_are_a_part_of_the_requests: the same budget"),
    ("castier_denied_requests_total", "protocols, users_and_tokens_have_roles_and_scopes: users"),
    ("castier_access_reload_failures_total", "castier-access, every_series_exists_from_the_start_and_counts_its_own"),
    ("castier_connections_turned_away_total", "castier-access, every_series_exists_from_the_start_and_counts_its_own"),
    ("castier_password_checks_total", "castier-access, every_series_exists_from_the_start_and_counts_its_own"),
    ("castier_fill_ranges_total", "parallel, ranges_are_read_at_the_same_time: a blob over fill.parallel_over"),
    ("castier_bucket_max_requests", "protocols, a_throttling_store_is_asked_more_gently: a bucket"),
    ("castier_bucket_throttled_total", "protocols, a_throttling_store_is_asked_more_gently: a bucket"),
    ("castier_bucket_uploads_aborted_total", "protocols, an_upload_that_fails_leaves_nothing: a bucket"),
    ("castier_outbox_blobs", "protocols, uploads_go_on_while_the_store_is_down: a bucket"),
    ("castier_outbox_entries", "protocols, uploads_go_on_while_the_store_is_down: a bucket"),
    ("castier_outbox_bytes", "protocols, uploads_go_on_while_the_store_is_down: a bucket"),
    ("castier_outbox_capacity_bytes", "protocols, uploads_go_on_while_the_store_is_down: a bucket"),
    ("castier_outbox_oldest_seconds", "protocols, uploads_go_on_while_the_store_is_down: a bucket"),
    ("castier_outbox_uploads_total", "protocols, uploads_go_on_while_the_store_is_down: a bucket"),
    ("castier_outbox_refused_total", "protocols, a_full_outbox_and_a_broken_disk_are_507: a bucket"),
    ("castier_outbox_lost_total", "outbox, damaged_bytes_are_named_and_do_not_hold_up_the_rest: a damaged disk"),
    ("castier_events_delivered_total", "castier-events, rabbitmq_gets_every_event_in_order: a broker"),
    ("castier_events_failures_total", "castier-events, rabbitmq_gets_every_event_in_order: a broker"),
    ("castier_events_pending", "castier-events, rabbitmq_gets_every_event_in_order: a broker"),
    ("castier_events_oldest_seconds", "castier-events, rabbitmq_gets_every_event_in_order: a broker"),
    ("castier_events_sink_up", "castier-events, rabbitmq_gets_every_event_in_order: a broker"),
];

/// All of castier-origin's.
const ORIGIN_SERIES: &[Series] = &[
    ("castier_origin_requests_total", "counter", &["method", "code"], &[(STORED, r#"code="201",method="PUT""#)]),
    ("castier_origin_request_duration_seconds", "histogram", &["method"], &[(STORED, r#"method="PUT""#)]),
    ("castier_origin_blobs", "gauge", &[], &[(STORED, "")]),
    ("castier_origin_bytes", "gauge", &[], &[(STORED, "")]),
    ("castier_origin_corrupt_blobs_total", "counter", &[], &[(ROTTED, "")]),
    ("castier_origin_log_dropped_total", "counter", &["sink"], &[(STORED, r#"sink="loki""#)]),
    ("process_cpu_seconds_total", "counter", &[], &[(STORED, "")]),
    ("process_max_fds", "gauge", &[], &[(STORED, "")]),
    ("process_open_fds", "gauge", &[], &[(STORED, "")]),
    ("process_resident_memory_bytes", "gauge", &[], &[(STORED, "")]),
    ("process_start_time_seconds", "gauge", &[], &[(STORED, "")]),
    ("process_threads", "gauge", &[], &[(STORED, "")]),
    ("process_virtual_memory_bytes", "gauge", &[], &[(STORED, "")]),
];

/// The upper ends of the buckets of a duration.
const BUCKETS: &[&str] =
    &["0.001", "0.0025", "0.005", "0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1", "2.5", "5", "10", "30", "60", "120", "+Inf"];

/// The nodes, and the changes of their series.
struct World {
    origin: LyingOrigin,
    upstream: RouteUpstream,
    cluster: Cluster,
    /// The series of each node before the event.
    before: Vec<BTreeMap<String, f64>>,
    /// The current event.
    event: &'static str,
    since: Instant,
    /// The series that each event changed, with their labels.
    moved: BTreeMap<&'static str, BTreeSet<String>>,
}

fn figures(metrics: &Metrics) -> BTreeMap<String, f64> {
    metrics.figures().map(|(series, value)| (series.to_owned(), value)).collect()
}

/// Whether a series with its labels, as it stands in `/metrics`, is of the family `name`, with these labels.
fn is_of(series: &str, name: &str, labels: &str) -> bool {
    let (own, rest) = series.split_once('{').unwrap_or((series, ""));
    let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| own.strip_suffix(suffix)).filter(|family| *family == name);
    (own == name || family.is_some()) && labels.split(',').all(|label| rest.contains(label))
}

/// The changes that the table expects for an event, and that are not in `moved`.
fn missing(table: &[Series], event: &str, moved: &BTreeSet<String>) -> Vec<String> {
    let all = table.iter().flat_map(|(name, .., events)| events.iter().map(move |(event, labels)| (*name, *event, *labels)));
    let due = all.filter(|(_, its, _)| *its == event);
    let missing = due.filter(|(name, _, labels)| !moved.iter().any(|series| is_of(series, name, labels)));
    missing.map(|(name, _, labels)| format!("{name}{{{labels}}}")).collect()
}

impl World {
    async fn new() -> Self {
        let (origin, upstream) = (LyingOrigin::start().await, RouteUpstream::start().await);
        let route = |more: &str| format!("{{ {more}, upstream = \"{}\", access = \"local\" }}", upstream.url());
        let routes = [
            route("protocol = \"npm\", prefix = \"/npm\", ttl = \"1h\""),
            route("path = \"/files/{name}\", kind = \"fresh\", ttl = \"0s\""),
        ];
        let config = format!(
            "disk.path = \"$DISK\"\ndisk.capacity = \"16MiB\"\ndisk.scrub_rate = \"1GiB\"\nmemory.capacity = \"4MiB\"\n\
             memory.max_blob = \"1MiB\"\nfill.max_in_flight = 2\nfill.max_wait = \"200ms\"\norigin.connect_timeout = \"500ms\"\n\
             origin.retries = 1\ncluster.stall_timeout = \"1s\"\ncluster.peek_for = \"0s\"\nlog.loki.wait = \"50ms\"\nlog.loki_url = \"{}\"\n\
             route = [{}]",
            refusing_loki().await,
            routes.join(", "),
        );
        let cluster = Cluster::with_secret(2, &origin.url(), &config).await;
        let before = vec![BTreeMap::new(); 2];
        Self { origin, upstream, cluster, before, event: START, since: Instant::now(), moved: BTreeMap::new() }
    }

    fn castier(&self, node: usize) -> &Castier {
        self.cluster.nodes[node].castier()
    }

    /// A new blob that this node owns, and the origin holds.
    fn blob(&self, owner: usize, size: u64) -> Blob {
        loop {
            let blob = Blob::new(size);
            if self.cluster.owner(&blob) == owner {
                self.origin.add(&blob);
                return blob;
            }
        }
    }

    /// Records the changes since the start of the event.
    async fn look(&mut self) {
        let moved = self.moved.entry(self.event).or_default();
        for (node, before) in self.cluster.nodes.iter().zip(&self.before) {
            if let Some(castier) = node.running() {
                let now = figures(&metrics(castier).await);
                moved.extend(
                    now.into_iter().filter(|(series, value)| before.get(series).unwrap_or(&0.0) != value).map(|(series, _)| series),
                );
            }
        }
    }

    /// The changes that the table expects for the current event, and that have not happened.
    fn missing(&self) -> Vec<String> {
        missing(SERIES, self.event, &self.moved[self.event])
    }

    /// Waits until the event has caused all expected changes, and starts the next one.
    async fn then(&mut self, next: &'static str) {
        let start = Instant::now();
        loop {
            self.look().await;
            let missing = self.missing();
            if missing.is_empty() {
                break;
            }
            assert!(start.elapsed().as_secs() < 30, "{:?} does not move {missing:?}", self.event);
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        println!("{:>6.2} s {}", self.since.elapsed().as_secs_f64(), self.event);
        self.event = next;
        self.since = Instant::now();
        for (node, before) in self.cluster.nodes.iter().zip(&mut self.before) {
            if let Some(castier) = node.running() {
                *before = figures(&metrics(castier).await);
            }
        }
    }
}

/// Flips a bit of a file.
fn flip(path: &Path) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 100).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 100).unwrap();
}

/// A Loki that refuses every batch with a 4xx.
async fn refusing_loki() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.windows(4).any(|end| end == b"\r\n\r\n") && stream.read_buf(&mut head).await.is_ok_and(|read| read > 0) {}
                let _ = stream.write_all(b"HTTP/1.1 400 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
                // What is left of the batch is read, so that the answer is not lost.
                while stream.read_buf(&mut head).await.is_ok_and(|read| read > 0) {}
            });
        }
    });
    url
}

/// The rows of a table in docs/operations.md: name, type, labels.
fn documented(section: &str) -> BTreeMap<String, (String, BTreeSet<String>)> {
    let manual = fs::read_to_string(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/operations.md")).unwrap();
    let section = manual.split(&format!("\n## {section}\n")).nth(1).unwrap().split("\n#").next().unwrap();
    let code = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<BTreeSet<_>>();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    let entries = rows.flat_map(|row| {
        let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
        let (kind, labels) = (cells[1].to_owned(), code(cells[2]));
        code(cells[0]).into_iter().map(move |name| (name, (kind.clone(), labels.clone())))
    });
    entries.collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_series_moves() {
    let _turn = heavy().await;
    let mut world = World::new().await;

    world.then(MISS).await;
    let small = world.blob(0, 100 * KIB);
    get(world.cluster.nodes[0].public(), &small).await.assert_is(&small);

    world.then(HIT).await;
    get(world.cluster.nodes[0].public(), &small).await.assert_is(&small);

    world.then(ELSEWHERE).await;
    get(world.cluster.nodes[1].public(), &small).await.assert_is(&small);

    world.then(MIRRORED).await;
    get(world.cluster.nodes[1].public(), &small).await.assert_is(&small);

    world.then(ON_DISK).await;
    let large = world.blob(0, 2 * MIB);
    Download::default().of(&large, world.cluster.nodes[0].public()).await.assert_is(&large);
    let name = large.digest.to_string();
    let file = world.cluster.nodes[0].path("disk").join(&name[..2]).join(&name);
    let written = eventually("the file", async || File::open(&file).ok()).await;
    // Out of the page cache, so that the disk has to be waited for.
    written.sync_all().unwrap();
    rustix::fs::fadvise(&written, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    if fs::read_to_string("/proc/self/mounts").unwrap().lines().any(|mount| {
        let fields: Vec<_> = mount.split(' ').collect();
        fields[2] == "tmpfs" && fields[1] != "/" && file.starts_with(fields[1])
    }) {
        println!("SKIPPED: files are in memory here, and no read of one waits");
        world.moved.entry(ON_DISK).or_default().insert("castier_disk_io_seconds_count{op=\"read\"}".to_owned());
    }
    Download::default().of(&large, world.cluster.nodes[0].public()).await.assert_is(&large);

    world.then(ABSENT).await;
    get(world.cluster.nodes[0].public(), &absent(&world)).await.assert_problem(404);
    Request::get("/elsewhere").send(world.cluster.nodes[0].public()).await;

    world.then(HERD).await;
    let gate = Gate::new();
    let held = world.blob(0, 50 * KIB);
    world.origin.always(&held, Lie::honest().hold(&gate));
    let clients: Vec<_> = (0..2)
        .map(|_| {
            let (blob, from) = (held.clone(), world.cluster.nodes[0].public());
            tokio::spawn(async move { get(from, &blob).await.assert_is(&blob) })
        })
        .collect();
    eventually("one leads and one follows", async || {
        (world.cluster.nodes[0].metrics().await.total("castier_flight_followers") == 1).then_some(())
    })
    .await;
    world.look().await;
    gate.open();
    for client in clients {
        client.await.unwrap();
    }

    world.then(UPLOAD).await;
    let (gate, upload) = (Gate::new(), world.blob(0, MIB));
    world.origin.forget(&upload);
    world.origin.next_upload(Lie::honest().hold_answer(&gate));
    let client = tokio::spawn({
        let (request, to) = (Request::new("PUT", upload.path()).body(upload.whole()), world.cluster.nodes[0].public());
        async move { Conn::open(to).await.ask(&request).await.status }
    });
    eventually("the upload has come", async || (gate.arrived() == 1).then_some(())).await;
    world.look().await;
    gate.open();
    assert_eq!(client.await.unwrap(), 201);

    world.then(OTHER_BYTES).await;
    let named = absent(&world);
    Request::new("PUT", named.path()).body("other bytes").send(world.cluster.nodes[0].public()).await.assert_problem(422);

    world.then(BREAK).await;
    let broken = world.blob(0, 2 * MIB);
    world.origin.next(&broken, [Lie::honest().truncate(MIB)]);
    Download::default().of(&broken, world.cluster.nodes[0].public()).await.assert_is(&broken);

    world.then(WRONG).await;
    let wrong = world.blob(0, 10 * KIB);
    world.origin.always(&wrong, Lie::honest().flip_bit(7));
    get(world.cluster.nodes[0].public(), &wrong).await.assert_problem(502);

    world.then(TOO_MANY).await;
    let gate = Gate::new();
    let held = [(); 2].map(|()| world.blob(0, 10 * KIB));
    let clients: Vec<_> = held
        .iter()
        .map(|blob| {
            world.origin.always(blob, Lie::honest().hold(&gate));
            let (blob, from) = (blob.clone(), world.cluster.nodes[0].public());
            tokio::spawn(async move { get(from, &blob).await.assert_is(&blob) })
        })
        .collect();
    eventually("both permits are in use", async || (gate.arrived() == 2).then_some(())).await;
    get(world.cluster.nodes[0].public(), &world.blob(0, 10 * KIB)).await.assert_problem(503);
    gate.open();
    for client in clients {
        client.await.unwrap();
    }

    world.then(TOO_MUCH).await;
    for (owner, count, size) in [(0, 24, 1000 * KIB), (1, 8, 300 * KIB)] {
        for _ in 0..count {
            let blob = world.blob(owner, size);
            get(world.cluster.nodes[0].public(), &blob).await.assert_is(&blob);
        }
    }

    world.then(ROT).await;
    world.cluster.nodes[0].terminate().await;
    let disk = world.cluster.nodes[0].path("disk");
    let shelves = fs::read_dir(&disk).unwrap().flatten().filter(|shelf| shelf.file_name().len() == 2);
    let rotten = shelves.flat_map(|shelf| fs::read_dir(shelf.path()).unwrap().flatten()).next().expect("a file").path();
    flip(&rotten);
    world.before[0].clear();
    world.cluster.nodes[0].start().await;
    world.cluster.wait_until_whole().await;

    world.then(ROUTES).await;
    let public = world.cluster.nodes[0].public();
    // After the restart, since a family without series is not in `/metrics`. What the upstream sends for a packument is no JSON: it is passed on as it is.
    for (path, status) in [
        ("/npm/left-pad", 200),
        ("/npm/left-pad", 200),
        ("/npm/absent", 404),
        ("/npm/secret", 403),
        ("/npm/fault", 500),
        ("/npm/limited", 429),
        ("/npm/-/ping", 200),
        ("/files/a", 200),
        ("/files/a", 200),
    ] {
        assert_eq!(Request::get(path).send(public).await.status, status, "{path}");
    }

    world.then(UPSTREAM_GONE).await;
    world.upstream.goes();
    assert_eq!(Request::get("/files/a").send(public).await.status, 200, "what is kept");
    world.look().await;
    world.upstream.is_back();

    world.then(NO_DISK).await;
    fs::remove_dir_all(disk.join("tmp")).unwrap();
    fs::write(disk.join("tmp"), "in the way").unwrap();
    let unkept = world.blob(0, 100 * KIB);
    get(world.cluster.nodes[0].public(), &unkept).await.assert_is(&unkept);

    world.then(NO_NAMES).await;
    // No write to a file succeeds, so that of the name table fails.
    let unlimited = world.castier(0).limit_file_sizes(Some(0));
    assert_eq!(Request::get("/npm/right-pad").send(public).await.status, 200);
    eventually("a write fails", async || (world.cluster.nodes[0].metrics().await.total("castier_names_write_failures") > 0).then_some(()))
        .await;
    world.castier(0).limit_file_sizes(unlimited);

    world.then(NO_ORIGIN).await;
    world.origin.down().await;
    get(world.cluster.nodes[0].public(), &absent(&world)).await.assert_problem(502);
    world.look().await;
    world.origin.up().await;

    world.then(NO_PEER).await;
    let gone = world.cluster.nodes[1].name.clone();
    world.cluster.nodes[1].kill().await;
    let theirs = world.blob(1, 10 * KIB);
    get(world.cluster.nodes[0].public(), &theirs).await.assert_is(&theirs);
    wait_for_peers(&world.cluster.nodes[0], 0, 1).await;

    world.then(LEFT).await;
    let of_peers = |metrics: &Metrics| metrics.series().filter(|series| series.contains("peer=\"")).map(str::to_owned).collect::<Vec<_>>();
    let there = of_peers(&world.cluster.nodes[0].metrics().await);
    assert!(there.len() == 3 && there.iter().all(|series| series.contains(&gone)), "{there:?}");
    let all = metrics(world.castier(0)).await;
    world.cluster.nodes[0].configure(&[world.cluster.nodes[0].name.clone()]);
    world.cluster.nodes[0].signal(Signal::HUP);
    eventually("their series are gone", async || of_peers(&world.cluster.nodes[0].metrics().await).is_empty().then_some(())).await;
    world.then("the end").await;

    assert_table(SERIES, "Metrics of castier", &all, &world.moved.keys().copied().collect());
}

/// An absent blob that node 0 owns.
fn absent(world: &World) -> Blob {
    let blob = world.blob(0, 10);
    world.origin.forget(&blob);
    blob
}

/// The table agrees with `/metrics` and with docs/operations.md, and each of its series was changed by an event.
fn assert_table(table: &[Series], section: &str, all: &Metrics, came: &BTreeSet<&str>) {
    let is_here = |name: &str| ELSEWHERE_TESTED.iter().all(|(other, _)| *other != name);
    let types = all.text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let types: BTreeMap<_, _> = types.filter(|(name, _)| is_here(name)).collect();
    let names: BTreeMap<_, _> = table.iter().map(|(name, kind, ..)| (*name, *kind)).collect();
    assert_eq!(names.len(), table.len(), "a series stands in the table twice");
    assert_eq!(types, names, "/metrics on the left; give a new series an event in this table");
    let manual = documented(section);
    let own = |name: &&str| name.starts_with("castier_") && is_here(name);
    let told: Vec<_> = manual.keys().map(String::as_str).filter(own).collect();
    assert_eq!(told, names.keys().copied().filter(own).collect::<Vec<_>>(), "the manual on the left");
    for (name, kind, labels, events) in table {
        assert!(!events.is_empty() && events.iter().all(|(event, _)| came.contains(event)), "{name}: which event moves it?");
        let labels: BTreeSet<_> = labels.iter().map(ToString::to_string).collect();
        for series in all.series().filter(|series| is_of(series, name, "")) {
            let own = series.split_once('{').map_or("", |(_, rest)| rest.trim_end_matches('}'));
            let keys = own.split("\",").filter_map(|label| label.split_once('=')).map(|(key, _)| key.to_owned());
            assert_eq!(keys.filter(|key| key != "le").collect::<BTreeSet<_>>(), labels, "{series}");
        }
        assert!(all.text.contains(&format!("# HELP {name} ")), "{name} is not explained");
        if let Some((told, with)) = manual.get(*name).filter(|_| own(name)) {
            assert_eq!((told.as_str(), with), (*kind, &labels), "{name} in the manual, on the left");
        }
        if *kind == "histogram" {
            let buckets = all.series().filter(|series| series.starts_with(&format!("{name}_bucket{{")));
            let ends: BTreeSet<_> = buckets.filter_map(|series| series.split("le=\"").nth(1)?.split('"').next()).collect();
            let expected: BTreeSet<_> = BUCKETS.iter().copied().collect();
            if *name == "castier_tier_evicted_age_seconds" {
                assert!(ends.is_superset(&expected) && ends.contains("2592000"), "{name}: {ends:?}");
            } else {
                assert_eq!(ends, expected, "{name}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_series_of_the_origin_moves() {
    let _turn = light().await;
    let root = TempDir::new().unwrap();
    let mut command = Command::new(Path::new(Castier::program()).with_file_name("castier-origin"));
    command.args(["--listen", "127.0.0.1:0", "--root"]).arg(root.path());
    command.envs([("CASTIER_LISTEN__ADMIN", "127.0.0.1:0"), ("CASTIER_LOG__LOKI__WAIT", "50ms")]);
    command.env("CASTIER_LOG__LOKI_URL", refusing_loki().await);
    let (_origin, public, admin) = RealOrigin::bare(command).await;
    let moves = async |event: &str, before: &BTreeMap<String, f64>| {
        eventually(event, async || {
            let now = metrics_at(admin).await;
            let moved = figures(&now).into_iter().filter(|(series, value)| before.get(series).unwrap_or(&0.0) != value);
            missing(ORIGIN_SERIES, event, &moved.map(|(series, _)| series).collect()).is_empty().then_some(now)
        })
        .await
    };
    let blob = Blob::new(10 * KIB);
    assert_eq!(Request::new("PUT", blob.path()).body(blob.whole()).send(public).await.status, 201);
    let before = moves(STORED, &BTreeMap::new()).await;

    let name = blob.digest.to_string();
    flip(&root.path().join(&name[..2]).join(&name[2..4]).join(&name));
    get(public, &blob).await;
    let all = moves(ROTTED, &figures(&before)).await;
    assert_table(ORIGIN_SERIES, "Metrics of castier-origin", &all, &[STORED, ROTTED].into());
}
