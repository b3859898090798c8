//! The users and the tokens, from their files.
//!
//! No error shows a hash, or a part of a line that may be a password or a token by mistake.

use crate::who::{Scope, Who, given};
use bcrypt::HashParts;
use castier_config::Role;
use data_encoding::HEXLOWER_PERMISSIVE;
use std::{
    collections::{BTreeMap, HashMap, HashSet, hash_map::Entry},
    fmt,
    fs::File,
    hash::{Hash, Hasher},
    io::Read as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

/// Larger files are refused: some 60,000 users.
const MOST_BYTES: u64 = 4 << 20;
/// As many users, and as many tokens, there may be.
const MOST: usize = 100_000;
/// A check with cost 14 takes about a second. Each step more doubles it.
const COSTS: std::ops::RangeInclusive<u32> = 4..=14;

/// What users are read from.
#[derive(Clone, Copy, Debug)]
pub struct Sources<'a> {
    /// A file with lines `NAME:HASH`, as `htpasswd -B` writes them.
    pub htpasswd: Option<&'a Path>,
    /// A file with lines `NAME ROLE SHA256-OF-THE-TOKEN`.
    pub tokens: Option<&'a Path>,
    /// The role of the users in the htpasswd file.
    pub role: Role,
    /// The scopes of a name: of the user, of the tokens and of the certificate that have it. Those of `*` are for all names that are not here.
    pub scopes: &'a BTreeMap<String, Vec<String>>,
}

/// Users with their passwords, tokens, and the scopes of names.
pub struct Users {
    /// Distinguishes these users from those of every other read of this process.
    epoch: u64,
    passwords: HashMap<String, Password>,
    tokens: HashMap<TokenHash, Arc<Who>>,
    scopes: HashMap<String, Arc<[Scope]>>,
    /// A hash that no password has, for unknown names; `None` without users.
    decoy: Option<Zeroizing<String>>,
}

struct Password {
    hash: Zeroizing<String>,
    who: Arc<Who>,
}

/// The SHA-256 of a token. Compared in constant time.
#[derive(Clone, Copy, Eq)]
pub(crate) struct TokenHash(pub(crate) [u8; 32]);

impl PartialEq for TokenHash {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Hash for TokenHash {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl Users {
    /// Reads the files.
    ///
    /// # Errors
    /// The first problem: a file that cannot be read or has more than 4 MiB, or a wrong line or scope. The text says what to do, and shows no hash.
    pub fn read(sources: &Sources<'_>) -> Result<Self, String> {
        let hashes = of_file(sources.htpasswd, parse_htpasswd)?;
        let tokens = of_file(sources.tokens, parse_tokens)?;
        let scopes = parse_scopes(sources.scopes)?;
        Ok(Self::new(hashes, tokens, scopes, sources.role))
    }

    /// Reads the files again. In place of a file that cannot be used these users count on. Returns the problems of such files, too.
    ///
    /// # Errors
    /// A wrong scope.
    pub fn reread(&self, sources: &Sources<'_>) -> Result<(Self, Vec<String>), String> {
        let scopes = parse_scopes(sources.scopes)?;
        let mut problems = Vec::new();
        let hashes = of_file(sources.htpasswd, parse_htpasswd).unwrap_or_else(|why| {
            problems.push(why);
            self.passwords.iter().map(|(name, password)| (name.clone(), password.hash.clone())).collect()
        });
        let tokens = of_file(sources.tokens, parse_tokens).unwrap_or_else(|why| {
            problems.push(why);
            self.tokens.iter().map(|(hash, who)| (*hash, (who.name().to_owned(), who.role()))).collect()
        });
        Ok((Self::new(hashes, tokens, scopes, sources.role), problems))
    }

    /// How many users and how many tokens there are.
    pub fn counts(&self) -> (usize, usize) {
        (self.passwords.len(), self.tokens.len())
    }

