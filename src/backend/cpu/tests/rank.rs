//! The best columns of rows of scores.

use super::*;

#[test]
fn the_best_columns_come_in_order_whatever_the_threads() {
    let mut random = Random(12);
    for (rows, columns, wanted) in [(1, 1, 1), (4, 300, 299), (7, 1000, 31)] {
        let scores: Vec<f32> = (0..rows * columns)
            .map(|_| match random.below(9) {
                0 => f32::NAN,
                1 => -0.0,
                2 => random.below(3) as f32,
                _ => random.normal(),
            })
            .collect();
        for threads in [1, 3] {
            let cpu = backend(Level::Scalar, threads);
            let bytes: Vec<u8> = scores.iter().flat_map(|x| x.to_ne_bytes()).collect();
            let mut given = cpu.allocate(bytes.len(), Place::Device, "a test").unwrap();
            cpu.upload(&Stream(0), &bytes, &mut given, 0).unwrap();
            let mut out = cpu.allocate(4 * rows * wanted, Place::Device, "a test").unwrap();
            let given = given.rows(DType::F32, rows, columns);
            cpu.rank(&Stream(0), given, out.rows_mut(DType::U32, rows, wanted)).unwrap();
            let mut bytes = vec![0; 4 * rows * wanted];
            cpu.download(&Stream(0), out.rows(DType::U32, rows, wanted), &mut bytes).unwrap();
            let got: Vec<u32> = bytes.as_chunks().0.iter().map(|b| u32::from_ne_bytes(*b)).collect();
            for (row, got) in got.chunks_exact(wanted).enumerate() {
                let own = &scores[row * columns..][..columns];
                let mut sorted: Vec<u32> = (0..columns as u32).collect();
                sorted.sort_by(|&a, &b| own[b as usize].total_cmp(&own[a as usize]).then(a.cmp(&b)));
                assert!(got == &sorted[..wanted], "{rows} rows of {columns}, row {row}, {threads} threads");
            }
        }
    }
}
