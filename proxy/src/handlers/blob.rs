//! GET, HEAD and DELETE of a blob.

use super::{Asks, Handlers, Request, peer};
use crate::reply::{Body, Reply};
use castier_blob::Digest;
use castier_cache::{Fault, Hit, Part, SourceKind, Stat, Via};
use castier_wire::{Selection, select};
use http::{Version, header};

impl Handlers {
    pub(super) async fn get(&self, request: &Request<'_>, digest: &Digest) -> Result<Reply, Fault> {
        let select = |size: u64| select(request.method, request.headers, digest, size);
        // Without a length, an HTTP/1.0 client could not tell a cut body from a complete one. Ranges need the size too.
        let needs_size = request.version == Version::HTTP_10
            || request.headers.contains_key(header::RANGE)
            || request.headers.contains_key(header::IF_NONE_MATCH);
        let part = |size: Option<u64>| match size.map(select) {
            None if needs_size => Part::AfterSize,
            None | Some(Selection::Whole) => Part::Whole,
            Some(Selection::Part { first, last }) => Part::Bytes(first..last + 1),
            Some(Selection::NotModified | Selection::Unsatisfiable) => Part::Bytes(0..0),
        };
        let cache = &self.node.cache;
        // What is in this node's outbox is here, though no tier may keep it.
        let kept_only =
            matches!(self.asks, Asks::Peers { .. }) && peer::only_if_cached(request.headers) && self.node.pending(digest).is_none();
        let hit = if kept_only {
            match cache.kept(digest, part).await {
                Some(hit) => Some(hit),
                None => return Ok(Reply::not_kept()),
            }
        } else {
            match self.get_seen(digest, part).await? {
                Some(found) => found,
                None => return Ok(Reply::absent(digest)),
            }
        };
        Ok(match hit {
            Some(Hit { size, via, reader }) => Reply::blob(digest, size, size.map_or(Selection::Whole, select), via, Body::Blob(reader)),
            None if *digest == Digest::EMPTY => empty(select(0)),
            None => Reply::absent(digest),
        })
    }

    /// Gets a blob. If it is kept for others only, asks the origin whether it has the blob too. The outer `None`: it does not.
    async fn get_seen(&self, digest: &Digest, part: impl Fn(Option<u64>) -> Part) -> Result<Option<Option<Hit>>, Fault> {
        // A blob that was published can be hidden again if its file is closed at this moment.
        for _ in 0..3 {
            match self.node.cache.get(digest, self.asker(), &part).await {
                Err(Fault::Hidden) if !self.node.publish_if_stored(digest).await? => return Ok(None),
                Err(Fault::Hidden) => {}
                got => return got.map(Some),
            }
        }
        Err(Fault::Internal("a blob that the origin has stayed hidden".into()))
    }

    pub(super) async fn head(&self, request: &Request<'_>, digest: &Digest) -> Result<Reply, Fault> {
        if matches!(self.asks, Asks::Peers { .. }) && peer::only_if_cached(request.headers) {
            return Ok(peer::known(&self.node, digest).await);
        }
        let select = |size: u64| select(request.method, request.headers, digest, size);
        Ok(match self.node.stat(digest, self.asker()).await? {
            (Stat::Present(size), via) => Reply::blob(digest, size, select(size.unwrap_or(0)), via, Body::Empty),
            (Stat::Absent, _) if *digest == Digest::EMPTY => empty(select(0)),
            (Stat::Absent, _) => Reply::absent(digest),
        })
    }

    pub(super) async fn delete(&self, digest: &Digest) -> Result<Reply, Fault> {
        let deleted = self.node.delete(digest).await?;
        if let Asks::Clients(purge) = &self.asks {
            purge.everywhere(digest).await;
        }
        Ok(if deleted { Reply::done() } else { Reply::absent(digest) })
    }
}

/// The empty blob exists even if the origin does not have it.
fn empty(selection: Selection) -> Reply {
    Reply::blob(&Digest::EMPTY, Some(0), selection, Via::asked(SourceKind::Origin), Body::Empty)
}
