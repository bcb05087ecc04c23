//! The file against a table of what was appended, through every engine; and every way in which files fail.

use std::sync::atomic::{AtomicU8, Ordering};

use proptest::prelude::*;

use super::super::tests::{Checked, Random, backend, calls, geometries, payloads};
use super::io::Done;
use super::threads::Threads;
use super::*;
use crate::backend::DType;

/// So little memory that everything is written, read in pieces, merged and waited for.
const TIGHT: Tuning = Tuning { waiting: 0, piece: 8 << 10, ahead: 16 << 10 };

const GEOMETRY: KvGeometry = KvGeometry { layers: 2, kv_heads: 2, head_dim: 64, extent_tokens: 64, dtype: DType::F32 };

fn threads(file: &Arc<File>) -> Result<Box<dyn Io>> {
    Ok(Box::new(Threads::new(file)?))
}

/// An engine that starts nothing before somebody waits, and then the youngest first: whatever may happen while reads and
/// writes are under way does.
struct Late {
    inner: Box<dyn Io>,
    held: Vec<Request>,
}

fn late(file: &Arc<File>) -> Result<Box<dyn Io>> {
    Ok(Box::new(Late { inner: threads(file)?, held: Vec::new() }))
}

impl Io for Late {
    fn submit(&mut self, requests: Vec<Request>) -> std::io::Result<()> {
        self.held.extend(requests);
        Ok(())
    }

    fn reap(&mut self, wait: bool, done: &mut Vec<Done>) -> std::io::Result<()> {
        while wait && let Some(request) = self.held.pop() {
            self.inner.submit(vec![request])?;
            self.inner.reap(true, done)?;
        }
        Ok(())
    }

    fn drain(&mut self) -> bool {
        self.held.clear();
        self.inner.drain()
    }
}

fn checked(
    geometry: KvGeometry,
    payload: Payload,
    options: &FileOptions,
    tuning: Tuning,
    engine: impl FnOnce(&Arc<File>) -> Result<Box<dyn Io>>,
) -> Checked {
    let backend = backend();
    let store = FileStore::with_engine(Arc::clone(&backend), geometry, payload, options, 250, tuning, engine).unwrap();
    Checked::new(backend, Box::new(store), geometry, payload)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_file_holds_what_was_appended(
        calls in calls(), payload in payloads(), geometry in geometries(),
        buffered: bool, checksum: bool, engine in 0..3usize, tight: bool,
    ) {
        let options = FileOptions { buffered, checksum, ..FileOptions::default() };
        let tuning = if tight { TIGHT } else { TUNING };
        let engine = [io::engine, threads, late][engine];
        checked(geometry, payload, &options, tuning, engine).run(&calls, 250);
    }
}

/// What happens to completions from now on.
const NONE: u8 = 0;
const EIO: u8 = 1;
const ENOSPC: u8 = 2;
const SHORT: u8 = 3;
const SHORT_ONCE: u8 = 4;

/// An engine whose reads or writes fail on demand.
struct Faulty {
    inner: Box<dyn Io>,
    write: bool,
    fault: Arc<AtomicU8>,
}

impl Io for Faulty {
    fn submit(&mut self, requests: Vec<Request>) -> std::io::Result<()> {
        self.inner.submit(requests)
    }

    fn reap(&mut self, wait: bool, done: &mut Vec<Done>) -> std::io::Result<()> {
        self.inner.reap(wait, done)?;
        for (request, result) in done.iter_mut().filter(|(r, _)| r.write == self.write) {
            match self.fault.load(Ordering::SeqCst) {
                EIO => *result = Err(std::io::Error::from_raw_os_error(libc::EIO)),
                ENOSPC => *result = Err(std::io::Error::from_raw_os_error(libc::ENOSPC)),
                SHORT => *result = Ok(request.bytes / 2),
                SHORT_ONCE if request.tries == 0 => *result = Ok(request.bytes / 2),
                _ => {}
            }
        }
        Ok(())
    }

    fn drain(&mut self) -> bool {
        self.inner.drain()
    }
}

