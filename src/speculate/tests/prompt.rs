use super::noise;
use crate::speculate::PromptBasis;

/// Heads side by side: `heads` of each of `n` rows, those of a KV head's group alike in where they are large.
fn rows(seed: u64, n: usize, heads: usize, d: usize, size: impl Fn(usize) -> f32) -> Vec<f32> {
    noise(seed, n * heads * d).iter().enumerate().map(|(i, x)| x * size(i % d)).collect()
}

fn entry(map: &[f32], d: usize, i: usize, j: usize) -> f64 {
    f64::from(map[i * d + j])
}

#[test]
fn projections_are_orthogonal_and_of_their_rank() {
    for (seed, d, group) in [(1, 8, 1), (2, 33, 3), (3, 64, 4)] {
        let mut basis = PromptBasis::new(d);
        // Two KV heads, of which this is the second, in two chunks.
        for (i, n) in [70, 55].into_iter().enumerate() {
            let seed = seed + 10 * i as u64;
            let uneven = |j: usize| 10f32.powf(-2.0 * j as f32 / d as f32);
            basis.add(&rows(seed, n, 2 * group, d, uneven), 2 * group * d, group..2 * group, false);
            basis.add(&rows(seed + 5, n, 2, d, |_| 1.0), 2 * d, 1..2, true);
        }
        for count in [1, d / 3, d] {
            let map = basis.projection(count).unwrap();
            let trace: f64 = (0..d).map(|i| entry(&map, d, i, i)).sum();
            assert!((trace - count as f64).abs() < 1e-4, "{d}, {count}: {trace}");
            for (i, j) in (0..d).flat_map(|i| (0..d).map(move |j| (i, j))) {
                let squared: f64 = (0..d).map(|k| entry(&map, d, i, k) * entry(&map, d, k, j)).sum();
                assert!((squared - entry(&map, d, i, j)).abs() < 1e-5, "{d}, {count}: not a projection");
                assert_eq!(map[i * d + j], map[j * d + i], "{d}, {count}");
                let same = if i == j { 1.0 } else { 0.0 };
                assert!(count < d || (entry(&map, d, i, j) - same).abs() < 1e-5, "all columns are the identity");
            }
        }
    }
}

/// Queries that lie in a few directions, and keys that are small elsewhere: those directions are chosen.
#[test]
fn columns_are_those_that_queries_and_keys_make_largest() {
    let (d, large) = (32, 5);
    let size = |j: usize| if j % 7 == 3 { 1.0 } else { 1e-3 };
    assert_eq!((0..d).filter(|&j| size(j) == 1.0).count(), large);
    let mut basis = PromptBasis::new(d);
    // (One direction is a little larger than the rest, so that it is a column by itself.)
    basis.add(&rows(4, 300, 1, d, |j| if j == 0 { 0.03 } else { size(j) }), d, 0..1, false);
    basis.add(&rows(5, 300, 1, d, size), d, 0..1, true);
    let map = basis.projection(large).unwrap();
    for i in 0..d {
        let want = if size(i) == 1.0 { 1.0 } else { 0.0 };
        assert!((entry(&map, d, i, i) - want).abs() < 1e-4, "{i}: {}", entry(&map, d, i, i));
    }
    // Keys count, too: where they are large, one of the five gives way to that direction.
    let keys = rows(6, 300, 1, d, |j| if j == 0 { 1e3 } else { 0.0 });
    basis.add(&keys, d, 0..1, true);
    let map = basis.projection(large).unwrap();
    let there = entry(&map, d, 0, 0);
    assert!(there > 0.9, "{there}");
}

#[test]
fn what_is_forgotten_leaves_no_trace() {
    let d = 16;
    let (queries, keys) = (rows(7, 40, 1, d, |_| 1.0), rows(8, 40, 1, d, |_| 1.0));
    let fill = |basis: &mut PromptBasis| {
        basis.add(&queries, d, 0..1, false);
        basis.add(&keys, d, 0..1, true);
        basis.projection(6).unwrap()
    };
    let (mut fresh, mut used) = (PromptBasis::new(d), PromptBasis::new(d));
    used.add(&keys, d, 0..1, false);
    used.forget();
    assert_eq!(fill(&mut fresh), fill(&mut used));
    used.add(&[f32::NAN; 16], d, 0..1, false);
    assert!(used.projection(6).unwrap_err().message().contains("prompt"));
}
