//! The configuration of `castier-origin`: the names and meanings of [`crate::Castier`], and fewer of them.

use crate::{Bucket, KeyTemplate, Limits, Log, Origin, Otlp, S3, Shutdown, Size, Span, value::path_text};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use url::Url;

/// The configuration of `castier-origin`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OriginServer {
    /// Whether clients may delete blobs.
    ///
    /// Off by default: this is the source of truth, and a deleted blob is gone.
    pub allow_delete: bool,
    /// Whether an entry below `/ac/` that names a blob which is not stored gets 404.
    ///
    /// This is about entries that parse as an `ActionResult`. castier-origin looks into at most eight entries at once, and holds each in
    /// memory meanwhile. Off by default: ccache keeps other things below `/ac/`, and each GET there has to check all blobs of the entry.
    pub ac_validation: bool,
    /// `[listen]`.
    pub listen: OriginListen,
    /// `[store]`.
    pub store: Store,
    /// `[limits]`.
    pub limits: OriginLimits,
    /// `[log]`.
    pub log: Log,
    /// `[otlp]`.
    pub otlp: Otlp,
    /// `[shutdown]`.
    pub shutdown: Shutdown,
}

/// The addresses that castier-origin listens on. `0.0.0.0:PORT` is every interface; with port 0 the system picks a free port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct OriginListen {
    /// The address for clients. castier is one of them.
    ///
    /// The default is on the loopback: nobody can reach castier-origin from outside until you say so.
    ///
    /// - Type: HOST:PORT
    pub public: String,
    /// The address for metrics and health checks. It has no log-in.
    ///
    /// That is why the default is on the loopback. If the port is taken, castier-origin does not start: a second one on the same machine
    /// needs a port of its own.
    ///
    /// - Type: HOST:PORT
    pub admin: String,
}

impl Default for OriginListen {
    fn default() -> Self {
        Self { public: "127.0.0.1:9000".into(), admin: "127.0.0.1:9001".into() }
    }
}

/// Where the blobs are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Store {
    /// The directory of the blobs.
    ///
    /// castier-origin makes it if it is missing, and locks it while it runs. The default is also where castier's embedded origin stores its
    /// blobs, so that one can take over from the other.
    #[serde(serialize_with = "path_text")]
    pub root: PathBuf,
    /// A bucket of an object store in place of the directory: `s3://BUCKET[/PREFIX]`, `gs://BUCKET` or `az://CONTAINER`. Empty: the directory.
    ///
    /// castier can have the bucket as its origin without castier-origin. This is for other clients of the interface. The default needs no
    /// other server.
    ///
    /// - Type: URL
    pub url: String,
    /// As [`Origin::key`].
    pub key: KeyTemplate,
    /// As [`Origin::existence_ttl`].
    pub existence_ttl: Span,
    /// `[store.s3]`.
    pub s3: S3,
}

impl Default for Store {
    fn default() -> Self {
        let Origin { key, existence_ttl, s3, .. } = Origin::default();
        Self { root: "./castier-data/origin".into(), url: String::new(), key, existence_ttl, s3 }
    }
}

impl Store {
    /// The bucket that `url` names; `None` for the directory.
    pub fn bucket(&self) -> Option<Bucket> {
        Bucket::of(&Url::parse(&self.url).ok()?)?.ok()
    }
}

/// What clients may do.
///
/// - Live: yes
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct OriginLimits {
    /// The largest blob that castier-origin takes.
    ///
    /// - Type: size over 0
    pub max_blob: Size,
    /// The largest entry below `/ac/` and `/kv/` that castier-origin takes.
    ///
    /// - Type: size over 0
    pub max_entry: Size,
    /// How many client connections may be open.
    ///
    /// Where the system grants too few open files castier-origin accepts fewer. It uses a quarter of those files for the store.
    ///
    /// - Type: 1 or more
    pub max_connections: usize,
    /// As [`Limits::max_admin_connections`].
    pub max_admin_connections: usize,
    /// As [`Limits::header_timeout`].
    pub header_timeout: Span,
    /// As [`Limits::max_header_bytes`].
    pub max_header_bytes: Size,
    /// As [`Limits::max_headers`].
    pub max_headers: usize,
    /// As [`Limits::idle_timeout`].
    pub idle_timeout: Span,
    /// As [`Limits::write_timeout`].
    pub write_timeout: Span,
}

impl From<&Limits> for OriginLimits {
    fn from(limits: &Limits) -> Self {
        Self {
            max_blob: limits.max_blob,
            max_entry: limits.max_entry,
            max_connections: limits.max_connections,
            max_admin_connections: limits.max_admin_connections,
            header_timeout: limits.header_timeout,
            max_header_bytes: limits.max_header_bytes,
            max_headers: limits.max_headers,
            idle_timeout: limits.idle_timeout,
            write_timeout: limits.write_timeout,
        }
    }
}

impl Default for OriginLimits {
    fn default() -> Self {
        Self::from(&Limits::default())
    }
}
