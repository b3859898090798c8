//! `--check-config --online`.

use super::{KEY, Weed, castier_origin};
use crate::support::{Port, Ran, Response, Upstream, castier_program, command, run, turn};
use std::{fs, path::Path, time::Instant};
use tempfile::TempDir;

fn check(program: &str, dir: &Path, config: &str) -> Ran {
    fs::write(dir.join("check.toml"), config).unwrap();
    run(command(castier_program().with_file_name(program), dir).args(["--check-config", "--online", "--config", "check.toml"]))
}

/// There is one problem, that of this key, and it says this.
#[track_caller]
fn is_wrong(ran: &Ran, key: &str, says: &str) {
    let lines: Vec<_> = ran.stderr.lines().filter(|line| !line.starts_with("note:")).collect();
    assert!(
        ran.status.code() == Some(2) && lines.len() == 1 && lines[0].starts_with(&format!("{key}: ")) && lines[0].contains(says),
        "{key} {says}: {ran}"
    );
    assert!(!ran.said().contains("sound"), "{ran}");
}

#[test]
fn what_is_wrong_with_a_bucket_is_named() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let dir = TempDir::new().unwrap();
    let wrong = weed.dir.path().join("wrong");
    fs::write(&wrong, "another secret").unwrap();
    let nowhere = Port::free();
    let unreachable = format!("http://{}", nowhere.addr());
    drop(nowhere);
    let good = weed.config("");
    let cases = [
        (weed.config_as("s3://none", KEY, ""), "url", "NoSuchBucket"),
        (weed.config_as("s3://blobs", "nobody", ""), "s3.access_key_id", "InvalidAccessKeyId"),
        (
            good.replace(&weed.dir.path().join("secret").display().to_string(), &wrong.display().to_string()),
            "s3.secret_access_key_file",
            "SignatureDoesNotMatch",
        ),
        (weed.config_as("s3://blobs", "reader", ""), "url", "cannot put: "),
        (good.replace(&weed.proxy.url(), &unreachable), "s3.endpoint", "refused"),
        (good.replace(&weed.proxy.url(), "http://no-such-host.invalid:1"), "s3.endpoint", "unreachable"),
    ];
    for (program, section) in [("castier", "origin"), ("castier-origin", "store")] {
        let own = |config: &str| config.replace("origin.", &format!("{section}."));
        let ran = check(program, dir.path(), &own(&good));
        assert!(ran.success() && ran.stdout.contains("the origin answers"), "{ran}");
        for (config, key, says) in &cases {
            is_wrong(&check(program, dir.path(), &own(config)), &format!("{section}.{key}"), says);
        }
    }
    // Nothing is left there.
    let (_, list) = weed.curl("GET", "/blobs?uploads=", b"");
    assert!(!String::from_utf8_lossy(&list).contains("castier-check"));
    weed.proxy.intercept(|_| Some(Response::new(403).body("<Error><Code>RequestTimeTooSkewed</Code><Message>no</Message></Error>")));
    is_wrong(&check("castier", dir.path(), &good), "the clock of this machine", "set the clock");
    weed.proxy.intercept(|_| None);
    // A profile that is not there.
    let profile = "origin.url = \"s3://blobs\"\norigin.s3.profile = \"none\"\n";
    is_wrong(&check("castier", dir.path(), profile), "origin.s3.profile", "there is no profile");
    weed.proxy.hang();
    let begun = Instant::now();
    is_wrong(&check("castier", dir.path(), &good), "origin.url", "within 10 s");
    assert!(begun.elapsed().as_secs() < 20);
}

#[test]
fn an_origin_over_http_is_asked_as_well() {
    let _turn = turn();
    let dir = TempDir::new().unwrap();
    let (_origin, address, _) = castier_origin(dir.path(), "", |_| {});
    let config = |url: &str| format!("origin.url = \"{url}\"\n");
    assert!(check("castier", dir.path(), &config(&format!("http://{address}"))).success());
    assert!(check("castier", dir.path(), &config("embedded:./x")).success());
    let nowhere = Port::free();
    let url = format!("http://{}", nowhere.addr());
    drop(nowhere);
    is_wrong(&check("castier", dir.path(), &config(&url)), "origin.url", "unreachable");
    let other = Upstream::answering(|_| Response::new(403));
    is_wrong(&check("castier", dir.path(), &config(&other.url())), "origin.url", "HEAD");
    // What is wrong without asking is told first.
    let ran = check("castier", dir.path(), "origin.retries = 1000\n");
    assert!(ran.status.code() == Some(2) && ran.stderr.contains("origin.retries"), "{ran}");
    for more in [&["--online"][..], &["--check-config", "--offline", "--online"]] {
        assert_eq!(run(command(castier_program(), dir.path()).args(more)).status.code(), Some(2), "{more:?}");
    }
}
