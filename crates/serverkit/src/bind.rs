//! Listening sockets.

use std::io::ErrorKind;
use tokio::net::TcpListener;

/// Listens on `address`, the value of the configuration's `key`.
///
/// # Errors
/// A text that names the key and the address, and says what to do.
pub async fn bind(key: &str, address: &str) -> Result<TcpListener, String> {
    let listener = TcpListener::bind(address).await.map_err(|error| {
        let advice = match error.kind() {
            ErrorKind::AddrInUse => "is taken by another program; stop that one, or choose another port",
            ErrorKind::AddrNotAvailable => "is not an address of this machine; choose one that is, or 0.0.0.0 for all",
            ErrorKind::PermissionDenied => "may not be used by this user; choose a port over 1023",
            _ => "cannot be listened on; choose another",
        };
        format!("{key} {address} {advice} ({error})")
    })?;
    // Many clients connect at once, and a full backlog resets connections. So ask for the longest that the system allows
    // (net.core.somaxconn). If that fails, the shorter one stays.
    rustix::net::listen(&listener, i32::MAX).ok();
    Ok(listener)
}

/// The address that a listener has, for people: with the port that the system chose, if the configuration says 0.
pub fn shown(listener: &TcpListener) -> String {
    listener.local_addr().map_or_else(|error| error.to_string(), |address| address.to_string())
}
