//! A real nginx in front of castier changes nothing. `scripts/ingress.py` makes its configuration from the annotations of the Ingress in
//! `k8s/components/ingress-nginx`.
//!
//! `scripts/setup-tests` installs nginx. Without it these tests print `SKIPPED`.

use crate::support::{
    Blob, Castier, Conn, DEADLINE, Download, Gate, KIB, Lie, LyingOrigin, MIB, RealOrigin, Reply, Request, cluster::own_address,
    eventually, get, heavy, light, metrics, within,
};
use std::{
    fs,
    io::Write as _,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};

/// The allowed growth of all nginx processes together: buffers, but no blob.
const NGINX_MEMORY: u64 = 24 * MIB;
/// The allowed memory of castier for one large blob: the program, its buffers, and a window.
const CASTIER_MEMORY: u64 = 100 * MIB;

/// A running nginx. Stopped on drop.
struct Nginx {
    child: Child,
    dir: TempDir,
    addr: SocketAddr,
    /// What it held before the first request.
    idle: u64,
}

impl Nginx {
    /// Starts nginx in front of these. Prints a line and returns `None` if this machine has no nginx.
    async fn start(nodes: &[SocketAddr]) -> Option<Self> {
        Self::start_with(nodes, |conf| conf).await
    }

    /// With a change of its configuration.
    async fn start_with(nodes: &[SocketAddr], change: impl FnOnce(String) -> String) -> Option<Self> {
        let Some(program) =
            ["/usr/sbin/nginx", "/usr/bin/nginx", "/usr/local/sbin/nginx"].into_iter().find(|path| Path::new(path).is_file())
        else {
            // Past the test's own capture.
            std::io::stderr().write_all(b"SKIPPED: nginx is not installed\n").unwrap();
            return None;
        };
        let dir = TempDir::new().unwrap();
        let addr = SocketAddr::from((own_address(), 8080));
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/ingress.py");
        let mut python = Command::new("python3");
        python.arg(script).arg("--listen").arg(addr.to_string()).arg("--dir").arg(dir.path()).args(nodes.iter().map(SocketAddr::to_string));
        let made = python.output().unwrap();
        assert!(made.status.success(), "{made:?}");
        let conf = change(String::from_utf8(made.stdout).unwrap());
        fs::write(dir.path().join("nginx.conf"), conf).unwrap();
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let mut command = Command::new(program);
        command.arg("-c").arg(dir.path().join("nginx.conf")).args(["-e", "stderr", "-g", "daemon off;"]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let mut nginx = Self { child, dir, addr, idle: 0 };
        eventually("nginx listens", async || {
            assert!(nginx.child.try_wait().unwrap().is_none(), "nginx ended: {}", nginx.log());
            Conn::try_open(addr).await.ok()
        })
        .await;
        // The workers come after the listener.
        eventually("its workers", async || (nginx.processes().len() == 3).then_some(())).await;
        nginx.idle = nginx.memory();
        Some(nginx)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// The master and its workers, by their directories in `/proc`.
    fn processes(&self) -> Vec<PathBuf> {
        let master = self.child.id();
        let children = fs::read_to_string(format!("/proc/{master}/task/{master}/children")).unwrap();
        children.split_whitespace().chain([&*master.to_string()]).map(|id| Path::new("/proc").join(id)).collect()
    }

    /// Resident bytes of all of them, at their peaks.
    fn memory(&self) -> u64 {
        let peak = |process: PathBuf| {
            let status = fs::read_to_string(process.join("status")).unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
            line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * KIB
        };
        self.processes().into_iter().map(peak).sum()
    }

    /// The files with bytes of requests or answers: in its directories, or without a name.
    fn temporary(&self) -> Vec<PathBuf> {
        let folders = ["client-body", "proxy"].map(|name| self.dir.path().join(name));
        let named = folders.iter().flat_map(|folder| fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()));
        let open = self.processes().into_iter().flat_map(|process| {
            let files = fs::read_dir(process.join("fd")).into_iter().flatten();
            files.filter_map(|file| fs::read_link(file.ok()?.path()).ok()).collect::<Vec<_>>()
        });
        named.chain(open.filter(|file| file.to_string_lossy().ends_with("(deleted)") && file.starts_with(self.dir.path()))).collect()
    }

    #[track_caller]
    fn assert_small(&self, castier: &Castier) {
        let (nginx, peak) = (self.memory() - self.idle, castier.memory("VmHWM"));
        println!("at their peaks: nginx {} MiB more than {} MiB, castier {} MiB", nginx / MIB, self.idle / MIB, peak / MIB);
        assert!(nginx < NGINX_MEMORY, "nginx holds {} MiB more than without requests", nginx / MIB);
        assert!(peak < CASTIER_MEMORY, "castier holds {} MiB", peak / MIB);
        assert_eq!(self.temporary(), Vec::<PathBuf>::new(), "nginx keeps bytes in files");
        assert!(!self.log().contains("temporary file"), "{}", self.log());
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // SIGTERM, so that it ends its workers.
        let _ = rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), rustix::process::Signal::TERM);
        let _ = self.child.wait();
        if std::thread::panicking() {
            println!("---- nginx said:\n{}", self.log());
        }
    }
}

