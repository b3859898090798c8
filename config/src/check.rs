//! Checks the values that could be read: their ranges, and whether they fit together.

use crate::{
    Castier, Cluster, Config, Disk, EventSink, Fill, Listen, Log, Loki, Memory, Origin, OriginLimits, OriginServer, OriginUrl, Otlp,
    Problems, Route, Size, Span, Write, access::check_access, address::Address, cluster::check_cluster, events::check_events,
    file::first_byte, route::check_routes,
};
use url::Url;

impl Config for Castier {
    fn complete() -> Self {
        Self {
            disk: Some(Disk::default()),
            cluster: Some(Cluster::example()),
            route: vec![Route::complete()],
            events: vec![EventSink::complete()],
            ..Self::default()
        }
    }

    fn one_or_many() -> &'static [&'static str] {
        &["events"]
    }

    fn log(&self) -> &Log {
        &self.log
    }

    fn check(&self, problems: &mut Problems) {
        let Self {
            allow_delete: _,
            ac_validation,
            listen,
            access: _,
            origin,
            memory,
            disk,
            cluster,
            verify,
            fill,
            limits,
            log,
            otlp,
            shutdown: _,
            route,
            events,
        } = self;
        check_addresses(&listen.public, &listen.admin, problems);
        let peer = check_address("listen.peer", &listen.peer, problems);
        // castier opens the peer address only with a cluster. Until then a collision does not matter.
        for (key, other) in [("listen.public", &listen.public), ("listen.admin", &listen.admin)].into_iter().filter(|_| cluster.is_some()) {
            if peer.as_ref().zip(Address::parse(other)).is_some_and(|(peer, other)| peer.collides_with(&other)) {
                problems.add("listen.peer", format!("takes the same port as {key}; write another port"));
            }
        }
        check_origin(origin, problems);
        if *ac_validation && matches!(origin.url, OriginUrl::Bucket(_)) {
            problems.add("ac_validation", "cannot be had with a bucket as the origin; write false");
        }
        if origin.write == Write::Behind {
            if !matches!(origin.url, OriginUrl::Bucket(_)) {
                problems.add("origin.write", "is \"behind\", which is for buckets (s3://, gs://, az://) only; write \"through\"");
            }
            if disk.is_none() {
                problems
                    .add("origin.write", "is \"behind\", and the outbox needs a disk; write a section [disk] with a path, or \"through\"");
            }
        }
        check_loop(&origin.url, listen, cluster.as_ref(), problems);
        check_size("memory.capacity", memory.capacity, problems);
        check_size("memory.max_blob", memory.max_blob, problems);
        check_memory(memory, cluster.as_ref(), problems);
        if let Some(disk) = disk {
            check_disk(disk, problems);
        }
        if let Some(cluster) = cluster {
            check_cluster(cluster, listen, problems);
        }
        check_fill(fill, problems);
        check_order(("verify.buffer_up_to", verify.buffer_up_to), ("fill.memory", fill.memory), problems);
        // A flight spools a blob that does not fit into fill.memory, and the memory tier never gets a spooled blob.
        check_order(("memory.max_blob", memory.max_blob), ("fill.memory", fill.memory), problems);
        check_limits(&limits.into(), problems);
        check_http2(limits, problems);
        // A blob over memory.max_blob passes through a spool file, of the disk tier or in fill.spool_dir. fill.spool bounds both kinds.
        if limits.max_blob > memory.max_blob && problems.are_sound(&["memory.max_blob"]) {
            check_order(("limits.max_blob", limits.max_blob), ("fill.spool", fill.spool), problems);
        }
        check_count("limits.max_peer_connections", limits.max_peer_connections, problems);
        if limits.client_memory < Size::mib(1) {
            problems.add("limits.client_memory", format!("{} is too little for a request; write 1MiB or more", limits.client_memory));
        }
        if limits.names < Size::mib(1) {
            problems.add("limits.names", format!("{} is too little for a table; write 1MiB or more", limits.names));
        }
        check_log(log, problems);
        check_otlp(otlp, problems);
        if !listen.external_url.is_empty()
            && let Err(why) = check_base_url(&listen.external_url)
        {
            problems.add("listen.external_url", format!("{why}; write \"https://HOST\" or \"http://HOST:PORT/PATH\", or \"\" for none"));
        }
        check_routes(route, listen, cluster.as_ref(), problems);
        check_events(events, disk.as_ref(), problems);
        check_access(self, problems);
    }
}

impl Config for OriginServer {
    fn log(&self) -> &Log {
        &self.log
    }

