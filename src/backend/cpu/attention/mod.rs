//! Softmax attention over the runs of KV that segments name.
//!
//! - [`decode`]: one new token a segment. Reading K and V is all the time there is, so each is read once for the whole
//!   group of query heads that share it, and long contexts are cut into chunks for the threads.
//! - [`prefill`]: many new tokens. Tiles of query rows meet blocks of KV in matrix products; the n × n scores never exist.
//! - [`mass`](mod@mass): how much of it each token gets.
//!
//! All keep, per query, the largest score m, the sum l of exp(score − m), and the values weighted by exp(score − m):
//! the online softmax of Milakov and Gimelshein (2018), as in FlashAttention.

mod decode;
mod mass;
mod prefill;

use super::CpuBackend;
use super::simd::for_dtype;
use super::unit::for_unit;
use crate::Result;
use crate::backend::{AttentionShape, DType, Rows, RowsMut, Segment, Work};

/// A score below any real one, and finite: differences of two of it are no NaN.
const LEAST: f32 = -1e30;

/// See `Backend::attend`.
pub(super) fn attend(
    cpu: &CpuBackend,
    q: Rows<'_>,
    shape: &AttentionShape,
    segments: &[Segment<'_>],
    out: RowsMut<'_>,
) -> Result<()> {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let of_dtype = |s: &&Segment<'_>| s.rows == 1 && s.runs.geometry().dtype == dtype;
        let single: Vec<&Segment<'_>> = segments.iter().filter(of_dtype).collect();
        if !single.is_empty() {
            for_dtype!(dtype, E => decode::attend::<E>(cpu, q, shape, &single, &out))?;
        }
    }
    for segment in segments.iter().filter(|s| s.rows > 1) {
        let dtype = segment.runs.geometry().dtype;
        for_unit!(cpu.level, dtype, (unit, E) => prefill::attend::<E, _>(cpu, unit, q, shape, segment, &out))?;
    }
    Ok(())
}

/// Bytes of scratch memory for the largest of the steps.
pub(super) fn scratch_bytes(cpu: &CpuBackend, work: &Work<'_>) -> usize {
    let (shape, threads) = (&work.attention, cpu.pool.threads());
    let tile = for_unit!(cpu.level, work.kv, (unit, E) => prefill::tile_bytes::<E, _>(unit, shape, work.rows));
    let ranked = if work.ranked == 0 { 0 } else { mass::floats(threads, shape, work.ranked, work.tokens) };
    (threads * tile).max(4 * decode::floats(shape, work.sequences, work.attended)).max(4 * ranked)
}

/// First position that the token at `position` sees.
fn first_seen(shape: &AttentionShape, position: usize) -> usize {
    shape.window.map_or(0, |window| (position + 1).saturating_sub(window))
}

/// See `Backend::attention_mass`.
pub(super) fn mass(
    cpu: &CpuBackend,
    q: Rows<'_>,
    shape: &AttentionShape,
    segment: &Segment<'_>,
    out: RowsMut<'_>,
) -> Result<()> {
    for_dtype!(segment.runs.geometry().dtype, E => mass::mass::<E>(cpu, q, shape, segment, &out))
}
