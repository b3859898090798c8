//! `castier`: arguments, config, assembly.

use arc_swap::ArcSwap;
use castier::{
    admin::{self, Admin},
    disk::Disk,
    flight::{Flights, Tiers},
    http::Front,
    ladder::Ladder,
    members::Members,
    memory::Memory,
    metrics::Metrics,
    relay::Relay,
    secret::Secrets,
    spool::{Budget, Room},
    upstream::{self, HttpProbe, Peers, Sources, Upstream},
};
use castier_blob::Digest;
use castier_config::{self as config, Castier, Limits, OriginUrl};
use castier_origin::{Origin, log::Guard};
use clap::Parser;
use parking_lot::Mutex;
use pingora::{
    listeners::ListenerConfig,
    protocols::l4::stream::L4BufferSettings,
    server::Fds,
    services::{Service as _, listening::Service},
};
use std::{
    io::Write,
    net::SocketAddr,
    os::fd::IntoRawFd,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    net::TcpListener,
    runtime::Handle,
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// A caching tier in front of a content-addressed store. Without arguments: a store and a cache to try, on 127.0.0.1:8080.
///
/// Every key of the config can also be set from the environment: CASTIER_ and its path, as in CASTIER_MEMORY__CAPACITY=2GiB.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The config file (TOML). Without it: the defaults and the environment.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Check the config, name every problem, and exit: 0 if it is sound, 2 if not.
    #[arg(long)]
    check_config: bool,
    /// Print the effective config, secrets masked, and exit.
    #[arg(long, conflicts_with = "check_config")]
    print_config: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let config = match config::load::<Castier>(args.config.as_deref(), config::environment()) {
        Ok(loaded) => loaded.config,
        Err(problems) => {
            eprintln!("{problems}");
            return ExitCode::from(2);
        }
    };
    if args.check_config {
        say("the config is sound");
        return ExitCode::SUCCESS;
    }
    if args.print_config {
        say(config::print(&config).trim_end());
        return ExitCode::SUCCESS;
    }
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("castier: no threads to run on: {error}");
            return ExitCode::from(1);
        }
    };
    let ended = runtime.block_on(run(config, args.config.as_deref()));
    // Whatever has not ended within shutdown.grace is not waited for.
    runtime.shutdown_timeout(Duration::from_millis(100));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("castier: {why}");
            ExitCode::from(1)
        }
    }
}