/// A store with entries of which most are in the file, and its switch.
fn failing(write: bool) -> (Checked, Arc<AtomicU8>) {
    let fault = Arc::new(AtomicU8::new(NONE));
    let switch = Arc::clone(&fault);
    let mut store = checked(GEOMETRY, Payload::Exact, &FileOptions::default(), TIGHT, |file| {
        Ok(Box::new(Faulty { inner: io::engine(file)?, write, fault: switch }))
    });
    let random = &mut Random(3);
    for layer in [0, 1] {
        store.append(random, layer, 100).unwrap();
    }
    fetch(&mut store).unwrap();
    (store, fault)
}

fn fetch(store: &mut Checked) -> Result<()> {
    for layer in [0, 1] {
        store.begin(&mut Random(5), layer, 1)?;
        store.finish(layer)?;
    }
    Ok(())
}

/// The store says why, with the file, and keeps saying so.
fn assert_unusable(store: &mut Checked, error: Error, words: &[&str]) {
    assert_eq!(error.code(), ErrorCode::Io, "{error}");
    let folder = std::env::temp_dir();
    for word in words.iter().copied().chain([folder.to_str().unwrap()]) {
        assert!(error.message().contains(word), "{word:?} is not in: {error}");
    }
    let again = store.append(&mut Random(1), 0, 1).unwrap_err();
    assert!(again.message().contains("unusable") && again.message().contains(error.message()), "{again}");
    assert!(fetch(store).is_err());
}

#[test]
fn failed_reads_make_the_store_unusable() {
    for (fault, words) in [(EIO, ["read", "os error 5"]), (SHORT, ["read", "were moved"])] {
        let (mut store, switch) = failing(false);
        switch.store(fault, Ordering::SeqCst);
        let error = fetch(&mut store).unwrap_err();
        assert_unusable(&mut store, error, &words);
    }
}

#[test]
fn failed_writes_make_the_store_unusable() {
    for (fault, words) in [(ENOSPC, ["write", "os error 28"]), (SHORT, ["write", "were moved"])] {
        let (mut store, switch) = failing(true);
        switch.store(fault, Ordering::SeqCst);
        let mut random = Random(9);
        let mut append = || store.append(&mut random, 0, 30);
        let error = (0..5).find_map(|_| append().err()).expect("150 rows do not fit the memory");
        assert_unusable(&mut store, error, &words);
    }
}

#[test]
fn a_request_that_stops_early_is_repeated() {
    for write in [false, true] {
        let (mut store, switch) = failing(write);
        switch.store(SHORT_ONCE, Ordering::SeqCst);
        store.append(&mut Random(9), 0, 100).unwrap();
        fetch(&mut store).unwrap();
    }
}

/// A named file in a folder of its own.
fn named(folder: &tempfile::TempDir) -> FileOptions {
    FileOptions { path: Some(folder.path().join("kv")), keep: true, ..FileOptions::default() }
}

#[test]
fn a_file_that_shrinks_is_noticed() {
    for buffered in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let options = FileOptions { buffered, ..named(&folder) };
        let mut store = checked(GEOMETRY, Payload::Exact, &options, TIGHT, io::engine);
        store.append(&mut Random(3), 0, 200).unwrap();
        fetch(&mut store).unwrap();
        let file = File::options().write(true).open(options.path.as_ref().unwrap()).unwrap();
        file.set_len(8192).unwrap();
        let error = fetch(&mut store).unwrap_err();
        assert_unusable(&mut store, error, &["read", "8192 bytes now"]);
    }
}

#[test]
fn a_checksum_finds_a_changed_byte() {
    use std::os::unix::fs::FileExt;
    for checksum in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let options = FileOptions { checksum, buffered: true, ..named(&folder) };
        let mut store = checked(GEOMETRY, Payload::Exact, &options, TIGHT, io::engine);
        store.append(&mut Random(3), 0, 200).unwrap();
        fetch(&mut store).unwrap();
        // The first block of the first run has long been written: it is the oldest.
        let file = File::options().write(true).open(options.path.as_ref().unwrap()).unwrap();
        file.write_all_at(&[1, 2, 3, 4], 1000).unwrap();
        if checksum {
            let error = fetch(&mut store).unwrap_err();
            assert_unusable(&mut store, error, &["checksums differ", "at 512"]);
        } else {
            // Nothing else notices: the test above would pass for another reason otherwise.
            let noticed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| fetch(&mut store)));
            assert!(noticed.is_err(), "the table must notice what the store cannot");
        }
    }
}

