//! Each use of descriptors has its own share, so that none can starve another.

use crate::support::{Castier, MuteOrigin, RealOrigin, Request, eventually, get, heavy, metrics, process::config_text};
use std::{fs, net::SocketAddr, path::Path, process::Command, time::Duration};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// castier with this limit of descriptors.
async fn with_files(files: u32, origin: &str, config: &str) -> Castier {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("castier.toml"), config_text(origin, config)).unwrap();
    let mut command = Command::new("prlimit");
    command.arg(format!("--nofile={files}:{files}")).arg(Castier::program()).arg("--config").arg(dir.path().join("castier.toml"));
    Castier::run(command, dir).await
}

async fn clients(to: SocketAddr, how_many: usize, bytes: &[u8]) -> Vec<TcpStream> {
    let mut open = Vec::new();
    for _ in 0..how_many {
        let mut stream = TcpStream::connect(to).await.unwrap();
        let _ = stream.write_all(bytes).await;
        open.push(stream);
    }
    open
}

/// The beginning of the answer to a new client; empty if there is no answer at once.
async fn told(to: SocketAddr, path: &str) -> Option<String> {
    let asking = async {
        let mut stream = TcpStream::connect(to).await.ok()?;
        // castier may have said no already, and closed.
        let _ = stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: castier.test\r\n\r\n").as_bytes()).await;
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.ok()?;
        Some(String::from_utf8_lossy(&answer).into_owned())
    };
    tokio::time::timeout(Duration::from_secs(5), asking).await.ok().flatten()
}

#[tokio::test]
async fn relays_leave_some_for_others() {
    let _turn = heavy().await;
    let origin = MuteOrigin::start().await;
    let castier = with_files(2048, &origin.url, "limits.client_memory = \"1GiB\"").await;
    get(castier.public, &origin.blob).await.assert_is(&origin.blob);
    let mut open = clients(castier.public, 1300, b"GET /drip HTTP/1.1\r\nHost: castier.test\r\n\r\n").await;
    for _ in 0..5 {
        assert_eq!(Request::get("/healthz").send(castier.admin).await.status, 200);
        let answer = told(castier.public, "/drip").await;
        assert!(answer.as_deref().is_some_and(|answer| answer.ends_with("503") || answer.ends_with("200")), "{answer:?}");
    }
    assert!(origin.waiting() > 300, "{}", origin.waiting());
    assert!(castier.descriptors() < 2000, "{}", castier.descriptors());
    let shed = metrics(&castier).await;
    assert!(
        shed.sum("castier_shed_requests_total", &[("reason", "files")])
            + shed.sum("castier_shed_requests_total", &[("reason", "connections")])
            > 0
    );
    // With some of them gone, new ones can be opened again.
    open.truncate(100);
    eventually("service as before", async || (get(castier.public, &origin.blob).await.status == 200).then_some(())).await;
    eventually("relays as before", async || told(castier.public, "/drip").await.filter(|answer| answer.ends_with("200")).map(drop)).await;
}

/// Incomplete heads on one listener do not block the other listener, and not the health checks on this one.
async fn half_heads_on(admin: SocketAddr, descriptors: impl AsyncFn() -> usize, public_answers: impl AsyncFn() -> bool) {
    let before = descriptors().await;
    let open = clients(admin, 4100, b"GET /healthz HTTP/1.1\r\nHost: castier.test\r\nX: ").await;
    for _ in 0..5 {
        assert!(public_answers().await, "the public listener answers");
        assert_eq!(Request::get("/healthz").send(admin).await.status, 200, "and so does this one");
    }
    let now = descriptors().await;
    assert!(now < before + 300, "{now} open, {before} before");
    eventually("all half heads are gone", async || (descriptors().await <= before + 5).then_some(())).await;
    drop(open);
}

#[tokio::test]
async fn half_heads_on_the_admin_listener() {
    let _turn = heavy().await;
    let origin = MuteOrigin::start().await;
    let castier = with_files(4096, &origin.url, "limits.header_timeout = \"2s\"").await;
    get(castier.public, &origin.blob).await.assert_is(&origin.blob);
    let answers = async || get(castier.public, &origin.blob).await.status == 200;
    half_heads_on(castier.admin, async || castier.descriptors(), answers).await;
}

#[tokio::test]
async fn half_heads_on_the_admin_listener_of_the_origin() {
    let _turn = heavy().await;
    let dir = TempDir::new().unwrap();
    let mut command = Command::new("prlimit");
    command
        .arg("--nofile=4096:4096")
        .arg(Path::new(Castier::program()).with_file_name("castier-origin"))
        .args(["--listen", "127.0.0.1:0", "--root"])
        .arg(dir.path())
        .envs([("CASTIER_LISTEN__ADMIN", "127.0.0.1:0"), ("CASTIER_LIMITS__HEADER_TIMEOUT", "2s")]);
    let (process, public, admin) = RealOrigin::bare(command).await;
    let absent = format!("/cas/{}", "0".repeat(64));
    let answers = async || Request::get(absent.clone()).send(public).await.status == 404;
    half_heads_on(admin, async || process.descriptors(), answers).await;
}