    fn check(&self, problems: &mut Problems) {
        let Self { allow_delete: _, ac_validation, listen, store, limits, log, otlp, shutdown: _ } = self;
        check_addresses(&listen.public, &listen.admin, problems);
        if store.root.as_os_str().is_empty() {
            problems.add("store.root", "names no directory; write one, such as \"./castier-data/origin\"");
        }
        if !store.url.is_empty() && store.bucket().is_none() {
            problems.add(
                "store.url",
                format!(
                    "{:?} is no bucket; write \"s3://BUCKET\", \"gs://BUCKET\" or \"az://CONTAINER\", or \"\" for store.root",
                    store.url
                ),
            );
        }
        if *ac_validation && !store.url.is_empty() {
            problems.add("ac_validation", "cannot be had with a bucket; write false");
        }
        store.s3.check("store.s3", problems);
        check_limits(limits, problems);
        check_log(log, problems);
        check_otlp(otlp, problems);
    }
}

fn check_addresses(public: &str, admin: &str, problems: &mut Problems) {
    let (public, admin) = (check_address("listen.public", public, problems), check_address("listen.admin", admin, problems));
    if let (Some(public), Some(admin)) = (public, admin)
        && public.collides_with(&admin)
    {
        problems.add("listen.admin", "takes the same port as listen.public; write another port");
    }
}

/// castier must not be its own origin: each miss would make castier ask itself.
fn check_loop(origin: &OriginUrl, listen: &Listen, cluster: Option<&Cluster>, problems: &mut Problems) {
    let OriginUrl::Remote(url) = origin else { return };
    if let Some((key, address)) = own_address(url, listen, cluster) {
        problems.add("origin.url", format!("leads to castier itself, which takes {address} as {key}; write the origin's address"));
    }
}

/// The address of castier itself to which this URL leads, and its key.
pub(crate) fn own_address<'c>(url: &Url, listen: &'c Listen, cluster: Option<&'c Cluster>) -> Option<(&'static str, &'c str)> {
    let peers = cluster.map(|cluster| [("listen.peer", listen.peer.as_str()), ("cluster.advertise", cluster.advertise.as_str())]);
    let own = [("listen.public", listen.public.as_str()), ("listen.admin", listen.admin.as_str())];
    let mut own = own.into_iter().chain(peers.into_iter().flatten());
    own.find(|(_, address)| Address::parse(address).is_some_and(|address| address.is_reached_by(url)))
}

fn check_address(key: &str, text: &str, problems: &mut Problems) -> Option<Address> {
    let address = Address::parse(text);
    if address.is_none() {
        problems.add(
            key,
            format!("{text:?} is not an address; write HOST:PORT, such as \"127.0.0.1:8080\", or \"0.0.0.0:8080\" for every interface"),
        );
    }
    address
}

fn check_origin(origin: &Origin, problems: &mut Problems) {
    check_span("origin.connect_timeout", origin.connect_timeout, problems);
    check_span("origin.read_timeout", origin.read_timeout, problems);
    if origin.retries > 100 {
        problems.add("origin.retries", format!("{} is too many; write 0 to 100", origin.retries));
    }
    if origin.retry_budget > 100 {
        problems.add("origin.retry_budget", format!("{} is too many; write 0 to 100 (percent)", origin.retry_budget));
    }
    check_span("origin.breaker_pause", origin.breaker_pause, problems);
    check_connections("origin.max_requests", origin.max_requests, problems);
    origin.s3.check("origin.s3", problems);
    if !origin.ca_file.as_os_str().is_empty()
        && problems.ask_machine()
        && let Err(error) = first_byte(&origin.ca_file)
    {
        let path = origin.ca_file.display();
        problems.add(
            "origin.ca_file",
            format!("{path} cannot be read ({error}); name a PEM file, or write \"\" for the system's certificates"),
        );
    }
}

/// The bytes that the memory tier needs for a blob beside its own, rounded up.
const BOOKKEEPING: u64 = 512;

/// The largest blob must fit into the memory for this node's own blobs: `memory.capacity` without the mirror's part.
fn check_memory(memory: &Memory, cluster: Option<&Cluster>, problems: &mut Problems) {
    let mirror = cluster.map_or(0, |cluster| cluster.mirror_share.of(memory.capacity).get());
    let own = memory.capacity.get() - mirror;
    let most = own.saturating_sub(BOOKKEEPING);
    if memory.max_blob.get() > most && problems.are_sound(&["memory.max_blob", "memory.capacity"]) {
        let without =
            if mirror > 0 { format!(" without cluster.mirror_share is {}", Size::new(own)) } else { format!(" is {}", memory.capacity) };
        let (largest, max_blob) = (Size::new(most), memory.max_blob);
        problems.add(
            "memory.max_blob",
            format!(
                "{max_blob} never fits: memory.capacity{without}, and each blob needs some bytes beside its own; write {largest} or less, \
                 or raise memory.capacity"
            ),
        );
    }
}

