//! Budgets of bytes that many share.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// An amount of bytes that many share, handed out as [`Lease`]s.
#[derive(Debug)]
pub struct Budget {
    limit: AtomicU64,
    used: AtomicU64,
}

impl Budget {
    /// A budget of `limit` bytes.
    pub fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self { limit: AtomicU64::new(limit), used: AtomicU64::new(0) })
    }

    /// The most bytes that may be leased.
    pub fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    /// Changes the limit. Leases that are out stay; nothing new is handed out until they are within it.
    pub fn set_limit(&self, limit: u64) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// A lease of nothing yet.
    pub fn empty(self: &Arc<Self>) -> Lease {
        Lease { budget: self.clone(), amount: 0 }
    }

    /// Takes `amount` bytes, or nothing.
    pub fn lease(self: &Arc<Self>, amount: u64) -> Option<Lease> {
        let mut lease = self.empty();
        lease.grow(amount).then_some(lease)
    }

    /// Takes `amount` bytes if no more than `most` are taken afterwards: what is above is left to others.
    pub fn lease_up_to(self: &Arc<Self>, amount: u64, most: u64) -> Option<Lease> {
        let mut lease = self.empty();
        lease.grow_within(amount, most.min(self.limit())).then_some(lease)
    }

    /// Takes `amount` bytes that are held already, whether or not they are left. Beyond the limit nothing more is leased until enough has
    /// come back.
    pub fn charge(self: &Arc<Self>, amount: u64) -> Lease {
        self.used.fetch_add(amount, Ordering::Relaxed);
        Lease { budget: self.clone(), amount }
    }

    /// How many bytes are taken.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }
}

/// A part of a [`Budget`]; given back on drop.
#[derive(Debug)]
pub struct Lease {
    budget: Arc<Budget>,
    amount: u64,
}

impl Lease {
    /// Makes the lease at least `amount` bytes; false, and unchanged, if the budget does not have them.
    pub fn cover(&mut self, amount: u64) -> bool {
        amount <= self.amount || self.grow(amount - self.amount)
    }

    /// Makes the lease `amount` bytes, larger or smaller; false, and unchanged, if the budget does not have them.
    pub fn resize(&mut self, amount: u64) -> bool {
        if amount >= self.amount {
            return self.cover(amount);
        }
        self.budget.used.fetch_sub(self.amount - amount, Ordering::Relaxed);
        self.amount = amount;
        true
    }

    /// Makes the lease larger by `more`; false, and unchanged, if the budget does not have that.
    pub fn grow(&mut self, more: u64) -> bool {
        self.grow_within(more, self.budget.limit())
    }

    fn grow_within(&mut self, more: u64, limit: u64) -> bool {
        let within = |used: u64| used.checked_add(more).filter(|sum| *sum <= limit);
        let taken = self.budget.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).is_ok();
        if taken {
            self.amount += more;
        }
        taken
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.amount, Ordering::Relaxed);
    }
}
