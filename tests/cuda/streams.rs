//! Copies, memory, streams, events, and steps that are replayed.

use kvahead::ErrorCode;
use kvahead::backend::{
    Activation, Buffer, DType, KvGeometry, KvRunsMut, Norm, NormKind, Payload, Place, Shape, StoredRuns, Stream, Timed,
    Timing,
};

use crate::rig::*;

#[test]
fn copies_go_there_and_back() {
    with_both(|cuda, _| {
        let mut random = Random(6);
        for n in [1, 12, 5000, 3 << 20] {
            let x = random.normals(n);
            let data = cuda.buffer(DType::F32, &x);
            assert_same("whole", &cuda.floats(data.rows(DType::F32, 1, n)), &x);
        }
        let x: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let data = cuda.buffer(DType::F32, &x);
        let window = data.rows(DType::F32, 3, 4).col_range(1, 2).row_range(1, 2);
        assert_eq!(cuda.floats(window), [5., 6., 9., 10.]);
        // Odd sizes and places.
        let mut bytes = cuda.b.allocate(38, Place::Device, "a test").unwrap();
        cuda.b.upload(&cuda.stream, &[1, 2, 3], &mut bytes, 1).unwrap();
        assert_eq!(cuda.bytes(&bytes)[..6], [0, 1, 2, 3, 0, 0]);
    });
}

#[test]
fn memory_is_zeroed_and_its_end_is_an_error() {
    with_both(|cuda, _| {
        for place in [Place::Device, Place::Pinned] {
            for bytes in [0, 2, 100, 4 << 20] {
                let buffer = cuda.b.allocate(bytes, place, "a test").unwrap();
                assert!(bytes == 0 || cuda.bytes(&buffer).iter().all(|&byte| byte == 0));
            }
        }
        let error = cuda.b.allocate(1 << 46, Place::Device, "the moon").unwrap_err();
        assert_eq!(error.code(), ErrorCode::OutOfMemory);
        assert!(error.message().contains("the moon"), "{error}");
    });
}

#[test]
fn events_order_streams() {
    with_both(|cuda, _| {
        let b = cuda.b;
        let (first, second) = (b.stream().unwrap(), b.stream().unwrap());
        let n = 1 << 22;
        let mut random = Random(7);
        for round in 0..if brief() { 4 } else { 40 } {
            // A chain of slow operations on one stream, whose result the other takes.
            let x: Vec<f32> = random.normals(n).iter().map(|x| x.abs()).collect();
            let data = cuda.buffer(DType::F32, &x);
            b.synchronize(&cuda.stream).unwrap();
            let (mut one, mut two) = (cuda.poisoned(n), cuda.poisoned(n));
            b.synchronize(&cuda.stream).unwrap();
            let shape = (1 << 11, 1 << 11);
            let rows = data.rows(DType::F32, shape.0, shape.1);
            b.activate(&first, rows, Activation::Relu, one.rows_mut(DType::F32, shape.0, shape.1)).unwrap();
            let event = b.record(&first).unwrap();
            b.wait(&second, &event).unwrap();
            let rows = one.rows(DType::F32, shape.0, shape.1);
            b.activate(&second, rows, Activation::Relu, two.rows_mut(DType::F32, shape.0, shape.1)).unwrap();
            let mut bytes = vec![0; 4 * n];
            b.download(&second, two.rows(DType::F32, 1, n), &mut bytes).unwrap();
            let got: Vec<f32> = bytes.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect();
            assert_same(&format!("round {round}"), &got, &x);
        }
    });
}

