//! What an upstream asks for before it lets a client in (RFC 9110, section 11.6.1), and the tokens of a registry's realm.

use http::{HeaderMap, HeaderValue, header};
use http_auth::{ChallengeRef, parser::ChallengeParser};
use serde::Deserialize;
use std::time::Duration;

/// A challenge that castier can answer. It passes over those of other schemes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Challenge {
    /// A user and a password.
    Basic {
        /// What they are for.
        realm: String,
    },
    /// A token, as registries use it (<https://distribution.github.io/distribution/spec/auth/token/>).
    Bearer {
        /// The URL that gives tokens, as the upstream wrote it. Whether castier may ask there is for the caller to decide.
        realm: String,
        /// The service that the token is for.
        service: Option<String>,
        /// What the token must allow. Scopes are separated by spaces.
        scope: Option<String>,
    },
}

/// The challenges in all lines of `WWW-Authenticate`, in their order. What follows a syntax error in a line is passed over.
pub fn challenges(headers: &HeaderMap) -> Vec<Challenge> {
    let lines = headers.get_all(header::WWW_AUTHENTICATE).iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(ChallengeParser::new).filter_map(|challenge| understood(&challenge.ok()?)).collect()
}

fn understood(challenge: &ChallengeRef<'_>) -> Option<Challenge> {
    // The first parameter of a name counts.
    let parameter = |wanted: &str| {
        let (_, value) = challenge.params.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted))?;
        Some(value.to_unescaped())
    };
    match () {
        () if challenge.scheme.eq_ignore_ascii_case("basic") => Some(Challenge::Basic { realm: parameter("realm").unwrap_or_default() }),
        () if challenge.scheme.eq_ignore_ascii_case("bearer") => {
            Some(Challenge::Bearer { realm: parameter("realm")?, service: parameter("service"), scope: parameter("scope") })
        }
        () => None,
    }
}

/// The longest token that is taken, in bytes. The head of a request must have space for it.
const MAX_TOKEN: usize = 16 << 10;

/// How long a token holds where the realm does not say it, and the least that it may say.
const LEAST_LIFETIME: Duration = Duration::from_secs(60);

/// The token in a realm's answer, and for how long after its arrival it holds. `None`: the answer has none that can stand in a header. The time of issue is
/// passed over: the clocks of two machines differ, and a token that ends too early costs one more question.
pub fn token(body: &[u8]) -> Option<(String, Duration)> {
    #[derive(Deserialize)]
    struct Answer {
        token: Option<String>,
        access_token: Option<String>,
        expires_in: Option<serde_json::Value>,
    }
    let answer: Answer = serde_json::from_slice(body).ok()?;
    let mut tokens = [answer.token, answer.access_token].into_iter().flatten().filter(|token| !token.is_empty());
    let token = tokens.next().filter(|token| token.len() <= MAX_TOKEN && token.bytes().all(|byte| byte.is_ascii_graphic()))?;
    HeaderValue::from_str(&token).ok()?;
    let seconds = answer.expires_in.and_then(|value| value.as_u64().or_else(|| value.as_str()?.parse().ok()));
    let lifetime = seconds.map_or(LEAST_LIFETIME, Duration::from_secs);
    Some((token, lifetime.max(LEAST_LIFETIME)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(lines: &[&str]) -> Vec<Challenge> {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(header::WWW_AUTHENTICATE, HeaderValue::from_bytes(line.as_bytes()).unwrap());
        }
        challenges(&headers)
    }

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        Challenge::Bearer { realm: realm.into(), service: service.map(str::to_owned), scope: scope.map(str::to_owned) }
    }

    #[test]
    fn challenges_of_registries() {
        let hub = r#"Bearer realm="https://auth.example/token",service="registry.example",scope="repository:library/nginx:pull,push""#;
        let expected = bearer("https://auth.example/token", Some("registry.example"), Some("repository:library/nginx:pull,push"));
        assert_eq!(of(&[hub]), std::slice::from_ref(&expected));
        let basic = Challenge::Basic { realm: "a \"b\", c".into() };
        assert_eq!(of(&[r#"Negotiate, basic realm = "a \"b\", c" , charset="UTF-8""#, hub]), [basic.clone(), expected.clone()]);
        assert_eq!(of(&[&format!(r#"{hub}, error="invalid_token", Basic Realm="a \"b\", c""#)]), [expected, basic]);
        assert_eq!(of(&["BEARER scope=x,realm=y"]), [bearer("y", None, Some("x"))]);
        assert_eq!(of(&["Basic"]), [Challenge::Basic { realm: String::new() }]);
        for nothing in ["", "Bearer", "Bearer service=\"x\"", "Digest realm=\"x\"", "Negotiate YWJj==", "\"", "Bearer realm=\"x"] {
            assert_eq!(of(&[nothing]), [], "{nothing}");
        }
        // What came before an error counts.
        assert_eq!(of(&["Basic realm=x, Bearer realm=https://auth.example"]), [Challenge::Basic { realm: "x".into() }]);
        assert_eq!(of(&["é", "Basic realm=x"]), [Challenge::Basic { realm: "x".into() }]);
    }

    #[test]
    fn tokens() {
        let seconds = |token: &str, seconds| Some((token.to_owned(), Duration::from_secs(seconds)));
        for (body, expected) in [
            (r#"{"token":"a.b-c_d","expires_in":300,"issued_at":"2026-01-01T00:00:00Z"}"#, seconds("a.b-c_d", 300)),
            (r#"{"access_token":"t"}"#, seconds("t", 60)),
            (r#"{"token":"a","access_token":"b"}"#, seconds("a", 60)),
            (r#"{"token":"","access_token":"b","expires_in":null}"#, seconds("b", 60)),
            (r#"{"token":"a","expires_in":1}"#, seconds("a", 60)),
            (r#"{"token":"a","expires_in":"90"}"#, seconds("a", 90)),
            (r#"{"token":"a","expires_in":-5}"#, seconds("a", 60)),
            (r#"{"token":"a","expires_in":18446744073709551615}"#, seconds("a", u64::MAX)),
            (r#"{"token":"a\r\nX: y"}"#, None),
            (r#"{"token":"a b"}"#, None),
            (r#"{"token":7}"#, None),
            (r#"{"token":""}"#, None),
            ("{}", None),
            ("[]", None),
            ("", None),
        ] {
            assert_eq!(token(body.as_bytes()), expected, "{body}");
        }
        assert_eq!(token(format!(r#"{{"token":"{}"}}"#, "a".repeat(MAX_TOKEN + 1)).as_bytes()), None);
    }

    proptest! {
        #[test]
        fn parameters_come_as_they_were_meant(realm in "[ -~]{0,30}", scope in "[ -~]{0,30}") {
            let quoted = |value: &str| format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""));
            let line = format!("Negotiate, Bearer realm={},scope={}, Basic realm=x", quoted(&realm), quoted(&scope));
            prop_assert_eq!(of(&[&line]), [bearer(&realm, None, Some(&scope)), Challenge::Basic { realm: "x".into() }]);
        }

        #[test]
        fn no_line_panics(line in "[ -~\u{80}-\u{ff}]{0,40}", body in "[{}\":a-z,0-9]{0,40}") {
            of(&[&line, &format!("Bearer realm=\"x\"{line}")]);
            token(body.as_bytes());
        }
    }
}
