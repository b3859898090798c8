//! What a hit in memory is made of, beside the system calls.

use bytes::{Bytes, BytesMut};
use castier::{
    recent::{ClientRequest, Recent},
    reply::{Body, Reply},
    request_head,
};
use castier_blob::{Digest, Verifier};
use castier_cache::{Budget, Memory, Tier, Via};
use castier_config::{Limits, Memory as Config, Policy, Size};
use castier_wire::{self as wire, Selection};
use criterion::Criterion;
use futures::FutureExt;
use http::HeaderValue;
use std::{hint::black_box, net::Ipv4Addr, time::Duration};

/// The blobs in the tier. More than the processor's caches hold the bookkeeping of.
const BLOBS: u64 = 100_000;

/// A request as `curl` sends it, from the bytes to what it asks for.
pub(crate) fn request_head(criterion: &mut Criterion) {
    let path = wire::blob_path(&Digest::of(b""));
    let request = format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\n\r\n");
    let (limits, memory) = (Limits::default(), Budget::new(1 << 20));
    // The time-out wants a clock.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let _clock = runtime.enter();
    criterion.bench_function("request head", |bencher| {
        bencher.iter(|| {
            let mut ahead = BytesMut::new();
            let mut connection = black_box(request.as_bytes());
            let head = request_head::read_head(&mut connection, &mut ahead, &limits, Duration::from_secs(1), &memory);
            let (head, _) = head.now_or_never().unwrap().unwrap();
            matches!(head.target(&ahead), wire::Target::Blob(_)) && head.plain
        });
    });
}

/// A look-up of one of many blobs, in no order, and of one that is not there.
pub(crate) fn memory_get(criterion: &mut Criterion) {
    let config = Config { capacity: Size::new(1 << 30), max_blob: Size::new(1 << 20), policy: Policy::TinyLfu };
    let tier = Memory::new(&config, &Budget::new(1 << 30));
    let mut digests = Vec::new();
    for number in 0..BLOBS {
        let mut verifier = Verifier::any(Vec::new());
        let bytes = Bytes::from(number.to_le_bytes().repeat(128));
        verifier.write(&bytes).unwrap();
        let blob = verifier.finish().unwrap();
        digests.push(blob.digest());
        tier.keep(blob, castier_cache::Visibility::Public);
    }
    // A digest is random, so their order is as good as a shuffle.
    digests.sort();
    assert!(digests.iter().all(|digest| tier.find(digest).is_some()), "all of them are hits");
    let mut group = criterion.benchmark_group("memory get");
    let mut hits = digests.iter().cycle();
    group.bench_function("hit", |bencher| bencher.iter(|| hits.next().and_then(|digest| tier.find(digest))));
    let absent = Digest::of(b"");
    group.bench_function("miss", |bencher| bencher.iter(|| tier.find(black_box(&absent))));
}

/// The cost of recording a request for `top` of `/stats`, with few hot blobs and with none.
pub(crate) fn note(criterion: &mut Criterion) {
    let recent = Recent::default();
    let mut group = criterion.benchmark_group("who asks for what");
    for (name, blobs) in [("200 blobs", 200), ("100,000 blobs", BLOBS)] {
        let digests: Vec<_> = (0..blobs).map(|number| Digest::of(&number.to_le_bytes())).collect();
        let mut next = digests.iter().cycle();
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let (client, first_byte) = (Some(Ipv4Addr::LOCALHOST.into()), Some(Duration::from_micros(7)));
                recent.note(&ClientRequest { client, digest: next.next().copied(), reads: true, code: 200, bytes: 1024, first_byte });
            });
        });
    }
}

/// The head of a hit's answer: its headers, and what goes over the wire.
pub(crate) fn reply_head(criterion: &mut Criterion) {
    let digest = Digest::of(b"");
    let reply = || Reply::blob(black_box(&digest), Some(1024), Selection::Whole, Via::Tier(Tier::Memory), Body::Empty);
    let mut group = criterion.benchmark_group("reply head");
    group.bench_function("headers", |bencher| bencher.iter(reply));
    let (made, date) = (reply(), HeaderValue::from_static("Sun, 06 Nov 1994 08:49:37 GMT"));
    group.bench_function("to the wire", |bencher| bencher.iter(|| made.head(&date, true, 1024)));
}