/// The same sequence of operations on other data, often: from the third time on it is replayed, with the same bits.
#[test]
fn replayed_steps_equal_launched_ones() {
    let Some(backend) = cuda() else { return };
    let rig = Rig::new(&backend);
    let mut random = Random(8);
    let weight = rig.linear(DType::F32, 64, &random.normals(64 * 64), None);
    let mut x = rig.b.allocate(64 * 4, Place::Device, "a test").unwrap();
    let mut y = rig.poisoned(64);
    let mut step = |values: &[f32], launches: usize| -> Vec<f32> {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        rig.b.upload(&rig.stream, &bytes, &mut x, 0).unwrap();
        for _ in 0..launches {
            let to = y.rows_mut(DType::F32, 1, 64);
            rig.b.matmul(&rig.stream, x.rows(DType::F32, 1, 64), &weight, false, Shape::Decode, to).unwrap();
        }
        rig.floats(y.rows(DType::F32, 1, 64))
    };
    for round in 0..6 {
        let values = random.normals(64);
        // Too short to be worth a graph, so launched one by one.
        let want = step(&values, 1);
        let before = backend.replays();
        assert_same(&format!("round {round}"), &step(&values, 100), &want);
        // The first launches go ahead, and the others follow: two graphs.
        assert_eq!(backend.replays() - before, 2 * u64::from(round > 0), "round {round}");
    }
}

/// A chain in which each launch reads what the one before it writes, and norms read weights that come in the midst of it. Replayed,
/// on devices that can, launches begin while the one before them still runs.
#[test]
fn launches_that_begin_early_wait() {
    let Some(backend) = cuda() else { return };
    let rig = Rig::new(&backend);
    let b = rig.b;
    let mut random = Random(10);
    let (rows, n) = (3, 2056);
    let weights: Vec<f32> = random.normals(n * n).iter().map(|x| x / (n as f32).sqrt()).collect();
    // On tensor cores, and not.
    let products = [rig.linear(DType::BF16, n, &weights, None), rig.linear(DType::F32, n, &weights, None)];
    let mut norm = Norm { kind: NormKind::Rms, epsilon: 1e-5, weight: rig.vector(&vec![1.0; n]), bias: None };
    let (mut x, mut y) = (rig.poisoned(rows * n), rig.poisoned(rows * n));
    let mut chain = |values: &[f32], scales: &[Vec<f32>], one_by_one: bool| -> Vec<f32> {
        let bytes = |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|x| x.to_le_bytes()).collect() };
        b.upload(&rig.stream, &bytes(values), &mut x, 0).unwrap();
        let wait = || {
            if one_by_one {
                b.synchronize(&rig.stream).unwrap()
            }
        };
        for (i, scale) in scales.iter().enumerate() {
            let to = y.rows_mut(DType::F32, rows, n);
            b.matmul(&rig.stream, x.rows(DType::F32, rows, n), &products[i % 2], false, Shape::Decode, to).unwrap();
            wait();
            b.upload(&rig.stream, &bytes(scale), &mut norm.weight.data, 0).unwrap();
            wait();
            b.norm(&rig.stream, y.rows(DType::F32, rows, n), &norm, x.rows_mut(DType::F32, rows, n)).unwrap();
            wait();
            b.activate(&rig.stream, x.rows(DType::F32, rows, n), Activation::GeluTanh, y.rows_mut(DType::F32, rows, n))
                .unwrap();
            wait();
            let to = x.rows_mut(DType::F32, rows, n);
            b.matmul(&rig.stream, y.rows(DType::F32, rows, n), &products[1 - i % 2], true, Shape::Decode, to).unwrap();
            wait();
        }
        rig.floats(x.rows(DType::F32, rows, n))
    };
    for round in 0..12 {
        let values = random.normals(rows * n);
        let scales: Vec<Vec<f32>> = (0..10).map(|_| random.normals(n)).collect();
        let want = chain(&values, &scales, true);
        assert!(want.iter().all(|x| x.is_finite()));
        let before = backend.replays();
        assert_same(&format!("round {round}"), &chain(&values, &scales, false), &want);
        assert_eq!(backend.replays() - before, u64::from(round > 0), "round {round}");
    }
}