fn check_disk(disk: &Disk, problems: &mut Problems) {
    if disk.path.as_os_str().is_empty() {
        problems.add(
            "disk.path",
            "names no directory; write one, such as \"./castier-data/cache\", or leave out all of [disk] for no disk tier",
        );
    }
    check_size("disk.capacity", disk.capacity, problems);
    check_size("disk.write_behind", disk.write_behind, problems);
    if disk.open_files == 0 {
        problems.add("disk.open_files", "must be 1 or more");
    }
    check_span("disk.cooldown", disk.cooldown, problems);
    check_span("disk.timeout", disk.timeout, problems);
    check_count("disk.threads", disk.threads, problems);
    if disk.outbox < Size::mib(1) {
        problems.add("disk.outbox", format!("{} is too little for an upload; write 1MiB or more", disk.outbox));
    }
    check_count("disk.outbox_workers", disk.outbox_workers, problems);
    if disk.outbox_workers > 1024 {
        problems.add("disk.outbox_workers", "must be 1024 or less");
    }
}

/// Each is a connection to the origin, and towards one address this machine has no more ports than that.
fn check_connections(key: &str, count: usize, problems: &mut Problems) {
    check_count(key, count, problems);
    if count > 65_536 {
        problems.add(key, "must be 65536 or less");
    }
}

fn check_fill(fill: &Fill, problems: &mut Problems) {
    check_connections("fill.max_in_flight", fill.max_in_flight, problems);
    check_count("fill.parallel", fill.parallel, problems);
    if fill.parallel > 64 {
        problems.add("fill.parallel", "must be 64 or less");
    }
    check_size("fill.memory", fill.memory, problems);
    check_size("fill.spool", fill.spool, problems);
    check_span("fill.spool_timeout", fill.spool_timeout, problems);
    check_count("fill.spool_threads", fill.spool_threads, problems);
    if !fill.spool_dir.as_os_str().is_empty() && problems.ask_machine() && !fill.spool_dir.is_dir() {
        let path = fill.spool_dir.display();
        problems.add("fill.spool_dir", format!("{path} is not a directory; create it, or write \"\" for the system's temporary directory"));
    }
}

fn check_http2(limits: &crate::Limits, problems: &mut Problems) {
    check_count("limits.http2_streams", limits.http2_streams as usize, problems);
    if limits.http2_streams > 65_536 {
        problems.add("limits.http2_streams", "must be 65536 or less");
    }
    if !(Size::kib(64)..=Size::mib(16)).contains(&limits.http2_window) {
        problems.add("limits.http2_window", format!("{} is out of range; write 64KiB to 16MiB", limits.http2_window));
    }
    check_count("limits.http2_resets", limits.http2_resets as usize, problems);
    check_count("limits.http2_idle_frames", limits.http2_idle_frames as usize, problems);
}

/// The limits that both programs have.
fn check_limits(limits: &OriginLimits, problems: &mut Problems) {
    check_size("limits.max_blob", limits.max_blob, problems);
    check_size("limits.max_entry", limits.max_entry, problems);
    check_count("limits.max_connections", limits.max_connections, problems);
    check_count("limits.max_admin_connections", limits.max_admin_connections, problems);
    check_span("limits.header_timeout", limits.header_timeout, problems);
    check_span("limits.idle_timeout", limits.idle_timeout, problems);
    check_span("limits.write_timeout", limits.write_timeout, problems);
    let (max_header_bytes, max_headers) = (limits.max_header_bytes, limits.max_headers);
    if !(Size::kib(1)..=Size::mib(1)).contains(&max_header_bytes) {
        problems.add("limits.max_header_bytes", format!("{max_header_bytes} is out of range; write 1KiB to 1MiB"));
    }
    if !(1..=256).contains(&max_headers) {
        problems.add("limits.max_headers", format!("{max_headers} is out of range; write 1 to 256"));
    }
}

fn check_log(log: &Log, problems: &mut Problems) {
    check_span("log.stats_interval", log.stats_interval, problems);
    if let Err(part) = check_level(&log.level) {
        problems.add(
            "log.level",
            format!("{part:?} is not a level; write off, error, warn, info, debug or trace, or a list such as \"info,access=off\""),
        );
    }
    // The message does not repeat the text: it may hold a password.
    if !log.loki_url.is_empty() && !is_http(&log.loki_url) {
        problems.add("log.loki_url", "is not a URL of Loki; write \"http://HOST:3100\" or \"https://HOST\", or \"\" for none");
    }
    check_loki(&log.loki, problems);
}

