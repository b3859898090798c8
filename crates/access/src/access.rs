//! From an `Authorization` header to a client.
//!
//! 1. A verdict about the same credentials, if there is a fresh one. Verdicts are found by an HMAC, with a random key: what is kept does not help to guess.
//!    The HMAC covers what the credentials were compared with as well, so that verdicts stay true when the users are read again.
//! 2. Else the address must be allowed an attempt (`failures`). Who brings the same credentials meanwhile makes none, and waits for the same verdict.
//! 3. The attempt is a task of its own. A client that closes its connection does not end it: its slot stays taken, and the verdict is kept for the next try.
//! 4. Passwords are checked on the blocking pool, few at once.
//! 5. A refusal is delayed.

use crate::{
    failures::Failures,
    metrics::Metrics,
    users::{TokenHash, Users},
    who::Who,
};
use arc_swap::ArcSwap;
use castier_config::Role;
use data_encoding::BASE64;
use hmac::{Hmac, KeyInit as _, Mac as _};
use moka::future::Cache;
use sha2::{Digest as _, Sha256};
use std::{fmt, net::IpAddr, sync::Arc, thread, time::Duration};
use tokio::{sync::Semaphore, task::spawn_blocking, time::Instant};
use zeroize::Zeroizing;

/// As many verdicts are kept. Each costs some 200 bytes.
const MOST_VERDICTS: u64 = 10_000;
const RIGHT_FOR: Duration = Duration::from_secs(60);
const WRONG_FOR: Duration = Duration::from_secs(10);
/// As many passwords wait to be checked: with cost 12 and one at once some 15 seconds.
const MOST_WAITING: usize = 64;

/// How clients are admitted.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The role of clients without credentials.
    pub anonymous: Role,
    /// The role of clients with a certificate, unless scopes say otherwise.
    pub certificates: Role,
    /// Passwords that are checked at once, each by one core for a good part of a second. At least 1.
    pub hashing: usize,
}

impl Default for Options {
    /// Nobody may do anything, and half of the cores check passwords.
    fn default() -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self { anonymous: Role::None, certificates: Role::None, hashing: (cores / 2).max(1) }
    }
}

/// Why a client is not told who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Answer 401.
    #[error("wrong credentials")]
    Wrong,
    /// Answer 429.
    #[error("too many attempts with wrong credentials")]
    TooMany {
        /// For `Retry-After`.
        retry_after: Duration,
    },
    /// Answer 503.
    #[error("too many passwords to check")]
    Busy,
}

/// Finds out who clients are.
pub struct Access {
    users: ArcSwap<Users>,
    shared: Arc<Shared>,
    /// Makes the keys of verdicts. Its own key is random and never leaves it.
    keyed: Hmac<Sha256>,
    anonymous: Arc<Who>,
    certificates: Role,
}

#[derive(Clone, Copy)]
struct Verdict {
    outcome: Outcome,
    at: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Right,
    Wrong,
    /// Nobody has looked. Only those who waited for it get it.
    Refused(Refused),
}

/// What attempts need of [`Access`].
struct Shared {
    /// Those that are asked for often stay: a flood of wrong credentials does not displace the clients that work.
    verdicts: Cache<[u8; 32], Verdict>,
    hashing: Hashing,
    failures: Failures,
    metrics: Arc<Metrics>,
}

/// Credentials, and what they are compared with.
struct Question {
    /// Of its verdict.
    key: [u8; 32],
    /// Who has such a name or token; `None`: nobody, so that the credentials are wrong.
    who: Option<Arc<Who>>,
    /// The password to check; `None` for a token, and if there are no users.
    password: Option<Password>,
}

/// A password that is checked against a hash.
struct Password {
    pair: Zeroizing<Vec<u8>>,
    colon: usize,
    hash: Zeroizing<String>,
}

enum Credentials {
    /// `user:password`, and where the colon is.
    Password {
        pair: Zeroizing<Vec<u8>>,
        colon: usize,
    },
    Token(TokenHash),
}

impl Access {
    /// Knows these users.
    pub fn new(options: Options, users: Users, metrics: Arc<Metrics>) -> Self {
        let verdicts = Cache::new(MOST_VERDICTS);
        let shared = Shared { verdicts, hashing: Hashing::new(options.hashing), failures: Failures::new(), metrics };
        Self {
            users: ArcSwap::from_pointee(users),
            shared: Arc::new(shared),
            keyed: Hmac::new(&rand::random::<[u8; 64]>().into()),
            anonymous: Arc::new(Who::new(String::new(), options.anonymous, Arc::default(), 0)),
            certificates: options.certificates,
        }
    }

    /// The metrics, for what the caller decides.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// The users of now.
    pub fn users(&self) -> Arc<Users> {
        self.users.load_full()
    }

