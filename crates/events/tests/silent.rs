//! A broker that accepts connections and says nothing. In a program of its own, since it counts threads.
#![expect(clippy::unwrap_used, reason = "a helper outside a test function fails its test by panicking, as the tests do")]

use castier_config::{EventSink, Span};
use std::{fs, sync::Arc, time::Duration};

#[path = "it/support.rs"]
#[expect(dead_code, reason = "the other tests use the rest")]
mod support;

use support::{Memory, begin, eventually};

fn io_loops() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap().filter_map(Result::ok);
    tasks.filter(|task| fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.starts_with("lapin-io-loop"))).count()
}

/// Each attempt ends with all that it started.
#[tokio::test(flavor = "multi_thread")]
async fn attempts_leave_no_thread_behind() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let sink = |scheme: &str| EventSink {
        url: format!("{scheme}://127.0.0.1:{port}").parse().ok(),
        name: scheme.into(),
        timeout: Span::millis(100),
        ..EventSink::default()
    };
    let journal = Arc::new(Memory::default());
    let started = begin(&journal, &[sink("amqp"), sink("nats")]);
    journal.append(1);
    let mut held = Vec::new();
    while started.failures("amqp") < 4.0 || started.failures("nats") < 4.0 {
        if let Ok(accepted) = tokio::time::timeout(Duration::from_millis(20), silent.accept()).await {
            held.push(accepted.unwrap().0);
        }
    }
    started.stop().await;
    eventually("no thread of a connection is left", async || io_loops() == 0).await;
    assert!(held.len() >= 8, "each attempt had a connection of its own");
}
