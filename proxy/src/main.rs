//! `castier`: arguments, config, assembly.

use arc_swap::ArcSwap;
use castier::{
    admin::{self, Admin, Phase},
    descriptors::{Descriptors, Shares},
    handlers::{Asks, Handlers, relay::Relay},
    listener::{Audience, Front},
    memory_plan,
    metrics::{Listener, Metrics},
    node::Node,
    peer_access::PeerAccess,
};
use castier_blob::Digest;
use castier_cache::{Budget, Cache, Fault, OneSource, Planner, Source, Spools, Store, Tiers};
use castier_cluster::{ClusterPlan, HttpProbe, Members, Peers, Purge, Secrets};
use castier_config::{self as config, Castier, Cluster, Limits, OriginUrl, Peer};
use castier_origin::Origin;
use castier_serverkit::{
    bind::{bind, shown},
    log::{self, Guard},
    open_files, otlp,
    signals::{Order, Reading, Signals, sound},
    startup::{self, CommonArgs},
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
    sync::{mpsc, watch},
    task::JoinHandle,
};

/// Rotten blobs that may wait to be fetched anew; the rest is fetched when somebody asks.
const REFETCHES: usize = 1024;
/// This program's name, in records and in Loki.
const PROGRAM: &str = "castier";
/// How long the blobs that wait to be written may hold up the end.
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
}

fn main() -> ExitCode {
    let Args { common } = Args::parse();
    startup::main(PROGRAM, &common, || common.load(config::environment()), |config| run(&common, config))
}

