//! The configured routes: which of them a request is for.

use crate::{
    path::{BadPath, Path},
    preset::{Kind, Rule, first},
    template::{Captures, PathAutomaton, Template},
};
use castier_blob::Digest;
use std::sync::LazyLock;

/// One configured route: where it matches, and the rules of what it matches.
#[derive(Clone, Debug, Default)]
pub struct Route {
    /// The protocol, if the rules are those of a preset; empty for a route by hand.
    pub protocol: String,
    /// Only requests with this `Host`, in lower case, with a port if it has one. `None`: all.
    pub host: Option<String>,
    /// The path before the paths of the rules, such as `/npm`; may be empty. The upstream does not see it.
    pub prefix: String,
    /// Only requests for this registry: `?ns=docker.io`, or `docker.io` as the first component of the name, which is then stripped.
    pub namespace: Option<String>,
    /// The first one that matches holds.
    pub rules: Vec<Rule>,
}

/// All routes, in the order of the configuration: the first one that matches a request gets it.
#[derive(Clone, Debug, Default)]
pub struct Table {
    routes: Vec<Route>,
}

/// The route and the rule of a request.
#[derive(Debug)]
pub struct Found<'t> {
    /// The index of the route.
    pub route: usize,
    /// The rule. If no rule of any route matches, but the host, prefix or namespace of a preset does, it is one of the kind [`Kind::Relay`].
    pub rule: &'t Rule,
    /// The values of the variables of its template.
    pub captures: Captures,
    /// What the upstream is asked for, spelled as the client spelled it: without prefix and namespace, and without `ns` in its query.
    pub target: String,
    /// The canonical path of that, for keys.
    pub path: Path,
}

/// Two routes that can match one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// The index of the route that gets such a request.
    pub first: usize,
    /// The index of the other.
    pub second: usize,
    /// Such a request's path.
    pub path: String,
}

/// The path and the query of a request target in origin form.
fn split_query(target: &str) -> (&str, Option<&str>) {
    target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)))
}

/// The value of `ns` in a query, and the query without it.
fn take_namespace(query: Option<&str>) -> (Option<&str>, Option<String>) {
    let Some(query) = query else { return (None, None) };
    let is_namespace = |pair: &&str| *pair == "ns" || pair.starts_with("ns=");
    let namespace = query.split('&').find(is_namespace).map(|pair| pair.strip_prefix("ns=").unwrap_or_default());
    let rest = query.split('&').filter(|pair| !is_namespace(pair)).collect::<Vec<_>>().join("&");
    (namespace, (!rest.is_empty()).then_some(rest))
}

/// The path below a prefix of whole segments, in the client's spelling: as many slashes of it as the prefix has stand before that.
fn raw_below<'p>(path: &'p str, prefix: &str) -> &'p str {
    let depth = prefix.trim_end_matches('/').matches('/').count();
    let cut = path.match_indices('/').nth(depth).map_or(path.len(), |(at, _)| at);
    &path[cut..]
}

impl Table {
    /// The routes in their order.
    pub const fn new(routes: Vec<Route>) -> Self {
        Self { routes }
    }

    /// The rules of a route; none of one that is not there.
    pub fn rules_of(&self, route: usize) -> &[Rule] {
        self.routes.get(route).map_or(&[], |route| &route.rules)
    }

    /// Whether there are none, so that no request needs to be looked at.
    pub const fn is_empty(&self) -> bool {
        self.routes.is_empty()
    }

