//! Weights in blocks against the same weights as elements of bf16: every operation gives the same bits.

use super::*;
use crate::backend::{Blocks, Shape};

const KINDS: [Blocks; 3] = [Blocks::Q4_0, Blocks::Q4_1, Blocks::Q8_0];

/// Scales at the ends of f16: zeros, the smallest and largest numbers, of both signs.
const EXTREMES: [u16; 10] = [0x0000, 0x8000, 0x0001, 0x8001, 0x03ff, 0x0400, 0x7bff, 0xfbff, 0x3c00, 0xbc01];

/// A matrix as a file has it, and as it is in memory: in blocks, and in bf16.
struct Matrix {
    file: Vec<u8>,
    blocks: Linear,
    elements: Linear,
}

fn half(random: &mut Random) -> [u8; 2] {
    match random.below(4) {
        0 => EXTREMES[random.below(EXTREMES.len())].to_le_bytes(),
        _ => f16::from_f32(random.normal()).to_le_bytes(),
    }
}

/// The values of one block of a file, from the definition of its encoding, in f64: exact before they are rounded.
fn values(blocks: Blocks, block: &[u8]) -> Vec<f32> {
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f64();
    let nibble = |from: usize, i: usize| f64::from(block[from + i % 16] >> (4 * (i / 16)) & 15);
    let value = |i: usize| match blocks {
        Blocks::Q4_0 => half(0) * (nibble(2, i) - 8.0),
        Blocks::Q4_1 => half(0) * nibble(4, i) + half(2),
        Blocks::Q8_0 => half(0) * f64::from(block[2 + i] as i8),
    };
    (0..32).map(|i| bf16::from_f32(value(i) as f32).to_f32() + 0.0).collect()
}

fn matrix(b: &CpuBackend, kind: Blocks, outputs: usize, inputs: usize, bias: bool, random: &mut Random) -> Matrix {
    let mut file = Vec::new();
    for _ in 0..outputs * inputs / 32 {
        let scales = if kind == Blocks::Q4_1 { 2 } else { 1 };
        let start = file.len();
        (0..scales).for_each(|_| file.extend(half(random)));
        file.resize_with(start + kind.block_bytes(), || random.next() as u8);
    }
    let elements: Vec<f32> = file.chunks_exact(kind.block_bytes()).flat_map(|block| values(kind, block)).collect();
    let bias = bias.then(|| random.normals(outputs));
    let mut tiles = vec![0xaa; kind.bytes(outputs, inputs)];
    kind.tile(&file, inputs, &mut tiles);
    let mut data = b.allocate(tiles.len(), Place::Device, "a test").unwrap();
    b.upload(&Stream(0), &tiles, &mut data, 0).unwrap();
    let elements = linear(b, DType::BF16, outputs, &elements, bias.as_deref());
    let bias = bias.as_deref().map(|bias| vector(b, bias));
    let blocks = Linear { outputs, inputs, dtype: DType::BF16, blocks: Some(kind), data, bias };
    Matrix { file, blocks, elements }
}

#[test]
fn products_have_the_same_bits() {
    let mut random = Random(21);
    for (name, b) in backends() {
        for kind in KINDS {
            for (outputs, inputs) in [(1, 32), (3, 64), (4, 96), (37, 160), (66, 1056)] {
                let weight = matrix(&b, kind, outputs, inputs, outputs % 2 == 1, &mut random);
                for rows in 1..=5 {
                    let x = buffer(&b, DType::F32, &random.normals(rows * inputs));
                    let before = random.normals(rows * outputs);
                    for (shape, accumulate) in [(Shape::Decode, false), (Shape::Decode, true), (Shape::Prefill, true)] {
                        let run = |weight: &Linear| {
                            let mut out = buffer(&b, DType::F32, &before);
                            let (x, to) = (x.rows(DType::F32, rows, inputs), out.rows_mut(DType::F32, rows, outputs));
                            b.matmul(&Stream(0), x, weight, accumulate, shape, to).unwrap();
                            floats(&b, out.rows(DType::F32, rows, outputs))
                        };
                        let case = format!("{name} {kind} {shape:?} {rows} x {outputs} x {inputs}");
                        let want = run(&weight.elements);
                        assert!(want.iter().all(|y| y.is_finite()), "{case}");
                        assert_same(&case, &run(&weight.blocks), &want);
                    }
                }
            }
        }
    }
}

#[test]
fn rows_are_read_as_their_values() {
    let mut random = Random(22);
    for (name, b) in backends() {
        for kind in KINDS {
            for (rows, cols, count) in [(5, 32, 3), (50, 288, 70), (7, 608, 100)] {
                let table = matrix(&b, kind, rows, cols, false, &mut random);
                let case = format!("{name} {kind} {rows} x {cols}");

                let ids: Vec<f32> = (0..count).map(|_| random.below(rows) as f32).collect();
                let ids = buffer(&b, DType::U32, &ids);
                let before = random.normals(count * cols);
                for accumulate in [false, true] {
                    let run = |table: &Linear| {
                        let mut out = buffer(&b, DType::F32, &before);
                        let to = out.rows_mut(DType::F32, count, cols);
                        b.embed(&Stream(0), table, ids.rows(DType::U32, count, 1), accumulate, to).unwrap();
                        floats(&b, out.rows(DType::F32, count, cols))
                    };
                    assert_same(&case, &run(&table.blocks), &run(&table.elements));
                }

                let from = random.below(rows);
                let read = |table: &Linear| {
                    let mut bytes = vec![0; (rows - from) * cols * 2];
                    b.download_weight(&Stream(0), table, from..rows, &mut bytes).unwrap();
                    bytes
                };
                assert_eq!(read(&table.blocks), read(&table.elements), "{case}");
            }
        }
    }
}

/// A scale that is not finite is found in whichever block it is; any bits of an element are fine.
#[test]
fn scales_must_be_finite() {
    let mut random = Random(23);
    let b = backend(Level::Scalar, 1);
    for kind in KINDS {
        let file = matrix(&b, kind, 3, 64, false, &mut random).file;
        assert!(kind.all_finite(&file), "{kind}");
        for block in 0..6 {
            for at in if kind == Blocks::Q4_1 { &[0, 2][..] } else { &[0][..] } {
                for bad in [0x7c00u16, 0xfc00, 0x7e00, 0xffff] {
                    let mut file = file.clone();
                    file[block * kind.block_bytes() + at..][..2].copy_from_slice(&bad.to_le_bytes());
                    assert!(!kind.all_finite(&file), "{kind} {block} {at} {bad:x}");
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "blocks are not elements")]
fn blocks_are_no_rows_of_elements() {
    let b = backend(Level::Scalar, 1);
    matrix(&b, Blocks::Q8_0, 1, 32, false, &mut Random(24)).blocks.rows();
}
