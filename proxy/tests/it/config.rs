//! Arguments, configuration, and the messages when castier cannot run.

use crate::support::{Blob, Castier, Request, eventually, get, light, process::config_text};
use std::{
    fs,
    process::{Command, Output},
};
use tempfile::TempDir;

/// Runs castier with these arguments and this configuration file to its end.
fn run(arguments: &[&str], config: Option<&str>) -> (i32, String, String) {
    run_env(arguments, config, &[])
}

fn run_env(arguments: &[&str], config: Option<&str>, env: &[(&str, &str)]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = Castier::once(|command, dir| {
        command.args(arguments).envs(env.iter().copied());
        if let Some(config) = config {
            let path = dir.join("castier.toml");
            fs::write(&path, config).unwrap();
            command.arg("--config").arg(path);
        }
    });
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().expect("ended by itself"), text(stdout), text(stderr))
}

const NOWHERE: &str = "http://127.0.0.1:9";

#[test]
fn flags() {
    let (code, out, _) = run(&["--version"], None);
    assert_eq!((code, out.trim()), (0, concat!("castier ", env!("CARGO_PKG_VERSION"))));
    let (code, out, _) = run(&["--help"], None);
    assert_eq!(code, 0);
    for flag in ["--config", "--check-config", "--print-config", "--version", "--help"] {
        assert!(out.contains(flag), "{flag}: {out}");
    }
    let (code, _, err) = run(&["--no-such-flag"], None);
    assert!(code == 2 && err.contains("--no-such-flag"), "{code}: {err}");
    let (code, _, err) = run(&["--config", "/no/such/file.toml"], None);
    assert!(code == 2 && err.contains("/no/such/file.toml") && err.trim().lines().count() == 1, "{code}: {err}");
}

#[test]
fn check_config() {
    let (code, _, err) = run(&["--check-config"], Some(&config_text(NOWHERE, "")));
    assert_eq!(code, 0, "{err}");
    let bad = r#"
        memory.capasity = "1GiB"
        memory.policy = "fifo"
        origin.url = "ftp://somewhere"
        origin.retries = -1
        limits.max_connections = "many"
        limits.negative_ttl = "soon"
        shutdown.grace = 5
        log.format = "xml"
        nonsense.key = 1
    "#;
    let (code, out, err) = run(&["--check-config"], Some(bad));
    assert_eq!(code, 2);
    let text = out + &err;
    let keys = [
        "memory.capasity",
        "memory.policy",
        "origin.url",
        "origin.retries",
        "limits.max_connections",
        "limits.negative_ttl",
        "shutdown.grace",
        "log.format",
        "nonsense",
    ];
    for key in keys {
        assert!(text.lines().any(|line| line.contains(key)), "{key} is not reported:\n{text}");
    }
    assert!(text.lines().any(|line| line.contains("memory.capasity") && line.contains("memory.capacity")), "no suggestion:\n{text}");
    // The same without --check-config: it does not start.
    let (code, _, err) = run(&[], Some(bad));
    assert!(code == 2 && keys.iter().all(|key| err.contains(key)), "{code}: {err}");
    // TOML that is none: where.
    let (code, out, err) = run(&["--check-config"], Some("[listen\npublic = 1"));
    assert!(code == 2 && (out + &err).contains("castier.toml:1"), "{err}");
}

#[test]
fn what_does_not_work_yet_is_refused() {
    let (code, out, err) = run(&["--check-config"], Some(&config_text(NOWHERE, "cluster.advertise = \"10.0.0.7:8081\"")));
    assert!(code == 2 && (out + &err).contains("cluster"), "{err}");
}

