//! The status page in a real browser, for a real cluster under load. `page/drive.mjs` checks the page; this file changes the cluster.

use crate::support::{Blob, Castier, Cluster, Conn, KIB, LyingOrigin, Request, light};
use std::{
    env,
    io::Write as _,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    process::Command,
    task::JoinHandle,
};

/// Longer than the browser's own timeouts, so that its message is the failure. All steps together take some 40 seconds.
const LIMIT: Duration = Duration::from_secs(300);

/// The browser, and the folder of its driver. If they are missing, prints a line and returns `None`.
fn browser() -> Option<(PathBuf, PathBuf)> {
    let path = env::var_os("PATH").unwrap_or_default();
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let program = env::split_paths(&path).flat_map(|folder| names.map(|name| folder.join(name))).find(|file| file.is_file());
    let tools = Path::new(Castier::program()).parent()?.parent()?.join("test-tools/browser");
    let driven = tools.join("node_modules/playwright-core").is_dir() && tools.join("node_modules/axe-core").is_dir();
    let found = program.filter(|_| driven).map(|program| (program, tools));
    if found.is_none() {
        std::io::stderr().write_all(b"SKIPPED: chromium, or what drives it, is not installed (scripts/setup-tests)\n").unwrap();
    }
    found
}

/// A client that requests blobs in the tiers and, each fifth time, an absent blob, so that castier asks the origin.
fn traffic(node: SocketAddr, kept: Vec<Blob>) -> JoinHandle<()> {
    tokio::spawn(async move {
        for (turn, blob) in kept.iter().cycle().enumerate() {
            let path = if turn % 5 == 0 { Blob::of(format!("absent {turn}").as_bytes()).path() } else { blob.path() };
            // The node may be gone. That is for the page to say.
            if let Ok(mut connection) = Conn::try_open(node).await {
                connection.ask(&Request::get(path).header("Connection", "close")).await;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
}

#[tokio::test]
async fn a_browser_sees_what_is_right_and_what_is_wrong() {
    let Some((browser, tools)) = browser() else { return };
    let _turn = light().await;
    let mut origin = LyingOrigin::start().await;
    let kept = (0..5).map(|_| origin.blob(100 * KIB)).collect();
    let mut cluster = Cluster::with_secret(2, &origin.url(), "origin.connect_timeout = \"1s\"").await;
    let clients = traffic(cluster.nodes[0].public(), kept);

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/page/drive.mjs");
    let address = format!("http://{}/", cluster.nodes[0].castier().admin);
    let mut driver = Command::new("node")
        .arg(script)
        .arg(tools)
        .arg(browser)
        .args([&address, &cluster.nodes[1].name])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let (mut done, asked, mut said) = (driver.stdin.take().unwrap(), driver.stdout.take().unwrap(), driver.stderr.take().unwrap());
    let told = tokio::spawn(async move {
        let mut text = String::new();
        said.read_to_string(&mut text).await.unwrap();
        text
    });
    let mut asked = BufReader::new(asked).lines();
    let steps = async {
        while let Some(line) = asked.next_line().await.unwrap() {
            match line.as_str() {
                "please stop-origin" => origin.down().await,
                "please start-origin" => origin.up().await,
                "please kill-peer" => cluster.nodes[1].kill().await,
                "please stop-castier" => cluster.nodes[0].terminate().await,
                "please start-castier" => cluster.nodes[0].start().await,
                other => panic!("drive.mjs says {other}"),
            }
            done.write_all(b"done\n").await.unwrap();
        }
        driver.wait().await.unwrap()
    };
    let status = tokio::time::timeout(LIMIT, steps).await;
    drop(driver);
    clients.abort();
    let told = told.await.unwrap();
    assert!(status.is_ok_and(|status| status.success()), "{told}");
}
