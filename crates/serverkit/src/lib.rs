//! What castier and castier-origin both need, once.
//!
//! - [`startup`]: options, configuration, runtime: `main` of both programs.
//! - [`bind`], [`open_files`]: listening sockets, and the limit on open files.
//! - [`signals`]: which signals end a program, and which make it read its configuration again.
//! - [`log`], [`otlp`]: where records and spans go. Nothing there delays or fails a request.
//! - [`access_log`], [`series`]: what is logged of each request, and the metrics that both have.
//! - [`admin_connections`]: which connection to an admin listener is closed for a new one.
//! - [`multipart`]: uploads as forms.
//! - [`stall_timeout`]: a timeout for a client that does nothing.
//! - [`pem`]: certificates and keys.

pub mod access_log;
pub mod admin_connections;
pub mod bind;
mod byte_queue;
mod health_check;
pub mod log;
pub mod multipart;
pub mod open_files;
pub mod otlp;
pub mod pem;
pub mod series;
pub mod signals;
pub mod stall_timeout;
pub mod startup;
mod threads;
