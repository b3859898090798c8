//! The published runs of the systems that castier replaces, flag for flag.

use crate::{
    mix::{Mix, Op},
    schedule::RunLimit,
};
use clap::ValueEnum;
use std::time::Duration;

/// A published run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scenario {
    /// 100 GETs of 2,048 bytes, 20 at a time.
    #[value(name = "sangraha-2k")]
    Sangraha2k,
    /// 100 GETs of 1 MiB, 20 at a time.
    #[value(name = "sangraha-1m")]
    Sangraha1m,
    /// 6 clients, each 500 times: POST 20 characters, GET them, DELETE them.
    Messages,
    /// 1000 users, each POSTs 5 multipart forms.
    Forms,
    /// One file of 25 kB: PUT once, then 3 GETs a second for 10 seconds.
    CasHarness,
    /// 10,000 GETs over 20 blobs.
    DataServices,
}

/// The work of one turn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Work {
    /// One operation of the mix, chosen at random.
    Mix(Mix),
    /// POST a message, GET it, DELETE it.
    Messages,
    /// POST a multipart form.
    Forms,
}

impl Work {
    /// Whether it reads a corpus, which must then be stored first.
    pub(crate) fn reads_corpus(&self) -> bool {
        matches!(self, Self::Mix(mix) if mix.reads())
    }

    /// Whether it sends DELETEs, which a server may refuse.
    pub(crate) fn deletes(&self) -> bool {
        match self {
            Self::Mix(mix) => mix.has(Op::Delete),
            Self::Messages => true,
            Self::Forms => false,
        }
    }
}

/// The work, its amount and its rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct LoadShape {
    pub(crate) work: Work,
    pub(crate) limit: RunLimit,
    pub(crate) concurrency: usize,
    /// Turns per second of an open loop; `None` for a closed loop.
    pub(crate) rate: Option<f64>,
    /// Blobs in the corpus.
    pub(crate) objects: usize,
    /// The size of a blob in bytes.
    pub(crate) size: u64,
    /// The exponent of the popularity; `None` for uniform.
    pub(crate) zipf: Option<f64>,
}

impl Scenario {
    /// The load of the scenario. The publications leave some parameters open (the number of files, the clients of the last run, the size of a
    /// form). These are chosen here and named in docs/benchmarks.md.
    pub(crate) fn shape(self) -> LoadShape {
        let gets = Work::Mix(Mix::only(Op::Get));
        let base = LoadShape { work: gets, limit: RunLimit::Turns(100), concurrency: 20, rate: None, objects: 1, size: 2048, zipf: None };
        match self {
            Self::Sangraha2k => base,
            Self::Sangraha1m => LoadShape { size: 1 << 20, ..base },
            Self::Messages => LoadShape { work: Work::Messages, limit: RunLimit::TurnsOfEach(500), concurrency: 6, size: 20, ..base },
            Self::Forms => LoadShape { work: Work::Forms, limit: RunLimit::TurnsOfEach(5), concurrency: 1000, size: 1024, ..base },
            Self::CasHarness => {
                LoadShape { limit: RunLimit::Time(Duration::from_secs(10)), concurrency: 10, rate: Some(3.0), size: 25_000, ..base }
            }
            Self::DataServices => LoadShape { limit: RunLimit::Turns(10_000), concurrency: 10, objects: 20, size: 1024, ..base },
        }
    }

    /// Its name in `--scenario`.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}