    /// Replaces the users, and forgets all memos. Failures stay counted, and verdicts about hashes that are the same stay.
    pub fn reload(&self, users: Users) {
        self.users.store(Arc::new(users));
    }

    /// Whose credentials these are. `authorization`: the value of the header; `address`: the client's, for the count of its failures. To be called on a
    /// tokio runtime with time. Counts refusals in the metrics. A caller may drop the future at any time.
    ///
    /// # Errors
    /// - [`Refused::Wrong`]: unknown or malformed, at once or after a delay.
    /// - [`Refused::TooMany`]: not verified, since too many attempts are under way.
    /// - [`Refused::Busy`]: not verified, since too many passwords are waiting for it.
    pub async fn identify(&self, authorization: &[u8], address: Option<IpAddr>) -> Result<Arc<Who>, Refused> {
        let result = match Credentials::parse(authorization) {
            Some(credentials) => self.attempt(self.question(credentials), address).await,
            // Not a guess, and costs nothing.
            None => Err(Refused::Wrong),
        };
        match result {
            Ok(_) => {}
            Err(Refused::Wrong) => self.shared.metrics.wrong_credentials(),
            Err(Refused::TooMany { .. }) => self.shared.metrics.too_many_attempts(),
            Err(Refused::Busy) => self.shared.metrics.too_much_hashing(),
        }
        result
    }

    fn question(&self, credentials: Credentials) -> Question {
        let users = self.users.load();
        let key = |of: &[&[u8]]| {
            let lengths = of.iter().fold(self.keyed.clone(), |hmac, part| hmac.chain_update(part.len().to_le_bytes()));
            of.iter().fold(lengths, |hmac, part| hmac.chain_update(part)).finalize().into_bytes().into()
        };
        match credentials {
            Credentials::Token(hash) => {
                let who = users.token(hash).cloned();
                Question { key: key(&[&hash.0, &[u8::from(who.is_some())]]), who, password: None }
            }
            Credentials::Password { pair, colon } => {
                let name = pair.get(..colon).and_then(|name| std::str::from_utf8(name).ok());
                let (hash, who) = users.password(name).unzip();
                let key = key(&[&pair, hash.map_or(&b""[..], |hash| hash.as_bytes())]);
                let who = who.flatten().cloned();
                Question { key, who, password: hash.cloned().map(|hash| Password { pair, colon, hash }) }
            }
        }
    }

    async fn attempt(&self, question: Question, address: Option<IpAddr>) -> Result<Arc<Who>, Refused> {
        let kept = self.shared.verdicts.get(&question.key).await.filter(|kept| kept.outcome == Outcome::Right);
        if kept.is_some_and(|kept| kept.is_fresh())
            && let Some(who) = &question.who
        {
            return Ok(who.clone());
        }
        // Credentials that were right before, and are compared with the same, are no guess. So one client with a wrong password does not lock out those with
        // whom it shares its address.
        let known = kept.filter(|_| question.who.is_some());
        let shared = self.shared.clone();
        let task = tokio::spawn(async move { shared.answer(question, known, address).await });
        // The task has panicked, or the runtime ends.
        task.await.unwrap_or(Err(Refused::Busy))
    }

    /// The client without credentials. Its name is empty.
    pub const fn anonymous(&self) -> &Arc<Who> {
        &self.anonymous
    }

    /// The client with a certificate of this name, which the caller has verified.
    pub fn certificate(&self, name: &str) -> Arc<Who> {
        let scopes = self.users.load().scopes(name);
        Arc::new(Who::new(name.to_owned(), self.certificates, scopes, 0))
    }

    /// Whether this is the result of [`Access::identify`], with the users of now.
    pub(crate) fn is_current(&self, who: &Who) -> bool {
        who.epoch() == self.users.load().epoch()
    }
}

impl Verdict {
    fn is_fresh(&self) -> bool {
        match self.outcome {
            Outcome::Right => self.at.elapsed() < RIGHT_FOR,
            Outcome::Wrong => self.at.elapsed() < WRONG_FOR,
            Outcome::Refused(_) => false,
        }
    }
}

impl Shared {
    /// `known`: an old verdict by which the credentials are right.
    async fn answer(&self, question: Question, known: Option<Verdict>, address: Option<IpAddr>) -> Result<Arc<Who>, Refused> {
        let Question { key, who, password } = question;
        // Only the one who finds the verdict makes an attempt. Who brings the same meanwhile learns the same.
        let mut attempt = None;
        let reached = async {
            if known.is_none() {
                match self.failures.begin(address) {
                    Ok(begun) => attempt = Some(begun),
                    Err(refused) => return Verdict { outcome: Outcome::Refused(refused), at: Instant::now() },
                }
            }
            match (self.outcome(who.is_some(), password).await, known) {
                // Still true: the hash is the same. It stays old, so that the next request tries again.
                (Outcome::Refused(_), Some(known)) => known,
                (outcome, _) => Verdict { outcome, at: Instant::now() },
            }
        };
        let verdict = self.verdicts.entry(key).or_insert_with_if(reached, |kept| !kept.is_fresh()).await.into_value();
        match (verdict.outcome, who) {
            (Outcome::Right, Some(who)) => {
                attempt.iter().for_each(Failures::succeeded);
                Ok(who)
            }
            (Outcome::Right | Outcome::Wrong, _) => {
                let attempt = attempt.map_or_else(|| self.failures.begin(address), Ok)?;
                Err(self.failures.failed(attempt).await)
            }
            (Outcome::Refused(refused), _) => Err(refused),
        }
    }

