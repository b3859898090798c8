//! `castier`: arguments, config, assembly.

use arc_swap::ArcSwap;
use castier::{
    admin::{self, Admin, Phase},
    descriptors::{Descriptors, Shares},
    entrance::{self, Door},
    events::OutboxJournal,
    handlers::{Asks, Handlers, relay::Relay},
    listener::{Audience, Front},
    memory_plan,
    metrics::{Listener, Metrics},
    node::Node,
    online_check,
    outboxes::PeerOutboxes,
    peer_access::PeerAccess,
    routes::{self, Routes},
};
use castier_blob::Digest;
use castier_bucket::{Bucket, Objects};
use castier_cache::{Budget, Cache, Fault, OneSource, Planner, Source, Spools, Store, Tiers};
use castier_cluster::{ClusterPlan, HttpProbe, Members, Peers, Purge, Secrets};
use castier_config::{self as config, Castier, Cluster, Limits, OriginUrl, Peer, Write};
use castier_origin::Origin;
use castier_outbox::{Announced, Others, Outbox, WriteBehind};
use castier_serverkit::{
    bind::{bind, shown},
    health_check::Credentials,
    log::{self, Guard},
    open_files, otlp,
    signals::{Order, Reading, Signals, sound},
    startup::{self, CommonArgs},
    tls::Tls,
};
use castier_upstream::{self as upstream, EmbeddedStore, TracedPlan, Upstream, trace};
use clap::Parser;
use parking_lot::Mutex;
use pingora::{
    listeners::ListenerConfig,
    protocols::l4::stream::L4BufferSettings,
    server::Fds,
    services::{Service as _, listening::Service},
};
use std::{
    net::SocketAddr,
    os::fd::IntoRawFd,
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinHandle,
};

mod commands;

