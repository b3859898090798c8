//! The blobs of a bucket.

use crate::{
    fault::{NAME, fault, unusable},
    leftovers::Raw,
    metrics::Metrics,
    s3,
    transport::{Failure, Transport},
};
use bytes::Bytes;
use castier_blob::Digest;
use castier_cache::{Answer, Ask, Budget, Fault, Incoming, NoRange, Put, RangeSupport, Ranges, Source, Stat, Store, Upload};
use castier_config::{self as config, KeyTemplate, Service};
use castier_wire::entry::Name;
use futures::{
    FutureExt as _, StreamExt as _, TryStreamExt as _,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use http::StatusCode;
use moka::sync::Cache as Known;
use object_store::{
    Error, GetOptions, GetRange, GetResult, ObjectStore, ObjectStoreExt as _, RetryConfig, azure::MicrosoftAzureBuilder,
    gcp::GoogleCloudStorageBuilder, path::Path,
};
use std::{
    ops::Range,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{AcqRel, Acquire, Relaxed},
        },
    },
    time::Duration,
};
use tokio_util::task::TaskTracker;

/// The longest key in bytes that S3, Google Cloud Storage and Azure take.
const LONGEST_KEY: usize = 1024;
/// How many blobs are remembered as stored: some 15 MiB.
const MOST_KNOWN: u64 = 100_000;
/// How many blobs of one question are asked about at once.
const STATS: usize = 16;

/// A bucket, or the part of it below a prefix.
pub struct Bucket {
    pub(crate) store: Arc<dyn ObjectStore>,
    /// `None` for other services than S3.
    pub(crate) raw: Option<Raw>,
    pub(crate) name: String,
    /// What all keys begin with: empty, or with a slash at its end.
    pub(crate) prefix: String,
    pub(crate) key: KeyTemplate,
    /// What was seen to be stored less than `origin.existence_ttl` ago, and its size.
    pub(crate) known: Known<Digest, u64>,
    /// Counts calls of [`Store::forget`]. What was seen before one must not be noted after it:
    ///
    /// 1. A HEAD says that a blob is there.
    /// 2. A client deletes it, and it is forgotten.
    /// 3. The HEAD's answer would be noted, and the next upload of the blob acknowledged without storing it.
    forgotten: AtomicU64,
    /// `origin.read_timeout`.
    pub(crate) limit: Duration,
    /// `fill.memory`.
    pub(crate) memory: Arc<Budget>,
    /// `fill.spool`.
    pub(crate) spool: Arc<Budget>,
    /// `fill.spool_dir`.
    pub(crate) spool_dir: PathBuf,
    allow_delete: bool,
    /// The bucket itself was seen.
    exists: AtomicBool,
    pub(crate) metrics: Arc<Metrics>,
    /// Whether the store gives ranges.
    range_support: Arc<RangeSupport>,
    /// The ends of uploads that were given up.
    pub(crate) ends: TaskTracker,
}

/// What a [`Bucket`] needs beside the keys of the origin.
pub struct Options {
    /// `fill.memory`: uploads hold their parts in it.
    pub memory: Arc<Budget>,
    /// `fill.spool`: how many bytes may be in files.
    pub spool: Arc<Budget>,
    /// `fill.spool_dir`: an upload without a name is there until its end.
    pub spool_dir: PathBuf,
    /// `allow_delete`.
    pub allow_delete: bool,
    /// How many transfers there may be beside the `origin.max_requests` small requests, which they must not keep out.
    pub streams: usize,
    /// The metrics.
    pub metrics: Arc<Metrics>,
}

