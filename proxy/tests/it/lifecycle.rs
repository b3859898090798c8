//! Signals: the orderly end, and reading the configuration again.

use crate::support::{
    Blob, Castier, Conn, Download, Gate, Lie, LyingOrigin, MIB, Request, client::Outcome, eventually, get, light, process::config_text,
};
use rustix::process::Signal;
use std::{fs, sync::atomic::Ordering, time::Instant};
use tokio::{net::TcpStream, task::JoinHandle};

async fn world(config: &str) -> (LyingOrigin, Castier) {
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), config).await;
    (origin, castier)
}

/// A client in the middle of a blob whose origin waits at `gate`.
async fn in_the_middle(origin: &LyingOrigin, castier: &Castier, gate: &Gate) -> (Blob, JoinHandle<Outcome>) {
    let blob = origin.blob_with(4 * MIB, [Lie::honest().stall(2 * MIB, gate)]);
    let download = Download::default();
    let client = tokio::spawn({
        let (download, blob, from) = (download.clone(), blob.clone(), castier.public);
        async move { download.of(&blob, from).await }
    });
    eventually("the client has bytes", async || (download.started.load(Ordering::SeqCst) == 1).then_some(())).await;
    (blob, client)
}

#[tokio::test]
async fn what_is_in_flight_is_finished() {
    let _turn = light().await;
    for signal in [Signal::TERM, Signal::INT] {
        let (origin, mut castier) = world("shutdown.grace = \"50s\"").await;
        let gate = Gate::new();
        let (blob, client) = in_the_middle(&origin, &castier, &gate).await;
        let start = Instant::now();
        castier.signal(signal);
        eventually("not ready any more", async || (Request::get("/readyz").send(castier.admin).await.status == 503).then_some(())).await;
        assert_eq!(Request::get("/healthz").send(castier.admin).await.status, 200);
        eventually("no new clients", async || TcpStream::connect(castier.public).await.is_err().then_some(())).await;
        assert!(!client.is_finished());
        gate.open();
        client.await.unwrap().assert_is(&blob);
        assert_eq!(castier.exit().await.code(), Some(0));
        assert!(start.elapsed().as_secs() < 40, "it does not wait longer than it has to");
    }
}

#[tokio::test]
async fn an_upload_in_flight_is_finished() {
    let _turn = light().await;
    let (origin, mut castier) = world("shutdown.grace = \"50s\"").await;
    let (blob, gate) = (Blob::new(100_000), Gate::new());
    origin.next_upload(Lie::honest().hold(&gate));
    let upload = tokio::spawn({
        let (request, to) = (Request::new("PUT", blob.path()).body(blob.whole()), castier.public);
        async move { request.send(to).await }
    });
    eventually("the upload is at the origin", async || (gate.arrived() == 1).then_some(())).await;
    castier.signal(Signal::TERM);
    eventually("no new clients", async || TcpStream::connect(castier.public).await.is_err().then_some(())).await;
    gate.open();
    assert_eq!(upload.await.unwrap().status, 201);
    assert_eq!(castier.exit().await.code(), Some(0));
}

#[tokio::test]
async fn idle_connections_hold_up_nobody() {
    let _turn = light().await;
    let (origin, mut castier) = world("shutdown.grace = \"50s\"").await;
    let blob = origin.blob(1000);
    let mut idle = Vec::new();
    for _ in 0..20 {
        let mut conn = Conn::open(castier.public).await;
        conn.ask(&Request::get(blob.path())).await.assert_is(&blob);
        idle.push(conn);
    }
    let start = Instant::now();
    castier.signal(Signal::TERM);
    assert_eq!(castier.exit().await.code(), Some(0));
    assert!(start.elapsed().as_secs() < 25, "{:?}", start.elapsed());
}

#[tokio::test]
async fn grace_has_an_end() {
    let _turn = light().await;
    let (origin, mut castier) = world("shutdown.grace = \"500ms\"").await;
    let never = Gate::new();
    let (_blob, client) = in_the_middle(&origin, &castier, &never).await;
    castier.signal(Signal::TERM);
    assert_eq!(castier.exit().await.code(), Some(0));
    let outcome = client.await.unwrap();
    assert!(!outcome.complete && outcome.wrong_at.is_none(), "{outcome:?}");
}

#[tokio::test]
async fn sighup_changes_what_can_change() {
    let _turn = light().await;
    let (origin, castier) = world("log.level = \"warn\"\nlimits.max_blob = \"16MiB\"").await;
    let large = || Request::new("PUT", Blob::new(MIB + 1).path());
    let blob = Blob::new(MIB + 1);
    assert_eq!(Request::new("PUT", blob.path()).body(blob.whole()).send(castier.public).await.status, 201);
    let changed = "log.level = \"info\"\nlimits.max_blob = \"1MiB\"\nmemory.capacity = \"99MiB\"\nmemory.max_blob = \"1MiB\"";
    fs::write(castier.config_path(), config_text(&origin.url(), changed)).unwrap();
    castier.signal(Signal::HUP);
    let warned = |line: &str| line.contains("memory.capacity") && line.to_lowercase().contains("warn");
    eventually("a warning about what needs a restart", async || castier.output().lines().any(warned).then_some(())).await;
    let oversized = async || large().header("Content-Length", (MIB + 1).to_string()).send(castier.public).await.status;
    eventually("the new limit holds", async || (oversized().await == 413).then_some(())).await;
    let logged = origin.blob(1000);
    get(castier.public, &logged).await.assert_is(&logged);
    eventually("the new log level holds", async || castier.output().contains(&logged.path()).then_some(())).await;
}

#[tokio::test]
async fn sighup_with_a_broken_file_changes_nothing() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let blob = origin.blob(1000);
    fs::write(castier.config_path(), config_text(&origin.url(), "limits.max_blob = \"much\"\nmemory.capasity = \"1MiB\"")).unwrap();
    castier.signal(Signal::HUP);
    eventually("both problems are in the log", async || {
        let output = castier.output();
        (output.contains("limits.max_blob") && output.contains("memory.capasity")).then_some(())
    })
    .await;
    get(castier.public, &blob).await.assert_is(&blob);
    fs::remove_file(castier.config_path()).unwrap();
    castier.signal(Signal::HUP);
    eventually("that it is gone, too", async || castier.output().contains("castier.toml").then_some(())).await;
    get(castier.public, &blob).await.assert_is(&blob);
}
