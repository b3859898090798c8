//! Content-addressed storage over HTTP: paths, headers, conditions and error bodies. castier, castier-origin and castier-load share it, so
//! that they give the same answers.
//!
//! Pure: it uses the types of the `http` crate, and does no I/O.
//!
//! - [`Target`]: the resource that a path names.
//! - [`Selection`]: the part of a blob that a request selects, by its conditions and range.
//! - [`blob_head`], [`entry_head`], [`Problem`]: heads of answers, and bodies of errors.
//! - [`entry`]: names of entries, which are stored under a key.
//! - [`forwarded`], [`trace`]: the client of a request, and the ids of a request.

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

pub use conditions::{Selection, names_this_blob, range, select};
pub use expect::expects_continue;
pub use fields::Fields;
pub use form::is_file;
pub use head::{CACHE_FOREVER, CACHE_STATUS, REPR_DIGEST, blob_head, entry_head, hop_by_hop};
pub use paths::{CAS, Stored, Target, blob_path, split_instance};
pub use problem::Problem;
