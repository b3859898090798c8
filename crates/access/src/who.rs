//! Roles, scopes, and the client that has them.

use castier_config::Role;
use castier_wire::split_instance;
use std::{fmt, str::FromStr, sync::Arc};

/// What a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What<'a> {
    /// Blobs, of all instances: they are shared.
    Blobs,
    /// An entry or a collection, by its decoded path: `/ac/KEY`, `/INSTANCE/ac/KEY`, `/kv/a/b`, `/kv/a/`.
    Entry(&'a str),
    /// A route.
    Route {
        /// Its own name.
        name: &'a str,
        /// The protocol that it caches; empty without one.
        protocol: &'a str,
    },
    /// Anything else.
    Other,
}

/// A part of what there is, and the role of a client there. As text `[ROLE:]WHAT`; WHAT is one of:
///
/// | text | what it covers |
/// | --- | --- |
/// | `*` | everything |
/// | `cas` | blobs |
/// | `ac` | the entries below `/ac/` and below `/INSTANCE/ac/` of every instance |
/// | `ac/INSTANCE` | the entries below `/INSTANCE/ac/` |
/// | `kv` | the entries below `/kv/` |
/// | `kv/PATH` | the entry `/kv/PATH`, and those below `/kv/PATH/` |
/// | `route/NAME` | a route, or all of this protocol |
///
/// Without ROLE the client's own role holds there.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Scope {
    role: Option<Role>,
    part: Part,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Part {
    All,
    Blobs,
    Actions,
    ActionsOf(String),
    Values,
    ValuesAt(String),
    Route(String),
}

/// A client that is known, or the anonymous one.
#[derive(Debug)]
pub struct Who {
    name: String,
    role: Role,
    scopes: Arc<[Scope]>,
    /// The number of the [`Users`](crate::Users) that it is of; 0: of none.
    epoch: u64,
}

impl Who {
    pub(crate) const fn new(name: String, role: Role, scopes: Arc<[Scope]>, epoch: u64) -> Self {
        Self { name, role, scopes, epoch }
    }

    /// The name of the user, of the token or of the certificate. Empty: anonymous. It has no control characters.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The role that holds where no scope says otherwise.
    pub const fn role(&self) -> Role {
        self.role
    }

    /// Where the client has a role. None: everywhere.
    pub fn scopes(&self) -> &[Scope] {
        &self.scopes
    }

    pub(crate) const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether the client may do what needs this role, with this.
    pub fn may(&self, needed: Role, what: What<'_>) -> bool {
        if self.scopes.is_empty() {
            return self.role >= needed;
        }
        self.scopes.iter().any(|scope| scope.role.unwrap_or(self.role) >= needed && scope.part.covers(what))
    }
}

impl Scope {
    /// The route that it covers, if it is one's.
    pub(crate) fn route(&self) -> Option<&str> {
        if let Part::Route(name) = &self.part { Some(name) } else { None }
    }
}

impl Part {
    fn covers(&self, what: What<'_>) -> bool {
        match (self, what) {
            (Self::All, _) | (Self::Blobs, What::Blobs) => true,
            (Self::Actions, What::Entry(path)) => instance(path).is_some(),
            (Self::ActionsOf(name), What::Entry(path)) => instance(path) == Some(name.as_str()),
            (Self::Values, What::Entry(path)) => value(path).is_some(),
            (Self::ValuesAt(top), What::Entry(path)) => {
                value(path).and_then(|path| path.strip_prefix(top.as_str())).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            (Self::Route(known), What::Route { name, protocol }) => known == name || known == protocol,
            _ => false,
        }
    }
}

/// The instance of an entry below `/ac/` (an empty one) or `/INSTANCE/ac/`.
fn instance(path: &str) -> Option<&str> {
    if path.starts_with("/ac/") {
        return Some("");
    }
    let (instance, rest) = split_instance(path)?;
    rest.starts_with("/ac/").then_some(instance)
}

/// The path of an entry below `/kv`.
fn value(path: &str) -> Option<&str> {
    if path == "/kv" { Some("") } else { path.strip_prefix("/kv/") }
}

/// The role that a line of a file or a scope gives. `none` is not one: a credential for nothing is a mistake.
pub(crate) fn given(text: &str) -> Option<Role> {
    text.parse().ok().filter(|role| *role != Role::None)
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(role) = self.role {
            write!(f, "{role}:")?;
        }
        match &self.part {
            Part::All => f.write_str("*"),
            Part::Blobs => f.write_str("cas"),
            Part::Actions => f.write_str("ac"),
            Part::ActionsOf(instance) => write!(f, "ac/{instance}"),
            Part::Values => f.write_str("kv"),
            Part::ValuesAt(path) => write!(f, "kv/{path}"),
            Part::Route(name) => write!(f, "route/{name}"),
        }
    }
}