async fn connections(castier: &Castier) -> u64 {
    metrics(castier).await.total("castier_connections")
}

/// An answer but for what belongs to the connection, and for what nginx writes itself.
fn essence(reply: Reply) -> (u16, bool, Vec<(String, String)>, Vec<u8>) {
    let own = ["connection", "keep-alive", "server", "date"];
    let mut headers: Vec<_> = reply.head.headers.into_iter().filter(|(name, _)| !own.contains(&name.as_str())).collect();
    // Each error names its own request.
    headers.iter_mut().filter(|(name, _)| name == "x-request-id").for_each(|(_, value)| value.clear());
    headers.sort();
    (reply.status, reply.complete, headers, reply.body)
}

#[tokio::test]
async fn every_answer_is_as_without_it() {
    let _turn = light().await;
    let origin = RealOrigin::start().await;
    let castier = Castier::start(&origin.url(), "limits.max_blob = \"1MiB\"\nlimits.negative_ttl = \"0s\"").await;
    let Some(nginx) = Nginx::start(&[castier.public]).await else { return };
    let (small, large, key) = (Blob::new(1000), Blob::new(700 * KIB), "ab".repeat(32));
    for blob in [&small, &large] {
        assert_eq!(Request::new("PUT", blob.path()).body(blob.whole()).send(nginx.addr).await.status, 201);
    }
    let absent = Blob::new(10);
    let form = |boundary: &str| {
        let head = format!("--{boundary}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"x\"\r\n\r\n");
        [head.as_bytes(), &small.whole(), format!("\r\n--{boundary}--\r\n").as_bytes()].concat()
    };
    let etag = format!("\"{}\"", large.digest);
    let ranges = ["bytes=0-0", "bytes=1000-70000", "bytes=716000-", "bytes=-5", "bytes=0-1,5-9", "bytes=9999999-", "bytes=x"];
    let mut requests: Vec<Request> = ranges.map(|range| Request::get(large.path()).header("Range", range)).into();
    requests.extend([
        Request::get(small.path()),
        Request::get(large.path()),
        Request::get(format!("/team/cas/{}", small.digest)),
        Request::get(large.path()).header("If-None-Match", etag.clone()),
        Request::get(large.path()).header("If-None-Match", "W/\"x\", *"),
        Request::get(large.path()).header("If-None-Match", "\"x\""),
        Request::get(large.path()).header("Range", "bytes=3-9").header("If-Range", etag.clone()),
        Request::get(large.path()).header("Range", "bytes=3-9").header("If-Range", "\"x\""),
        Request::get(large.path()).header("Cache-Control", "no-cache").header("Accept-Encoding", "gzip, br"),
        Request::new("HEAD", large.path()),
        Request::new("HEAD", large.path()).header("Range", "bytes=3-9"),
        Request::new("HEAD", absent.path()),
        Request::get(absent.path()),
        Request::get("/cas/not-a-digest"),
        Request::get("/cas/%41"),
        Request::get("/elsewhere?x=%20&y=/"),
        Request::new("DELETE", small.path()),
        Request::new("PUT", small.path()).body(small.whole()),
        Request::new("PUT", small.path()).chunks(&small.whole(), 100),
        Request::new("PUT", small.path()).body(&b"other bytes"[..]),
        Request::new("PUT", small.path()).chunks(b"other bytes", 3),
        Request::new("POST", "/cas").body(small.whole()),
        Request::new("POST", "/cas").header("Content-Type", "multipart/form-data; boundary=limit").body(form("limit")),
        Request::new("PUT", format!("/ac/{key}")).body(&b"an entry"[..]),
        Request::get(format!("/ac/{key}")),
        Request::get(format!("/ac/{key}")).header("Range", "bytes=3-"),
        Request::new("PUT", "/kv/a%20b/c%2525").body(&b"an entry"[..]),
        Request::new("PROPFIND", "/kv/a%20b/").header("Depth", "1"),
        Request::get("/kv/a%20b/c%2525"),
        Request::new("PATCH", small.path()),
    ]);
    for request in requests {
        // What is asked for here is kept already, so that the second answer is like the first.
        let first = request.send(castier.public).await;
        let direct = essence(request.send(castier.public).await);
        let through = essence(request.send(nginx.addr).await);
        assert_eq!(through, direct, "{}", String::from_utf8_lossy(&request.head_bytes()));
        assert!(first.complete && direct.0 >= 200);
    }
    // By name, so that it cannot be that both lack it.
    let hit = Request::get(small.path()).send(nginx.addr).await;
    assert_eq!((hit.status, hit.cache_status()), (200, "castier; hit; detail=memory"));
    let stored = origin_only(&origin).await;
    let miss = Request::get(stored.path()).send(nginx.addr).await;
    assert_eq!((miss.status, miss.cache_status()), (200, "castier; fwd=uri-miss; stored; detail=origin"));
    let not_modified = Request::get(large.path()).header("If-None-Match", etag).send(nginx.addr).await;
    assert_eq!((not_modified.status, not_modified.body.len()), (304, 0));
}

