//! The memory that clients can use is within `limits.client_memory`, and the kernel does not kill a node that is sized by docs/operations.md.

use crate::support::{
    Castier, Cluster, Conn, MIB, MemoryGroup, MuteOrigin, Request, cluster::wait_for_peers, eventually, get, heavy, light, metrics,
    process::config_text,
};
use castier::memory_plan;
use castier_config::{Castier as Config, Limits, Size};
use std::{fs, time::Duration};
use tempfile::TempDir;
use tokio::{io::AsyncWriteExt as _, net::TcpStream};

const LIMIT: u64 = 160 * MIB;

/// A node for a group of 160 MiB: the sum that docs/operations.md gives is a little less.
const SIZED: &str =
    "memory.capacity = \"32MiB\"\nmemory.max_blob = \"4MiB\"\nfill.memory = \"16MiB\"\nfill.max_in_flight = 32\norigin.max_requests = 32
limits.client_memory = \"24MiB\"\nlimits.max_connections = 5500\nlimits.header_timeout = \"40s\"\norigin.read_timeout = \"60s\"";

fn sized() -> (Config, Limits) {
    let mut config = Config::default();
    config.memory.capacity = Size::mib(32);
    config.memory.max_blob = Size::mib(4);
    config.fill.memory = Size::mib(16);
    (config.fill.max_in_flight, config.origin.max_requests) = (32, 32);
    (config.limits.client_memory, config.limits.max_connections) = (Size::mib(24), 5500);
    let limits = config.limits.clone();
    (config, limits)
}

async fn start_in(group: &MemoryGroup, origin: &str, config: &str) -> Castier {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("castier.toml"), config_text(origin, config)).unwrap();
    let mut command = group.command(Castier::program());
    command.arg("--config").arg(dir.path().join("castier.toml"));
    Castier::run(command, dir).await
}

/// Many clients send these bytes, one after the other. castier may answer or close connections; it must not end.
async fn attack(castier: &Castier, clients: usize, bytes: &[u8]) -> Vec<TcpStream> {
    let mut open = Vec::new();
    for n in 0..clients {
        let mut stream = TcpStream::connect(castier.public).await.unwrap();
        // What the kernel does not take at once castier does not read.
        let _ = tokio::time::timeout(Duration::from_millis(20), stream.write_all(bytes)).await;
        open.push(stream);
        if n % 500 == 0 {
            healthy(castier).await;
        }
    }
    open
}

async fn healthy(castier: &Castier) {
    let reply = Request::get("/healthz").send(castier.admin).await;
    assert_eq!(reply.status, 200, "a health check is answered whatever clients do");
}

/// During the attack castier answers health checks. After it castier works as before.
async fn survives(bytes: &[u8], clients: usize) {
    let _turn = heavy().await;
    let Some(group) = MemoryGroup::new(LIMIT) else { return };
    let origin = MuteOrigin::start().await;
    let castier = start_in(&group, &origin.url, SIZED).await;
    get(castier.public, &origin.blob).await.assert_is(&origin.blob);
    let open = attack(&castier, clients, bytes).await;
    healthy(&castier).await;
    // A hit needs nothing that the attack could exhaust.
    let mut hit = Conn::open(castier.public).await;
    hit.ask(&Request::get(origin.blob.path())).await.assert_is(&origin.blob);
    let shed = metrics(&castier).await.sum("castier_shed_requests_total", &[("reason", "client_memory")]);
    assert!(shed > 0, "more than the budget was asked for");
    println!("{clients} clients: {shed} shed, {} MiB in the group at most", group.peak() / MIB);
    drop(open);
    eventually("room for other requests", async || {
        let range = Request::get(origin.blob.path()).header("Range", "bytes=0-9").send(castier.public).await;
        (range.status == 206).then_some(())
    })
    .await;
    get(castier.public, &origin.blob).await.assert_is(&origin.blob);
    assert!(!castier.output().contains("control group"), "the plan fits");
}

#[tokio::test]
async fn half_heads() {
    let head = format!("GET / HTTP/1.1\r\nHost: castier.test\r\nX: {}", "y".repeat(31_000));
    survives(head.as_bytes(), 5000).await;
}

#[tokio::test]
async fn waiting_relays() {
    survives(b"GET /silence HTTP/1.1\r\nHost: castier.test\r\n\r\n", 5000).await;
}