#[test]
fn a_path_that_exists_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let options = FileOptions { keep: false, ..named(&folder) };
    let path = options.path.clone().unwrap();
    std::fs::write(&path, "precious").unwrap();
    let error = FileStore::new(backend(), GEOMETRY, Payload::Exact, &options, 10).err().unwrap();
    assert_eq!(error.code(), ErrorCode::InvalidArgument);
    assert!(error.message().contains(path.to_str().unwrap()), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn the_file_is_unlinked_unless_it_is_to_be_kept() {
    for keep in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let options = FileOptions { keep, ..named(&folder) };
        let store = FileStore::new(backend(), GEOMETRY, Payload::Exact, &options, 250).unwrap();
        let length = std::fs::metadata(options.path.as_ref().unwrap()).map(|m| m.len()).ok();
        assert_eq!(length, keep.then_some(store.bytes().1 as u64));
    }
}

#[test]
fn more_than_a_disk_holds_is_a_capacity_error() {
    let folder = tempfile::tempdir().unwrap();
    let options = named(&folder);
    for rows in [1 << 40, usize::MAX / 2] {
        let error = FileStore::new(backend(), GEOMETRY, Payload::Exact, &options, rows).err().unwrap();
        assert_eq!(error.code(), ErrorCode::Capacity, "{error}");
        assert!(!options.path.as_ref().unwrap().exists(), "a file was left behind");
    }
    let missing = FileOptions { path: Some(folder.path().join("no/such/folder")), ..FileOptions::default() };
    let error = FileStore::new(backend(), GEOMETRY, Payload::Exact, &missing, 10).err().unwrap();
    assert_eq!(error.code(), ErrorCode::NotFound);
}

#[test]
fn a_limit_bounds_the_rows() {
    // 4 runs of blocks of 8 rows: 40 KiB hold two blocks of each.
    let options = FileOptions { limit: 40 << 10, ..FileOptions::default() };
    let mut store = FileStore::new(backend(), GEOMETRY, Payload::Exact, &options, 250).unwrap();
    assert_eq!((store.capacity(), store.bytes().1), (16, 32 << 10));
    store.reserve(16).unwrap();
    assert_eq!(store.reserve(17).unwrap_err().code(), ErrorCode::Capacity);
    let options = FileOptions { limit: 10 << 10, ..FileOptions::default() };
    let error = FileStore::new(backend(), GEOMETRY, Payload::Exact, &options, 250).err().unwrap();
    assert_eq!(error.code(), ErrorCode::Capacity);
}

#[test]
fn a_store_may_go_while_reads_are_under_way() {
    for engine in [io::engine, threads] {
        let mut store = checked(GEOMETRY, Payload::Exact, &FileOptions::default(), TIGHT, engine);
        for layer in [0, 1] {
            store.append(&mut Random(3), layer, 250).unwrap();
        }
        store.begin(&mut Random(3), 0, 1).unwrap();
        store.begin(&mut Random(3), 1, 3).unwrap();
    }
}

/// What a step has overwritten waits for the next step, and no longer.
#[test]
fn a_step_holds_back_its_own_blocks_only() {
    for engine in [io::engine, late] {
        let mut store = checked(GEOMETRY, Payload::Exact, &FileOptions::default(), TIGHT, engine);
        for layer in [0, 1] {
            store.append(&mut Random(3), layer, 240).unwrap();
        }
        for row in (0..240).step_by(2) {
            for layer in [0, 1] {
                store.begin_step();
                store.append_at(&mut Random(row.into()), layer, 1, Place::Rows(&[row; 2])).unwrap();
            }
        }
        let before = store.store.counters().host_bytes;
        fetch(&mut store).unwrap();
        // 480 rows were overwritten; 16 blocks of 8 rows may wait, beside those of the last steps.
        let waiting = (store.store.counters().host_bytes - before) / 512;
        assert!(waiting < 240, "{waiting} rows have not reached the file");
    }
}