/// Starts everything, and ends when told to. An error is one line that names what could not be had.
async fn run(args: &CommonArgs, config: Castier) -> Result<(), String> {
    let log = log::init(&config.log, PROGRAM).map_err(|error| error.to_string())?;
    let mut signals = Signals::new()?;
    let public = bind("listen.public", &config.listen.public).await?;
    let peer = match &config.cluster {
        Some(cluster) => Some(bind_peer(&config.listen.peer, cluster).await?),
        None => None,
    };
    let admin_listener = bind("listen.admin", &config.listen.admin).await?;
    let (stop_origin, origin_stopped) = watch::channel(false);
    let (origin_url, embedded) = match &config.origin.url {
        OriginUrl::Remote(url) => (url.clone(), None),
        OriginUrl::Embedded(root) => embedded_origin(root, &config, origin_stopped).await.map(|(url, embedded)| (url, Some(embedded)))?,
    };

    let metrics = Arc::new(Metrics::new().map_err(|error| format!("metrics: {error}"))?);
    let shares = Shares::of(open_files::raise_limit(), &config);
    let limits = Arc::new(ArcSwap::from_pointee(shares.within(&config.limits)));
    let nodes = Nodes::of(&config, &metrics)?;
    let (tell_rotten, rotten) = mpsc::channel(REFETCHES);
    let fill_memory = Budget::new(config.fill.memory.get());
    let tiers = Tiers::open(&config, shares.open_files, &fill_memory, &metrics.cache, tell_rotten).map_err(|error| error.to_string())?;
    let spools = Spools::new(&config, fill_memory, metrics.cache.clone());
    spools.files.check().map_err(|error| format!("fill.spool_dir: cannot write to {}: {error}", spools.files.dir().display()))?;
    let origin = Upstream::origin(&origin_url, &config.origin, metrics.upstream.clone())?;
    let store: Arc<dyn Store> = match &embedded {
        Some((.., embedded)) => Arc::new(EmbeddedStore::new(Arc::new(embedded.local(&config.origin)), origin.clone())),
        None => Arc::new(origin.store()),
    };
    let peers = nodes.as_ref().map(|nodes| nodes.peers.clone());
    let cache = Cache::new(&config, limits.clone(), tiers.clone(), spools, planner(store.clone(), peers.clone()), metrics.cache.clone());
    let node = Arc::new(Node { cache: cache.clone(), origin: store, peers: peers.clone(), metrics: metrics.clone() });
    let relay = Relay::new(origin.clone(), metrics.clone(), upstream::ca_file(&config.origin)?);
    let name = shown(&public);
    let own_name = config.cluster.as_ref().map_or_else(|| name.clone(), |cluster| cluster.advertise.clone());
    let instance = config.cluster.as_ref().map_or_else(|| log::instance(&public), |cluster| cluster.advertise.clone());
    log.name_instance(instance.clone());
    let exporter = otlp::start(&config.otlp, PROGRAM, instance)?.map(|(spans, exporter)| {
        trace::export_to(spans.sample(), move |span| spans.send(span));
        exporter
    });
    let purge = Purge::new(cache.clone(), peers, own_name);
    let members = nodes.as_ref().map(|nodes| nodes.members.clone());
    let admin = Arc::new(Admin::new(node.clone(), origin.clone(), metrics.clone(), members, purge.clone()));
    let client_memory = Budget::new(config.limits.client_memory.get());
    let descriptors = Descriptors::new(shares);
    let front = |asks, audience| {
        let (handlers, proxies) = (Handlers::new(node.clone(), asks), config.log.trusted_proxies.clone());
        Front::new(handlers, audience, limits.clone(), proxies, client_memory.clone(), descriptors.clone(), metrics.clone())
    };

    log.say(&format!("listening public {name}"));
    log.say(&format!("listening admin {}", shown(&admin_listener)));
    if let Some(peer) = &peer {
        log.say(&format!("listening peer {}", shown(peer)));
    }
    if let Some((address, root, _)) = &embedded {
        log.say(&format!("listening origin {address} (embedded, {})", root.display()));
    }
    log.say(&format!("try: curl -F file=@README.md http://{name}/cas"));

    let admin_server = tokio::spawn(admin::serve(admin_listener, admin::router(admin.clone()), limits.clone()));
    // Peers first: a node that asks them is one that they can ask.
    let peer = match (peer, &nodes) {
        (Some(listener), Some(nodes)) => {
            let asks = Asks::Peers { members: nodes.members.clone(), leaving: nodes.leaving.clone() };
            let audience = Audience::Peers(nodes.access(&config, &metrics)?);
            Some(Listening::open("peer", front(asks, audience), listener)?)
        }
        _ => None,
    };
    let public = Listening::open("public", front(Asks::Clients(purge), Audience::Clients(relay)), public)?;
    tokio::spawn(refetch(cache, rotten));
    tokio::spawn(log_stats(admin.clone(), config.log.stats_interval.get()));
    tokio::spawn(keep_history(admin.clone()));
    // The embedded one is here.
    if embedded.is_none() {
        tokio::spawn(ask_origin(origin, config.origin.url.to_string()));
    }
    if let Some(nodes) = &nodes {
        nodes.wait_for_members().await;
    }
    admin.enter(Phase::Ready);
    shares.tell(&config);
    tell_plan(&config, &limits.load(), &metrics);
    metrics.cache.disk_scrub_rate.set(config.disk.as_ref().map_or(0, |disk| gauged(disk.scrub_rate.get())));
    tracing::info!(version = env!("CARGO_PKG_VERSION"), origin = %config.origin.url, "castier is ready");

    let secrets = nodes.as_ref().map(|nodes| nodes.secrets.clone());
    let args = args.clone();
    let mut reading = Reading::new(move || {
        let loaded = args.load::<Castier>(config::environment());
        // With a config that is refused nothing changes.
        let secrets = secrets.as_ref().filter(|_| loaded.is_ok()).map_or(Ok(()), |secrets| secrets.reload());
        (loaded, secrets)
    });
    let mut live = Live {
        config,
        limits: limits.clone(),
        metrics: metrics.clone(),
        client_memory,
        shares,
        embedded: embedded.map(|(.., origin)| origin),
        nodes,
        log,
    };
    while let Order::Reload((loaded, secrets)) = signals.next(&mut reading).await {
        if let Some(new) = sound(loaded) {
            live.reload(new, secrets);
        }
    }

    admin.enter(Phase::Draining);
    let Live { config, nodes, log, .. } = live;
    let ending = async {
        drain(&config, &metrics, nodes.as_ref(), public, peer).await;
        if let Some(disk) = tiers.disk
            && tokio::time::timeout(FLUSH, tokio::task::spawn_blocking(move || disk.close())).await.is_err()
        {
            tracing::warn!("the disk is too slow: some blobs that waited to be written are not kept");
        }
        stop_origin.send_replace(true);
        admin_server.abort();
        tracing::info!("bye");
        if let Some(exporter) = exporter {
            exporter.close().await;
        }
        log.close().await;
    };
    tokio::select! {
        () = ending => {}
        () = signals.end() => tracing::warn!("told to end once more: what is in flight is cut, and blobs that wait to be written are not kept"),
    }
    Ok(())
}

/// The peer listener. The config has refused what can be told from the text; a name is what it resolves to.
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

