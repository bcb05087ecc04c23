//! The threads of a backend: N − 1 workers and the calling thread work through one operation together.
//!
//! A decode step is hundreds of operations of 10–100 µs, so what counts is how fast a region of parallel work begins
//! and ends: workers spin for [`SPIN`] after each region, and sleep only when no next one has come by then. One region
//! runs at a time; further callers queue on a lock.
//!
//! Which thread computes which item never changes the item's bits (kernels fix their order of accumulation by the
//! shape alone), so a thread that has finished its own share may take over pieces of a slower one's.

use crate::{Error, ErrorCode, Result};
use parking_lot::{Condvar, Mutex};
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread waits awake before it sleeps.
const SPIN: Duration = Duration::from_micros(40);

/// On a cache line pair of its own, so that threads do not slow each other by writing neighbours.
#[repr(align(128))]
struct Alone<T>(T);

/// The body of a region; gets the thread's index.
type Body<'a> = dyn Fn(usize) + Sync + 'a;

/// A pool of threads. Dropping it joins them.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held by the caller whose region runs.
    turn: Mutex<()>,
    /// Next item of each thread's share in [`Pool::split`].
    cursors: Box<[Alone<AtomicUsize>]>,
}

struct Shared {
    /// Counts regions; a change is the signal to begin.
    epoch: Alone<AtomicUsize>,
    /// Workers that have not finished the region yet.
    pending: Alone<AtomicUsize>,
    /// The region's body, with its lifetime erased. Written before `epoch` changes, while no worker is in a region.
    body: UnsafeCell<Option<&'static Body<'static>>>,
    /// First panic of a worker in this region.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
    /// Guards the two condition variables.
    sleep: Mutex<()>,
    /// For workers: a region has begun.
    begun: Condvar,
    sleepers: AtomicUsize,
    /// For the caller: `pending` has become zero.
    ended: Condvar,
    caller_sleeps: AtomicBool,
}

// SAFETY: `body` is the only field that is not Sync by itself. It is written by the caller that holds `turn` while
// `pending` is zero, and read by workers after they saw `epoch` change (acquire), until they decrement `pending`.
unsafe impl Sync for Shared {}
// SAFETY: as above; the body it refers to is Sync.
unsafe impl Send for Shared {}