impl Bucket {
    /// The bucket at `url`, as `config` says. Sends no request.
    ///
    /// # Errors
    /// A text that names the key that cannot be used.
    pub fn new(url: &config::Bucket, config: &config::Origin, options: Options) -> Result<Self, String> {
        let Options { memory, spool, spool_dir, allow_delete, streams, metrics } = options;
        let transport = Transport::new(config, streams, metrics.clone())?;
        let ttl = config.existence_ttl.get();
        let (store, raw) = open(url, config, transport)?;
        Ok(Self {
            store,
            raw,
            name: url.to_string(),
            prefix: if url.prefix.is_empty() { String::new() } else { format!("{}/", url.prefix) },
            key: config.key.clone(),
            known: Known::builder().max_capacity(if ttl.is_zero() { 0 } else { MOST_KNOWN }).time_to_live(ttl).build(),
            forgotten: AtomicU64::new(0),
            limit: config.read_timeout.get(),
            memory,
            spool,
            spool_dir,
            allow_delete,
            exists: AtomicBool::new(false),
            metrics,
            range_support: Arc::default(),
            ends: TaskTracker::new(),
        })
    }

    /// Waits for the ends of uploads that were given up, for `limit` at most.
    pub async fn close(&self, limit: Duration) {
        self.ends.close();
        if tokio::time::timeout(limit, self.ends.wait()).await.is_err() {
            tracing::warn!(
                "some uploads to the bucket could not be aborted in time; their parts stay until a rule of the bucket removes them"
            );
        }
    }

    pub(crate) fn path(&self, digest: &Digest) -> Path {
        Path::from(format!("{}{}", self.prefix, self.key.key(&digest.to_string())))
    }

    /// The path of an entry, whose name begins with a slash.
    pub(crate) fn entry_path(&self, name: &str) -> Path {
        Path::from(format!("{}{}", self.prefix, name.trim_start_matches('/')))
    }

    /// As [`Self::entry_path`], for an entry that shall be stored.
    ///
    /// # Errors
    /// [`Fault::BadRequest`]: no store takes such a long key.
    pub(crate) fn new_entry_path(&self, name: &Name) -> Result<Path, Fault> {
        let path = self.entry_path(name.as_str());
        let length = path.as_ref().len();
        if length > LONGEST_KEY {
            return Err(Fault::BadRequest(format!(
                "the name is too long: as a key of the store it has {length} bytes, and {LONGEST_KEY} are allowed"
            )));
        }
        Ok(path)
    }

    /// The size of a blob in the store; `None` if it is not there.
    pub(crate) async fn size(&self, digest: &Digest) -> Result<Option<u64>, Fault> {
        if let Some(size) = self.known.get(digest) {
            return Ok(Some(size));
        }
        let seen = self.seen();
        let size = self.head(&self.path(digest)).await?;
        if let Some(size) = size {
            self.note(digest, size, seen);
        }
        Ok(size)
    }