/// A chain of products that alternates between a stream and two beside it, launched one by one and replayed.
#[test]
fn side_streams_are_ordered_by_events() {
    let Some(backend) = cuda() else { return };
    let rig = Rig::new(&backend);
    let b = rig.b;
    let beside = [b.side_stream(&rig.stream).unwrap(), b.side_stream(&rig.stream).unwrap()];
    assert!(b.side_stream(&rig.stream).is_err(), "a third side stream");
    let mut random = Random(9);
    let n = 1 << 10;
    let weight = rig.linear(DType::F32, n, &random.normals(n * n).iter().map(|x| x / 40.0).collect::<Vec<_>>(), None);
    let mut rows: Vec<_> = (0..2).map(|_| rig.poisoned(4 * n)).collect();
    let mut chain = |x: &[f32], streams: &[&Stream]| -> Vec<f32> {
        let bytes: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
        b.upload(&rig.stream, &bytes, &mut rows[0], 0).unwrap();
        let mut before = &rig.stream;
        for i in 0..40 {
            let stream = streams[i % streams.len()];
            let event = b.record(before).unwrap();
            b.wait(stream, &event).unwrap();
            let [first, second] = &mut rows[..] else { unreachable!("two buffers") };
            let (from, to) = if i % 2 == 0 { (first, second) } else { (second, first) };
            let to = to.rows_mut(DType::F32, 4, n);
            b.matmul(stream, from.rows(DType::F32, 4, n), &weight, false, Shape::Decode, to).unwrap();
            before = stream;
        }
        let event = b.record(before).unwrap();
        b.wait(&rig.stream, &event).unwrap();
        rig.floats(rows[0].rows(DType::F32, 4, n))
    };
    for round in 0..6 {
        let x = random.normals(4 * n);
        let want = chain(&x, &[&rig.stream]);
        let before = backend.replays();
        let got = chain(&x, &[&rig.stream, &beside[0], &beside[1], &beside[0]]);
        assert_same(&format!("round {round}"), &got, &want);
        assert_eq!(backend.replays() - before, u64::from(round > 0), "round {round}");
    }
}

/// What is measured: the operations that were asked for, in their order, whether they are launched one by one or replayed.
#[test]
fn operations_are_measured() {
    let Some(backend) = cuda() else { return };
    let rig = Rig::new(&backend);
    let (b, beside) = (rig.b, rig.b.side_stream(&rig.stream).unwrap());
    let geometry = KvGeometry { layers: 1, kv_heads: 2, head_dim: 64, extent_tokens: 256, dtype: DType::F16 };
    let extents = |place| vec![b.allocate(geometry.extent_bytes(), place, "a test").unwrap()];
    let (host, near, mut to) = (extents(Place::Pinned), extents(Place::Device), extents(Place::Device));
    let mut random = Random(14);
    let weight = rig.linear(DType::F32, 64, &random.normals(64 * 64), None);
    let x = rig.buffer(DType::F32, &random.normals(64));
    let mut y = rig.poisoned(64);
    // Products on the stream; beside it a fetch from the host after the third, and one that crosses no link.
    let mut step = || {
        for i in 0..30 {
            let out = y.rows_mut(DType::F32, 1, 64);
            b.matmul(&rig.stream, x.rows(DType::F32, 1, 64), &weight, false, Shape::Decode, out).unwrap();
            if i == 2 {
                b.wait(&beside, &b.record(&rig.stream).unwrap()).unwrap();
                for from in [&host, &near] {
                    let from = StoredRuns::new(from, geometry, Payload::Exact, 0);
                    b.fetch_kv(&beside, &from, &mut KvRunsMut::new(&mut to, geometry, 0), 250).unwrap();
                    // What comes next joins no launch.
                    b.record(&beside).unwrap();
                    b.wait(&rig.stream, &b.record(&beside).unwrap()).unwrap();
                    let out = y.rows_mut(DType::F32, 1, 64);
                    b.matmul(&rig.stream, x.rows(DType::F32, 1, 64), &weight, false, Shape::Decode, out).unwrap();
                }
            }
        }
        b.synchronize(&rig.stream).unwrap();
        b.take_timed(&rig.stream).unwrap()
    };
    for timing in [Timing::Off, Timing::Operations, Timing::Fetches, Timing::Off, Timing::Operations] {
        b.set_timing(&rig.stream, timing).unwrap();
        for round in 0..5 {
            let before = backend.replays();
            let timed = step();
            let case = format!("{timing:?}, round {round}, {} replayed", backend.replays() - before);
            let fetches: Vec<&Timed> = timed.iter().filter(|t| t.fetches).collect();
            match timing {
                Timing::Off => assert!(timed.is_empty(), "{case}"),
                Timing::Fetches => assert_eq!((timed.len(), fetches.len()), (1, 1), "{case}"),
                Timing::Operations => assert_eq!((timed.len(), fetches.len()), (34, 1), "{case}"),
            }
            assert!(timed.iter().all(|t| 0.0 <= t.begin && t.begin <= t.end && t.end < 60.0), "{case}: {timed:?}");
            for t in &fetches {
                assert_eq!((t.name, t.stream), ("fetch_exact", 1), "{case}");
            }
            let main: Vec<&Timed> = timed.iter().filter(|t| t.stream == 0).collect();
            assert!(main.windows(2).all(|w| w[0].end <= w[1].begin), "{case}: operations of a stream overlap");
            if let (Timing::Operations, [fetch]) = (timing, &fetches[..]) {
                // An operation waits for another, not for the event behind it.
                assert!(main[2].begin <= fetch.begin && fetch.begin <= main[3].begin, "{case}: {fetch:?}");
            }
        }
    }
    assert!(backend.replays() > 12, "{} of 25 steps were replayed", backend.replays());
}

