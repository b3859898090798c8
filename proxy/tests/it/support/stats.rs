//! The ledger: castier's counters, and the check of its equations.

use super::{Castier, Request, eventually};
use std::{net::SocketAddr, time::Duration};

/// One reading of `/metrics`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Metrics {
    /// All series with their labels, and their values.
    series: Vec<(String, f64)>,
    pub(crate) text: String,
}

impl Metrics {
    /// The sum over all series of this name with these labels; 0 if there are none.
    pub(crate) fn sum(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        let fits = |series: &str| {
            let (own, rest) = series.split_once('{').unwrap_or((series, ""));
            own == name && labels.iter().all(|(key, value)| rest.contains(&format!("{key}=\"{value}\"")))
        };
        self.series.iter().filter(|(series, _)| fits(series)).map(|(_, value)| *value as u64).sum()
    }

    pub(crate) fn total(&self, name: &str) -> u64 {
        self.sum(name, &[])
    }

    /// The results of loads from the origin: ok, absent, error.
    pub(crate) fn source_loads(&self) -> [u64; 3] {
        ["ok", "absent", "error"].map(|result| self.sum("castier_source_loads_total", &[("source", "origin"), ("result", result)]))
    }

    pub(crate) fn corrupt(&self, source: &str) -> u64 {
        self.sum("castier_corrupt_blobs_total", &[("source", source)])
    }

    pub(crate) fn resumes(&self) -> u64 {
        self.sum("castier_source_resumes_total", &[("source", "origin")])
    }

    /// The number of blobs in memory.
    pub(crate) fn kept(&self) -> u64 {
        self.sum("castier_tier_blobs", &[("tier", "memory")])
    }

    /// All series with their labels, and their values.
    pub(crate) fn figures(&self) -> impl Iterator<Item = (&str, f64)> {
        self.series.iter().map(|(series, value)| (series.as_str(), *value))
    }

    pub(crate) fn series(&self) -> impl Iterator<Item = &str> {
        self.series.iter().map(|(series, _)| series.as_str())
    }

    /// The series that a request or a flight changes.
    fn moving(&self) -> Vec<(String, f64)> {
        let moving =
            ["castier_gets", "castier_hits", "castier_loads", "castier_flight", "castier_collapsed", "castier_source", "castier_http"];
        self.series.iter().filter(|(series, _)| moving.iter().any(|name| series.starts_with(name))).cloned().collect()
    }
}

pub(crate) async fn metrics(castier: &Castier) -> Metrics {
    metrics_at(castier.admin).await
}

/// The metrics of the program with this admin listener.
pub(crate) async fn metrics_at(admin: SocketAddr) -> Metrics {
    let reply = Request::get("/metrics").send(admin).await;
    assert_eq!(reply.status, 200);
    let text = String::from_utf8(reply.body).unwrap();
    let parse = |line: &str| {
        let (series, value) = line.rsplit_once(' ').expect("a series and its value");
        (series.to_owned(), value.parse().expect("a number"))
    };
    let series = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(parse).collect();
    Metrics { series, text }
}

pub(crate) async fn stats(castier: &Castier) -> serde_json::Value {
    let reply = Request::get("/stats").send(castier.admin).await;
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")));
    serde_json::from_slice(&reply.body).unwrap()
}

/// Waits until no flight is in progress and no counter changes any more.
pub(crate) async fn quiet(castier: &Castier) -> Metrics {
    eventually("a quiet moment", async || {
        let before = metrics(castier).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = metrics(castier).await;
        let at_rest = now.total("castier_flights_in_progress") == 0 && now.total("castier_flight_followers") == 0;
        (at_rest && before.moving() == now.moving()).then_some(now)
    })
    .await
}

/// Checks the equations of the ledger, and that `/stats` agrees. Returns the figures.
pub(crate) async fn assert_ledger(castier: &Castier) -> Metrics {
    let now = quiet(castier).await;
    let [gets, hits, loads, flights, collapsed] =
        ["castier_gets_total", "castier_hits_total", "castier_loads_total", "castier_flights_total", "castier_collapsed_total"]
            .map(|name| now.total(name));
    let ends: u64 = now.total("castier_source_loads_total");
    let figures =
        format!("gets {gets}, hits {hits}, loads {loads}, flights {flights}, collapsed {collapsed}, ends {ends} {:?}", now.source_loads());
    assert_eq!(gets, hits + loads, "gets = hits + loads: {figures}");
    assert_eq!(loads, flights + collapsed, "loads = flights + collapsed: {figures}");
    assert_eq!(flights, ends, "every flight ends in one of ok, absent, error: {figures}");
    let stats = stats(castier).await;
    let told = ["Gets", "CacheHits", "Loads", "LoadsDeduped"].map(|name| stats[name].as_u64().unwrap_or_else(|| panic!("{name}: {stats}")));
    assert_eq!(told, [gets, hits, loads, flights], "/stats tells another story: {figures}; {stats}");
    now
}
