//! RabbitMQ and NATS themselves.

use crate::support::{Memory, assert_complete, begin, eventually, free_port, skip, tool};
use async_nats::jetstream;
use castier_config::{EventSink, Span};
use castier_events::Kind;
use lapin::{
    Connection, ConnectionProperties,
    options::{BasicGetOptions, QueueDeclareOptions},
    types::FieldTable,
};
use rustix::process::{Pid, Signal, kill_process_group};
use std::{
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
};
use tempfile::TempDir;

/// A process group that ends with this value.
struct Group(Child);

impl Group {
    fn start(command: &mut Command, log: &Path) -> Self {
        let log = File::options().create(true).append(true).open(log).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).process_group(0);
        Self(command.spawn().unwrap())
    }

    fn signal(&self, signal: Signal) {
        let _ = kill_process_group(Pid::from_child(&self.0), signal);
    }

    /// A signal takes a while: whether all processes have stopped.
    fn is_stopped(&self) -> bool {
        let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("stat")).ok());
        // `PID (NAME) STATE PARENT GROUP …`
        let states = processes.filter_map(|stat| {
            let mut fields = stat.rsplit_once(") ")?.1.split(' ');
            let (state, _, group) = (fields.next()?.to_owned(), fields.next()?, fields.next()?.parse::<u32>().ok()?);
            (group == self.0.id()).then_some(state)
        });
        states.into_iter().all(|state| state == "T")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::CONT);
        self.signal(Signal::KILL);
        let _ = self.0.wait();
    }
}

/// A certificate for 127.0.0.1, and its key. It is its own authority.
fn certificate(dir: &Path) -> (PathBuf, PathBuf) {
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned(), "localhost".to_owned()]).unwrap();
    let (certificate, key) = (dir.join("cert.pem"), dir.join("key.pem"));
    fs::write(&certificate, made.cert.pem()).unwrap();
    fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    (certificate, key)
}

#[derive(Clone, Copy, PartialEq)]
enum What {
    RabbitMq,
    Nats,
}

pub(crate) struct Broker {
    what: What,
    dir: TempDir,
    program: PathBuf,
    pub(crate) port: u16,
    tls_port: u16,
    process: Option<Group>,
    /// Erlang's name server, on a port of its own.
    epmd: Option<(Group, u16)>,
}

impl Broker {
    /// None, after saying so, if it is not installed.
    pub(crate) async fn rabbitmq() -> Option<Self> {
        let (_, epmd) = (tool("rabbitmq-server")?, tool("epmd")?);
        // The program in the path changes the user, so that it could not have a directory of its own.
        let lib = fs::read_dir("/usr/lib/rabbitmq/lib").ok()?.filter_map(Result::ok).map(|entry| entry.path().join("sbin/rabbitmq-server"));
        let Some(program) = lib.into_iter().find(|path| path.is_file()) else {
            skip("rabbitmq-server is not where its package has it");
            return None;
        };
        let mut broker = Self::new(What::RabbitMq, program);
        let port = free_port();
        let mut epmd = Command::new(epmd);
        epmd.args(["-address", "127.0.0.1", "-port", &port.to_string()]);
        broker.epmd = Some((Group::start(&mut epmd, &broker.dir.path().join("epmd.log")), port));
        broker.start().await;
        Some(broker)
    }

    pub(crate) async fn nats() -> Option<Self> {
        let mut broker = Self::new(What::Nats, tool("nats-server")?);
        broker.start().await;
        Some(broker)
    }

