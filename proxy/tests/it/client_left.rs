//! castier notices that a client has left, even if the client had sent further requests ahead.

use crate::support::{Castier, Conn, Gate, KIB, Lie, LyingOrigin, MuteOrigin, Request, eventually, light, metrics};
use tokio::{io::AsyncWriteExt as _, net::TcpStream};

/// How a client leaves.
#[derive(Clone, Copy, Debug)]
enum Leave {
    Fin,
    Reset,
}

async fn leave(mut stream: TcpStream, how: Leave) {
    match how {
        Leave::Fin => stream.shutdown().await.unwrap(),
        Leave::Reset => stream.set_zero_linger().unwrap(),
    }
}

/// Requests of this many bytes in total.
fn requests(first: &str, bytes: usize) -> Vec<u8> {
    let request = format!("GET {first} HTTP/1.1\r\nHost: castier.test\r\n\r\n");
    let next = b"GET /next HTTP/1.1\r\nHost: castier.test\r\n\r\n";
    request.bytes().chain(next.iter().copied().cycle()).take(request.len() + bytes).collect()
}

#[tokio::test]
async fn a_relay_ends() {
    let _turn = light().await;
    for how in [Leave::Fin, Leave::Reset] {
        for behind in [0, 1, 5_000, 64 * KIB as usize, 100_000] {
            let origin = MuteOrigin::start().await;
            let castier = Castier::start(&origin.url, "origin.read_timeout = \"10m\"").await;
            let mut stream = TcpStream::connect(castier.public).await.unwrap();
            stream.write_all(&requests("/silence", behind)).await.unwrap();
            eventually("the relay waits", async || (origin.waiting() == 1).then_some(())).await;
            leave(stream, how).await;
            eventually(&format!("{how:?} behind {behind} bytes ends the relay"), async || (origin.waiting() == 0).then_some(())).await;
        }
    }
}

#[tokio::test]
async fn a_cold_get_ends() {
    let _turn = light().await;
    for how in [Leave::Fin, Leave::Reset] {
        for behind in [0, 1, 5_000, 64 * KIB as usize] {
            let origin = LyingOrigin::start().await;
            let castier = Castier::start(&origin.url(), "origin.read_timeout = \"10m\"").await;
            let gate = Gate::new();
            let blob = origin.blob_with(100 * KIB, [Lie::honest().hold(&gate)]);
            let mut stream = TcpStream::connect(castier.public).await.unwrap();
            stream.write_all(&requests(&blob.path(), behind)).await.unwrap();
            eventually("the origin is asked", async || (gate.arrived() == 1).then_some(())).await;
            leave(stream, how).await;
            eventually(&format!("{how:?} behind {behind} bytes ends the GET"), async || {
                (metrics(&castier).await.total("castier_connections") == 0).then_some(())
            })
            .await;
            gate.open();
        }
    }
}

#[tokio::test]
async fn what_was_sent_ahead_is_answered_in_order() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    // More than is read ahead, with bodies that look like requests.
    let mut conn = Conn::open(castier.public).await;
    let mut all = Vec::new();
    for n in 0..200 {
        let body = format!("GET /wrong/{n} HTTP/1.1\r\nHost: x\r\n\r\n").repeat(1 + n % 7);
        all.extend_from_slice(&Request::new("POST", format!("/echo/{n}")).body(body).bytes());
    }
    let sent = conn.send(&all);
    assert!(sent.await);
    for n in 0..200 {
        let reply = conn.reply("POST").await;
        assert_eq!((reply.status, reply.body), (200, format!("GET /wrong/{n} HTTP/1.1\r\nHost: x\r\n\r\n").repeat(1 + n % 7).into_bytes()));
    }
}
