//! Which resource a request names, and what is known of it. No connections; of HTTP only the names of headers.
//!
//! - [`Path`]: the path of a request in the one spelling that templates see.
//! - [`Template`]: `/v2/{name*}/blobs/sha256:{sha256}`. Matches any path in time linear in its length.
//! - [`Expansion`]: an upstream URL with the variables of a template.
//! - [`Rule`] and [`preset`]: the rules of the protocols, as data (`presets.toml`).
//! - [`Table`]: the configured routes, and which of them a request is for. [`name`]: the key of what has no digest in its path.
//! - [`Links`]: replaces the links in metadata, by parsing.
//! - [`Proofs`]: whose credentials may read what, as the upstream has shown. [`manifest`]: what a manifest proves of its repository.
//! - [`freshness()`]: how long an answer holds, and how it is asked for again.
//! - [`Names`]: the name table, in memory and in a file. [`Glob`]: which of its paths a purge is for.
//! - [`metadata`]: what metadata says of the bytes of other resources.
//! - [`lfs`]: the batch API of Git LFS, and castier's tickets. [`challenge`]: what an upstream asks for before it lets in. [`link_header`]: `Link` headers.
//! - [`Hosts`] and [`is_private`]: where a route may be led to.

pub mod challenge;
pub mod lfs;
pub mod link_header;
pub mod manifest;
pub mod metadata;

mod edit;
mod freshness;
mod glob;
mod hosts;
mod json;
mod links;
mod names;
mod nix32;
mod path;
mod preset;
mod proofs;
mod table;
mod template;

pub use freshness::{Freshness, NotKept, Terms, age, conditions, freshness, if_range, may_keep, merge};
pub use glob::{BadGlob, Glob};
pub use hosts::{BadHost, Hosts, Listed, is_private};
pub use json::Step;
pub use links::{Links, Unparsed, drop_members, html_base, require_log_in};
pub use names::{Entry, Names};
pub use path::{BadPath, Path};
pub use preset::{Kind, Rule, first, preset, protocols};
pub use proofs::Proofs;
pub use table::{Found, Overlap, Route, Table, name};
pub use template::{BadTemplate, Captures, Expansion, Template};
