//! A stream: launches wait on the host until somebody wants a result, and are then sent, or replayed as one graph.
//!
//! Launching a kernel costs the host microseconds, and a decode step is hundreds of them. But a step does what the last
//! one did: the same kernels with the same parameters, for whatever changes lies in the [`Block`]. So launches are written
//! down first; when the caller waits for a result, a sequence that was seen before is one launch of a graph.
//!
//! A queue has [`LANES`] lanes: streams that share the script, so that what runs beside the main lane (fetches) is part of
//! the same graph. An event of one lane that another waits for is an edge of the graph; launched one by one, each lane
//! has a CUDA stream of its own, and the edge is a CUDA event.

mod graph;
mod script;
mod transfer;

use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUevent, CUevent_flags, CUevent_wait_flags, CUstream};

use super::Shared;
use super::block::{Block, Plain};
use super::context::check;
use super::kernels::Kernel;
use super::memory::Raw;
use super::timer::{Label, Timer};
use crate::backend::{Timed, Timing};
use crate::{Error, ErrorCode, Result};
use graph::Graph;
use script::{Launch, Script};

/// Launches that wait at most.
const MOST_LAUNCHES: usize = 8192;

/// Fewer launches than this are sent one by one.
const LEAST_GRAPH: usize = 24;

/// As many launches go ahead, before the rest of a step is written down: a device that has something to do does not wait
/// for the host. (A step of a batch is written down in milliseconds.)
const AHEAD: usize = 64;

/// The main lane, and those that run beside it.
pub(super) const LANES: usize = 3;

/// The priority of a lane's launches, CUDA's way (the lowest number is the highest): what the main lane will wait for goes first
/// where both want to begin.
fn priority(lane: usize) -> i32 {
    if lane == 0 { 0 } else { -1 }
}

/// Events by number: of lanes that catch up, of other queues that wait, from `OWN_EVENTS` on those that `point` records in
/// turn, and behind them those of edges.
const CATCH_UP: usize = 0;
const OUTER: usize = 1;
const OWN_EVENTS: usize = 2;
const MARKS: usize = 256;

/// Bytes through which small results travel.
const STAGING: usize = 4 << 20;

/// What a lane is besides its launches.
struct Lane {
    stream: CUstream,
    /// Launches of this script, of other lanes, that its next launch comes after.
    after: Vec<usize>,
    /// Lanes all of whose work that was launched one by one its next launch comes after.
    behind: [bool; LANES],
    scratch: [Scratch; 5],
}

impl Lane {
    /// The `lane`-th.
    fn new(lane: usize) -> Result<Lane> {
        let (mut stream, flags) = (std::ptr::null_mut(), sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32);
        // SAFETY: writes a new stream of the current context to a local. A priority out of range is taken as the nearest.
        let made = unsafe { sys::cuStreamCreateWithPriority(&mut stream, flags, priority(lane)) };
        check("make a stream", made.result())?;
        let scratch = |purpose| Scratch { raw: Raw::NONE, purpose };
        Ok(Lane {
            stream,
            after: Vec::new(),
            behind: [false; LANES],
            scratch: [
                scratch("attention partials"),
                scratch("attention counters"),
                scratch("converted activations"),
                scratch("scores of rehearsals"),
                scratch("selected rows"),
            ],
        })
    }
}

/// Memory of a stream's own that grows.
struct Scratch {
    raw: Raw,
    purpose: &'static str,
}

/// A point in a lane: after the `launches`-th launch of the `script`-th script. Where nothing of the lane waits to be
/// launched, `launches` is 0 and `script` the number of a CUDA event.
#[derive(Clone, Copy)]
pub(super) struct Point {
    pub(super) lane: usize,
    pub(super) script: u64,
    pub(super) launches: usize,
}

/// Lanes and what waits for them. Always behind a lock.
pub(super) struct Queue {
    /// The main lane, and others as they are asked for.
    lanes: Vec<Lane>,
    /// Whose operations are being enqueued.
    lane: usize,
    /// CUDA events, for edges between lanes that are launched one by one.
    events: Vec<CUevent>,
    /// Scripts launched so far, and whether any was since somebody has waited.
    scripts: u64,
    ahead: bool,
    /// Events that `point` has recorded.
    marked: u64,
    script: Script,
    pub(super) block: Block,
    graphs: Vec<Graph>,
    seen: VecDeque<u64>,
    replays: u64,
    clock: u64,
    staging: Raw,
    timer: Timer,
    /// The last launch, if it was a store that may be extended; see `store_kv`.
    pub(super) last_store: Option<super::store_kv::LastStore>,
    /// As `last_store`; see `slots`.
    pub(super) last_admit: Option<super::slots::LastAdmit>,
    /// As `last_store`; see `tail`.
    pub(super) last_add: Option<super::tail::LastAdd>,
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
    /// Scores of rehearsals, and what ranks them.
    Rehearsals = 3,
    /// Rows that rehearsals select.
    Lists = 4,
}

