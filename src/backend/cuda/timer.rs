//! When launches begin and end, by CUDA events before and behind them.
//!
//! Events are recorded by the launches' own streams; in a graph they are nodes of it, so a step that is replayed is measured
//! as it is replayed. Each costs its stream a microsecond or so, and is there only while somebody measures.

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUevent, CUevent_flags, CUgraph, CUgraphNode, CUstream};

use super::context::check;
use crate::Result;
use crate::backend::{Timed, Timing};

/// Launches that are remembered until somebody asks for them.
const MOST: usize = 1 << 16;

/// What a launch is called.
#[derive(Clone, Copy, Debug)]
pub(super) struct Label {
    pub(super) name: &'static str,
    pub(super) lane: usize,
    /// Whether it reads host memory.
    pub(super) fetches: bool,
}

/// A launch and the events around it.
#[derive(Clone, Copy)]
pub(super) struct Pair {
    label: Label,
    begin: CUevent,
    end: CUevent,
}

impl Pair {
    fn new(label: Label) -> Result<Pair> {
        let begin = event()?;
        match event() {
            Ok(end) => Ok(Pair { label, begin, end }),
            Err(error) => {
                destroy(begin);
                Err(error)
            }
        }
    }

    pub(super) fn destroy(&self) {
        destroy(self.begin);
        destroy(self.end);
    }
}

fn event() -> Result<CUevent> {
    check("make an event", result::event::create(CUevent_flags::CU_EVENT_DEFAULT))
}

fn destroy(event: CUevent) {
    // SAFETY: made by `event`, destroyed once by its owner. Errors of a failed device leave nothing to do.
    let _ = unsafe { result::event::destroy(event) };
}

fn record(event: CUevent, stream: CUstream) -> Result<()> {
    // SAFETY: event and stream are alive and of one context.
    check("record an event", unsafe { result::event::record(event, stream) })
}

/// The measurements of a queue.
#[derive(Default)]
pub(super) struct Timer {
    timing: Timing,
    /// Where time begins, recorded before the first launch after a [`Timer::take`].
    base: Option<CUevent>,
    based: bool,
    /// Events of launches that are sent one by one; the first `used` of them have been recorded.
    pairs: Vec<Pair>,
    used: usize,
    /// Launched, and not read yet.
    pending: Vec<Pair>,
    done: Vec<Timed>,
}

impl Timer {
    /// What is measured from now on. What was measured is forgotten.
    pub(super) fn set(&mut self, timing: Timing) {
        self.timing = timing;
        self.take();
    }

    pub(super) fn timing(&self) -> Timing {
        self.timing
    }

    fn wants(&self, label: &Label) -> bool {
        match self.timing {
            Timing::Off => false,
            Timing::Fetches => label.fetches,
            Timing::Operations => true,
        }
    }

    /// What was measured since the last call, in the order of launches.
    pub(super) fn take(&mut self) -> Vec<Timed> {
        self.based = false;
        (self.used, self.pending) = (0, Vec::new());
        std::mem::take(&mut self.done)
    }

    /// Something will be launched, after everything on `stream`.
    pub(super) fn start(&mut self, stream: CUstream) -> Result<()> {
        if self.timing == Timing::Off || self.based {
            return Ok(());
        }
        let base = match self.base {
            Some(base) => base,
            None => *self.base.insert(event()?),
        };
        record(base, stream)?;
        self.based = true;
        Ok(())
    }

    /// Before a launch on `stream`; what it returns goes to [`Timer::end`].
    pub(super) fn begin(&mut self, label: Label, stream: CUstream) -> Result<Option<Pair>> {
        if !self.wants(&label) || self.pending.len() + self.done.len() >= MOST {
            return Ok(None);
        }
        if self.used == self.pairs.len() {
            self.pairs.push(Pair::new(label)?);
        }
        let pair = Pair { label, ..self.pairs[self.used] };
        self.used += 1;
        record(pair.begin, stream)?;
        Ok(Some(pair))
    }

    /// Behind it.
    pub(super) fn end(&mut self, pair: Option<Pair>, stream: CUstream) -> Result<()> {
        let Some(pair) = pair else { return Ok(()) };
        record(pair.end, stream)?;
        self.pending.push(pair);
        Ok(())
    }

    /// Events for a launch of a graph, if it is to be measured. The graph is their owner.
    pub(super) fn pair(&self, label: Label) -> Result<Option<Pair>> {
        if self.wants(&label) { Pair::new(label).map(Some) } else { Ok(None) }
    }

    /// A graph with these launches in it has been launched.
    pub(super) fn launched(&mut self, pairs: &[Pair]) {
        let room = MOST.saturating_sub(self.pending.len() + self.done.len());
        self.pending.extend(&pairs[..pairs.len().min(room)]);
    }

    /// Reads the events of everything that was launched. It has finished.
    pub(super) fn read(&mut self) -> Result<()> {
        let Some(base) = self.base.filter(|_| self.based) else { return Ok(()) };
        for Pair { label: Label { name, lane, fetches }, begin, end } in self.pending.drain(..) {
            let (begin, end) = (seconds(base, begin)?, seconds(base, end)?);
            self.done.push(Timed { name, stream: lane, fetches, begin, end });
        }
        self.used = 0;
        Ok(())
    }

    /// Gives everything back. The context is current.
    pub(super) fn free(&mut self) {
        self.pairs.drain(..).for_each(|pair| pair.destroy());
        self.base.take().into_iter().for_each(destroy);
        self.pending.clear();
    }
}

fn seconds(from: CUevent, to: CUevent) -> Result<f64> {
    let mut milliseconds = 0.0;
    // SAFETY: both events are alive, keep time, and were recorded by work that has finished; writes a local.
    check("read an event", unsafe { sys::cuEventElapsedTime(&mut milliseconds, from, to) }.result())?;
    Ok(f64::from(milliseconds) / 1e3)
}

/// Adds a node that records an event of `pair`: the one before its launch, or the one behind it.
pub(super) fn add_node(graph: CUgraph, pair: &Pair, behind: bool, after: &[CUgraphNode]) -> Result<CUgraphNode> {
    let event = if behind { pair.end } else { pair.begin };
    let mut node = std::ptr::null_mut();
    // SAFETY: the dependencies are nodes of this graph, no two the same; the event is alive as long as the graph runs.
    let added = unsafe { sys::cuGraphAddEventRecordNode(&mut node, graph, after.as_ptr(), after.len(), event) };
    check("build a graph", added.result())?;
    Ok(node)
}
