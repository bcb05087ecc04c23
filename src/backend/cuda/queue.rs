//! A stream: launches wait on the host until somebody wants a result, and are then sent, or replayed as one graph.
//!
//! Launching a kernel costs the host microseconds, and a decode step is hundreds of them. But a step does what the last
//! one did: the same kernels with the same parameters, for whatever changes lies in the [`Block`]. So launches are written
//! down first; when the caller waits for a result, a sequence that was seen before is one launch of a graph.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys::{
    self, CUDA_KERNEL_NODE_PARAMS, CUevent, CUevent_flags, CUevent_wait_flags, CUfunction, CUgraphExec,
    CUgraphInstantiate_flags, CUmemorytype, CUstream,
};

use super::Shared;
use super::block::{Block, Plain, bytes_of};
use super::context::check;
use super::kernels::{Kernel, Module};
use super::memory::Raw;
use crate::backend::Rows;
use crate::{Error, ErrorCode, Result};

/// Launches that wait at most.
const MOST_LAUNCHES: usize = 8192;

/// Fewer launches than this are sent one by one.
const LEAST_GRAPH: usize = 24;

/// Graphs that are kept. A decoding session needs a new one when its length passes a power of two.
const MOST_GRAPHS: usize = 24;

/// Events of a stream. One that is recorded again stands for a later point, which is never wrong to wait for.
pub(super) const EVENTS: usize = 64;

/// Bytes through which small results travel.
const STAGING: usize = 4 << 20;

/// Uploads up to this size travel in the block.
const SMALL_UPLOAD: usize = 16 << 10;

/// A kernel's launch as it waits.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Launch {
    function: CUfunction,
    grid: [u32; 3],
    threads: u32,
    shared: u32,
    /// Where its parameters lie in `words`, in words of 8 bytes.
    params: usize,
}

/// What a sequence of launches is, without the data in the block.
#[derive(Default)]
struct Script {
    launches: Vec<Launch>,
    words: Vec<u64>,
    hash: u64,
}

impl Script {
    fn clear(&mut self) {
        self.launches.clear();
        self.words.clear();
        self.hash = 0;
    }