// SAFETY: stream, event and graph handles belong to the context, not to a thread; the lock around a queue keeps calls apart.
unsafe impl Send for Queue {}

impl Queue {
    /// A new stream of the context, which is current.
    pub(super) fn new() -> Result<Queue> {
        Ok(Queue {
            lanes: vec![Lane::new(0)?],
            lane: 0,
            events: Vec::new(),
            scripts: 0,
            ahead: false,
            marked: 0,
            script: Script::default(),
            block: Block::new(),
            graphs: Vec::new(),
            seen: VecDeque::new(),
            replays: 0,
            clock: 0,
            staging: Raw::NONE,
            timer: Timer::default(),
            last_store: None,
            last_admit: None,
            last_add: None,
            last_fetch: None,
        })
    }

    /// Nothing may join the last launch any more.
    fn last_alone(&mut self) {
        (self.last_store, self.last_fetch, self.last_admit, self.last_add) = (None, None, None, None);
    }

    /// One more lane, or an error where there are no more.
    pub(super) fn add_lane(&mut self) -> Result<usize> {
        if self.lanes.len() == LANES {
            return Err(Error::new(ErrorCode::Internal, format!("a stream has at most {} side streams", LANES - 1)));
        }
        // What is fetched comes first: it needs little of the device, and others will wait for it.
        self.lanes.push(Lane::new(self.lanes.len())?);
        Ok(self.lanes.len() - 1)
    }

    /// The lane that operations are enqueued on.
    pub(super) fn lane(&self) -> usize {
        self.lane
    }

    /// Enqueues on `lane` from now on.
    pub(super) fn switch(&mut self, lane: usize) {
        assert!(lane < self.lanes.len(), "a stream that was never made");
        if self.lane != lane {
            self.lane = lane;
            self.last_alone();
        }
    }

    /// The lane's stream, with everything that waited launched: for libraries that launch by themselves.
    pub(super) fn stream(&mut self) -> Result<CUstream> {
        self.launch(false)?;
        self.catch_up(self.lane)?;
        Ok(self.lanes[self.lane].stream)
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
        self.last_alone();
        if grid.contains(&0) {
            return Ok(());
        }
        if self.script.launches.len() >= if self.ahead { MOST_LAUNCHES } else { AHEAD } {
            self.launch(true)?;
        }
        let limit = [i32::MAX as usize, 65535, 65535];
        if grid.iter().zip(limit).any(|(&n, limit)| n > limit) {
            return Err(Error::new(ErrorCode::Internal, format!("{}: a grid of {grid:?} blocks", kernel.name)));
        }
        let function = shared.kernels.get(&shared.context, kernel)?;
        let (grid, threads, shared_bytes) = (grid.map(|n| n as u32), threads as u32, kernel.shared_bytes as u32);
        let after = &mut self.lanes[self.lane].after;
        self.script.push(self.lane, after, function, grid, threads, shared_bytes, params);
        after.clear();
        self.script.labels.push(Label { name: kernel.name, lane: self.lane, fetches: kernel.fetches });
        Ok(())
    }

    /// Says that what waits beside the main lane is long, and needs the room that launches of that lane would take early.
    pub(super) fn crowd(&mut self) {
        self.script.crowded = true;
    }

