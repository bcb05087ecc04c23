//! Entries as they are stored away from the device, and back: by rows, and a whole layer at a time.

use super::block::{bytes_of, plain};
use super::kernels::{Kernel, Module};
use super::queue::Queue;
use super::store_kv::{self, LastStore};
use super::{Shared, address};
use crate::Result;
use crate::backend::{Buffer, DType, KvGeometry, KvRunsMut, Landing, Payload, Place, Rows, Slot, StoredRuns};

plain! {
    struct Encode {
        keys: u64,
        values: u64,
        slots: u64,
        stride: u64,
        kv_heads: u32,
        head_dim: u32,
        row_bytes: u32,
        unused: u32,
    }

    struct Decode {
        landings: u64,
        count: u32,
        unused: u32,
        kv_heads: u32,
        head_dim: u32,
        row_bytes: u32,
        unused_too: u32,
    }

    struct Fetched {
        from: u64,
        to: u64,
        next: u64,
        count: u32,
        unused: u32,
    }

    struct Fetch {
        first: u64,
        from_offset: u64,
        from_run_bytes: u64,
        to_offset: u64,
        to_run_bytes: u64,
        extent_tokens: u32,
        part_rows: u32,
        kv_heads: u32,
        head_dim: u32,
        row_bytes: u32,
        unused: u32,
    }
}

/// Landings that one launch takes.
const LANDINGS: usize = 1 << 14;

/// Threads of a block that decodes rows, a warp each.
const DECODE_THREADS: usize = 128;

/// Blocks that fetch, and their threads: a link is full with half a MiB under way, and the rest of the
/// multiprocessors compute. Widening quantized rows is work too, so more take part in it.
const COPY_BLOCKS: usize = 32;
const WIDEN_BLOCKS: usize = 48;
const FETCH_THREADS: usize = 256;

/// Bytes that a block fetches at a time, and the rows in multiples of which they come: stored rows have an even number
/// of bytes, so that many of them leave the next one aligned to 16.
const PART_BYTES: usize = 16 << 10;
const PART_ROWS: usize = 16;

/// The launch that waits last, when it was a fetch: another sequence's rows of the same layer may join it.
pub(super) struct LastFetch {
    kernel: &'static str,
    params: Fetch,
    /// Where the last sequence is described, which `next` may be added to until it is sent.
    last: u64,
    described: Fetched,
}

/// See `Backend::encode_kv`.
pub(super) fn encode(
    shared: &Shared,
    queue: &mut Queue,
    [keys, values]: [Rows<'_>; 2],
    payload: Payload,
    geometry: &KvGeometry,
    slots: &[Slot],
    targets: &mut [Buffer],
) -> Result<()> {
    if keys.rows() == 0 {
        return Ok(());
    }
    assert_eq!(keys.stride(), values.stride(), "keys and values of one projection");
    let name = match (payload, geometry.dtype) {
        (Payload::Exact, DType::F32) => "encode_f32",
        (Payload::Exact, DType::F16) => "encode_f16",
        (Payload::Exact, DType::BF16) => "encode_bf16",
        (Payload::Exact, DType::U32) => unreachable!("keys and values are not u32"),
        (Payload::Int8, _) => "encode_int8",
        (Payload::Int4, _) => "encode_int4",
    };
    let slots: Vec<u64> =
        slots.iter().map(|slot| address(targets[slot.buffer].address_mut()) + slot.offset as u64).collect();
    let slots = bytes_of(&slots);
    let row_bytes = payload.row_bytes(geometry);
    let mut last = LastStore::after(name, geometry, keys, values);
    if store_kv::joins(queue, &last, keys, values, slots.len()) {
        queue.block.extend(slots);
        queue.widen_last(keys.rows());
    } else {
        queue.reserve(slots.len(), 1)?;
        let params = Encode {
            keys: address(keys.base()),
            values: address(values.base()),
            slots: queue.block.push(slots),
            stride: keys.stride() as u64,
            kv_heads: geometry.kv_heads as u32,
            head_dim: geometry.head_dim as u32,
            row_bytes: row_bytes as u32,
            unused: 0,
        };
        let warps = geometry.kv_heads.min(8);
        let kernel = Kernel::new(Module::Payload, name).with_shared(warps * row_bytes.next_multiple_of(16));
        queue.push(shared, kernel, [keys.rows(), 1, 1], 32 * warps, &params)?;
    }
    last.end = queue.block.used();
    queue.last_store = Some(last);
    Ok(())
}

/// Kernels by payload and element type.
fn by_type(payload: Payload, dtype: DType, exact: &'static str, quantized: [[&'static str; 3]; 2]) -> &'static str {
    let dtype = match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 2,
        DType::U32 => unreachable!("keys and values are not u32"),
    };
    match payload {
        Payload::Exact => exact,
        Payload::Int8 => quantized[0][dtype],
        Payload::Int4 => quantized[1][dtype],
    }
}