/// A blob that castier has not seen.
async fn origin_only(origin: &RealOrigin) -> Blob {
    let blob = Blob::new(2000);
    assert_eq!(Request::new("PUT", blob.path()).body(blob.whole()).send(origin.addr).await.status, 201);
    blob
}

#[tokio::test]
async fn the_limit_on_uploads_is_castiers() {
    let _turn = light().await;
    let origin = RealOrigin::start().await;
    let castier = Castier::start(&origin.url(), "limits.max_blob = \"1MiB\"").await;
    let Some(nginx) = Nginx::start(&[castier.public]).await else { return };
    let large = Blob::new(20 * MIB);
    let chunked = Request::new("PUT", large.path()).chunks(&large.whole(), 100_000);
    let reply = chunked.send(nginx.addr).await;
    assert_eq!(reply.status, 413, "{}", reply.head.first);
    let announced = Request::new("PUT", large.path()).body(large.whole());
    announced.send(nginx.addr).await.assert_problem(413);
    let small = Blob::new(900 * KIB);
    let reply = Request::new("PUT", small.path()).chunks(&small.whole(), 1000).send(nginx.addr).await;
    assert_eq!(reply.status, 201, "{}", reply.head.first);
    eventually("no upload is left half-way", async || (origin.unfinished() == 0).then_some(())).await;
}

#[tokio::test]
async fn a_client_that_asks_before_it_uploads_is_answered() {
    let _turn = light().await;
    let origin = RealOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    let Some(nginx) = Nginx::start(&[castier.public]).await else { return };
    let blob = Blob::new(300 * KIB);
    // nginx says 100 itself, also for a blob that is there, and castier then reads the body.
    for status in [201, 200] {
        let mut conn = Conn::open(nginx.addr).await;
        let request = Request::new("PUT", blob.path()).header("Expect", "100-continue").body(blob.whole());
        conn.send(&request.head_bytes()).await;
        let head = conn.head().await.unwrap();
        assert!(head.first.contains(" 100 "), "{}", head.first);
        conn.send(&blob.whole()).await;
        assert_eq!(conn.reply("PUT").await.status, status);
        assert_eq!(conn.ask(&Request::new("HEAD", blob.path())).await.status, 200, "the connection goes on");
    }
}

#[tokio::test]
async fn the_origin_learns_who_asks() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    let Some(nginx) = Nginx::start(&[castier.public]).await else { return };
    let request = Request::get("/who").header("Host", "cache.example").header("X-Forwarded-For", "10.1.1.1");
    assert_eq!(request.send(nginx.addr).await.status, 200);
    let seen = origin.seen().pop().unwrap().head;
    // The client's address as nginx sees it, then nginx's as castier sees it. What the client claims is kept apart.
    assert_eq!(seen.header("x-forwarded-for"), Some("127.0.0.1, 127.0.0.1"));
    assert_eq!(seen.header("x-original-forwarded-for"), Some("10.1.1.1"));
    assert_eq!((seen.header("x-real-ip"), seen.header("x-forwarded-proto")), (Some("127.0.0.1"), Some("http")));
    assert_eq!(seen.header("x-forwarded-host"), Some("cache.example"));
    assert!(seen.header("x-request-id").is_some_and(|id| id.len() == 32), "{seen:?}");
}

