//! Origins with several addresses, and name servers that do not answer.

use crate::support::{Blob, Castier, KIB, LyingOrigin, RealOrigin, Request, cluster::in_place_of, get, heavy, light};
use std::{
    fs,
    net::SocketAddr,
    process::Command,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// A castier with these lines as its `/etc/hosts`, and `resolv` as its `/etc/resolv.conf`. `None` if this process may not mount.
async fn start(url: &str, hosts: &str, resolv: &str, config: &str) -> Option<Castier> {
    let dir = TempDir::new().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let (hosts, resolv) = (write("hosts", hosts), write("resolv.conf", resolv));
    if !in_place_of(&hosts, "/etc/hosts").arg("true").status().is_ok_and(|status| status.success()) {
        println!("skipped: only root may show files to a process of its own");
        return None;
    }
    let path = write("castier.toml", &crate::support::process::config_text(url, config));
    let mut command: Command = in_place_of(&hosts, "/etc/hosts");
    let inner = in_place_of(&resolv, "/etc/resolv.conf");
    command.arg(inner.get_program()).args(inner.get_args()).arg(Castier::program()).arg("--config").arg(&path);
    Some(Castier::run(command, dir).await)
}

const NOBODY: &str = "nameserver 127.0.0.1\n";

#[tokio::test]
async fn localhost_may_be_the_other_address() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let url = format!("http://localhost:{}", origin.addr.port());
    let Some(castier) = start(&url, &format!("::1 localhost\n{} localhost\n", origin.addr.ip()), NOBODY, "").await else { return };
    let reply = Request::get("/who").send(castier.public).await;
    assert_eq!((reply.status, reply.header("x-from")), (200, Some("origin")), "a relay");
    let blob = origin.blob(10 * KIB);
    get(castier.public, &blob).await.assert_is(&blob);
    let large = Blob::new(300 * KIB);
    for (upload, what) in [(Blob::new(10), "small"), (large, "large")] {
        let reply = Request::new("PUT", upload.path()).body(upload.whole()).send(castier.public).await;
        assert_eq!(reply.status, 201, "{what}");
        assert!(origin.holds(&upload));
    }
}

/// An address that neither accepts nor refuses connections.
async fn silent() -> (SocketAddr, impl Sized) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(0).unwrap();
    let address = listener.local_addr().unwrap();
    let mut queued = Vec::new();
    // Fill its queue.
    while let Ok(Ok(stream)) = tokio::time::timeout(Duration::from_millis(500), TcpStream::connect(address)).await {
        queued.push(stream);
        assert!(queued.len() < 100, "the queue has no end");
    }
    (address, (listener, queued))
}

#[tokio::test]
async fn a_silent_first_address_costs_its_time_once() {
    let _turn = heavy().await;
    let (silent, _held) = silent().await;
    let good = TcpListener::bind(("127.0.0.9", silent.port())).await.unwrap();
    let origin = crate::support::RawOrigin::serve(good, |mut stream, head| async move {
        use tokio::io::AsyncWriteExt as _;
        // Closed each time, so that each miss needs a new connection.
        let status = if head.starts_with("GET /cas/") { "404 Not Found" } else { "200 OK" };
        stream.write_all(format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").as_bytes()).await.ok()?;
        None
    });
    let url = format!("http://several.test:{}", origin.addr.port());
    let hosts = "127.0.0.1 several.test\n127.0.0.9 several.test\n";
    let Some(castier) = start(&url, hosts, NOBODY, "origin.connect_timeout = \"1500ms\"\nlimits.negative_ttl = \"1ms\"").await else {
        return;
    };
    let slow = Duration::from_millis(200);
    let mut late = 0;
    for _ in 0..20 {
        let start = Instant::now();
        assert_eq!(get(castier.public, &Blob::new(1)).await.status, 404);
        late += usize::from(start.elapsed() >= slow);
    }
    // The question at the start may have been the slow one.
    assert!(late <= 1, "{late} of 20 misses were slow");
    for _ in 0..5 {
        let start = Instant::now();
        assert_eq!(Request::get("/who").send(castier.public).await.status, 200);
        assert!(start.elapsed() < slow, "a relay took {:?}", start.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_server_that_says_nothing_harms_nobody() {
    let _turn = heavy().await;
    let dir = TempDir::new().unwrap();
    let hosts = dir.path().join("hosts");
    fs::write(&hosts, "127.0.0.1 origin.test\n").unwrap();
    let origin = RealOrigin::start().await;
    let url = format!("http://origin.test:{}", origin.addr.port());
    // Bound, and never read from.
    let server = std::net::UdpSocket::bind("127.0.0.53:0").unwrap();
    let Ok(_silent) = std::net::UdpSocket::bind("127.0.7.53:53") else {
        println!("skipped: only root may be a name server");
        return;
    };
    drop(server);
    let Some(castier) = start(&url, "127.0.0.1 origin.test\n", "nameserver 127.0.7.53\noptions timeout:2 attempts:1\n", "").await else {
        return;
    };
    let kept = Blob::new(10 * KIB);
    assert_eq!(Request::new("PUT", kept.path()).body(kept.whole()).send(castier.public).await.status, 201);
    // From here on only the name server knows the name.
    fs::write(castier.dir().join("hosts"), "127.0.0.1 localhost\n").unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    let mut worst = Duration::ZERO;
    let mut misses = Vec::new();
    while Instant::now() < until {
        let (public, blob) = (castier.public, Blob::new(1));
        misses.push(tokio::spawn(async move {
            let start = Instant::now();
            let status = get(public, &blob).await.status;
            (status, start.elapsed())
        }));
        if misses.len() % 20 == 0 {
            let start = Instant::now();
            get(castier.public, &kept).await.assert_is(&kept);
            worst = worst.max(start.elapsed());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for miss in misses {
        let (status, took) = miss.await.unwrap();
        assert_eq!(status, 404);
        worst = worst.max(took);
    }
    assert!(worst < Duration::from_secs(1), "a request took {worst:?}");
    assert_eq!(castier.output().matches("the name does not resolve").count(), 1, "told once: {}", castier.output());
}
