//! Gives each target its corpus, and then seeds that were changed by chance: 2,000 of them, or `CASTIER_FUZZ_CASES`. `TEST_SEED` makes other ones.
#![expect(clippy::unwrap_used, reason = "a test panics on what should not be")]

use castier_fuzz::{TARGETS, run};
use rand::{Rng as _, RngExt as _, SeedableRng as _, seq::IndexedRandom as _};
use rand_xoshiro::Xoshiro256PlusPlus;
use std::{collections::BTreeSet, env, fs, path::Path};

/// Longer inputs show nothing new, and take longer.
const LONGEST: usize = 4096;

/// What parsers look at. Between two of them is a space.
const WORDS: &str = "\r\n \n \r \t , ; : = / \\ \" ' < > { } [ ] ( ) & % # ? * + - . .. ... ~ $ @ %2F %2f %2e %00 %0a %zz %C3%A9 %ff é ſ \u{2028} \u{feff} \
    0 1 00 -1 +1 1e9 0x1 007 255 256 65535 65536 4294967296 9223372036854775807 9223372036854775808 18446744073709551615 18446744073709551616 \
    99999999999999999999999999 null true {} [] {\"a\":1} \\u0000 \\ud800 \\u0061 <!-- --> <![CDATA[ ]]> &amp; &#0; &quot; \
    http:// https:// // http://[::1]:80/ ftp: unknown ::1 127.0.0.1 [ ]: bytes=0-0 bytes=-1 chunked identity gzip";

fn generator(seed: u64, case: u64) -> Xoshiro256PlusPlus {
    Xoshiro256PlusPlus::seed_from_u64(seed.rotate_left(32) ^ case)
}

/// A seed of the corpus with one to five changes.
fn changed(seeds: &[Vec<u8>], rng: &mut Xoshiro256PlusPlus) -> Vec<u8> {
    let mut bytes = seeds.choose(rng).cloned().unwrap_or_default();
    for _ in 0..rng.random_range(1..=5) {
        change(&mut bytes, seeds, rng);
        bytes.truncate(LONGEST);
    }
    bytes
}

fn change(bytes: &mut Vec<u8>, seeds: &[Vec<u8>], rng: &mut Xoshiro256PlusPlus) {
    let at = rng.random_range(0..=bytes.len());
    // Most pieces are short.
    let most = if rng.random_bool(0.8) { 8 } else { 200 };
    let end = bytes.len().min(at + rng.random_range(0..=most));
    match rng.random_range(0..10) {
        0 if at < bytes.len() => bytes[at] ^= 1 << rng.random_range(0..8),
        1 if at < bytes.len() => bytes[at] = rng.random(),
        2 => bytes.insert(at, rng.random()),
        3 | 4 => {
            let words: Vec<_> = WORDS.split(' ').collect();
            let word = words.choose(rng).copied().unwrap_or_default();
            let replaced = if rng.random_bool(0.5) { at..at } else { at..end };
            bytes.splice(replaced, word.bytes());
        }
        5 => drop(bytes.drain(at..end)),
        6 => {
            let piece = bytes[at..end].to_vec();
            bytes.splice(at..at, piece.repeat(rng.random_range(1..=4)));
        }
        7 => bytes.truncate(at),
        8 => {
            // The end of another seed, or a piece of it.
            let other = seeds.choose(rng).cloned().unwrap_or_default();
            let from = rng.random_range(0..=other.len());
            if rng.random_bool(0.5) {
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            } else {
                let to = other.len().min(from + rng.random_range(0..=most));
                bytes.splice(at..at, other[from..to].iter().copied());
            }
        }
        _ => {
            // A number becomes another one.
            let start = bytes[at..].iter().position(u8::is_ascii_digit).map_or(bytes.len(), |found| at + found);
            let length = bytes[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            let number: u128 = rng.random::<u128>() >> rng.random_range(0..128);
            if length > 0 {
                bytes.splice(start..start + length, number.to_string().bytes());
            }
        }
    }
}

fn number(variable: &str, usual: u64) -> u64 {
    env::var(variable).map_or(usual, |value| value.parse().unwrap_or_else(|error| panic!("{variable}: {error}")))
}

fn corpus() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

fn names_in(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Prints an input at which a target panics.
struct Current<'a> {
    target: &'a str,
    whence: String,
    bytes: &'a [u8],
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{} panics at {}: b\"{}\"", self.target, self.whence, self.bytes.escape_ascii());
        }
    }
}

fn replay(target: &str) {
    let folder = corpus().join(target);
    let mut seeds = Vec::new();
    for name in names_in(&folder) {
        let bytes = fs::read(folder.join(&name)).unwrap();
        let current = Current { target, whence: format!("the seed {name}"), bytes: &bytes };
        run(target, current.bytes);
        drop(current);
        seeds.push(bytes);
    }
    assert!(seeds.len() >= 2, "{target}: add seeds to {}", folder.display());
    let (seed, cases) = (number("TEST_SEED", 1), number("CASTIER_FUZZ_CASES", 2000));
    for case in 0..cases {
        let bytes = changed(&seeds, &mut generator(seed, case));
        let current = Current { target, whence: format!("case {case} with TEST_SEED={seed}"), bytes: &bytes };
        run(target, current.bytes);
    }
}

/// A test for each target, so that they run in parallel.
macro_rules! tests {
    ($($name:ident)*) => {
        const TESTED: &[&str] = &[$(stringify!($name)),*];
        $(
            #[test]
            fn $name() {
                replay(stringify!($name));
            }
        )*
    };
}

tests! {
    answer authorization challenge chunks conditions content_range crate_path digest entry far_link fields form forwarded freshness glob hosts html_links
    http2_frames http2_head json_links json_members lfs_answer lfs_request link_header manifest metadata_cargo metadata_debian metadata_nix metadata_npm metadata_pypi nix_priority
    object_key path peer_name proof proxy_header range request_head route_path route_table ticket trace xml_error xml_uploads
}

#[test]
fn each_target_has_a_test_a_corpus_a_program_and_a_line() {
    let targets: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
    assert_eq!(targets, TESTED);
    let targets: BTreeSet<String> = targets.into_iter().map(str::to_owned).collect();
    assert_eq!(names_in(&corpus()), targets);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let programs = fs::read_to_string(folder.join("fuzz/Cargo.toml")).unwrap();
    let programs: BTreeSet<_> =
        programs.split("[[bin]]\nname = \"").skip(1).filter_map(|rest| rest.split('"').next()).map(str::to_owned).collect();
    assert_eq!(programs, targets);
    let text = fs::read_to_string(folder.join("README.md")).unwrap();
    let named: BTreeSet<_> = text.split('`').skip(1).step_by(2).map(str::to_owned).collect();
    let missing: Vec<_> = targets.difference(&named).collect();
    assert!(missing.is_empty(), "README.md lists no {missing:?}");
}

/// A change that changes nothing would test nothing.
#[test]
fn changes_differ() {
    let seeds = vec![b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(), b"0123456789".to_vec()];
    let all: BTreeSet<_> = (0..1000).map(|case| changed(&seeds, &mut generator(1, case))).collect();
    assert!(all.len() > 900, "{}", all.len());
    assert_eq!(changed(&seeds, &mut generator(1, 7)), changed(&seeds, &mut generator(1, 7)));
    assert!(generator(1, 0).next_u64() != generator(2, 0).next_u64());
}
