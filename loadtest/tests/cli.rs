//! Tests of the real program against the real origin, and against a store with deliberate faults.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rogue;

use castier_origin::{Options, Origin};
use rogue::{Fault, Rogue};
use serde_json::Value;
use std::{
    io::Read as _,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

fn load(line: &str) -> Output {
    command(line).output().unwrap()
}

fn command(line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_castier-load"));
    command.args(line.split_whitespace());
    command
}

/// Exit code and JSON report.
fn report(line: &str) -> (Option<i32>, Value) {
    let output = load(&format!("{line} --json"));
    let json = serde_json::from_slice(&output.stdout);
    (output.status.code(), json.unwrap_or_else(|error| panic!("{line}: {error}: {}", String::from_utf8_lossy(&output.stderr))))
}

/// Starts the real origin in this process. Returns its URL, and the runtime that keeps it alive.
fn origin(root: &tempfile::TempDir) -> (tokio::runtime::Runtime, String) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let config = castier_config::OriginServer::default();
    let options = Options { allow_delete: true, ..Options::from(&config) };
    let address = runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let origin = Origin::open(root.path(), options).unwrap();
        tokio::spawn(async move { origin.serve(listener, std::future::pending()).await });
        address
    });
    (runtime, format!("http://{address}"))
}

#[test]
fn every_operation_against_the_real_origin() {
    let root = tempfile::tempdir().unwrap();
    let (_runtime, url) = origin(&root);
    let mix = "get=50,head=20,put=10,post=10,delete=10";
    let (code, json) =
        report(&format!("--target {url} --requests 500 --concurrency 8 --objects 20 --size 70000 --zipf 1.1 --mix {mix} --threads 2"));
    assert_eq!(code, Some(0), "{json}");
    assert_eq!((json["requests"].as_u64(), json["corrupt"].as_u64(), json["success"].as_f64()), (Some(500), Some(0), Some(1.0)));
    let counts: Vec<_> =
        ["get", "put", "post", "head", "delete"].iter().map(|op| json["operations"][op]["requests"].as_u64().unwrap()).collect();
    assert!(counts.iter().all(|&count| count > 10), "{json}");
    assert_eq!(json["bytes_in"]["total"].as_u64().unwrap() / 70_000, counts[0], "every GET's body, and little else");
    // The same seed again: the blobs that it reads exist already, and the blobs that it writes are new.
    let (code, json) = report(&format!("--target {url} --requests 50 --objects 20 --size 70000 --mix get=1,put=1,post=1"));
    let written = ["put", "post"].iter().map(|op| json["operations"][op]["requests"].as_u64().unwrap()).sum::<u64>();
    assert_eq!((code, json["status_codes"]["201"].as_u64()), (Some(0), Some(written)), "{json}");
}

#[test]
fn published_runs_against_the_real_origin() {
    let root = tempfile::tempdir().unwrap();
    let (_runtime, url) = origin(&root);
    for (scenario, requests) in
        [("sangraha-2k", 100), ("sangraha-1m", 100), ("messages", 9000), ("forms", 5000), ("data-services", 10_000), ("cas-harness", 30)]
    {
        let (code, json) = report(&format!("--target {url} --scenario {scenario}"));
        assert_eq!((code, json["requests"].as_u64()), (Some(0), Some(requests)), "{scenario}: {json}");
        assert_eq!(json["scenario"], scenario);
    }
}

#[test]
fn corrupt_bodies_are_found_whichever_way_they_are_checked() {
    for verify in ["digest", "bytes"] {
        let rogue = Rogue::new(Fault::Corrupt);
        let line = format!("--target {} --requests 200 --objects 7 --size 3000 --verify {verify}", rogue.url());
        let (code, json) = report(&line);
        assert_eq!((code, json["corrupt"].as_u64()), (Some(1), Some(rogue.faults())), "{json}");
        assert_eq!(rogue.faults(), 20);
        assert_eq!((json["status_codes"]["200"].as_u64(), json["success"].as_f64()), (Some(200), Some(0.9)));
        assert!(json["errors"][0].as_str().unwrap().starts_with("corrupt"));
    }
}