    fn new(what: What, program: PathBuf) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { what, program, dir, port: free_port(), tls_port: free_port(), process: None, epmd: None }
    }

    pub(crate) fn url(&self) -> String {
        match self.what {
            What::RabbitMq => format!("amqp://guest:guest@127.0.0.1:{}", self.port),
            What::Nats => format!("nats://127.0.0.1:{}", self.port),
        }
    }

    fn sink(&self) -> EventSink {
        EventSink { url: self.url().parse().ok(), name: "broker".into(), timeout: Span::secs(5), ..EventSink::default() }
    }

    fn command(&self, tls: Option<(&Path, &Path)>) -> Command {
        let dir = self.dir.path();
        let mut command = Command::new(&self.program);
        command.current_dir(dir).env("HOME", dir);
        match (self.what, tls) {
            (What::Nats, None) => {
                command.args(["-a", "127.0.0.1", "-p", &self.port.to_string(), "-js", "-sd"]).arg(dir.join("store"));
            }
            (What::Nats, Some((certificate, key))) => {
                command.args(["-a", "127.0.0.1", "-p", &self.tls_port.to_string(), "-js", "-sd"]).arg(dir.join("store"));
                command.args(["--user", "castier", "--pass", "secret", "--tls", "--tlscert"]).arg(certificate).arg("--tlskey").arg(key);
            }
            (What::RabbitMq, _) => {
                let (certificate, key) = certificate(dir);
                let config = format!(
                    "listeners.tcp.1 = 127.0.0.1:{}\nlisteners.ssl.1 = 127.0.0.1:{}\nssl_options.certfile = {}\nssl_options.keyfile = {}\n",
                    self.port,
                    self.tls_port,
                    certificate.display(),
                    key.display()
                );
                fs::write(dir.join("rabbitmq.conf"), config).unwrap();
                fs::write(dir.join("plugins"), "[].").unwrap();
                let (_, epmd) = self.epmd.as_ref().unwrap();
                command
                    .env("RABBITMQ_NODENAME", format!("castier{}@localhost", self.port))
                    .env("RABBITMQ_CONFIG_FILE", dir.join("rabbitmq.conf"));
                command.env("RABBITMQ_MNESIA_BASE", dir.join("data")).env("RABBITMQ_LOG_BASE", dir.join("log"));
                command.env("RABBITMQ_ENABLED_PLUGINS_FILE", dir.join("plugins")).env("RABBITMQ_PID_FILE", dir.join("pid"));
                command.env("RABBITMQ_DIST_PORT", free_port().to_string()).env("RABBITMQ_CONF_ENV_FILE", dir.join("none"));
                command.env("ERL_EPMD_ADDRESS", "127.0.0.1").env("ERL_EPMD_PORT", epmd.to_string());
                command.env("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "-kernel inet_dist_use_interface {127,0,0,1}");
            }
        }
        command
    }

    /// Starts the broker, and waits until it answers.
    async fn start(&mut self) {
        let log = self.dir.path().join("broker.log");
        self.process = Some(Group::start(&mut self.command(None), &log));
        eventually("the broker answers", async || match self.what {
            What::RabbitMq => Connection::connect(&self.url(), ConnectionProperties::default()).await.is_ok(),
            What::Nats => async_nats::connect(self.url()).await.is_ok(),
        })
        .await;
    }

    /// Kills the broker as a power failure would.
    fn kill(&mut self) {
        self.process = None;
    }

    fn signal(&self, signal: Signal) {
        self.process.as_ref().unwrap().signal(signal);
    }

    /// Creates the queue, or the stream.
    pub(crate) async fn create_queue(&self) {
        match self.what {
            What::RabbitMq => {
                let connection = Connection::connect(&self.url(), ConnectionProperties::default()).await.unwrap();
                let channel = connection.create_channel().await.unwrap();
                let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
                channel.queue_declare("castier.events".into(), options, FieldTable::default()).await.unwrap();
            }
            What::Nats => {
                let stream = jetstream::stream::Config {
                    name: "castier".into(),
                    subjects: vec!["castier.events".into()],
                    ..jetstream::stream::Config::default()
                };
                let context = jetstream::new(async_nats::connect(self.url()).await.unwrap());
                context.create_stream(stream).await.unwrap();
            }
        }
    }

    /// The ids of all messages, in the broker's order. Each message must be the event of its id.
    async fn drain(&self) -> Vec<String> {
        let mut ids = Vec::new();
        let mut note = |id: &str, content_type: &str, body: &[u8]| {
            let event: serde_json::Value = serde_json::from_slice(body).unwrap();
            assert_eq!((event["id"].as_str().unwrap(), content_type), (id, "application/cloudevents+json"));
            ids.push(id.to_owned());
        };
        match self.what {
            What::RabbitMq => {
                let connection = Connection::connect(&self.url(), ConnectionProperties::default()).await.unwrap();
                let channel = connection.create_channel().await.unwrap();
                while let Some(message) = channel.basic_get("castier.events".into(), BasicGetOptions { no_ack: true }).await.unwrap() {
                    let properties = &message.delivery.properties;
                    assert_eq!(*properties.delivery_mode(), Some(2), "the broker writes it to disk");
                    let text = |text: &Option<lapin::types::ShortString>| text.as_ref().unwrap().to_string();
                    note(&text(properties.message_id()), &text(properties.content_type()), &message.delivery.data);
                }
            }
            What::Nats => {
                let context = jetstream::new(async_nats::connect(self.url()).await.unwrap());
                let stream = context.get_stream("castier").await.unwrap();
                let last = stream.cached_info().state.last_sequence;
                for sequence in 1..=last {
                    let message = stream.get_raw_message(sequence).await.unwrap();
                    let header = |name: &str| message.headers.get(name).unwrap().as_str();
                    note(header("Nats-Msg-Id"), header("Content-Type"), &message.payload);
                }
            }
        }
        ids
    }
}

