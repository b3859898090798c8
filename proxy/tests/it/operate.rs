//! The operator's view: signals, log records, labels, and the messages at the start.

use crate::support::{
    Castier, Download, Gate, Lie, LyingOrigin, MIB, Request, client::Outcome, eventually, get, light, log, metrics, process::config_text,
};
use rustix::process::Signal;
use std::{fs, process::Command, sync::atomic::Ordering, time::Instant};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    task::JoinHandle,
};

async fn world(config: &str) -> (LyingOrigin, Castier) {
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), config).await;
    (origin, castier)
}

/// A client in the middle of a blob whose origin stalls for ever.
async fn stuck(origin: &LyingOrigin, castier: &Castier) -> JoinHandle<Outcome> {
    let blob = origin.blob_with(4 * MIB, [Lie::honest().stall(2 * MIB, &Gate::new())]);
    let download = Download::default();
    let client = tokio::spawn({
        let (download, from) = (download.clone(), castier.public);
        async move { download.of(&blob, from).await }
    });
    eventually("the client has bytes", async || (download.started.load(Ordering::SeqCst) == 1).then_some(())).await;
    client
}

#[tokio::test]
async fn a_second_signal_ends_at_once() {
    let _turn = light().await;
    for (first, second) in [(Signal::TERM, Signal::TERM), (Signal::INT, Signal::INT)] {
        let (origin, mut castier) = world("shutdown.grace = \"60s\"").await;
        let client = stuck(&origin, &castier).await;
        castier.signal(first);
        eventually("not ready any more", async || (Request::get("/readyz").send(castier.admin).await.status == 503).then_some(())).await;
        let start = Instant::now();
        castier.signal(second);
        assert_eq!(castier.exit().await.code(), Some(0));
        assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
        assert!(!client.await.unwrap().complete);
    }
}

#[tokio::test]
async fn other_signals_do_nothing() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    for signal in [Signal::USR1, Signal::USR2] {
        castier.signal(signal);
    }
    // Heard after those.
    castier.signal(Signal::HUP);
    eventually("the config is read again", async || castier.output().contains("config reloaded").then_some(())).await;
    let blob = origin.blob(1000);
    get(castier.public, &blob).await.assert_is(&blob);
}

#[tokio::test]
async fn a_config_that_is_a_pipe_holds_up_nobody() {
    let _turn = light().await;
    let (origin, mut castier) = world("").await;
    fs::remove_file(castier.config_path()).unwrap();
    assert!(Command::new("mkfifo").arg(castier.config_path()).status().unwrap().success());
    castier.signal(Signal::HUP);
    eventually("a complaint", async || castier.output().contains("it is not a regular file").then_some(())).await;
    let blob = origin.blob(1000);
    get(castier.public, &blob).await.assert_is(&blob);
    // A symbolic link is followed.
    fs::remove_file(castier.config_path()).unwrap();
    let text = castier.dir().join("elsewhere.toml");
    fs::write(&text, config_text(&origin.url(), "limits.max_headers = 99")).unwrap();
    std::os::unix::fs::symlink(text, castier.config_path()).unwrap();
    castier.signal(Signal::HUP);
    eventually("the change", async || castier.output().contains("limits.max_headers").then_some(())).await;
    castier.signal(Signal::TERM);
    assert_eq!(castier.exit().await.code(), Some(0));
}

/// The access records of a path.
fn records(castier: &Castier, path: &str) -> Vec<log::Record> {
    log::text(&castier.output()).into_iter().filter(|record| record.get("path").is_some_and(|own| own == path)).collect()
}

