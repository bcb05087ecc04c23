//! Payloads: the bytes of the CPU backend, entries that come back as it has them, by rows and by whole layers.

use half::{bf16, f16};
use kvahead::backend::{Buffer, DType, KvGeometry, KvRunsMut, Landing, Payload, Place, Slot, StoredRuns};

use crate::rig::*;

const PAYLOADS: [Payload; 3] = [Payload::Exact, Payload::Int8, Payload::Int4];

/// Rows of vectors of all kinds: usual, constant, zero, of both zeros, tiny, huge, far from zero, and with an outlier.
fn vectors(random: &mut Random, rows: usize, d: usize) -> Vec<f32> {
    let mut x = random.normals(rows * d);
    for (i, vector) in x.chunks_mut(d).enumerate() {
        match i % 11 {
            1 => vector.fill(-1.75),
            2 => vector.fill(0.0),
            3 => vector.iter_mut().for_each(|x| *x += 300.0),
            4 => vector[d / 2] = -500.0,
            5 => vector.iter_mut().for_each(|x| *x = if *x < 0.0 { -0.0 } else { 0.0 }),
            6 => vector.iter_mut().for_each(|x| *x *= 1e-41),
            7 => vector.iter_mut().for_each(|x| *x *= 3e37),
            8 => vector.iter_mut().for_each(|x| *x = x.abs()),
            9 => vector.iter_mut().for_each(|x| *x *= 1e-6),
            10 => vector.iter_mut().for_each(|x| *x = (*x * 8.0).round() / 2.0),
            _ => {}
        }
    }
    x
}

fn row_of(payload: Payload, head_dim: usize, dtype: DType) -> (KvGeometry, usize) {
    let geometry = KvGeometry { layers: 1, kv_heads: 1, head_dim, extent_tokens: 1, dtype };
    (geometry, payload.row_bytes(&geometry))
}

fn filled(rig: &Rig<'_>, place: Place, bytes: usize, value: u8) -> Buffer {
    let mut buffer = rig.b.allocate(bytes, place, "a test").unwrap();
    rig.b.upload(&rig.stream, &vec![value; bytes], &mut buffer, 0).unwrap();
    buffer
}

/// Tokens, KV heads, head dimension, tokens of an extent.
const SHAPES: [(usize, usize, usize, usize); 9] = [
    (1, 1, 1, 4),
    (3, 2, 61, 2),
    (7, 3, 64, 4),
    (5, 1, 80, 100),
    (9, 2, 96, 3),
    (40, 8, 128, 16),
    (2, 2, 129, 100),
    (11, 9, 256, 5),
    (300, 2, 100, 64),
];

#[test]
fn stored_bytes_are_the_cpus() {
    with_both(|cuda, cpu| {
        for payload in PAYLOADS {
            for dtype in STORED {
                for (tokens, kv_heads, d, extent_tokens) in SHAPES {
                    for (apart, place) in [(0, Place::Device), (1, Place::Pinned), (4, Place::Device)] {
                        let geometry = KvGeometry { layers: 1, kv_heads, head_dim: d, extent_tokens, dtype };
                        let (rows, bytes) = (tokens * kv_heads, payload.row_bytes(&geometry));
                        let case = format!("{payload:?} {dtype} {tokens}x{kv_heads}x{d}, {apart} apart in {place:?}");
                        let mut random = Random(d as u64 + 7 * tokens as u64);
                        let (keys, values) = (vectors(&mut random, rows, d), vectors(&mut random, rows, d));
                        // Rows lie in two buffers, in any order.
                        let slot =
                            |i: usize| Slot { buffer: i % 2, offset: apart + (rows - 1 - i) / 2 * (bytes + apart) };
                        let slots: Vec<Slot> = (0..rows).map(slot).collect();
                        let length = (apart + rows.div_ceil(2) * (bytes + apart)).next_multiple_of(2);
                        let run = |rig: &Rig<'_>| {
                            // Keys and values are windows of wider rows, as after a fused projection, in two calls.
                            let cols = kv_heads * d;
                            let wide: Vec<f32> = (0..tokens)
                                .flat_map(|i| {
                                    [&keys[i * cols..][..cols], &[9.0], &values[i * cols..][..cols], &[7.0]].concat()
                                })
                                .collect();
                            let kv = rig.buffer(DType::F32, &wide);
                            let kv = kv.rows(DType::F32, tokens, 2 * cols + 2);
                            let (k, v) = (kv.col_range(0, cols), kv.col_range(cols + 1, cols));
                            let mut stored = [0, 1].map(|_| filled(rig, place, length, 0xa5));
                            let first = tokens / 3;
                            for (from, count) in [(0, first), (first, tokens - first)] {
                                let slots = &slots[from * kv_heads..(from + count) * kv_heads];
                                let (k, v) = (k.row_range(from, count), v.row_range(from, count));
                                rig.b.encode_kv(&rig.stream, k, v, payload, &geometry, slots, &mut stored).unwrap();
                            }
                            stored.map(|buffer| rig.bytes(&buffer))
                        };
                        assert!(run(cuda) == run(cpu), "{case}: bytes differ");
                    }
                }
            }
        }
    });
}

