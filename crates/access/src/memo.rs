//! The client of a connection's last request.

use crate::{access::Access, who::Who};
use std::{fmt, sync::Arc, time::Duration};
use subtle::ConstantTimeEq as _;
use tokio::time::Instant;
use zeroize::Zeroizing;

/// Older ones are not used.
const HOLDS_FOR: Duration = Duration::from_secs(60);
/// Longer headers are not kept: every connection can have one.
const LONGEST: usize = 4096;

/// Remembers the `Authorization` header of a connection's last request, and whose it is. So a client that sends the same header with each request over a
/// connection is looked up once a minute. Empty it has 8 bytes.
#[derive(Default)]
pub struct Memo(Option<Box<Kept>>);

struct Kept {
    authorization: Zeroizing<Vec<u8>>,
    who: Arc<Who>,
    since: Instant,
}

impl Memo {
    /// Whose this header is, if it is the kept one, and was kept less than a minute ago and after the last [`Access::reload`]. The comparison takes as
    /// long for a header with the first bytes of the kept one as for any other of its length.
    pub fn recall(&self, access: &Access, authorization: &[u8]) -> Option<Arc<Who>> {
        let kept = self.0.as_ref()?;
        let is_same = bool::from(kept.authorization.as_slice().ct_eq(authorization));
        (is_same && kept.since.elapsed() < HOLDS_FOR && access.is_current(&kept.who)).then(|| kept.who.clone())
    }

    /// Keeps what [`Access::identify`] has returned for this header, instead of what was kept. After a reload in between it is kept in vain.
    pub fn keep(&mut self, authorization: &[u8], who: &Arc<Who>) {
        self.0 = (authorization.len() <= LONGEST).then(|| {
            let authorization = Zeroizing::new(authorization.to_vec());
            Box::new(Kept { authorization, who: who.clone(), since: Instant::now() })
        });
    }
}

impl fmt::Debug for Memo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Memo").field(&self.0.as_ref().map(|kept| kept.who.name())).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        access::tests::{access, basic},
        users::tests::{bcrypted, users},
    };

    fn ann() -> crate::Users {
        users(&format!("ann:{}", bcrypted(b"secret")), "", &[])
    }

    #[test]
    fn an_empty_one_is_small() {
        assert_eq!(size_of::<Memo>(), 8);
    }

    #[tokio::test(start_paused = true)]
    async fn it_recalls_the_same_header_for_a_minute() {
        let (access, _) = access(ann());
        let header = basic(b"ann:secret");
        let who = access.identify(&header, None).await.unwrap();
        let mut memo = Memo::default();
        assert!(memo.recall(&access, &header).is_none() && memo.recall(&access, b"").is_none());
        memo.keep(&header, &who);
        assert!(Arc::ptr_eq(&memo.recall(&access, &header).unwrap(), &who));
        let (last, first) = header.split_last().unwrap();
        for other in [b"", first, &[first, &[last ^ 1]].concat(), &[&header[..], b" "].concat(), &header.to_ascii_lowercase()] {
            assert!(memo.recall(&access, other).is_none(), "{other:?}");
        }
        tokio::time::advance(Duration::from_millis(59_999)).await;
        assert!(memo.recall(&access, &header).is_some());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(memo.recall(&access, &header).is_none());
        memo.keep(&header, &who);
        assert!(memo.recall(&access, &header).is_some());
        memo.keep(b"Bearer x", &who);
        assert!(memo.recall(&access, &header).is_none() && memo.recall(&access, b"Bearer x").is_some());
    }

    #[tokio::test]
    async fn a_reload_makes_it_void_even_between_identify_and_keep() {
        let (access, _) = access(ann());
        let header = basic(b"ann:secret");
        let old = access.identify(&header, None).await.unwrap();
        let mut before = Memo::default();
        before.keep(&header, &old);
        access.reload(ann());
        let mut between = Memo::default();
        between.keep(&header, &old);
        assert!(before.recall(&access, &header).is_none() && between.recall(&access, &header).is_none());
        let new = access.identify(&header, None).await.unwrap();
        between.keep(&header, &new);
        assert!(between.recall(&access, &header).is_some());
    }

    #[tokio::test]
    async fn it_keeps_nothing_that_is_not_of_a_header_or_too_long() {
        let (access, _) = access(ann());
        let mut memo = Memo::default();
        memo.keep(b"x", access.anonymous());
        assert!(memo.recall(&access, b"x").is_none());
        memo.keep(b"x", &access.certificate("ann"));
        assert!(memo.recall(&access, b"x").is_none());
        let who = access.identify(&basic(b"ann:secret"), None).await.unwrap();
        let long = [b'x'; LONGEST + 1];
        memo.keep(&long[1..], &who);
        assert!(memo.recall(&access, &long[1..]).is_some());
        memo.keep(&long, &who);
        assert!(memo.recall(&access, &long).is_none() && memo.0.is_none());
    }

    #[tokio::test]
    async fn debug_shows_the_name_only() {
        let (access, _) = access(ann());
        let header = basic(b"ann:secret");
        let mut memo = Memo::default();
        memo.keep(&header, &access.identify(&header, None).await.unwrap());
        assert_eq!(format!("{memo:?} {:?}", Memo::default()), "Memo(Some(\"ann\")) Memo(None)");
    }
}