fn is_http(text: &str) -> bool {
    Url::parse(text).is_ok_and(|url| matches!(url.scheme(), "http" | "https")) && text.contains("://")
}

/// The URL of a server, with or without a path below which it is. The message does not repeat the text: it may hold a password.
pub(crate) fn check_base_url(text: &str) -> Result<Url, String> {
    let (_, rest) = text.split_once("://").ok_or("is not a URL")?;
    // The URL library would take a backslash for a slash, and leave spaces out.
    if text.contains('\\') || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("has a character that a URL cannot have as it is".into());
    }
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    if authority.contains(['{', '}']) {
        return Err("has a variable in its host".into());
    }
    let url = Url::parse(text).map_err(|error| format!("is not a URL ({error})"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("has the scheme {:?}", url.scheme()));
    }
    if authority.contains('@') {
        return Err("has a user or a password".into());
    }
    if url.port() == Some(0) {
        return Err("has the port 0, to which nobody can connect".into());
    }
    if rest.contains(['?', '#']) {
        return Err("has a query or a fragment".into());
    }
    if rest.split('/').any(|segment| matches!(segment, "." | "..")) {
        return Err("has a segment . or ..".into());
    }
    Ok(url)
}

fn check_otlp(otlp: &Otlp, problems: &mut Problems) {
    let Otlp { endpoint, sample, buffer, timeout } = otlp;
    // The message does not repeat the text: it may hold a password.
    if !endpoint.is_empty() && !is_http(endpoint) {
        problems.add("otlp.endpoint", "is not a URL of a collector; write \"http://HOST:4318\" or \"https://HOST\", or \"\" for none");
    }
    if !(0.0..=1.0).contains(sample) {
        problems.add("otlp.sample", format!("{sample} is out of range; write a number from 0 to 1, such as 0.01"));
    }
    check_size("otlp.buffer", *buffer, problems);
    check_span("otlp.timeout", *timeout, problems);
}

fn check_loki(loki: &Loki, problems: &mut Problems) {
    let Loki { tenant, labels, batch, wait, buffer, timeout } = loki;
    if !tenant.bytes().all(|byte| byte.is_ascii_graphic()) {
        problems.add("log.loki.tenant", "has characters that no header can hold; write visible ASCII without spaces, or \"\" for none");
    }
    for name in labels.0.keys() {
        // As Prometheus and Loki name labels.
        let is_name = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
            && !name.is_empty()
            && !name.starts_with(|c: char| c.is_ascii_digit());
        if !is_name {
            problems.add("log.loki.labels", format!("{name:?} is not a label name; write letters, digits and _, such as \"env=prod\""));
        } else if name == "level" {
            problems.add("log.loki.labels", "level is what each record says itself; write another name");
        }
    }
    if !(Size::kib(1)..=Size::mib(4)).contains(batch) {
        problems.add("log.loki.batch", format!("{batch} is out of range; write 1KiB to 4MiB"));
    }
    check_order(("log.loki.batch", *batch), ("log.loki.buffer", *buffer), problems);
    check_span("log.loki.wait", *wait, problems);
    check_span("log.loki.timeout", *timeout, problems);
}

/// Returns the wrong part, if there is one. Refuses spaces, and dots in targets: the log library must be able to read what passes here.
fn check_level(directives: &str) -> Result<(), &str> {
    let is_level = |text: &str| ["off", "error", "warn", "info", "debug", "trace"].iter().any(|level| text.eq_ignore_ascii_case(level));
    let is_target = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "_:-".contains(c));
    let mut bare = 0;
    for part in directives.split(',') {
        let sound = match part.split_once('=') {
            Some((target, level)) => is_target(target) && is_level(level),
            None => {
                bare += 1;
                is_level(part) && bare == 1
            }
        };
        if !sound {
            return Err(part);
        }
    }
    Ok(())
}

pub(crate) fn check_span(key: &str, span: Span, problems: &mut Problems) {
    if span.get().is_zero() {
        problems.add(key, "must be longer than 0s; write a duration such as \"5s\"");
    }
}

pub(crate) fn check_size(key: &str, size: Size, problems: &mut Problems) {
    if size.get() == 0 {
        problems.add(key, "must be more than 0; write a size such as \"64MiB\"");
    }
}

fn check_count(key: &str, count: usize, problems: &mut Problems) {
    if count == 0 {
        problems.add(key, "must be 1 or more");
    }
}

/// `small` must not be more than `large`.
fn check_order(small: (&str, Size), large: (&str, Size), problems: &mut Problems) {
    if small.1 > large.1 && problems.are_sound(&[small.0, large.0]) {
        problems.add(small.0, format!("{} is more than {}, which is {}; lower the one or raise the other", small.1, large.0, large.1));
    }
}
