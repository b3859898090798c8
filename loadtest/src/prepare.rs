//! Before the load: checks the targets, and stores the corpus.

use crate::{
    client::{Answer, Body, Check, Client, Path, Request},
    corpus::{Corpus, PIECE},
    mix::Op,
    target::Target,
};
use castier_blob::Digest;
use castier_wire as wire;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{task::JoinSet, time::timeout};

/// The timeout for requests that a server can answer at once.
const QUESTION: Duration = Duration::from_secs(5);
/// The concurrent uploads of the corpus: enough to keep an origin's disk busy.
const UPLOADS: usize = 16;

async fn ask(target: &Arc<Target>, op: Op, path: Path<'_>) -> Result<Answer, String> {
    let request = Request::new(op, path, Body::None);
    let mut client = Client::new(Arc::clone(target), true);
    match timeout(QUESTION, client.exchange(&request, &Check::Keep)).await {
        Ok(answer) => answer.map_err(|failure| format!("{}: {failure}; is it running?", target.url)),
        Err(_) => Err(format!("{}: no answer within {QUESTION:?}", target.url)),
    }
}

/// Checks that a target answers, is a content-addressed store and, if the run `deletes`, allows DELETE.
pub(crate) async fn check_target(target: &Arc<Target>, deletes: bool) -> Result<(), String> {
    let not = |what: &str, answer: &Answer| {
        format!("{} is not a content-addressed store: it answered {} to {what}; is it the public port?", target.url, answer.status)
    };
    // Two requests: a web server answers 404 to everything, and a TLS port answers 400 to everything.
    let malformed = ask(target, Op::Get, Path::Plain("/cas/not-a-digest")).await?;
    if malformed.status != 400 {
        return Err(not("GET /cas/not-a-digest, where a store says 400", &malformed));
    }
    // The digest of a blob that nobody has stored. With the process id, since a tier may remember the absence from an earlier run.
    let absent = Digest::of(format!("castier-load {} was never stored", std::process::id()).as_bytes());
    let answer = ask(target, Op::Head, Path::Blob(&absent)).await?;
    if answer.status >= 500 {
        return Err(format!(
            "{}: it answered {} to a blob that nobody stored, where a store says 404: is its origin up?",
            target.url, answer.status
        ));
    }
    if answer.status != 404 {
        return Err(not("a digest that nobody stored, where a store says 404", &answer));
    }
    if deletes {
        let answer = ask(target, Op::Delete, Path::Blob(&absent)).await?;
        if answer.status == 405 {
            return Err(format!("{} does not allow DELETE, which this run needs: set allow_delete = true at its origin", target.url));
        }
    }
    Ok(())
}

/// The sum of `LocalLoads`, the loads from the origin, over the admin interfaces.
pub(crate) async fn origin_loads(admins: &[Arc<Target>]) -> Result<u64, String> {
    let mut sum = 0;
    for admin in admins {
        let answer = ask(admin, Op::Get, Path::Plain("/stats")).await?;
        let stats: Option<serde_json::Value> = serde_json::from_slice(&answer.kept).ok();
        let loads = stats.and_then(|stats| stats.get("LocalLoads").and_then(serde_json::Value::as_u64));
        sum += loads.ok_or_else(|| format!("{}/stats has no LocalLoads: is it the admin port of a castier?", admin.url))?;
    }
    Ok(sum)
}

/// Stores the whole corpus, distributed over the stores. `stored` counts the progress.
pub(crate) async fn store(corpus: &Arc<Corpus>, stores: &[Arc<Target>], limit: Duration, stored: &Arc<AtomicU64>) -> Result<(), String> {
    let next = Arc::new(AtomicUsize::new(0));
    let mut uploads: JoinSet<Result<(), String>> = JoinSet::new();
    for _ in 0..UPLOADS.min(corpus.len()) {
        let (corpus, next, stored) = (Arc::clone(corpus), Arc::clone(&next), Arc::clone(stored));
        let stores = stores.to_vec();
        uploads.spawn(async move {
            let mut clients: Vec<_> = stores.iter().map(|store| Client::new(Arc::clone(store), false)).collect();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= corpus.len() {
                    return Ok(());
                }
                let turn = number % clients.len();
                put(&mut clients[turn], &corpus, number, limit)
                    .await
                    .map_err(|why| format!("cannot store the corpus at {}: {why}", stores[turn].url))?;
                stored.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    while let Some(upload) = uploads.join_next().await {
        upload.map_err(|error| format!("an upload panicked: {error}"))??;
    }
    Ok(())
}

async fn put(client: &mut Client, corpus: &Corpus, number: usize, limit: Duration) -> Result<(), String> {
    let digest = corpus.digest(number);
    let body = corpus.held(number).map_or_else(|| Body::Blob(corpus.blob(number)), Body::Bytes);
    // `Expect` costs a round trip, and the connection if the blob exists. So only for large blobs.
    let ask_first = corpus.size() >= PIECE as u64;
    let request = Request { ask_first, ..Request::new(Op::Put, Path::Blob(&digest), body) };
    let answer = timeout(limit, client.exchange(&request, &Check::Keep)).await;
    let answer = answer.map_err(|_| format!("no answer within {limit:?}"))?.map_err(|failure| failure.to_string())?;
    if Op::Put.succeeded(answer.status) {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&answer.kept);
    Err(format!("PUT {} answered {}: {}", wire::blob_path(&digest), answer.status, text.trim().chars().take(300).collect::<String>()))
}
