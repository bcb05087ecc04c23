//! Sequences of launches that were seen before, as CUDA graphs.

use std::ffi::c_void;

use cudarc::driver::result;
use cudarc::driver::sys::{
    self, CUDA_KERNEL_NODE_PARAMS, CUgraph, CUgraphDependencyType_enum, CUgraphEdgeData, CUgraphExec,
    CUgraphInstantiate_flags, CUgraphInstantiate_flags_enum, CUgraphNode, CUlaunchAttributeID, CUlaunchAttributeValue,
};

use super::super::context::check;
use super::super::timer::{self, Pair};
use super::script::{Launch, Script};
use super::{LANES, Queue, priority};
use crate::Result;

/// Graphs that are kept. A step is two; a decoding session needs new ones when its length passes a power of two.
const MOST_GRAPHS: usize = 48;

/// Launches have priorities of their own, not that of the stream which a graph is launched on.
const BY_PRIORITY: CUgraphInstantiate_flags =
    CUgraphInstantiate_flags(CUgraphInstantiate_flags_enum::CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY.0);

/// An edge behind which a kernel begins when all blocks of the one before have let it or have ended
/// (CUDA_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC of cuda.h, which is a macro there).
const EARLY_TYPE: u8 = CUgraphDependencyType_enum::CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC as u8;
const EARLY_PORT: u8 = 1;

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
        let mut ends: [Option<End>; LANES] = [None; LANES];
        let mut pairs = Vec::new();
        let added = (0..self.script.launches.len()).try_for_each(|i| {
            let launch = self.script.launches[i];
            let mut before: Vec<_> = self.script.edges_of(i).iter().map(|&before| nodes[before]).collect();
            let pair = self.timer.pair(self.script.labels[i])?;
            // In the main lane only: blocks of others that wait take room which the step and its gathers need. (And what is
            // measured begins when what is before it has ended.)
            let overlaps = launch.lane == 0 && launch.function.overlaps && pair.is_none() && !self.script.crowded;
            let beside = ends[launch.lane].filter(|end| overlaps && end.overlaps).map(|end| end.node);
            if beside.is_none() {
                before.extend(ends[launch.lane].map(|end| end.node));
            }
            if let Some(pair) = pair {
                pairs.push(pair);
                before = vec![timer::add_node(graph, &pair, false, &before)?];
            }
            let node = add_launch(graph, &launch, &mut self.script.words[launch.params..], &before)?;
            if let Some(beside) = beside {
                let edge = CUgraphEdgeData { from_port: EARLY_PORT, to_port: 0, type_: EARLY_TYPE, reserved: [0; 5] };
                // SAFETY: nodes of the graph, both of kernels, with no other edge between them.
                let added = unsafe { sys::cuGraphAddDependencies_v2(graph, &beside, &node, &edge, 1) };
                check("build a graph", added.result())?;
            }
            nodes.push(node);
            // Other lanes do not wait for what is measured.
            let end = pair.map_or(Ok(node), |pair| timer::add_node(graph, &pair, true, &[node]))?;
            ends[launch.lane] = Some(End { node: end, overlaps });
            Ok(())
        });
        let exec = added.and_then(|()| {
            // SAFETY: `graph` is complete.
            check("instantiate a graph", unsafe { result::graph::instantiate(graph, BY_PRIORITY) })
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

/// The last node of a lane's chain.
#[derive(Clone, Copy)]
struct End {
    node: CUgraphNode,
    /// Whether it is a launch that lets the next one begin, and waits itself. A launch begins early behind such a one only: so
    /// it never begins beside an upload, which may bring what it reads before it waits.
    overlaps: bool,
}

/// Adds a launch to a graph, behind the nodes `before`, of which no two are the same.
fn add_launch(graph: CUgraph, launch: &Launch, params: &mut [u64], before: &[CUgraphNode]) -> Result<CUgraphNode> {
    let mut params = [params.as_mut_ptr().cast::<c_void>()];
    let [x, y, z] = launch.grid;
    let node_params = CUDA_KERNEL_NODE_PARAMS {
        func: launch.function.handle,
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: launch.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: launch.shared,
        kernelParams: params.as_mut_ptr(),
        extra: std::ptr::null_mut(),
        kern: std::ptr::null_mut(),
        ctx: std::ptr::null_mut(),
    };
    let mut node = std::ptr::null_mut();
    // SAFETY: the driver copies the parameters, which are the kernel's, during the call; the dependencies are nodes of this graph.
    let added = unsafe { sys::cuGraphAddKernelNode_v2(&mut node, graph, before.as_ptr(), before.len(), &node_params) };
    check("build a graph", added.result())?;
    let value = CUlaunchAttributeValue { priority: priority(launch.lane) };
    // SAFETY: a kernel's node, and a value of the kind that the attribute takes.
    let set =
        unsafe { sys::cuGraphKernelNodeSetAttribute(node, CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PRIORITY, &value) };
    check("build a graph", set.result())?;
    Ok(node)
}