    /// Adds blocks to the last launch's first dimension.
    pub(super) fn widen_last(&mut self, blocks: usize) {
        let last = self.script.launches.last_mut().expect("there is a last launch");
        last.grid[0] += blocks as u32;
        // The hash no longer covers the grid; comparing scripts does. Mixed in, so that it stays a function of the script.
        self.script.hash = (self.script.hash.rotate_left(5) ^ blocks as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    /// Whether the last launch, which is of this lane, comes after all that the lane was told to wait for: what joins it
    /// then has waited too.
    pub(super) fn last_has_waited(&self) -> bool {
        let Some(last) = self.script.launches.len().checked_sub(1) else { return false };
        let lane_of = |launch: usize| self.script.launches[launch].lane;
        let waited = |&before: &usize| {
            self.script.edges_of(last).iter().any(|&edge| lane_of(edge) == lane_of(before) && before <= edge)
        };
        // (Lanes that it is behind of are waited for by the lane's first launch, whenever the lane was told.)
        lane_of(last) == self.lane && self.lanes[self.lane].after.iter().all(waited)
    }

    /// Scratch memory of the lane of at least `bytes`, zeroed when it is new.
    pub(super) fn scratch(&mut self, what: Use, bytes: usize) -> Result<u64> {
        if self.lanes[self.lane].scratch[what as usize].raw.bytes < bytes {
            self.finish()?;
            let scratch = &mut self.lanes[self.lane].scratch[what as usize];
            scratch.raw.free();
            scratch.raw = Raw::NONE;
            scratch.raw = Raw::device(bytes.next_power_of_two(), scratch.purpose)?;
        }
        Ok(self.lanes[self.lane].scratch[what as usize].raw.address)
    }

    /// What is held, and what will be when `wanted` has been asked for: bytes by lane and use, bytes that an operation puts
    /// into the block, and whether results are downloaded.
    pub(super) fn scratch_bytes(
        &self,
        wanted: &[(usize, Use, usize)],
        block: usize,
        results: bool,
    ) -> crate::backend::Scratch {
        let wanted_of = |lane: usize, what: usize| {
            wanted.iter().filter(|w| (w.0, w.1 as usize) == (lane, what)).map(|w| w.2).max().filter(|&bytes| bytes > 0)
        };
        let uses = self.lanes[0].scratch.len();
        let device: usize = (0..LANES)
            .flat_map(|lane| (0..uses).map(move |what| (lane, what)))
            .map(|(lane, what)| {
                let held = self.lanes.get(lane).map_or(0, |lane| lane.scratch[what].raw.bytes);
                held.max(wanted_of(lane, what).map_or(0, usize::next_power_of_two))
            })
            .sum();
        let block = self.block.bytes(block);
        let staging = if results { STAGING } else { self.staging.bytes };
        crate::backend::Scratch { device: device + block, pinned: block + staging }
    }

    /// Sends everything that waits; as a graph when `replay` says that a whole step is there.
    pub(super) fn launch(&mut self, replay: bool) -> Result<()> {
        self.last_alone();
        if self.script.launches.is_empty() {
            return Ok(());
        }
        // What a lane waits for without having launched anything since.
        let mut pending = [[false; LANES]; LANES];
        for (lane, pending) in self.lanes.iter_mut().zip(&mut pending) {
            lane.after.drain(..).for_each(|before| pending[self.script.launches[before].lane] = true);
        }
        let main = self.lanes[0].stream;
        let result = self.timer.start(main).and_then(|()| self.block.send(main)).and_then(|()| {
            match replay && self.script.launches.len() >= LEAST_GRAPH && self.graph()? {
                true => Ok(()),
                false => self.launch_each(),
            }
        });
        for (lane, pending) in self.lanes.iter_mut().zip(pending) {
            lane.behind.iter_mut().zip(pending).for_each(|(behind, pending)| *behind |= pending);
        }
        self.script.clear();
        self.scripts += 1;
        self.ahead = true;
        result
    }

    /// Launches the script on the lanes' own streams.
    fn launch_each(&mut self) -> Result<()> {
        // The block was sent on the main lane's stream.
        let side = |launch: &Launch| launch.lane != 0;
        if self.script.launches.iter().any(side) {
            self.lanes[1..].iter_mut().for_each(|lane| lane.behind[0] = true);
        }
        let mut events: Vec<Option<CUevent>> = vec![None; self.script.launches.len()];
        for &launch in &self.script.edges {
            events[launch] = Some(std::ptr::null_mut());
        }
        let mut used = OWN_EVENTS + MARKS;
        for i in 0..self.script.launches.len() {
            let launch = self.script.launches[i];
            self.catch_up(launch.lane)?;
            let stream = self.lanes[launch.lane].stream;
            for &before in self.script.edges_of(i) {
                wait_for(stream, events[before].expect("an event for every launch that is waited for"))?;
            }
            let pair = self.timer.begin(self.script.labels[i], stream)?;
            let mut params = [self.script.words[launch.params..].as_mut_ptr().cast::<c_void>()];
            let [x, y, z] = launch.grid;
            // SAFETY: the kernel takes one struct by value, which lies at `params`; its addresses were valid when it was
            // enqueued, and memory is freed only after everything that waits was launched.
            check("launch a kernel", unsafe {
                result::launch_kernel(
                    launch.function.handle,
                    (x, y, z),
                    (launch.threads, 1, 1),
                    launch.shared,
                    stream,
                    &mut params,
                )
            })?;
            self.timer.end(pair, stream)?;
            if let Some(event) = &mut events[i] {
                *event = self.record(used, launch.lane)?;
                used += 1;
            }
        }
        Ok(())
    }

    /// Makes the lane's stream wait for the lanes that it is behind.
    fn catch_up(&mut self, lane: usize) -> Result<()> {
        for other in 0..self.lanes.len() {
            if std::mem::take(&mut self.lanes[lane].behind[other]) && other != lane {
                // Whoever waits on an event waits for what it stood for at that moment, so one serves for all.
                let event = self.record(CATCH_UP, other)?;
                wait_for(self.lanes[lane].stream, event)?;
            }
        }
        Ok(())
    }

    /// Records the `at`-th event on the lane's stream.
    fn record(&mut self, at: usize, lane: usize) -> Result<CUevent> {
        while at >= self.events.len() {
            let event = result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING);
            self.events.push(check("make an event", event)?);
        }
        // SAFETY: event and stream are alive and of one context.
        check("record an event", unsafe { result::event::record(self.events[at], self.lanes[lane].stream) })?;
        Ok(self.events[at])
    }

    /// Lets the main lane's stream wait for all others.
    fn join(&mut self) -> Result<()> {
        self.lanes[0].behind[1..].fill(true);
        self.catch_up(0)
    }

    /// Launches everything and waits for it.
    pub(super) fn finish(&mut self) -> Result<()> {
        let launched = self.launch(true).and_then(|()| self.join());
        // SAFETY: the stream is alive.
        let waited = check("finish its work", unsafe { result::stream::synchronize(self.lanes[0].stream) });
        self.block.reset();
        self.ahead = false;
        launched.and(waited).and_then(|()| self.timer.read())
    }

    /// See `Backend::set_timing`.
    pub(super) fn set_timing(&mut self, timing: Timing) -> Result<()> {
        if self.timer.timing() != timing {
            self.finish()?;
            self.timer.set(timing);
            // They measure something else. A script that was seen is still worth a graph.
            self.graphs.drain(..).for_each(|graph| graph.destroy());
        }
        Ok(())
    }

    /// See `Backend::take_timed`.
    pub(super) fn take_timed(&mut self) -> Vec<Timed> {
        self.timer.take()
    }

    /// See `Backend::record`: where the lane is.
    pub(super) fn point(&mut self) -> Result<Point> {
        let lane = self.lane;
        if let Some(last) = self.script.last[lane] {
            return Ok(Point { lane, script: self.scripts, launches: last + 1 });
        }
        self.catch_up(lane)?;
        let number = self.marked;
        self.record(OWN_EVENTS + (number % MARKS as u64) as usize, lane)?;
        self.marked += 1;
        Ok(Point { lane, script: number, launches: 0 })
    }

    /// See `Backend::wait`: the lane waits for a point of another lane of this queue.
    pub(super) fn wait(&mut self, point: Point) -> Result<()> {
        if point.lane == self.lane {
            return Ok(());
        }
        self.last_alone();
        if point.launches == 0 {
            // Recorded again meanwhile, it stands for a later point, which is never wrong to wait for.
            let event = self.events[OWN_EVENTS + (point.script % MARKS as u64) as usize];
            return wait_for(self.lanes[self.lane].stream, event);
        }
        let lane = &mut self.lanes[self.lane];
        if point.script == self.scripts {
            // The later one of a lane comes after the earlier one.
            let launch = point.launches - 1;
            match lane.after.iter_mut().find(|before| self.script.launches[**before].lane == point.lane) {
                Some(before) => *before = launch.max(*before),
                None => lane.after.push(launch),
            }
        } else {
            lane.behind[point.lane] = true;
        }
        Ok(())
    }

    /// Everything that was enqueued, as an event for other queues.
    pub(super) fn event(&mut self) -> Result<CUevent> {
        self.launch(false)?;
        self.join()?;
        self.record(OUTER, 0)
    }

    /// See `Backend::wait`: the lane waits for another queue.
    pub(super) fn wait_event(&mut self, event: CUevent) -> Result<()> {
        self.launch(false)?;
        wait_for(self.lanes[self.lane].stream, event)
    }

    /// Gives everything back. The context is current.
    pub(super) fn free(&mut self) {
        self.script.clear();
        // SAFETY: each handle was made by this queue and is destroyed once, after the streams have finished. Errors of a
        // failed device leave nothing to do.
        unsafe {
            for lane in &self.lanes {
                let _ = result::stream::synchronize(lane.stream);
            }
            for event in self.events.drain(..) {
                let _ = result::event::destroy(event);
            }
        }
        self.graphs.drain(..).for_each(|graph| graph.destroy());
        self.timer.free();
        self.block.free();
        self.staging.free();
        self.staging = Raw::NONE;
        for lane in self.lanes.drain(..) {
            lane.scratch.iter().for_each(|scratch| scratch.raw.free());
            // SAFETY: as above.
            let _ = unsafe { result::stream::destroy(lane.stream) };
        }
    }
}

/// Makes later work on the stream wait for what the event stands for.
fn wait_for(stream: CUstream, event: CUevent) -> Result<()> {
    let flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
    // SAFETY: event and stream are alive and of one context.
    check("wait for an event", unsafe { result::stream::wait_event(stream, event, flags) })
}

/// A queue that all who enqueue share.
pub(super) type SharedQueue = Arc<parking_lot::Mutex<Queue>>;
