//! Obstacles to files: pipes, directories, permissions, limits, and another castier. Each affects only the blobs concerned.

use crate::support::{
    Blob, Cache, Castier, Download, KIB, LyingOrigin, MIB, Request, assert_hit, assert_ledger,
    disk::{kept, of_disk, scanned},
    eventually, get, light, metrics,
    process::config_text,
    within,
};
use rustix::process::Signal;
use std::{fs, path::Path, process::Command, time::Duration};
use tempfile::TempDir;
use tokio::task::JoinSet;

fn pipe(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

/// Runs castier through a command that changes its rights or limits.
async fn start_under(command: &[&str], origin: &str, config: &str) -> Castier {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("castier.toml");
    fs::write(&path, config_text(origin, config)).unwrap();
    let mut under = Command::new(command[0]);
    under.args(&command[1..]).arg(Castier::program()).arg("--config").arg(&path);
    Castier::run(under, dir).await
}

/// Nobody writes into the pipe, so opening it as a file would block for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipe_at_a_blobs_path_is_no_blob() {
    let _turn = light().await;
    let (origin, cache) = (LyingOrigin::start().await, Cache::new());
    let config = cache.config("1GiB", "");
    let mut castier = Castier::start(&origin.url(), &config).await;
    let [piped, linked, sound] = [200, 210, 220].map(|size| origin.blob(size * KIB));
    for blob in [&piped, &linked, &sound] {
        get(castier.public, blob).await.assert_is(blob);
    }
    kept(&castier, 3).await;
    castier.signal(Signal::TERM);
    castier.exit().await;
    let castier = Castier::start(&origin.url(), &config).await;
    scanned(&castier).await;
    // They are in the index, and are not files any more.
    fs::remove_file(cache.file(&piped)).unwrap();
    pipe(&cache.file(&piped));
    fs::remove_file(cache.file(&linked)).unwrap();
    std::os::unix::fs::symlink(cache.file(&sound), cache.file(&linked)).unwrap();
    let mut clients = JoinSet::new();
    for n in 0..600 {
        let (blob, from) = ([&piped, &linked, &sound][n % 3].clone(), castier.public);
        clients.spawn(async move { Download::default().of(&blob, from).await.assert_is(&blob) });
    }
    within(Duration::from_secs(30), "600 answers", async {
        while let Some(client) = clients.join_next().await {
            client.unwrap();
        }
    })
    .await;
    // New files have replaced them.
    for blob in [&piped, &linked, &sound] {
        eventually("it is kept", async || fs::symlink_metadata(cache.file(blob)).is_ok_and(|there| there.is_file()).then_some(())).await;
        assert_hit(&castier, blob).await;
    }
    assert_eq!((origin.gets(&piped), origin.gets(&linked), origin.gets(&sound)), (2, 2, 1));
    assert_ledger(&castier).await;
}

