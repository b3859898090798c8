//! `castier-origin copy FROM TO`: copies the blobs and entries of one store to another, each a directory or a bucket.
//!
//! - `side`: what is read and what is written. `directory`: the files of a store, read without its lock.
//! - `progress`: the figures, as a bar or as lines.
//!
//! A run does these steps in order:
//!
//! 1. List the source. Copy each blob that the destination does not have with the same size; write the name of each entry to a temporary file.
//! 2. Copy the entries of that file: when an entry is there, the blobs that it names are there too.
//!
//! Invariant: a blob appears at the destination only after its digest has matched, whole and durable. So a run that is killed has done a part of the
//! work, and the next one skips that part.

use crate::{Options, Origin};
use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use bytes::Bytes;
use castier_blob::Digest;
use castier_bucket::Bucket;
use castier_cache::{Budget, Fault, Upload};
use castier_config::{OriginServer, Size, Span};
use castier_wire::entry::Name;
use clap::Args;
use directory::Directory;
use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use parking_lot::Mutex;
use progress::Progress;
use side::{Destination, Found, Side};
use std::{
    fs::File,
    io::{self, BufRead as _, BufReader, BufWriter, Seek as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::task::AbortOnDropHandle;

mod directory;
mod progress;
mod side;

/// How much memory uploads to a bucket may have for each blob that is copied at once: the parts that are under way.
const MEMORY_OF_JOB: u64 = 32 << 20;
const LEAST_MEMORY: u64 = 256 << 20;
/// How often an operation is tried again after a fault that may pass. The pauses grow to some seconds.
const RETRIES: usize = 5;
/// After an answer that makes no sense, and after wrong bytes.
const FEW_RETRIES: usize = 1;
/// How long the end waits until uploads that were given up are aborted.
const ABORT: Duration = Duration::from_secs(5);

/// Copies all blobs and entries from one store to another
///
/// FROM and TO are directories of castier-origin or buckets (s3://BUCKET/PREFIX, gs://…, az://…). Each blob is checked against its digest on the way. What
/// the destination has with the same size is skipped, so a copy that was stopped goes on when it is started again. FROM is only read, and may be in
/// use. TO must not be in use by castier-origin if it is a directory. Entries (/ac, /kv) are copied after the blobs, and replace those at TO that differ.
///
/// Exit codes: 0 everything is at TO, 1 something is not, 2 the options or a configuration are wrong.
#[derive(Clone, Debug, Args)]
pub struct CopyArgs {
    /// The store to read
    #[arg(value_name = "FROM")]
    from: String,
    /// The store to write to; a directory is made if it is missing
    #[arg(value_name = "TO")]
    to: String,
    /// A configuration of castier-origin, for the bucket FROM: store.key, [store.s3] and limits.max_entry. Without it: the defaults, and the usual
    /// variables of the environment (`AWS_…`)
    #[arg(long, value_name = "FILE")]
    from_config: Option<PathBuf>,
    /// The same for TO
    #[arg(long, value_name = "FILE")]
    to_config: Option<PathBuf>,
    /// How many blobs are copied at once. To a bucket each may take 32 MiB of memory
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=256))]
    jobs: u16,
    /// Write nothing, and say what would be copied
    #[arg(long)]
    dry_run: bool,
}

/// Why nothing could be copied.
enum Refusal {
    /// The options or a configuration.
    Usage(String),
    Broken(String),
}

/// Copies, and says how it went.
pub fn run(args: &CopyArgs) -> ExitCode {
    let refuse = |text: &str, code: u8| {
        text.lines().for_each(|line| eprintln!("castier-origin copy: {line}"));
        ExitCode::from(code)
    };
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return refuse(&format!("no threads to run on: {error}"), 1),
    };
    let ended = runtime.block_on(copy(args));
    runtime.shutdown_timeout(Duration::from_millis(100));
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(Refusal::Usage(why)) => refuse(&why, 2),
        Err(Refusal::Broken(why)) => refuse(&why, 1),
    }
}

