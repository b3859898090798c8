//! An origin that sends given bytes.

use parking_lot::Mutex;
use std::{net::SocketAddr, sync::Arc};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

/// Answers each request head with given bytes, and then reads the next head. It does not handle bodies.
pub(crate) struct RawOrigin {
    pub(crate) addr: SocketAddr,
    seen: Arc<Mutex<Seen>>,
    accepting: JoinHandle<()>,
}

#[derive(Default)]
struct Seen {
    connections: usize,
    heads: Vec<String>,
}

impl Drop for RawOrigin {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl RawOrigin {
    /// `tell` gets each head, and returns the answer.
    pub(crate) async fn start(tell: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static) -> Self {
        let tell = Arc::new(tell);
        Self::serve(TcpListener::bind("127.0.0.1:0").await.unwrap(), move |mut stream, head| {
            let tell = tell.clone();
            async move {
                let told = tell(&head);
                stream.write_all(&told).await.ok().map(|()| stream)
            }
        })
    }

    /// `answer` gets the connection after each head, and returns it if it stays open.
    pub(crate) fn serve<F, A>(listener: TcpListener, answer: F) -> Self
    where
        F: Fn(TcpStream, String) -> A + Send + Sync + 'static,
        A: Future<Output = Option<TcpStream>> + Send,
    {
        let (addr, seen) = (listener.local_addr().unwrap(), Arc::<Mutex<Seen>>::default());
        let (answer, told) = (Arc::new(answer), seen.clone());
        let accepting = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                told.lock().connections += 1;
                let (answer, told) = (answer.clone(), told.clone());
                connections.spawn(async move {
                    let mut stream = Some(stream);
                    while let Some(mut open) = stream.take() {
                        let mut head = Vec::new();
                        while !head.ends_with(b"\r\n\r\n") {
                            match open.read_u8().await {
                                Ok(byte) => head.push(byte),
                                Err(_) => return,
                            }
                        }
                        let head = String::from_utf8_lossy(&head).into_owned();
                        told.lock().heads.push(head.clone());
                        stream = answer(open, head).await;
                    }
                });
            }
        });
        Self { addr, seen, accepting }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    pub(crate) fn connections(&self) -> usize {
        self.seen.lock().connections
    }

    /// The heads of all requests, in order.
    pub(crate) fn heads(&self) -> Vec<String> {
        self.seen.lock().heads.clone()
    }
}
