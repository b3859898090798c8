//! What castier and castier-origin both need, once.
//!
//! - [`log`], [`otlp`]: where records and spans go. Nothing there delays or fails a request.
//! - [`signals`]: which signals end a program, and which make it read its configuration again.
//! - [`health_check`]: the option `--health`.
//! - [`threads`]: whether the system grants enough threads.

mod byte_queue;
pub mod health_check;
pub mod log;
pub mod otlp;
pub mod signals;
pub mod threads;
