//! Shipping records to Loki within a bound.
//!
//! `tracing-loki` keeps what it could not send, without limit, and waits without limit for an answer. So it is used in
//! short lives: one layer and its task take at most [`LIFE`] records; then fresh ones take over, and the old task gets
//! [`PATIENCE`] to send what it still has. With Loki away that makes two lives' worth of records, and then records drop.

use parking_lot::RwLock;
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    sync::{Notify, oneshot},
    task::JoinHandle,
};
use tracing::{
    Event, Subscriber,
    span::{Attributes, Id, Record},
};
use tracing_loki::{BackgroundTask, url::Url};
use tracing_subscriber::{layer::Context, registry::LookupSpan};

/// Records that one life may take: some 16 MiB.
const LIFE: usize = 16_384;
/// How long an outgoing task may go on sending.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the end of the program may wait for Loki.
const LAST_PATIENCE: Duration = Duration::from_secs(2);

/// What the layer and the shipper share.
struct Desk {
    /// Dropping a layer tells its task to finish. None once the program ends.
    current: RwLock<Option<tracing_loki::Layer>>,
    /// Records that the current life may still take.
    left: AtomicUsize,
    /// Rung when none is left.
    used_up: Notify,
}

/// Hands records to the current life.
pub(super) struct Layer(Arc<Desk>);

/// The task that looks after the lives.
pub(super) struct Shipper {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

/// Starts shipping to the Loki at `url`.
pub(super) fn ship(url: &str, program: &str) -> Result<(Layer, Shipper), String> {
    let url = Url::parse(url).map_err(|e| e.to_string())?;
    let program = program.to_owned();
    let live = move || {
        tracing_loki::builder().label("program", &program).and_then(|builder| builder.build_url(url.clone())).map_err(|e| e.to_string())
    };
    let (layer, task) = live()?;
    let desk = Arc::new(Desk { current: RwLock::new(Some(layer)), left: AtomicUsize::new(LIFE), used_up: Notify::new() });
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(look_after(Arc::clone(&desk), task, live, stopped));
    Ok((Layer(desk), Shipper { stop, task }))
}

async fn look_after(
    desk: Arc<Desk>,
    mut task: BackgroundTask,
    live: impl Fn() -> Result<(tracing_loki::Layer, BackgroundTask), String>,
    mut stopped: oneshot::Receiver<()>,
) {
    loop {
        tokio::select! {
            () = &mut task => {}
            () = desk.used_up.notified() => {}
            _ = &mut stopped => {
                desk.current.write().take();
                tokio::time::timeout(LAST_PATIENCE, task).await.ok();
                return;
            }
        }
        // What could be built once can be built again; if not, there is no more shipping, and stderr has everything.
        let Ok((layer, next)) = live() else { return };
        *desk.current.write() = Some(layer);
        desk.left.store(LIFE, Relaxed);
        let old = std::mem::replace(&mut task, next);
        let sent = tokio::time::timeout(PATIENCE, old);
        tokio::pin!(sent);
        // The new task runs beside the old one; its layer's own queue is short.
        tokio::select! {
            _ = &mut sent => {}
            () = &mut task => {}
            _ = &mut stopped => {
                desk.current.write().take();
                tokio::time::timeout(LAST_PATIENCE, async { tokio::join!(sent, task) }).await.ok();
                return;
            }
        }
    }
}

impl Shipper {
    /// Sends what there is, within a moment.
    pub(super) async fn close(self) {
        self.stop.send(()).ok();
        self.task.await.ok();
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> tracing_subscriber::Layer<S> for Layer {
    fn on_new_span(&self, attrs: &Attributes<'_>, id: &Id, ctx: Context<'_, S>) {
        if let Some(layer) = self.0.current.read().as_ref() {
            layer.on_new_span(attrs, id, ctx);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, ctx: Context<'_, S>) {
        if let Some(layer) = self.0.current.read().as_ref() {
            layer.on_record(id, values, ctx);
        }
    }

    fn on_event(&self, event: &Event<'_>, ctx: Context<'_, S>) {
        match self.0.left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)) {
            Ok(1) => self.0.used_up.notify_one(),
            Ok(_) => {}
            Err(_) => return,
        }
        if let Some(layer) = self.0.current.read().as_ref() {
            layer.on_event(event, ctx);
        }
    }
}
