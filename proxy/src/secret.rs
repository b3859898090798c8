//! What makes a request a peer's: the shared secret.
//!
//! It travels in the header [`PEER_SECRET`] of every request from peer to peer but `GET /healthz`. A request without it is no peer's,
//! and the peer listener refuses it. It must never be logged, or passed on to the origin.
//!
//! The file holds one secret, or two while one replaces the other: the first line is sent, both are accepted. To change it without an
//! interruption, put the new one second on every node, then first, then alone, each time with a SIGHUP.

use arc_swap::ArcSwap;
use castier_blob::Digest;
use castier_config::{Cluster, peer_secrets};
use http::{HeaderName, HeaderValue};
use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};
use subtle::{Choice, ConstantTimeEq as _};

/// Carries the secret.
pub const PEER_SECRET: HeaderName = HeaderName::from_static("castier-peer-secret");

/// The secrets in force.
pub struct Secrets {
    /// None: there is no secret, and the config has made sure that only this machine can reach the peer listener.
    file: Option<PathBuf>,
    current: ArcSwap<Current>,
}

#[derive(Default)]
struct Current {
    /// Marked as sensitive, so that it prints as such.
    sent: Option<HeaderValue>,
    /// Hashes of what is accepted: of one length, so that comparing them tells nothing, not even that.
    accepted: Vec<Digest>,
}

impl Secrets {
    /// Reads `cluster.secret_file`, if there is one.
    ///
    /// # Errors
    /// A text that says what is wrong with the file.
    pub fn open(config: &Cluster) -> Result<Self, String> {
        let file = (!config.secret_file.as_os_str().is_empty()).then(|| config.secret_file.clone());
        let current = file.as_deref().map(read).transpose()?.unwrap_or_default();
        Ok(Self { file, current: ArcSwap::from_pointee(current) })
    }

    /// Reads the file again. What is in force stays if that fails.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn reload(&self) -> Result<(), String> {
        if let Some(file) = &self.file {
            self.current.store(read(file)?.into());
        }
        Ok(())
    }

    /// The value of [`PEER_SECRET`] in requests to peers; none if there is no secret.
    pub fn to_send(&self) -> Option<HeaderValue> {
        self.current.load().sent.clone()
    }

    /// Whether a request that carries this may be a peer's. Takes equally long for any wrong secret of one length.
    pub fn admit(&self, offered: Option<&[u8]>) -> bool {
        let current = self.current.load();
        if current.accepted.is_empty() {
            return true;
        }
        let Some(offered) = offered.map(Digest::of) else { return false };
        let same = |secret: &Digest| secret.as_bytes().ct_eq(offered.as_bytes());
        current.accepted.iter().map(same).fold(Choice::from(0), |any, one| any | one).into()
    }
}

fn read(file: &Path) -> Result<Current, String> {
    let secrets = peer_secrets(file).map_err(|why| format!("cluster.secret_file: {why}"))?;
    // It cannot be refused: orchestrators mount secrets so.
    if std::fs::metadata(file).is_ok_and(|file| file.permissions().mode() & 0o004 != 0) {
        tracing::warn!(file = %file.display(), "cluster.secret_file can be read by every user of this machine; take that right away (chmod o-r)");
    }
    let value = |secret: &String| {
        let mut value = HeaderValue::from_str(secret).ok()?;
        value.set_sensitive(true);
        Some(value)
    };
    Ok(Current { sent: secrets.first().and_then(value), accepted: secrets.iter().map(|secret| Digest::of(secret.as_bytes())).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "old-old-old-old-old";
    const NEW: &str = "new-new-new-new-new";

    #[test]
    fn secrets_rotate_without_an_interruption() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("secret");
        std::fs::write(&file, OLD).unwrap();
        let secrets = Secrets::open(&Cluster { secret_file: file.clone(), ..Cluster::default() }).unwrap();
        let admitted = |secrets: &Secrets| [OLD, NEW].map(|secret| secrets.admit(Some(secret.as_bytes())));
        assert_eq!((secrets.to_send().unwrap().as_bytes(), admitted(&secrets)), (OLD.as_bytes(), [true, false]));
        for (text, sent, admits) in [
            (format!("{OLD}\n{NEW}\n"), OLD, [true, true]),
            (format!("{NEW}\n{OLD}\n"), NEW, [true, true]),
            (format!("{NEW}\n"), NEW, [false, true]),
        ] {
            std::fs::write(&file, text).unwrap();
            secrets.reload().unwrap();
            assert_eq!((secrets.to_send().unwrap().as_bytes(), admitted(&secrets)), (sent.as_bytes(), admits));
        }
        for broken in ["", "short", "a b c d e f g h i j k l"] {
            std::fs::write(&file, broken).unwrap();
            let why = secrets.reload().unwrap_err();
            assert!(why.starts_with("cluster.secret_file: ") && !why.contains("short"), "{why}");
            assert_eq!(admitted(&secrets), [false, true], "what was in force stays");
        }
        assert!(!format!("{:?}", secrets.to_send()).contains("new"));
    }

    #[test]
    fn only_the_secret_itself_is_admitted() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), OLD).unwrap();
        let secrets = Secrets::open(&Cluster { secret_file: file.path().to_owned(), ..Cluster::default() }).unwrap();
        for wrong in [None, Some(""), Some(&OLD[1..]), Some("old-old-old-old-olD"), Some(&format!("{OLD}x")), Some(NEW)] {
            assert!(!secrets.admit(wrong.map(str::as_bytes)), "{wrong:?}");
        }
        assert!(secrets.admit(Some(OLD.as_bytes())));
    }

    #[test]
    fn without_a_secret_everyone_is_admitted() {
        let secrets = Secrets::open(&Cluster::default()).unwrap();
        secrets.reload().unwrap();
        assert!(secrets.admit(None) && secrets.admit(Some(OLD.as_bytes())) && secrets.to_send().is_none());
    }
}
