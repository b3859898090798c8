//! Proofs of access, for routes where the upstream decides: who may be given a kept body.
//!
//! Two facts are kept apart, and a body is handed out without a question only when both hold:
//!
//! - *Membership*: this repository has this body. It does not depend on credentials. Known from a 2xx for the body in that repository, or from a manifest of the
//!   repository that lists it.
//! - *Admission*: these credentials may read this repository. Known from any 2xx in it, for a time (`proof_ttl`). No credentials are credentials too.
//!
//! Neither follows from the other: a client that may read one repository must not get a body that only another one has, although castier keeps it.

use castier_blob::Digest;
use hmac::{Hmac, KeyInit as _, Mac as _};
use moka::sync::Cache;
use sha2::Sha256;
use std::time::{Duration, Instant};

/// The facts. Both kinds are bounded in number; what was used longest ago goes first, and is asked for again.
pub struct Proofs {
    /// Membership: the hash of repository and digest.
    members: Cache<Digest, ()>,
    /// Admission: the keyed hash of repository and credentials, and when it was proved last.
    admitted: Cache<Digest, Instant>,
    /// Makes those hashes. Its key is random and never leaves it: credentials cannot be guessed from what is kept.
    keyed: Hmac<Sha256>,
}

impl Proofs {
    /// Nothing is proved yet. Keeps at most this many facts of each kind, some 200 bytes each.
    pub fn new(most: u64) -> Self {
        Self { members: Cache::new(most), admitted: Cache::new(most), keyed: Hmac::new(&rand::random::<[u8; 64]>().into()) }
    }

    /// The upstream has shown that this repository has this body.
    pub fn add_member(&self, repository: &str, digest: &Digest) {
        self.members.insert(member(repository, digest), ());
    }

    /// The upstream has shown that it no longer has it.
    pub fn remove_member(&self, repository: &str, digest: &Digest) {
        self.members.remove(&member(repository, digest));
    }

    /// Whether this repository is known to have this body.
    pub fn is_member(&self, repository: &str, digest: &Digest) -> bool {
        self.members.contains_key(&member(repository, digest))
    }

    /// The upstream has answered these credentials with a 2xx in this repository, at `now`. `credentials`: the value of `Authorization`.
    pub fn admit(&self, repository: &str, credentials: Option<&[u8]>, now: Instant) {
        self.admitted.insert(self.admission(repository, credentials), now);
    }

    /// The upstream has refused these credentials in this repository.
    pub fn refuse(&self, repository: &str, credentials: Option<&[u8]>) {
        self.admitted.remove(&self.admission(repository, credentials));
    }

    /// Whether these credentials were admitted to this repository less than `ttl` before `now`.
    pub fn is_admitted(&self, repository: &str, credentials: Option<&[u8]>, ttl: Duration, now: Instant) -> bool {
        let proved = self.admitted.get(&self.admission(repository, credentials));
        proved.is_some_and(|proved| now.saturating_duration_since(proved) < ttl)
    }

    fn admission(&self, repository: &str, credentials: Option<&[u8]>) -> Digest {
        let mut mac = self.keyed.clone();
        mac.update(&(repository.len() as u64).to_le_bytes());
        mac.update(repository.as_bytes());
        // No credentials are not the same as empty ones.
        mac.update(&[u8::from(credentials.is_some())]);
        mac.update(credentials.unwrap_or_default());
        Digest::from_bytes(mac.finalize().into_bytes().into())
    }
}

fn member(repository: &str, digest: &Digest) -> Digest {
    Digest::of(&[digest.as_bytes(), repository.as_bytes()].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(60);

    #[test]
    fn neither_fact_follows_from_the_other() {
        let (proofs, now) = (Proofs::new(1000), Instant::now());
        let (public, private) = ("registry.example/public", "registry.example/private");
        let (ann, bob) = (Some(&b"Basic ann"[..]), Some(&b"Basic bob"[..]));
        let (shared, secret) = (Digest::of(b"shared"), Digest::of(b"secret"));
        proofs.add_member(public, &shared);
        proofs.add_member(private, &shared);
        proofs.add_member(private, &secret);
        proofs.admit(public, None, now);
        proofs.admit(private, ann, now);
        let serves = |repository, digest, credentials| {
            proofs.is_member(repository, digest) && proofs.is_admitted(repository, credentials, TTL, now + Duration::from_secs(59))
        };
        for (repository, digest, credentials, expected) in [
            (public, &shared, None, true),
            (public, &secret, None, false),
            (public, &shared, ann, false),
            (private, &shared, ann, true),
            (private, &secret, ann, true),
            (private, &secret, None, false),
            (private, &secret, bob, false),
            (private, &secret, Some(&b""[..]), false),
            ("registry.example/privat", &secret, ann, false),
        ] {
            assert_eq!(serves(repository, digest, credentials), expected, "{repository} {credentials:?}");
        }
        assert!(!proofs.is_admitted("", None, TTL, now) && !proofs.is_member("", &shared));
    }

    #[test]
    fn admission_ends() {
        let (proofs, now) = (Proofs::new(1000), Instant::now());
        let admitted = |after: u64| proofs.is_admitted("a", None, TTL, now + Duration::from_secs(after));
        proofs.admit("a", None, now);
        assert!(admitted(0) && admitted(59) && !admitted(60));
        proofs.admit("a", None, now + TTL);
        assert!(admitted(60) && admitted(119) && !admitted(120));
        proofs.refuse("a", None);
        assert!(!admitted(60));
        proofs.add_member("a", &Digest::EMPTY);
        proofs.remove_member("a", &Digest::EMPTY);
        assert!(!proofs.is_member("a", &Digest::EMPTY));
    }

    #[test]
    fn no_two_pairs_are_the_same_and_nobody_can_guess() {
        let proofs = Proofs::new(1000);
        assert_ne!(proofs.admission("ab", Some(b"c")), proofs.admission("a", Some(b"bc")));
        assert_ne!(proofs.admission("a", Some(b"b")), Proofs::new(1000).admission("a", Some(b"b")));
    }

    #[test]
    fn they_are_bounded() {
        let (proofs, now) = (Proofs::new(100), Instant::now());
        for number in 0..10_000_u64 {
            proofs.add_member("a", &Digest::of(&number.to_le_bytes()));
            proofs.admit("a", Some(&number.to_le_bytes()), now);
        }
        proofs.members.run_pending_tasks();
        proofs.admitted.run_pending_tasks();
        assert!(proofs.members.entry_count() <= 100 && proofs.admitted.entry_count() <= 100);
    }
}
