//! Entries as they are stored away from the device, and back.
//!
//! Quantizing is a maximum, a division, a rounding: each exact or correctly rounded on every level, and no sums, so the
//! bytes are the same everywhere. Decoding is one product, or a product and a sum, never fused, for the same reason.

use super::CpuBackend;
use super::simd::{Element, Kernel, LANES, Simd, for_dtype};
use super::view::{Shared, row};
use crate::backend::{Buffer, DType, KvGeometry, KvRunsMut, Landing, Payload, Rows, Slot, StoredRuns};
use half::f16;

/// Rows worth a piece of parallel work: some ten microseconds.
const PIECE: usize = 128;

const GROUP: usize = Payload::GROUP;

/// Stores every token's heads in their slots, which lie inside their buffers.
pub(super) fn encode(
    cpu: &CpuBackend,
    keys: Rows<'_>,
    values: Rows<'_>,
    payload: Payload,
    geometry: &KvGeometry,
    slots: &[Slot],
    targets: &mut [Buffer],
) {
    let (d, bytes) = (geometry.head_dim, payload.row_bytes(geometry));
    for (i, slots) in slots.chunks_exact(geometry.kv_heads).enumerate() {
        let (keys, values) = (row(&keys, i).chunks_exact(d), row(&values, i).chunks_exact(d));
        for ((key, value), slot) in keys.zip(values).zip(slots) {
            // SAFETY: the caller asserted that the slot lies inside its buffer, which is borrowed mutably.
            let to =
                unsafe { std::slice::from_raw_parts_mut(targets[slot.buffer].address_mut().add(slot.offset), bytes) };
            match payload {
                Payload::Exact => {
                    let (k, v) = to.split_at_mut(bytes / 2);
                    narrow(geometry.dtype, key, k);
                    narrow(geometry.dtype, value, v);
                }
                Payload::Int8 => {
                    let (scales, codes) = to.split_at_mut(8);
                    let (k, v) = codes.split_at_mut(d);
                    for (x, scale, codes) in [(key, 0, k), (value, 4, v)] {
                        let x = cpu.level.run(Int8 { x, codes });
                        scales[scale..scale + 4].copy_from_slice(&x.to_le_bytes());
                    }
                }
                Payload::Int4 => {
                    let (k, v) = to.split_at_mut(bytes / 2);
                    cpu.level.run(Int4 { x: key, to: k });
                    cpu.level.run(Int4 { x: value, to: v });
                }
            }
        }
    }
}

/// Rounds `x` to `dtype`, at any alignment.
fn narrow(dtype: DType, x: &[f32], to: &mut [u8]) {
    let mut rounded = [0u8; 4 * GROUP];
    for (x, to) in x.chunks(GROUP).zip(to.chunks_mut(GROUP * dtype.bytes())) {
        for_dtype!(dtype, E => {
            let mut piece = [<E as Default>::default(); GROUP];
            E::narrow(x, &mut piece[..x.len()]);
            for (to, x) in rounded.chunks_exact_mut(dtype.bytes()).zip(&piece[..x.len()]) {
                to.copy_from_slice(&x.to_le_bytes());
            }
        });
        to.copy_from_slice(&rounded[..to.len()]);
    }
}

/// Quantizes a vector to signed bytes and returns the scale.
struct Int8<'a> {
    x: &'a [f32],
    codes: &'a mut [u8],
}

impl Kernel for Int8<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut most = s.zero();
        for i in (0..self.x.len()).step_by(LANES) {
            let x = s.load_slice(&self.x[i..]);
            // `max` gives its second operand for a NaN: a NaN is no scale.
            most = s.max(s.max(x, s.sub(s.zero(), x)), most);
        }
        let scale = s.largest(most) / 127.0;
        let divisor = s.splat(if scale > 0.0 { scale } else { 1.0 });
        for (x, codes) in self.x.chunks(LANES).zip(self.codes.chunks_mut(LANES)) {
            let code = s.round(s.div(s.load_slice(x), divisor));
            store_codes(s, s.min(s.max(code, s.splat(-127.0)), s.splat(127.0)), codes);
        }
        scale
    }
}