#[test]
fn print_config() {
    let (code, printed, err) = run(&["--print-config"], Some(&config_text(NOWHERE, "memory.capacity = \"77MiB\"")));
    assert_eq!(code, 0, "{err}");
    assert!(printed.contains("77MiB") && printed.contains("negative_ttl") && printed.contains("[listen]"), "{printed}");
    let (code, again, err) = run(&["--print-config"], Some(&printed));
    assert_eq!((code, again), (0, printed), "{err}");
    let secret = config_text("http://user:hunter2@127.0.0.1:9", "log.loki_url = \"http://u:hunter2@127.0.0.1:9\"");
    let (code, printed, _) = run(&["--print-config"], Some(&secret));
    assert!(code == 0 && !printed.contains("hunter2") && printed.contains("127.0.0.1:9"), "{printed}");
}

#[test]
fn the_environment_goes_before_the_file() {
    let env = [
        ("CASTIER_MEMORY__CAPACITY", "2GiB"),
        ("CASTIER_ALLOW_DELETE", "true"),
        ("CASTIER_SERVICE_HOST", "10.0.0.1"),
        ("CASTIER_PORT", "tcp://x"),
    ];
    let (code, printed, err) = run_env(&["--print-config"], Some(&config_text(NOWHERE, "memory.capacity = \"77MiB\"")), &env);
    assert!(code == 0 && printed.contains("\"2GiB\"") && printed.contains("allow_delete = true"), "{printed} {err}");
    let (code, out, err) = run_env(&["--check-config"], Some(&config_text(NOWHERE, "")), &[("CASTIER_MEMORY__CAPASITY", "1")]);
    assert!(code == 2 && (out + &err).contains("CASTIER_MEMORY__CAPASITY"), "{err}");
}

/// One line with the name of the obstacle, and exit code 1.
#[track_caller]
fn assert_cannot_run((code, out, err): (i32, String, String), name: &str) {
    assert_eq!(code, 1, "{out}{err}");
    let lines: Vec<&str> = err.trim().lines().collect();
    assert!(lines.len() == 1 && lines[0].contains(name), "one line that names {name}:\n{err}");
}

#[test]
fn a_busy_port() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    for listener in ["public", "admin"] {
        let config = config_text(NOWHERE, "").replace(&format!("{listener} = \"127.0.0.1:0\""), &format!("{listener} = \"{addr}\""));
        assert_cannot_run(run(&[], Some(&config)), &addr);
    }
}

#[test]
fn a_directory_that_cannot_be_written() {
    // Below a file, where not even root can make a directory.
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let below = file.join("data");
    let below = below.to_str().unwrap();
    assert_cannot_run(run(&[], Some(&config_text(&format!("embedded:{below}"), ""))), below);
    let (code, out, err) = run(&[], Some(&config_text(NOWHERE, &format!("fill.spool_dir = \"{below}\""))));
    assert!(matches!(code, 1 | 2) && err.contains(below), "{code}: {out}{err}");
}

#[tokio::test]
async fn no_arguments_at_all() {
    let _turn = light().await;
    let mut command = Command::new(Castier::program());
    // Other ports than the usual ones, so that the test can run anywhere.
    command.env("CASTIER_LISTEN__PUBLIC", "127.0.0.1:0").env("CASTIER_LISTEN__ADMIN", "127.0.0.1:0");
    let castier = Castier::run(command, TempDir::new().unwrap()).await;
    assert!(
        castier.output().lines().any(|line| line.contains("curl ") && line.contains(&castier.public.to_string())),
        "{}",
        castier.output()
    );
    let blob = Blob::new(3_000_000);
    assert_eq!(Request::new("PUT", blob.path()).body(blob.whole()).send(castier.public).await.status, 201);
    get(castier.public, &blob).await.assert_is(&blob);
    assert!(castier.dir().join("castier-data/origin").is_dir());
    Request::new("POST", format!("/purge/{}", blob.digest)).send(castier.admin).await;
    let again = get(castier.public, &blob).await;
    again.assert_is(&blob);
    assert_eq!(again.cache_status(), "castier; fwd=uri-miss; stored; detail=origin");
}