thread_local! {
    /// Whether this thread is inside a region, where a further one would wait for itself.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

impl Pool {
    /// A pool of `threads` threads, the caller's included.
    pub(super) fn new(threads: usize) -> Result<Pool> {
        assert!(threads > 0);
        let shared = Arc::new(Shared {
            epoch: Alone(AtomicUsize::new(0)),
            pending: Alone(AtomicUsize::new(0)),
            body: UnsafeCell::new(None),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
            sleep: Mutex::new(()),
            begun: Condvar::new(),
            sleepers: AtomicUsize::new(0),
            ended: Condvar::new(),
            caller_sleeps: AtomicBool::new(false),
        });
        let cursors = (0..threads).map(|_| Alone(AtomicUsize::new(0))).collect();
        let mut pool = Pool { shared, workers: Vec::new(), turn: Mutex::new(()), cursors };
        for index in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let spawned =
                std::thread::Builder::new().name(format!("kvahead-{index}")).spawn(move || shared.work(index));
            // On failure the drop of `pool` joins those that did start.
            pool.workers.push(spawned.map_err(|e| {
                Error::new(ErrorCode::OutOfMemory, format!("cannot start thread {index} of {threads}: {e}"))
            })?);
        }
        Ok(pool)
    }

    /// Number of threads, the caller's included.
    pub(super) fn threads(&self) -> usize {
        self.cursors.len()
    }

    /// Calls `body(range)` for ranges of at most `grain` items that together cover `0..items` once. A range of
    /// neighbouring items stays with one thread as long as all threads keep pace. Runs on the calling thread alone
    /// when all items fit one grain.
    pub(super) fn split(&self, items: usize, grain: usize, body: &(dyn Fn(Range<usize>) + Sync)) {
        self.split_indexed(items, grain, &|_, range| body(range));
    }

    /// As [`Pool::split`]; `body` gets the index of its thread too, for scratch memory of its own.
    pub(super) fn split_indexed(&self, items: usize, grain: usize, body: &(dyn Fn(usize, Range<usize>) + Sync)) {
        self.split_beside(items, grain, &mut || {}, body);
    }

    /// As [`Pool::split_indexed`], with `beside` done once: by the last thread, whose items the others begin meanwhile when
    /// they have done theirs, or before all items by the calling one, where it is alone. What `beside` itself splits runs on
    /// its thread.
    pub(super) fn split_beside(
        &self,
        items: usize,
        grain: usize,
        beside: &mut (dyn FnMut() + Send),
        body: &(dyn Fn(usize, Range<usize>) + Sync),
    ) {
        let grain = grain.max(1);
        let threads = self.threads();
        if threads == 1 || items <= grain || INSIDE.get() {
            beside();
            if items > 0 {
                body(0, 0..items);
            }
            return;
        }
        let share = |thread: usize| {
            let grains = items.div_ceil(grain);
            let bound = |t: usize| (grains * t / threads * grain).min(items);
            bound(thread)..bound(thread + 1)
        };
        let _turn = self.turn.lock();
        for (thread, cursor) in self.cursors.iter().enumerate() {
            cursor.0.store(share(thread).start, Ordering::Relaxed); // published by the region's start
        }
        let beside = Mutex::new(beside);
        self.region(&|thread| {
            if thread == threads - 1 {
                beside.lock()();
            }
            for step in 0..threads {
                let victim = (thread + step) % threads;
                let end = share(victim).end;
                loop {
                    let start = self.cursors[victim].0.fetch_add(grain, Ordering::Relaxed);
                    if start >= end {
                        break;
                    }
                    body(thread, start..(start + grain).min(end));
                }
            }
        });
    }

    /// Runs `body` once on every thread and returns when all have finished. The caller holds `turn`.
    fn region(&self, body: &Body<'_>) {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. No worker touches the body after it decremented `pending`, and this
        // function neither returns nor unwinds before `pending` is zero.
        let erased = unsafe { std::mem::transmute::<&Body<'_>, &'static Body<'static>>(body) };
        // SAFETY: `turn` is held and the region before has ended, so no worker reads the cell now.
        unsafe { *shared.body.get() = Some(erased) };
        shared.pending.0.store(self.workers.len(), Ordering::Relaxed);
        shared.epoch.0.fetch_add(1, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _guard = shared.sleep.lock();
            shared.begun.notify_all();
        }
        INSIDE.set(true);
        let own = catch_unwind(AssertUnwindSafe(|| body(0)));
        INSIDE.set(false);
        shared.await_end();
        let workers = shared.panic.lock().take();
        match (own, workers) {
            (Err(panic), _) | (Ok(()), Some(panic)) => resume_unwind(panic),
            (Ok(()), None) => {}
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.0.fetch_add(1, Ordering::SeqCst);
        {
            let _guard = self.shared.sleep.lock();
            self.shared.begun.notify_all();
        }
        for worker in self.workers.drain(..) {
            // Workers catch the panics of bodies, so there is nothing a join could report.
            let _ = worker.join();
        }
    }
}

/// Spins until `done`, for [`SPIN`] at most; whether it was done by then.
fn spin(done: impl Fn() -> bool) -> bool {
    for _ in 0..64 {
        if done() {
            return true;
        }
        std::hint::spin_loop();
    }
    let start = Instant::now();
    while start.elapsed() < SPIN {
        for _ in 0..16 {
            if done() {
                return true;
            }
            std::hint::spin_loop();
        }
    }
    done()
}

impl Shared {
    fn work(&self, index: usize) {
        INSIDE.set(true);
        let mut seen = 0;
        loop {
            self.await_begin(seen);
            seen = seen.wrapping_add(1);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            // SAFETY: `epoch` has changed, so the caller has written the body and will not write it again before
            // this worker has decremented `pending`.
            let body = unsafe { *self.body.get() }.expect("a region has a body");
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| body(index))) {
                self.panic.lock().get_or_insert(panic);
            }
            if self.pending.0.fetch_sub(1, Ordering::SeqCst) == 1 && self.caller_sleeps.load(Ordering::SeqCst) {
                let _guard = self.sleep.lock();
                self.ended.notify_one();
            }
        }
    }

    /// Waits until `epoch` differs from `seen`. Regions cannot be missed: one ends only after every worker ran it.
    fn await_begin(&self, seen: usize) {
        let begun = || self.epoch.0.load(Ordering::SeqCst) != seen;
        if spin(begun) {
            return;
        }
        let mut guard = self.sleep.lock();
        // Either the caller sees this worker among the sleepers, or the worker sees the new epoch.
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while !begun() {
            self.begun.wait(&mut guard);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// Waits until every worker has finished the region.
    fn await_end(&self) {
        let ended = || self.pending.0.load(Ordering::SeqCst) == 0;
        if spin(ended) {
            return;
        }
        let mut guard = self.sleep.lock();
        self.caller_sleeps.store(true, Ordering::SeqCst);
        while !ended() {
            self.ended.wait(&mut guard);
        }
        self.caller_sleeps.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_runs_once() {
        for threads in [1, 2, 3, 5] {
            let pool = Pool::new(threads).unwrap();
            for items in [0, 1, 2, 7, 64, 1000] {
                for grain in [1, 3, 64] {
                    let seen: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                    pool.split(items, grain, &|range| {
                        assert!(range.len() <= grain || threads == 1);
                        for i in range {
                            seen[i].fetch_add(1, Ordering::Relaxed);
                        }
                    });
                    assert!(seen.iter().all(|s| s.load(Ordering::Relaxed) == 1), "{threads} {items} {grain}");
                }
            }
        }
    }

    #[test]
    fn many_callers_share_a_pool() {
        let pool = Pool::new(3).unwrap();
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for round in 0..200 {
                        if round % 50 == 0 {
                            std::thread::sleep(SPIN * 3); // lets the workers fall asleep
                        }
                        pool.split(10, 1, &|range| {
                            sum.fetch_add(range.len(), Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 4 * 200 * 10);
    }

    #[test]
    fn panics_reach_the_caller_and_the_pool_survives() {
        let pool = Pool::new(3).unwrap();
        for bad in [0, 5, 9] {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.split(10, 1, &|range| assert!(!range.contains(&bad), "item {bad}"));
            }));
            assert!(outcome.is_err());
            let count = AtomicUsize::new(0);
            pool.split(10, 1, &|_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.into_inner(), 10);
        }
    }

    #[test]
    fn what_is_done_beside_is_done_once() {
        for threads in [1, 2, 3] {
            let pool = Pool::new(threads).unwrap();
            for items in [0, 1, 2, 100] {
                let (mut beside, count) = (0, AtomicUsize::new(0));
                let inner = AtomicUsize::new(0);
                let mut work = || {
                    beside += 1;
                    pool.split(5, 1, &|range| {
                        inner.fetch_add(range.len(), Ordering::Relaxed);
                    });
                };
                pool.split_beside(items, 1, &mut work, &|_, range| {
                    count.fetch_add(range.len(), Ordering::Relaxed);
                });
                assert_eq!((beside, count.into_inner(), inner.into_inner()), (1, items, 5), "{threads} threads");
            }
        }
    }

    #[test]
    fn a_region_inside_a_region_runs_inline() {
        let pool = Pool::new(2).unwrap();
        let count = AtomicUsize::new(0);
        pool.split(4, 1, &|_| {
            pool.split(4, 1, &|range| {
                count.fetch_add(range.len(), Ordering::Relaxed);
            });
        });
        assert_eq!(count.into_inner(), 16);
    }
}
