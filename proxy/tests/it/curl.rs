//! The real curl, with the options that people use.

use crate::support::{Blob, Castier, LyingOrigin, MIB, RealOrigin, assert_ledger, light};
use std::process::Command;
use tempfile::TempDir;

/// Runs curl off the async threads. Returns its standard output.
async fn curl(arguments: &[&str]) -> Vec<u8> {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--max-time", "50", "--noproxy", "*"]).args(arguments);
    tokio::task::spawn_blocking(move || {
        let output = command.output().expect("curl is installed");
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    })
    .await
    .unwrap()
}

async fn curl_text(arguments: &[&str]) -> String {
    String::from_utf8_lossy(&curl(arguments).await).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_version_and_connection() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    let small = origin.blob(1000);
    let large = origin.blob(3 * MIB);
    for blob in [&small, &large] {
        let url = format!("http://{}{}", castier.public, blob.path());
        for version in ["--http1.0", "--http1.1"] {
            for _ in ["cold", "warm"] {
                assert!(curl(&[version, &url]).await == blob.whole(), "{version} {url}");
            }
            assert_eq!(curl(&[version, "-r", "10-29", &url]).await, blob.bytes(10, 30));
            assert!(curl_text(&[version, "-I", &url]).await.contains("200 OK"));
        }
        // Two transfers, one connection.
        let reuse = curl_text(&["-o", "/dev/null", "-o", "/dev/null", "-w", "%{num_connects},", &url, &url]).await;
        assert_eq!(reuse, "1,0,", "{url}");
        // As a proxy would be asked: the target in absolute form. (--proxy takes precedence over --noproxy's list here.)
        let proxied =
            curl(&["--noproxy", "", "-x", &format!("http://{}", castier.public), &format!("http://cas.test{}", blob.path())]).await;
        assert!(proxied == blob.whole());
    }
    assert_ledger(&castier).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn put_post_and_forms() {
    let _turn = light().await;
    let origin = RealOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("file");
    let file = file.to_str().unwrap();
    let base = format!("http://{}", castier.public);
    let code = ["-w", "%{http_code}", "-o", "/dev/null"];
    for size in [0, 10, 2 * MIB, 12 * MIB] {
        // curl sends `Expect: 100-continue` by itself where the body is large.
        let blob = Blob::new(size);
        std::fs::write(file, blob.whole()).unwrap();
        let url = format!("{base}{}", blob.path());
        assert_eq!(curl_text(&[&code[..], &["-T", file, &url]].concat()).await, "201");
        assert_eq!(curl_text(&[&code[..], &["-T", file, &url]].concat()).await, "200");
        let stdin = format!("@{file}");
        let chunked = [&code[..], &["-X", "PUT", "-H", "Transfer-Encoding: chunked", "--data-binary", &stdin, &url]].concat();
        assert_eq!(curl_text(&chunked).await, "200");
        assert!(curl(&[&url]).await == blob.whole());

        let other = Blob::new(size + 1);
        std::fs::write(file, other.whole()).unwrap();
        let form = curl_text(&["-F", &format!("file=@{file}"), &format!("{base}/cas")]).await;
        assert!(form.contains(&other.digest.to_string()), "{form}");
        let raw = curl_text(&["--data-binary", &stdin, "-H", "Content-Type: application/octet-stream", &format!("{base}/cas")]).await;
        assert!(raw.contains(&format!("\"size\":{}", size + 1)), "{raw}");
        assert!(curl(&[&format!("{base}{}", other.path())]).await == other.whole());
        // A download that broke off goes on where it stopped.
        let partial = dir.path().join("partial");
        let partial = partial.to_str().unwrap();
        std::fs::write(partial, other.bytes(0, other.size / 2)).unwrap();
        curl(&["-C", "-", "-o", partial, &format!("{base}{}", other.path())]).await;
        assert!(std::fs::read(partial).unwrap() == other.whole());
    }
    assert_ledger(&castier).await;
}
