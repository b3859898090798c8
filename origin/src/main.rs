//! `castier-origin`: the simple file origin as a program.

use castier_bucket::Bucket;
use castier_cache::Budget;
use castier_config::{Loaded, OriginLimits, OriginServer, Problems, changed, environment};
use castier_origin::{
    Options, Origin,
    copy::{self, CopyArgs},
};
use castier_serverkit::{
    bind::{bind, shown},
    log, open_files, otlp,
    signals::{Order, Reading, Signals, sound},
    startup::{self, CommonArgs},
};
use clap::Parser;
use prometheus::Registry;
use std::{ffi::OsString, process::ExitCode, sync::Arc, time::Duration};
use tokio::sync::oneshot;

/// This program's name, in records and in Loki.
const PROGRAM: &str = "castier-origin";

/// A durable content-addressed store over HTTP, one file per blob.
///
/// Every key of the configuration can also be set from the environment: CASTIER_ and the key with __ for the dot, as in
/// CASTIER_LIMITS__MAX_BLOB=1GiB. Options win over the environment, and the environment over the file.
#[derive(Clone, Parser)]
#[command(name = "castier-origin", version, args_conflicts_with_subcommands = true)]
struct Arguments {
    /// Where clients connect, HOST:PORT (listen.public)
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// The directory of the blobs (store.root)
    #[arg(long, value_name = "DIR")]
    root: Option<OsString>,
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Clone, clap::Subcommand)]
enum Command {
    Copy(CopyArgs),
}

