//! The program: flags, exit codes, signals, listeners, logs.

use crate::support::*;
use castier_blob::Digest;
use castier_wire::blob_path;
use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::Output,
};

fn run(args: &[&str], env: &[(&str, &str)]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = binary().args(args).envs(env.iter().copied()).output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

#[test]
fn flags_and_exit_codes() {
    let dir = tempfile::tempdir().unwrap();
    let (good, bad) = (dir.path().join("good.toml"), dir.path().join("bad.toml"));
    fs::write(&good, "[limits]\nmax_blob = \"7MiB\"\n").unwrap();
    fs::write(&bad, "[limits]\nmax_blub = \"7MiB\"\nidle_timeout = \"5\"\n").unwrap();
    let (good, bad) = (good.to_str().unwrap(), bad.to_str().unwrap());

    let (code, out, _) = run(&["--version"], &[]);
    assert!(code == Some(0) && out.starts_with("castier-origin "), "{out}");
    let (code, out, _) = run(&["--help"], &[]);
    assert!(code == Some(0) && ["--listen", "--root", "--config"].iter().all(|flag| out.contains(flag)), "{out}");
    assert_eq!(run(&["--no-such-flag"], &[]).0, Some(2));
    assert_eq!(run(&["--check-config", "--config", good], &[]).0, Some(0));
    let (code, out, _) =
        run(&["--print-config", "--config", good, "--listen", "127.0.0.1:7", "--root", "/r"], &[("CASTIER_ALLOW_DELETE", "true")]);
    assert_eq!(code, Some(0));
    for line in ["max_blob = \"7MiB\"", "public = \"127.0.0.1:7\"", "root = \"/r\"", "allow_delete = true"] {
        assert!(out.contains(line), "{line} not in {out}");
    }
    for args in [&["--check-config", "--config", bad][..], &["--config", bad], &["--config", "/no/such/file"]] {
        let (code, _, err) = run(args, &[]);
        assert_eq!(code, Some(2), "{err}");
        assert!(args[1] != "--config" || (err.contains("limits.max_blub") && err.contains("limits.idle_timeout")), "{err}");
    }
}

#[test]
fn what_prevents_a_start_is_named_in_one_line() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let dir = tempfile::tempdir().unwrap();
    let (root, file) = (dir.path().join("root"), dir.path().join("file"));
    fs::write(&file, "x").unwrap();
    let (root, file) = (root.to_str().unwrap(), file.to_str().unwrap());
    let free = "127.0.0.1:0";
    for (listen, root, admin, named) in [(&*address, root, free, &*address), (free, root, &address, &address), (free, file, free, file)] {
        let (code, out, err) = run(&["--listen", listen, "--root", root], &[("CASTIER_LISTEN__ADMIN", admin)]);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
        assert!(err.lines().count() == 1 && err.contains(named), "{err}");
    }
}

#[test]
fn a_default_admin_port_that_is_taken_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    // Whoever has the port, this test or another program: it is taken.
    let _taken = TcpListener::bind("127.0.0.1:9001");
    let (code, out, err) = run(&["--listen", "127.0.0.1:0", "--root", dir.path().to_str().unwrap()], &[]);
    assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
    assert!(err.lines().count() == 1 && err.contains("listen.admin 127.0.0.1:9001 is taken"), "{err}");
}

#[test]
fn sigterm_finishes_what_is_in_flight() {
    for signal in ["TERM", "INT"] {
        let mut node = Node::start();
        let bytes = blob(64 << 20, 30);
        assert_eq!(node.put(&bytes), 201);
        let mut idle = connect(node.clients);
        let mut stream = connect(node.clients);
        stream.write_all(&head("GET", &blob_path(&Digest::of(&bytes)), &[], None)).unwrap();
        let mut reader = BufReader::new(stream);
        assert!(!reader.fill_buf().unwrap().is_empty());
        node.signal(signal);
        wait_for("unready", || (ask(node.admin, "GET", "/readyz", &[], b"").status == 503).then_some(()));
        wait_for("no new connections", || TcpStream::connect(node.clients).is_err().then_some(()));
        assert_eq!(idle.read(&mut [0; 9]).unwrap(), 0, "an idle connection is closed");
        assert!(node.child.try_wait().unwrap().is_none(), "ended before the download did");
        let answer = read_answer(&mut reader, "GET").unwrap();
        assert!(answer.complete && answer.body == bytes);
        assert_eq!(node.exit().code(), Some(0));
    }
}

