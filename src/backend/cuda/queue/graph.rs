//! Sequences of launches that were seen before, as CUDA graphs.

use std::ffi::c_void;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUDA_KERNEL_NODE_PARAMS, CUgraphExec, CUgraphInstantiate_flags, CUgraphNode};

use super::super::context::check;
use super::super::timer::{self, Pair};
use super::script::Script;
use super::{LANES, Queue};
use crate::Result;

/// Graphs that are kept. A step is two; a decoding session needs new ones when its length passes a power of two.
const MOST_GRAPHS: usize = 48;

/// A sequence of launches that is replayed.
pub(super) struct Graph {
    script: Script,
    exec: CUgraphExec,
    /// Those of its launches that are measured.
    pairs: Vec<Pair>,
    used: u64,
}

impl Graph {
    /// Gives it back. The context is current.
    pub(super) fn destroy(&self) {
        // SAFETY: made by `instantiate`, destroyed once; a running launch of it keeps what it needs.
        let _ = unsafe { result::graph::exec_destroy(self.exec) };
        self.pairs.iter().for_each(Pair::destroy);
    }
}

impl Queue {
    /// Launches the waiting script as a graph, if it was seen before. Returns whether it did.
    pub(super) fn graph(&mut self) -> Result<bool> {
        self.clock += 1;
        let hash = self.script.hash;
        let known = self.graphs.iter().position(|graph| graph.script.equals(&self.script));
        let at = match known {
            Some(at) => at,
            None if self.seen.contains(&hash) => {
                if self.graphs.len() >= MOST_GRAPHS {
                    let (oldest, _) =
                        self.graphs.iter().enumerate().min_by_key(|(_, g)| g.used).expect("there are some");
                    self.graphs.swap_remove(oldest).destroy();
                }
                let (exec, pairs) = self.instantiate()?;
                self.graphs.push(Graph { script: std::mem::take(&mut self.script), exec, pairs, used: 0 });
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
        self.join()?;
        // SAFETY: the graph names memory that is alive: its parameters equal those of operations enqueued just now.
        check("launch a graph", unsafe { result::graph::launch(self.graphs[at].exec, self.lanes[0].stream) })?;
        self.lanes[1..].iter_mut().for_each(|lane| lane.behind[0] = true);
        self.timer.launched(&self.graphs[at].pairs);
        self.replays += 1;
        Ok(true)
    }

    /// The waiting script as a graph: a chain for each lane, and edges between them. With what is measured of it.
    fn instantiate(&mut self) -> Result<(CUgraphExec, Vec<Pair>)> {
        let mut graph = std::ptr::null_mut();
        // SAFETY: writes a new graph to a local; destroyed below.
        check("make a graph", unsafe { sys::cuGraphCreate(&mut graph, 0) }.result())?;
        let mut nodes: Vec<CUgraphNode> = Vec::with_capacity(self.script.launches.len());
        let mut last: [Option<CUgraphNode>; LANES] = [None; LANES];
        let mut pairs = Vec::new();
        let added = (0..self.script.launches.len()).try_for_each(|i| {
            let launch = self.script.launches[i];
            let edges = self.script.edges_of(i).iter().map(|&before| nodes[before]);
            let mut before: Vec<_> = last[launch.lane].into_iter().chain(edges).collect();
            let pair = self.timer.pair(self.script.labels[i])?;
            if let Some(pair) = pair {
                pairs.push(pair);
                before = vec![timer::add_node(graph, &pair, false, &before)?];
            }
            let mut params = [self.script.words[launch.params..].as_mut_ptr().cast::<c_void>()];
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
            // SAFETY: the driver copies the parameters during the call; the dependencies are nodes of this graph, no two
            // the same: one of the own lane, others of other lanes.
            let added =
                unsafe { sys::cuGraphAddKernelNode(&mut node, graph, before.as_ptr(), before.len(), &node_params) };
            check("build a graph", added.result())?;
            nodes.push(node);
            // Other lanes do not wait for what is measured.
            last[launch.lane] = Some(match pair {
                Some(pair) => timer::add_node(graph, &pair, true, &[node])?,
                None => node,
            });
            Ok(())
        });
        let exec = added.and_then(|()| {
            // SAFETY: `graph` is complete.
            check("instantiate a graph", unsafe { result::graph::instantiate(graph, CUgraphInstantiate_flags(0)) })
        });
        // SAFETY: made above, destroyed once.
        let _ = unsafe { result::graph::destroy(graph) };
        match exec {
            Ok(exec) => Ok((exec, pairs)),
            Err(error) => {
                pairs.iter().for_each(Pair::destroy);
                Err(error)
            }
        }
    }
}