    fn push<P: Plain>(&mut self, function: CUfunction, grid: [u32; 3], threads: u32, shared: u32, params: &P) {
        let from = self.words.len();
        self.launches.push(Launch { function, grid, threads, shared, params: from });
        self.words.extend(
            bytes_of(std::slice::from_ref(params))
                .chunks_exact(8)
                .map(|word| u64::from_ne_bytes(word.try_into().expect("chunks of eight"))),
        );
        let shape = [function as usize as u64, u64::from(grid[0]) << 32 | u64::from(grid[1]), u64::from(grid[2])];
        for &word in shape.iter().chain(&self.words[from..]) {
            self.hash = (self.hash.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
    }

    fn equals(&self, other: &Script) -> bool {
        self.hash == other.hash && self.launches == other.launches && self.words == other.words
    }
}

struct Graph {
    script: Script,
    exec: CUgraphExec,
    used: u64,
}

/// Memory of a stream's own that grows.
struct Scratch {
    raw: Raw,
    purpose: &'static str,
}

/// A stream and what waits for it. Always behind a lock.
pub(super) struct Queue {
    stream: CUstream,
    events: Vec<CUevent>,
    recorded: u64,
    script: Script,
    pub(super) block: Block,
    graphs: Vec<Graph>,
    seen: VecDeque<u64>,
    replays: u64,
    clock: u64,
    staging: Raw,
    scratch: [Scratch; 3],
    /// The last launch, if it was a store that may be extended; see `store_kv`.
    pub(super) last_store: Option<super::store_kv::LastStore>,
    /// The last launch, if it was a fetch that another sequence may join; see `payload`.
    pub(super) last_fetch: Option<super::payload::LastFetch>,
}

/// What scratch memory is for.
#[derive(Clone, Copy)]
pub(super) enum Use {
    /// Chunks of decode attention.
    Partials = 0,
    /// How many chunks have finished: zero between operations.
    Counters = 1,
    /// Activations in the weights' type.
    Converted = 2,
}

// SAFETY: stream, event and graph handles belong to the context, not to a thread; the lock around a queue keeps calls apart.
unsafe impl Send for Queue {}

impl Queue {
    /// A new stream of the context, which is current.
    pub(super) fn new() -> Result<Queue> {
        let stream = check("make a stream", result::stream::create(result::stream::StreamKind::NonBlocking))?;
        let scratch = |purpose| Scratch { raw: Raw::NONE, purpose };
        Ok(Queue {
            stream,
            events: Vec::new(),
            recorded: 0,
            script: Script::default(),
            block: Block::new(),
            graphs: Vec::new(),
            seen: VecDeque::new(),
            replays: 0,
            clock: 0,
            staging: Raw::NONE,
            scratch: [scratch("attention partials"), scratch("attention counters"), scratch("converted activations")],
            last_store: None,
            last_fetch: None,
        })
    }

    /// The stream, with everything that waited launched: for libraries that launch by themselves.
    pub(super) fn stream(&mut self) -> Result<CUstream> {
        self.launch(false)?;
        Ok(self.stream)
    }

    /// Graph launches so far.
    pub(super) fn replays(&self) -> u64 {
        self.replays
    }

    /// Number of launches that wait.
    pub(super) fn waiting(&self) -> usize {
        self.script.launches.len()
    }

    /// Makes sure that the block takes `bytes` in up to `pieces` pieces. To be called before an operation's first push.
    pub(super) fn reserve(&mut self, bytes: usize, pieces: usize) -> Result<()> {
        if !self.block.fits(bytes, pieces) {
            self.finish()?;
            self.block.grow(bytes + 16 * pieces)?;
        }
        Ok(())
    }

    /// Enqueues a launch.
    pub(super) fn push<P: Plain>(
        &mut self,
        shared: &Shared,
        kernel: Kernel,
        grid: [usize; 3],
        threads: usize,
        params: &P,
    ) -> Result<()> {
        (self.last_store, self.last_fetch) = (None, None);
        if grid.contains(&0) {
            return Ok(());
        }
        if self.script.launches.len() >= MOST_LAUNCHES {
            self.launch(false)?;
        }
        let limit = [i32::MAX as usize, 65535, 65535];
        if grid.iter().zip(limit).any(|(&n, limit)| n > limit) {
            return Err(Error::new(ErrorCode::Internal, format!("{}: a grid of {grid:?} blocks", kernel.name)));
        }
        let function = shared.kernels.get(&shared.context, kernel)?;
        self.script.push(function, grid.map(|n| n as u32), threads as u32, kernel.shared_bytes as u32, params);
        Ok(())
    }

    /// Adds blocks to the last launch's first dimension.
    pub(super) fn widen_last(&mut self, blocks: usize) {
        let last = self.script.launches.last_mut().expect("there is a last launch");
        last.grid[0] += blocks as u32;
        // The hash no longer covers the grid; comparing scripts does. Mixed in, so that it stays a function of the script.
        self.script.hash = (self.script.hash.rotate_left(5) ^ blocks as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    /// Scratch memory of at least `bytes`, zeroed when it is new.
    pub(super) fn scratch(&mut self, what: Use, bytes: usize) -> Result<u64> {
        if self.scratch[what as usize].raw.bytes < bytes {
            self.finish()?;
            let scratch = &mut self.scratch[what as usize];
            scratch.raw.free();
            scratch.raw = Raw::NONE;
            scratch.raw = Raw::device(bytes.next_power_of_two(), scratch.purpose)?;
        }
        Ok(self.scratch[what as usize].raw.address)
    }

    /// Sends everything that waits; as a graph when `replay` says that a whole step is there.
    pub(super) fn launch(&mut self, replay: bool) -> Result<()> {
        (self.last_store, self.last_fetch) = (None, None);
        if self.script.launches.is_empty() {
            return Ok(());
        }
        let result = self.block.send(self.stream).and_then(|()| {
            match replay && self.script.launches.len() >= LEAST_GRAPH && self.graph()? {
                true => Ok(()),
                false => self.launch_each(),
            }
        });
        self.script.clear();
        result
    }

    fn launch_each(&mut self) -> Result<()> {
        let Script { launches, words, .. } = &mut self.script;
        for launch in launches {
            let mut params = [words[launch.params..].as_mut_ptr().cast::<c_void>()];
            let [x, y, z] = launch.grid;
            // SAFETY: the kernel takes one struct by value, which lies at `params`; its addresses were valid when it was
            // enqueued, and memory is freed only after everything that waits was launched.
            check("launch a kernel", unsafe {
                result::launch_kernel(
                    launch.function,
                    (x, y, z),
                    (launch.threads, 1, 1),
                    launch.shared,
                    self.stream,
                    &mut params,
                )
            })?;
        }
        Ok(())
    }

    /// Launches the waiting script as a graph, if it was seen before. Returns whether it did.
    fn graph(&mut self) -> Result<bool> {
        self.clock += 1;
        let hash = self.script.hash;
        let known = self.graphs.iter().position(|graph| graph.script.equals(&self.script));
        let at = match known {
            Some(at) => at,
            None if self.seen.contains(&hash) => {
                if self.graphs.len() >= MOST_GRAPHS {
                    let (oldest, _) =
                        self.graphs.iter().enumerate().min_by_key(|(_, g)| g.used).expect("there are some");
                    let graph = self.graphs.swap_remove(oldest);
                    // SAFETY: made by `instantiate`, destroyed once; a running launch of it keeps what it needs.
                    let _ = unsafe { result::graph::exec_destroy(graph.exec) };
                }
                let exec = self.instantiate()?;
                self.graphs.push(Graph { script: std::mem::take(&mut self.script), exec, used: 0 });
                self.graphs.len() - 1
            }
            None => {
                if self.seen.len() >= 2 * MOST_GRAPHS {
                    self.seen.pop_front();
                }
                self.seen.push_back(hash);
                return Ok(false);
            }
        };
        self.graphs[at].used = self.clock;
        // SAFETY: the graph names memory that is alive: its parameters equal those of operations enqueued just now.
        check("launch a graph", unsafe { result::graph::launch(self.graphs[at].exec, self.stream) })?;
        self.replays += 1;
        Ok(true)
    }

    /// The waiting script as a graph: a chain.
    fn instantiate(&mut self) -> Result<CUgraphExec> {
        let mut graph = std::ptr::null_mut();
        // SAFETY: writes a new graph to a local; destroyed below.
        check("make a graph", unsafe { sys::cuGraphCreate(&mut graph, 0) }.result())?;
        let Script { launches, words, .. } = &mut self.script;
        let mut before = None;
        let added = launches.iter().try_for_each(|launch| {
            let mut params = [words[launch.params..].as_mut_ptr().cast::<c_void>()];
            let [x, y, z] = launch.grid;
            let node_params = CUDA_KERNEL_NODE_PARAMS {
                func: launch.function,
                gridDimX: x,
                gridDimY: y,
                gridDimZ: z,
                blockDimX: launch.threads,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: launch.shared,
                kernelParams: params.as_mut_ptr(),
                extra: std::ptr::null_mut(),
            };
            let mut node = std::ptr::null_mut();
            let dependencies = before.as_ref().map_or(std::ptr::null(), |node| node as *const _);
            // SAFETY: the driver copies the parameters during the call; the dependency, if any, is a node of this graph.
            let added =
                unsafe { sys::cuGraphAddKernelNode(&mut node, graph, dependencies, before.iter().len(), &node_params) };
            before = Some(node);
            check("build a graph", added.result())
        });
        let exec = added.and_then(|()| {
            // SAFETY: `graph` is complete.
            check("instantiate a graph", unsafe { result::graph::instantiate(graph, CUgraphInstantiate_flags(0)) })
        });
        // SAFETY: made above, destroyed once.
        let _ = unsafe { result::graph::destroy(graph) };
        exec
    }

    /// Launches everything and waits for it.
    pub(super) fn finish(&mut self) -> Result<()> {
        let launched = self.launch(true);
        // SAFETY: the stream is alive.
        let waited = check("finish its work", unsafe { result::stream::synchronize(self.stream) });
        self.block.reset();
        launched.and(waited)
    }

    /// See `Backend::record`; the number of the event on this stream.
    pub(super) fn record(&mut self) -> Result<u64> {
        self.launch(false)?;
        let at = (self.recorded % EVENTS as u64) as usize;
        if at == self.events.len() {
            let event = result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING);
            self.events.push(check("make an event", event)?);
        }
        // SAFETY: event and stream are alive and of one context.
        check("record an event", unsafe { result::event::record(self.events[at], self.stream) })?;
        self.recorded += 1;
        Ok(self.recorded - 1)
    }

    /// The event of that number, or a later one of this stream.
    pub(super) fn event(&self, number: u64) -> CUevent {
        self.events[(number % EVENTS as u64) as usize]
    }

    /// See `Backend::wait`.
    pub(super) fn wait(&mut self, event: CUevent) -> Result<()> {
        self.launch(false)?;
        let flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: event and stream are alive and of one context.
        check("wait for an event", unsafe { result::stream::wait_event(self.stream, event, flags) })
    }

    /// See `Backend::upload`: small ones travel with the next launch, large ones at once.
    pub(super) fn upload(&mut self, shared: &Shared, source: &[u8], target: u64) -> Result<()> {
        if source.is_empty() {
            return Ok(());
        }
        if source.len() <= SMALL_UPLOAD && source.len().is_multiple_of(4) && target.is_multiple_of(4) {
            self.reserve(source.len(), 1)?;
            let params = Upload { from: self.block.push(source), to: target, words: source.len() as u64 / 4 };
            let threads = (source.len() / 4).next_multiple_of(32).min(1024);
            return self.push(shared, Kernel::new(Module::Upload, "upload"), [1, 1, 1], threads, &params);
        }
        self.launch(false)?;
        // SAFETY: the caller checked the target's range. From pageable memory the driver has copied the source on return.
        check("upload", unsafe { result::memcpy_htod_async(target, source, self.stream) })
    }

    /// See `Backend::download`.
    pub(super) fn download(&mut self, source: Rows<'_>, target: &mut [u8]) -> Result<()> {
        self.launch(true)?;
        let width = source.cols() * source.dtype().bytes();
        if !target.is_empty() {
            let staged = target.len() <= STAGING;
            if staged && self.staging.bytes == 0 {
                self.staging = Raw::pinned(STAGING, "results")?;
            }
            let to = if staged { self.staging.host() } else { target.as_mut_ptr() };
            let copy = sys::CUDA_MEMCPY2D {
                srcXInBytes: 0,
                srcY: 0,
                srcMemoryType: CUmemorytype::CU_MEMORYTYPE_UNIFIED,
                srcHost: std::ptr::null(),
                srcDevice: source.base().expose_provenance() as u64,
                srcArray: std::ptr::null_mut(),
                srcPitch: source.stride() * source.dtype().bytes(),
                dstXInBytes: 0,
                dstY: 0,
                dstMemoryType: CUmemorytype::CU_MEMORYTYPE_HOST,
                dstHost: to.cast(),
                dstDevice: 0,
                dstArray: std::ptr::null_mut(),
                dstPitch: width,
                WidthInBytes: width,
                Height: source.rows(),
            };
            // SAFETY: the window lies inside its buffer, and `to` has room for all rows, packed. The copy ends before
            // `finish` below returns, while `target` is borrowed.
            let copied = check("download", unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.stream) }.result());
            let finished = self.finish();
            copied.and(finished)?;
            if staged {
                // SAFETY: the staging memory holds at least as many bytes, which the copy has written.
                target.copy_from_slice(unsafe { std::slice::from_raw_parts(self.staging.host(), target.len()) });
            }
            return Ok(());
        }
        self.finish()
    }

    /// Gives everything back. The context is current.
    pub(super) fn free(&mut self) {
        self.script.clear();
        // SAFETY: each handle was made by this queue and is destroyed once, after the stream has finished. Errors of a
        // failed device leave nothing to do.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            for graph in self.graphs.drain(..) {
                let _ = result::graph::exec_destroy(graph.exec);
            }
            for event in self.events.drain(..) {
                let _ = result::event::destroy(event);
            }
            let _ = result::stream::destroy(self.stream);
        }
        self.block.free();
        self.staging.free();
        self.staging = Raw::NONE;
        for scratch in &mut self.scratch {
            scratch.raw.free();
            scratch.raw = Raw::NONE;
        }
    }
}

super::block::plain! {
    struct Upload {
        from: u64,
        to: u64,
        words: u64,
    }
}

/// A queue that all who enqueue share.
pub(super) type SharedQueue = Arc<parking_lot::Mutex<Queue>>;