/// Starts everything, and ends when told to. An error is one line that names what could not be had.
async fn run(config: Castier, file: Option<&Path>) -> Result<(), String> {
    let log = castier_origin::log::init(&config.log, "castier").map_err(|error| error.to_string())?;
    let mut signals = Signals::new().map_err(|error| format!("signals cannot be received: {error}"))?;
    let public = bind("listen.public", &config.listen.public).await?;
    let admin_listener = bind("listen.admin", &config.listen.admin).await?;
    let (stop_origin, origin_stopped) = watch::channel(false);
    let (origin_url, embedded) = match &config.origin.url {
        OriginUrl::Remote(url) => (url.clone(), None),
        OriginUrl::Embedded(root) => embedded_origin(root, &config, origin_stopped).await.map(|(url, embedded)| (url, Some(embedded)))?,
    };

    let metrics = Arc::new(Metrics::new().map_err(|error| format!("metrics: {error}"))?);
    let limits = Arc::new(ArcSwap::from_pointee(config.limits.clone()));
    let peers = peers(&config, &metrics)?;
    let tiers = tiers(&config, &metrics)?;
    let fill_memory = Budget::new(config.fill.memory.get());
    let room = Room::new(&config, fill_memory.clone());
    room.check().map_err(|error| format!("fill.spool_dir: cannot write to {}: {error}", room.dir.display()))?;
    let origin = Upstream::origin(&origin_url, &config.origin)?;
    let sources = Sources { origin: origin.clone(), peers };
    let flights = Flights::new(&config, limits.clone(), tiers.clone(), sources.clone(), room, metrics.clone());
    let ladder = Arc::new(Ladder::new(tiers.clone(), flights, sources, fill_memory, metrics.clone()));
    if let Some(disk) = &tiers.disk {
        let (ladder, runtime) = (Arc::downgrade(&ladder), Handle::current());
        disk.on_rotten(move |digest| {
            if let Some(ladder) = ladder.upgrade() {
                runtime.spawn(ladder.refetch(digest));
            }
        });
    }
    let relay = Relay::new(origin.clone(), metrics.clone(), upstream::ca_file(&config.origin)?);
    let front = Front::new(ladder.clone(), relay, limits.clone(), metrics.clone());
    let name = public.local_addr().map_or_else(|_| config.listen.public.clone(), |address| address.to_string());
    let admin = Arc::new(Admin { ladder: ladder.clone(), metrics: metrics.clone(), ready: AtomicBool::new(false), name: name.clone() });

    say(&format!("listening public {name}\nlistening admin {}", shown(&admin_listener)));
    if let Some((address, root, _)) = &embedded {
        say(&format!("listening origin {address} (embedded, {})", root.display()));
    }
    say(&format!("try: curl -F file=@README.md http://{name}/cas"));

    let (drain, draining) = watch::channel(false);
    let admin_server = axum::serve(admin_listener, admin::router(admin.clone())).into_future();
    let admin_server = tokio::spawn(admin_server);
    let listening = tokio::spawn(accept(front, public, draining)?);
    tokio::spawn(log_stats(ladder, config.log.stats_interval.get()));
    tokio::spawn(ask_origin(origin, config.origin.url.to_string()));
    admin.ready.store(true, Ordering::Relaxed);
    tracing::info!(version = env!("CARGO_PKG_VERSION"), origin = %config.origin.url, "castier is ready");

    loop {
        tokio::select! {
            _ = signals.hangup.recv() => reload(&config, file, &limits, embedded.as_ref().map(|(.., origin)| origin), &log),
            _ = signals.terminate.recv() => break,
            _ = signals.interrupt.recv() => break,
        }
    }

    admin.ready.store(false, Ordering::Relaxed);
    tracing::info!(connections = metrics.connections.get(), grace = %config.shutdown.grace, "draining");
    drain.send_replace(true);
    let quiet = async {
        listening.await.ok();
        while metrics.connections.get() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    if tokio::time::timeout(config.shutdown.grace.get(), quiet).await.is_err() {
        tracing::warn!(connections = metrics.connections.get(), "shutdown.grace is over: what is still in flight is cut");
    }
    stop_origin.send_replace(true);
    admin_server.abort();
    tracing::info!("bye");
    log.close().await;
    Ok(())
}

/// One or more lines on stdout. Nobody listening there is no reason to stop.
fn say(lines: &str) {
    let _ = writeln!(std::io::stdout(), "{lines}");
}

/// The signals that mean something.
struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }
}

async fn bind(key: &str, address: &str) -> Result<TcpListener, String> {
    TcpListener::bind(address).await.map_err(|error| format!("{key}: cannot listen on {address}: {error}"))
}

fn shown(listener: &TcpListener) -> String {
    listener.local_addr().map_or_else(|error| error.to_string(), |address| address.to_string())
}

/// The places for blobs. A cluster takes its mirror's part out of the memory.
fn tiers(config: &Castier, metrics: &Arc<Metrics>) -> Result<Tiers, String> {
    let share = config.cluster.as_ref().map(|cluster| cluster.mirror_share);
    let (memory, mirror) = Memory::with_mirror(&config.memory, share);
    let disk = match &config.disk {
        Some(disk) => Some(Disk::open(disk, metrics.clone()).map_err(|error| error.to_string())?),
        None => None,
    };
    Ok(Tiers { memory: Arc::new(memory), mirror: mirror.map(Arc::new), disk })
}