impl Arguments {
    fn load(&self) -> Result<Loaded<OriginServer>, Problems> {
        let listen = self.listen.clone().map(|listen| ("CASTIER_LISTEN__PUBLIC".to_owned(), listen));
        let root = self.root.as_ref().map(|root| ("CASTIER_STORE__ROOT".to_owned(), root.to_string_lossy().into_owned()));
        self.common.load(environment().chain(listen).chain(root))
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(Command::Copy(args)) = &arguments.command {
        return copy::run(args);
    }
    startup::main(PROGRAM, &arguments.common, || arguments.load(), ("store.url", ask), |config| run(&arguments, config))
}

async fn run(arguments: &Arguments, config: OriginServer) -> Result<(), String> {
    let log = log::init(&config.log, PROGRAM).map_err(|error| error.to_string())?;
    let mut signals = Signals::new()?;
    let public = bind("listen.public", &config.listen.public).await?;
    let admin = bind("listen.admin", &config.listen.admin).await?;
    let granted = open_files::raise_limit();
    let (public_address, admin_address) = (shown(&public), shown(&admin));
    let instance = log::instance(&public);
    log.name_instance(instance.clone());
    let (spans, exporter) = otlp::start(&config.otlp, PROGRAM, instance)?.unzip();
    let options = Options { limits: within(&config.limits, granted), spans, ..Options::from(&config) };
    let (origin, bucket, place) = open(&config, options)?;
    log.say(&format!("listening public {public_address} (blobs in {place})"));
    log.say(&format!("listening admin {admin_address}"));
    log.say(&format!("try: curl -F file=@README.md http://{public_address}/cas"));
    tell_files(&config.limits, granted);

    let (stop, stopped) = oneshot::channel::<()>();
    let admin = {
        let origin = origin.clone();
        tokio::spawn(async move { origin.serve_admin(admin, async { drop(stopped.await) }).await })
    };
    match bucket.clone() {
        Some(bucket) => drop(tokio::spawn(async move {
            bucket.log_check().await;
            bucket.abort_leftovers().await;
        })),
        None => drop(tokio::spawn(log_figures(origin.clone(), config.log.stats_interval.get()))),
    }
    // The listener has a task of its own, so that nothing here holds up clients.
    let (drain, draining) = oneshot::channel::<()>();
    let serving = {
        let origin = origin.clone();
        tokio::spawn(async move { origin.serve(public, async { drop(draining.await) }).await })
    };
    let mut reading = {
        let arguments = arguments.clone();
        Reading::new(move || arguments.load())
    };
    let mut running = config;
    while let Order::Reload(loaded) = signals.next(&mut reading).await {
        if let Some(wanted) = sound(loaded) {
            running = reload(running, &wanted, &origin, &log, granted);
        }
    }
    tracing::info!("finishing what is in flight, then ending");
    let ending = async {
        drop(drain);
        serving.await.ok();
        if let Some(bucket) = bucket {
            bucket.close(ABORT).await;
        }
        // Probes may see that the program is draining until it is done.
        drop(stop);
        admin.await.ok();
        tracing::info!("finished");
        if let Some(exporter) = exporter {
            exporter.close().await;
        }
        log.close().await;
    };
    tokio::select! {
        () = ending => {}
        () = signals.end() => tracing::warn!("told to end once more: what is in flight is cut"),
    }
    Ok(())
}

/// How many bytes uploads to a bucket may hold in memory, and in files, as castier's `fill.memory` and `fill.spool` by default.
const MEMORY: u64 = 256 << 20;
const SPOOL: u64 = 64 << 30;
/// How long the end waits until uploads to a bucket that were given up are aborted.
const ABORT: Duration = Duration::from_secs(5);

/// The store that the configuration names, its bucket if it is one, and where that is, for people.
fn open(config: &OriginServer, options: Options) -> Result<(Origin, Option<Arc<Bucket>>, String), String> {
    let store = &config.store;
    let Some(url) = store.bucket() else {
        let origin = Origin::open(&store.root, options).map_err(|error| error.to_string())?;
        return Ok((origin, None, store.root.display().to_string()));
    };
    let mut opened = None;
    let origin = Origin::of_bucket(options, |registry| {
        let bucket = Arc::new(open_bucket(&url, config, registry)?);
        opened = Some(bucket.clone());
        Ok(bucket)
    })?;
    Ok((origin, opened, url.to_string()))
}

fn open_bucket(url: &castier_config::Bucket, config: &OriginServer, registry: &Registry) -> Result<Bucket, String> {
    let store = &config.store;
    let keys = castier_config::Origin {
        key: store.key.clone(),
        existence_ttl: store.existence_ttl,
        s3: store.s3.clone(),
        ..castier_config::Origin::default()
    };
    let options = castier_bucket::Options {
        memory: Budget::new(MEMORY),
        spool: Budget::new(SPOOL),
        spool_dir: std::env::temp_dir(),
        allow_delete: config.allow_delete,
        streams: config.limits.max_connections,
        metrics: Arc::new(castier_bucket::Metrics::new(registry).map_err(|error| error.to_string())?),
    };
    // The keys of this program are the same, in another section.
    Bucket::new(url, &keys, options).map_err(|why| why.replacen("origin.", "store.", 1))
}

/// Asks the bucket, if there is one, whether it lets this program do what it needs.
async fn ask(config: OriginServer) -> Problems {
    let mut problems = Problems::default();
    let Some(url) = config.store.bucket() else { return problems };
    match open_bucket(&url, &config, &Registry::new()) {
        Ok(bucket) => return bucket.problems("store").await,
        Err(why) => {
            let (key, why) = why.split_once(": ").unwrap_or(("store.url", &why));
            problems.add(key, why);
        }
    }
    problems
}

/// The limits that can be kept with so many open files. The admin listener has a share of its own, and a quarter is for the store's files,
/// so that clients who take all there is leave health checks and uploads that have begun what they need.
fn within(limits: &OriginLimits, granted: u64) -> OriginLimits {
    /// Listeners, logs, the runtime, and connections that are just being refused.
    const OWN: u64 = 256;
    let admin = (limits.max_admin_connections as u64).min(granted / 16).max(1);
    let clients = (granted - granted / 4).saturating_sub(admin + OWN.min(granted / 4)).max(1);
    let most = |share: u64| usize::try_from(share).unwrap_or(usize::MAX);
    OriginLimits {
        max_connections: limits.max_connections.min(most(clients)),
        max_admin_connections: limits.max_admin_connections.min(most(admin)),
        ..limits.clone()
    }
}

/// Says so if fewer clients are admitted than configured.
fn tell_files(limits: &OriginLimits, granted: u64) {
    let possible = within(limits, granted);
    if possible != *limits {
        open_files::log_too_few(granted, None, possible.max_connections as u64);
    }
}

/// What lies in the store, every now and then.
async fn log_figures(origin: Origin, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        let (blobs, bytes) = origin.figures();
        tracing::info!(target: "stats", blobs, bytes);
    }
}

/// Takes over from the configuration what can change while running, and returns what holds from now on.
fn reload(mut running: OriginServer, wanted: &OriginServer, origin: &Origin, log: &log::Guard, granted: u64) -> OriginServer {
    if let Err(error) = log.set_level(&wanted.log.level) {
        tracing::error!(%error, "the log level stays as it was");
    } else {
        running.log.level.clone_from(&wanted.log.level);
    }
    origin.set_limits(within(&wanted.limits, granted));
    tell_files(&wanted.limits, granted);
    running.limits = wanted.limits.clone();
    tracing::info!("the configuration was re-read; limits and log level are in force");
    let rest = changed(&running, wanted);
    if !rest.is_empty() {
        tracing::warn!("changed in the configuration, but only a restart brings it into force: {}", rest.join(", "));
    }
    running
}
