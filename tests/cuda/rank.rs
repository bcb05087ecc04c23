//! The best columns of rows of scores, against a full sort.

use kvahead::backend::DType;

use crate::rig::*;

#[test]
fn the_best_columns_are_those_of_a_full_sort() {
    with_both(|cuda, cpu| {
        let mut random = Random(99);
        for (rows, columns, wanted) in
            [(1, 1, 1), (3, 5, 2), (2, 1024, 1024), (5, 1025, 300), (4, 3001, 1), (32, 8192, 1707), (3, 70_001, 9000)]
        {
            for kind in 0..3 {
                let stride = columns + 3;
                let scores: Vec<f32> = (0..rows * stride)
                    .map(|_| match (kind, random.below(40)) {
                        (1, _) => random.below(7) as f32 - 3.0, // many equals
                        (2, at @ 0..6) => [f32::NAN, -f32::NAN, 0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY][at],
                        (0, _) => random.normal().abs() * 0.01,
                        _ => random.normal(),
                    })
                    .collect();
                let [got, want] = [cuda, cpu].map(|rig| {
                    let given = rig.buffer(DType::F32, &scores);
                    let mut out = rig.buffer(DType::U32, &vec![7e6; rows * (wanted + 1)]);
                    let given = given.rows(DType::F32, rows, stride).col_range(2, columns);
                    let to = out.rows_mut(DType::U32, rows, wanted + 1).col_range(1, wanted);
                    rig.b.rank(&rig.stream, given, to).unwrap();
                    let bytes = rig.bytes(&out);
                    bytes.as_chunks().0.iter().map(|b| u32::from_ne_bytes(*b)).collect::<Vec<_>>()
                });
                for row in 0..rows {
                    let own = &scores[row * stride + 2..][..columns];
                    let mut sorted: Vec<u32> = (0..columns as u32).collect();
                    sorted.sort_by(|&a, &b| own[b as usize].total_cmp(&own[a as usize]).then(a.cmp(&b)));
                    for (what, of) in [("CUDA", &got), ("CPU", &want)] {
                        let case = format!("{what}, {rows} rows of {columns} columns, {wanted} wanted, {kind}");
                        let of = &of[row * (wanted + 1)..][..wanted + 1];
                        assert_eq!(of[0], 7_000_000, "{case}: row {row} is written outside");
                        assert!(of[1..] == sorted[..wanted], "{case}: row {row}");
                    }
                }
            }
        }
    });
}