/// Tells what may be held in memory, and whether it fits: to the log and in the series.
fn tell_plan(config: &Castier, limits: &Limits, metrics: &Metrics) {
    memory_plan::tell(config, limits);
    metrics.memory_planned.set(gauged(memory_plan::memory(config, limits)));
    metrics.memory_limit.set(memory_plan::memory_limit().map_or(0, gauged));
}

/// As a gauge takes it.
fn gauged(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Plans flights: over the cluster, if there is one, and the origin. Each goes on for the request that starts it.
fn planner(origin: Arc<dyn Source>, peers: Option<Arc<Peers>>) -> Planner {
    Box::new(move |digest| {
        let plan: Box<dyn castier_cache::Plan> = match &peers {
            Some(peers) => Box::new(ClusterPlan::new(peers.clone(), origin.clone(), *digest)),
            None => Box::new(OneSource(origin.clone())),
        };
        Box::new(TracedPlan::new(plan, *digest))
    })
}

/// How long the first look-up of `cluster.dns` may keep a node from being ready: without members it serves too, but asks the origin for all.
const FIRST_MEMBERS: Duration = Duration::from_secs(5);

/// What a node that is not alone has beside the rest.
struct Nodes {
    members: Arc<Members>,
    secrets: Arc<Secrets>,
    peers: Arc<Peers>,
    /// This node is about to go, and says so when it is asked how it is.
    leaving: Arc<AtomicBool>,
}

impl Nodes {
    /// The other nodes, if there are any.
    fn of(config: &Castier, metrics: &Arc<Metrics>) -> Result<Option<Self>, String> {
        let Some(cluster) = &config.cluster else { return Ok(None) };
        let secrets = Arc::new(Secrets::open(cluster)?);
        let members = Members::start(cluster, Arc::new(HttpProbe::new(&cluster.tls, secrets.clone())?), metrics.cluster.clone())?;
        let peers = Peers::new(config, members.clone(), secrets.clone(), metrics.cache.clone(), metrics.upstream.clone())?;
        Ok(Some(Self { members, secrets, peers, leaving: Arc::default() }))
    }

    fn access(&self, config: &Castier, metrics: &Metrics) -> Result<PeerAccess, String> {
        let tls = config.cluster.as_ref().map(|cluster| cluster.tls.clone()).unwrap_or_default();
        let access = PeerAccess::new(&tls, self.secrets.clone())?;
        if let Some(expiry) = access.certificate_expiry() {
            metrics.certificate_expires(Listener::Peer, expiry);
        }
        Ok(access)
    }

    async fn wait_for_members(&self) {
        let mut views = self.members.subscribe();
        let known = views.wait_for(|view| !view.members().is_empty());
        if tokio::time::timeout(FIRST_MEMBERS, known).await.is_err() {
            tracing::warn!("cluster.dns names no members yet; until it does, this node acts alone");
        }
    }

    /// Lets the others find out that this node is going: by their next probe, and the one right behind it.
    async fn take_leave(&self, cluster: &Cluster) {
        self.leaving.store(true, Ordering::Relaxed);
        if self.members.view().members().iter().any(|member| member.up && !member.itself) {
            tokio::time::sleep(cluster.probe_interval.get() + cluster.probe_timeout.get()).await;
        }
    }
}

/// The embedded origin: where it listens, where its data is, and itself.
type Embedded = (SocketAddr, PathBuf, Origin);

/// Opens the embedded origin, and starts the real origin server for it on a loopback port of its own choosing. Blobs are read from and written to its
/// files directly ([`EmbeddedStore`]). All that is relayed (`/ac`, `/kv`, PROPFIND and so on) goes to the server over HTTP, as to any other origin.
async fn embedded_origin(root: &Path, config: &Castier, mut stopped: watch::Receiver<bool>) -> Result<(url::Url, Embedded), String> {
    let grace = config.shutdown.grace.get();
    let root_key = "origin.url (embedded)";
    let (allow_delete, ac_validation) = (config.allow_delete, config.ac_validation);
    // castier itself is the proxy in front of it, and names its clients as it was told of them.
    let mut trusted_proxies = config.log.trusted_proxies.clone();
    trusted_proxies.0.extend("127.0.0.1".parse::<config::Network>());
    let limits = (&config.limits).into();
    let options = castier_origin::Options { allow_delete, ac_validation, limits, trusted_proxies, spans: None, grace, root_key };
    let origin = Origin::open(root, options).map_err(|error| error.to_string())?;
    let listener = bind("origin.url (embedded)", "127.0.0.1:0").await?;
    let address = listener.local_addr().map_err(|error| error.to_string())?;
    let url = format!("http://{address}").parse().map_err(|error| format!("origin.url: {error}"))?;
    let server = origin.clone();
    tokio::spawn(
        async move { server.serve(listener, async move { stopped.wait_for(|stop| *stop).await.map(drop).unwrap_or_default() }).await },
    );
    Ok((url, (address, root.to_owned(), origin)))
}

/// A listener that accepts.
struct Listening {
    drain: watch::Sender<bool>,
    accepting: JoinHandle<()>,
}

impl Listening {
    /// On pingora's accept loop, over a socket that is bound already (so that a busy port is one line, not a panic).
    fn open(name: &str, front: Front, listener: TcpListener) -> Result<Self, String> {
        let address = shown(&listener);
        let socket = listener.into_std().map_err(|error| error.to_string())?;
        let mut fds = Fds::new();
        fds.add(address.clone(), socket.into_raw_fd());
        let mut service = Service::new(name.to_owned(), front);
        // Reads go straight into the gate's buffer and writes are whole already: buffers between would only cost memory.
        service.add_listener(ListenerConfig::tcp(address).l4_buffer(L4BufferSettings::unbuffered()));
        let (drain, draining) = watch::channel(false);
        let accepting = tokio::spawn(async move { service.start_service(Some(Arc::new(Mutex::new(fds))), draining, 1).await });
        Ok(Self { drain, accepting })
    }

    /// Accepts no more; connections end with the request that they are at.
    async fn close(self) {
        self.drain.send_replace(true);
        self.accepting.await.ok();
    }
}

/// Ends in order: no clients any more, then no peers, and what is in flight to its end, all of it within `shutdown.grace`.
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

/// Fetches anew what rotted on disk with nobody asking for it, one blob after the other: none of it is urgent.
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

/// Ends a step of the history again and again.
async fn keep_history(admin: Arc<Admin>) {
    let mut steps = tokio::time::interval(admin::STEP);
    steps.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        steps.tick().await;
        admin.step();
    }
}