    fn new(
        hashes: HashMap<String, Zeroizing<String>>,
        tokens: HashMap<TokenHash, (String, Role)>,
        scopes: HashMap<String, Arc<[Scope]>>,
        role: Role,
    ) -> Self {
        static EPOCHS: AtomicU64 = AtomicU64::new(1);
        let epoch = EPOCHS.fetch_add(1, Ordering::Relaxed);
        let decoy = decoy(&hashes);
        let who = |name: String, role| {
            let scopes = scopes_of(&scopes, &name);
            Arc::new(Who::new(name, role, scopes, epoch))
        };
        let passwords = hashes.into_iter().map(|(name, hash)| (name.clone(), Password { hash, who: who(name, role) })).collect();
        let tokens = tokens.into_iter().map(|(hash, (name, role))| (hash, who(name, role))).collect();
        Self { epoch, passwords, tokens, scopes, decoy }
    }

    /// The names with scopes that no user and no token has. They may be those of certificates; else it is a mistake, and who was meant is not confined.
    pub fn unknown_names(&self) -> Vec<&str> {
        let tokens: HashSet<&str> = self.tokens.values().map(|who| who.name()).collect();
        let is_unknown = |name: &&str| *name != "*" && !self.passwords.contains_key(*name) && !tokens.contains(name);
        let mut names: Vec<&str> = self.scopes.keys().map(String::as_str).filter(is_unknown).collect();
        names.sort_unstable();
        names
    }

    /// The names of routes in scopes, each with the name that is confined to it.
    pub fn routes(&self) -> impl Iterator<Item = (&str, &str)> {
        self.scopes.iter().flat_map(|(name, scopes)| scopes.iter().filter_map(move |scope| Some((name.as_str(), scope.route()?))))
    }

    pub(crate) const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The bcrypt hash to check a password of this name against, and who has it. For an unknown name a hash that no password has, so that the answer
    /// takes as long; `None` if there are no users at all. `name`: `None` if it is not UTF-8, and so of nobody.
    pub(crate) fn password(&self, name: Option<&str>) -> Option<(&Zeroizing<String>, Option<&Arc<Who>>)> {
        match name.and_then(|name| self.passwords.get(name)) {
            Some(password) => Some((&password.hash, Some(&password.who))),
            None => self.decoy.as_ref().map(|decoy| (decoy, None)),
        }
    }

    /// Who has the token with this hash.
    pub(crate) fn token(&self, hash: TokenHash) -> Option<&Arc<Who>> {
        self.tokens.get(&hash)
    }

    /// The scopes of a name; none if it has none.
    pub(crate) fn scopes(&self, name: &str) -> Arc<[Scope]> {
        scopes_of(&self.scopes, name)
    }
}

fn scopes_of(scopes: &HashMap<String, Arc<[Scope]>>, name: &str) -> Arc<[Scope]> {
    scopes.get(name).or_else(|| scopes.get("*")).cloned().unwrap_or_default()
}

impl fmt::Debug for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Users").field("users", &self.passwords.len()).field("tokens", &self.tokens.len()).finish_non_exhaustive()
    }
}

/// A hash with the cost that most of the hashes have: an unknown name takes as long as most of the known ones.
fn decoy(hashes: &HashMap<String, Zeroizing<String>>) -> Option<Zeroizing<String>> {
    let mut costs = BTreeMap::<u32, usize>::new();
    for parts in hashes.values().filter_map(|hash| hash.parse::<HashParts>().ok()) {
        *costs.entry(parts.get_cost()).or_default() += 1;
    }
    let (cost, _) = costs.into_iter().max_by_key(|(cost, count)| (*count, *cost))?;
    Some(Zeroizing::new(format!("$2b${cost:02}${:.<53}", "")))
}

/// What a file says; nothing without a file.
fn of_file<T: Default>(file: Option<&Path>, parse: fn(&str) -> Result<T, String>) -> Result<T, String> {
    let Some(file) = file else { return Ok(T::default()) };
    read(file).and_then(|text| parse(&text)).map_err(|why| format!("{}: {why}", file.display()))
}

