//! What waits to be done: streams of it, and graphs.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::ptx::{Kernel, Module};

/// A kernel that a program knows by its handle.
pub(super) struct Function {
    pub(super) module: Arc<Module>,
    pub(super) kernel: Arc<Kernel>,
    /// The most shared memory that a launch may add.
    pub(super) most_dynamic: u32,
}

/// A kernel with what it is launched with.
#[derive(Clone)]
pub(super) struct Launch {
    pub(super) module: Arc<Module>,
    pub(super) kernel: Arc<Kernel>,
    pub(super) grid: [u32; 3],
    pub(super) threads: [u32; 3],
    pub(super) dynamic: u32,
    pub(super) params: Vec<u8>,
}

/// Rows of bytes that are copied.
#[derive(Clone, Copy)]
pub(super) struct Copy2d {
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) from_pitch: u64,
    pub(super) to_pitch: u64,
    pub(super) width: u64,
    pub(super) height: u64,
}

/// Something that a stream does.
pub(super) enum Work {
    Launch(Box<Launch>),
    Copy(Copy2d),
    /// Bytes that were taken from the program when it called.
    Put(u64, Vec<u8>),
    /// The event's so-manieth recording.
    Record(u64, u64),
    /// Until the event has been recorded so many times.
    Wait(u64, u64),
    Graph(Arc<Graph>),
}

/// Work in order.
#[derive(Default)]
pub(super) struct Stream {
    pub(super) work: VecDeque<Work>,
}

/// A node of a graph.
#[derive(Clone)]
pub(super) enum Node {
    Launch(Launch),
    Record(u64),
}

/// Nodes, and the nodes that each comes after.
#[derive(Clone, Default)]
pub(super) struct Graph {
    pub(super) nodes: Vec<(Node, Vec<usize>)>,
    /// Of launches: whether one may begin before the one that it comes after has ended.
    pub(super) early: Vec<bool>,
}

impl Graph {
    pub(super) fn add(&mut self, node: Node, after: Vec<usize>) -> usize {
        self.nodes.push((node, after));
        self.early.push(false);
        self.nodes.len() - 1
    }

    /// An order that its edges allow, picked by `pick` among so many; `None` if there is none.
    pub(super) fn order(&self, mut pick: impl FnMut(usize) -> usize) -> Option<Vec<usize>> {
        let mut waits: Vec<usize> = self.nodes.iter().map(|(_, after)| after.len()).collect();
        let mut behind = vec![Vec::new(); self.nodes.len()];
        for (at, (_, after)) in self.nodes.iter().enumerate() {
            after.iter().for_each(|&before| behind[before].push(at));
        }
        let mut ready: Vec<usize> = (0..waits.len()).filter(|&at| waits[at] == 0).collect();
        let mut order = Vec::with_capacity(waits.len());
        while !ready.is_empty() {
            let at = ready.swap_remove(pick(ready.len()));
            order.push(at);
            for &next in &behind[at] {
                waits[next] -= 1;
                if waits[next] == 0 {
                    ready.push(next);
                }
            }
        }
        (order.len() == self.nodes.len()).then_some(order)
    }
}