#[test]
fn error_answers_are_counted_and_never_tried_again() {
    let rogue = Rogue::new(Fault::Unavailable);
    let (code, json) = report(&format!("--target {} --requests 200", rogue.url()));
    assert_eq!((code, json["corrupt"].as_u64(), json["requests"].as_u64()), (Some(1), Some(0), Some(200)));
    assert_eq!(json["status_codes"], serde_json::json!({"200": 180, "503": 20}));
    assert_eq!(json["errors"], serde_json::json!(["503 Service Unavailable"]));
    assert_eq!(rogue.gets(), 200);
}

#[test]
fn a_cut_body_is_an_error_but_not_corrupt() {
    let rogue = Rogue::new(Fault::Truncate);
    let (code, json) = report(&format!("--target {} --requests 50 --concurrency 1", rogue.url()));
    assert_eq!((code, json["corrupt"].as_u64(), json["status_codes"]["0"].as_u64()), (Some(1), Some(0), Some(5)), "{json}");
    assert!(json["errors"][0].as_str().unwrap().contains("broke within an answer"), "{json}");
    assert_eq!((json["reconnects"].as_u64(), rogue.gets()), (Some(0), 50), "a byte was seen, so nothing is sent again");
}

#[test]
fn chunked_bodies_are_whole() {
    let rogue = Rogue::new(Fault::Chunked);
    let (code, json) = report(&format!("--target {} --requests 50 --size 150000 --objects 3", rogue.url()));
    assert_eq!((code, json["bytes_in"]["total"].as_u64(), rogue.faults()), (Some(0), Some(50 * 150_000), 5), "{json}");
}

#[test]
fn a_stale_connection_is_replaced_and_reported() {
    let rogue = Rogue::new(Fault::CloseAfter);
    let (code, json) = report(&format!("--target {} --requests 50 --concurrency 1", rogue.url()));
    // The fifth close comes after the last request, so it has no effect.
    assert_eq!((code, json["requests"].as_u64(), json["reconnects"].as_u64()), (Some(0), Some(50), Some(4)), "{json}");
}

#[test]
fn what_was_sent_twice_is_reported_whatever_came_of_it() {
    let rogue = Rogue::new(Fault::Gone);
    let (code, json) = report(&format!("--target {} --requests 20 --concurrency 1", rogue.url()));
    assert_eq!((code, json["requests"].as_u64(), json["reconnects"].as_u64()), (Some(1), Some(20), Some(1)), "{json}");
    assert_eq!(rogue.gets(), 21);
}

#[test]
fn bytes_after_an_answer_are_an_error() {
    let rogue = Rogue::new(Fault::TooMuch);
    let (code, json) = report(&format!("--target {} --requests 50 --concurrency 1", rogue.url()));
    // Detected with the answer, or by the next request on that connection.
    assert!(code == Some(1) && json["requests"].as_u64() == Some(50) && json["success"].as_f64().unwrap() < 1.0, "{json}");
}

#[test]
fn a_head_may_leave_the_length_out() {
    let rogue = Rogue::new(Fault::NoLength);
    let (code, json) = report(&format!("--target {} --requests 10 --mix head=1", rogue.url()));
    assert_eq!((code, json["corrupt"].as_u64(), json["status_codes"]["200"].as_u64()), (Some(0), Some(0), Some(10)), "{json}");
}

#[test]
fn an_upload_that_is_refused_unread_has_its_answer() {
    let rogue = Rogue::new(Fault::RefuseUnread);
    let (code, json) = report(&format!("--target {} --requests 3 --mix put=1 --size 64MiB --timeout 20s", rogue.url()));
    assert_eq!((code, json["status_codes"]["507"].as_u64()), (Some(1), Some(3)), "{json}");
}

#[test]
fn a_connection_for_each_request_if_asked_for() {
    let rogue = Rogue::new(Fault::None);
    let (code, json) = report(&format!("--target {} --requests 50 --close --objects 1", rogue.url()));
    assert_eq!((code, json["reconnects"].as_u64()), (Some(0), Some(0)));
    assert!(rogue.connections() > 50, "{}", rogue.connections());
}