/// How many rotten blobs may wait to be loaded again. Those beyond it are loaded at their next get.
const REFETCHES: usize = 1024;
/// This program's name, in records and in Loki.
const PROGRAM: &str = "castier";
/// How long the end waits for the disk tier's write-behind queue.
const FLUSH: Duration = Duration::from_secs(10);

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// A caching tier in front of a content-addressed store. Without arguments: a store and a cache to try, on 127.0.0.1:8080.
///
/// Every key of the config can also be set from the environment: CASTIER_ and its path, as in CASTIER_MEMORY__CAPACITY=2GiB.
#[derive(Parser)]
#[command(version, mut_arg("print_config", |arg| arg.conflicts_with("check_config")))]
struct Args {
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

/// What can be asked of a running castier.
#[derive(clap::Subcommand)]
enum Command {
    /// Say what a running castier knows about a URL: which route matches, what is kept and since when, and what would be asked.
    Why {
        /// The URL as a client asks for it, or its path.
        url: String,
        /// The admin listener of the running castier: HOST:PORT, or https://HOST:PORT. Default: listen.admin of --config, else 127.0.0.1:8082.
        #[arg(long, value_name = "ADDRESS")]
        admin: Option<String>,
        #[command(flatten)]
        credentials: Credentials,
    },
    /// Upload all that waits in the outbox (`origin.write = "behind"`), and return when it is empty. Run it before a node is removed.
    ///
    /// From then on the running castier acknowledges uploads only once the bucket has them, until it is started again. If no castier runs, and
    /// --config is given, this program uploads what is in the outbox itself.
    Drain {
        /// The admin listener of the running castier: HOST:PORT, or https://HOST:PORT. Default: listen.admin of --config, else 127.0.0.1:8082.
        #[arg(long, value_name = "ADDRESS")]
        admin: Option<String>,
        #[command(flatten)]
        credentials: Credentials,
        /// Give up after so long, such as 10m. Default: never.
        #[arg(long, value_name = "DURATION")]
        timeout: Option<config::Span>,
        /// Return no sooner than this, such as 10s: for a preStop hook, so that load balancers learn first that the node goes.
        #[arg(long, value_name = "DURATION")]
        at_least: Option<config::Span>,
    },
}

fn main() -> ExitCode {
    let Args { common, command } = Args::parse();
    match command {
        Some(Command::Why { url, admin, credentials }) => return commands::why(&url, &common, admin, &credentials),
        Some(Command::Drain { admin, credentials, timeout, at_least }) => {
            let begun = Instant::now();
            let ended = commands::drain(&common, admin, &credentials, timeout.map(config::Span::get));
            std::thread::sleep(at_least.map_or(Duration::ZERO, config::Span::get).saturating_sub(begun.elapsed()));
            return ended;
        }
        None => {}
    }
    startup::main(
        PROGRAM,
        &common,
        || common.load_with(config::environment(), check),
        ("origin.url", online_check::ask),
        |config| run(&common, config),
    )
}

/// The checks that the configuration cannot make itself.
fn check(config: &Castier, problems: &mut config::Problems) {
    let routes = routes::check(config, problems);
    entrance::check(config, &routes, true, problems);
}

/// As [`check`], of a castier that runs: what is in the files of certificates and users is read again by itself.
fn check_again(config: &Castier, problems: &mut config::Problems) {
    let routes = routes::check(config, problems);
    entrance::check(config, &routes, false, problems);
}

/// Starts everything, reloads the config at each SIGHUP, and ends at SIGTERM or SIGINT.
///
/// # Errors
/// One line that names the key or the resource that is at fault.
async fn run(args: &CommonArgs, config: Castier) -> Result<(), String> {
    let log = log::init(&config.log, PROGRAM).map_err(|error| error.to_string())?;
    let mut signals = Signals::new()?;
    let sockets = Sockets::bind(&config).await?;
    let (stop_origin, origin_stopped) = watch::channel(false);
    let metrics = Arc::new(Metrics::new().map_err(|error| format!("metrics: {error}"))?);
    let spools = Spools::new(&config, Budget::new(config.fill.memory.get()), metrics.cache.clone());
    spools.files.check().map_err(|error| format!("fill.spool_dir: cannot write to {}: {error}", spools.files.dir().display()))?;
    let outbox = open_outbox(&config, &metrics).await?;
    let (origin_url, embedded) = match &config.origin.url {
        OriginUrl::Remote(url) => (url.clone(), None),
        OriginUrl::Embedded(root) => {
            let origin = Embedded::open(root, &config)?;
            Embedded::start(origin, origin_stopped.clone()).await.map(|(url, embedded)| (url, Some(embedded)))?
        }
        OriginUrl::Bucket(bucket) => {
            let origin = Embedded::open_bucket(bucket, &config, &spools, &metrics, outbox.clone())?;
            Embedded::start(origin, origin_stopped.clone()).await.map(|(url, embedded)| (url, Some(embedded)))?
        }
    };
    let (parts, rotten) = Parts::new(&config, &sockets, &origin_url, embedded.as_ref(), outbox, metrics, spools)?;
    let instance = config.cluster.as_ref().map_or_else(|| log::instance(&sockets.public), |cluster| cluster.advertise.clone());
    log.name_instance(instance.clone());
    let exporter = otlp::start(&config.otlp, PROGRAM, instance)?.map(|(spans, exporter)| {
        trace::export_to(spans.sample(), move |span| spans.send(span));
        exporter
    });
    sockets.announce(&config, &log, embedded.as_ref());
    let events = parts.start_events(&config)?;
    let listeners = parts.listen(&config, sockets)?;
    let uploader = parts.start_background_tasks(&config, embedded.as_ref(), rotten, origin_stopped)?;
    if let Some(nodes) = &parts.nodes {
        nodes.wait_for_members().await;
    }
    parts.admin.enter(Phase::Ready);
    parts.shares.tell(&config);
    report_memory_plan(&config, &parts.limits.load(), &parts.metrics);
    parts.metrics.cache.disk_scrub_rate.set(config.disk.as_ref().map_or(0, |disk| gauged(disk.scrub_rate.get())));
    tracing::info!(version = env!("CARGO_PKG_VERSION"), origin = %config.origin.url, "castier is ready");

    let mut live = Live { config, parts, embedded, log };
    live.reload_until_told_to_end(args, &mut signals).await;

    let ending = end(live, listeners, stop_origin, uploader, events, exporter);
    tokio::select! {
        () = ending => {}
        () = signals.end() => tracing::warn!("told to end once more: what is in flight is cut, and blobs that wait to be written are not kept"),
    }
    Ok(())
}

/// The listening sockets. They are bound before anything else, so that a busy port is an error of one line.
struct Sockets {
    public: TcpListener,
    /// `None` without a cluster.
    peer: Option<TcpListener>,
    admin: TcpListener,
}

impl Sockets {
    async fn bind(config: &Castier) -> Result<Self, String> {
        let public = bind("listen.public", &config.listen.public).await?;
        let peer = match &config.cluster {
            Some(cluster) => Some(bind_peer(&config.listen.peer, cluster).await?),
            None => None,
        };
        Ok(Self { public, peer, admin: bind("listen.admin", &config.listen.admin).await? })
    }

