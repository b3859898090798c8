//! The most memory that this node may need, and whether its control group allows that.
//!
//! The costs below are measured (see docs/operations.md, "Sizing"). The test `memory_plan` checks that the program stays within them. They
//! count the memory of the process; the cost of a connection also includes its socket in the kernel.

use crate::{
    descriptors,
    request_head::{Framing, Head},
    routes,
};
use castier_cache::SMALL;
use castier_config::{Castier, Limits, Size, Write};
use http::Version;
use std::{fs, path::Path};

/// The program itself, its threads, and freed memory that the allocator keeps.
pub const BASE: u64 = 32 << 20;
/// An idle connection, and its socket in the kernel.
pub const CONNECTION: u64 = 8 << 10;
/// What TLS adds to a connection: its keys and buffers.
const SECURED: u64 = 16 << 10;
/// A kept-alive connection to an origin or a peer. To an embedded origin, which gets relayed requests only, both ends are here.
const UPSTREAM: u64 = 24 << 10;
/// A fill: its task, the connection that it reads from, and bytes that are not in its spool yet.
pub const FILL: u64 = 160 << 10;
/// An open file of the disk tier: its checksums.
const OPEN_FILE: u64 = 16 << 10;
/// The read buffers that the disk tier and the spools share.
const BUFFERS: u64 = 8 << 20;

/// A request that the fast path does not answer: its session, its task, and, for a GET, its reader of a flight.
pub const REQUEST: u64 = 8 << 10;
/// A request body: pingora's read buffer.
pub const BODY: u64 = 32 << 10;
/// A relayed request that waits for its answer: the session, both connections, and the futures.
pub const RELAY: u64 = 56 << 10;
/// The most bytes of a request body that a relay holds: a queue of reads of [`crate::connection::Conn::READ`] bytes, and a copy for one retry.
pub const RELAY_REQUEST: u64 = 256 << 10;
/// The most bytes of an answer that a relay queues for a client that is slower than the origin.
pub const RELAY_ANSWER: u64 = 512 << 10;

/// An answer of unknown length is charged when it has a piece longer than this. If all pieces are shorter, the queue stays small.
pub const RELAY_PIECE: usize = 1 << 10;

/// A connection of HTTP/2, beside [`CONNECTION`]: the buffers and tables of the protocol.
pub const HTTP2: u64 = 40 << 10;

/// What an open request over HTTP/2 may have in the queue to its client, after it was answered. The first of a connection is in [`HTTP2`].
pub const HTTP2_QUEUE: usize = 16 << 10;

/// The additional charge to `limits.client_memory` for a request over HTTP/2: the part of its body that may come before it is asked for.
pub fn http2_window(head: &Head, limits: &Limits) -> u64 {
    match head.framing {
        _ if head.version != Version::HTTP_2 => 0,
        Framing::Length(length) => length.min(limits.http2_window.get()),
        Framing::Chunked => limits.http2_window.get(),
    }
}

/// The charge to `limits.client_memory` for a request about blobs.
pub fn request(head: &Head) -> u64 {
    let body = match head.framing {
        Framing::Length(0) => 0,
        // The used part of pingora's buffer. Then each byte twice: as it arrived, and joined into one piece for the origin.
        Framing::Length(length) => BODY.min(length.saturating_add(16 << 10)) + 2 * length.min(SMALL as u64),
        Framing::Chunked => BODY + 2 * SMALL as u64,
    };
    REQUEST + head.len as u64 + body
}

/// The charge to `limits.client_memory` for a relayed request until its answer begins.
pub fn relay(head: &Head) -> u64 {
    let body = match head.framing {
        Framing::Length(length) => (2 * length).min(RELAY_REQUEST),
        Framing::Chunked => RELAY_REQUEST,
    };
    // Twice the head: pingora sends a copy to the origin.
    RELAY + 2 * head.len as u64 + body
}

/// The additional charge when the answer begins. [`RELAY_ANSWER`] if its length is unknown.
pub fn relay_answer(length: Option<u64>) -> u64 {
    length.map_or(RELAY_ANSWER, |length| length.saturating_mul(2).min(RELAY_ANSWER))
}

/// The most memory that this node may need with this configuration.
pub fn memory(config: &Castier, limits: &Limits) -> u64 {
    let peers = config.cluster.as_ref().map_or(0, |_| limits.max_peer_connections as u64);
    let connections = limits.max_connections as u64 + limits.max_admin_connections as u64 + peers;
    let secured = [
        (config.listen.tls.is_on(), limits.max_connections as u64),
        (config.listen.tls.is_on() && config.listen.tls.admin, limits.max_admin_connections as u64),
        (config.cluster.as_ref().is_some_and(|cluster| cluster.tls.is_on()), peers),
    ];
    let secured: u64 = secured.iter().map(|(is_on, connections)| u64::from(*is_on) * connections).sum();
    let sources = 1 + config.cluster.as_ref().map_or(0, |cluster| cluster.peers.len() as u64);
    let fills = config.fill.max_in_flight as u64 * FILL + config.origin.max_requests as u64 * UPSTREAM;
    let disk = config.disk.as_ref().map_or(0, |disk| disk.write_behind.get() + disk.open_files * OPEN_FILE + BUFFERS);
    let outbox = config.disk.as_ref().filter(|_| config.origin.write == Write::Behind || !config.events.is_empty());
    let outbox = outbox.map_or(0, |disk| castier_outbox::most_memory(disk.outbox.get()));
    let names = routes::most_names(config);
    let logged = if config.log.loki_url.is_empty() { 0 } else { config.log.loki.buffer.get() };
    let traced = if config.otlp.endpoint.is_empty() { 0 } else { config.otlp.buffer.get() };
    let parts = [
        BASE,
        logged,
        traced,
        config.memory.capacity.get(),
        config.fill.memory.get(),
        // A client may still read an evicted blob. That may exceed `fill.memory` by one blob.
        config.memory.max_blob.get(),
        limits.client_memory.get(),
        names,
        connections * CONNECTION,
        secured * SECURED,
        sources * fills,
        // Their bytes are in `fill.memory`.
        descriptors::ahead(config) * FILL,
        disk,
        outbox,
    ];
    parts.into_iter().fold(0, u64::saturating_add)
}