/// 64 MiB, or 1 GiB with `TEST_FULL=1`.
fn large_size() -> u64 {
    if std::env::var_os("TEST_FULL").is_some_and(|value| value == "1") { 1024 * MIB } else { 64 * MIB }
}

#[tokio::test]
async fn a_large_answer_passes_as_it_comes() {
    let _turn = heavy().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    let Some(nginx) = Nginx::start(&[castier.public]).await else { return };
    let (size, gate) = (large_size(), Gate::new());
    let blob = origin.blob_with(size, [Lie { stall: Some((size / 2, gate.clone())), ..Lie::honest() }]);
    let download = Download::default();
    let start = Instant::now();
    let task = tokio::spawn({
        let (download, blob, addr) = (download.clone(), blob.clone(), nginx.addr);
        async move { download.of(&blob, addr).await }
    });
    // The origin has stopped half-way. All that it has sent is with the client, but for what castier holds back, and what sockets and buffers of nginx hold.
    let enough = size / 2 - 2 * MIB;
    eventually("half of it, while the rest is not there yet", async || {
        assert_eq!(nginx.temporary(), Vec::<PathBuf>::new(), "nginx keeps bytes in files");
        (download.received.load(Ordering::Relaxed) >= enough).then_some(())
    })
    .await;
    gate.open();
    within(4 * DEADLINE, "the download", task).await.unwrap().assert_is(&blob);
    println!("{} MiB down in {:?}", size / MIB, start.elapsed());
    assert_eq!(origin.gets(&blob), 1);
    // A slow reader makes nobody hold the rest.
    let slow = Download { slowly: Some((16 * 1024, Duration::from_millis(1))), hang_up_after: Some(8 * MIB), ..Default::default() };
    within(DEADLINE, "a slow client", slow.of(&blob, nginx.addr)).await;
    nginx.assert_small(&castier);
}

#[tokio::test]
async fn a_large_upload_passes_as_it_comes() {
    let _turn = heavy().await;
    let origin = RealOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    let Some(nginx) = Nginx::start(&[castier.public]).await else { return };
    let size = large_size();
    for chunked in [false, true] {
        let blob = Blob::new(size);
        let start = Instant::now();
        let mut conn = Conn::open(nginx.addr).await;
        let request = Request::new("PUT", blob.path());
        let request =
            if chunked { request.header("Transfer-Encoding", "chunked") } else { request.header("Content-Length", size.to_string()) };
        conn.send(&request.head_bytes()).await;
        let (mut at, mut arrived) = (0, false);
        while at < size {
            let piece = blob.slice(at, size);
            let framed = if chunked { [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat() } else { piece.to_vec() };
            assert!(conn.send(&framed).await, "cut off at {at}");
            at += piece.len() as u64;
            if at >= size / 2 && !arrived {
                // The client has stopped half-way. What it has sent is at the origin, but for what buffers and castier hold.
                eventually("half of it at the origin", async || {
                    assert_eq!(nginx.temporary(), Vec::<PathBuf>::new(), "nginx keeps bytes in files");
                    (origin.unfinished() >= size / 2 - 4 * MIB).then_some(())
                })
                .await;
                arrived = true;
            }
        }
        if chunked {
            conn.send(b"0\r\n\r\n").await;
        }
        assert_eq!(conn.reply("PUT").await.status, 201, "chunked: {chunked}");
        println!("{} MiB up in {:?}, chunked: {chunked}", size / MIB, start.elapsed());
        let head = conn.ask(&Request::new("HEAD", blob.path())).await;
        assert_eq!((head.status, head.header("content-length")), (200, Some(&*size.to_string())));
    }
    nginx.assert_small(&castier);
}

#[tokio::test]
async fn clients_that_leave_cost_one_load_and_leave_no_connection() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    let Some(nginx) = Nginx::start(&[castier.public]).await else { return };
    let gate = Gate::new();
    let blob = origin.blob_with(3 * MIB, [Lie::honest().hold(&gate)]);
    let mut clients = Vec::new();
    for _ in 0..50 {
        let mut conn = Conn::open(nginx.addr).await;
        conn.send(&Request::get(blob.path()).bytes()).await;
        clients.push(conn);
    }
    // One that stays reads on.
    let stays = tokio::spawn({
        let (blob, addr) = (blob.clone(), nginx.addr);
        async move { get(addr, &blob).await }
    });
    // Nobody has got a byte, so nginx can only see that a client leaves, and not fail to write to it.
    eventually("all wait for one load", async || {
        let now = metrics(&castier).await;
        (gate.arrived() == 1 && now.total("castier_flight_followers") == 50 && now.total("castier_connections") == 51).then_some(())
    })
    .await;
    drop(clients);
    eventually("their connections to castier are closed", async || (connections(&castier).await == 1).then_some(())).await;
    gate.open();
    within(DEADLINE, "the one that stays", stays).await.unwrap().assert_is(&blob);
    get(nginx.addr, &blob).await.assert_is(&blob);
    assert_eq!(origin.gets(&blob), 1);
    // An upload that is broken off leaves nothing either.
    let upload = Blob::new(MIB);
    let mut conn = Conn::open(nginx.addr).await;
    conn.send(&Request::new("PUT", upload.path()).header("Content-Length", upload.size.to_string()).head_bytes()).await;
    conn.send(&upload.bytes(0, 300 * KIB)).await;
    eventually("the upload is on its way", async || (!origin.seen().iter().all(|seen| seen.method != "PUT")).then_some(())).await;
    let with_upload = connections(&castier).await;
    drop(conn);
    // What stays idle: nginx keeps the connections of answers that were read to their end, one or two.
    eventually("its connection is closed", async || (connections(&castier).await < with_upload).then_some(())).await;
    assert!(!origin.holds(&upload));
}