    async fn outcome(&self, is_known: bool, password: Option<Password>) -> Outcome {
        let Some(Password { pair, colon, hash }) = password else { return if is_known { Outcome::Right } else { Outcome::Wrong } };
        let Ok(is_right) = self.hashing.check(hash, pair, colon).await else { return Outcome::Refused(Refused::Busy) };
        let is_right = is_right && is_known;
        self.metrics.checked(is_right);
        if is_right { Outcome::Right } else { Outcome::Wrong }
    }
}

impl Credentials {
    /// `None`: malformed, or of another scheme.
    fn parse(authorization: &[u8]) -> Option<Self> {
        let authorization = authorization.trim_ascii();
        let (scheme, rest) = authorization.split_at(authorization.iter().position(|byte| *byte == b' ')?);
        let rest = rest.trim_ascii_start();
        if scheme.eq_ignore_ascii_case(b"basic") {
            let pair = Zeroizing::new(BASE64.decode(rest).ok()?);
            let colon = pair.iter().position(|byte| *byte == b':')?;
            Some(Self::Password { pair, colon })
        } else if scheme.eq_ignore_ascii_case(b"bearer") {
            Some(Self::Token(TokenHash(Sha256::digest(rest).into())))
        } else {
            None
        }
    }
}

/// The pair of `Basic`, and where its colon is.
#[doc(hidden)]
pub fn password_of(authorization: &[u8]) -> Option<(Zeroizing<Vec<u8>>, usize)> {
    match Credentials::parse(authorization)? {
        Credentials::Password { pair, colon } => Some((pair, colon)),
        Credentials::Token(_) => None,
    }
}

/// Checks passwords, few at once.
struct Hashing {
    /// Those that are checked now.
    turns: Arc<Semaphore>,
    /// Those, and those that wait.
    queue: Arc<Semaphore>,
}

/// Too many wait.
struct Busy;

impl Hashing {
    fn new(at_once: usize) -> Self {
        // A semaphore has a largest size, far beyond any number of cores.
        let at_once = at_once.clamp(1, 1024);
        Self { turns: Arc::new(Semaphore::new(at_once)), queue: Arc::new(Semaphore::new(at_once + MOST_WAITING)) }
    }

    /// Whether what follows the colon is the password with this bcrypt hash.
    async fn check(&self, hash: Zeroizing<String>, pair: Zeroizing<Vec<u8>>, colon: usize) -> Result<bool, Busy> {
        let queued = self.queue.clone().try_acquire_owned().map_err(|_| Busy)?;
        let turn = self.turns.clone().acquire_owned().await.map_err(|_| Busy)?;
        let check = spawn_blocking(move || {
            // Until the end of the work, which nobody can stop.
            let _held = (queued, turn);
            bcrypt::verify(pair.get(colon + 1..).unwrap_or_default(), &hash).unwrap_or(false)
        });
        check.await.map_err(|_| Busy)
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").field("users", &self.users.load()).finish_non_exhaustive()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{
        metrics::tests::value,
        users::tests::{bcrypted, sha256, users},
        who::What,
    };
    use prometheus::Registry;
    use proptest::prelude::*;

    /// Checks one password at once. Certificates may write, anonymous clients read.
    pub(crate) fn access(users: Users) -> (Arc<Access>, Registry) {
        let registry = Registry::new();
        let options = Options { anonymous: Role::Read, certificates: Role::Write, hashing: 1 };
        (Arc::new(Access::new(options, users, Arc::new(Metrics::new(&registry).unwrap()))), registry)
    }

    pub(crate) fn basic(pair: &[u8]) -> Vec<u8> {
        format!("Basic {}", BASE64.encode(pair)).into_bytes()
    }

    fn ann() -> Users {
        users(&format!("ann:{}", bcrypted(b"secret")), &format!("ci read {}", sha256("token")), &[])
    }

    fn address(number: u32) -> Option<IpAddr> {
        Some(IpAddr::from(number.to_be_bytes()))
    }