/// Returns whether everything is at the destination.
async fn copy(args: &CopyArgs) -> Result<bool, Refusal> {
    let (from, to) =
        (Named::read("FROM", &args.from, args.from_config.as_deref())?, Named::read("TO", &args.to, args.to_config.as_deref())?);
    from.is_apart_from(&to)?;
    let most = from.config.limits.max_entry.get().max(to.config.limits.max_entry.get());
    let memory = LEAST_MEMORY.max(MEMORY_OF_JOB * u64::from(args.jobs));
    let job = Arc::new(Job {
        from: from.side(memory, args.jobs)?,
        to: if args.dry_run { Destination::Dry(to.side(memory, args.jobs)?) } else { to.destination(memory, args.jobs)? },
        most,
        progress: Progress::new(args.dry_run),
    });
    let signal = |kind| signal(kind).map_err(|error| Refusal::Broken(format!("cannot wait for signals: {error}")));
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let ended = {
        let counting = AbortOnDropHandle::new(tokio::spawn(job.clone().count()));
        let showing = AbortOnDropHandle::new(tokio::spawn(job.progress.clone().show()));
        let ended = tokio::select! {
            ended = job.copy_all(usize::from(args.jobs)) => ended,
            _ = interrupt.recv() => Err("stopped by a signal; run it again to go on".to_owned()),
            _ = terminate.recv() => Err("stopped by a signal; run it again to go on".to_owned()),
        };
        drop((counting, showing));
        ended
    };
    for bucket in [job.from.bucket(), job.to.bucket()].into_iter().flatten() {
        bucket.close(ABORT).await;
    }
    Ok(job.progress.finish(ended))
}

/// FROM or TO.
struct Named {
    /// The option.
    what: &'static str,
    text: String,
    bucket: Option<castier_config::Bucket>,
    config: OriginServer,
}

impl Named {
    fn read(what: &'static str, text: &str, file: Option<&Path>) -> Result<Self, Refusal> {
        // Variables of castier's own would be those of both sides.
        let config = match file {
            Some(file) => {
                castier_config::load::<OriginServer>(Some(file), std::iter::empty())
                    .map_err(|problems| Refusal::Usage(problems.to_string()))?
                    .config
            }
            None => OriginServer::default(),
        };
        let bucket = if text.contains("://") {
            let store = castier_config::Store { url: text.to_owned(), ..castier_config::Store::default() };
            let bucket = store.bucket().ok_or_else(|| {
                Refusal::Usage(format!("{what}: {text:?} is no bucket; write s3://BUCKET, gs://BUCKET or az://CONTAINER, each with /PREFIX if there is one, or a directory"))
            })?;
            Some(bucket)
        } else if text.is_empty() {
            return Err(Refusal::Usage(format!("{what}: is empty; name a directory or a bucket")));
        } else {
            None
        };
        Ok(Self { what, text: text.to_owned(), bucket, config })
    }

    /// Nothing that is written may be read as a part of the source.
    fn is_apart_from(&self, to: &Self) -> Result<(), Refusal> {
        let overlap = match (&self.bucket, &to.bucket) {
            (Some(from), Some(to_bucket)) => {
                let is_one_store = self.config.store.s3.endpoint == to.config.store.s3.endpoint;
                let is_below =
                    |inner: &str, outer: &str| outer.is_empty() || inner.strip_prefix(outer).is_some_and(|rest| rest.starts_with('/'));
                let (a, b) = (&from.prefix, &to_bucket.prefix);
                // The same prefix with another layout is possible: the entries are the same objects.
                let overlap = if a == b { self.config.store.key == to.config.store.key } else { is_below(a, b) || is_below(b, a) };
                is_one_store && (from.service, &from.name) == (to_bucket.service, &to_bucket.name) && overlap
            }
            (None, None) => {
                let (from, to) = (resolved(Path::new(&self.text)), resolved(Path::new(&to.text)));
                from.starts_with(&to) || to.starts_with(&from)
            }
            _ => false,
        };
        if overlap {
            return Err(Refusal::Usage(format!("FROM and TO: {} and {} are one store, or one is inside the other", self.text, to.text)));
        }
        Ok(())
    }

