//! Coalesces questions to upstreams: all who ask the same with the same right wait for the same answer.

use super::client::Head;
use bytes::Bytes;
use castier_blob::Digest;
use castier_cache::{Begun, Fault, Resource};
use castier_upstream::{trace, via_header};
use futures::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use http::Method;
use parking_lot::Mutex;
use std::{collections::HashMap, sync::Arc};

/// What an upstream said.
#[derive(Clone)]
pub(super) enum Said {
    /// A 2xx to a HEAD.
    Yes(Arc<Head>),
    /// What is kept holds still.
    NotModified,
    /// Somebody else's question was answered meanwhile: what is kept, or comes, is newer than the request.
    Newer,
    /// A body comes. Its flight has begun, and keeps a place for the request that asked.
    Coming(Arc<Head>, Resource, Arc<Mutex<Option<Begun>>>),
    /// Anything else, with its body, to be passed on.
    Other(Arc<Head>, Bytes),
}

/// Answers by the question, by who asked it.
pub(super) type Answer = (Credentials, Result<Said, Fault>);

/// Whose credentials a question has: a keyed hash; 0 without any. With castier's own it is 0 too.
pub(super) type Credentials = u64;

/// Which question it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Question {
    /// The name of what is asked for, or a random one to ask alone.
    pub(super) about: Digest,
    /// The count of changes of the path. Who asks after a change does not wait for an answer of before.
    pub(super) since: u64,
    pub(super) method: Method,
    /// `None`: any credentials that have been admitted, since the answer is the same for all of them.
    pub(super) credentials: Option<Credentials>,
    /// It may wait for another node. One that another node waits for must not wait for such a question.
    pub(super) asks_peers: bool,
}

/// The questions on their way.
#[derive(Default)]
pub(super) struct Questions(Mutex<HashMap<Question, Shared<BoxFuture<'static, Answer>>>>);

impl Questions {
    /// Asks, or waits for the answer to the same question. The question has its own task, so a client that leaves ends nobody else's.
    pub(super) async fn ask(self: &Arc<Self>, question: Question, ask: impl FnOnce() -> BoxFuture<'static, Answer>) -> (bool, Answer) {
        let (is_first, answer) = {
            let mut map = self.0.lock();
            // An answer to anybody's credentials is good for those that have been admitted.
            let same = |other: &Question| {
                let Question { about, since, method, credentials, asks_peers } = other;
                let is_same =
                    (about, since, method, asks_peers) == (&question.about, &question.since, &question.method, &question.asks_peers);
                is_same && (question.credentials.is_none() || *credentials == question.credentials)
            };
            let running = map.iter().find(|(other, _)| same(other)).map(|(_, answer)| answer.clone());
            match running {
                Some(answer) => (false, answer),
                None => {
                    // What the request says of its way goes upstream with the question.
                    let (via, trace) = (via_header::current(), trace::current());
                    let asked = via_header::along(via, trace::along(trace, ask()));
                    let (questions, about) = (self.clone(), question.clone());
                    let task = tokio::spawn(async move {
                        // Also if the question panics: else everybody would wait for it for ever.
                        let end = End(&questions, &about);
                        let answer = asked.await;
                        drop(end);
                        answer
                    });
                    let lost = |_| (0, Err(Fault::Internal("a question to an upstream was lost".into())));
                    let answer = task.map(move |answer| answer.unwrap_or_else(lost)).boxed().shared();
                    map.insert(question, answer.clone());
                    (true, answer)
                }
            }
        };
        (is_first, answer.await)
    }

    /// Whether a body is being asked for with other credentials than these.
    pub(super) fn is_asked_by_others(&self, about: &Digest, who: Credentials) -> bool {
        let map = self.0.lock();
        let mut others = map.keys().filter(|question| question.about == *about && question.method == Method::GET);
        others.any(|question| question.credentials != Some(who))
    }
}

struct End<'a>(&'a Questions, &'a Question);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.0.lock().remove(self.1);
    }
}