impl FromStr for Scope {
    /// What is wrong, and what would be right.
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| Err(format!("{text:?}: {why}"));
        // A colon after a slash belongs to a name.
        let (role, part) = match text.split_once(':') {
            Some((role, part)) if !role.contains('/') => match given(role) {
                Some(role) => (Some(role), part),
                None if role == "none" => {
                    return wrong("a scope gives a role, and takes none away; list only what is allowed, with read, write or admin");
                }
                None => return wrong("before the colon stands a role: read, write or admin"),
            },
            _ => (None, text),
        };
        let part = match (part, part.split_once('/')) {
            ("*", _) => Part::All,
            ("cas", _) => Part::Blobs,
            ("ac", _) => Part::Actions,
            ("kv", _) => Part::Values,
            (_, Some(("ac", name))) => match split_instance(&format!("/{name}/ac/")) {
                Some((instance, "/ac/")) => Part::ActionsOf(instance.to_owned()),
                _ => return wrong("after ac/ stands the name of an instance: letters, digits and -._~"),
            },
            (_, Some(("kv", path))) => {
                if path.split('/').any(|segment| matches!(segment, "" | "." | "..")) || path.chars().any(char::is_control) {
                    return wrong(
                        "after kv/ stands a path as it is decoded, such as kv/team/main, without a slash at its end, empty parts, . or ..",
                    );
                }
                Part::ValuesAt(path.to_owned())
            }
            (_, Some(("route", name))) => {
                if name.is_empty() || name.chars().any(char::is_control) {
                    return wrong("after route/ stands the name of a route");
                }
                Part::Route(name.to_owned())
            }
            _ => {
                return wrong(
                    "a scope is *, cas, ac, ac/INSTANCE, kv, kv/PATH or route/NAME, with a role in front of it or without: write:kv/PATH",
                );
            }
        };
        Ok(Self { role, part })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn who(role: Role, scopes: &[&str]) -> Who {
        Who::new("ann".to_owned(), role, scopes.iter().map(|scope| scope.parse().unwrap()).collect(), 0)
    }

    const ROLES: [Role; 4] = [Role::None, Role::Read, Role::Write, Role::Admin];

    #[test]
    fn roles_are_ordered_and_have_names() {
        assert!(ROLES.is_sorted());
        for (role, text) in ROLES.into_iter().zip(["none", "read", "write", "admin"]) {
            assert_eq!(role.to_string(), text);
            assert_eq!(serde_json::to_string(&role).unwrap(), format!("{text:?}"));
            assert_eq!(serde_json::from_str::<Role>(&format!("{text:?}")).unwrap(), role);
        }
        assert!(serde_json::from_str::<Role>("\"Read\"").is_err());
    }

    const PYPI: What<'static> = What::Route { name: "pypi /python", protocol: "pypi" };
    const PYPI2: What<'static> = What::Route { name: "pypi /other", protocol: "pypi" };

    #[test]
    fn without_scopes_the_role_holds_everywhere() {
        for role in ROLES {
            for needed in ROLES {
                for what in [What::Blobs, What::Entry("/kv/a"), PYPI, What::Other] {
                    assert_eq!(who(role, &[]).may(needed, what), role >= needed, "{role} {needed} {what:?}");
                }
            }
        }
    }

    #[test]
    fn a_scope_covers_what_it_names() {
        const ALL: [What<'_>; 16] = [
            What::Blobs,
            What::Other,
            PYPI,
            PYPI2,
            What::Entry("/ac/00"),
            What::Entry("/team/ac/00"),
            What::Entry("/team-2/ac/00"),
            What::Entry("/kv"),
            What::Entry("/kv/"),
            What::Entry("/kv/a"),
            What::Entry("/kv/a/"),
            What::Entry("/kv/a/b"),
            What::Entry("/kv/a/b/c"),
            What::Entry("/kv/ab"),
            What::Entry("/kv/ac/00"),
            What::Entry("/kv/b:c"),
        ];
        for (scope, covered) in [
            ("*", &ALL[..]),
            ("cas", &[What::Blobs]),
            ("ac", &[What::Entry("/ac/00"), What::Entry("/team/ac/00"), What::Entry("/team-2/ac/00")]),
            ("ac/team", &[What::Entry("/team/ac/00")]),
            ("kv", &ALL[7..]),
            ("kv/a", &[What::Entry("/kv/a"), What::Entry("/kv/a/"), What::Entry("/kv/a/b"), What::Entry("/kv/a/b/c")]),
            ("kv/a/b", &[What::Entry("/kv/a/b"), What::Entry("/kv/a/b/c")]),
            ("kv/b:c", &[What::Entry("/kv/b:c")]),
            ("kv/ac", &[What::Entry("/kv/ac/00")]),
            ("route/pypi", &[PYPI, PYPI2]),
            ("route/pypi /other", &[PYPI2]),
        ] {
            let who = who(Role::Read, &[scope]);
            for what in ALL {
                assert_eq!(who.may(Role::Read, what), covered.contains(&what), "{scope} {what:?}");
                assert!(!who.may(Role::Write, what), "{scope} {what:?}");
            }
        }
    }

