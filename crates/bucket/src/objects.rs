//! All objects of a bucket, for a program that copies them.

use crate::{
    blobs::Bucket,
    fault::{fault, unusable},
};
use backon::{BackoffBuilder as _, ExponentialBuilder};
use castier_blob::Digest;
use castier_cache::Fault;
use castier_wire::entry::Name;
use futures::{Stream, StreamExt as _, stream::BoxStream};
use object_store::{ObjectMeta, ObjectStore as _, path::Path};
use percent_encoding::percent_decode_str;
use std::time::Duration;

/// How often a list that breaks is gone on with, without an object in between.
const RETRIES: usize = 6;

/// An object below the bucket's prefix.
#[derive(Debug, PartialEq, Eq)]
pub enum Object {
    /// A blob, and its size.
    Blob(Digest, u64),
    /// An entry, and its size.
    Entry(Name, u64),
    /// Another program's, or one with a key that no blob or entry has. Its key.
    Other(String),
}

impl Bucket {
    /// Lists all objects below the prefix. A list that breaks goes on behind the last object.
    pub fn objects(&self) -> impl Stream<Item = Result<Object, Fault>> + Send + '_ {
        let prefix = Some(self.prefix.trim_end_matches('/')).filter(|prefix| !prefix.is_empty()).map(Path::from);
        let pauses = ExponentialBuilder::default().with_min_delay(Duration::from_millis(200)).with_max_delay(Duration::from_secs(10));
        let pauses = pauses.with_jitter().with_max_times(RETRIES);
        let begin = move |last: Option<&Path>| -> BoxStream<'static, object_store::Result<ObjectMeta>> {
            match last {
                Some(last) => self.store.list_with_offset(prefix.as_ref(), last),
                None => self.store.list(prefix.as_ref()),
            }
        };
        let state = (begin(None), None::<Path>, pauses.build());
        futures::stream::try_unfold(state, move |(mut list, mut last, mut left)| {
            let begin = begin.clone();
            async move {
                loop {
                    match list.next().await {
                        None => return Ok(None),
                        Some(Ok(meta)) => {
                            let object = self.object(&meta);
                            last = Some(meta.location);
                            return Ok(Some((object, (list, last, pauses.build()))));
                        }
                        Some(Err(object_store::Error::InvalidPath { source })) => {
                            return Err(unusable(format!(
                                "LIST: the bucket has an object whose key cannot be read ({source}); use a prefix without it"
                            )));
                        }
                        Some(Err(error)) => {
                            let fault = fault("LIST", &error);
                            let Some(pause) = left.next().filter(|_| fault.is_broken_transfer() || fault.is_source_limit()) else {
                                return Err(fault);
                            };
                            tokio::time::sleep(pause).await;
                            list = begin(last.as_ref());
                        }
                    }
                }
            }
        })
    }

    fn object(&self, meta: &ObjectMeta) -> Object {
        let key = meta.location.as_ref();
        if let Some(digest) = self.digest_of(key) {
            return Object::Blob(digest, meta.size);
        }
        // `object_store` encodes what not every store takes in a key.
        let name = key.strip_prefix(&self.prefix).and_then(|name| percent_decode_str(name).decode_utf8().ok());
        match name.and_then(|name| Name::from_stored(&format!("/{name}"))) {
            Some(name) if !name.is_collection() && self.entry_path(name.as_str()) == meta.location => Object::Entry(name, meta.size),
            _ => Object::Other(key.to_owned()),
        }
    }

    /// The digest of the blob whose object this is.
    pub(crate) fn digest_of(&self, key: &str) -> Option<Digest> {
        Digest::parse(self.key.digest(key.strip_prefix(&self.prefix)?)?.as_bytes()).ok()
    }
}