/// Two layers of 200 rows, all of them in the file.
fn filed(options: &FileOptions, tuning: Tuning, engine: fn(&Arc<File>) -> Result<Box<dyn Io>>) -> Checked {
    let mut store = checked(GEOMETRY, Payload::Exact, options, tuning, engine);
    for layer in [0, 1] {
        store.append(&mut Random(3), layer, 200).unwrap();
    }
    let in_memory = |store: &mut Checked| {
        let before = store.store.counters().host_bytes;
        fetch(store).unwrap();
        store.store.counters().host_bytes > before
    };
    assert!((0..20).any(|_| !in_memory(&mut store)), "some rows never reach the file");
    store.begin_step();
    store
}

/// Overwrites rows of layer 0, the same ones in both KV heads.
fn overwrite(store: &mut Checked, rows: impl IntoIterator<Item = u32>) {
    for row in rows {
        store.append_at(&mut Random(row.into()), 0, 1, Place::Rows(&[row; 2])).unwrap();
    }
}

/// Blocks that a step has overwritten whole could be written at once, and then nothing would have the old rows any more.
#[test]
fn what_a_step_overwrites_is_not_written_before_the_next() {
    for engine in [io::engine, late] {
        let mut store = filed(&FileOptions::default(), TIGHT, engine);
        overwrite(&mut store, 0..32);
        store.undo().unwrap();
        for _ in 0..3 {
            fetch(&mut store).unwrap();
        }
    }
}

/// A block of which a step overwrites the one row that its page lacked is not whole any more when that is undone.
#[test]
fn an_undo_takes_a_row_from_a_whole_block() {
    // Room for 64 blocks: 16 whole ones are written.
    let tuning = Tuning { waiting: 256 << 10, ..TIGHT };
    for engine in [io::engine, late] {
        let mut store = filed(&FileOptions::default(), tuning, engine);
        overwrite(&mut store, 0..7);
        store.begin_step();
        overwrite(&mut store, [7]);
        store.undo().unwrap();
        store.begin_step();
        for layer in [0, 1] {
            store.append(&mut Random(4), layer, 48).unwrap();
        }
        fetch(&mut store).unwrap();
        fetch(&mut store).unwrap();
    }
}

/// What a step has overwritten twice becomes what it was before the first time.
#[test]
fn an_undo_goes_back_past_every_version() {
    for engine in [io::engine, late] {
        let mut store = filed(&FileOptions::default(), TIGHT, engine);
        for _ in 0..2 {
            store.append_at(&mut Random(1), 0, 1, Place::Rows(&[20, 21])).unwrap();
            store.append_at(&mut Random(2), 0, 1, Place::Rows(&[20, 21])).unwrap();
        }
        store.undo().unwrap();
        fetch(&mut store).unwrap();
    }
}

/// A row that comes while the rest of its block is being read can be undone before that has come.
#[test]
fn an_undo_may_find_its_block_being_read() {
    let mut store = filed(&FileOptions::default(), TIGHT, late);
    // One row in each of ten blocks: when the step is over, the oldest are merged with what the file has.
    overwrite(&mut store, [0, 8, 16, 24, 32]);
    store.begin_step();
    overwrite(&mut store, [40]);
    store.begin_step();
    overwrite(&mut store, [1]);
    store.undo().unwrap();
    fetch(&mut store).unwrap();
    fetch(&mut store).unwrap();
}

/// Blocks that an open fetch reads stay as they are until it is over: their checksums are those of when it began.
#[test]
fn what_a_fetch_reads_is_not_written_meanwhile() {
    let options = FileOptions { checksum: true, ..FileOptions::default() };
    let mut store = filed(&options, TIGHT, late);
    store.begin(&mut Random(5), 0, 1).unwrap();
    overwrite(&mut store, 0..16);
    store.begin_step();
    overwrite(&mut store, [100]);
    store.finish(0).unwrap();
    fetch(&mut store).unwrap();
}