    /// Passwords that were checked: right ones, wrong ones.
    fn checks(registry: &Registry) -> [u64; 2] {
        ["right", "wrong"].map(|result| value(registry, &format!("castier_password_checks_total{{result=\"{result}\"}}")))
    }

    /// Requests that were denied: for credentials, attempts, hashing.
    fn denied(registry: &Registry) -> [u64; 3] {
        ["credentials", "attempts", "hashing"]
            .map(|reason| value(registry, &format!("castier_denied_requests_total{{reason=\"{reason}\"}}")))
    }

    /// Waits for a condition, with a deadline in real time.
    pub(crate) async fn until(condition: impl Fn() -> bool) {
        let begun = std::time::Instant::now();
        while !condition() {
            assert!(begun.elapsed() < Duration::from_secs(60), "this takes too long");
            tokio::task::yield_now().await;
        }
    }

    fn start(access: &Arc<Access>, header: &[u8], address: Option<IpAddr>) -> tokio::task::JoinHandle<Result<Arc<Who>, Refused>> {
        let (access, header) = (access.clone(), header.to_vec());
        tokio::spawn(async move { access.identify(&header, address).await })
    }

    /// How many passwords wait for a turn, while the test holds the turn.
    fn waiting(access: &Access) -> usize {
        1 + MOST_WAITING - access.shared.hashing.queue.available_permits()
    }

    fn name(result: &Result<Arc<Who>, Refused>) -> Result<&str, Refused> {
        result.as_ref().map(|who| who.name()).map_err(|refused| *refused)
    }

    #[tokio::test(start_paused = true)]
    async fn right_credentials_say_who_the_client_is() {
        let htpasswd = [
            ("ann", &b"secret"[..]),
            ("col", b"a:b:c"),
            ("latin", b"caf\xe9"),
            ("empty", b""),
            ("céline", "mot de passé".as_bytes()),
            ("long", &[b'x'; 100]),
        ];
        let lines: String = htpasswd.iter().map(|(name, password)| format!("{name}:{}\n", bcrypted(password))).collect();
        let tokens = format!("ci admin {}\nci read {}", sha256("token"), sha256("a.b-c/d=="));
        let (access, registry) = access(users(&lines, &tokens, &[("ann", &["read:kv"]), ("ci", &["cas"])]));
        for (user, password) in htpasswd {
            let who = access.identify(&basic(&[user.as_bytes(), b":", password].concat()), None).await.unwrap();
            assert_eq!((who.name(), who.role()), (user, Role::Write));
            assert_eq!(who.may(Role::Write, What::Blobs), user != "ann");
        }
        assert_eq!(checks(&registry), [6, 0]);
        for (header, role) in [
            ("Bearer token", Role::Admin),
            ("bearer token", Role::Admin),
            ("BEARER   token ", Role::Admin),
            ("Bearer a.b-c/d==", Role::Read),
        ] {
            let who = access.identify(header.as_bytes(), address(1)).await.unwrap();
            assert_eq!((who.name(), who.role()), ("ci", role));
            assert!(who.may(Role::Read, What::Blobs) && !who.may(Role::Read, What::Entry("/kv/a")));
        }
        let credentials = BASE64.encode(b"ann:secret");
        for scheme in ["basic ", "BASIC ", " bAsIc  "] {
            assert_eq!(access.identify(format!("{scheme}{credentials}").as_bytes(), None).await.unwrap().name(), "ann");
        }
        assert_eq!(denied(&registry), [0, 0, 0]);
    }

    #[tokio::test]
    async fn an_htpasswd_hash_of_apache_fits() {
        let (access, _) = access(users("myName:$2y$05$c4WoMPo3SXsafkva.HHa6uXQZWr7oboPiC2bT/r7q1BB8I2s0BRqC", "", &[]));
        assert_eq!(access.identify(&basic(b"myName:myPassword"), None).await.unwrap().name(), "myName");
    }

    #[tokio::test(start_paused = true)]
    async fn wrong_credentials_are_refused() {
        let (access, registry) = access(ann());
        let wrong: [&[u8]; 11] = [
            &basic(b"ann:secre"),
            &basic(b"ann:secret "),
            &basic(b"ann:Secret"),
            &basic(b"ann:"),
            &basic(b"Ann:secret"),
            &basic(b":secret"),
            &basic(b"\xff:secret"),
            &basic(b"ci:token"),
            b"Bearer Token",
            b"Bearer secret",
            b"Bearer token x",
        ];
        for (number, header) in (1..).zip(wrong) {
            assert_eq!(access.identify(header, address(number)).await.err(), Some(Refused::Wrong), "{header:?}");
        }
        assert_eq!((checks(&registry), denied(&registry)), ([0, 8], [11, 0, 0]));
    }