#[tokio::test]
async fn the_embedded_origin_keeps_what_it_has() {
    let _turn = light().await;
    let dir = TempDir::new().unwrap();
    let url = format!("embedded:{}", dir.path().join("store").display());
    let blob = Blob::new(100_000);
    let mut castier = Castier::start(&url, "").await;
    assert_eq!(Request::new("PUT", blob.path()).body(blob.whole()).send(castier.public).await.status, 201);
    castier.signal(rustix::process::Signal::TERM);
    assert_eq!(castier.exit().await.code(), Some(0));
    let castier = Castier::start(&url, "").await;
    get(castier.public, &blob).await.assert_is(&blob);
    Request::get("/elsewhere").send(castier.public).await.assert_problem(404);
}

/// Its server gets what is relayed, and its figures stand in `/stats` as those of any origin.
#[tokio::test]
async fn the_embedded_origin_reads_blobs_without_http() {
    let _turn = light().await;
    let castier = Castier::start("embedded:./origin", "").await;
    let put = async |blob: &Blob| Request::new("PUT", blob.path()).body(blob.whole()).send(castier.public).await.status;
    let purge = async |blob: &Blob| Request::new("POST", format!("/purge/{}", blob.digest)).send(castier.admin).await;
    for blob in [Blob::new(1000), Blob::new(3_000_000)] {
        let before = origin_stats(&castier).await;
        assert_eq!(put(&blob).await, 201);
        purge(&blob).await;
        let reply = get(castier.public, &blob).await;
        reply.assert_is(&blob);
        assert_eq!(reply.cache_status(), "castier; fwd=uri-miss; stored; detail=origin");
        let now = origin_stats(&castier).await;
        assert_eq!((now.0 - before.0, now.1 - before.1, now.2 - before.2), (2, 0, blob.size), "requests, errors, bytes");

        // The last byte rots. A small blob is not there; a large one has begun to leave when it is noticed.
        purge(&blob).await;
        let name = blob.digest.to_string();
        let file = castier.dir().join("origin").join(&name[..2]).join(&name[2..4]).join(&name);
        let mut rotten = blob.whole();
        *rotten.last_mut().unwrap() ^= 1;
        fs::write(&file, rotten).unwrap();
        let reply = get(castier.public, &blob).await;
        assert!(reply.status == 404 || !reply.complete, "{}", reply.status);
        assert!(!file.exists() && castier.dir().join("origin/quarantine").join(&name).exists());
        assert!(origin_stats(&castier).await.1 > before.1, "an error of the origin");
        assert_eq!(put(&blob).await, 201, "the upload heals it");
        get(castier.public, &blob).await.assert_is(&blob);
    }
    let blob = Blob::new(1000);
    Request::new("DELETE", blob.path()).send(castier.public).await.assert_problem(405);
    Request::get("/kv/none").send(castier.public).await.assert_problem(404);
    let records = eventually("the record of what was relayed", async || {
        let output = castier.output();
        let own: Vec<_> = output.lines().filter(|line| line.contains("target=castier_origin::access")).map(str::to_owned).collect();
        (!own.is_empty()).then_some(own)
    });
    assert!(matches!(&records.await[..], [one] if one.contains("/kv/none")), "{}", castier.output());
}

/// Requests to the origin, its errors, and bytes from it.
async fn origin_stats(castier: &Castier) -> (u64, u64, u64) {
    let stats: serde_json::Value = serde_json::from_slice(&Request::get("/stats").send(castier.admin).await.body).unwrap();
    let figure = |name: &str| stats["origin"][name].as_u64().unwrap();
    (figure("requests"), figure("errors"), figure("bytes"))
}

#[tokio::test]
async fn the_environment_configures_a_running_castier() {
    let _turn = light().await;
    let castier = Castier::start_with("embedded:./store", "allow_delete = false", &[("CASTIER_ALLOW_DELETE", "true")]).await;
    let blob = Blob::new(1000);
    assert_eq!(Request::new("PUT", blob.path()).body(blob.whole()).send(castier.public).await.status, 201);
    assert_eq!(Request::new("DELETE", blob.path()).send(castier.public).await.status, 204);
}