/// The text of a file.
fn read(file: &Path) -> Result<Zeroizing<String>, String> {
    let mut bytes = Zeroizing::new(Vec::new());
    let opened = File::open(file).and_then(|file| file.take(MOST_BYTES + 1).read_to_end(&mut bytes));
    opened.map_err(|error| format!("{error}; write this file, and let castier read it"))?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err("larger than 4 MiB; remove the lines that nobody needs".to_owned());
    }
    let valid = std::str::from_utf8(&bytes).map_err(|error| {
        let line = 1 + bytes.iter().take(error.valid_up_to()).filter(|byte| **byte == b'\n').count();
        format!("line {line}: not UTF-8; save the file as UTF-8")
    })?;
    Ok(Zeroizing::new(valid.to_owned()))
}

/// The lines that say something, with their numbers.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    (1..).zip(text.lines().map(str::trim)).filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
}

/// Checks a name. The result says what is wrong, without the name.
fn check_name(name: &str) -> Result<(), &'static str> {
    if name.is_empty() {
        return Err("the name is empty");
    }
    if name.chars().any(char::is_control) {
        return Err("the name has a control character");
    }
    // Not shown either: it is the hash if the two halves of a line are swapped.
    if name.starts_with('$') {
        return Err("the name begins with $, as a hash does");
    }
    Ok(())
}

/// The bcrypt hashes of the users in an htpasswd file.
fn parse_htpasswd(text: &str) -> Result<HashMap<String, Zeroizing<String>>, String> {
    let mut users = HashMap::new();
    for (number, line) in lines(text) {
        let wrong = |why: &str| format!("line {number}: {why}");
        let Some((name, hash)) = line.split_once(':') else {
            return Err(wrong("there is no colon; write NAME:HASH, for instance with: htpasswd -B FILE NAME"));
        };
        check_name(name).map_err(|why| wrong(&format!("{why}; write NAME:HASH, for instance with: htpasswd -B FILE NAME")))?;
        check_hash(hash).map_err(|why| wrong(&format!("user {name:?} has {why}")))?;
        if users.len() == MOST {
            return Err(wrong("more than 100,000 users; remove those that nobody needs"));
        }
        if users.insert(name.to_owned(), Zeroizing::new(hash.to_owned())).is_some() {
            return Err(wrong(&format!("user {name:?} is there twice; remove one of the lines")));
        }
    }
    Ok(users)
}

/// Checks that this is a bcrypt hash. The result says what it is instead, and what to do.
fn check_hash(hash: &str) -> Result<(), String> {
    const AGAIN: &str = "only bcrypt is safe enough; make it again with: htpasswd -B FILE NAME";
    const KINDS: [(&str, &str); 9] = [
        ("$apr1$", "an Apache MD5 hash ($apr1$)"),
        ("{SHA}", "a SHA-1 hash ({SHA})"),
        ("{SSHA}", "a salted SHA-1 hash ({SSHA})"),
        ("$1$", "an MD5 hash ($1$)"),
        ("$5$", "a SHA-256 hash ($5$)"),
        ("$6$", "a SHA-512 hash ($6$)"),
        ("$2x$", "a bcrypt hash of a faulty program ($2x$)"),
        ("$y$", "a yescrypt hash ($y$)"),
        ("$argon2", "an Argon2 hash ($argon2)"),
    ];
    if !["$2y$", "$2b$", "$2a$"].iter().any(|kind| hash.starts_with(kind)) {
        let kind = KINDS.iter().find(|(start, _)| hash.starts_with(start)).map(|(_, kind)| *kind);
        return Err(match kind {
            Some(kind) => format!("{kind}; {AGAIN}"),
            None if hash.is_empty() => format!("no hash; {AGAIN}"),
            None if hash.len() == 13 => format!("a crypt hash, or a password in plain text; {AGAIN}"),
            None => format!("a password in plain text, or a hash of an unknown kind; {AGAIN}"),
        });
    }
    let Ok(parts) = hash.parse::<HashParts>() else {
        return Err(format!("a damaged bcrypt hash; {AGAIN}"));
    };
    match parts.get_cost() {
        cost if COSTS.contains(&cost) => Ok(()),
        cost if cost > *COSTS.end() => Err(format!(
            "a bcrypt hash with cost {cost}, which takes seconds per log-in; make it again with -C 12 or less: htpasswd -B -C 12 FILE NAME"
        )),
        cost => Err(format!("a bcrypt hash with cost {cost}, and the least is {}; {AGAIN}", COSTS.start())),
    }
}