    #[tokio::test(start_paused = true)]
    async fn malformed_headers_are_refused_and_are_no_guesses() {
        let (access, registry) = access(ann());
        let malformed: [&[u8]; 14] = [
            b"",
            b" ",
            b"Basic",
            b"Basic ",
            b"Basic\tYW5uOnNlY3JldA==",
            b"BasicYW5uOnNlY3JldA==",
            b"Basic YW5uOnNlY3JldA",
            b"Basic YW5uOnNlY3JldA== x",
            b"Basic !",
            b"Basic \xff\xfe",
            b"Bearer",
            b"Digest username=\"ann\"",
            b"token",
            &basic(b"ann"),
        ];
        let begun = Instant::now();
        for header in malformed {
            assert_eq!(access.identify(header, address(1)).await.err(), Some(Refused::Wrong), "{header:?}");
        }
        assert_eq!((begun.elapsed(), checks(&registry), denied(&registry)), (Duration::ZERO, [0, 0], [14, 0, 0]));
        assert_eq!(access.identify(b"Bearer wrong", address(1)).await.err(), Some(Refused::Wrong));
        assert_eq!(begun.elapsed().as_millis(), 100, "the first failure");
    }

    #[tokio::test(start_paused = true)]
    async fn an_unknown_user_costs_a_check_too() {
        let (access, registry) = access(ann());
        assert!(access.identify(&basic(b"nobody:secret"), None).await.is_err());
        assert_eq!(checks(&registry), [0, 1]);
        access.reload(users("", "", &[]));
        assert!(access.identify(&basic(b"nobody:secret"), None).await.is_err());
        assert_eq!(checks(&registry), [0, 1], "there is nobody to find out");
    }