/// See `Backend::decode_kv_rows`.
pub(super) fn decode(
    shared: &Shared,
    queue: &mut Queue,
    payload: Payload,
    sources: &[Buffer],
    landings: &[Landing],
    to: &mut KvRunsMut<'_>,
) -> Result<()> {
    let geometry = *to.geometry();
    let (tokens, row_bytes) = (geometry.extent_tokens, payload.row_bytes(&geometry));
    let name = by_type(
        payload,
        geometry.dtype,
        "decode_exact",
        [
            ["decode_int8_f32", "decode_int8_f16", "decode_int8_bf16"],
            ["decode_int4_f32", "decode_int4_f16", "decode_int4_bf16"],
        ],
    );
    // Two warps at one place would leave a mixture, so the first landing there has it.
    let distinct = landings.is_sorted_by(|a, b| (a.head, a.to) < (b.head, b.to));
    let capacity = to.capacity();
    let mut taken = vec![0u64; if distinct { 0 } else { (geometry.kv_heads * capacity).div_ceil(64) }];
    let mut take = |l: &&Landing| {
        let at = l.head as usize * capacity + l.to as usize;
        let new = taken[at / 64] >> (at % 64) & 1 == 0;
        taken[at / 64] |= 1 << (at % 64);
        new
    };
    let pairs: Vec<[u64; 2]> = landings
        .iter()
        .filter(|l| distinct || take(l))
        .map(|l| {
            let at = l.to as usize;
            let run = address(to.run_mut(at / tokens, l.head as usize));
            let from = address(sources[l.from.buffer].address()) + l.from.offset as u64;
            [from, run + (at % tokens * geometry.row_bytes()) as u64]
        })
        .collect();
    let warps = DECODE_THREADS / 32;
    let place = sources.first().map_or(Place::Device, Buffer::place);
    let shared_bytes = if payload == Payload::Exact { 0 } else { warps * row_bytes.next_multiple_of(16) };
    for pairs in pairs.chunks(LANDINGS) {
        queue.reserve(16 * pairs.len(), 1)?;
        let params = Decode {
            landings: queue.block.push(bytes_of(pairs.as_flattened())),
            count: pairs.len() as u32,
            unused: 0,
            kv_heads: geometry.kv_heads as u32,
            head_dim: geometry.head_dim as u32,
            row_bytes: row_bytes as u32,
            unused_too: 0,
        };
        let kernel = Kernel::new(Module::Payload, name).with_shared(shared_bytes).reading(place);
        queue.push(shared, kernel, [pairs.len().div_ceil(warps), 1, 1], DECODE_THREADS, &params)?;
    }
    Ok(())
}

/// See `Backend::fetch_kv`.
pub(super) fn fetch(
    shared: &Shared,
    queue: &mut Queue,
    from: &StoredRuns<'_>,
    to: &mut KvRunsMut<'_>,
    rows: usize,
) -> Result<()> {
    if rows == 0 {
        return Ok(());
    }
    let geometry = *to.geometry();
    let (payload, row_bytes) = (from.payload(), from.row_bytes());
    let name = by_type(
        payload,
        geometry.dtype,
        "fetch_exact",
        [
            ["fetch_int8_f32", "fetch_int8_f16", "fetch_int8_bf16"],
            ["fetch_int4_f32", "fetch_int4_f16", "fetch_int4_bf16"],
        ],
    );
    let part_rows = (PART_BYTES / row_bytes / PART_ROWS).max(1) * PART_ROWS;
    let [sources, targets] = [
        table((0..from.extents()).map(|i| address(from.extent(i)))),
        table((0..to.extents()).map(|i| address(to.extent_mut(i)))),
    ];
    let mut params = Fetch {
        first: 0,
        from_offset: from.layer_offset() as u64,
        from_run_bytes: from.run_bytes() as u64,
        to_offset: to.layer_offset() as u64,
        to_run_bytes: geometry.run_bytes() as u64,
        extent_tokens: geometry.extent_tokens as u32,
        part_rows: part_rows as u32,
        kv_heads: geometry.kv_heads as u32,
        head_dim: geometry.head_dim as u32,
        row_bytes: row_bytes as u32,
        unused: 0,
    };
    let bytes = 8 * (sources.len() + targets.len()) + size_of::<Fetched>();
    let joined = queue.last_fetch.take().filter(|before| {
        let same = Fetch { first: params.first, ..before.params };
        let alike = before.kernel == name && bytes_of(&[same]) == bytes_of(&[params]);
        alike && queue.block.fits(bytes, 3) && queue.last_has_waited()
    });
    if joined.is_none() {
        queue.reserve(bytes, 3)?;
    }
    let described = Fetched {
        from: queue.block.push_table(bytes_of(&sources)),
        to: queue.block.push_table(bytes_of(&targets)),
        next: 0,
        count: rows as u32,
        unused: 0,
    };
    let last = queue.block.push(bytes_of(&[described]));
    match joined {
        Some(before) => {
            queue.block.rewrite(before.last, bytes_of(&[Fetched { next: last, ..before.described }]));
            params.first = before.params.first;
        }
        None => {
            params.first = last;
            let (blocks, shared_bytes) = match payload {
                Payload::Exact => (COPY_BLOCKS, 0),
                _ => (WIDEN_BLOCKS, part_rows * row_bytes),
            };
            let kernel = Kernel::new(Module::Payload, name).with_shared(shared_bytes).reading(from.place());
            queue.push(shared, kernel, [blocks, 1, 1], FETCH_THREADS, &params)?;
        }
    }
    queue.last_fetch = Some(LastFetch { kernel: name, params, last, described });
    Ok(())
}

/// Addresses with zeros behind them, so that the table's length changes rarely.
fn table(addresses: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut table: Vec<u64> = addresses.collect();
    table.resize(table.len().next_power_of_two().max(16), 0);
    table
}