#[tokio::test]
async fn records_have_the_promised_fields() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let blob = origin.blob(1000);
    let cut = origin.blob(3 * MIB);
    origin.always(&cut, Lie::honest().status(500));
    let agent = "a \"test\" of=records";
    for many in [1, 2] {
        Request::get(blob.path()).header("User-Agent", agent).send(castier.public).await;
        // A record is written when its answer has left.
        eventually("its record", async || (records(&castier, &blob.path()).len() == many).then_some(())).await;
    }
    Request::get("/ac/x").header("User-Agent", agent).send(castier.public).await;
    assert_eq!(Request::get(cut.path()).send(castier.public).await.status, 502);
    let of = async |path: &str, many: usize| {
        eventually("the records", async || Some(records(&castier, path)).filter(|records| records.len() == many)).await
    };
    let both = of(&blob.path(), 2).await;
    for (record, cache, from, via) in [(&both[0], "miss", "source", "origin"), (&both[1], "hit", "tier", "memory")] {
        for (name, value) in [
            ("level", "info"),
            ("target", "castier::access"),
            ("method", "GET"),
            ("status", "200"),
            ("bytes", "1000"),
            ("cache", cache),
            (from, via),
            ("client", "127.0.0.1"),
            ("proto", "HTTP/1.1"),
            ("user_agent", agent),
        ] {
            assert_eq!(record.get(name).map(String::as_str), Some(value), "{name} in {record:?}");
        }
        let number = |name: &str| record[name].parse::<f64>().unwrap();
        assert!(number("first_byte_ms") <= number("duration_ms") && !record.contains_key("error"), "{record:?}");
    }
    let relayed = &of("/ac/x", 1).await[0];
    assert_eq!((relayed["cache"].as_str(), relayed["source"].as_str(), relayed["user_agent"].as_str()), ("bypass", "origin", agent));
    let failed = &of(&cut.path(), 1).await[0];
    assert!(failed["status"] == "502" && failed["error"].contains("origin"), "{failed:?}");
}

#[tokio::test]
async fn a_json_log_has_the_same_names() {
    let _turn = light().await;
    let (origin, castier) = world("log.format = \"json\"").await;
    let blob = origin.blob(1000);
    get(castier.public, &blob).await.assert_is(&blob);
    Request::get("/x").header("User-Agent", "a\u{9b}\u{202e}b").send(castier.public).await;
    let record = eventually("the record", async || {
        let output = castier.output();
        assert!(!output.contains(['\u{9b}', '\u{202e}']));
        let lines = output.lines().filter(|line| !line.is_empty());
        let records: Vec<serde_json::Value> =
            lines.map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}"))).collect();
        assert!(records.iter().any(|record| record["msg"].as_str().is_some_and(|text| text.starts_with("listening public "))), "{output}");
        records.into_iter().find(|record| record["path"] == blob.path())
    })
    .await;
    for name in
        ["ts", "level", "target", "method", "path", "status", "bytes", "duration_ms", "first_byte_ms", "cache", "source", "client", "proto"]
    {
        assert!(record.get(name).is_some(), "{name} in {record}");
    }
}

#[tokio::test]
async fn a_part_has_its_own_level() {
    let _turn = light().await;
    let (origin, castier) = world("log.level = \"info,access=off\"").await;
    let blob = origin.blob(1000);
    get(castier.public, &blob).await.assert_is(&blob);
    fs::write(castier.config_path(), config_text(&origin.url(), "log.level = \"info,access=info\"")).unwrap();
    castier.signal(Signal::HUP);
    eventually("the config is read again", async || castier.output().contains("config reloaded").then_some(())).await;
    assert!(!castier.output().contains(&blob.path()), "{}", castier.output());
    get(castier.public, &blob).await.assert_is(&blob);
    eventually("a record", async || castier.output().contains(&blob.path()).then_some(())).await;
}

