//! Payloads: the same bytes at every level, and values within their bounds of the exact ones.

use super::*;
use crate::backend::{KvGeometry, KvRunsMut, Landing, Payload, Slot, StoredRuns};

const PAYLOADS: [Payload; 3] = [Payload::Exact, Payload::Int8, Payload::Int4];

/// Keys and values with vectors of all kinds: usual, constant, zero, far from zero, and with an outlier.
fn vectors(random: &mut Random, rows: usize, d: usize) -> Vec<f32> {
    let mut x = random.normals(rows * d);
    for (i, vector) in x.chunks_mut(d).enumerate() {
        match i % 6 {
            1 => vector.fill(-1.75),
            2 => vector.fill(0.0),
            3 => vector.iter_mut().for_each(|x| *x += 300.0),
            4 => vector[d / 2] = -500.0,
            _ => {}
        }
    }
    x
}

/// Largest error of each element of a vector: half a step, and what rounding the parameters and the result costs.
fn bounds(payload: Payload, dtype: DType, x: &[f32]) -> Vec<f64> {
    let result = match dtype {
        DType::F32 => 2f64.powi(-22),
        DType::F16 => 2f64.powi(-11),
        _ => 2f64.powi(-8),
    };
    let wide = |x: f32| f64::from(x);
    let rounding = |x: f32, error: f64| error + (wide(x).abs() + error) * result + 1e-7;
    match payload {
        Payload::Exact => x.iter().map(|&x| rounding(x, 0.0)).collect(),
        Payload::Int8 => {
            let most = x.iter().fold(0.0, |most: f64, &x| most.max(wide(x).abs()));
            x.iter().map(|&x| rounding(x, most / 127.0 * 0.5001)).collect()
        }
        Payload::Int4 => x
            .chunks(64)
            .flat_map(|group| {
                let least = group.iter().map(|&x| wide(x)).fold(f64::MAX, f64::min);
                let most = group.iter().map(|&x| wide(x)).fold(f64::MIN, f64::max);
                // The minimum and the scale are f16: 11 bits each, and the scale's error counts fifteen times.
                let parameters = (least.abs() + (most - least)) * 2f64.powi(-10) + 15.0 * 2f64.powi(-24);
                group.iter().map(move |&x| rounding(x, (most - least) / 30.0 * 1.001 + parameters)).collect::<Vec<_>>()
            })
            .collect(),
    }
}

#[test]
fn payloads_are_the_same_everywhere_and_close_to_exact() {
    for payload in PAYLOADS {
        for dtype in STORED {
            for (tokens, kv_heads, d) in [(1, 1, 1), (3, 2, 15), (7, 3, 64), (5, 1, 80), (2, 2, 129), (300, 2, 100)] {
                let geometry = KvGeometry { layers: 1, kv_heads, head_dim: d, extent_tokens: 100, dtype };
                let mut random = Random(d as u64 + 7 * tokens as u64);
                let (keys, values) =
                    (vectors(&mut random, tokens * kv_heads, d), vectors(&mut random, tokens * kv_heads, d));
                let bytes = payload.row_bytes(&geometry);
                // Rows lie in any order, at odd addresses, in two buffers.
                let rows = tokens * kv_heads;
                let slots: Vec<Slot> =
                    (0..rows).map(|i| Slot { buffer: i % 2, offset: 3 + (rows - 1 - i) / 2 * (bytes + 1) }).collect();
                let mut expected: Option<[Vec<Vec<u8>>; 2]> = None;
                for (name, b) in backends() {
                    let case = format!("{name} {payload:?} {dtype} {tokens}x{kv_heads}x{d}");
                    let (k, v) = (buffer(&b, DType::F32, &keys), buffer(&b, DType::F32, &values));
                    let cols = kv_heads * d;
                    let (k, v) = (k.rows(DType::F32, tokens, cols), v.rows(DType::F32, tokens, cols));
                    let length = 3 + rows.div_ceil(2) * (bytes + 1);
                    let mut stored: Vec<Buffer> =
                        (0..2).map(|_| b.allocate(length, Place::Device, "a test").unwrap()).collect();
                    b.encode_kv(&Stream(0), k, v, payload, &geometry, &slots, &mut stored).unwrap();
                    let mut target: Vec<Buffer> = (0..geometry.extents(tokens))
                        .map(|_| buffer(&b, dtype, &vec![f32::NAN; geometry.extent_bytes() / dtype.bytes()]))
                        .collect();
                    // Tokens arrive in reverse order.
                    let landings: Vec<Landing> = (0..rows)
                        .map(|i| Landing {
                            from: slots[i],
                            head: (i % kv_heads) as u32,
                            to: (tokens - 1 - i / kv_heads) as u32,
                        })
                        .collect();
                    let mut runs = KvRunsMut::new(&mut target, geometry, 0);
                    b.decode_kv_rows(&Stream(0), payload, &stored, &landings, &mut runs).unwrap();
                    for i in 0..rows {
                        let at = tokens - 1 - i / kv_heads;
                        let run = runs.run_mut(at / 100, i % kv_heads);
                        // SAFETY: row `at % 100` of a run of 100 rows.
                        let row = unsafe {
                            std::slice::from_raw_parts(run.add(at % 100 * geometry.row_bytes()), geometry.row_bytes())
                        };
                        let got: Vec<f64> = row.chunks_exact(dtype.bytes()).map(|c| element(dtype, c)).collect();
                        for (got, want) in got.chunks(d).zip([&keys[i * d..][..d], &values[i * d..][..d]]) {
                            for ((g, w), bound) in got.iter().zip(want).zip(bounds(payload, dtype, want)) {
                                let error = (g - f64::from(*w)).abs();
                                assert!(error <= bound, "{case}: row {i}: {g}, not {w} ± {bound}");
                            }
                        }
                    }
                    let all = [contents(&b, &stored), contents(&b, &target)];
                    match &expected {
                        None => expected = Some(all),
                        Some(expected) => assert!(*expected == all, "{case}: bytes differ from the first level's"),
                    }
                }
            }
        }
    }
}