#[tokio::test]
async fn an_idle_connection_is_closed_by_nginx_and_not_by_castier() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    let idle = castier_config::Castier::default().limits.idle_timeout;
    let mut of_the_controller = None;
    let change = |conf: String| {
        let line = conf.lines().rfind(|line| line.trim().starts_with("keepalive_timeout ")).unwrap().to_owned();
        of_the_controller = Some(line.trim().trim_start_matches("keepalive_timeout ").trim_end_matches("s;").parse::<u64>().unwrap());
        conf.replace(&line, "        keepalive_timeout 300ms;")
    };
    let Some(nginx) = Nginx::start_with(&[castier.public], change).await else { return };
    // The side that closes first never gets a request on a connection that it is just closing.
    assert!(Duration::from_secs(of_the_controller.unwrap()) + Duration::from_secs(10) < idle.get(), "{of_the_controller:?}");
    let blob = origin.blob(10 * KIB);
    let mut conn = Conn::open(nginx.addr).await;
    for _ in 0..3 {
        conn.ask(&Request::get(blob.path())).await.assert_is(&blob);
        // castier would not, for longer than this waits.
        eventually("nginx closes it", async || (connections(&castier).await == 0).then_some(())).await;
    }
}

#[tokio::test]
async fn many_requests_share_one_connection() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    let (between, opened) = counted(castier.public).await;
    let Some(nginx) = Nginx::start(&[between]).await else { return };
    let blobs = [origin.blob(10), origin.blob(20 * KIB), origin.blob(300 * KIB)];
    let mut conn = Conn::open(nginx.addr).await;
    // One less than what nginx lets a client ask on a connection.
    for n in 0..999_usize {
        let blob = &blobs[n % 3];
        match n % 4 {
            0 => {
                let reply = conn.ask(&Request::get(blob.path()).header("Range", "bytes=2-5")).await;
                assert_eq!((reply.status, &*reply.body), (206, &*blob.bytes(2, 6)), "request {n}");
            }
            1 => {
                let reply = conn.ask(&Request::new("HEAD", blob.path())).await;
                assert_eq!((reply.status, reply.header("content-length")), (200, Some(&*blob.size.to_string())), "request {n}");
            }
            2 => assert_eq!(conn.ask(&Request::get(format!("/relayed/{n}"))).await.status, 200, "request {n}"),
            _ => conn.ask(&Request::get(blob.path())).await.assert_is(blob),
        }
    }
    assert_eq!(opened.load(Ordering::SeqCst), 1, "connections to castier");
}

/// An address that leads to another one, and how often it was connected to.
async fn counted(to: SocketAddr) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (addr, count) = (listener.local_addr().unwrap(), Arc::<AtomicUsize>::default());
    let opened = count.clone();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            opened.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(async move {
                let mut server = TcpStream::connect(to).await?;
                tokio::io::copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    (addr, count)
}
