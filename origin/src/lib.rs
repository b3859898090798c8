//! The simple file origin: a durable content-addressed store over HTTP.
//!
//! It also stores entries, which are bytes under a key that the client chooses: `entries`, with `action` and `webdav` for special clients.
//!
//! The binary `castier-origin` and the embedded origin of `castier` are this very server. An upload passes through `server` (a connection) → `service`
//! (which request does what) → `intake` (its body) → `receive` (batches) → `store` (temp file, verified, synced, renamed, synced again) and is
//! answered; a download through `service` → `store` → `reply` (read and hashed one chunk ahead of the client, the last chunk only if the digest
//! matches). `local` does the same for blobs without a connection: castier uses it for its embedded origin. `copy` moves a store.
//!
//! Invariant: a read of a whole blob is hashed while it is sent, and cut before its end if it is damaged. A read of a part is *not* checked, since the
//! digest covers the whole blob.

use arc_swap::ArcSwap;
use castier_bucket::Objects;
use castier_config::{OriginLimits, OriginServer, Proxies};
use castier_serverkit::otlp::Spans;
use entries::Entries;
use local::Local;
use prometheus::Registry;
use std::{
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};
use store::{Fault, Store};
use tokio::{net::TcpListener, sync::Semaphore};

mod action;
mod admin;
mod bucket;
mod connection_timeouts;
pub mod copy;
mod entries;
mod files;
mod intake;
mod local;
mod metrics;
mod receive;
mod refused;
mod reply;
mod server;
mod service;
mod store;
mod webdav;

#[doc(hidden)]
pub use service::condition;

/// How many entries of the action cache are validated at once. Each is in memory meanwhile, together with one tree that it names.
const VALIDATIONS: usize = 8;

/// The options of an origin.
#[derive(Clone)]
pub struct Options {
    /// Whether clients may delete blobs.
    pub allow_delete: bool,
    /// Whether an entry of the action cache gets a 404 if it names a missing blob.
    pub ac_validation: bool,
    /// The limits for clients. [`Origin::set_limits`] changes them later.
    pub limits: OriginLimits,
    /// The proxies whose headers may name the client.
    pub trusted_proxies: Proxies,
    /// Exports the spans of sampled requests.
    pub spans: Option<Spans>,
    /// How long running requests may take to finish at the shutdown.
    pub grace: Duration,
    /// The configuration key of the root, and its option if there is one. For errors.
    pub root_key: &'static str,
}

impl From<&OriginServer> for Options {
    fn from(config: &OriginServer) -> Self {
        Self {
            allow_delete: config.allow_delete,
            ac_validation: config.ac_validation,
            limits: config.limits.clone(),
            trusted_proxies: config.log.trusted_proxies.clone(),
            spans: None,
            grace: config.shutdown.grace.get(),
            root_key: "store.root (--root)",
        }
    }
}

/// An origin: a store that this process owns, ready to be served. Cheap to clone; all clones are the same origin.
#[derive(Clone)]
pub struct Origin(Arc<Shared>);

/// What all connections share.
pub(crate) struct Shared {
    backend: Backend,
    metrics: metrics::Metrics,
    allow_delete: bool,
    ac_validation: bool,
    validations: Arc<Semaphore>,
    limits: ArcSwap<OriginLimits>,
    trusted_proxies: Proxies,
    spans: Option<Spans>,
    grace: Duration,
    phase: AtomicU8,
    /// The number of running uploads and downloads.
    transfers: Arc<AtomicUsize>,
}

/// Where the blobs and entries are.
pub(crate) enum Backend {
    Files(Files),
    Bucket(Arc<dyn Objects>),
}

/// Blobs and entries as files.
#[derive(Clone)]
pub(crate) struct Files {
    store: Arc<Store>,
    entries: Arc<Entries>,
}

/// What the origin is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Starting,
    Ready,
    Draining,
}

impl Shared {
    fn phase(&self) -> Phase {
        [Phase::Starting, Phase::Ready].into_iter().find(|phase| *phase as u8 == self.phase.load(Relaxed)).unwrap_or(Phase::Draining)
    }

    fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Relaxed);
    }

    /// What is stored; `None` for a bucket.
    fn totals(&self) -> Option<&store::Totals> {
        match &self.backend {
            Backend::Files(files) => Some(files.store.totals()),
            Backend::Bucket(_) => None,
        }
    }

    /// Logs a fault of the store, and counts damaged blobs.
    fn note(&self, fault: &Fault) {
        match fault {
            Fault::Mismatch(mismatch) => tracing::debug!(%mismatch, "an upload was refused"),
            Fault::Full(error) => {
                tracing::error!(%error, "an upload was refused: the disk below the store root is full; free or add space")
            }
            Fault::Rotten { digest, found: false } => tracing::debug!(%digest, "a reader of a damaged blob was cut off"),
            Fault::Rotten { digest, found: true } => {
                self.metrics.count_corrupt();
                tracing::error!(%digest, "a blob's stored bytes were damaged; they are in the quarantine below the store root; store the blob again");
            }
            Fault::RottenEntry { name, found: false } => tracing::debug!(entry = name, "a reader of a damaged entry was cut off"),
            Fault::RottenEntry { name, found: true } => {
                self.metrics.count_corrupt();
                tracing::error!(
                    entry = name,
                    "an entry's stored bytes were damaged; they are in the quarantine below the store root, and clients get a 404 until it is stored again"
                );
            }
            Fault::Io(error) => tracing::error!(%error, "the file system below the store root failed"),
        }
    }
}