/// The name and the role of each token.
fn parse_tokens(text: &str) -> Result<HashMap<TokenHash, (String, Role)>, String> {
    let mut tokens = HashMap::new();
    for (number, line) in lines(text) {
        let wrong = |why: &str| format!("line {number}: {why}; write NAME ROLE SHA256, for instance from: printf %s TOKEN | sha256sum");
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [name, role, hash] = fields[..] else {
            return Err(wrong(&format!("{} words instead of three", fields.len())));
        };
        check_name(name).map_err(wrong)?;
        // Neither is shown: one of them may be the token.
        let role = given(role).ok_or_else(|| wrong("the role is not read, write or admin"))?;
        let hash = HEXLOWER_PERMISSIVE.decode(hash.as_bytes()).ok().and_then(|hash| hash.try_into().ok());
        let hash = TokenHash(hash.ok_or_else(|| wrong("the hash does not have 64 hexadecimal digits"))?);
        if tokens.len() == MOST {
            return Err(wrong("more than 100,000 tokens"));
        }
        match tokens.entry(hash) {
            Entry::Vacant(entry) => entry.insert((name.to_owned(), role)),
            Entry::Occupied(_) => return Err(wrong("this token is there already")),
        };
    }
    Ok(tokens)
}

fn parse_scopes(scopes: &BTreeMap<String, Vec<String>>) -> Result<HashMap<String, Arc<[Scope]>>, String> {
    let parse = |(name, texts): (&String, &Vec<String>)| {
        let wrong = |why: &str| format!("scopes of {name:?}: {why}");
        check_name(name).map_err(wrong)?;
        if texts.is_empty() {
            // It could mean everything as well as nothing.
            return Err(wrong("the list is empty; write \"*\" for everything, or remove the name from the files"));
        }
        let parsed = texts.iter().map(|text| text.parse()).collect::<Result<_, String>>();
        Ok((name.clone(), parsed.map_err(|why| wrong(&why))?))
    };
    scopes.iter().map(parse).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::who::What;
    use proptest::prelude::*;
    use sha2::{Digest as _, Sha256};

    /// From Apache's documentation of its password formats: the password is `myPassword`.
    const APACHE: &str = "$2y$05$c4WoMPo3SXsafkva.HHa6uXQZWr7oboPiC2bT/r7q1BB8I2s0BRqC";

    pub(crate) fn bcrypted(password: &[u8]) -> String {
        bcrypt::hash(password, 4).unwrap()
    }

    pub(crate) fn sha256(token: &str) -> String {
        HEXLOWER_PERMISSIVE.encode(&Sha256::digest(token))
    }

    /// Users as the files and the scopes say. The role of htpasswd users is `write`.
    pub(crate) fn users(htpasswd: &str, tokens: &str, scopes: &[(&str, &[&str])]) -> Users {
        let scopes = scopes.iter().map(|(name, list)| ((*name).to_owned(), list.iter().map(|text| (*text).to_owned()).collect())).collect();
        Users::new(parse_htpasswd(htpasswd).unwrap(), parse_tokens(tokens).unwrap(), parse_scopes(&scopes).unwrap(), Role::Write)
    }

    /// The problem of the last line of an htpasswd file, after `line N: `.
    fn problem<T>(result: Result<T, String>, line: usize) -> String {
        let error = result.map(drop).unwrap_err();
        error.strip_prefix(&format!("line {line}: ")).unwrap_or_else(|| panic!("{error}")).to_owned()
    }

    #[test]
    fn an_htpasswd_file_is_read() {
        let two_b = APACHE.replace("2y", "2b");
        let two_a = APACHE.replace("2y", "2a");
        let text = format!("# users\r\n\r\nann:{APACHE}\r\n   \n  # bob:x\nBob B:{two_b}  \n\tcéline:{two_a}");
        let users = parse_htpasswd(&text).unwrap();
        let mut names: Vec<_> = users.keys().map(String::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["Bob B", "ann", "céline"]);
        for hash in users.values() {
            assert!(bcrypt::verify("myPassword", hash).unwrap() && !bcrypt::verify("mypassword", hash).unwrap());
        }
        assert!(parse_htpasswd("").unwrap().is_empty() && parse_htpasswd("#\n\n").unwrap().is_empty());
    }

    #[test]
    fn only_bcrypt_is_accepted_and_no_hash_is_shown() {
        for (hash, kind) in [
            ("$apr1$lZL6V/ci$eIMz/iKDkbtys/uU7LEK00", "an Apache MD5 hash"),
            ("{SHA}VBPuJHI7uixaa6LQGWx4s+5GKNE=", "a SHA-1 hash"),
            ("{SSHA}VBPuJHI7uixaa6LQGWx4s+5GKNE=", "a salted SHA-1 hash"),
            ("$1$lZL6V/ci$eIMz/iKDkbtys/uU7LEK00", "an MD5 hash"),
            ("$5$lZL6V/ci$eIMz/iKDkbtys/uU7LEK00", "a SHA-256 hash"),
            ("$6$lZL6V/ci$eIMz/iKDkbtys/uU7LEK00", "a SHA-512 hash"),
            ("$y$j9T$lZL6V$eIMz/iKDkbtys/uU7LEK00", "a yescrypt hash"),
            ("$argon2id$v=19$m=1$lZL6V/ci", "an Argon2 hash"),
            ("$2x$05$c4WoMPo3SXsafkva.HHa6uXQZWr7oboPiC2bT/r7q1BB8I2s0BRqC", "a bcrypt hash of a faulty program"),
            ("rqXexS6ZhobKA", "a crypt hash, or a password in plain text"),
            ("lZL6V/ci", "a password in plain text"),
            ("$9$lZL6V/ci", "a password in plain text, or a hash of an unknown kind"),
            ("", "no hash"),
            ("$2y$05$c4WoMPo3SXsafkva.HHa6uXQZWr7oboPiC2bT/r7q1BB8I2s0BRq", "a damaged bcrypt hash"),
            ("$2y$05$c4WoMPo3SXsafkva.HHa6uXQZWr7oboPiC2bT/r7q1BB8I2s0BRqC:note", "a damaged bcrypt hash"),
            ("$2y$xx$c4WoMPo3SXsafkva.HHa6uXQZWr7oboPiC2bT/r7q1BB8I2s0BRqC", "a damaged bcrypt hash"),
            ("$2y$03$c4WoMPo3SXsafkva.HHa6uXQZWr7oboPiC2bT/r7q1BB8I2s0BRqC", "a bcrypt hash with cost 3, and the least is 4"),
        ] {
            let why = problem(parse_htpasswd(&format!("bob:{APACHE}\n#\nann:{hash}")), 3);
            assert!(why.starts_with(&format!("user \"ann\" has {kind}")), "{hash}: {why}");
            assert!(why.ends_with("make it again with: htpasswd -B FILE NAME"), "{why}");
            assert!(!why.contains("lZL6V") && !why.contains("VBPuJ") && !why.contains("c4Wo") && !why.contains("rqXe"), "{why}");
        }
    }

    #[test]
    fn a_hash_that_takes_seconds_is_refused() {
        let with_cost = |cost: &str| parse_htpasswd(&format!("ann:{}", APACHE.replace("$05$", &format!("${cost}$"))));
        assert!(with_cost("04").is_ok() && with_cost("14").is_ok());
        for cost in ["15", "31"] {
            let why = problem(with_cost(cost), 1);
            assert!(why.contains("takes seconds per log-in; make it again with -C 12 or less"), "{why}");
        }
    }

    #[test]
    fn names_are_checked() {
        for (line, why) in [
            (format!(":{APACHE}"), "the name is empty"),
            (format!("a\x07b:{APACHE}"), "the name has a control character"),
            (format!("a\rb:{APACHE}"), "the name has a control character"),
            (format!("{APACHE}:ann"), "the name begins with $"),
            (APACHE.to_owned(), "there is no colon"),
            ("password".to_owned(), "there is no colon"),
        ] {
            let error = problem(parse_htpasswd(&format!("\n{line}")), 2);
            assert!(error.starts_with(why) && error.ends_with("write NAME:HASH, for instance with: htpasswd -B FILE NAME"), "{error}");
            assert!(!error.contains("c4Wo") && !error.contains("password"), "{error}");
        }
        let why = problem(parse_htpasswd(&format!("ann:{APACHE}\nbob:{APACHE}\nann:{APACHE}")), 3);
        assert_eq!(why, "user \"ann\" is there twice; remove one of the lines");
    }

    #[test]
    fn the_number_of_users_and_of_tokens_is_bounded() {
        let lines = |count: usize, line: &dyn Fn(usize) -> String| (0..count).map(line).collect::<Vec<_>>().join("\n");
        let user = |number| format!("{number}:{APACHE}");
        assert_eq!(parse_htpasswd(&lines(MOST, &user)).unwrap().len(), MOST);
        assert!(problem(parse_htpasswd(&lines(MOST + 1, &user)), MOST + 1).starts_with("more than 100,000 users"));
        let token = |number| format!("ci read {number:064x}");
        assert_eq!(parse_tokens(&lines(MOST, &token)).unwrap().len(), MOST);
        assert!(problem(parse_tokens(&lines(MOST + 1, &token)), MOST + 1).starts_with("more than 100,000 tokens"));
    }

    #[test]
    fn tokens_are_read() {
        let (old, new, other) = (sha256("old"), sha256("new").to_uppercase(), sha256("other"));
        let tokens = parse_tokens(&format!("# ci\r\nci write {old}\r\n\nci   read\t{new}\n admin admin {other} ")).unwrap();
        let of = |token: &str| tokens.get(&TokenHash(Sha256::digest(token).into())).map(|(name, role)| (name.as_str(), *role));
        assert_eq!(of("old"), Some(("ci", Role::Write)));
        assert_eq!(of("new"), Some(("ci", Role::Read)), "several tokens may have one name");
        assert_eq!(of("other"), Some(("admin", Role::Admin)));
        assert_eq!(of("third"), None);
    }

    #[test]
    fn a_wrong_line_of_tokens_is_an_error_without_its_text() {
        let hash = sha256("token");
        for (line, why) in [
            ("ci s3cret".to_owned(), "2 words instead of three"),
            ("s3cret".to_owned(), "1 words instead of three"),
            (format!("ci read {hash} s3cret"), "4 words instead of three"),
            (format!("ci s3cret {hash}"), "the role is not read, write or admin"),
            (format!("ci none {hash}"), "the role is not read, write or admin"),
            (format!("ci READ {hash}"), "the role is not read, write or admin"),
            ("ci read s3cret".to_owned(), "the hash does not have 64 hexadecimal digits"),
            (format!("ci read {}", &hash[..62]), "the hash does not have 64 hexadecimal digits"),
            (format!("ci read {hash}00"), "the hash does not have 64 hexadecimal digits"),
            (format!("a\x01 read {hash}"), "the name has a control character"),
            (format!("other write {}", sha256("first").to_uppercase()), "this token is there already"),
        ] {
            let error = problem(parse_tokens(&format!("ci read {}\n\n{line}", sha256("first"))), 3);
            let advice = "; write NAME ROLE SHA256, for instance from: printf %s TOKEN | sha256sum";
            assert_eq!(error, format!("{why}{advice}"), "{line}");
        }
    }

    #[test]
    fn scopes_belong_to_names() {
        let text = |token: &str, role: &str, name: &str| format!("{name} {role} {}\n", sha256(token));
        let tokens = text("1", "admin", "ann") + &text("2", "read", "ci");
        let users = users(&format!("ann:{APACHE}\nbob:{APACHE}"), &tokens, &[("ann", &["cas", "read:kv"]), ("certificate", &["*"])]);
        let ann = users.password(Some("ann")).unwrap().1.unwrap();
        assert!(ann.may(Role::Write, What::Blobs) && ann.may(Role::Read, What::Entry("/kv/a")) && !ann.may(Role::Read, What::Other));
        assert_eq!((ann.name(), ann.role()), ("ann", Role::Write));
        let bob = users.password(Some("bob")).unwrap().1.unwrap();
        assert!(bob.may(Role::Write, What::Other) && !bob.may(Role::Admin, What::Other));
        let token = |token: &str| users.token(TokenHash(Sha256::digest(token).into()));
        let ann = token("1").unwrap();
        assert!(ann.may(Role::Admin, What::Blobs) && !ann.may(Role::Read, What::Other));
        assert!(token("2").unwrap().may(Role::Read, What::Other) && token("3").is_none());
        assert_eq!(users.scopes("certificate").len(), 1);
        assert!(users.scopes("nobody").is_empty());
        assert_eq!(users.unknown_names(), ["certificate"]);
    }

    #[test]
    fn each_file_is_read_again_by_itself() {
        let dir = tempfile::tempdir().unwrap();
        let [htpasswd, tokens] = ["users", "tokens"].map(|name| dir.path().join(name));
        let scopes = BTreeMap::from([("ci".to_owned(), vec!["cas".to_owned()])]);
        let sources = Sources { htpasswd: Some(&htpasswd), tokens: Some(&tokens), role: Role::Write, scopes: &scopes };
        std::fs::write(&htpasswd, format!("ann:{APACHE}\nbob:{APACHE}\n")).unwrap();
        std::fs::write(&tokens, format!("ci admin {}\n", sha256("token"))).unwrap();
        let first = Users::read(&sources).unwrap();
        std::fs::write(&tokens, "ci admin token\n").unwrap();
        std::fs::write(&htpasswd, format!("ann:{APACHE}\n")).unwrap();
        let (second, problems) = first.reread(&sources).unwrap();
        assert!(problems.len() == 1 && problems[0].contains("tokens: line 1: "), "{problems:?}");
        assert_eq!((second.counts(), second.epoch() == first.epoch()), ((1, 1), false));
        let ci = second.token(TokenHash(Sha256::digest("token").into())).unwrap();
        assert!(ci.may(Role::Admin, What::Blobs) && !ci.may(Role::Read, What::Other));
        // Nobody is left, which is no mistake.
        std::fs::write(&htpasswd, "").unwrap();
        std::fs::write(&tokens, "").unwrap();
        let (third, problems) = second.reread(&sources).unwrap();
        assert_eq!((third.counts(), problems.len()), ((0, 0), 0));
    }

    #[test]
    fn a_star_is_for_all_who_are_not_named() {
        let users = users(&format!("ann:{APACHE}\nbob:{APACHE}"), "", &[("ann", &["*"]), ("*", &["read:cas"])]);
        let may = |name: &str, what| users.password(Some(name)).unwrap().1.unwrap().may(Role::Write, what);
        assert!(may("ann", What::Other) && !may("bob", What::Blobs));
        assert!(users.scopes("a certificate").len() == 1 && users.unknown_names().is_empty());
    }

    #[test]
    fn wrong_scopes_are_errors() {
        let parse = |name: &str, list: &[&str]| {
            let list = list.iter().map(|text| (*text).to_owned()).collect();
            parse_scopes(&BTreeMap::from([(name.to_owned(), list)])).map(drop)
        };
        assert!(parse("ann", &["cas", "read:kv/a"]).is_ok());
        for (name, list, why) in [
            ("ann", &["cas", "blobs"][..], "scopes of \"ann\": \"blobs\": a scope is"),
            ("ann", &[], "scopes of \"ann\": the list is empty; write \"*\" for everything"),
            ("", &["cas"], "scopes of \"\": the name is empty"),
            ("a\nb", &["cas"], "scopes of \"a\\nb\": the name has a control character"),
        ] {
            let error = parse(name, list).unwrap_err();
            assert!(error.starts_with(why), "{error}");
        }
    }

    #[test]
    fn an_unknown_name_costs_what_most_users_cost() {
        let with_cost = |name: &str, cost: &str| format!("{name}:{}\n", APACHE.replace("$05$", &format!("${cost}$")));
        let cost = |text: &str| {
            let users = users(text, "", &[]);
            let unknown = [users.password(None), users.password(Some("")), users.password(Some("nobody"))];
            let costs = unknown.map(|found| found.map(|(hash, who)| (hash.parse::<HashParts>().unwrap().get_cost(), who.is_none())));
            assert!(costs[0] == costs[1] && costs[1] == costs[2]);
            costs[0]
        };
        assert_eq!(cost(""), None);
        assert_eq!(cost(&with_cost("a", "05")), Some((5, true)));
        assert_eq!(cost(&(with_cost("a", "05") + &with_cost("b", "04") + &with_cost("c", "05") + &with_cost("d", "12"))), Some((5, true)));
        assert_eq!(cost(&(with_cost("a", "05") + &with_cost("b", "04"))), Some((5, true)));
        let users = users(&with_cost("a", "04"), "", &[]);
        assert!(!bcrypt::verify("", users.password(None).unwrap().0).unwrap());
    }

    #[test]
    fn files_are_read_up_to_a_size() {
        let directory = tempfile::tempdir().unwrap();
        let (htpasswd, tokens) = (directory.path().join("htpasswd"), directory.path().join("tokens"));
        let scopes = BTreeMap::from([("ci".to_owned(), vec!["cas".to_owned()])]);
        let sources = Sources { htpasswd: Some(&htpasswd), tokens: Some(&tokens), role: Role::Read, scopes: &scopes };
        let fill = |file: &Path, bytes: &[u8]| std::fs::write(file, bytes).unwrap();
        let error = || Users::read(&sources).unwrap_err();
        assert!(error().starts_with(&format!("{}: ", htpasswd.display())) && error().ends_with("let castier read it"));

        fill(&htpasswd, format!("ann:{APACHE}\n").as_bytes());
        fill(&tokens, format!("ci write {}\n", sha256("token")).as_bytes());
        let users = Users::read(&sources).unwrap();
        assert_eq!(users.password(Some("ann")).unwrap().1.unwrap().role(), Role::Read);
        assert!(!users.token(TokenHash(Sha256::digest("token").into())).unwrap().may(Role::Read, What::Other));

        fill(&tokens, b"ci write\n");
        assert!(error().starts_with(&format!("{}: line 1: 2 words", tokens.display())));
        fill(&htpasswd, b"ann:x");
        assert!(error().starts_with(&format!("{}: line 1: user \"ann\"", htpasswd.display())));
        fill(&htpasswd, b"# \xc3\xa9\n#\n\xe9:x");
        assert_eq!(error(), format!("{}: line 3: not UTF-8; save the file as UTF-8", htpasswd.display()));
        let mut large = vec![b'#'; usize::try_from(MOST_BYTES).unwrap()];
        fill(&htpasswd, &large);
        assert!(error().contains("line 1: 2 words"), "4 MiB are not too many");
        large.push(b'#');
        fill(&htpasswd, &large);
        assert_eq!(error(), format!("{}: larger than 4 MiB; remove the lines that nobody needs", htpasswd.display()));

        let none = Users::read(&Sources { htpasswd: None, tokens: None, ..sources }).unwrap();
        assert!(none.password(Some("ann")).is_none());
        let wrong = BTreeMap::from([("ci".to_owned(), vec!["x".to_owned()])]);
        let error = Users::read(&Sources { htpasswd: None, tokens: None, scopes: &wrong, ..sources }).unwrap_err();
        assert!(error.starts_with("scopes of \"ci\": "));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parsers_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let text = String::from_utf8_lossy(&bytes);
            for error in [parse_htpasswd(&text).map(drop), parse_tokens(&text).map(drop)].into_iter().filter_map(Result::err) {
                prop_assert!(error.starts_with("line "));
            }
        }

        #[test]
        fn nor_does_a_text_that_is_nearly_right(text in "([ab#]:\\$2[abxy]\\$[01][0-9]\\$[./A-Za-z0-9é:]{0,54}\r?\n){0,3}([ab] (read|write|x) [0-9a-gé]{60,66} ?\n){0,3}") {
            let _ = (parse_htpasswd(&text), parse_tokens(&text));
        }

        #[test]
        fn nor_does_a_file(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), &bytes).unwrap();
            prop_assert_eq!(read(file.path()).is_ok(), std::str::from_utf8(&bytes).is_ok());
        }
    }
}