    pub(crate) async fn head(&self, path: &Path) -> Result<Option<u64>, Fault> {
        match self.store.head(path).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(Error::NotFound { .. }) => {
                // The answer to a HEAD has no body that would tell a missing key from a missing bucket.
                self.check_bucket().await?;
                Ok(None)
            }
            Err(error) => Err(self.named("HEAD", path, error).await),
        }
    }

    /// The fault for an error that has no body, since a HEAD was answered: a GET of one byte is told the reason.
    async fn named(&self, what: &str, path: &Path, error: Error) -> Fault {
        if !matches!(Failure::of(&error), Some(Failure::Status { status, code: None, .. }) if status.is_client_error()) {
            return fault(what, &error);
        }
        let options = GetOptions { range: Some(GetRange::Bounded(0..1)), ..GetOptions::default() };
        match self.store.get_opts(path, options).await {
            Err(reason) if matches!(Failure::of(&reason), Some(Failure::Status { code: Some(_), .. })) => fault(what, &reason),
            _ => fault(what, &error),
        }
    }

    /// The bucket exists, or this is a fault. Asked once.
    async fn check_bucket(&self) -> Result<(), Fault> {
        if self.exists.load(Relaxed) {
            return Ok(());
        }
        match self.list_one().await {
            Ok(()) => self.exists.store(true, Relaxed),
            // Who may not list cannot tell. Then the answer to the HEAD has to do.
            Err(error) if is_forbidden(&error) => {}
            Err(error) => return Err(fault("HEAD", &error)),
        }
        Ok(())
    }

    /// Lists the first objects below the prefix, to see whether that can be done.
    pub(crate) async fn list_one(&self) -> Result<(), Error> {
        let prefix = Some(self.prefix.trim_end_matches('/')).filter(|prefix| !prefix.is_empty()).map(Path::from);
        self.store.list(prefix.as_ref()).next().await.transpose().map(drop)
    }

    /// For [`Self::note`]. Call it before the store is asked.
    pub(crate) fn seen(&self) -> u64 {
        self.forgotten.load(Acquire)
    }

    /// This blob is stored, unless something was forgotten since `seen`.
    pub(crate) fn note(&self, digest: &Digest, size: u64, seen: u64) {
        self.known.insert(*digest, size);
        if self.seen() != seen {
            self.known.invalidate(digest);
        }
    }

    /// Further parts of the version that this answer is of, if the store has a strong name for the version.
    fn version(&self, got: &GetResult) -> Option<Arc<dyn Ranges>> {
        let etag = got.meta.e_tag.clone().filter(|etag| !etag.starts_with("W/") && self.range_support.is_assumed())?;
        let (store, path) = (self.store.clone(), got.meta.location.clone());
        Some(Arc::new(Version { store, path, etag, size: got.meta.size, support: self.range_support.clone() }))
    }

    async fn read(&self, ask: Ask) -> Result<Answer, Fault> {
        let digest = ask.digest()?;
        let range = (ask.from > 0).then_some(GetRange::Offset(ask.from));
        let options = GetOptions { range, ..GetOptions::default() };
        match self.store.get_opts(&self.path(&digest), options).await {
            Ok(got) => {
                let (size, start) = (got.meta.size, got.range.start);
                if start != ask.from {
                    return Err(unusable(format!("GET: bytes from {start} on in place of {}", ask.from)));
                }
                let ranges = self.version(&got);
                Ok(Answer::Bytes(Incoming::new(Some(size), bytes(got)).with_ranges(ranges)))
            }
            Err(Error::NotFound { .. }) if digest == Digest::EMPTY => Ok(Answer::Bytes(Incoming::new(Some(0), stream::empty()))),
            Err(Error::NotFound { .. }) => {
                self.known.invalidate(&digest);
                Ok(Answer::Absent)
            }
            Err(error) => Err(fault("GET", &error)),
        }
    }
}

fn bytes(got: GetResult) -> BoxStream<'static, Result<Bytes, Fault>> {
    let fault = |error| match fault("GET", &error) {
        // The transfer has begun: it can be resumed.
        Fault::Unusable { why, .. } => Fault::Unreachable { source_name: NAME, why },
        fault => fault,
    };
    got.into_stream().map_err(fault).boxed()
}

/// A version of a blob.
struct Version {
    store: Arc<dyn ObjectStore>,
    path: Path,
    etag: String,
    /// The size of the whole blob.
    size: u64,
    support: Arc<RangeSupport>,
}

impl Ranges for Version {
    fn read(&self, range: Range<u64>) -> BoxFuture<'static, Result<BoxStream<'static, Result<Bytes, Fault>>, NoRange>> {
        let (store, path, etag, size) = (self.store.clone(), self.path.clone(), self.etag.clone(), self.size);
        let wanted = Some(GetRange::Bounded(range.clone()));
        let options = GetOptions { range: wanted, if_match: Some(etag.clone()), ..GetOptions::default() };
        async move {
            match store.get_opts(&path, options).await {
                // A store may overlook the condition.
                Ok(got) if got.meta.size != size => Err(NoRange::Replaced),
                Ok(got) => match &got.meta.e_tag {
                    Some(now) if *now != etag => Err(NoRange::Replaced),
                    None => Err(NoRange::Ignored),
                    Some(_) if got.range != range => Err(NoRange::Fault(unusable("GET: another range than was asked for"))),
                    Some(_) => Ok(bytes(got)),
                },
                Err(Error::Precondition { .. } | Error::NotFound { .. }) => Err(NoRange::Replaced),
                Err(error) => Err(match Failure::of(&error) {
                    Some(Failure::Status { status: StatusCode::RANGE_NOT_SATISFIABLE, .. }) => NoRange::Replaced,
                    Some(Failure::Whole) => NoRange::Ignored,
                    _ => NoRange::Fault(fault("GET", &error)),
                }),
            }
        }
        .boxed()
    }