    /// The route of a request for `target` (path and query, as they came) at `host`: the first one with a rule that matches. If none has one, a preset with
    /// a host, a prefix or a namespace of its own relays it. `None`: no route matches.
    ///
    /// # Errors
    /// [`BadPath`]: the target is one that no route may match.
    pub fn find(&self, host: Option<&str>, target: &str) -> Result<Option<Found<'_>>, BadPath> {
        self.find_among(host, target, |_| true)
    }

    /// As [`Self::find`], but only among the routes (by their index) that `may` have the request.
    ///
    /// # Errors
    /// As [`Self::find`].
    pub fn find_among(&self, host: Option<&str>, target: &str, may: impl Fn(usize) -> bool) -> Result<Option<Found<'_>>, BadPath> {
        if self.is_empty() {
            return Ok(None);
        }
        let (raw, query) = split_query(target);
        let path = Path::of(raw)?;
        // A rule that only relays takes no request from a route that knows what it is for.
        let mut relayed = None;
        let routes = || self.routes.iter().enumerate().filter(|(at, _)| may(*at));
        for (at, route) in routes() {
            match route.find(at, host, raw, &path, query, &route.rules) {
                Some(found) if found.rule.kind == Kind::Relay => relayed = relayed.or(Some(found)),
                Some(found) => return Ok(Some(found)),
                None => {}
            }
        }
        // What no rule knows still belongs to the upstream behind this host, prefix or namespace: a log-in, a search.
        let unknown = || routes().find_map(|(at, route)| route.find(at, host, raw, &path, query, route.relays()));
        Ok(relayed.or_else(unknown))
    }

    /// All pairs of routes that can match one request, each with an example. Rules that only relay do not count.
    pub fn overlaps(&self) -> Vec<Overlap> {
        let automata: Vec<_> = self.routes.iter().map(Route::automata).collect();
        let mut found = Vec::new();
        for (second, later) in self.routes.iter().enumerate() {
            for first in (0..second).filter(|first| self.routes[*first].may_share_requests(later)) {
                let mut paths = automata[first].iter().flat_map(|left| automata[second].iter().filter_map(|right| left.overlap(right)));
                if let Some(path) = paths.next() {
                    found.push(Overlap { first, second, path });
                }
            }
        }
        found
    }
}

/// Relays everything.
static RELAYS: LazyLock<Vec<Rule>> = LazyLock::new(|| {
    let rule = |path| {
        let path = Template::parse(path).ok()?;
        Some(Rule { path, kind: Kind::Relay, ttl: None, vary: Vec::new(), digest_header: None, links: false, examples: Vec::new() })
    };
    ["/", "/{rest*}"].into_iter().filter_map(rule).collect()
});

impl Route {
    /// The rules for what the route's own rules do not know: none, unless the route is a preset with a host, a prefix or a namespace.
    fn relays(&self) -> &[Rule] {
        let is_apart = self.host.is_some() || self.namespace.is_some() || !self.prefix.trim_end_matches('/').is_empty();
        if self.protocol.is_empty() || !is_apart { &[] } else { &RELAYS }
    }

    fn find<'t>(
        &'t self,
        at: usize,
        host: Option<&str>,
        raw: &str,
        path: &Path,
        query: Option<&str>,
        rules: &'t [Rule],
    ) -> Option<Found<'t>> {
        if self.host.as_deref().is_some_and(|own| !host.is_some_and(|host| host.eq_ignore_ascii_case(own))) {
            return None;
        }
        let below = path.below(&self.prefix)?;
        let raw = raw_below(raw, &self.prefix);
        let raw = if raw.is_empty() { "/" } else { raw };
        // What has segments `.` goes upstream without them: it has the name of what has none, so it must be the same question.
        let has_dots = raw.split('/').any(|segment| matches!(segment, "." | "%2e" | "%2E"));
        let raw = if has_dots { below.as_str().to_owned() } else { raw.to_owned() };
        let (path, raw, query) = match &self.namespace {
            None => (below, raw, query.map(str::to_owned)),
            Some(own) => self.in_namespace(own, &below, &raw, query)?,
        };
        let (rule, captures) = first(rules, &path)?;
        // A path that has segments `.` in its prefix is cut at another place.
        if Path::of(&raw).as_ref() != Ok(&path) {
            return None;
        }
        let target = query.map_or_else(|| raw.clone(), |query| format!("{raw}?{query}"));
        Some(Found { route: at, rule, captures, target, path })
    }

    /// The path without the namespace; `None` if the request is for another one.
    fn in_namespace(&self, own: &str, path: &Path, raw: &str, query: Option<&str>) -> Option<(Path, String, Option<String>)> {
        let (namespace, query) = take_namespace(query);
        if let Some(namespace) = namespace {
            return (namespace == own).then(|| (path.clone(), raw.to_owned(), query));
        }
        // The version check names no repository, so it is for every namespace.
        if path.as_str() == "/v2/" {
            return Some((path.clone(), raw.to_owned(), query));
        }
        let component = format!("/v2/{own}");
        let rest = path.below(&component).filter(|rest| rest.as_str() != "/")?;
        let path = Path::of(&format!("/v2{rest}")).ok()?;
        Some((path, format!("/v2{}", raw_below(raw, &component)), query))
    }

    /// Whether host and namespace leave it possible that both routes match one request.
    fn may_share_requests(&self, other: &Self) -> bool {
        let apart =
            |left: &Option<String>, right: &Option<String>| left.as_ref().zip(right.as_ref()).is_some_and(|(left, right)| left != right);
        !apart(&self.host, &other.host) && !apart(&self.namespace, &other.namespace)
    }

    /// What its rules match, below its prefix, without those that only relay.
    fn automata(&self) -> Vec<PathAutomaton> {
        let prefix = self.prefix.trim_end_matches('/');
        let resources = self.rules.iter().filter(|rule| rule.kind != Kind::Relay);
        resources.filter_map(|rule| rule.path.under(prefix).ok()?.automaton()).collect()
    }
}