    /// Prints the addresses, for the person who started the program.
    fn announce(&self, config: &Castier, log: &Guard, embedded: Option<&Embedded>) {
        let public = shown(&self.public);
        log.say(&format!("listening public {public}"));
        log.say(&format!("listening admin {}", shown(&self.admin)));
        if let Some(peer) = &self.peer {
            log.say(&format!("listening peer {}", shown(peer)));
        }
        if let Some(embedded) = embedded {
            log.say(&format!("listening origin {} ({})", embedded.address, embedded.place));
        }
        let scheme = if config.listen.tls.is_on() { "https" } else { "http" };
        log.say(&format!("try: curl -F file=@README.md {scheme}://{public}/cas"));
    }
}

/// The parts of a running castier.
struct Parts {
    metrics: Arc<Metrics>,
    limits: Arc<ArcSwap<Limits>>,
    shares: Shares,
    descriptors: Arc<Descriptors>,
    client_memory: Arc<Budget>,
    /// `None` without a cluster.
    nodes: Option<Nodes>,
    tiers: Tiers,
    origin: Arc<Upstream>,
    node: Arc<Node>,
    purge: Arc<Purge>,
    routes: Arc<Routes>,
    admin: Arc<Admin>,
    door: Door,
    /// This node's name.
    name: String,
}

impl Parts {
    /// Also returns the digests of blobs that the scrub found rotten.
    fn new(
        config: &Castier,
        sockets: &Sockets,
        origin_url: &url::Url,
        embedded: Option<&Embedded>,
        outbox: Option<Arc<Outbox>>,
        metrics: Arc<Metrics>,
        spools: Spools,
    ) -> Result<(Self, mpsc::Receiver<Digest>), String> {
        let shares = Shares::of(open_files::raise_limit(), config);
        let limits = Arc::new(ArcSwap::from_pointee(shares.within(&config.limits)));
        let nodes = Nodes::of(config, &metrics)?;
        let (tell_rotten, rotten) = mpsc::channel(REFETCHES);
        let tiers =
            Tiers::open(config, shares.open_files, &spools.memory, &metrics.cache, tell_rotten).map_err(|error| error.to_string())?;
        let origin = Upstream::origin(origin_url, &config.origin, metrics.upstream.clone())?;
        let store: Arc<dyn Store> = match embedded {
            Some(embedded) => {
                let blobs = match &embedded.bucket {
                    Some(EmbeddedBucket { bucket, .. }) => bucket.clone(),
                    None => embedded.origin.local(&config.origin),
                };
                Arc::new(EmbeddedStore::new(blobs, origin.clone()))
            }
            None => Arc::new(origin.store()),
        };
        let peers = nodes.as_ref().map(|nodes| nodes.peers.clone());
        let store = match embedded.and_then(|embedded| embedded.bucket.as_ref()?.behind.clone()) {
            Some(behind) => {
                let most_entry = usize::try_from(config.limits.max_entry.get()).unwrap_or(usize::MAX);
                let others = peers.clone().map(|peers| Arc::new(PeerOutboxes::new(peers, most_entry)) as Arc<dyn Others>);
                behind.connect(store, others);
                behind
            }
            None => match &outbox {
                Some(outbox) => Arc::new(Announced::new(store, outbox.clone())),
                None => store,
            },
        };
        let planner = planner(store.clone(), peers.clone(), outbox.clone());
        let retry_budget = origin.retry_budget().cloned().ok_or("the origin has no budget of retries")?;
        let cache = Cache::new(config, limits.clone(), tiers.clone(), spools, planner, metrics.cache.clone(), retry_budget);
        let node = Arc::new(Node { cache: cache.clone(), origin: store, outbox, peers: peers.clone(), metrics: metrics.clone() });
        let own_name = config.cluster.as_ref().map_or_else(|| shown(&sockets.public), |cluster| cluster.advertise.clone());
        let client_memory = Budget::new(config.limits.client_memory.get());
        let ca_file = upstream::ca_file(&config.origin)?;
        let ticket_key = nodes.as_ref().and_then(|nodes| nodes.secrets.derive("lfs tickets"));
        let routes = Routes::new(config, &node, client_memory.clone(), ticket_key, ca_file, origin_url)?;
        let door = Door::new(config, &metrics)?;
        let purge = Purge::new(cache, node.origin.clone(), peers, own_name.clone());
        let members = nodes.as_ref().map(|nodes| nodes.members.clone());
        let admin = Arc::new(Admin::new(node.clone(), origin.clone(), metrics.clone(), members, purge.clone(), routes.clone()));
        let descriptors = Descriptors::new(shares);
        Ok((
            Self {
                metrics,
                limits,
                shares,
                descriptors,
                client_memory,
                nodes,
                tiers,
                origin,
                node,
                purge,
                routes,
                admin,
                door,
                name: own_name,
            },
            rotten,
        ))
    }

    /// Starts to deliver events. `None`: nobody wants any.
    fn start_events(&self, config: &Castier) -> Result<Option<castier_events::Running>, String> {
        let Some(outbox) = self.node.outbox.as_ref().filter(|_| !config.events.is_empty()) else { return Ok(None) };
        let told = outbox.clone();
        self.metrics.cache.tell_of_corrupt(move |source, digest| told.announce_corrupt(digest, source));
        tokio::spawn(outbox.clone().settle_intents(self.node.origin.clone()));
        let journal: Arc<dyn castier_events::Journal> = Arc::new(OutboxJournal::new(outbox.clone(), self.name.clone()));
        castier_events::start(&config.events, &journal, self.metrics.registry()).map(Some)
    }

