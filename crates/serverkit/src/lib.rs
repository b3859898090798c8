//! The parts that castier and castier-origin share.
//!
//! - [`startup`]: options, configuration, runtime: `main` of both programs.
//! - [`bind`], [`open_files`]: listening sockets, and the limit on open files.
//! - [`signals`]: which signals end a program, and which make it read its configuration again.
//! - [`log`], [`otlp`]: log records and spans, and their destinations. Nothing there delays or fails a request.
//! - [`access_log`], [`series`]: the access record of a request, and the metrics that both programs have.
//! - [`admin_connections`]: closes an idle connection to an admin listener for a new one.
//! - [`multipart`]: uploads as forms.
//! - [`stall_timeout`]: a timeout for a client that sends or takes no byte.
//! - [`pem`], [`tls`]: certificates and keys, and TLS at a listener.

pub mod access_log;
pub mod admin_connections;
pub mod bind;
mod byte_queue;
pub mod health_check;
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
pub mod tls;
