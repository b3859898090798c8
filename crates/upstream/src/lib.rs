//! Sources and stores over HTTP.
//!
//! - [`Upstream`]: an HTTP server, the origin or a peer; [`HttpStore`] is the same as a [`Source`](castier_cache::Source) and a
//!   [`Store`](castier_cache::Store). A connection to it can be lent to pingora's proxy for a relayed request ([`Expected`]).
//! - [`EmbeddedStore`]: the files of an origin in the same process.
//! - [`OriginState`]: whether the origin is up.
//! - [`trace`], [`via_header`], [`TracedPlan`]: headers and spans that connect a client's request with the requests to sources that it causes.
//! - [`Chunks`]: the framing of chunked bodies.

mod access;
mod breaker;
mod chunks;
mod embedded;
mod http;
mod lent;
mod metrics;
mod origin_state;
mod put;
mod resolver;
pub mod trace;
mod traced_plan;
pub mod via_header;

pub use access::{ca_file, certificates_file};
pub use breaker::{Admission, BreakerState};
pub use chunks::Chunks;
pub use embedded::EmbeddedStore;
#[doc(hidden)]
pub use http::content_range;
pub use http::{HttpStore, PeerServer, RouteServer, Signed, Trust, UNPROVED, Upstream, connector, insert, size_of};
#[doc(hidden)]
pub use lent::Answer;
pub use lent::Expected;
pub use metrics::Metrics;
pub use origin_state::OriginState;
pub use resolver::Addresses;
pub use traced_plan::TracedPlan;
