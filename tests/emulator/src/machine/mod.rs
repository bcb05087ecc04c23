//! A machine that executes kernels: grids of blocks, blocks of warps, warps of 32 lanes that take each instruction
//! together.
//!
//! What a device leaves open is left to chance, from a seed that a fault names: the order of blocks, and of warps between two
//! barriers. Memory that nobody wrote holds ones. Copies that are on their way arrive as late as they may. So what is
//! right by luck on a device seldom is here.

mod arithmetic;
mod matrix;
#[cfg(test)]
mod tests;
mod transfer;
mod warp;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

use fastrand::Rng;

use crate::ptx::Kernel;
use warp::{Stop, Warp};

/// Lanes of a warp.
const LANES: usize = 32;

/// What a shared or local byte holds before it is written.
const UNWRITTEN: u128 = u128::MAX;

/// A kernel with what it is launched with.
pub(crate) struct Launch<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) params: &'a [u8],
    pub(crate) grid: [u32; 3],
    pub(crate) threads: [u32; 3],
    /// Shared memory of a block, its own and what the launch adds.
    pub(crate) shared_bytes: usize,
    /// The piece of memory, from where to where, that holds all of so many bytes at an address.
    pub(crate) memory: &'a (dyn Fn(u64, u64) -> Option<(u64, u64)> + Sync),
    /// Whether it may begin before the launch before it has ended: then it may write nothing until it has waited.
    pub(crate) early: bool,
    pub(crate) seed: u64,
}

/// What a kernel did that it may not.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Fault {
    pub(crate) what: String,
    /// Where the instruction stands in the module's text, the block and the first thread of the warp.
    pub(crate) at: u32,
    pub(crate) block: [u32; 3],
    pub(crate) thread: u32,
}

/// Blocks' registers and memory, kept for the kernel's next launch.
#[derive(Default)]
pub(crate) struct Machine {
    /// By kernel, which is at one place as long as there is a machine, and the number of warps.
    idle: Mutex<HashMap<(*const Kernel, usize), Vec<Block>>>,
}

// SAFETY: pointers to kernels are compared, never followed.
unsafe impl Send for Machine {}
// SAFETY: as above.
unsafe impl Sync for Machine {}

/// From so many instructions on, if no warp goes through its kernel more than once, a launch is worth a second thread.
const WORTH_A_THREAD: usize = 1 << 15;

impl Machine {
    /// Executes all blocks on up to so many of the host's threads.
    pub(crate) fn run(&self, launch: &Launch<'_>, host_threads: usize) -> Result<(), Fault> {
        let blocks = launch.grid.iter().map(|&n| n as usize).product::<usize>();
        let warps = launch.threads.iter().map(|&n| n as usize).product::<usize>().div_ceil(LANES);
        let mut random = Rng::with_seed(launch.seed);
        let mut order: Vec<usize> = (0..blocks).collect();
        random.shuffle(&mut order);
        let next = AtomicUsize::new(0);
        let (failed, waited) = (AtomicBool::new(false), AtomicBool::new(false));
        let fault: Mutex<Option<Fault>> = Mutex::default();
        let work = |seed: u64| {
            let mut block = self.block(launch, warps);
            block.random = Rng::with_seed(seed);
            while !failed.load(Ordering::Relaxed) {
                let Some(&number) = order.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
                let done = block.run(launch, number as u32);
                if block.warps.iter().any(|warp| warp.waited) {
                    waited.store(true, Ordering::Relaxed);
                }
                if let Err(error) = done {
                    failed.store(true, Ordering::Relaxed);
                    lock(&fault).get_or_insert(error);
                }
            }
            lock(&self.idle).entry((launch.kernel, warps)).or_default().push(block);
        };
        let least = blocks * warps * launch.kernel.code.len();
        let workers = if least < WORTH_A_THREAD { 1 } else { host_threads.min(blocks).max(1) };
        std::thread::scope(|scope| {
            for _ in 1..workers {
                let (work, seed) = (&work, random.u64(..));
                scope.spawn(move || work(seed));
            }
            work(random.u64(..));
        });
        if let Some(fault) = lock(&fault).take() {
            return Err(fault);
        }
        // (Threads that have nothing to do may end without having waited, as long as one of the launch waits.)
        if launch.early && !waited.into_inner() {
            let what = "the end of all its threads before one has waited for the launch before".to_owned();
            return Err(Fault { what, at: 0, block: [0; 3], thread: 0 });
        }
        Ok(())
    }

    fn block(&self, launch: &Launch<'_>, warps: usize) -> Block {
        let idle = lock(&self.idle).get_mut(&(&raw const *launch.kernel, warps)).and_then(Vec::pop);
        let mut block = idle.unwrap_or_else(|| Block {
            warps: (0..warps).map(|_| Warp::new(launch.kernel)).collect(),
            space: Space { shared: Vec::new(), shared_bytes: 0, local: Vec::new(), index: [0; 3] },
            random: Rng::with_seed(0),
        });
        let local = launch.kernel.local_bytes.next_multiple_of(16) * warps * LANES;
        block.space.shared_bytes = launch.shared_bytes;
        block.space.shared.resize(launch.shared_bytes.div_ceil(16) + 1, UNWRITTEN);
        block.space.local.resize(local / 16, UNWRITTEN);
        block
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A block's warps and memory, used by one block after the other.
struct Block {
    warps: Vec<Warp>,
    space: Space,
    random: Rng,
}

/// What the threads of a block share, and what each has of its own.
struct Space {
    shared: Vec<u128>,
    shared_bytes: usize,
    local: Vec<u128>,
    index: [u32; 3],
}

impl Space {
    fn shared_base(&self) -> u64 {
        self.shared.as_ptr().expose_provenance() as u64
    }

    fn local_base(&self) -> u64 {
        self.local.as_ptr().expose_provenance() as u64
    }
}

impl Block {
    fn run(&mut self, launch: &Launch<'_>, number: u32) -> Result<(), Fault> {
        let [x, y, _] = launch.grid;
        self.space.index = [number % x, number / x % y, number / x / y];
        self.space.shared.fill(UNWRITTEN);
        self.space.local.fill(UNWRITTEN);
        for (i, warp) in self.warps.iter_mut().enumerate() {
            warp.begin(launch, &self.space, i);
        }
        let mut running: Vec<usize> = (0..self.warps.len()).collect();
        while !running.is_empty() {
            self.random.shuffle(&mut running);
            let mut waiting = Vec::with_capacity(running.len());
            for &i in &running {
                match self.warps[i].run(launch, &mut self.space)? {
                    Stop::Barrier => waiting.push(i),
                    Stop::Exit => {}
                }
            }
            running = waiting;
        }
        Ok(())
    }
}