impl Origin {
    /// Opens the store in the directory `root`, and makes the directory if it is missing. Counts the blobs in the background.
    ///
    /// # Errors
    /// `root` cannot be written to, or another process uses it. The text names `root` and says what to do.
    pub fn open(root: impl AsRef<Path>, options: Options) -> io::Result<Self> {
        let (origin, counted) = Self::open_uncounted(root, options)?;
        thread::Builder::new().name("count".to_owned()).spawn(move || {
            if let Err(error) = counted.count() {
                tracing::error!(%error, "the blobs in the store could not be counted; castier_origin_blobs and castier_origin_bytes are too low");
            }
        })?;
        Ok(origin)
    }

    fn open_uncounted(root: impl AsRef<Path>, options: Options) -> io::Result<(Self, Arc<Store>)> {
        let store = Arc::new(Store::open(root.as_ref(), options.root_key)?);
        let entries = Entries::open(root.as_ref()).map_err(|e| {
            io::Error::new(e.kind(), format!("{}: {}: entries/ cannot be made: {e}", options.root_key, root.as_ref().display()))
        })?;
        let entries = Arc::new(entries);
        let metrics = metrics::Metrics::new().map_err(io::Error::other)?;
        Ok((Self::with(Backend::Files(Files { store: Arc::clone(&store), entries }), metrics, options), store))
    }

    /// An origin whose blobs and entries are in the bucket that `open` returns. It may register metrics.
    ///
    /// # Errors
    /// A text that says why the bucket cannot be used.
    pub fn of_bucket(options: Options, open: impl FnOnce(&Registry) -> Result<Arc<dyn Objects>, String>) -> Result<Self, String> {
        let metrics = metrics::Metrics::new().map_err(|error| error.to_string())?;
        let bucket = open(metrics.registry())?;
        Ok(Self::with(Backend::Bucket(bucket), metrics, options))
    }

    fn with(backend: Backend, metrics: metrics::Metrics, options: Options) -> Self {
        Self(Arc::new(Shared {
            backend,
            metrics,
            allow_delete: options.allow_delete,
            ac_validation: options.ac_validation,
            validations: Arc::new(Semaphore::new(VALIDATIONS)),
            limits: ArcSwap::from_pointee(options.limits),
            trusted_proxies: options.trusted_proxies,
            spans: options.spans,
            grace: options.grace,
            phase: AtomicU8::new(Phase::Starting as u8),
            transfers: Arc::default(),
        }))
    }

    /// Serves clients on `listener` until `shutdown` is done. Then accepts no more, and lets running requests finish within [`Options::grace`].
    pub async fn serve(&self, listener: TcpListener, shutdown: impl Future<Output = ()>) {
        self.0.enter(Phase::Ready);
        let draining = async {
            shutdown.await;
            self.0.enter(Phase::Draining);
        };
        server::serve(listener, service::Clients(Arc::clone(&self.0)), draining, self.0.grace).await;
    }

    /// Serves metrics and health on `listener` until `shutdown` is done.
    pub async fn serve_admin(&self, listener: TcpListener, shutdown: impl Future<Output = ()>) {
        server::serve(listener, admin::Admin(Arc::clone(&self.0)), shutdown, Duration::ZERO).await;
    }

    /// The blobs of this origin for a program that has it in its own process, without its HTTP server.
    pub fn local(&self, config: &castier_config::Origin) -> Arc<dyn castier_cache::Store> {
        match &self.0.backend {
            Backend::Files(files) => Arc::new(Local::new(Arc::clone(&self.0), files.store.clone(), config)),
            Backend::Bucket(objects) => objects.clone(),
        }
    }

    /// The numbers of blobs and bytes counted so far, for the log. The blobs of a bucket are not counted.
    pub fn figures(&self) -> (i64, i64) {
        let Some(totals) = self.0.totals() else { return (0, 0) };
        (totals.blobs.load(Relaxed).max(0), totals.bytes.load(Relaxed).max(0))
    }

    /// Changes the limits. Limits on connections apply to new connections.
    pub fn set_limits(&self, limits: OriginLimits) {
        self.0.limits.store(Arc::new(limits));
    }
}