#[test]
fn the_grace_has_an_end() {
    let mut node = Node::with(&[("CASTIER_SHUTDOWN__GRACE", "100ms")]);
    let mut stream = connect(node.clients);
    stream.write_all(&head("PUT", &blob_path(&Digest::of(b"")), &[], Some(1000))).unwrap();
    wait_for("the request to be under way", || {
        // A second request that was sent later has been answered.
        (ask(node.clients, "GET", "/", &[], b"").status == 404).then_some(())
    });
    node.signal("TERM");
    assert_eq!(node.exit().code(), Some(0));
}

#[test]
fn sighup_changes_what_can_change_and_names_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let (file, root) = (dir.path().join("origin.toml"), dir.path().join("root"));
    let write = |max_blob: &str, level: &str, more: &str| {
        let text = format!(
            "{more}\n[listen]\npublic = \"127.0.0.1:0\"\nadmin = \"127.0.0.1:0\"\n[store]\nroot = {:?}\n[limits]\nmax_blob = \"{max_blob}\"\n[log]\nlevel = \"{level}\"\n",
            root.display().to_string()
        );
        fs::write(&file, text).unwrap();
    };
    write("1MiB", "info", "");
    let mut command = binary();
    command.arg("--config").arg(&file);
    let node = Node::run(command, &root);
    assert_eq!(node.put(&blob(2000, 31)), 201);
    wait_for("an access record", || node.log().contains("castier_origin::access").then_some(()));
    write("1KiB", "warn", "allow_delete = true");
    node.signal("HUP");
    let mut seed = 32;
    wait_for("the new limit", || {
        seed += 1;
        (node.put(&blob(2000, seed)) == 413).then_some(())
    });
    let log = wait_for("a warning", || Some(node.log()).filter(|log| log.contains("only a restart")));
    let warning = log.lines().find(|line| line.contains("only a restart")).unwrap();
    assert!(warning.contains("allow_delete") && !warning.contains("limits") && !warning.contains("log.level"), "{warning}");
    let records = |log: &str| log.matches("castier_origin::access").count();
    let before = records(&node.log());
    assert_eq!(node.ask("GET", "/", &[], b"").status, 404);
    // A broken file changes nothing. Its complaint is written after the record of the request above would have been.
    fs::write(&file, "nonsense").unwrap();
    node.signal("HUP");
    let log = wait_for("a complaint", || Some(node.log()).filter(|log| log.contains("was not read again")));
    assert_eq!(records(&log), before, "the level is warn");
    assert_eq!(node.put(&blob(2000, 33)), 413);
}

#[test]
fn too_many_connections_are_told_so() {
    let node = Node::with(&[("CASTIER_LIMITS__MAX_CONNECTIONS", "2")]);
    let mut held: Vec<_> = (0..2)
        .map(|_| {
            let mut stream = connect(node.clients);
            stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
            read_answer(&mut BufReader::new(stream.try_clone().unwrap()), "GET").unwrap().problem(404);
            stream
        })
        .collect();
    for _ in 0..3 {
        let refused = ask(node.clients, "GET", "/", &[], b"");
        refused.problem(503);
        assert_eq!(refused.header("retry-after"), "1");
    }
    drop(held.pop());
    wait_for("a free place", || (ask(node.clients, "GET", "/", &[], b"").status == 404).then_some(()));
}

#[test]
fn every_request_leaves_one_record() {
    let node = Node::with(&[("CASTIER_LOG__FORMAT", "json")]);
    let bytes = blob(1000, 34);
    let path = blob_path(&Digest::of(&bytes));
    assert_eq!(node.put(&bytes), 201);
    assert_eq!(node.ask("GET", &path, &[], b"").status, 200);
    let records = || -> Vec<serde_json::Value> {
        let log = node.log();
        log.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .filter(|r: &serde_json::Value| r["target"] == "castier_origin::access")
            .collect()
    };
    let records = wait_for("two records", || Some(records()).filter(|records| records.len() == 2));
    let record = &records[1];
    assert_eq!(
        (&record["method"], &record["path"], &record["status"], &record["bytes"]),
        (&"GET".into(), &path.into(), &200.into(), &1000.into())
    );
    let (took, first) = (record["duration_ms"].as_f64().unwrap(), record["first_byte_ms"].as_f64().unwrap());
    assert!(first > 0.0 && first <= took, "{record}");
    assert_eq!((&record["client"], &record["proto"]), (&"127.0.0.1".into(), &"HTTP/1.1".into()));
}