/// How often an origin that is down is asked whether it is back, beside every miss: with hits alone nobody would notice.
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
            // What it answers is noted where it is asked.
            origin.store().stat(&[Digest::EMPTY]).await.ok();
        }
    }
}

/// What a SIGHUP can change.
struct Live {
    /// As it is in force.
    config: Castier,
    limits: Arc<ArcSwap<Limits>>,
    metrics: Arc<Metrics>,
    client_memory: Arc<Budget>,
    shares: Shares,
    embedded: Option<Origin>,
    nodes: Option<Nodes>,
    log: Guard,
}

impl Live {
    /// Takes over what was read: limits, log level and members change at once, as the secrets have, the rest is named in a warning.
    fn reload(&mut self, new: Castier, secrets: Result<(), String>) {
        let members = self.listed_members(&new);
        let is_live = |key: &String| key.starts_with("limits.") || key == "log.level" || (key == "cluster.peers" && members.is_some());
        let (live, later): (Vec<_>, Vec<_>) = config::changed(&self.config, &new).into_iter().partition(is_live);
        if let Err(error) = self.log.set_level(&new.log.level) {
            return tracing::error!(%error, "the config was not reloaded");
        }
        if let Some(origin) = &self.embedded {
            origin.set_limits((&new.limits).into());
        }
        self.limits.store(Arc::new(self.shares.within(&new.limits)));
        self.client_memory.set_limit(new.limits.client_memory.get());
        if let Some(nodes) = &self.nodes {
            if let Err(why) = secrets {
                tracing::error!(why, "the secrets stay as they are");
            }
            if let (Some(members), Some(cluster)) = (members, &mut self.config.cluster) {
                nodes.members.set_peers(&members);
                cluster.peers = members;
            }
        }
        (self.config.limits, self.config.log.level) = (new.limits, new.log.level);
        self.shares.tell(&self.config);
        tell_plan(&self.config, &self.limits.load(), &self.metrics);
        tracing::info!(changed = ?live, "config reloaded");
        if !later.is_empty() {
            tracing::warn!(keys = ?later, "these changes need a restart");
        }
    }

    /// The members that the new config lists, if such a list is what this node goes by.
    fn listed_members(&self, new: &Castier) -> Option<Vec<Peer>> {
        let (running, new) = (self.config.cluster.as_ref()?, new.cluster.as_ref()?);
        (running.dns.is_empty() && new.dns.is_empty()).then(|| new.peers.clone())
    }
}