#[tokio::test]
async fn pipelined_bytes_behind_relays() {
    let request = b"GET /silence HTTP/1.1\r\nHost: castier.test\r\n\r\n";
    let bytes: Vec<u8> = request.iter().copied().cycle().take(64 << 10).collect();
    survives(&bytes, 2000).await;
}

#[tokio::test]
async fn answers_that_nobody_takes() {
    survives(b"GET /flood HTTP/1.1\r\nHost: castier.test\r\n\r\n", 1000).await;
}

#[tokio::test]
async fn slow_uploads() {
    let head = "PUT /cas/0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef HTTP/1.1\r\nHost: castier.test\r\nContent-Length: 60000\r\n\r\n";
    survives(&[head.as_bytes(), &[b'x'; 59_000]].concat(), 1500).await;
}

#[tokio::test]
async fn a_shed_request_is_told_so() {
    let _turn = light().await;
    let origin = MuteOrigin::start().await;
    let castier = Castier::start(&origin.url, "limits.client_memory = \"1MiB\"").await;
    let held = attack(&castier, 100, b"GET /silence HTTP/1.1\r\nHost: castier.test\r\n\r\n").await;
    // castier has seen all of them once most have been turned away.
    let shed = async || metrics(&castier).await.sum("castier_shed_requests_total", &[("reason", "client_memory")]);
    eventually("there is no room left", async || (shed().await + origin.waiting() as u64 >= 100).then_some(())).await;
    let reply = Request::get("/other").send(castier.public).await;
    reply.assert_problem(503);
    assert_eq!(reply.header("retry-after"), Some("1"));
    assert!((50..=101).contains(&shed().await), "{}", shed().await);
    drop(held);
    eventually("room again", async || (get(castier.public, &origin.blob).await.status == 200).then_some(())).await;
}

/// The cost of one request of each kind is below the plan's value.
#[tokio::test]
async fn the_measured_costs_hold() {
    let _turn = heavy().await;
    let silence = b"GET /silence HTTP/1.1\r\nHost: castier.test\r\n\r\n".as_slice();
    let drip = b"GET /drip HTTP/1.1\r\nHost: castier.test\r\n\r\n".as_slice();
    let flood = b"GET /flood HTTP/1.1\r\nHost: castier.test\r\n\r\n".as_slice();
    let absent =
        b"GET /cas/0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef HTTP/1.1\r\nHost: castier.test\r\n\r\n".as_slice();
    let half = format!("GET / HTTP/1.1\r\nHost: castier.test\r\nX: {}", "y".repeat(31_000));
    let pipelined: Vec<u8> = silence.iter().copied().cycle().take(64 << 10).collect();
    let upload = "PUT /cas/0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef HTTP/1.1\r\nHost: castier.test\r\nContent-Length: 60000\r\n\r\n";
    let upload = [upload.as_bytes(), &[b'x'; 59_000]].concat();
    let small = "PUT /cas/0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef HTTP/1.1\r\nHost: castier.test\r\nContent-Length: 1000\r\n\r\nxxx";
    for (what, bytes, cost) in [
        ("an idle connection", b"".as_slice(), 0),
        ("a half head of 31 KiB", half.as_bytes(), 32 << 10),
        ("a GET that waits for a flight", absent, memory_plan::REQUEST),
        ("a slow upload of 60,000 bytes", &upload, memory_plan::REQUEST + memory_plan::BODY + 3 * 60_000),
        ("a slow upload of 1,000 bytes", small.as_bytes(), memory_plan::REQUEST + (16 << 10) + 1_000 + 3 * 1_000),
        ("a relay that waits", silence, memory_plan::RELAY),
        ("a relay that drips", drip, memory_plan::RELAY),
        ("a relay with 64 KiB behind it", &pipelined, memory_plan::RELAY),
        ("a relay whose answer nobody takes", flood, memory_plan::RELAY + memory_plan::RELAY_ANSWER),
    ] {
        let origin = MuteOrigin::start().await;
        let config = "limits.client_memory = \"1GiB\"\nlimits.header_timeout = \"60s\"\norigin.read_timeout = \"60s\"";
        let castier = Castier::start(&origin.url, config).await;
        // Once around, so that what is made once is there.
        get(castier.public, &origin.blob).await.assert_is(&origin.blob);
        let before = castier.memory("VmRSS");
        const MANY: u64 = 300;
        let held = attack(&castier, MANY as usize, bytes).await;
        // It has all arrived once it does not grow any more.
        let mut last = 0;
        eventually("castier holds it all", async || {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let now = castier.memory("VmRSS");
            std::mem::replace(&mut last, now).eq(&now).then_some(())
        })
        .await;
        // What is made once, for the first of a kind, belongs to the program.
        let each = castier.memory("VmHWM").saturating_sub(before + MIB) / MANY;
        println!("{what}: {:.1} KiB, planned {:.1}", each as f64 / 1024.0, (memory_plan::CONNECTION + cost) as f64 / 1024.0);
        assert!(each <= memory_plan::CONNECTION + cost, "{what} costs {each} bytes, and {} are planned", memory_plan::CONNECTION + cost);
        drop(held);
    }
    // docs/operations.md has the same values.
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/operations.md")).unwrap();
    for (what, bytes) in [
        ("the program", memory_plan::BASE),
        ("a connection", memory_plan::CONNECTION),
        ("a fill", memory_plan::FILL),
        ("a request that waits", memory_plan::REQUEST),
        ("a relay", memory_plan::RELAY),
        ("a relay's answer", memory_plan::RELAY_ANSWER),
        ("a relay's request body", memory_plan::RELAY_REQUEST),
        ("an upload's body", memory_plan::BODY),
    ] {
        let row = if bytes >= MIB { format!("| {what} | {} MiB |", bytes / MIB) } else { format!("| {what} | {} KiB |", bytes / 1024) };
        assert!(text.contains(&row), "docs/operations.md has no row {row:?}");
    }
}