#[tokio::test]
async fn codes_that_an_origin_makes_up_are_few_labels() {
    let _turn = light().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") && stream.read_buf(&mut head).await.is_ok_and(|read| read > 0) {}
            let code = String::from_utf8_lossy(&head).split(['/', ' ']).nth(2).unwrap_or("200").to_owned();
            let answer = format!("HTTP/1.1 {code} Said\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    let castier = Castier::start(&url, "").await;
    for code in (200..600).step_by(7) {
        Request::get(format!("/{code}")).send(castier.public).await;
    }
    let series = eventually("the counts", async || {
        let now = metrics(&castier).await;
        (now.sum("castier_http_requests_total", &[("route", "relay")]) == 58).then_some(now)
    })
    .await;
    let relayed = series.series().filter(|name| name.starts_with("castier_http_requests_total") && name.contains("relay"));
    let codes: Vec<_> = relayed.filter_map(|name| name.split("code=\"").nth(1)?.split('"').next()).collect();
    assert!(codes.contains(&"5xx") && codes.contains(&"2xx"), "{codes:?}");
    assert!(codes.iter().all(|code| code.ends_with("xx") || ["200", "305", "410", "417", "403", "501"].contains(code)), "{codes:?}");
    assert!(series.text.lines().any(|line| line.starts_with("process_cpu_seconds_total ") && line.contains('.')), "{}", series.text);
    assert_eq!(series.sum("castier_log_dropped_total", &[]), 0);
    assert!(series.text.contains("castier_log_dropped_total{sink=\"loki\"}"));
}

#[tokio::test]
async fn a_default_start_has_nothing_to_complain_of() {
    let _turn = light().await;
    let mut command = Command::new(Castier::program());
    command.envs([("CASTIER_LISTEN__PUBLIC", "127.0.0.1:0"), ("CASTIER_LISTEN__ADMIN", "127.0.0.1:0"), ("CASTIER_LOG__LOKI_URL", "")]);
    let castier = Castier::run(command, TempDir::new().unwrap()).await;
    eventually("a start", async || castier.output().contains("castier is ready").then_some(())).await;
    let output = castier.output();
    assert!(!output.contains("level=warn") && !output.contains("level=error") && !output.contains("status=404"), "{output}");

    // The second one on the same directory is told which key to change.
    let refused = Castier::once(|command, _| {
        let url = format!("embedded:{}", castier.dir().join("castier-data/origin").display());
        command.envs([("CASTIER_LISTEN__PUBLIC", "127.0.0.1:0"), ("CASTIER_LISTEN__ADMIN", "127.0.0.1:0"), ("CASTIER_ORIGIN__URL", &*url)]);
    });
    let err = String::from_utf8(refused.stderr).unwrap();
    assert!(refused.status.code() == Some(1) && err.contains("origin.url") && !err.contains("--root"), "{err}");
}

#[tokio::test]
async fn a_relay_that_fails_is_told_once() {
    let _turn = light().await;
    let (mut origin, castier) = world("origin.connect_timeout = \"1s\"").await;
    origin.down().await;
    let reply = Request::get("/gone").send(castier.public).await;
    assert_eq!(reply.status, 502);
    let record = eventually("the record", async || records(&castier, "/gone").pop()).await;
    assert!(record["error"].contains("origin"), "{record:?}");
    let output = castier.output();
    // The question that castier asks at its start may be under way still.
    let first = |line: &&str| line.contains("could not be asked yet");
    let told = output.lines().filter(|line| line.contains("level=warn") || line.contains("level=error")).filter(|line| !first(line));
    assert_eq!(told.count(), 2, "one line about the origin, one about the request: {output}");
    let body = crate::support::Blob::new(1000);
    assert_eq!(Request::new("PUT", body.path()).body(body.whole()).send(castier.public).await.status, 502);
    let line = eventually("a warning", async || {
        castier.output().lines().find(|line| line.contains("an upload was not stored")).map(str::to_owned)
    })
    .await;
    assert!(line.contains("level=warn") && line.contains("origin"), "{line}");
}

#[tokio::test]
async fn health_and_offline_checks() {
    let _turn = light().await;
    let (_origin, castier) = world("").await;
    let health = |url: String| {
        Castier::once(|command, _| {
            command.arg("--health").arg(url);
        })
        .status
        .code()
    };
    assert_eq!(health(format!("http://{}/healthz", castier.admin)), Some(0));
    assert_eq!(health(format!("http://{}/nothing", castier.admin)), Some(1));
    let check = |arguments: &[&str]| {
        let output = Castier::once(|command, dir| {
            let file = dir.join("castier.toml");
            fs::write(&file, "[origin]\nca_file = \"/does/not/exist.pem\"\n[fill]\nspool_dir = \"/does/not/exist\"\n").unwrap();
            command.args(arguments).arg("--config").arg(file);
        });
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, err) = check(&["--check-config"]);
    assert!(
        code == Some(2) && err.contains("castier.toml:2: origin.ca_file: ") && err.contains("castier.toml:4: fill.spool_dir: "),
        "{err}"
    );
    assert_eq!(check(&["--check-config", "--offline"]).0, Some(0));
}
