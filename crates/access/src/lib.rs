//! Who a client is, what that one may do, and how much each client address may ask. No connections, and of HTTP only the value of `Authorization`.
//!
//! - [`Who`]: a client with its [`Role`] and its [`Scope`]s, in `who`. [`Who::may`] decides.
//! - [`Users`]: the users of an htpasswd file and the tokens of a file, in `users`.
//! - [`Access`]: from an `Authorization` header to a [`Who`], in `access`. [`Memo`]: the same for the next request of a connection.
//! - `failures`: what wrong credentials cost the guesser.
//! - [`Clients`]: requests, connections and bandwidth of each client address, in `clients`.
//!
//! Invariants:
//! - After [`Access::reload`] no request that begins is answered by what the former users were allowed.
//! - The memory and the processor time that clients without valid credentials can take are bounded: every table, every queue and the number of passwords
//!   that are checked at once have a limit.
//! - Passwords and tokens are in memory only while they are checked, and in the [`Memo`] of an open connection. Otherwise there are hashes.

mod access;
mod clients;
mod failures;
mod memo;
mod metrics;
mod users;
mod who;

#[doc(hidden)]
pub use access::password_of;
pub use access::{Access, Options, Refused};
pub use castier_config::Role;
pub use clients::{Clients, Connection, Limits, client};
pub use memo::Memo;
pub use metrics::Metrics;
pub use users::{Sources, Users};
pub use who::{Scope, What, Who};
