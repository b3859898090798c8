//! `examples/consumer`: what somebody copies must work, with each receiver, and though events come twice.

use crate::{
    brokers::Broker,
    support::{DIGEST, Memory, begin, eventually, free_port, skip, tool},
    webhook::SECRET,
};
use castier_config::EventSink;
use castier_events::{CorruptSource, Kind};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
};
use tempfile::TempDir;

struct Consumer {
    process: Child,
    python: PathBuf,
    dir: TempDir,
}

impl Drop for Consumer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Consumer {
    /// None, after saying so, if Python or its library is missing.
    fn start(library: &str, arguments: &[&str]) -> Option<Self> {
        let python = tool("python3")?;
        if !Command::new(&python).args(["-c", &format!("import {library}")]).stderr(Stdio::null()).status().unwrap().success() {
            skip(&format!("Python has no {library} (scripts/setup-tests installs it)"));
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("secret"), SECRET).unwrap();
        let process = Self::spawn(&python, &dir, arguments);
        Some(Self { process, python, dir })
    }

    fn spawn(python: &Path, dir: &TempDir, arguments: &[&str]) -> Child {
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/consumer/consumer.py");
        let log = File::options().create(true).append(true).open(dir.path().join("log")).unwrap();
        let mut command = Command::new(python);
        command.arg(program).args(arguments).current_dir(dir.path()).stdin(Stdio::null());
        command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
    }

    fn kill_and_start(&mut self, arguments: &[&str]) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.process = Self::spawn(&self.python, &self.dir, arguments);
    }

    fn query(&self, query: &str) -> String {
        let script = "import sqlite3, sys\nprint(sqlite3.connect('events.db').execute(sys.argv[1]).fetchall())";
        let ran = Command::new(&self.python).args(["-c", script, query]).current_dir(self.dir.path()).output().unwrap();
        String::from_utf8(ran.stdout).unwrap().trim().to_owned()
    }

    /// All events arrive once, though the consumer is killed midway and castier sends some twice.
    async fn gets_everything(&mut self, sink: EventSink, arguments: &[&str]) {
        let journal = Arc::new(Memory::default());
        let started = begin(&journal, std::slice::from_ref(&sink));
        journal.append(1500);
        eventually("some events are stored", async || !["", "[(0,)]"].contains(&self.query("SELECT COUNT(*) FROM events").as_str())).await;
        self.kill_and_start(arguments);
        journal.append_kinds(&[Kind::Deleted, Kind::Corrupt(CorruptSource::Disk)]);
        started.delivered(sink.name()).await;
        started.stop().await;
        journal.forget(sink.name(), 100);
        let started = begin(&journal, std::slice::from_ref(&sink));
        started.delivered(sink.name()).await;
        started.stop().await;
        let count = "SELECT COUNT(*), COUNT(DISTINCT id), MIN(size), MAX(digest) FROM events";
        let expected = format!("[(1502, 1502, 7, '{DIGEST}')]");
        eventually("every event is stored once", async || self.query(count) == expected).await;
        // What a consumer that died had not acknowledged may come behind later events.
        let last = "SELECT type, node, client FROM events ORDER BY CAST(SUBSTR(id, 6) AS INTEGER) DESC LIMIT 2";
        assert_eq!(self.query(last), "[('dev.castier.blob.corrupt', 'node', 'ci'), ('dev.castier.blob.deleted', 'node', 'ci')]");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_consumer_takes_webhooks() {
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let arguments = ["webhook", "--secret-file", "secret", "--listen", &listen];
    let Some(mut consumer) = Consumer::start("sqlite3", &arguments) else { return };
    let secret_file = consumer.dir.path().join("secret");
    let sink = EventSink { url: format!("http://{listen}/").parse().ok(), secret_file, batch: 10, ..EventSink::default() };
    // Another secret is not admitted.
    let other = consumer.dir.path().join("other");
    fs::write(&other, "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA").unwrap();
    let journal = Arc::new(Memory::default());
    let started = begin(&journal, &[EventSink { secret_file: other, name: "other".into(), ..sink.clone() }]);
    journal.append(1);
    eventually("the signature is refused", async || started.failures("other") >= 3.0).await;
    started.stop().await;
    assert_eq!((journal.at("other"), consumer.query("SELECT COUNT(*) FROM events").as_str()), (0, "[(0,)]"));
    consumer.gets_everything(sink, &arguments).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_consumer_takes_messages_of_nats() {
    let Some(broker) = Broker::nats().await else { return };
    broker.create_queue().await;
    let url = broker.url();
    let arguments = ["nats", "--url", &url];
    let Some(mut consumer) = Consumer::start("nats", &arguments) else { return };
    consumer.gets_everything(EventSink { url: url.parse().ok(), ..EventSink::default() }, &arguments).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_consumer_takes_messages_of_rabbitmq() {
    let Some(broker) = Broker::rabbitmq().await else { return };
    broker.create_queue().await;
    let url = broker.url();
    let arguments = ["amqp", "--url", &url];
    let Some(mut consumer) = Consumer::start("pika", &arguments) else { return };
    consumer.gets_everything(EventSink { url: url.parse().ok(), ..EventSink::default() }, &arguments).await;
}