/// Rows of random bytes, parameters made finite: every code there is.
fn random_rows(random: &mut Random, payload: Payload, rows: usize, d: usize, dtype: DType) -> Vec<u8> {
    let (_, bytes) = row_of(payload, d, dtype);
    let mut all: Vec<u8> = (0..rows * bytes).map(|_| random.next() as u8).collect();
    for row in all.chunks_mut(bytes) {
        match payload {
            Payload::Exact => {
                for element in row.chunks_exact_mut(dtype.bytes()) {
                    let x = random.normal();
                    match dtype {
                        DType::F32 => element.copy_from_slice(&x.to_le_bytes()),
                        DType::F16 => element.copy_from_slice(&f16::from_f32(x).to_le_bytes()),
                        _ => element.copy_from_slice(&bf16::from_f32(x).to_le_bytes()),
                    }
                }
            }
            Payload::Int8 => {
                for scale in row[..8].chunks_exact_mut(4) {
                    scale.copy_from_slice(&(random.normal().abs() / 50.0).to_le_bytes());
                }
            }
            Payload::Int4 => {
                for vector in row.chunks_mut(bytes / 2) {
                    for parameter in vector[..4 * d.div_ceil(Payload::GROUP)].chunks_exact_mut(2) {
                        parameter.copy_from_slice(&f16::from_f32(random.normal()).to_le_bytes());
                    }
                }
            }
        }
    }
    all
}

fn contents(rig: &Rig<'_>, extents: &[Buffer]) -> Vec<Vec<u8>> {
    extents.iter().map(|extent| rig.bytes(extent)).collect()
}

#[test]
fn rows_land_as_on_the_cpu() {
    with_both(|cuda, cpu| {
        for payload in PAYLOADS {
            for dtype in STORED {
                for (tokens, kv_heads, d, extent_tokens) in SHAPES {
                    for (apart, place) in [(0, Place::Pinned), (1, Place::Device), (4, Place::Pinned)] {
                        let geometry = KvGeometry { layers: 2, kv_heads, head_dim: d, extent_tokens, dtype };
                        let (rows, bytes) = (tokens * kv_heads, payload.row_bytes(&geometry));
                        let case = format!("{payload:?} {dtype} {tokens}x{kv_heads}x{d}, {apart} apart in {place:?}");
                        let mut random = Random(rows as u64);
                        let data = random_rows(&mut random, payload, rows, d, dtype);
                        let mut stored = vec![0xa5; (apart + rows * (bytes + apart)).next_multiple_of(2)];
                        for (i, row) in data.chunks(bytes).enumerate() {
                            stored[apart + i * (bytes + apart)..][..bytes].copy_from_slice(row);
                        }
                        // Some rows, to places in no order; the last two of them in one place, with the same bytes.
                        let mut landings: Vec<Landing> = (0..rows)
                            .filter(|_| random.below(4) > 0)
                            .map(|i| Landing {
                                from: Slot { buffer: 0, offset: apart + i * (bytes + apart) },
                                head: (i % kv_heads) as u32,
                                to: (tokens - 1 - i / kv_heads) as u32,
                            })
                            .collect();
                        landings.extend(landings.last().copied());
                        let run = |rig: &Rig<'_>| {
                            let mut source = rig.b.allocate(stored.len(), place, "a test").unwrap();
                            rig.b.upload(&rig.stream, &stored, &mut source, 0).unwrap();
                            let mut target: Vec<Buffer> = (0..geometry.extents(tokens))
                                .map(|_| filled(rig, Place::Device, geometry.extent_bytes(), 0x5a))
                                .collect();
                            let mut runs = KvRunsMut::new(&mut target, geometry, 1);
                            rig.b.decode_kv_rows(&rig.stream, payload, &[source], &landings, &mut runs).unwrap();
                            contents(rig, &target)
                        };
                        assert!(run(cuda) == run(cpu), "{case}: bytes differ");
                    }
                }
            }
        }
    });
}