    /// Accepts connections at every socket.
    fn listen(&self, config: &Castier, sockets: Sockets) -> Result<Listeners, String> {
        let front = |asks, audience| {
            let handlers = Handlers::new(self.node.clone(), asks, self.routes.clone());
            let (limits, client_memory) = (self.limits.clone(), self.client_memory.clone());
            Front::new(handlers, audience, limits, client_memory, self.descriptors.clone(), self.metrics.clone())
        };
        let relay = Relay::new(self.origin.clone(), self.metrics.clone(), upstream::ca_file(&config.origin)?);
        let admin =
            tokio::spawn(admin::serve(sockets.admin, admin::router(self.admin.clone()), self.door.guard(config), self.limits.clone()));
        // The peer listener opens before this node sends requests to peers, because they may send it some at once.
        let peer = match (sockets.peer, &self.nodes) {
            (Some(socket), Some(nodes)) => {
                let asks = Asks::Peers { members: nodes.members.clone(), leaving: nodes.leaving.clone() };
                let audience = Audience::Peers(nodes.access());
                Some(Listening::open("peer", front(asks, audience), socket)?)
            }
            _ => None,
        };
        let public = Listening::open(
            "public",
            front(Asks::Clients(self.purge.clone()), Audience::Clients(relay, self.door.entrance(config))),
            sockets.public,
        )?;
        Ok(Listeners { public, peer, admin })
    }