#[test]
fn an_open_loop_charges_a_stall_to_every_request_that_was_due() {
    let rogue = Rogue::new(Fault::StallOnce);
    let line = format!("--target {} --requests 60 --concurrency 1", rogue.url());
    let (code, open) = report(&format!("{line} --rate 100"));
    assert_eq!(code, Some(0));
    let latency = |json: &Value, which: &str| json["latencies"][which].as_u64().unwrap() / 1_000_000;
    let stall = u64::try_from(rogue::STALL.as_millis()).unwrap();
    // 40 of the 60 requests were due during the stall of 400 ms, and so waited between 0 and 400 ms.
    assert!(latency(&open, "max") >= stall && latency(&open, "90th") >= stall / 2 && latency(&open, "50th") >= stall / 8, "{open}");
    assert!(open["duration"].as_u64() == Some(590_000_000), "60 starts, 10 ms apart: {open}");
}

#[test]
fn requests_that_are_due_too_long_are_failures_not_forgotten() {
    let rogue = Rogue::new(Fault::StallOnce);
    let (code, json) = report(&format!("--target {} --requests 60 --concurrency 1 --rate 100 --timeout 50ms", rogue.url()));
    assert_eq!((code, json["requests"].as_u64()), (Some(1), Some(60)), "{json}");
    assert!(json["status_codes"]["0"].as_u64().unwrap() >= 1, "{json}");
}

#[test]
fn origin_loads_are_those_of_the_run() {
    let rogue = Rogue::new(Fault::None);
    let line = format!("--target {} --requests 120 --objects 5 --stats {} --stats {}", rogue.url(), rogue.url(), rogue.url());
    assert_eq!(report(&line).1["origin_loads"].as_u64(), Some(240), "the sum over two admin interfaces");
    let output = load(&line);
    assert!(String::from_utf8(output.stdout).unwrap().contains("origin loads  240"));
}

#[test]
fn the_corpus_goes_past_the_targets_with_fill() {
    let (target, fill) = (Rogue::new(Fault::None), Rogue::new(Fault::None));
    let output = load(&format!("--target {} --fill {} --requests 10 --objects 9", target.url(), fill.url()));
    // The target does not have the blobs, so every GET gets a 404.
    assert_eq!((output.status.code(), target.puts(), fill.puts(), fill.gets()), (Some(1), 0, 9, 0));
}

#[test]
fn targets_take_turns() {
    let (one, two) = (Rogue::new(Fault::None), Rogue::new(Fault::None));
    let (_, json) = report(&format!("--target {} --target {} --requests 40 --objects 1", one.url(), two.url()));
    assert_eq!((one.gets(), two.gets(), json["status_codes"]["200"].as_u64()), (20, 20, Some(20)), "only the first has the one blob");
}

#[test]
fn what_cannot_be_loaded_is_one_line_and_exit_2() {
    let (rogue, not_a_store, always_400) = (Rogue::new(Fault::None), Rogue::new(Fault::WebServer), Rogue::new(Fault::AlwaysBad));
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = rogue.url();
    for (line, names) in [
        (format!("--target http://{free} --requests 1"), "is it running?"),
        (format!("--target {} --requests 1", not_a_store.url()), "not a content-addressed store"),
        (format!("--target {} --requests 1", always_400.url()), "not a content-addressed store"),
        (format!("--target {url} --target http://{free} --requests 1"), "is it running?"),
        (format!("--target {url} --fill http://{free} --requests 1"), "is it running?"),
        (format!("--target {url} --stats {} --requests 1", not_a_store.url()), "LocalLoads"),
        ("--target http://192.0.2.1:80 --requests 1".to_owned(), "--yes-remote"),
        (format!("--target {url} --fill http://192.0.2.1:80 --requests 1"), "--yes-remote"),
        ("--requests 1".to_owned(), "--target"),
        (format!("--target {url}"), "--requests"),
        (format!("--target {url} --requests 1 --duration 1s"), "exclude each other"),
        (format!("--target {url} --requests many"), "--requests"),
        (format!("--target {url} --requests 1 --mix get=1,delete=1"), "delete"),
        (format!("--target {url} --scenario messages --size 3"), "--scenario messages"),
        (format!("--target {url} --scenario nothing"), "nothing"),
        (format!("--target {url} --requests 1 --mix put=1,delete=1"), "allow_delete"),
    ] {
        let output = load(&line);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), error.lines().count()), (Some(2), 1), "{line}: {error}");
        assert!(error.contains(names) && output.stdout.is_empty(), "{line}: {error}");
    }
    assert_eq!((rogue.gets(), rogue.puts()), (0, 0), "no load was sent");
}

