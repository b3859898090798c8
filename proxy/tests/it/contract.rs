//! The contract of stores, held by the HTTP client and by the files of the embedded origin, both over the same real origin server.

use castier::metrics::Metrics;
use castier_cache::contract;
use castier_config as config;
use castier_origin::{Options, Origin};
use castier_upstream::{EmbeddedStore, Upstream};
use std::{future::pending, sync::Arc};
use tempfile::TempDir;
use tokio::net::TcpListener;

struct World {
    origin: Origin,
    upstream: Arc<Upstream>,
    metrics: Arc<Metrics>,
    _dir: TempDir,
}

impl World {
    /// A real origin that deletes, and a client of it.
    async fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let options = Options { allow_delete: true, ..Options::from(&config::OriginServer::default()) };
        let origin = Origin::open(dir.path(), options).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        let server = origin.clone();
        tokio::spawn(async move { server.serve(listener, pending()).await });
        let metrics = Arc::new(Metrics::new().unwrap());
        let upstream = Upstream::origin(&url, &config::Origin::default(), metrics.upstream.clone()).unwrap();
        Self { origin, upstream, metrics, _dir: dir }
    }
}

#[tokio::test]
async fn an_origin_over_http_is_a_store() {
    let world = World::new().await;
    assert_eq!(contract::store(&world.upstream.store()).await, contract::Lacks::default());
}

#[tokio::test]
async fn the_embedded_origin_is_a_store() {
    let world = World::new().await;
    let files = world.origin.local(&config::Origin::default());
    let store = EmbeddedStore::new(files, world.upstream.clone());
    assert_eq!(contract::store(&store).await, contract::Lacks::default());
    let state = world.upstream.origin_state().unwrap();
    assert!(state.up && state.requests > 50 && state.errors == 0, "{state:?}");
    assert!(world.metrics.upstream.received_bytes().0 > 3_000_000);
}