/// No queue, a broker that hangs, one that is killed, and a castier that is.
async fn survives_everything(mut broker: Broker) {
    let journal = Arc::new(Memory::default());
    let sinks = [broker.sink()];

    // 1. No queue takes the events. Nothing is lost, and once there is a queue they come.
    let started = begin(&journal, &sinks);
    journal.append(1000);
    eventually("the broker takes no event", async || started.failures("broker") >= 2.0).await;
    assert_eq!((journal.at("broker"), started.series("castier_events_sink_up", "broker")), (0, 0.0));
    assert_eq!(started.series("castier_events_pending", "broker"), 1000.0);
    assert!(started.series("castier_events_oldest_seconds", "broker") > 0.4, "an attempt and a pause have gone by");
    broker.create_queue().await;
    started.delivered("broker").await;
    assert_eq!(started.series("castier_events_sink_up", "broker"), 1.0);

    // 2. The broker hangs, with its connections open. The timeout notices that.
    let failures = started.failures("broker");
    broker.signal(Signal::STOP);
    eventually("the broker has stopped", async || broker.process.as_ref().unwrap().is_stopped()).await;
    journal.append(1000);
    eventually("the timeout is noticed", async || started.failures("broker") >= failures + 2.0).await;
    assert_eq!(journal.at("broker"), 1000);
    broker.signal(Signal::CONT);
    started.delivered("broker").await;

    // 3. The broker is killed while events are on their way, and is away for a while.
    journal.append(4000);
    eventually("some are delivered", async || started.series("castier_events_delivered_total", "broker") >= 3000.0).await;
    broker.kill();
    journal.append(4000);
    let failures = started.failures("broker");
    eventually("the broker is away", async || started.failures("broker") >= failures + 2.0).await;
    broker.start().await;
    started.delivered("broker").await;

    // 4. castier ends, and has lost the end of what it knew to be acknowledged. It sends that again.
    started.stop().await;
    assert_eq!(journal.at("broker"), 10_000);
    journal.forget("broker", 300);
    let started = begin(&journal, &sinks);
    started.delivered("broker").await;
    assert_eq!(started.series("castier_events_delivered_total", "broker"), 300.0);
    // What a receiver does not want is left out, and its cursor goes on.
    started.stop().await;
    let sinks = [EventSink { types: vec![castier_config::EventKind::Stored], ..broker.sink() }];
    let started = begin(&journal, &sinks);
    journal.append_kinds(&[Kind::Deleted, Kind::Deleted]);
    started.delivered("broker").await;
    assert_eq!(started.series("castier_events_delivered_total", "broker"), 0.0);
    eventually("none waits", async || started.series("castier_events_pending", "broker") == 0.0).await;
    assert_eq!(started.series("castier_events_oldest_seconds", "broker"), 0.0);
    started.stop().await;

    let ids = broker.drain().await;
    println!("{} messages for 10,000 events", ids.len());
    assert_complete(&ids, 10_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_gets_every_event_in_order() {
    let Some(broker) = Broker::rabbitmq().await else { return };
    survives_everything(broker).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_gets_every_event_in_order() {
    let Some(broker) = Broker::nats().await else { return };
    survives_everything(broker).await;
}

/// With `ca_file` the broker's certificate is good, and without it is not. The password is in a file.
async fn over_tls(broker: Broker, url: &str, authority: &Path, password: &str) {
    broker.create_queue_over(authority).await;
    let credentials_file = broker.dir.path().join("credentials");
    fs::write(&credentials_file, format!("{password}\n")).unwrap();
    let good =
        EventSink { url: url.parse().ok(), name: "good".into(), ca_file: authority.into(), credentials_file, ..EventSink::default() };
    let bad = EventSink { ca_file: PathBuf::new(), name: "bad".into(), ..good.clone() };
    let wrong_file = broker.dir.path().join("wrong");
    fs::write(&wrong_file, "castier:wrong").unwrap();
    let wrong = EventSink { credentials_file: wrong_file, name: "wrong".into(), ..good.clone() };
    let journal = Arc::new(Memory::default());
    let started = begin(&journal, &[good, bad, wrong]);
    journal.append(10);
    started.delivered("good").await;
    eventually("the others fail", async || started.failures("bad") >= 2.0 && started.failures("wrong") >= 2.0).await;
    assert_eq!((journal.at("bad"), journal.at("wrong")), (0, 0));
    started.stop().await;
}

impl Broker {
    async fn create_queue_over(&self, authority: &Path) {
        if self.what == What::RabbitMq {
            return self.create_queue().await;
        }
        let options = async_nats::ConnectOptions::new().add_root_certificates(authority.into()).require_tls(true);
        let client = options.user_and_password("castier".into(), "secret".into());
        let client = client.connect(format!("tls://127.0.0.1:{}", self.tls_port)).await.unwrap();
        let stream = jetstream::stream::Config {
            name: "castier".into(),
            subjects: vec!["castier.events".into()],
            ..jetstream::stream::Config::default()
        };
        jetstream::new(client).create_stream(stream).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_over_tls() {
    let Some(broker) = Broker::rabbitmq().await else { return };
    let (url, authority) = (format!("amqps://127.0.0.1:{}", broker.tls_port), broker.dir.path().join("cert.pem"));
    over_tls(broker, &url, &authority, "guest:guest").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_over_tls() {
    let Some(program) = tool("nats-server") else { return };
    let mut broker = Broker::new(What::Nats, program);
    let (certificate, key) = certificate(broker.dir.path());
    broker.process = Some(Group::start(&mut broker.command(Some((&certificate, &key))), &broker.dir.path().join("broker.log")));
    let address = format!("127.0.0.1:{}", broker.tls_port);
    eventually("the broker listens", async || tokio::net::TcpStream::connect(&address).await.is_ok()).await;
    over_tls(broker, &format!("tls://{address}"), &certificate, "castier:secret").await;
}
