//! How much scratch memory the largest steps take, before they run. Operations take turns, so one block serves them all.

use super::memory::ScratchPool;
use super::{CpuBackend, attention, gemm, index};
use crate::backend::{Scratch, Work};

/// See `Backend::scratch`.
pub(super) fn scratch(cpu: &CpuBackend, work: Option<&Work<'_>>) -> Scratch {
    let held = cpu.scratch.bytes();
    let Some(work) = work else { return Scratch { device: held, pinned: 0 } };
    let products = work.products.iter().map(|product| gemm::scratch_bytes(cpu, work.rows, product));
    let rehearsals = work
        .index
        .map_or(0, |_| 4 * index::floats(cpu.pool.threads(), work.attention.heads, work.sequences, work.tokens));
    let most = products.chain([attention::scratch_bytes(cpu, work), rehearsals]).max().unwrap_or(0);
    Scratch { device: held.max(ScratchPool::rounded(most)), pinned: 0 }
}
