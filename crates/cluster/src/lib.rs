//! Many nodes as one cache.
//!
//! - [`Ring`]: who owns a digest; pure.
//! - [`Members`]: who is in the cluster, and who of them is up.
//! - [`Secrets`]: how nodes prove to each other that they know the cluster's secret.
//! - [`Peers`]: the other nodes as sources and as stores.
//! - [`ClusterPlan`]: whom a flight asks.
//! - [`Purge`]: forgetting a blob on every node.

mod members;
mod metrics;
mod peers;
mod plan;
mod probe;
mod purge;
mod ring;
mod secret;

pub use members::{Member, MemberFigures, MemberStatus, Members, NODE, Status};
pub use metrics::Metrics;
pub use peers::{FILLING, FLIGHT, HEALTH, Only, Peers, ROUTE};
pub use plan::ClusterPlan;
pub use probe::HttpProbe;
pub use purge::Purge;
pub use ring::Ring;
pub use secret::{ASKED, Asked, Field, PROOF, Secrets, Twice};
