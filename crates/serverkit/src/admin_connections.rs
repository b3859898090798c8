//! The open connections of an admin listener. At its limit, the oldest connection without a request is closed for a new one, so that a
//! health check is answered beside any number of idle connections.

use std::collections::VecDeque;
use tokio::task::AbortHandle;

/// Oldest first.
#[derive(Default)]
pub struct AdminConnections(VecDeque<(Box<dyn Fn() -> bool + Send>, AbortHandle)>);

impl AdminConnections {
    /// Makes sure that one more connection fits among `most`. False if all are busy.
    pub fn admit(&mut self, most: usize) -> bool {
        self.0.retain(|(_, task)| !task.is_finished());
        // The list is what counts: on a busy machine a task that was aborted ends only when it runs again.
        while self.0.len() >= most {
            let Some(idle) = self.0.iter().position(|(is_busy, _)| !is_busy()) else { return false };
            if let Some((_, task)) = self.0.remove(idle) {
                task.abort();
            }
        }
        true
    }

    /// Adds one, with its task, and how to know whether it has a request.
    pub fn add(&mut self, is_busy: impl Fn() -> bool + Send + 'static, task: AbortHandle) {
        self.0.push_back((Box::new(is_busy), task));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_oldest_idle_connection_is_closed() {
        let mut connections = AdminConnections::default();
        let tasks: Vec<_> = (0..3).map(|_| tokio::spawn(std::future::pending::<()>())).collect();
        for (number, task) in tasks.iter().enumerate() {
            assert!(connections.admit(3));
            // The first is busy.
            connections.add(move || number == 0, task.abort_handle());
        }
        assert!(connections.admit(3));
        let [first, second, third] = <[_; 3]>::try_from(tasks).unwrap();
        assert!(second.await.unwrap_err().is_cancelled());
        assert!(!first.is_finished() && !third.is_finished());
        assert!(connections.admit(2) && third.await.unwrap_err().is_cancelled());
        assert!(!connections.admit(1), "only a busy one is left");
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled() && connections.admit(1), "a connection that ended does not count");
    }
}