/// Whole layers of several sequences, one behind the other, as a batch fetches them: each as on the CPU.
#[test]
fn whole_layers_land_as_on_the_cpu() {
    with_both(|cuda, cpu| {
        for payload in PAYLOADS {
            for dtype in STORED {
                for (kv_heads, d, extent_tokens, counts) in [
                    (1, 1, 1, vec![1, 0, 3]),
                    (2, 61, 7, vec![20, 7, 8]),
                    (3, 64, 64, vec![64, 200, 63]),
                    (1, 80, 100, vec![350]),
                    (2, 96, 33, vec![100, 1]),
                    (8, 128, 256, vec![700, 256, 255, 257]),
                    (2, 256, 256, vec![300]),
                ] {
                    let stored = KvGeometry { layers: 3, kv_heads, head_dim: d, extent_tokens, dtype };
                    let staging = KvGeometry { layers: 1, ..stored };
                    let case = format!("{payload:?} {dtype} {kv_heads}x{d}, {counts:?} of {extent_tokens}");
                    let run = |rig: &Rig<'_>| {
                        let mut random = Random(d as u64);
                        let sequences: Vec<Vec<Buffer>> = counts
                            .iter()
                            .map(|&count| {
                                (0..stored.extents(count + 1))
                                    .map(|_| {
                                        let rows = stored.layers * kv_heads * extent_tokens;
                                        let bytes = random_rows(&mut random, payload, rows, d, dtype);
                                        let mut extent = rig.b.allocate(bytes.len(), Place::Pinned, "a test").unwrap();
                                        rig.b.upload(&rig.stream, &bytes, &mut extent, 0).unwrap();
                                        extent
                                    })
                                    .collect()
                            })
                            .collect();
                        let mut targets: Vec<Vec<Buffer>> = counts
                            .iter()
                            .map(|&count| {
                                (0..staging.extents(count + 1))
                                    .map(|_| filled(rig, Place::Device, staging.extent_bytes(), 0x5a))
                                    .collect()
                            })
                            .collect();
                        let mut all = Vec::new();
                        for layer in [2, 0] {
                            for ((sequence, target), &count) in sequences.iter().zip(&mut targets).zip(&counts) {
                                let from = StoredRuns::new(sequence, stored, payload, layer);
                                let mut to = KvRunsMut::new(target, staging, 0);
                                rig.b.fetch_kv(&rig.stream, &from, &mut to, count).unwrap();
                            }
                            all.push(targets.iter().map(|target| contents(rig, target)).collect::<Vec<_>>());
                        }
                        all
                    };
                    assert!(run(cuda) == run(cpu), "{case}: bytes differ");
                }
            }
        }
    });
}

/// Many landings in one place: one of them has it whole.
#[test]
fn two_landings_in_one_place_leave_either() {
    with_both(|cuda, _| {
        let geometry = KvGeometry { layers: 1, kv_heads: 1, head_dim: 64, extent_tokens: 100, dtype: DType::F32 };
        let x = cuda.buffer(DType::F32, &[vec![1.0; 64], vec![2.0; 64]].concat());
        let x = x.rows(DType::F32, 2, 64);
        let slots = [0, 1].map(|i| Slot { buffer: 0, offset: i * Payload::Int8.row_bytes(&geometry) });
        let mut stored = [cuda.b.allocate(1000, Place::Device, "a test").unwrap()];
        cuda.b.encode_kv(&cuda.stream, x, x, Payload::Int8, &geometry, &slots, &mut stored).unwrap();
        let landings: Vec<Landing> = (0..1000).map(|i| Landing { from: slots[i % 2], head: 0, to: 5 }).collect();
        let mut target = [filled(cuda, Place::Device, geometry.extent_bytes(), 0)];
        let mut runs = KvRunsMut::new(&mut target, geometry, 0);
        cuda.b.decode_kv_rows(&cuda.stream, Payload::Int8, &stored, &landings, &mut runs).unwrap();
        let got = cuda.floats(target[0].rows(DType::F32, 100, 128));
        let row = &got[5 * 128..6 * 128];
        let is = |value: f32| row.iter().all(|x| (x - value).abs() < 1e-6);
        assert!(is(1.0) || is(2.0), "neither of the two, or a mixture: {row:?}");
        assert!(got[..5 * 128].iter().chain(&got[6 * 128..]).all(|&x| x == 0.0), "another row was touched");
    });
}