    /// Also returns the task that uploads from the outbox. It ends after `stopped`.
    fn start_background_tasks(
        &self,
        config: &Castier,
        embedded: Option<&Embedded>,
        rotten: mpsc::Receiver<Digest>,
        stopped: watch::Receiver<bool>,
    ) -> Result<Option<JoinHandle<()>>, String> {
        tokio::spawn(refetch(self.node.cache.clone(), rotten));
        tokio::spawn(log_stats(self.admin.clone(), config.log.stats_interval.get()));
        tokio::spawn(keep_history(self.admin.clone()));
        if let Some(tls) = self.door.tls.clone() {
            tokio::spawn(tls.watch(|| {}));
        }
        if let Some(nodes) = self.nodes.clone()
            && let Some(tls) = nodes.tls.clone()
        {
            tokio::spawn(tls.watch(move || nodes.renew_certificates()));
        }
        if let OriginUrl::Remote(_) = config.origin.url {
            tokio::spawn(ask_origin(self.origin.clone(), config.origin.url.to_string()));
        }
        if let Some(EmbeddedBucket { bucket, behind }) = embedded.and_then(|embedded| embedded.bucket.as_ref()) {
            tokio::spawn(ask_bucket(bucket.clone(), self.origin.clone(), self.node.origin.clone()));
            if let (Some(behind), Some(disk)) = (behind, &config.disk) {
                let uploader = behind.uploader(disk.outbox_workers, config.limits.max_entry.get(), stopped);
                return Ok(Some(tokio::spawn(uploader.map_err(|fault| fault.to_string())?)));
            }
        }
        Ok(None)
    }
}

/// What accepts connections.
struct Listeners {
    public: Listening,
    /// `None` without a cluster.
    peer: Option<Listening>,
    admin: JoinHandle<()>,
}

/// Ends castier: clients and peers first, then the writes to disk, then the embedded origin, the admin listener, spans and logs.
async fn end(
    live: Live,
    listeners: Listeners,
    stop_origin: watch::Sender<bool>,
    uploader: Option<JoinHandle<()>>,
    events: Option<castier_events::Running>,
    exporter: Option<otlp::Exporter>,
) {
    let Live { config, parts, log, embedded } = live;
    parts.admin.enter(Phase::Draining);
    drain(&config, &parts.metrics, parts.nodes.as_ref(), listeners.public, listeners.peer).await;
    let routes = parts.routes;
    tokio::task::spawn_blocking(move || routes.close(FLUSH)).await.ok();
    if let Some(disk) = parts.tiers.disk
        && tokio::time::timeout(FLUSH, tokio::task::spawn_blocking(move || disk.close())).await.is_err()
    {
        tracing::warn!("the disk is too slow: some blobs that waited to be written are not kept");
    }
    if let Some(events) = events {
        // What is left is delivered after the next start.
        events.stop(DELIVER).await;
    }
    stop_origin.send_replace(true);
    if let Some(uploader) = uploader {
        // What it has begun is given up, and is uploaded at the next start.
        uploader.await.ok();
    }
    if let Some(EmbeddedBucket { bucket, .. }) = embedded.as_ref().and_then(|embedded| embedded.bucket.as_ref()) {
        bucket.close(ABORT).await;
    }
    listeners.admin.abort();
    tracing::info!("bye");
    if let Some(exporter) = exporter {
        exporter.close().await;
    }
    log.close().await;
}

/// Binds the peer listener, and refuses an address that is not on the loopback without a secret. The config check cannot: it resolves no names.
async fn bind_peer(address: &str, cluster: &Cluster) -> Result<TcpListener, String> {
    let listener = bind("listen.peer", address).await?;
    let outside = listener.local_addr().is_ok_and(|bound| !bound.ip().is_loopback());
    if outside && cluster.secret_file.as_os_str().is_empty() {
        let bound = shown(&listener);
        return Err(format!(
            "cluster.secret_file: is missing, and listen.peer = {address:?} is {bound}, which can be reached from outside; name a file with a secret, or listen on the loopback"
        ));
    }
    Ok(listener)
}

/// Reports how much memory castier may need, and whether that fits: in the log and as metrics.
fn report_memory_plan(config: &Castier, limits: &Limits, metrics: &Metrics) {
    memory_plan::tell(config, limits);
    metrics.memory_planned.set(gauged(memory_plan::memory(config, limits)));
    metrics.memory_limit.set(memory_plan::memory_limit().map_or(0, gauged));
}

/// The value of a gauge.
fn gauged(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Plans which sources a flight asks: peers, if there is a cluster, and the origin. The spans of a flight belong to the request that started it.
fn planner(origin: Arc<dyn Source>, peers: Option<Arc<Peers>>, outbox: Option<Arc<Outbox>>) -> Planner {
    Box::new(move |digest| {
        // What is in the outbox of this node is read from there, through `origin`.
        let is_pending = outbox.as_ref().is_some_and(|outbox| outbox.pending(digest).is_some());
        let plan: Box<dyn castier_cache::Plan> = match &peers {
            Some(peers) if !is_pending => Box::new(ClusterPlan::new(peers.clone(), origin.clone(), *digest)),
            _ => Box::new(OneSource(origin.clone())),
        };
        Box::new(TracedPlan::new(plan, *digest))
    })
}

/// How long a node waits for the first look-up of `cluster.dns` before it is ready. Without members it serves too, and loads every blob from the origin.
const FIRST_MEMBERS: Duration = Duration::from_secs(5);

/// The parts that only a node of a cluster has.
#[derive(Clone)]
struct Nodes {
    members: Arc<Members>,
    secrets: Arc<Secrets>,
    peers: Arc<Peers>,
    probe: Arc<HttpProbe>,
    /// The certificates of the peer listener; `None`: plain TCP.
    tls: Option<Arc<Tls>>,
    /// This node is about to end. Health checks by peers fail from now on.
    leaving: Arc<AtomicBool>,
}

impl Nodes {
    /// `None` without a cluster.
    fn of(config: &Castier, metrics: &Arc<Metrics>) -> Result<Option<Self>, String> {
        let Some(cluster) = &config.cluster else { return Ok(None) };
        let secrets = Arc::new(Secrets::open(cluster)?);
        let tls = if cluster.tls.is_on() { Some(Tls::open(cluster.tls.files(), &[], metrics.certificates(Listener::Peer))?) } else { None };
        let probe = Arc::new(HttpProbe::new(&cluster.tls, secrets.clone())?);
        let members = Members::start(cluster, probe.clone(), metrics.cluster.clone())?;
        let peers = Peers::new(config, members.clone(), secrets.clone(), metrics.cache.clone(), metrics.upstream.clone())?;
        Ok(Some(Self { members, secrets, peers, probe, tls, leaving: Arc::default() }))
    }

    fn access(&self) -> PeerAccess {
        PeerAccess::new(self.tls.clone(), self.secrets.clone())
    }

    /// Reads the certificates again. Blocks.
    fn reload_certificates(&self) {
        match self.tls.as_ref().map(|tls| tls.reload()) {
            None => {}
            Some(Ok(())) => self.renew_certificates(),
            Some(Err(why)) => tracing::error!(why, "the certificates stay as they are"),
        }
    }

    /// Connects with the certificates that are in the files now. Blocks.
    fn renew_certificates(&self) {
        for renewed in [self.peers.renew_certificates(), self.probe.renew_certificates()] {
            if let Err(why) = renewed {
                tracing::error!(why, "connections to peers keep their certificates");
            }
        }
    }

    async fn wait_for_members(&self) {
        let mut views = self.members.subscribe();
        let known = views.wait_for(|view| !view.members().is_empty());
        if tokio::time::timeout(FIRST_MEMBERS, known).await.is_err() {
            tracing::warn!("cluster.dns names no members yet; until it does, this node acts alone");
        }
    }

    /// Waits until the other nodes know that this node ends: their next health check tells them.
    async fn take_leave(&self, cluster: &Cluster) {
        self.leaving.store(true, Ordering::Relaxed);
        if self.members.view().members().iter().any(|member| member.up && !member.itself) {
            tokio::time::sleep(cluster.probe_interval.get() + cluster.probe_timeout.get()).await;
        }
    }
}

/// The origin that runs in this process: over a directory, or over a bucket.
struct Embedded {
    address: SocketAddr,
    /// Where its blobs are, for people.
    place: String,
    origin: Origin,
    /// `None` over a directory.
    bucket: Option<EmbeddedBucket>,
}

/// The bucket of the embedded origin.
struct EmbeddedBucket {
    bucket: Arc<Bucket>,
    /// What stands before it with `origin.write = "behind"`.
    behind: Option<Arc<WriteBehind>>,
}

/// The outbox, if the config wants one: for uploads, or for events. Without either, one that is left is opened if it has uploads: they were
/// acknowledged, and go to the bucket before anything else.
async fn open_outbox(config: &Castier, metrics: &Metrics) -> Result<Option<Arc<Outbox>>, String> {
    let is_needed = config.origin.write == Write::Behind || !config.events.is_empty();
    let Some(disk) = &config.disk else { return Ok(None) };
    let directory = disk.path.join(OUTBOX);
    let (looked_at, timeout) = (directory.clone(), disk.timeout.get());
    // A file system that hangs would hold up the start for ever.
    let exists = tokio::time::timeout(timeout, tokio::task::spawn_blocking(move || Outbox::exists(&looked_at))).await.map_err(|_| {
        format!(
            "disk.path: {}: the file system does not answer within disk.timeout ({timeout:?}); check the device or server that it is mounted from",
            disk.path.display()
        )
    })?;
    if !is_needed && !exists.map_err(|error| error.to_string())? {
        return Ok(None);
    }
    let options = castier_outbox::Options {
        capacity: disk.outbox.get(),
        timeout: disk.timeout.get(),
        cooldown: disk.cooldown.get(),
        threads: disk.threads,
        sinks: config.events.iter().map(|sink| sink.name().to_owned()).collect(),
        metrics: metrics.outbox.clone(),
    };
    let shown = directory.display().to_string();
    let opened = tokio::task::spawn_blocking(move || Outbox::open(&directory, options)).await.map_err(|error| error.to_string())?;
    let outbox = opened.map_err(|why| format!("disk.path: {why}"))?;
    if config.origin.write == Write::Through && !outbox.is_empty() {
        if !matches!(config.origin.url, OriginUrl::Bucket(_)) {
            return Err(format!(
                "origin.url: is no bucket, and {shown} has {} acknowledged uploads that no bucket has yet; run `castier drain` with the former config, or move that directory away and lose them",
                outbox.len()
            ));
        }
        outbox.drain();
    }
    Ok(Some(outbox).filter(|outbox| is_needed || !outbox.is_empty()))
}

/// How long the end waits for events to be delivered.
const DELIVER: Duration = Duration::from_secs(2);

/// The directory of the outbox, in `disk.path`.
const OUTBOX: &str = "outbox";

/// An origin, where its blobs are, and its bucket if it has one.
type Opened = (Origin, String, Option<EmbeddedBucket>);

/// The configuration key of the embedded origin, for errors.
const ROOT_KEY: &str = "origin.url (embedded)";

/// How long the end waits until uploads to the bucket that were given up are aborted.
const ABORT: Duration = Duration::from_secs(5);

impl Embedded {
    fn options(config: &Castier) -> castier_origin::Options {
        // castier is a proxy in front of it, so its `Forwarded` header names the client.
        let mut trusted_proxies = config.log.trusted_proxies.clone();
        trusted_proxies.0.extend("127.0.0.1".parse::<config::Network>());
        castier_origin::Options {
            allow_delete: config.allow_delete,
            ac_validation: config.ac_validation,
            limits: (&config.limits).into(),
            trusted_proxies,
            spans: None,
            grace: config.shutdown.grace.get(),
            root_key: ROOT_KEY,
        }
    }

    fn open(root: &Path, config: &Castier) -> Result<Opened, String> {
        let origin = Origin::open(root, Self::options(config)).map_err(|error| error.to_string())?;
        Ok((origin, format!("embedded, {}", root.display()), None))
    }

    fn open_bucket(
        url: &config::Bucket,
        config: &Castier,
        spools: &Spools,
        metrics: &Metrics,
        outbox: Option<Arc<Outbox>>,
    ) -> Result<Opened, String> {
        let bucket = Self::bucket(url, config, spools, metrics)?;
        let behind = outbox.filter(|outbox| config.origin.write == Write::Behind || !outbox.is_empty());
        let behind = behind.map(|outbox| Arc::new(WriteBehind::new(bucket.clone(), outbox, !config.events.is_empty())));
        let objects: Arc<dyn Objects> = match &behind {
            Some(behind) => behind.clone(),
            None => bucket.clone(),
        };
        let origin = Origin::of_bucket(Self::options(config), |_| Ok(objects))?;
        Ok((origin, url.to_string(), Some(EmbeddedBucket { bucket, behind })))
    }

    fn bucket(url: &config::Bucket, config: &Castier, spools: &Spools, metrics: &Metrics) -> Result<Arc<Bucket>, String> {
        let options = castier_bucket::Options {
            memory: spools.memory.clone(),
            spool: spools.disk.clone(),
            spool_dir: spools.files.dir().to_owned(),
            allow_delete: config.allow_delete,
            streams: config.fill.max_in_flight,
            metrics: metrics.bucket.clone(),
        };
        Bucket::new(url, &config.origin, options).map(Arc::new)
    }

    /// Starts the origin's HTTP server on a free loopback port. Blobs are read and written without it ([`EmbeddedStore`]). It answers relayed
    /// requests (`/ac`, `/kv`, PROPFIND and so on), as any other origin does. Also returns the server's URL.
    async fn start((origin, place, bucket): Opened, mut stopped: watch::Receiver<bool>) -> Result<(url::Url, Self), String> {
        let listener = bind(ROOT_KEY, "127.0.0.1:0").await?;
        let address = listener.local_addr().map_err(|error| error.to_string())?;
        let url = format!("http://{address}").parse().map_err(|error| format!("origin.url: {error}"))?;
        let server = origin.clone();
        tokio::spawn(async move {
            server.serve(listener, async move { stopped.wait_for(|stop| *stop).await.map(drop).unwrap_or_default() }).await
        });
        Ok((url, Self { address, place, origin, bucket }))
    }
}

/// A listener that accepts.
struct Listening {
    drain: watch::Sender<bool>,
    accepting: JoinHandle<()>,
}

impl Listening {
    /// Runs pingora's accept loop over a bound socket. pingora's own bind panics if the port is busy.
    fn open(name: &str, front: Front, listener: TcpListener) -> Result<Self, String> {
        let address = shown(&listener);
        let socket = listener.into_std().map_err(|error| error.to_string())?;
        let mut fds = Fds::new();
        fds.add(address.clone(), socket.into_raw_fd());
        let mut service = Service::new(name.to_owned(), front);
        // castier reads into its own buffer and writes whole responses, so buffers in between would only cost memory.
        service.add_listener(ListenerConfig::tcp(address).l4_buffer(L4BufferSettings::unbuffered()));
        let (drain, draining) = watch::channel(false);
        let accepting = tokio::spawn(async move { service.start_service(Some(Arc::new(Mutex::new(fds))), draining, 1).await });
        Ok(Self { drain, accepting })
    }

    /// Accepts no more connections. Each open one ends after its current request.
    async fn close(self) {
        self.drain.send_replace(true);
        self.accepting.await.ok();
    }
}

/// Accepts no more clients, then no more peers, and waits for running requests; all of it within `shutdown.grace`.
async fn drain(config: &Castier, metrics: &Metrics, nodes: Option<&Nodes>, public: Listening, peer: Option<Listening>) {
    let open = || metrics.connections.get() + metrics.peer_connections.get();
    tracing::info!(connections = open(), grace = %config.shutdown.grace, "draining");
    let peers = async {
        if let (Some(nodes), Some(cluster), Some(peer)) = (nodes, &config.cluster, peer) {
            nodes.take_leave(cluster).await;
            peer.close().await;
        }
    };
    let quiet = async {
        tokio::join!(public.close(), peers);
        while open() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    if tokio::time::timeout(config.shutdown.grace.get(), quiet).await.is_err() {
        tracing::warn!(connections = open(), "shutdown.grace is over: what is still in flight is cut");
    }
}

/// Loads the blobs again that the scrub found rotten, one after the other: no client waits for them.
async fn refetch(cache: Arc<Cache>, mut rotten: mpsc::Receiver<Digest>) {
    while let Some(digest) = rotten.recv().await {
        cache.refetch(digest).await;
    }
}

async fn log_stats(admin: Arc<Admin>, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        match serde_json::to_string(&admin.brief()) {
            Ok(stats) => tracing::info!(target: "stats", "{stats}"),
            Err(error) => tracing::error!(%error, "statistics could not be written"),
        }
    }
}

/// Adds a step to the history of the status page at each [`admin::STEP`].
async fn keep_history(admin: Arc<Admin>) {
    let mut steps = tokio::time::interval(admin::STEP);
    steps.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        steps.tick().await;
        admin.step();
    }
}

/// How often castier asks an origin that is down whether it is up again. Misses ask it too, but there may be hits only.
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// Asks the origin once at the start. If it is down, `upstream` logs that. If it answers, but not as a store of blobs, that is logged here.
async fn ask_origin(origin: Arc<Upstream>, url: String) {
    match origin.store().stat(&[Digest::EMPTY]).await {
        Err(fault @ Fault::Unusable { .. }) => {
            let hint = "check origin.url";
            tracing::warn!(%fault, "the origin {url} answers, but not as a store of blobs does to a HEAD; {hint}");
        }
        Err(fault) if origin.origin_state().is_some_and(|state| state.up) => {
            tracing::warn!(%fault, "the origin {url} could not be asked yet; castier serves what it keeps, and goes on trying with every miss");
        }
        _ => {}
    }
    loop {
        tokio::time::sleep(ASK_AGAIN).await;
        if origin.origin_state().is_some_and(|state| !state.up) {
            // `Upstream` notes the outcome.
            origin.store().stat(&[Digest::EMPTY]).await.ok();
        }
    }
}

/// Asks at the start which operations the bucket allows, and says which it does not. Aborts uploads that were left behind. Then asks a bucket that is down whether it is up again.
async fn ask_bucket(bucket: Arc<Bucket>, origin: Arc<Upstream>, store: Arc<dyn Store>) {
    bucket.log_check().await;
    tokio::spawn(async move { bucket.abort_leftovers().await });
    loop {
        tokio::time::sleep(ASK_AGAIN).await;
        if origin.origin_state().is_some_and(|state| !state.up) {
            // The store notes the outcome.
            store.stat(&[Digest::of(b"castier: is the bucket up?")]).await.ok();
        }
    }
}

/// A running castier, and the config in force. SIGHUP changes it.
struct Live {
    config: Castier,
    parts: Parts,
    embedded: Option<Embedded>,
    log: Guard,
}

impl Live {
    /// Reloads the config at each SIGHUP. Returns at SIGTERM or SIGINT.
    async fn reload_until_told_to_end(&mut self, args: &CommonArgs, signals: &mut Signals) {
        let (args, secrets) = (args.clone(), self.parts.nodes.as_ref().map(|nodes| nodes.secrets.clone()));
        // Of the config in force: what its keys name is read again, and other names need a restart.
        let (door, nodes, in_force) = (self.parts.door.clone(), self.parts.nodes.clone(), self.config.clone());
        let mut reading = Reading::new(move || {
            let loaded = args.load_with::<Castier>(config::environment(), check_again);
            // If the config is refused, the secrets stay too.
            let secrets = secrets.as_ref().filter(|_| loaded.is_ok()).map_or(Ok(()), |secrets| secrets.reload());
            // Those of the config in force, whether or not the new one is sound: who was removed from them is out.
            door.reload(&in_force);
            if let Some(nodes) = &nodes {
                nodes.reload_certificates();
            }
            (loaded, secrets)
        });
        while let Order::Reload((loaded, secrets)) = signals.next(&mut reading).await {
            if let Some(new) = sound(loaded) {
                self.reload(new, secrets);
            }
        }
    }