/// Writes integral lanes of −128..=255 as bytes, as many as fit.
#[inline(always)]
fn store_codes<S: Simd>(s: S, codes: S::V, to: &mut [u8]) {
    // 1.5 · 2²³ + n has n in its lowest mantissa bits, in two's complement: no conversion instruction needed.
    let mut lanes = [0.0; LANES];
    s.store_slice(&mut lanes, s.add(codes, s.splat(12_582_912.0)));
    let mut bytes = [0; LANES];
    for i in 0..LANES {
        bytes[i] = lanes[i].to_bits() as u8;
    }
    to.copy_from_slice(&bytes[..to.len()]);
}

/// Quantizes a vector to nibbles, in groups.
struct Int4<'a> {
    x: &'a [f32],
    to: &'a mut [u8],
}

impl Kernel for Int4<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (parameters, mut codes) = self.to.split_at_mut(4 * self.x.len().div_ceil(GROUP));
        for (x, parameters) in self.x.chunks(GROUP).zip(parameters.chunks_exact_mut(4)) {
            let (mut least, mut most) = (s.splat(f32::MAX), s.splat(f32::MIN));
            for piece in x.chunks(LANES) {
                // Lanes past the end repeat the group's first element, which changes neither bound.
                let mut lanes = [x[0]; LANES];
                lanes[..piece.len()].copy_from_slice(piece);
                let v = s.load_slice(&lanes);
                (least, most) = (s.min(v, least), s.max(v, most));
            }
            let least = -s.largest(s.sub(s.zero(), least));
            let most = s.largest(most);
            // As stored, and codes are chosen for what is stored. Beyond the range of f16 values saturate.
            let finite = f32::from(f16::MAX);
            let minimum = f16::from_f32(least.clamp(-finite, finite));
            let scale = f16::from_f32(((most - minimum.to_f32()) / 15.0).clamp(0.0, finite));
            parameters[..2].copy_from_slice(&scale.to_le_bytes());
            parameters[2..].copy_from_slice(&minimum.to_le_bytes());
            let divisor = s.splat(if scale > f16::ZERO { scale.to_f32() } else { 1.0 });
            let mut group = [0u8; GROUP];
            for (x, codes) in x.chunks(LANES).zip(group.chunks_exact_mut(LANES)) {
                let code = s.round(s.div(s.sub(s.load_slice(x), s.splat(minimum.to_f32())), divisor));
                store_codes(s, s.min(s.max(code, s.zero()), s.splat(15.0)), codes);
            }
            let half = x.len().div_ceil(2);
            group[x.len()..].fill(0); // an odd group's last high half
            let (to, rest) = codes.split_at_mut(half);
            for j in 0..half {
                to[j] = group[j] | if half + j < x.len() { group[half + j] << 4 } else { 0 };
            }
            codes = rest;
        }
    }
}

/// Widens stored rows into their places. All rows lie inside their buffers and runs.
pub(super) fn decode(
    cpu: &CpuBackend,
    payload: Payload,
    sources: &[Buffer],
    landings: &[Landing],
    to: &mut KvRunsMut<'_>,
) {
    let geometry = *to.geometry();
    let (d, bytes, tokens) = (geometry.head_dim, payload.row_bytes(&geometry), geometry.extent_tokens);
    let runs: Vec<Shared> = (0..to.capacity() / tokens * geometry.kv_heads)
        .map(|run| Shared(to.run_mut(run / geometry.kv_heads, run % geometry.kv_heads)))
        .collect();
    // Two threads may not write one place, so rows are shared out only where all places differ.
    let grain = if landings.len() > PIECE && distinct(landings, to.capacity()) { PIECE } else { landings.len() };
    let runs = &runs[..];
    cpu.pool.split(landings.len(), grain, &|range| {
        for l in &landings[range] {
            let at = l.to as usize;
            let run = runs[at / tokens * geometry.kv_heads + l.head as usize];
            // SAFETY: the caller asserted that the row lies inside its source, which is borrowed, and that the place
            // lies inside the runs, which are borrowed mutably; no other thread has the same place (`distinct`).
            unsafe {
                let row = std::slice::from_raw_parts(sources[l.from.buffer].address().add(l.from.offset), bytes);
                let place = run.get().add(at % tokens * geometry.row_bytes());
                if payload == Payload::Exact {
                    std::ptr::copy_nonoverlapping(row.as_ptr(), place, bytes);
                } else {
                    for_dtype!(geometry.dtype, E => {
                        let place = std::slice::from_raw_parts_mut(place.cast::<E>(), 2 * d);
                        cpu.level.run(Decode { payload, row, place });
                    });
                }
            }
        }
    });
}