/// Makes blobs until two belong into the same directory.
fn neighbour(origin: &LyingOrigin, of: &Blob, size: u64) -> Blob {
    loop {
        let blob = Blob::new(size);
        if blob.digest.as_bytes()[0] == of.digest.as_bytes()[0] {
            origin.add(&blob);
            return blob;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_belongs_to_one_path_costs_that_path() {
    let _turn = light().await;
    let (origin, cache) = (LyingOrigin::start().await, Cache::new());
    let config = cache.config("1GiB", "disk.cooldown = \"1h\"");
    let castier = Castier::start(&origin.url(), &config).await;
    scanned(&castier).await;
    // A directory with the name of a blob: it is moved to the quarantine, and the blob is kept.
    let blocked = origin.blob(200 * KIB);
    fs::create_dir(cache.file(&blocked)).unwrap();
    fs::write(cache.file(&blocked).join("somebody's"), "data").unwrap();
    get(castier.public, &blocked).await.assert_is(&blocked);
    kept(&castier, 1).await;
    assert_hit(&castier, &blocked).await;
    let aside = cache.root().join("quarantine").join(format!("{}.directory-0", blocked.digest));
    assert_eq!(fs::read_to_string(aside.join("somebody's")).unwrap(), "data");
    // A file with the name of a subdirectory: only blobs of that subdirectory cannot be kept.
    let lost = loop {
        let blob = origin.blob(100 * KIB);
        if blob.digest.as_bytes()[0] != blocked.digest.as_bytes()[0] {
            break blob;
        }
    };
    let shelf = cache.file(&lost).parent().unwrap().to_owned();
    fs::remove_dir(&shelf).unwrap();
    fs::write(&shelf, "no directory").unwrap();
    for size in [10 * KIB, 100 * KIB] {
        let lost = neighbour(&origin, &lost, size);
        get(castier.public, &lost).await.assert_is(&lost);
    }
    get(castier.public, &lost).await.assert_is(&lost);
    let errors = async |kind| metrics(&castier).await.sum("castier_disk_errors_total", &[("op", "write"), ("kind", kind)]);
    eventually("they are counted", async || (errors("path").await >= 3).then_some(())).await;
    let fine = neighbour(&origin, &blocked, 150 * KIB);
    get(castier.public, &fine).await.assert_is(&fine);
    assert_hit(&castier, &fine).await;
    let said = castier.output();
    assert!(!said.contains("ake room") && !said.contains("read-only for now"), "no such advice fits:\n{said}");
    assert_eq!(metrics(&castier).await.sum("castier_disk_skipped_writes_total", &[("reason", "read_only")]), 0);
    assert_ledger(&castier).await;
}

/// root can write anywhere, so castier runs without that right here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_directory_that_may_not_be_written_to() {
    let _turn = light().await;
    let (origin, cache) = (LyingOrigin::start().await, Cache::new());
    let without = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"];
    if !Command::new(without[0]).args(&without[1..]).arg("true").status().is_ok_and(|status| status.success()) {
        println!("SKIPPED: only root may give up its rights");
        return;
    }
    let castier = start_under(&without, &origin.url(), &cache.config("1GiB", "disk.cooldown = \"1h\"")).await;
    scanned(&castier).await;
    let lost = origin.blob(200 * KIB);
    let shelf = cache.file(&lost).parent().unwrap().to_owned();
    assert!(Command::new("chmod").arg("000").arg(&shelf).status().unwrap().success());
    for _ in 0..3 {
        get(castier.public, &lost).await.assert_is(&lost);
    }
    let errors = async |kind| metrics(&castier).await.sum("castier_disk_errors_total", &[("op", "write"), ("kind", kind)]);
    eventually("it is counted", async || (errors("denied").await > 0).then_some(())).await;
    let fine = loop {
        let blob = origin.blob(200 * KIB);
        if blob.digest.as_bytes()[0] != lost.digest.as_bytes()[0] {
            break blob;
        }
    };
    get(castier.public, &fine).await.assert_is(&fine);
    assert_hit(&castier, &fine).await;
    assert!(!castier.output().contains("ake room"), "{}", castier.output());
    assert!(Command::new("chmod").arg("700").arg(&shelf).status().unwrap().success());
    get(castier.public, &lost).await.assert_is(&lost);
    assert_hit(&castier, &lost).await;
    assert_ledger(&castier).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_on_the_size_of_files_kills_nobody() {
    let _turn = light().await;
    let (origin, cache) = (LyingOrigin::start().await, Cache::new());
    let castier = start_under(&["prlimit", "--fsize=4194304:4194304"], &origin.url(), &cache.config("1GiB", "")).await;
    let [fits, large] = [2 * MIB, 10 * MIB].map(|size| origin.blob(size));
    for _ in 0..3 {
        // Too large for any file: cut or refused, and never a wrong byte.
        Download::default().of(&large, castier.public).await.assert_no_whole_lie(&large);
    }
    get(castier.public, &fits).await.assert_is(&fits);
    assert_hit(&castier, &fits).await;
    let upload = Blob::new(10 * MIB);
    assert_eq!(Request::new("PUT", upload.path()).body(upload.whole()).send(castier.public).await.status, 201);
    let books = metrics(&castier).await;
    assert!(books.sum("castier_disk_errors_total", &[("op", "write"), ("kind", "too_large")]) > 0, "{}", books.text);
    assert_eq!(Request::get("/healthz").send(castier.admin).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn skipped_writes_are_counted_whatever_the_size() {
    let _turn = light().await;
    let (origin, cache) = (LyingOrigin::start().await, Cache::new());
    let castier = Castier::start(&origin.url(), &cache.config("1GiB", "disk.cooldown = \"1h\"")).await;
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k,ro", "tmpfs"]).arg(cache.root().join("tmp")).status();
    if !mounted.is_ok_and(|status| status.success()) {
        println!("SKIPPED: only root may make a directory read-only");
        return;
    }
    let mut skipped = 0;
    for n in 0..4 {
        // The first one notices it.
        let blob = origin.blob(200 * KIB + n);
        get(castier.public, &blob).await.assert_is(&blob);
        let upload = Blob::new(300 * KIB);
        assert_eq!(Request::new("PUT", upload.path()).body(upload.whole()).send(castier.public).await.status, 201);
        skipped = metrics(&castier).await.sum("castier_disk_skipped_writes_total", &[("reason", "read_only")]);
    }
    Command::new("umount").arg("-l").arg(cache.root().join("tmp")).status().unwrap();
    assert!(skipped >= 6, "{skipped}");
}

/// If the directory of a running castier is deleted, it goes on, unless another one has taken the directory by then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_that_is_deleted_under_a_running_castier() {
    let _turn = light().await;
    let (origin, cache) = (LyingOrigin::start().await, Cache::new());
    let root = cache.root().join("cache");
    let config = cache.config("1GiB", "").replace(cache.root().to_str().unwrap(), root.to_str().unwrap());
    let first = Castier::start(&origin.url(), &config).await;
    let before = origin.blob(200 * KIB);
    get(first.public, &before).await.assert_is(&before);
    kept(&first, 1).await;
    fs::remove_dir_all(&root).unwrap();
    // Lost blobs are loaded again, and new blobs are kept.
    for blob in [origin.blob(300 * KIB), before.clone()] {
        get(first.public, &blob).await.assert_is(&blob);
    }
    let there = |blob: &Blob| root.join(&blob.digest.to_string()[..2]).join(blob.digest.to_string()).exists();
    let blob = origin.blob(310 * KIB);
    get(first.public, &blob).await.assert_is(&blob);
    eventually("a new blob is kept", async || there(&blob).then_some(())).await;
    // The directory is the first one's again.
    let refused = Castier::once(|command, dir| {
        let path = dir.join("castier.toml");
        fs::write(&path, config_text(&origin.url(), &config)).unwrap();
        command.arg("--config").arg(path);
    });
    assert_eq!(refused.status.code(), Some(1));
    // Deleted again, and another one takes it before the first one notices.
    fs::remove_dir_all(&root).unwrap();
    let second = Castier::start(&origin.url(), &config).await;
    let theirs = origin.blob(400 * KIB);
    get(second.public, &theirs).await.assert_is(&theirs);
    kept(&second, 1).await;
    for n in 0..3 {
        let blob = origin.blob(500 * KIB + n);
        get(first.public, &blob).await.assert_is(&blob);
        assert!(!there(&blob), "the first one writes into the second one's directory");
    }
    eventually("the first one says so", async || first.output().contains("another process has taken its place").then_some(())).await;
    // It does not delete the other one's files.
    assert_eq!(Request::new("POST", format!("/purge/{}", theirs.digest)).send(first.admin).await.status, 200);
    assert!(there(&theirs));
    assert_hit(&second, &theirs).await;
    assert_eq!(of_disk(&metrics(&second).await, "castier_tier_blobs"), 1);
}
