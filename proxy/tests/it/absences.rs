//! The memory of remembered absences.

use crate::support::{Blob, Castier, Conn, LyingOrigin, Request, eventually, heavy, metrics};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_remembered_absence_is_small() {
    const ABSENCES: u64 = 20_000;
    let _turn = heavy().await;
    let origin = LyingOrigin::start().await;
    let config = "limits.negative_ttl = \"1h\"\nlimits.max_negative = 100000\nlog.level = \"warn\"";
    let castier = Castier::start(&origin.url(), config).await;
    let ask = async |many: u64| {
        let mut clients = Vec::new();
        for _ in 0..4 {
            let mut conn = Conn::open(castier.public).await;
            clients.push(async move {
                for _ in 0..many / 4 {
                    assert_eq!(conn.ask(&Request::get(Blob::new(10).path())).await.status, 404);
                }
            });
        }
        futures::future::join_all(clients).await;
    };
    ask(400).await;
    let before = castier.memory("VmRSS");
    ask(ABSENCES).await;
    eventually("all have been answered", async || {
        let told = metrics(&castier).await;
        (told.sum("castier_source_loads_total", &[("source", "origin"), ("result", "absent")]) == ABSENCES + 400).then_some(())
    })
    .await;
    let each = castier.memory("VmRSS").saturating_sub(before) / ABSENCES;
    println!("{each} bytes for each absence");
    assert!(each < 2048, "{each} bytes for each absence that is remembered");
}