    fn give_up(&self) {
        tracing::debug!("the store gives no ranges: large blobs are read over one connection for a while");
        self.support.give_up();
    }
}

fn is_forbidden(error: &Error) -> bool {
    matches!(Failure::of(error), Some(Failure::Status { status: StatusCode::FORBIDDEN, .. }))
}

/// A client of the service, and what only that of S3 has. It reads the usual variables; what the configuration says goes before them.
fn open(url: &config::Bucket, config: &config::Origin, transport: Transport) -> Result<(Arc<dyn ObjectStore>, Option<Raw>), String> {
    let retries = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    let bad = |error: Error| format!("origin.url: {error}");
    Ok(match url.service {
        Service::S3 => {
            let client = Arc::new(s3::open(url, &config.s3, retries, transport.clone())?);
            let after = Some(config.s3.abort_leftovers_after.get()).filter(|after| !after.is_zero());
            (client.clone(), Some(Raw { client, transport, after }))
        }
        Service::Gs => {
            let builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(&url.name).with_retry(retries);
            (Arc::new(builder.with_http_connector(transport).build().map_err(bad)?), None)
        }
        Service::Az => {
            let builder = MicrosoftAzureBuilder::from_env().with_container_name(&url.name).with_retry(retries);
            (Arc::new(builder.with_http_connector(transport).build().map_err(bad)?), None)
        }
    })
}

impl Source for Bucket {
    fn open(&self, ask: Ask) -> BoxFuture<'_, Result<Answer, Fault>> {
        self.read(ask).boxed()
    }

    fn stat<'a>(&'a self, digests: &'a [Digest]) -> BoxFuture<'a, Result<Vec<Stat>, Fault>> {
        let stat =
            move |digest: &'a Digest| async move { Ok(self.size(digest).await?.map_or(Stat::Absent, |size| Stat::Present(Some(size)))) };
        stream::iter(digests).map(stat).buffered(STATS).try_collect().boxed()
    }

    fn url(&self) -> Option<String> {
        Some(self.name.clone())
    }
}

impl Store for Bucket {
    fn put<'a>(&'a self, upload: &'a mut Upload<'_>) -> BoxFuture<'a, Result<Put, Fault>> {
        self.store_upload(upload).boxed()
    }

    fn delete<'a>(&'a self, digest: &'a Digest) -> BoxFuture<'a, Result<bool, Fault>> {
        async move {
            if !self.allow_delete {
                return Err(Fault::NotAllowed);
            }
            self.forget(digest);
            let path = self.path(digest);
            if self.head(&path).await?.is_none() {
                return Ok(false);
            }
            let deleted = self.store.delete(&path).await;
            // An upload may have noted it in between. A failed deletion may have been done all the same.
            self.forget(digest);
            deleted.map(|()| true).map_err(|error| fault("DELETE", &error))
        }
        .boxed()
    }

    fn holds<'a>(&'a self, digest: &'a Digest, size: Option<u64>) -> BoxFuture<'a, Result<Option<u64>, Fault>> {
        async move {
            let known = if *digest == Digest::EMPTY { Some(0) } else { self.size(digest).await? };
            // An object of another size is to be replaced.
            Ok(known.filter(|known| size.is_none_or(|size| size == *known)))
        }
        .boxed()
    }

    fn forget(&self, digest: &Digest) {
        self.forgotten.fetch_add(1, AcqRel);
        self.known.invalidate(digest);
    }
}
