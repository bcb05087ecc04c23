//! Counting what a policy does, so that a step that fails has not been counted.

use crate::kv::FetchCounters;

use super::{KvCounters, Phase, Step};

/// The counters of a session, and what they were when its step began.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    now: KvCounters,
    before: KvCounters,
    /// The store's counters when ours were last reset.
    fetched_before: FetchCounters,
}

impl Tally {
    /// A step begins.
    pub(super) fn begin(&mut self) {
        self.before = self.now;
    }

    /// The step has failed.
    pub(super) fn undo(&mut self) {
        self.now = self.before;
    }

    /// One layer of a step in which each of `kv_heads` attends `attended` entries, its own token's included. Only decode
    /// is counted; the tokens of a prompt that are decoded one by one are.
    pub(super) fn layer(&mut self, step: &Step<'_>, kv_heads: usize, attended: usize) {
        if step.phase != Phase::Decode {
            return;
        }
        let entries = |rows: usize| (kv_heads * rows) as u64;
        self.now.steps += u64::from(step.layer == 0);
        self.now.candidates += entries(step.position);
        self.now.selected += entries(attended - 1);
        self.now.attended += entries(attended);
        self.now.held += entries(step.position + 1);
    }

    /// Entries that were on the device already, and entries that were fetched.
    pub(super) fn fetched(&mut self, step: &Step<'_>, hits: usize, misses: usize) {
        if step.phase == Phase::Decode {
            self.now.hits += hits as u64;
            self.now.misses += misses as u64;
        }
    }

    pub(super) fn counters(&self) -> KvCounters {
        self.now
    }

    /// The counters, with what a store has moved since the last reset.
    pub(super) fn with(&self, fetched: FetchCounters) -> KvCounters {
        let before = &self.fetched_before;
        KvCounters {
            host_bytes: fetched.host_bytes - before.host_bytes,
            file_bytes: fetched.file_bytes - before.file_bytes,
            file_read_bytes: fetched.file_read_bytes - before.file_read_bytes,
            read_seconds: fetched.read_seconds - before.read_seconds,
            wait_seconds: fetched.wait_seconds - before.wait_seconds,
            ..self.now
        }
    }

    /// Sets everything to zero; `fetched` is what the store has moved so far.
    pub(super) fn reset(&mut self, fetched: FetchCounters) {
        *self = Tally { fetched_before: fetched, ..Tally::default() };
    }
}