/// The memory limit of this process's control group; `None` if there is no limit.
pub fn memory_limit() -> Option<u64> {
    group_limit(Path::new("/proc/self"))
}

/// The resident memory of this process; `None` if the kernel does not tell.
pub fn resident() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let kibibytes = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok())?;
    kibibytes.checked_mul(1024)
}

/// Warns if this configuration may need more memory than the control group of this process allows.
pub fn tell(config: &Castier, limits: &Limits) {
    let planned = memory(config, limits);
    if let Some(limit) = memory_limit()
        && planned > limit
    {
        tracing::warn!(
            %planned,
            %limit,
            "the configuration lets castier hold {} of memory, and its control group allows {}: under load the kernel may kill it; lower \
             memory.capacity, fill.memory, limits.client_memory or limits.max_connections, or raise the limit",
            shown(planned),
            shown(limit),
        );
    }
}

fn shown(bytes: u64) -> Size {
    // Whole MiB are precise enough for a warning.
    Size::mib(bytes >> 20)
}

/// The lowest memory limit of a process's control group and the groups above it; `None` if there is no limit. `process` is the process's folder
/// in /proc. Supports both versions of control groups.
fn group_limit(process: &Path) -> Option<u64> {
    let groups = fs::read_to_string(process.join("cgroup")).ok()?;
    let mounts = fs::read_to_string(process.join("mountinfo")).ok()?;
    limits_of(&groups, &mounts, |path| fs::read_to_string(path).ok()).into_iter().min()
}

/// All limits that apply. `groups` is /proc/PID/cgroup, and `mounts` is /proc/PID/mountinfo.
fn limits_of(groups: &str, mounts: &str, read: impl Fn(&Path) -> Option<String>) -> Vec<u64> {
    let mut found = Vec::new();
    for line in groups.lines() {
        // HIERARCHY:CONTROLLERS:PATH. Version 2 has hierarchy 0 and no controllers.
        let mut fields = line.splitn(3, ':');
        let (Some(hierarchy), Some(controllers), Some(group)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let (kind, file) = match (hierarchy, controllers) {
            ("0", "") => ("cgroup2", "memory.max"),
            (_, controllers) if controllers.split(',').any(|controller| controller == "memory") => ("cgroup", "memory.limit_in_bytes"),
            _ => continue,
        };
        for mount in mounts.lines() {
            // ID PARENT DEVICE ROOT MOUNT-POINT OPTIONS … - TYPE SOURCE SUPER-OPTIONS
            let Some((mount, made_of)) = mount.split_once(" - ") else { continue };
            let (mut mount, mut made_of) = (mount.split(' ').skip(3), made_of.split(' '));
            let (Some(root), Some(point)) = (mount.next(), mount.next()) else { continue };
            let options = made_of.clone().nth(2).unwrap_or_default();
            if made_of.next() != Some(kind) || (kind == "cgroup" && !options.split(',').any(|option| option == "memory")) {
                continue;
            }
            // In a container the root of the mount is the container's own group.
            let below = if root == "/" { group } else { group.strip_prefix(root).unwrap_or_default() };
            let mut path = Path::new(point).join(below.trim_start_matches('/'));
            while path.starts_with(point) {
                // "max", or in version 1 a number near 2^63, is no limit.
                let limit = read(&path.join(file)).and_then(|text| text.trim().parse::<u64>().ok()).filter(|limit| *limit < 1 << 62);
                found.extend(limit);
                if !path.pop() {
                    break;
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_both_versions_are_found() {
        let files = |path: &Path| {
            Some(
                match path.to_str().unwrap() {
                    "/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes" => "9223372036854771712\n",
                    "/sys/fs/cgroup/memory/a/memory.limit_in_bytes" => "167772160\n",
                    "/sys/fs/cgroup/a/b/memory.max" => "max\n",
                    "/sys/fs/cgroup/a/memory.max" => "4096\n",
                    "/sys/fs/cgroup/memory.max" => "12288\n",
                    _ => return None,
                }
                .to_owned(),
            )
        };
        let one = "4:memory:/a/b\n3:cpu:/a\n0::/\n";
        let mounts =
            "25 20 0:22 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n26 20 0:23 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        assert_eq!(limits_of(one, mounts, files), [167_772_160]);
        let two = "0::/a/b\n";
        assert_eq!(limits_of(two, "25 20 0:22 / /sys/fs/cgroup rw - cgroup2 cgroup rw\n", files), [4096, 12288]);
        // A container sees its own group as the root of the mount.
        assert_eq!(limits_of(two, "25 20 0:22 /a/b /sys/fs/cgroup rw - cgroup2 cgroup rw\n", files), [12288]);
        assert_eq!(limits_of("", "", files), [0u64; 0]);
    }

    #[test]
    fn small_answers_cost_little() {
        assert_eq!((relay_answer(Some(0)), relay_answer(Some(1000)), relay_answer(None)), (0, 2000, RELAY_ANSWER));
        assert_eq!(relay_answer(Some(u64::MAX)), RELAY_ANSWER);
    }
}