    /// Applies a new config: limits, log level and members change at once (the secrets have changed already). A warning names the other changes.
    fn reload(&mut self, new: Castier, secrets: Result<(), String>) {
        let members = self.listed_members(&new);
        let is_limit = |key: &String| key.starts_with("limits.") && key != "limits.names";
        let is_live = |key: &String| is_limit(key) || key == "log.level" || (key == "cluster.peers" && members.is_some());
        let (live, later): (Vec<_>, Vec<_>) = config::changed(&self.config, &new).into_iter().partition(is_live);
        if let Err(error) = self.log.set_level(&new.log.level) {
            return tracing::error!(%error, "the config was not reloaded");
        }
        if let Some(Embedded { origin, .. }) = &self.embedded {
            origin.set_limits((&new.limits).into());
        }
        self.parts.limits.store(Arc::new(self.parts.shares.within(&new.limits)));
        self.parts.door.clients.set(entrance::limits(&new.limits));
        self.parts.client_memory.set_limit(new.limits.client_memory.get());
        if let Some(nodes) = &self.parts.nodes {
            if let Err(why) = secrets {
                tracing::error!(why, "the secrets stay as they are");
            }
            if let (Some(members), Some(cluster)) = (members, &mut self.config.cluster) {
                nodes.members.set_peers(&members);
                cluster.peers = members;
            }
        }
        (self.config.limits, self.config.log.level) = (new.limits, new.log.level);
        self.parts.shares.tell(&self.config);
        report_memory_plan(&self.config, &self.parts.limits.load(), &self.parts.metrics);
        tracing::info!(changed = ?live, "config reloaded");
        if !later.is_empty() {
            tracing::warn!(keys = ?later, "these changes need a restart");
        }
    }

    /// The members that the new config lists; `None` if they come from `cluster.dns`, or without a cluster.
    fn listed_members(&self, new: &Castier) -> Option<Vec<Peer>> {
        let (running, new) = (self.config.cluster.as_ref()?, new.cluster.as_ref()?);
        (running.dns.is_empty() && new.dns.is_empty()).then(|| new.peers.clone())
    }
}