#[test]
fn counters_say_what_was_moved() {
    let mut store = checked(GEOMETRY, Payload::Exact, &FileOptions::default(), TIGHT, io::engine);
    store.append(&mut Random(3), 0, 240).unwrap();
    store.begin(&mut Random(3), 0, 1).unwrap();
    store.finish(0).unwrap();
    let c = store.store.counters();
    assert_eq!(c.host_bytes + c.file_bytes, 2 * 240 * 512);
    assert!(c.file_bytes > 0 && c.file_read_bytes >= c.file_bytes, "{c:?}");
    assert!(c.read_seconds > 0.0 && c.wait_seconds <= c.read_seconds, "{c:?}");
}

/// Prints what reads cost: `cargo test --release --lib -- --ignored --nocapture throughput`.
#[test]
#[ignore = "prints measurements"]
fn throughput() {
    use crate::backend::Place as Memory;
    let geometry = KvGeometry { layers: 8, kv_heads: 4, head_dim: 64, extent_tokens: 256, dtype: DType::BF16 };
    let rows = 16 << 10;
    let backend = backend();
    let target = KvGeometry { layers: 1, ..geometry };
    let mut extents: Vec<_> = (0..target.extents(rows))
        .map(|_| backend.allocate(target.extent_bytes(), Memory::Device, "a test").unwrap())
        .collect();
    let cols = geometry.kv_heads * geometry.head_dim;
    let x = backend.allocate(512 * cols * 4, Memory::Device, "a test").unwrap();
    for (name, buffered, ring) in [
        ("io_uring, direct", false, true),
        ("io_uring, buffered", true, true),
        ("threads, direct", false, false),
        ("threads, buffered", true, false),
    ] {
        let options = FileOptions { buffered, ..FileOptions::default() };
        let engine = if ring { io::engine } else { threads };
        let mut store =
            FileStore::with_engine(Arc::clone(&backend), geometry, Payload::Exact, &options, rows, TUNING, engine)
                .unwrap();
        let start = Instant::now();
        for at in (0..rows).step_by(512) {
            for layer in 0..geometry.layers {
                let x = || x.rows(DType::F32, 512, cols);
                store.append(&*backend, &Stream(0), layer, x(), x(), Place::From(at)).unwrap();
            }
        }
        let written = (geometry.layers * geometry.kv_heads * rows * geometry.row_bytes()) as f64;
        println!(
            "{name} (direct: {}): append {:.2} GB/s",
            store.direct(),
            written / start.elapsed().as_secs_f64() / 1e9
        );
        let mut random = Random(11);
        let mut fetch = |store: &mut FileStore, layer: usize, moves: &[Move]| {
            store.begin_fetch(layer, moves).unwrap();
            let mut runs = KvRunsMut::new(&mut extents, target, 0);
            store.finish_fetch(&*backend, &Stream(0), layer, &mut runs).unwrap();
        };
        for per_head in [15, 60] {
            let before = store.counters();
            let start = Instant::now();
            let rounds = 400;
            for i in 0..rounds {
                let mut moves = Vec::new();
                for head in 0..geometry.kv_heads as u32 {
                    let mut rows: Vec<u32> = (0..per_head).map(|_| random.below(rows / 2) as u32).collect();
                    rows.sort_unstable();
                    moves.extend(rows.iter().zip(0..).map(|(&from, to)| Move { head, from, to }));
                }
                fetch(&mut store, i % geometry.layers, &moves);
            }
            let us = start.elapsed().as_secs_f64() * 1e6 / rounds as f64;
            let read = (store.counters().file_read_bytes - before.file_read_bytes) / rounds as u64;
            println!("  {per_head} random rows of 4 heads: {us:.0} us a fetch, {} KiB read", read >> 10);
        }
        let moves: Vec<Move> = (0..geometry.kv_heads as u32)
            .flat_map(|head| (0..rows as u32).map(move |row| Move { head, from: row, to: row }))
            .collect();
        let start = Instant::now();
        for layer in 0..geometry.layers {
            fetch(&mut store, layer, &moves);
        }
        println!("  whole layers: {:.2} GB/s", written / start.elapsed().as_secs_f64() / 1e9);
    }
}