/// The name of a `frozen` or `fresh` resource: the SHA-256 of everything that chooses its answer. `route` identifies the route and stays the same
/// over restarts. Each part is preceded by its length, so that no two lists of parts have the same name.
pub fn name(route: &str, path: &Path, query: Option<&str>, headers: &[(&str, &str)]) -> Digest {
    let mut parts = vec![route, path.as_str()];
    // `/a` and `/a?` are two targets.
    parts.extend(query.map_or(["", ""], |query| ["?", query]));
    parts.extend(headers.iter().flat_map(|(name, value)| [*name, *value]));
    let bytes: Vec<u8> = parts.iter().flat_map(|part| [&(part.len() as u64).to_le_bytes()[..], part.as_bytes()].concat()).collect();
    Digest::of(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preset::preset;
    use proptest::prelude::*;

    fn route(protocol: &str) -> Route {
        Route { protocol: protocol.into(), rules: preset(protocol).unwrap().to_vec(), ..Route::default() }
    }

    /// The index of the route, the template, and what the upstream is asked for.
    fn found(table: &Table, host: &str, target: &str) -> Option<(usize, String, String)> {
        let found = table.find(Some(host), target).unwrap()?;
        Some((found.route, found.rule.path.as_str().into(), found.target))
    }

    #[test]
    fn the_first_route_that_matches_gets_the_request() {
        let table = Table::new(vec![
            Route { host: Some("npm.example".into()), ..route("npm") },
            Route { prefix: "/npm".into(), ..route("npm") },
            Route { prefix: "/a%2fb/".replace("%2f", "%2F"), ..route("pypi") },
            route("go"),
        ]);
        for (host, target, expected) in [
            ("npm.example", "/left-pad", Some((0, "/{package}", "/left-pad"))),
            ("NPM.example", "/@types%2fnode?write=true", Some((0, "/{package}", "/@types%2fnode?write=true"))),
            ("other", "/npm/left-pad", Some((1, "/{package}", "/left-pad"))),
            ("other", "/n%70m/left-p%61d", Some((1, "/{package}", "/left-p%61d"))),
            ("other", "/npmx/left-pad", None),
            ("other", "/npm", Some((1, "/", "/"))),
            ("npm.example", "/", Some((0, "/", "/"))),
            ("npm.example", "/left-pad/1.0.0", Some((0, "/{rest*}", "/left-pad/1.0.0"))),
            ("other", "/npm/-/whoami", Some((1, "/-/{rest*}", "/-/whoami"))),
            ("other", "/a%2fb/simple/x/", Some((2, "/simple/{project}/", "/simple/x/"))),
            ("other", "/golang.org/x/text/@v/list", Some((3, "/{module*}/@v/list", "/golang.org/x/text/@v/list"))),
            ("other", "/left-pad", None),
        ] {
            let expected = expected.map(|(at, template, target): (usize, &str, &str)| (at, template.to_owned(), target.to_owned()));
            assert_eq!(found(&table, host, target), expected, "{host} {target}");
        }
        assert!(table.find(None, "/left-pad").unwrap().is_none(), "a request without Host is for no host");
        assert_eq!(table.find(None, "/a/../b").unwrap_err(), BadPath::Dots);
        assert!(Table::default().find(None, "/a/../b").unwrap().is_none(), "without routes nothing is looked at");
    }

    #[test]
    fn what_no_rule_knows_goes_to_the_upstream_of_its_host() {
        let by_hand = Route {
            host: Some("a".into()),
            rules: vec![Rule { path: Template::parse("/files/{file*}").unwrap(), ..preset("npm").unwrap()[0].clone() }],
            ..Route::default()
        };
        let at = |host: &str, protocol| Route { host: Some(host.into()), ..route(protocol) };
        let table = Table::new(vec![by_hand, at("a", "pypi"), at("a", "go"), Route { prefix: "/".into(), ..route("cargo") }]);
        let find = |host, target| {
            let found = table.find(Some(host), target).unwrap()?;
            Some((found.route, table.routes[found.route].protocol.clone(), found.rule.kind))
        };
        for (host, target, expected) in [
            ("a", "/files/x", Some((0, "", Kind::Frozen))),
            ("a", "/simple/x/", Some((1, "pypi", Kind::Fresh))),
            ("a", "/golang.org/x/text/@latest", Some((2, "go", Kind::Fresh))),
            // The first preset with this host. A route by hand has only what it says.
            ("a", "/legacy/", Some((1, "pypi", Kind::Relay))),
            ("a", "/config.json", Some((3, "cargo", Kind::Fresh))),
            // A preset without host, prefix and namespace does not get what the origin should get.
            ("b", "/legacy/", None),
            ("b", "/cas/x", None),
        ] {
            let expected = expected.map(|(at, protocol, kind): (usize, &str, Kind)| (at, protocol.to_owned(), kind));
            assert_eq!(find(host, target), expected, "{host} {target}");
        }
    }

    #[test]
    fn a_rule_that_relays_takes_no_request_from_a_later_route() {
        let table = Table::new(vec![route("oci"), route("npm"), route("go")]);
        for (target, expected) in [
            ("/v2/golang.org/x/text/@v/list", Some((2, "/{module*}/@v/list"))),
            ("/-/x/@v/v1.0.0.zip", Some((2, "/{module*}/@v/{version}.zip"))),
            ("/v2/_catalog", Some((0, "/v2/{rest*}"))),
            ("/-/ping", Some((1, "/-/{rest*}"))),
            ("/v1/search/x", None),
        ] {
            let found = found(&table, "h", target).map(|(at, template, _)| (at, template));
            assert_eq!(found, expected.map(|(at, template)| (at, template.to_owned())), "{target}");
        }
        for other in ["bazel", "cargo", "lfs", "nix", "npm", "pypi"] {
            let table = Table::new(vec![route("oci"), route(other)]);
            assert_eq!(table.overlaps(), [], "{other}: they can share a host");
        }
    }

    #[test]
    fn namespaces() {
        let docker = Route { namespace: Some("docker.io".into()), ..route("oci") };
        let table = Table::new(vec![docker, Route { namespace: Some("ghcr.io".into()), ..route("oci") }]);
        let tag = "/v2/{name*}/manifests/{tag}";
        for (target, expected) in [
            ("/v2/library/nginx/manifests/1?ns=docker.io", Some((0, tag, "/v2/library/nginx/manifests/1"))),
            ("/v2/x/manifests/1?a=b&ns=ghcr.io&c=d", Some((1, tag, "/v2/x/manifests/1?a=b&c=d"))),
            ("/v2/docker.io/library/nginx/manifests/1", Some((0, tag, "/v2/library/nginx/manifests/1"))),
            ("/v2/ghcr.io/x/y/manifests/1?n=5", Some((1, tag, "/v2/x/y/manifests/1?n=5"))),
            ("/v2/", Some((0, "/v2/", "/v2/"))),
            ("/v2/x/manifests/1", None),
            ("/v2/x/manifests/1?ns=quay.io", None),
            ("/v2/docker.io/manifests/1", Some((0, "/v2/{rest*}", "/v2/manifests/1"))),
            ("/v2/ghcr.io/x/blobs/uploads/?digest=a", Some((1, "/v2/{rest*}", "/v2/x/blobs/uploads/?digest=a"))),
            ("/v2/docker.io", None),
            ("/v2/_catalog", None),
            ("/status?ns=ghcr.io", Some((1, "/{rest*}", "/status"))),
        ] {
            let expected = expected.map(|(at, template, target): (usize, &str, &str)| (at, template.to_owned(), target.to_owned()));
            assert_eq!(found(&table, "h", target), expected, "{target}");
        }
    }

    #[test]
    fn routes_that_can_match_one_request() {
        let below = |prefix: &str, protocol| Route { prefix: prefix.into(), ..route(protocol) };
        let at = |host: &str, protocol| Route { host: Some(host.into()), ..route(protocol) };
        let pairs = |routes: Vec<Route>| {
            let table = Table::new(routes);
            let overlaps = table.overlaps();
            for overlap in &overlaps {
                let found = table.find(table.routes[overlap.first].host.as_deref(), &overlap.path).unwrap();
                assert!(found.is_some_and(|found| found.route <= overlap.first), "{overlap:?}");
            }
            overlaps.into_iter().map(|overlap| (overlap.first, overlap.second)).collect::<Vec<_>>()
        };
        assert_eq!(pairs(vec![below("/npm", "npm"), below("/pypi", "pypi"), route("oci"), below("/go", "go")]), []);
        assert_eq!(pairs(vec![at("a", "npm"), at("b", "npm")]), []);
        assert_eq!(pairs(vec![at("a", "npm"), route("npm")]), [(0, 1)]);
        assert_eq!(pairs(vec![route("npm"), route("nix")]), [(0, 1)], "/nix-cache-info is the name of a package");
        assert_eq!(pairs(vec![below("/x", "debian"), route("debian")]), [(0, 1)]);
    }

    #[test]
    fn names_differ_in_everything_that_counts() {
        let path = |text| Path::of(text).unwrap();
        let names = [
            name("a", &path("/x"), None, &[]),
            name("b", &path("/x"), None, &[]),
            name("a", &path("/y"), None, &[]),
            name("a", &path("/x"), Some(""), &[]),
            name("a", &path("/x"), Some("q"), &[]),
            name("a", &path("/x"), None, &[("accept", "json")]),
            name("a", &path("/x"), None, &[("accept", "jso"), ("n", "")]),
            name("a", &path("/x"), None, &[("acceptj", "son")]),
        ];
        assert_eq!(names.iter().collect::<std::collections::HashSet<_>>().len(), names.len());
        assert_eq!(names[0], name("a", &path("/%78"), None, &[]));
    }

    proptest! {
        #[test]
        fn the_upstream_gets_the_clients_spelling(segments in prop::collection::vec("[a-z%0-9A-F]{1,6}", 1..4)) {
            // A segment `.` is dropped: see `Path::of`.
            prop_assume!(!segments.iter().any(|segment| segment.eq_ignore_ascii_case("%2e")));
            let target = format!("/npm/{}", segments.join("/"));
            let rules = vec![Rule { path: crate::Template::parse("/{all*}").unwrap(), ..preset("npm").unwrap()[0].clone() }];
            let table = Table::new(vec![Route { prefix: "/npm".into(), rules, ..Route::default() }]);
            if let Ok(Some(found)) = table.find(None, &target) {
                prop_assert_eq!(&found.target, &target["/npm".len()..]);
                prop_assert_eq!(Path::of(&found.target), Ok(found.path));
            }
        }
    }
}
