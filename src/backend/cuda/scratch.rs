//! How much scratch memory the largest steps take, before they run.

use super::queue::{Queue, Use};
use super::{Shared, attention, mass, matmul, rank, rehearse};
use crate::backend::{DType, Scratch, Work};

/// Lanes of a step: its own, and the second beside it, which finds out what is fetched.
const MAIN: usize = 0;
const AHEAD: usize = 2;

/// Bytes of parameters, at most, that an operation has for each sequence beside its tables of extents.
const PARAMETERS: usize = 512;

/// Tables of extents that one operation has for each sequence.
const TABLES: usize = 3;

/// See `Backend::scratch`.
pub(super) fn scratch(shared: &Shared, queue: &Queue, work: Option<&Work<'_>>) -> Scratch {
    let Some(work) = work else { return queue.scratch_bytes(&[], 0, false) };
    let Work {
        attention: shape,
        kv,
        rows,
        sequences,
        tokens,
        extent_tokens,
        attended,
        ranked,
        index,
        products,
        predictors,
    } = work;
    let [partials, counters] = attention::scratch_bytes(shared, shape, *kv, *sequences, *attended);
    let masses = match *ranked {
        0 => 0,
        rows => mass::scratch_bytes(shape, rows, *tokens).max(rank::scratch_bytes(shape.kv_heads, *tokens)),
    };
    // Where it was looked for in vain, cuBLAS multiplies nothing.
    let blas = !matches!(*shared.blas.lock(), Some(None));
    let sixteen = products.iter().filter(|product| product.dtype != DType::F32 && blas);
    let converted = sixteen.map(|product| rows * product.inputs.next_multiple_of(8) * 2).max().unwrap_or(0);
    let rehearsals = index.map_or(0, |index| rehearse::scratch_bytes(*tokens, shape.heads, index.kv_heads, *sequences));
    let decoded = matmul::scratch_bytes(shared, products, *sequences);
    let predicted = matmul::scratch_bytes(shared, predictors, *sequences);
    let wanted = [
        (MAIN, Use::Partials, partials.max(masses).max(decoded[0])),
        (MAIN, Use::Counters, counters.max(decoded[1])),
        (MAIN, Use::Converted, converted),
        (AHEAD, Use::Partials, predicted[0]),
        (AHEAD, Use::Counters, predicted[1]),
        (AHEAD, Use::Rehearsals, rehearsals),
    ];
    let table = 8 * tokens.div_ceil(*extent_tokens).next_power_of_two().max(16);
    queue.scratch_bytes(&wanted, sequences * (TABLES * table + PARAMETERS), true)
}