#[tokio::test]
async fn a_plan_that_does_not_fit_is_told() {
    let _turn = light().await;
    let (config, limits) = sized();
    assert!(memory_plan::memory(&config, &limits) <= LIMIT, "{}", memory_plan::memory(&config, &limits));
    let Some(group) = MemoryGroup::new(LIMIT) else { return };
    let origin = MuteOrigin::start().await;
    let castier = start_in(&group, &origin.url, "memory.capacity = \"512MiB\"").await;
    let warned = eventually("a warning", async || {
        let output = castier.output();
        output.lines().find(|line| line.contains("control group")).map(str::to_owned)
    })
    .await;
    assert!(warned.contains(&format!("limit={LIMIT}")) && warned.contains("planned="), "both numbers: {warned}");
    let metrics = metrics(&castier).await;
    assert_eq!(metrics.total("castier_memory_limit_bytes"), LIMIT);
    let planned = metrics.total("castier_memory_planned_bytes");
    assert!(planned > LIMIT && warned.contains(&format!("planned={planned}")), "{planned}: {warned}");
}

#[tokio::test]
async fn clients_that_use_it_up_do_not_make_a_node_look_dead() {
    let _turn = light().await;
    let origin = MuteOrigin::start().await;
    let config = "limits.client_memory = \"1MiB\"\ncluster.probe_interval = \"200ms\"\ncluster.stall_timeout = \"60s\"";
    let cluster = Cluster::with_secret(2, &origin.url, config).await;
    let owner = cluster.owner(&origin.blob);
    let (owner, other) = (&cluster.nodes[owner], &cluster.nodes[1 - owner]);
    // The smallest requests that wait, so that what is left suffices for none.
    let absent = b"GET /cas/0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef HTTP/1.1\r\nHost: castier.test\r\n\r\n";
    let held = attack(owner.castier(), 200, absent).await;
    let shed = async || owner.metrics().await.sum("castier_shed_requests_total", &[("reason", "client_memory")]);
    eventually("clients have used it up", async || (shed().await >= 50).then_some(())).await;
    // The owner has too much to do, and says so with its proof: this node asks the origin itself.
    get(other.public(), &origin.blob).await.assert_is(&origin.blob);
    let probes = async || owner.metrics().await.sum("castier_http_requests_total", &[("listener", "peer"), ("route", "control")]);
    let changes = async || other.metrics().await.sum("castier_cluster_changes_total", &[]);
    let (before, changed) = (probes().await, changes().await);
    eventually("more probes have come", async || (probes().await >= before + 5).then_some(())).await;
    wait_for_peers(other, 1, 0).await;
    assert_eq!(changes().await, changed, "{}", other.castier().output());
    drop(held);
}
