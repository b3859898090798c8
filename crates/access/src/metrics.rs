//! The metrics of what is denied.

use prometheus::{IntCounter, IntCounterVec, Opts, Registry};

/// The metrics.
#[derive(Debug)]
pub struct Metrics {
    reload_failures: [IntCounter; 2],
    handshake: IntCounter,
    proxy_header: IntCounter,
    credentials: IntCounter,
    missing: IntCounter,
    role: IntCounter,
    attempts: IntCounter,
    hashing: IntCounter,
    requests: IntCounter,
    connections: IntCounter,
    right: IntCounter,
    wrong: IntCounter,
}

impl Metrics {
    /// All metrics, registered with `registry`. Every series exists from now on.
    ///
    /// # Errors
    /// A name that is registered already.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let counters = |name: &str, help: &str, label: &str| {
            let counters = IntCounterVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(counters.clone())).map(|()| counters)
        };
        let denied = counters("castier_denied_requests_total", "Requests that were denied, by why", "reason")?;
        let checks = counters("castier_password_checks_total", "Passwords that were checked against bcrypt hashes, by result", "result")?;
        let reloads =
            counters("castier_access_reload_failures_total", "Files of users and tokens that could not be read again, by file", "file")?;
        let turned = counters("castier_connections_turned_away_total", "Connections closed before their first request, by why", "reason")?;
        Ok(Self {
            reload_failures: ["htpasswd", "tokens"].map(|file| reloads.with_label_values(&[file])),
            handshake: turned.with_label_values(&["tls"]),
            proxy_header: turned.with_label_values(&["proxy-protocol"]),
            credentials: denied.with_label_values(&["credentials"]),
            missing: denied.with_label_values(&["missing"]),
            role: denied.with_label_values(&["role"]),
            attempts: denied.with_label_values(&["attempts"]),
            hashing: denied.with_label_values(&["hashing"]),
            requests: denied.with_label_values(&["requests"]),
            connections: denied.with_label_values(&["connections"]),
            right: checks.with_label_values(&["right"]),
            wrong: checks.with_label_values(&["wrong"]),
        })
    }

    /// The file of users, or that of tokens, could not be read again.
    pub fn reload_failed(&self, is_tokens: bool) {
        self.reload_failures[usize::from(is_tokens)].inc();
    }

    /// A connection was closed: its TLS handshake failed, or it speaks plain HTTP.
    pub fn handshake_failed(&self) {
        self.handshake.inc();
    }

    /// A connection was closed: it does not begin with a PROXY header, or comes from no trusted proxy.
    pub fn no_proxy_header(&self) {
        self.proxy_header.inc();
    }

    /// A request got 401: it has no credentials, and the anonymous client may not do what it asks for.
    pub fn missing(&self) {
        self.missing.inc();
    }

    /// A request got 403: its client is known, and may not do what it asks for.
    pub fn role(&self) {
        self.role.inc();
    }

    /// A request got 429: its client sends too many.
    pub fn requests(&self) {
        self.requests.inc();
    }

    /// A connection was refused: its client has too many.
    pub fn connections(&self) {
        self.connections.inc();
    }

    /// A request was refused: its credentials are wrong.
    pub fn wrong_credentials(&self) {
        self.credentials.inc();
    }

    pub(crate) fn too_many_attempts(&self) {
        self.attempts.inc();
    }

    pub(crate) fn too_much_hashing(&self) {
        self.hashing.inc();
    }

    pub(crate) fn checked(&self, is_right: bool) {
        if is_right { &self.right } else { &self.wrong }.inc();
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use prometheus::TextEncoder;

    /// The value of a series, by its name and labels as Prometheus writes them.
    pub(crate) fn value(registry: &Registry, series: &str) -> u64 {
        let text = TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {series} in {text}")).parse().unwrap()
    }

    const SERIES: [&str; 13] = [
        "castier_denied_requests_total{reason=\"credentials\"}",
        "castier_denied_requests_total{reason=\"missing\"}",
        "castier_denied_requests_total{reason=\"role\"}",
        "castier_denied_requests_total{reason=\"attempts\"}",
        "castier_denied_requests_total{reason=\"hashing\"}",
        "castier_denied_requests_total{reason=\"requests\"}",
        "castier_denied_requests_total{reason=\"connections\"}",
        "castier_password_checks_total{result=\"right\"}",
        "castier_password_checks_total{result=\"wrong\"}",
        "castier_access_reload_failures_total{file=\"htpasswd\"}",
        "castier_access_reload_failures_total{file=\"tokens\"}",
        "castier_connections_turned_away_total{reason=\"tls\"}",
        "castier_connections_turned_away_total{reason=\"proxy-protocol\"}",
    ];

    #[test]
    fn every_series_exists_from_the_start_and_counts_its_own() {
        let registry = Registry::new();
        let metrics = Metrics::new(&registry).unwrap();
        assert_eq!(SERIES.map(|series| value(&registry, series)), [0; 13]);
        let count: [fn(&Metrics); 13] = [
            Metrics::wrong_credentials,
            Metrics::missing,
            Metrics::role,
            Metrics::too_many_attempts,
            Metrics::too_much_hashing,
            Metrics::requests,
            Metrics::connections,
            |metrics| metrics.checked(true),
            |metrics| metrics.checked(false),
            |metrics| metrics.reload_failed(false),
            |metrics| metrics.reload_failed(true),
            Metrics::handshake_failed,
            Metrics::no_proxy_header,
        ];
        for (times, count) in (1..).zip(count) {
            (0..times).for_each(|_| count(&metrics));
        }
        assert_eq!(SERIES.map(|series| value(&registry, series)), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]);
        assert!(Metrics::new(&registry).is_err());
    }
}