    fn side(&self, memory: u64, jobs: u16) -> Result<Side, Refusal> {
        if self.bucket.is_some() {
            return self.open_bucket(memory, jobs).map(Side::Bucket);
        }
        let root = Path::new(&self.text);
        if !root.is_dir() && self.what == "FROM" {
            return Err(Refusal::Broken(format!("FROM: {} is no directory", self.text)));
        }
        Ok(Side::Directory(Arc::new(Directory::new(root))))
    }

    fn destination(&self, memory: u64, jobs: u16) -> Result<Destination, Refusal> {
        if self.bucket.is_some() {
            return self.open_bucket(memory, jobs).map(Destination::Bucket);
        }
        let mut limits = self.config.limits.clone();
        limits.max_blob = Size::new(u64::MAX);
        let options = Options { limits, root_key: self.what, ..Options::from(&self.config) };
        let keys = castier_config::Origin::default();
        let origin = Origin::open_uncounted(&self.text, options).map_err(|error| Refusal::Broken(error.to_string()))?.0;
        Ok(Destination::directory(origin, &keys))
    }

    fn open_bucket(&self, memory: u64, jobs: u16) -> Result<Arc<Bucket>, Refusal> {
        let Some(url) = &self.bucket else { return Err(Refusal::Usage(format!("{}: is no bucket", self.what))) };
        let store = &self.config.store;
        let keys = castier_config::Origin {
            key: store.key.clone(),
            // Each blob is asked for once.
            existence_ttl: Span::secs(0),
            s3: store.s3.clone(),
            ..castier_config::Origin::default()
        };
        let options = castier_bucket::Options {
            memory: Budget::new(memory),
            spool: Budget::new(0),
            spool_dir: std::env::temp_dir(),
            allow_delete: false,
            streams: usize::from(jobs),
            metrics: Arc::new(
                castier_bucket::Metrics::new(&prometheus::Registry::new()).map_err(|error| Refusal::Broken(error.to_string()))?,
            ),
        };
        let bucket = Bucket::new(url, &keys, options);
        bucket.map(Arc::new).map_err(|why| Refusal::Usage(format!("{}: {}", self.what, why.replacen("origin.", "store.", 1))))
    }
}

/// The directory without links on the way, as far as it exists.
fn resolved(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let found = path.ancestors().find_map(|above| Some((above, above.canonicalize().ok()?)));
    found.and_then(|(above, real)| Some(real.join(path.strip_prefix(above).ok()?))).unwrap_or(path)
}

/// What happened to a blob or an entry.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Copied,
    /// The destination has it.
    Present,
    /// It was deleted at the source meanwhile.
    Gone,
    /// The source's bytes do not match the digest.
    Corrupt(String),
    /// This one could not be copied; others may.
    Failed(String),
}

/// Why the whole copy ends.
type Fatal = String;

struct Job {
    from: Side,
    to: Destination,
    /// The most bytes of an entry.
    most: u64,
    progress: Arc<Progress>,
}

impl Job {
    /// # Errors
    /// Why it ended early.
    async fn copy_all(self: &Arc<Self>, jobs: usize) -> Result<(), Fatal> {
        let spool = |error: io::Error| format!("the names of entries cannot be written to a temporary file: {error}");
        let names = Mutex::new(BufWriter::new(tempfile::tempfile().map_err(spool)?));
        let spooled = &names;
        let objects = self.from.clone().objects().map_err(|fault| format!("FROM: {fault}"));
        objects
            .try_for_each_concurrent(jobs, |found| async move {
                match found {
                    Found::Blob(digest, size) => self.spawned(move |job| async move { job.copy_blob(digest, size).await }).await?,
                    // No name has a line break.
                    Found::Entry(name) => writeln!(spooled.lock(), "{name}").map_err(spool)?,
                    Found::Damaged(what) => self.progress.corrupt(&what, "is no complete entry"),
                    Found::Unreadable(why) => self.progress.failed("FROM", &why),
                    Found::Other(what) => self.progress.other(what),
                }
                Ok(())
            })
            .await?;
        let names = names.into_inner().into_inner().map_err(|error| spool(error.into_error()))?;
        let names = lines(names).map_err(spool)?;
        let copied = names.map_err(spool).try_for_each_concurrent(jobs, |name| async move {
            match Name::from_stored(&name) {
                Some(name) => self.spawned(move |job| async move { job.copy_entry(name).await }).await,
                None => Ok(()),
            }
        });
        copied.await
    }