/// A layer fetched whole is what its rows are one by one, and nothing else is touched.
#[test]
fn whole_layers_are_their_rows() {
    for payload in PAYLOADS {
        for dtype in STORED {
            for (kv_heads, d, extent_tokens, rows) in [(1, 1, 1, 3), (2, 61, 7, 20), (3, 64, 64, 128), (2, 100, 33, 1)]
            {
                let stored = KvGeometry { layers: 3, kv_heads, head_dim: d, extent_tokens, dtype };
                let staging = KvGeometry { layers: 1, ..stored };
                let (layer, bytes) = (1, payload.row_bytes(&stored));
                let mut random = Random(d as u64);
                for (name, b) in backends() {
                    let cols = kv_heads * d;
                    let kv = [(); 2].map(|()| buffer(&b, DType::F32, &vectors(&mut random, rows * kv_heads, d)));
                    let [k, v] = [0, 1].map(|i| kv[i].rows(DType::F32, rows, cols));
                    let slot = |row: usize, head: usize| Slot {
                        buffer: row / extent_tokens,
                        offset: ((layer * kv_heads + head) * extent_tokens + row % extent_tokens) * bytes,
                    };
                    let slots: Vec<Slot> = (0..rows * kv_heads).map(|i| slot(i / kv_heads, i % kv_heads)).collect();
                    let mut extents: Vec<Buffer> = (0..stored.extents(rows))
                        .map(|_| b.allocate(3 * kv_heads * extent_tokens * bytes, Place::Pinned, "a test").unwrap())
                        .collect();
                    b.encode_kv(&Stream(0), k, v, payload, &stored, &slots, &mut extents).unwrap();
                    let target = || -> Vec<Buffer> {
                        let poison = vec![-77.0; staging.extent_bytes() / dtype.bytes()];
                        (0..staging.extents(rows)).map(|_| buffer(&b, dtype, &poison)).collect()
                    };
                    let (mut whole, mut singly) = (target(), target());
                    let landing =
                        |i: usize| Landing { from: slots[i], head: (i % kv_heads) as u32, to: (i / kv_heads) as u32 };
                    let landings: Vec<Landing> = (0..rows * kv_heads).map(landing).collect();
                    let mut to = KvRunsMut::new(&mut singly, staging, 0);
                    b.decode_kv_rows(&Stream(0), payload, &extents, &landings, &mut to).unwrap();
                    let from = StoredRuns::new(&extents, stored, payload, layer);
                    b.fetch_kv(&Stream(0), &from, &mut KvRunsMut::new(&mut whole, staging, 0), rows).unwrap();
                    let case = format!("{name} {payload:?} {dtype} {rows}x{kv_heads}x{d}");
                    assert!(contents(&b, &whole) == contents(&b, &singly), "{case}");
                }
            }
        }
    }
}

fn element(dtype: DType, bytes: &[u8]) -> f64 {
    match dtype {
        DType::F32 => f64::from(f32::from_le_bytes(bytes.try_into().unwrap())),
        DType::F16 => f16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
        _ => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
    }
}

fn contents(b: &CpuBackend, buffers: &[Buffer]) -> Vec<Vec<u8>> {
    let read = |buffer: &Buffer| {
        // An odd last byte belongs to no row.
        let mut bytes = vec![0; buffer.bytes() / 2 * 2];
        b.download(&Stream(0), buffer.rows(DType::F16, 1, buffer.bytes() / 2), &mut bytes).unwrap();
        bytes
    };
    buffers.iter().map(read).collect()
}

#[test]
fn two_landings_in_one_place_leave_either() {
    let geometry = KvGeometry { layers: 1, kv_heads: 1, head_dim: 64, extent_tokens: 100, dtype: DType::F32 };
    let b = backend(Level::detect(), 3);
    let x = buffer(&b, DType::F32, &[vec![1.0; 64], vec![2.0; 64]].concat());
    let x = || x.rows(DType::F32, 2, 64);
    let slots = [0, 1].map(|i| Slot { buffer: 0, offset: i * Payload::Int8.row_bytes(&geometry) });
    let mut stored = [b.allocate(1000, Place::Device, "a test").unwrap()];
    b.encode_kv(&Stream(0), x(), x(), Payload::Int8, &geometry, &slots, &mut stored).unwrap();
    let landings: Vec<Landing> = (0..1000).map(|i| Landing { from: slots[i % 2], head: 0, to: 5 }).collect();
    let mut target = [b.allocate(geometry.extent_bytes(), Place::Device, "a test").unwrap()];
    let mut runs = KvRunsMut::new(&mut target, geometry, 0);
    b.decode_kv_rows(&Stream(0), Payload::Int8, &stored, &landings, &mut runs).unwrap();
    let got = floats(&b, target[0].rows(DType::F32, 100, 128));
    assert!(
        got[5 * 128..6 * 128].iter().all(|x| (x - 2.0).abs() < 1e-6 || (x - 1.0).abs() < 1e-6),
        "neither of the two, or a mixture"
    );
}