/// What a side stream does by itself, outside any script, comes behind its operations that were replayed.
#[test]
fn copies_of_a_side_stream_come_behind_what_it_replayed() {
    let Some(backend) = cuda() else { return };
    let rig = Rig::new(&backend);
    let (b, beside) = (rig.b, rig.b.side_stream(&rig.stream).unwrap());
    let (rows, n) = (8, 1 << 10);
    let mut random = Random(10);
    let weight = rig.linear(DType::F32, n, &random.normals(n * n).iter().map(|x| x / 40.0).collect::<Vec<_>>(), None);
    let (mut from, mut to, mut other) = (rig.poisoned(rows * n), rig.poisoned(rows * n), rig.poisoned(n));
    // Too large to travel with other operations.
    let upload = |stream: &Stream, x: &[f32], to: &mut Buffer| {
        let bytes: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
        b.upload(stream, &bytes, to, 0).unwrap();
    };
    let product = |stream: &Stream, from: &Buffer, rows: usize, to: &mut Buffer| {
        let to = to.rows_mut(DType::F32, rows, n);
        b.matmul(stream, from.rows(DType::F32, rows, n), &weight, false, Shape::Decode, to).unwrap();
    };
    for round in 0..4 {
        let (old, new) = (random.normals(rows * n), random.normals(rows * n));
        upload(&rig.stream, &old, &mut from);
        b.synchronize(&rig.stream).unwrap();
        let before = backend.replays();
        // As many as go ahead, and one more, of the main stream, behind which they are launched.
        (0..64).for_each(|_| product(&beside, &from, rows, &mut to));
        product(&rig.stream, &from, 1, &mut other);
        upload(&beside, &new, &mut from);
        b.synchronize(&beside).unwrap();
        assert_eq!(backend.replays() - before, u64::from(round > 0), "round {round}");
        let got = rig.floats(to.rows(DType::F32, rows, n));
        assert_same("what was uploaded", &rig.floats(from.rows(DType::F32, rows, n)), &new);
        let old = rig.buffer(DType::F32, &old);
        product(&rig.stream, &old, rows, &mut to);
        assert_same(&format!("round {round}"), &got, &rig.floats(to.rows(DType::F32, rows, n)));
    }
}
