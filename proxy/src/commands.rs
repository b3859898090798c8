//! What can be asked of a running castier from the command line.

use super::{Embedded, open_outbox};
use castier::{metrics::Metrics, online_check, routes};
use castier_cache::{Budget, Spools};
use castier_config::{self as config, Castier, OriginUrl};
use castier_outbox::{Outbox, WriteBehind};
use castier_serverkit::{
    health_check::{self, Credentials, Failed},
    log,
    startup::{self, CommonArgs},
};
use serde::Deserialize;
use std::{
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// How often a drain looks whether the outbox is empty.
const LOOK: Duration = Duration::from_millis(200);
/// How often a drain says how much is left.
const TELL: Duration = Duration::from_secs(5);

/// The URL of the admin listener: the one that is named, or that of the configuration.
fn admin_url(args: &CommonArgs, admin: Option<String>) -> String {
    let of_config = || {
        let loaded = args.load_with::<Castier>(config::environment(), |config, problems| drop(routes::check(config, problems))).ok()?;
        let listen = loaded.config.listen;
        Some(if listen.tls.is_on() && listen.tls.admin { format!("https://{}", listen.admin) } else { listen.admin })
    };
    let admin = admin.or_else(of_config).unwrap_or_else(|| "127.0.0.1:8082".into());
    let (scheme, address) = admin.split_once("://").unwrap_or(("http", &admin));
    let address = address.trim_end_matches('/');
    // Every interface is also the loopback.
    match (address.strip_prefix("0.0.0.0:"), address.strip_prefix("[::]:")) {
        (Some(port), _) => format!("{scheme}://127.0.0.1:{port}"),
        (_, Some(port)) => format!("{scheme}://[::1]:{port}"),
        _ => format!("{scheme}://{address}"),
    }
}

/// Prints what a running castier knows about a URL, one fact a line.
pub(super) fn why(url: &str, args: &CommonArgs, admin: Option<String>, credentials: &Credentials) -> ExitCode {
    let encoded = percent_encoding::utf8_percent_encode(url, percent_encoding::NON_ALPHANUMERIC);
    match health_check::get(&format!("{}/why?url={encoded}", admin_url(args, admin)), credentials) {
        Ok(body) => {
            match serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(&body) {
                Ok(facts) => facts
                    .iter()
                    .for_each(|(name, value)| println!("{name:>18}  {}", value.as_str().map_or_else(|| value.to_string(), str::to_owned))),
                Err(_) => println!("{body}"),
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("castier why: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What the admin listener says of the outbox.
#[derive(Deserialize)]
struct Left {
    records: u64,
    bytes: u64,
}

/// Waits until `left` is nothing, and tells how it goes on. False: `limit` is over.
fn wait(limit: Option<Duration>, mut left: impl FnMut() -> Result<Left, String>) -> Result<bool, String> {
    let begun = Instant::now();
    let mut told = None;
    loop {
        let Left { records, bytes } = left()?;
        if records == 0 {
            println!("the outbox is empty");
            return Ok(true);
        }
        if limit.is_some_and(|limit| begun.elapsed() >= limit) {
            eprintln!("castier drain: {records} uploads ({bytes} bytes) are left in the outbox, and the time is over");
            return Ok(false);
        }
        if told.is_none_or(|told: Instant| told.elapsed() >= TELL) {
            println!("{records} uploads ({bytes} bytes) are left in the outbox");
            told = Some(Instant::now());
        }
        std::thread::sleep(LOOK);
    }
}

/// Has the outbox of a running castier uploaded. If none runs, and there is a config file, uploads it from here.
pub(super) fn drain(args: &CommonArgs, admin: Option<String>, credentials: &Credentials, limit: Option<Duration>) -> ExitCode {
    let is_named = admin.is_some();
    let url = format!("{}/drain", admin_url(args, admin));
    let read = |body: String| serde_json::from_str::<Left>(&body).map_err(|error| format!("{url}: {error}"));
    let outcome = match health_check::post(&url, credentials) {
        Err(Failed::Refused(_)) if args.config.is_some() && !is_named => {
            let load = || args.load_with(config::environment(), |config, problems| drop(routes::check(config, problems)));
            let ask = ("origin.url", online_check::ask);
            return startup::main(super::PROGRAM, args, load, ask, move |config| drain_here(config, limit));
        }
        Err(failed) => Err(failed.to_string()),
        Ok(body) => {
            read(body).and_then(|_| wait(limit, || read(health_check::get(&url, credentials).map_err(|failed| failed.to_string())?)))
        }
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("castier drain: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Uploads what is in the outbox of this config, without serving anybody.
async fn drain_here(config: Castier, limit: Option<Duration>) -> Result<(), String> {
    let log = log::init(&config.log, super::PROGRAM).map_err(|error| error.to_string())?;
    let metrics = Metrics::new().map_err(|error| format!("metrics: {error}"))?;
    let (Some(outbox), OriginUrl::Bucket(url), Some(disk)) = (open_outbox(&config, &metrics).await?, &config.origin.url, &config.disk)
    else {
        println!("there is no outbox: origin.write is \"through\"");
        return Ok(());
    };
    let spools = Spools::new(&config, Budget::new(config.fill.memory.get()), metrics.cache.clone());
    let bucket = Embedded::bucket(url, &config, &spools, &metrics)?;
    let behind = WriteBehind::new(bucket.clone(), outbox.clone(), false);
    behind.connect(bucket.clone(), None);
    let (stop, stopped) = watch::channel(false);
    let uploading =
        tokio::spawn(behind.uploader(disk.outbox_workers, config.limits.max_entry.get(), stopped).map_err(|fault| fault.to_string())?);
    let waiting: Arc<Outbox> = outbox.clone();
    let done = tokio::task::spawn_blocking(move || wait(limit, || Ok(Left { records: waiting.len() as u64, bytes: waiting.bytes() })));
    let done = done.await.map_err(|error| error.to_string())??;
    stop.send_replace(true);
    uploading.await.ok();
    bucket.close(super::ABORT).await;
    log.close().await;
    if done { Ok(()) } else { Err("the outbox is not empty".into()) }
}
