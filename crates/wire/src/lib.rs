//! Content-addressed storage over HTTP: what stands in requests and answers, shared by the tier, the origin and the load tester, so that all of
//! them answer the same request in the same words.
//!
//! Pure: it knows the `http` crate's types, and does no I/O.
//!
//! - [`Target`]: what a path asks for.
//! - [`Selection`]: which part of a blob a request asks for, given its conditions and its range.
//! - [`blob_head`], [`entry_head`], [`Problem`]: heads of answers, and bodies of errors.
//! - [`entry`]: names of what is stored under a key.
//! - [`forwarded`], [`trace`]: which client a request comes from, and which request it is.

mod conditions;
pub mod entry;
mod expect;
mod fields;
mod form;
pub mod forwarded;
mod head;
mod paths;
mod problem;
pub mod trace;

pub use conditions::{Selection, names_this_blob, select};
pub use expect::expects_continue;
pub use fields::Fields;
pub use form::is_file;
pub use head::{CACHE_FOREVER, CACHE_STATUS, REPR_DIGEST, blob_head, entry_head};
pub use paths::{CAS, Stored, Target, blob_path, split_instance};
pub use problem::Problem;