    /// Runs work on any core. It ends with this future.
    async fn spawned<W: Future<Output = Result<(), Fatal>> + Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(Arc<Self>) -> W,
    ) -> Result<(), Fatal> {
        AbortOnDropHandle::new(tokio::spawn(work(self.clone()))).await.unwrap_or_else(|stopped| Err(stopped.to_string()))
    }

    /// How much there is to copy, for the progress. The copy itself reports what cannot be read.
    async fn count(self: Arc<Self>) {
        let mut objects = self.from.clone().objects();
        while let Some(Ok(found)) = objects.next().await {
            match found {
                Found::Blob(_, size) => self.progress.expect_blob(size),
                Found::Entry(_) => self.progress.expect_entry(),
                _ => {}
            }
        }
    }

    async fn copy_blob(self: Arc<Self>, digest: Digest, size: u64) -> Result<(), Fatal> {
        let mut tries = Tries::new();
        let outcome = loop {
            match self.try_blob(digest, size).await {
                Ok(outcome) => break outcome,
                Err(broken) => {
                    if !tries.again(&broken.fault).await {
                        break broken.outcome()?;
                    }
                }
            }
        };
        self.progress.blob(&digest, size, &outcome);
        Ok(())
    }

    async fn try_blob(&self, digest: Digest, size: u64) -> Result<Outcome, Broken> {
        if self.to.holds(digest, size).await.map_err(Broken::at_destination)? {
            return Ok(Outcome::Present);
        }
        if let Destination::Dry(_) = self.to {
            return Ok(Outcome::Copied);
        }
        let broken = Arc::new(Mutex::new(None));
        let body = self.body(digest, broken.clone()).boxed();
        let put = async {
            let mut upload = Upload::new(Some(digest), Some(size), body).await?;
            self.to.put(digest, &mut upload).await
        };
        let put = put.await;
        match (put, broken.lock().take()) {
            (Ok(()), _) => Ok(Outcome::Copied),
            (Err(_), Some(Unread::Gone)) => Ok(Outcome::Gone),
            (Err(_), Some(Unread::Broken(fault))) => Err(Broken::at_source(fault)),
            (Err(fault @ Fault::Mismatch(_)), None) => Err(Broken::at_source(fault)),
            (Err(fault), None) => Err(Broken::at_destination(fault)),
        }
    }

    /// The bytes of a blob. A transfer that breaks goes on where it broke. `unread` gets what keeps it from its end.
    fn body(&self, digest: Digest, unread: Arc<Mutex<Option<Unread>>>) -> impl Stream<Item = Result<Bytes, Fault>> + Send + use<> {
        let (from, progress) = (self.from.clone(), self.progress.clone());
        let state = (None::<castier_cache::Incoming>, 0, Tries::new(), progress.under_way());
        stream::try_unfold(state, move |(mut incoming, mut at, mut tries, mut under_way)| {
            let (from, unread) = (from.clone(), unread.clone());
            async move {
                let fault = loop {
                    let next = match &mut incoming {
                        Some(incoming) => incoming.next().await,
                        None => match from.open(digest, at).await {
                            Ok(Some(opened)) => {
                                incoming = Some(opened);
                                continue;
                            }
                            Ok(None) => {
                                *unread.lock() = Some(Unread::Gone);
                                return Err(Fault::Internal("the blob was deleted".into()));
                            }
                            Err(fault) => Err(fault),
                        },
                    };
                    match next {
                        Ok(None) => return Ok(None),
                        Ok(Some(bytes)) => {
                            at += bytes.len() as u64;
                            under_way.add(bytes.len() as u64);
                            return Ok(Some((bytes, (incoming, at, Tries::new(), under_way))));
                        }
                        Err(fault) if tries.again(&fault).await => incoming = None,
                        Err(fault) => break fault,
                    }
                };
                *unread.lock() = Some(Unread::Broken(fault.clone()));
                Err(fault)
            }
        })
    }

    async fn copy_entry(self: Arc<Self>, name: Name) -> Result<(), Fatal> {
        let mut tries = Tries::new();
        let outcome = loop {
            match self.try_entry(&name).await {
                Ok(outcome) => break outcome,
                Err(broken) => {
                    if !tries.again(&broken.fault).await {
                        break broken.outcome()?;
                    }
                }
            }
        };
        self.progress.entry(&name, &outcome);
        Ok(())
    }

    async fn try_entry(&self, name: &Name) -> Result<Outcome, Broken> {
        let Some((digest, bytes)) = self.from.entry(name, self.most).await.map_err(Broken::at_source)? else { return Ok(Outcome::Gone) };
        if self.to.entry(name, self.most).await.map_err(Broken::at_destination)? == Some(digest) {
            return Ok(Outcome::Present);
        }
        self.to.put_entry(name, bytes, self.most).await.map_err(Broken::at_destination)?;
        Ok(Outcome::Copied)
    }
}