    #[test]
    fn a_scope_has_its_own_role_or_that_of_the_client() {
        let who = who(Role::Write, &["cas", "read:*", "admin:kv/a", "read:ac", "write:ac/team"]);
        let most = |what| ROLES.into_iter().rev().find(|role| who.may(*role, what));
        for (what, expected) in [
            (What::Blobs, Role::Write),
            (What::Other, Role::Read),
            (What::Route { name: "x", protocol: "" }, Role::Read),
            (What::Entry("/kv/a/b"), Role::Admin),
            (What::Entry("/kv/b"), Role::Read),
            (What::Entry("/ac/00"), Role::Read),
            (What::Entry("/team/ac/00"), Role::Write),
        ] {
            assert_eq!(most(what), Some(expected), "{what:?}");
        }
        let none = self::who(Role::None, &["cas", "read:ac"]);
        assert!(!none.may(Role::Read, What::Blobs) && none.may(Role::Read, What::Entry("/ac/00")));
    }

    #[test]
    fn a_wrong_scope_says_what_would_be_right() {
        for (text, why) in [
            ("", "a scope is *, cas"),
            ("**", "a scope is *, cas"),
            ("cas/x", "a scope is *, cas"),
            ("blobs", "a scope is *, cas"),
            ("Cas", "a scope is *, cas"),
            (" cas", "a scope is *, cas"),
            ("read:", "a scope is *, cas"),
            ("read:write:cas", "a scope is *, cas"),
            ("route", "a scope is *, cas"),
            ("/kv/a", "a scope is *, cas"),
            ("Read:cas", "before the colon stands a role: read, write or admin"),
            (":cas", "before the colon stands a role"),
            ("cas:read", "before the colon stands a role"),
            ("none:kv/secret", "takes none away"),
            ("ac/", "name of an instance"),
            ("ac/kv", "name of an instance"),
            ("ac/a/b", "name of an instance"),
            ("ac/a b", "name of an instance"),
            ("ac/..", "name of an instance"),
            ("kv/", "a path as it is decoded"),
            ("kv/a/", "a path as it is decoded"),
            ("kv/a//b", "a path as it is decoded"),
            ("kv//a", "a path as it is decoded"),
            ("kv/../a", "a path as it is decoded"),
            ("write:kv/a\n", "a path as it is decoded"),
            ("route/", "the name of a route"),
            ("route/a\0", "the name of a route"),
        ] {
            let error = text.parse::<Scope>().unwrap_err();
            assert!(error.starts_with(&format!("{text:?}: ")) && error.contains(why), "{text:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn scopes_round_trip(text in "((read|write|admin):)?(\\*|cas|ac|ac/[a-z0-9._~-]{4,9}|kv|kv/[a-z: %é]{1,5}(/[a-z:]{1,5}){0,3}|route/[a-z:/ -]{1,9})") {
            let scope: Scope = text.parse().unwrap();
            prop_assert_eq!(scope.to_string(), text);
        }

        #[test]
        fn any_text_is_a_scope_that_round_trips_or_an_error(text in "(read:|none:|x:)?(\\*|cas|ac|kv|route)?/?\\PC{0,6}") {
            match text.parse::<Scope>() {
                Ok(scope) => prop_assert_eq!(scope.to_string(), text),
                Err(why) => prop_assert!(!why.is_empty()),
            }
        }

        #[test]
        fn a_path_is_covered_at_its_boundaries_only(scope in "[a-c]{1,2}(/[a-c]{1,2}){0,2}", path in "[a-c]{1,2}(/[a-c]{1,2}){0,3}") {
            let who = who(Role::Read, &[&format!("kv/{scope}")]);
            let segments = |path: &str| path.split('/').map(str::to_owned).collect::<Vec<_>>();
            let expected = segments(&path).starts_with(&segments(&scope));
            prop_assert_eq!(who.may(Role::Read, What::Entry(&format!("/kv/{path}"))), expected);
        }
    }
}