#[test]
fn help_and_version_are_no_errors() {
    for flag in ["--help", "--version"] {
        let output = load(flag);
        assert!(output.status.success() && output.stderr.is_empty() && !output.stdout.is_empty());
    }
}

#[test]
fn a_refused_store_is_one_line_and_exit_1() {
    let rogue = Rogue::new(Fault::RefusePuts);
    let output = load(&format!("--target {} --requests 1", rogue.url()));
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), error.lines().count()), (Some(1), 1), "{error}");
    assert!(error.contains("507") && error.contains("no room"), "{error}");
}

/// Interrupts a run when the condition holds. Returns its exit code and its report.
fn interrupted(line: &str, when: impl Fn() -> bool) -> (Option<i32>, Value) {
    let mut child = command(&format!("{line} --json")).stdout(Stdio::piped()).spawn().unwrap();
    wait_for(&mut child, when);
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::INT).unwrap();
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["interrupted"], true);
    (child.wait().unwrap().code(), json)
}

#[test]
fn an_interrupt_ends_the_run_with_a_report() {
    let rogue = Rogue::new(Fault::None);
    let (code, json) = interrupted(&format!("--target {} --duration 1h", rogue.url()), || rogue.gets() > 100);
    assert_eq!((code, json["requests"].as_u64()), (Some(0), Some(rogue.gets())), "nothing failed, and all was answered: {json}");
}

#[test]
fn what_hangs_when_the_run_is_interrupted_has_failed() {
    let rogue = Rogue::new(Fault::Hang);
    let (code, json) = interrupted(&format!("--target {} --duration 1h --concurrency 4", rogue.url()), || rogue.faults() == 4);
    assert_eq!((code, json["requests"].as_u64(), json["status_codes"]["0"].as_u64()), (Some(1), Some(rogue.gets()), Some(4)), "{json}");
    assert!(json["errors"][0].as_str().unwrap().contains("stopped"), "{json}");
}

#[test]
fn what_was_due_when_the_run_is_interrupted_has_failed() {
    let rogue = Rogue::new(Fault::Hang);
    let since = Instant::now();
    // The only client hangs at the tenth request, which is due after 0.1 s. The other requests are due all the same.
    let late = || rogue.faults() == 1 && since.elapsed() > Duration::from_secs(1);
    let (code, json) = interrupted(&format!("--target {} --duration 1h --concurrency 1 --rate 100", rogue.url()), late);
    assert!(code == Some(1) && json["requests"].as_u64().unwrap() > rogue.gets() + 5, "{json}");
    assert!(json["errors"].as_array().unwrap().iter().any(|error| error.as_str().unwrap().starts_with("not sent")), "{json}");
}

#[test]
fn a_corpus_in_the_making_can_be_interrupted() {
    let rogue = Rogue::new(Fault::None);
    // After both requests of the check, the corpus is being made.
    let line = format!("--target {} --requests 1 --objects 50000 --size 10MiB", rogue.url());
    let (code, json) = interrupted(&line, || rogue.connections() == 2);
    assert_eq!((code, json["requests"].as_u64(), rogue.puts()), (Some(1), Some(0), 0));
}

#[test]
fn a_report_that_cannot_be_printed_is_one_line_and_exit_1() {
    let rogue = Rogue::new(Fault::None);
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let output = command(&format!("--target {} --requests 1", rogue.url())).stdout(full).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && error.lines().count() == 1 && error.contains("cannot print"), "{error}");
}

/// Waits until the condition holds. Panics if the child ends before that, or after 30 seconds.
fn wait_for(child: &mut Child, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "it never came to that");
        std::thread::sleep(Duration::from_millis(5));
    }
}
