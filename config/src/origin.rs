//! The configuration of `castier-origin`: the same words and shapes as [`crate::Castier`], and fewer of them.

use crate::{Limits, Log, Otlp, Shutdown, Size, Span, castier::path_text};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Everything that can be told to `castier-origin`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OriginServer {
    /// Whether clients may delete blobs, true or false. Default false: this is the source of truth, and what is deleted here
    /// is gone.
    pub allow_delete: bool,
    /// Whether an entry below `/ac/` that names a blob which is not stored is answered with 404, true or false. Default false: ccache
    /// keeps other things there, and each GET of an entry then looks for all its blobs.
    pub ac_validation: bool,
    /// Where the program listens.
    pub listen: OriginListen,
    /// Where the blobs are.
    pub store: Store,
    /// What clients may do.
    pub limits: OriginLimits,
    /// What is written about it.
    pub log: Log,
    /// Which spans are sent to a collector.
    pub otlp: Otlp,
    /// How the program ends.
    pub shutdown: Shutdown,
}

/// `[listen]`: addresses as `HOST:PORT`; `0.0.0.0:PORT` means every interface, port 0 one that the system picks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct OriginListen {
    /// For clients, `HOST:PORT`. Default `127.0.0.1:9000`: reachable from outside only once somebody has said so.
    pub public: String,
    /// For metrics and health, `HOST:PORT`. Default `127.0.0.1:9001`: it has no log-in, so it stays on the loopback.
    pub admin: String,
}

impl Default for OriginListen {
    fn default() -> Self {
        Self { public: "127.0.0.1:9000".into(), admin: "127.0.0.1:9001".into() }
    }
}

/// `[store]`: where the blobs are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Store {
    /// The directory of the blobs; created if need be. Default `./castier-data/origin`, which is also where castier's
    /// embedded origin keeps them, so that one can take over from the other.
    #[serde(serialize_with = "path_text")]
    pub root: PathBuf,
}

impl Default for Store {
    fn default() -> Self {
        Self { root: "./castier-data/origin".into() }
    }
}

/// `[limits]`: what clients may do. The names, meanings and defaults of [`Limits`], as far as an origin needs them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct OriginLimits {
    /// The largest blob that is taken; a size over 0. Default `16GiB`, as castier has it.
    pub max_blob: Size,
    /// The largest entry below `/ac/` and `/kv/` that is taken; a size over 0. Default `16MiB`, as castier has it.
    pub max_entry: Size,
    /// How many client connections may be open, 1 or more. Default 20000, as castier has it.
    pub max_connections: usize,
    /// How many connections to the admin listener may be open, 1 or more. Default 128, as castier has it.
    pub max_admin_connections: usize,
    /// How long a client may take to send the whole head of a request; a duration over 0. Default `10s`, as castier has it.
    pub header_timeout: Span,
    /// The largest head of a request; a size from `1KiB` to `1MiB`. Default `32KiB`, as castier has it.
    pub max_header_bytes: Size,
    /// The most header fields in a request, 1 to 256. Default 100, as castier has it.
    pub max_headers: usize,
    /// The longest pause between requests on a kept-alive connection, and the longest silence of an upload; a duration over
    /// 0. Default `75s`, as castier has it.
    pub idle_timeout: Span,
    /// The longest time in which a client may take no byte of an answer; a duration over 0. Default `60s`, as castier has it.
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