/// The lines of a file from its beginning on.
fn lines(mut file: File) -> io::Result<impl Stream<Item = io::Result<String>>> {
    file.rewind()?;
    Ok(stream::iter(BufReader::new(file).lines()))
}

/// Why a body did not come to its end.
enum Unread {
    Gone,
    Broken(Fault),
}

/// A fault, and which side has it.
struct Broken {
    fault: Fault,
    is_source: bool,
}

impl Broken {
    const fn at_source(fault: Fault) -> Self {
        Self { fault, is_source: true }
    }

    const fn at_destination(fault: Fault) -> Self {
        Self { fault, is_source: false }
    }

    /// The outcome for this blob or entry. An error if all others would have the same.
    fn outcome(self) -> Result<Outcome, Fatal> {
        let Self { fault, is_source } = self;
        match (&fault, is_source) {
            (Fault::Mismatch(mismatch), true) => Ok(Outcome::Corrupt(format!("the bytes are those of {}", mismatch.actual))),
            // One object may be forbidden or archived.
            (Fault::Denied { .. } | Fault::Unusable { .. }, true) | (Fault::Unusable { .. } | Fault::OriginRefusesSize, false) => {
                Ok(Outcome::Failed(format!("{}: {fault}", if is_source { "FROM" } else { "TO" })))
            }
            (_, true) => Err(format!("FROM: {fault}; run it again to go on")),
            (Fault::OriginFull, false) => Err("TO: has no space left; make space, and run it again to go on".into()),
            (_, false) => Err(format!("TO: {fault}; run it again to go on")),
        }
    }
}

/// The attempts that are left.
struct Tries {
    pauses: ExponentialBackoff,
    few: usize,
}

impl Tries {
    fn new() -> Self {
        let pauses = ExponentialBuilder::default().with_min_delay(Duration::from_millis(200)).with_factor(3.0);
        Self { pauses: pauses.with_max_delay(Duration::from_secs(10)).with_max_times(RETRIES).with_jitter().build(), few: FEW_RETRIES }
    }

    /// Waits, and says whether to try again.
    async fn again(&mut self, fault: &Fault) -> bool {
        let may = match fault {
            Fault::Unreachable { .. } | Fault::Silent { .. } | Fault::Busy(_) => true,
            Fault::Unusable { .. } | Fault::Mismatch(_) if self.few > 0 => {
                self.few -= 1;
                true
            }
            _ => false,
        };
        match self.pauses.next().filter(|_| may) {
            Some(pause) => {
                tokio::time::sleep(pause).await;
                true
            }
            None => false,
        }
    }
}