    #[tokio::test(start_paused = true)]
    async fn verdicts_hold_for_a_time() {
        let (access, registry) = access(ann());
        let (right, wrong) = (basic(b"ann:secret"), basic(b"ann:wrong"));
        for (header, holds_for, of) in [(right, Duration::from_secs(60), 0), (wrong, Duration::from_secs(10), 1)] {
            let mut expected = checks(&registry);
            expected[of] += 1;
            let first = access.identify(&header, address(1)).await;
            // A wrong one is refused 100 ms after its verdict.
            let passed = if first.is_err() { Duration::from_millis(100) } else { Duration::ZERO };
            tokio::time::advance(holds_for - passed - Duration::from_millis(1)).await;
            assert_eq!(name(&access.identify(&header, address(2)).await), name(&first));
            assert_eq!(checks(&registry), expected);
            tokio::time::advance(Duration::from_millis(1)).await;
            assert_eq!(name(&access.identify(&header, address(3)).await), name(&first));
            expected[of] += 1;
            assert_eq!(checks(&registry), expected);
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn equal_credentials_at_the_same_time_cost_one_check() {
        let (access, registry) = access(ann());
        let turn = access.shared.hashing.turns.clone().acquire_owned().await.unwrap();
        let header = basic(b"ann:secret");
        // Half of them behind one address, as after a restart.
        let asking: Vec<_> = (0..200).map(|number| start(&access, &header, address(number / 100 * number))).collect();
        until(|| waiting(&access) == 1).await;
        drop(turn);
        for asking in asking {
            assert_eq!(asking.await.unwrap().unwrap().name(), "ann");
        }
        assert_eq!((checks(&registry), denied(&registry)), ([1, 0], [0, 0, 0]));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn old_verdicts_are_renewed_once() {
        let (access, registry) = access(ann());
        let header = basic(b"ann:secret");
        access.identify(&header, None).await.unwrap();
        let verdicts = &access.shared.verdicts;
        let key: [u8; 32] = *verdicts.iter().next().unwrap().0;
        let mut old = verdicts.get(&key).await.unwrap();
        old.at -= RIGHT_FOR;
        verdicts.insert(key, old).await;
        let asking: Vec<_> = (0..200).map(|number| start(&access, &header, address(number))).collect();
        for asking in asking {
            assert_eq!(asking.await.unwrap().unwrap().name(), "ann");
        }
        assert_eq!(checks(&registry), [2, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn few_different_credentials_wait_for_a_check() {
        let (access, registry) = access(ann());
        // As if one were checked.
        let hashing = &access.shared.hashing;
        let held = (hashing.queue.clone().try_acquire_owned().unwrap(), hashing.turns.clone().try_acquire_owned().unwrap());
        let asking: Vec<_> = (0..100).map(|number| start(&access, &basic(format!("ann:{number}").as_bytes()), address(number))).collect();
        until(|| asking.iter().filter(|asking| asking.is_finished()).count() == 100 - MOST_WAITING).await;
        assert_eq!((checks(&registry), denied(&registry)), ([0, 0], [0, 0, 36]));
        assert_eq!(access.identify(b"Bearer token", None).await.unwrap().name(), "ci", "tokens need no check");
        drop(held);
        let mut refused = Vec::new();
        for asking in asking {
            refused.push(asking.await.unwrap().unwrap_err());
        }
        assert_eq!(refused.iter().filter(|refused| **refused == Refused::Wrong).count(), MOST_WAITING);
        assert_eq!(refused.iter().filter(|refused| **refused == Refused::Busy).count(), 100 - MOST_WAITING);
        assert_eq!((checks(&registry), denied(&registry)), ([0, 64], [64, 0, 36]));
        assert_eq!(access.identify(&basic(b"ann:secret"), None).await.unwrap().name(), "ann", "later there is time");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn at_most_so_many_passwords_are_checked_at_once() {
        for (hashing, expected) in [(0, 1), (1, 1), (3, 3), (usize::MAX, 1024)] {
            assert_eq!(Hashing::new(hashing).turns.available_permits(), expected);
        }
        assert!(Options::default().hashing >= 1);
        let (access, registry) = access(ann());
        let asking: Vec<_> = (0..100).map(|number| start(&access, &basic(format!("ann:{number}").as_bytes()), address(number))).collect();
        for asking in asking {
            let refused = asking.await.unwrap().unwrap_err();
            assert!(matches!(refused, Refused::Wrong | Refused::Busy), "{refused:?}");
        }
        let (checks, denied) = (checks(&registry), denied(&registry));
        assert!(checks[1] >= 65 && checks[1] == denied[0] && denied[0] + denied[2] == 100, "{checks:?} {denied:?}");
        assert_eq!(access.shared.hashing.queue.available_permits(), 1 + MOST_WAITING);
        assert_eq!(access.shared.hashing.turns.available_permits(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reload_forgets() {
        let (access, registry) = access(ann());
        let (old, new) = (basic(b"ann:secret"), basic(b"ann:changed"));
        assert!(access.identify(&old, None).await.is_ok() && access.identify(b"Bearer token", None).await.is_ok());
        assert!(access.identify(&new, None).await.is_err());
        access.reload(users(&format!("ann:{}", bcrypted(b"changed")), "", &[("ann", &["cas"])]));
        assert!(access.identify(&new, None).await.unwrap().may(Role::Write, What::Blobs));
        assert!(!access.identify(&new, None).await.unwrap().may(Role::Read, What::Other));
        assert_eq!(access.identify(&old, None).await.err(), Some(Refused::Wrong));
        assert_eq!(access.identify(b"Bearer token", None).await.err(), Some(Refused::Wrong));
        assert_eq!(checks(&registry), [2, 2]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reload_keeps_what_is_still_true() {
        let lines = |bob: &str| format!("ann:{}\nbob:{bob}", "$2y$05$c4WoMPo3SXsafkva.HHa6uXQZWr7oboPiC2bT/r7q1BB8I2s0BRqC");
        let (access, registry) = access(users(&lines(&bcrypted(b"secret")), &format!("ci read {}", sha256("token")), &[]));
        let (ann, bob) = (basic(b"ann:myPassword"), basic(b"bob:secret"));
        for header in [&ann[..], &bob, b"Bearer token"] {
            assert!(access.identify(header, None).await.is_ok());
        }
        access.reload(users(&lines(&bcrypted(b"changed")), "", &[("ann", &["cas"])]));
        let who = access.identify(&ann, None).await.unwrap();
        assert_eq!(checks(&registry), [2, 0], "the hash of ann is the same");
        assert!(access.is_current(&who) && !who.may(Role::Read, What::Other), "the rest is read again");
        for header in [&bob[..], b"Bearer token"] {
            assert_eq!(access.identify(header, None).await.err(), Some(Refused::Wrong));
        }
        access.reload(users("", "", &[]));
        assert_eq!(access.identify(&ann, None).await.err(), Some(Refused::Wrong));
    }

    #[tokio::test(start_paused = true)]
    async fn credentials_in_another_form_are_no_success_of_their_own() {
        let (access, registry) = access(ann());
        let credentials = BASE64.encode(b"ann:secret");
        for spaces in 1..6 {
            for header in [format!("Bearer{}token", " ".repeat(spaces)), format!("basic{}{credentials}", " ".repeat(spaces))] {
                assert!(access.identify(header.as_bytes(), address(1)).await.is_ok());
            }
            let begun = Instant::now();
            assert!(access.identify(b"Bearer wrong", address(1)).await.is_err());
            assert_eq!(begun.elapsed().as_millis(), 100 << (spaces - 1), "no success in between has forgotten the failures");
        }
        assert_eq!(checks(&registry), [1, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reload_during_a_check_leaves_no_old_verdict() {
        let (access, _) = access(ann());
        let header = basic(b"ann:secret");
        let turn = access.shared.hashing.turns.clone().acquire_owned().await.unwrap();
        let before = start(&access, &header, None);
        until(|| waiting(&access) == 1).await;
        access.reload(users(&format!("ann:{}", bcrypted(b"changed")), "", &[]));
        drop(turn);
        let before = before.await.unwrap().unwrap();
        assert!(!access.is_current(&before), "it began before");
        assert_eq!(access.identify(&header, None).await.err(), Some(Refused::Wrong));
    }

    #[tokio::test(start_paused = true)]
    async fn refusals_are_delayed_and_a_cached_right_verdict_never_is() {
        let (access, registry) = access(ann());
        let right = basic(b"ann:secret");
        access.identify(&right, address(1)).await.unwrap();
        for delay in [100, 200, 400, 800, 1600, 3200, 5000, 5000] {
            let begun = Instant::now();
            // The verdict is kept; the failures count all the same.
            assert_eq!(access.identify(b"Bearer wrong", address(1)).await.err(), Some(Refused::Wrong));
            assert_eq!(begun.elapsed().as_millis(), delay);
            let begun = Instant::now();
            assert!(access.identify(&right, address(1)).await.is_ok());
            assert_eq!(begun.elapsed(), Duration::ZERO);
        }
        assert_eq!((checks(&registry), denied(&registry)), ([1, 0], [8, 0, 0]));
        access.identify(b"Bearer token", address(1)).await.unwrap();
        let begun = Instant::now();
        assert!(access.identify(b"Bearer wrong", address(1)).await.is_err());
        assert_eq!(begun.elapsed().as_millis(), 100, "a success has forgotten them");
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_with_failures_has_few_attempts_at_once_even_if_it_hangs_up() {
        let (access, registry) = access(ann());
        let right = basic(b"ann:secret");
        access.identify(&right, address(1)).await.unwrap();
        assert!(access.identify(b"Bearer wrong", address(1)).await.is_err());
        let guesses: Vec<_> = (0..4).map(|number| start(&access, format!("Bearer {number}").as_bytes(), address(1))).collect();
        let counted = || access.shared.failures.begin(address(1)).is_err();
        until(counted).await;
        let begun = Instant::now();
        let too_many = Some(Refused::TooMany { retry_after: Duration::from_secs(5) });
        assert_eq!(access.identify(&basic(b"ann:guess"), address(1)).await.err(), too_many);
        assert_eq!(access.identify(b"Bearer token", address(1)).await.err(), too_many, "a right one would tell that the others were wrong");
        assert!(access.identify(&right, address(1)).await.is_ok());
        assert!(access.identify(b"Bearer token", address(2)).await.is_ok());
        for guess in &guesses {
            guess.abort();
        }
        until(|| guesses.iter().all(tokio::task::JoinHandle::is_finished)).await;
        assert!(counted());
        assert_eq!((begun.elapsed(), checks(&registry), denied(&registry)), (Duration::ZERO, [1, 0], [1, 2, 0]));
        // The longest of the four.
        tokio::time::sleep(Duration::from_millis(1600)).await;
        until(|| !counted()).await;
        assert!(access.identify(b"Bearer token", address(1)).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn few_refusals_wait_at_once() {
        let (access, registry) = access(ann());
        let right = basic(b"ann:secret");
        access.identify(&right, address(0)).await.unwrap();
        let guesses: Vec<_> = (1..=256).map(|number| start(&access, b"Bearer wrong", address(number))).collect();
        until(|| access.shared.failures.begin(address(1)).is_err()).await;
        let too_many = Some(Refused::TooMany { retry_after: Duration::from_secs(5) });
        assert_eq!(access.identify(&basic(b"ann:guess"), address(1)).await.err(), too_many);
        assert_eq!(checks(&registry), [1, 0], "it was not verified");
        assert!(access.identify(&right, address(1)).await.is_ok());
        assert!(access.identify(b"Bearer token", address(1000)).await.is_ok(), "who has not failed is let in");
        for guess in guesses {
            assert_eq!(guess.await.unwrap().err(), Some(Refused::Wrong));
        }
        assert_eq!(denied(&registry), [256, 1, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn credentials_that_were_right_are_no_guess_later() {
        let (access, registry) = access(ann());
        let right = basic(b"ann:secret");
        access.identify(&right, address(1)).await.unwrap();
        tokio::time::advance(RIGHT_FOR).await;
        assert!(access.identify(b"Bearer wrong", address(1)).await.is_err());
        let guesses: Vec<_> = (0..4).map(|number| start(&access, format!("Bearer {number}").as_bytes(), address(1))).collect();
        until(|| access.shared.failures.begin(address(1)).is_err()).await;
        assert!(access.identify(&right, address(1)).await.is_ok(), "a neighbour's failures do not lock it out");
        assert_eq!(checks(&registry), [2, 0]);
        assert!(access.shared.failures.begin(address(1)).is_err(), "nor does it help the neighbour");

        tokio::time::advance(RIGHT_FOR).await;
        let hashing = &access.shared.hashing;
        let queue = hashing.queue.clone().try_acquire_many_owned(1 + u32::try_from(MOST_WAITING).unwrap()).unwrap();
        assert!(access.identify(&right, address(1)).await.is_ok(), "the old verdict is believed while there is no time");
        assert_eq!(access.identify(&basic(b"ann:other"), address(2)).await.err(), Some(Refused::Busy));
        assert_eq!(checks(&registry), [2, 0]);
        drop(queue);
        assert!(access.identify(&right, address(1)).await.is_ok());
        assert_eq!(checks(&registry), [3, 0], "it was not renewed");
        assert_eq!(
            access.identify(&basic(b"ann:other"), address(2)).await.err(),
            Some(Refused::Wrong),
            "those who come later are verified"
        );
        drop(guesses);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_hangs_up_finds_the_verdict_when_it_comes_again() {
        let (access, registry) = access(ann());
        let header = basic(b"ann:secret");
        let turn = access.shared.hashing.turns.clone().acquire_owned().await.unwrap();
        let asking = start(&access, &header, None);
        until(|| waiting(&access) == 1).await;
        asking.abort();
        assert!(asking.await.is_err());
        drop(turn);
        until(|| checks(&registry) == [1, 0]).await;
        assert!(access.identify(&header, None).await.is_ok());
        assert_eq!(checks(&registry), [1, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_number_of_verdicts_is_bounded_and_those_in_use_stay() {
        let (access, registry) = access(ann());
        let right = basic(b"ann:secret");
        access.identify(&right, None).await.unwrap();
        let verdicts = &access.shared.verdicts;
        for number in 0..20_000_u64 {
            let key = [&number.to_le_bytes()[..], &[0; 24]].concat().try_into().unwrap();
            verdicts.insert(key, Verdict { outcome: Outcome::Wrong, at: Instant::now() }).await;
            if number % 100 == 0 {
                access.identify(&right, None).await.unwrap();
                verdicts.run_pending_tasks().await;
            }
        }
        assert!(verdicts.entry_count() <= 10_000);
        assert_eq!(checks(&registry), [1, 0]);
    }

    #[tokio::test]
    async fn those_without_a_password_have_the_roles_of_the_options() {
        let (access, _) = access(users("", "", &[("host.example", &["admin:kv", "ac"])]));
        let anonymous = access.anonymous();
        assert_eq!((anonymous.name(), anonymous.role(), anonymous.scopes().len()), ("", Role::Read, 0));
        let known = access.certificate("host.example");
        assert_eq!((known.name(), known.role()), ("host.example", Role::Write));
        assert!(
            known.may(Role::Admin, What::Entry("/kv/a"))
                && known.may(Role::Write, What::Entry("/ac/0"))
                && !known.may(Role::Read, What::Blobs)
        );
        assert!(access.certificate("other.example").may(Role::Write, What::Other));
        access.reload(users("", "", &[]));
        assert!(access.certificate("host.example").may(Role::Write, What::Blobs));
    }

    #[tokio::test(start_paused = true)]
    async fn debug_shows_no_secret() {
        let hash = bcrypted(b"secret");
        let tokens = format!("ci read {}", sha256("token"));
        let (access, _) = access(users(&format!("ann:{hash}"), &tokens, &[]));
        let who = access.identify(&basic(b"ann:secret"), None).await.unwrap();
        let refused = access.identify(&basic(b"ann:wrong"), None).await.unwrap_err();
        let shown = format!("{access:?} {who:?} {refused:?} {:?}", access.users.load());
        for secret in ["secret", "wrong", "token\"", &hash[7..], &sha256("token"), &BASE64.encode(b"ann:secret"), "sha256"] {
            assert!(!shown.contains(secret), "{secret} is in {shown}");
        }
        assert!(shown.contains("Users { users: 1, tokens: 1, .. }"), "{shown}");
    }

    proptest! {
        #[test]
        fn no_header_makes_the_parser_panic(scheme in "(?i)(basic|bearer|digest)? {0,2}", rest in prop::collection::vec(any::<u8>(), 0..60)) {
            let is_basic = scheme.trim_start().to_ascii_lowercase().starts_with("basic ");
            let parsed = Credentials::parse(&[scheme.as_bytes(), &rest].concat());
            let is_password = matches!(parsed, Some(Credentials::Password { .. }));
            prop_assert!(!is_password || is_basic);
            // Nearly right.
            let header = [scheme.as_bytes(), BASE64.encode(&rest).as_bytes()].concat();
            if let Some(Credentials::Password { pair, colon }) = Credentials::parse(&header) {
                prop_assert!(pair.as_slice() == rest && rest.iter().position(|byte| *byte == b':') == Some(colon));
            }
        }
    }
}