#[test]
fn every_line_is_a_record_and_says_what_it_says_safely() {
    let node = Node::with(&[("CASTIER_LOG__LEVEL", "info,access=off")]);
    assert_eq!(node.ask("GET", "/", &[], b"").status, 404);
    node.signal("HUP");
    wait_for("a record", || node.log().contains("was re-read").then_some(()));
    assert!(!node.log().contains("path="), "access=off: {}", node.log());
    drop(node);

    let node = Node::start();
    let agent = "User-Agent: a \"b\" c=d\u{9b}2J\u{202e}";
    assert_eq!(node.ask("GET", "/x=1", &[agent], b"").status, 404);
    let log = wait_for("the record", || Some(node.log()).filter(|log| log.contains("user_agent")));
    for line in log.lines() {
        assert!(line.starts_with("ts=") && line.contains(" level=") && line.contains(" target="), "{line}");
    }
    let record = log.lines().find(|line| line.contains("user_agent")).unwrap();
    for part in
        [" path=\"/x=1\" ", " status=404 ", " proto=HTTP/1.1 ", " user_agent=\"a \\\"b\\\" c=d\\u009b2J\\u202e\"", " client=127.0.0.1 "]
    {
        assert!(record.contains(part), "{part} in {record}");
    }

    for (args, code) in [(["--root", "/proc/none"], 1), (["--config", "/proc"], 2)] {
        let (ended, _, err) = run(
            &args,
            &[("CASTIER_LOG__FORMAT", "json"), ("CASTIER_LISTEN__ADMIN", "127.0.0.1:0"), ("CASTIER_LISTEN__PUBLIC", "127.0.0.1:0")],
        );
        assert_eq!(ended, Some(code), "{err}");
        let record: serde_json::Value = serde_json::from_str(err.trim()).unwrap();
        assert_eq!((&record["level"], &record["target"]), (&"error".into(), &"castier-origin".into()), "{err}");
    }
}

#[test]
fn a_second_signal_ends_at_once_and_others_do_nothing() {
    let mut node = Node::with(&[("CASTIER_SHUTDOWN__GRACE", "60s")]);
    for signal in ["USR1", "USR2"] {
        node.signal(signal);
    }
    // Under way for as long as the grace allows.
    let mut stream = connect(node.clients);
    stream.write_all(&head("PUT", &blob_path(&Digest::of(b"")), &[], Some(1000))).unwrap();
    wait_for("the request to be under way", || (ask(node.clients, "GET", "/", &[], b"").status == 404).then_some(()));
    node.signal("TERM");
    wait_for("unready", || (ask(node.admin, "GET", "/readyz", &[], b"").status == 503).then_some(()));
    assert!(node.child.try_wait().unwrap().is_none(), "{}", node.log());
    let start = std::time::Instant::now();
    node.signal("INT");
    assert_eq!(node.exit().code(), Some(0));
    assert!(start.elapsed().as_secs() < 10, "{:?}", start.elapsed());
}

#[test]
fn a_configuration_that_is_a_pipe_holds_up_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let (file, root) = (dir.path().join("origin.toml"), dir.path().join("root"));
    fs::write(&file, "").unwrap();
    let mut command = binary();
    command
        .arg("--config")
        .arg(&file)
        .arg("--root")
        .arg(&root)
        .args(["--listen", "127.0.0.1:0"])
        .env("CASTIER_LISTEN__ADMIN", "127.0.0.1:0");
    let mut node = Node::run(command, &root);
    fs::remove_file(&file).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&file).status().unwrap().success());
    node.signal("HUP");
    wait_for("a complaint", || node.log().contains("it is not a regular file").then_some(()));
    assert_eq!(node.put(b"still here"), 201);
    node.signal("TERM");
    assert_eq!(node.exit().code(), Some(0));
    let (code, _, err) = run(&["--check-config", "--config", file.to_str().unwrap()], &[]);
    assert!(code == Some(2) && err.contains("it is not a regular file"), "{err}");
}

#[test]
fn health_is_an_exit_code() {
    let node = Node::start();
    let ask = |url: &str| run(&["--health", url], &[]).0;
    assert_eq!(ask(&format!("http://{}/healthz", node.admin)), Some(0));
    assert_eq!(ask(&format!("http://{}", node.admin)), Some(0));
    assert_eq!(ask(&format!("http://{}/nothing", node.admin)), Some(1));
    assert_eq!(ask("http://127.0.0.1:1/healthz"), Some(1));
    assert_eq!(ask("nonsense"), Some(1));
}

#[test]
fn labels_and_processor_time_are_as_promised() {
    let node = Node::start();
    node.ask("GET", &format!("/cas/{}", "0".repeat(64)), &["Range: bytes=1-"], b"");
    assert!(node.metric("process_cpu_seconds_total").fract() > 0.0);
    assert_eq!(node.metric("castier_origin_log_dropped_total{sink=\"stderr\"}"), 0.0);
}
