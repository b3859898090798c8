//! The operations of a run and their shares.

use std::{fmt, str::FromStr};

/// One operation of the client interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// Fetch a blob of the corpus and check its bytes.
    Get,
    /// Store a new blob under its digest.
    Put,
    /// Store a new blob; the server returns its digest.
    Post,
    /// Get the headers of a blob of the corpus.
    Head,
    /// Delete a blob that this run put or posted. Blobs of the corpus are never deleted, since other requests read them.
    Delete,
}

impl Op {
    /// Every operation, in the order of [`Op::index`].
    pub(crate) const ALL: [Self; 5] = [Self::Get, Self::Put, Self::Post, Self::Head, Self::Delete];

    /// The index in [`Op::ALL`].
    pub(crate) const fn index(self) -> usize {
        self as usize
    }

    /// Its name in `--mix` and in the report.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Put => "put",
            Self::Post => "post",
            Self::Head => "head",
            Self::Delete => "delete",
        }
    }

    /// The HTTP method.
    pub(crate) const fn method(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
            Self::Post => "POST",
            Self::Head => "HEAD",
            Self::Delete => "DELETE",
        }
    }

    /// Whether the operation succeeded with this status.
    pub(crate) const fn succeeded(self, status: u16) -> bool {
        match self {
            Self::Get | Self::Head => status == 200,
            Self::Put | Self::Post => status == 200 || status == 201,
            Self::Delete => status == 204,
        }
    }
}

/// The shares of the operations, `get=90,put=10`: integers of any sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mix {
    weights: [u32; Op::ALL.len()],
    /// The sum of the weights; never 0.
    total: u32,
}

/// The largest weight. Five of them fit into a `u32`.
const MAX_WEIGHT: u32 = 1_000_000;

impl Mix {
    /// Only `op`.
    pub(crate) fn only(op: Op) -> Self {
        let mut weights = [0; Op::ALL.len()];
        weights[op.index()] = 1;
        Self { weights, total: 1 }
    }

    /// Whether the mix has `op`.
    pub(crate) fn has(&self, op: Op) -> bool {
        self.weights[op.index()] > 0
    }

    /// Whether the mix reads the corpus, which must then be stored first.
    pub(crate) fn reads(&self) -> bool {
        self.has(Op::Get) || self.has(Op::Head)
    }

    /// Whether the mix stores new blobs.
    pub(crate) fn writes(&self) -> bool {
        self.has(Op::Put) || self.has(Op::Post)
    }

    /// The exclusive bound of the number for [`Mix::pick`].
    pub(crate) const fn total(&self) -> u32 {
        self.total
    }

    /// The operation for `draw`, a uniform random number below [`Mix::total`].
    pub(crate) fn pick(&self, mut draw: u32) -> Op {
        for op in Op::ALL {
            let weight = self.weights[op.index()];
            if draw < weight {
                return op;
            }
            draw -= weight;
        }
        Op::Get
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for op in Op::ALL.into_iter().filter(|&op| self.has(op)) {
            write!(f, "{separator}{}={}", op.name(), self.weights[op.index()])?;
            separator = ",";
        }
        Ok(())
    }
}

impl FromStr for Mix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut weights = [None; Op::ALL.len()];
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (name, weight) = part.split_once('=').ok_or_else(|| format!("'{part}' is not of the form get=90"))?;
            let op = Op::ALL
                .into_iter()
                .find(|op| op.name() == name.trim())
                .ok_or_else(|| format!("there is no operation '{name}': write get, put, post, head or delete"))?;
            let weight = weight.trim().parse().ok().filter(|&weight| weight <= MAX_WEIGHT);
            let weight = weight.ok_or_else(|| format!("the share of {name} must be a whole number up to {MAX_WEIGHT}"))?;
            if weights[op.index()].replace(weight).is_some() {
                return Err(format!("{name} is there twice"));
            }
        }
        let weights = weights.map(Option::unwrap_or_default);
        match weights.iter().sum() {
            0 => Err("no operation has a share above 0".to_owned()),
            total => Ok(Self { weights, total }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_hit_exactly() {
        let mix: Mix = "get=90, put=5,post=5,head=0,delete=0".parse().unwrap();
        assert_eq!(mix.total(), 100);
        let count = |op| (0..mix.total()).filter(|&draw| mix.pick(draw) == op).count();
        assert_eq!(Op::ALL.map(count), [90, 5, 5, 0, 0]);
        assert!(mix.has(Op::Post) && !mix.has(Op::Head) && mix.reads() && mix.writes());
        assert_eq!(mix.to_string(), "get=90,put=5,post=5");
        assert_eq!(Op::ALL.map(Op::index), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn nonsense_is_named() {
        for (text, names) in [
            ("", "no operation"),
            ("get=0", "no operation"),
            ("get", "'get'"),
            ("fetch=1", "'fetch'"),
            ("get=-1", "share of get"),
            ("get=1.5", "share of get"),
            ("get=4000000000", "share of get"),
            ("get=1,get=2", "twice"),
        ] {
            let error = text.parse::<Mix>().unwrap_err();
            assert!(error.contains(names), "{text}: {error}");
        }
    }
}