/// The other nodes, if there are any.
fn peers(config: &Castier, metrics: &Arc<Metrics>) -> Result<Option<Arc<Peers>>, String> {
    let Some(cluster) = &config.cluster else { return Ok(None) };
    let members = Members::start(cluster, Arc::new(HttpProbe::new(&cluster.tls)?), metrics.clone())?;
    let secrets = Arc::new(Secrets::open(cluster)?);
    Peers::new(config, members, secrets, metrics.clone()).map(Some)
}

/// The embedded origin: where it listens, where its data is, and itself.
type Embedded = (SocketAddr, PathBuf, Origin);

/// Starts the real origin server on a loopback port of its own choosing. It is reached over HTTP like any other.
async fn embedded_origin(root: &Path, config: &Castier, mut stopped: watch::Receiver<bool>) -> Result<(url::Url, Embedded), String> {
    let grace = config.shutdown.grace.get();
    let options = castier_origin::Options { allow_delete: config.allow_delete, limits: (&config.limits).into(), grace };
    let origin = Origin::open(root, options).map_err(|error| format!("origin.url: {}: {error}", root.display()))?;
    let listener = bind("origin.url (embedded)", "127.0.0.1:0").await?;
    let address = listener.local_addr().map_err(|error| error.to_string())?;
    let url = format!("http://{address}").parse().map_err(|error| format!("origin.url: {error}"))?;
    let server = origin.clone();
    tokio::spawn(
        async move { server.serve(listener, async move { stopped.wait_for(|stop| *stop).await.map(drop).unwrap_or_default() }).await },
    );
    Ok((url, (address, root.to_owned(), origin)))
}

/// The public listener, on pingora's accept loop over a socket that is bound already (so that a busy port is one line, not a panic).
fn accept(front: Front, listener: TcpListener, draining: watch::Receiver<bool>) -> Result<impl Future<Output = ()>, String> {
    let address = shown(&listener);
    let socket = listener.into_std().map_err(|error| error.to_string())?;
    let mut fds = Fds::new();
    fds.add(address.clone(), socket.into_raw_fd());
    let mut service = Service::new("public".to_owned(), front);
    // Reads go straight into the gate's buffer and writes are whole already: buffers between would only cost memory.
    service.add_listener(ListenerConfig::tcp(address).l4_buffer(L4BufferSettings::unbuffered()));
    Ok(async move { service.start_service(Some(Arc::new(Mutex::new(fds))), draining, 1).await })
}

async fn log_stats(ladder: Arc<Ladder>, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        match serde_json::to_string(&ladder.stats()) {
            Ok(stats) => tracing::info!(target: "stats", "{stats}"),
            Err(error) => tracing::error!(%error, "statistics could not be written"),
        }
    }
}

/// An origin that is down at the start is worth a line; castier serves what it keeps and asks again with every miss.
async fn ask_origin(origin: Arc<Upstream>, url: String) {
    if let Err(fault) = origin.stat(&Digest::of(b"")).await {
        tracing::warn!(%fault, "the origin {url} does not answer yet; castier serves what it keeps, and goes on trying with every miss");
    }
}

/// Re-reads the config: limits and log level change at once, the rest is named in a warning.
fn reload(running: &Castier, file: Option<&Path>, limits: &ArcSwap<Limits>, embedded: Option<&Origin>, log: &Guard) {
    let new = match config::load::<Castier>(file, config::environment()) {
        Ok(loaded) => loaded.config,
        Err(problems) => return tracing::error!("the config was not reloaded:\n{problems}"),
    };
    let current = Castier { limits: Limits::clone(&limits.load()), ..running.clone() };
    let changed = config::changed(&current, &new);
    let (live, later): (Vec<_>, Vec<_>) = changed.into_iter().partition(|key| key.starts_with("limits.") || key == "log.level");
    if let Err(error) = log.set_level(&new.log.level) {
        return tracing::error!(%error, "the config was not reloaded");
    }
    if let Some(origin) = embedded {
        origin.set_limits((&new.limits).into());
    }
    limits.store(Arc::new(new.limits));
    tracing::info!(changed = ?live, "config reloaded");
    if !later.is_empty() {
        tracing::warn!(keys = ?later, "these changes need a restart");
    }
}
