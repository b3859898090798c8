//! `--check-config --online`: whether the origin can be reached, and whether it lets castier do what it needs.

use crate::metrics::Metrics;
use castier_blob::Digest;
use castier_bucket::{Bucket, Options};
use castier_cache::{Budget, Source as _};
use castier_config::{self as config, Castier, OriginUrl, Problems};
use castier_upstream::Upstream;
use std::sync::Arc;

/// Asks the origin. An embedded one has nobody to ask.
pub async fn ask(config: Castier) -> Problems {
    match ask_origin(&config).await {
        Ok(problems) => problems,
        Err(why) => {
            // Texts of the parts begin with the key.
            let (key, why) = why.split_once(": ").unwrap_or(("origin.url", &why));
            let mut problems = Problems::default();
            problems.add(key, why);
            problems
        }
    }
}

async fn ask_origin(config: &Castier) -> Result<Problems, String> {
    let mut problems = Problems::default();
    let metrics = Metrics::new().map_err(|error| format!("metrics: {error}"))?;
    match &config.origin.url {
        OriginUrl::Embedded(_) => {}
        OriginUrl::Bucket(url) => return Ok(bucket(url, config, &metrics)?.problems("origin").await),
        OriginUrl::Remote(url) => {
            let origin = Upstream::origin(url, &config.origin, metrics.upstream.clone())?;
            // As at the start: a store of blobs has an answer to this.
            if let Err(fault) = origin.store().stat(&[Digest::EMPTY]).await {
                problems.add("origin.url", format!("does not answer a HEAD of a blob as a store of blobs does: {fault}"));
            }
        }
    }
    Ok(problems)
}

fn bucket(url: &config::Bucket, config: &Castier, metrics: &Metrics) -> Result<Bucket, String> {
    let options = Options {
        memory: Budget::new(config.fill.memory.get()),
        spool: Budget::new(0),
        spool_dir: std::env::temp_dir(),
        allow_delete: config.allow_delete,
        streams: 1,
        metrics: Arc::clone(&metrics.bucket),
    };
    Bucket::new(url, &config.origin, options)
}