/// Widens the first `rows` rows of every head. There are as many in the runs of both, which are equally long.
pub(super) fn fetch(cpu: &CpuBackend, from: &StoredRuns<'_>, to: &mut KvRunsMut<'_>, rows: usize) {
    let geometry = *to.geometry();
    let (heads, tokens) = (geometry.kv_heads, geometry.extent_tokens);
    let (read, write) = (from.row_bytes(), geometry.row_bytes());
    let runs = rows.div_ceil(tokens) * heads;
    let targets: Vec<Shared> = (0..runs).map(|run| Shared(to.run_mut(run / heads, run % heads))).collect();
    let targets = &targets[..];
    cpu.pool.split(runs, 1, &|range| {
        for run in range {
            let count = tokens.min(rows - run / heads * tokens);
            // SAFETY: the first `count` rows of a run, of which there are that many: `rows` is at most what the extents
            // hold. `to` is borrowed mutably, so that it is no memory of `from`, and no other piece of work has this run.
            unsafe {
                let (source, target) = (from.run(run / heads, run % heads), targets[run].get());
                if from.payload() == Payload::Exact {
                    std::ptr::copy_nonoverlapping(source, target, count * read);
                    continue;
                }
                for_dtype!(geometry.dtype, E => for i in 0..count {
                    let row = std::slice::from_raw_parts(source.add(i * read), read);
                    let place = std::slice::from_raw_parts_mut(target.add(i * write).cast::<E>(), 2 * geometry.head_dim);
                    cpu.level.run(Decode { payload: from.payload(), row, place });
                });
            }
        }
    });
}

/// Whether no two landings share a place.
fn distinct(landings: &[Landing], capacity: usize) -> bool {
    if landings.is_sorted_by(|a, b| (a.head, a.to) < (b.head, b.to)) {
        return true;
    }
    let heads = landings.iter().map(|l| l.head as usize + 1).max().unwrap_or(0);
    let mut seen = vec![0u64; (heads * capacity).div_ceil(64)];
    landings.iter().all(|l| {
        let at = l.head as usize * capacity + l.to as usize;
        let new = seen[at / 64] >> (at % 64) & 1 == 0;
        seen[at / 64] |= 1 << (at % 64);
        new
    })
}

/// Decodes a quantized row into a key and a value.
struct Decode<'a, E> {
    payload: Payload,
    row: &'a [u8],
    place: &'a mut [E],
}

impl<E: Element> Kernel for Decode<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let d = self.place.len() / 2;
        let (key, value) = self.place.split_at_mut(d);
        if self.payload == Payload::Int8 {
            let scale = |at: usize| f32::from_le_bytes([0, 1, 2, 3].map(|i| self.row[at + i]));
            int8(scale(0), &self.row[8..8 + d], key);
            int8(scale(4), &self.row[8 + d..], value);
        } else {
            let (k, v) = self.row.split_at(self.row.len() / 2);
            int4(k, key);
            int4(v, value);
        }
    }
}

#[inline(always)]
fn int8<E: Element>(scale: f32, codes: &[u8], to: &mut [E]) {
    for (codes, to) in codes.chunks(GROUP).zip(to.chunks_mut(GROUP)) {
        let mut wide = [0.0; GROUP];
        for (x, &code) in wide.iter_mut().zip(codes) {
            *x = f32::from(code as i8) * scale;
        }
        E::narrow(&wide[..to.len()], to);
    }
}

#[inline(always)]
fn int4<E: Element>(vector: &[u8], to: &mut [E]) {
    let (parameters, mut codes) = vector.split_at(4 * to.len().div_ceil(GROUP));
    for (p, to) in parameters.chunks_exact(4).zip(to.chunks_mut(GROUP)) {
        let (scale, minimum) = (f16::from_le_bytes([p[0], p[1]]).to_f32(), f16::from_le_bytes([p[2], p[3]]).to_f32());
        let half = to.len().div_ceil(2);
        let (group, rest) = codes.split_at(half);
        let (mut low, mut high) = ([0.0; GROUP / 2], [0.0; GROUP / 2]);
        for j in 0..half {
            low[j] = f32::from(group[j] & 15) * scale + minimum;
            high[j] = f32::from(group[j] >> 4) * scale + minimum;
        }
        let (first, second) = to.split_at_mut(half);
        E::narrow(&low[..half], first);
        E::narrow(&high[..second.len()], second);
        codes = rest;
    }
}
