//! A warp: its registers, where its lanes are, and what they do next.
//!
//! Lanes that stand at the same instruction take it together. Those furthest behind go first, so lanes that part meet again
//! where their ways do; at an instruction that names lanes, those that are there wait for the others.

use std::collections::VecDeque;

use super::{Fault, LANES, Launch, Space};
use crate::ptx::{Instruction, Kernel, NONE, Op, Register, Special};

/// Why a warp does not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    Barrier,
    Exit,
}

/// All lanes.
pub(super) const ALL: u32 = u32::MAX;

/// Behind every instruction.
const NOWHERE: u32 = u32::MAX;

/// What an instruction's execution comes to.
pub(super) type Step<T> = Result<T, String>;

/// 16 bytes or so on their way into shared memory.
#[derive(Clone, Copy)]
pub(super) struct Copy16 {
    pub(super) to: u32,
    pub(super) from: u64,
    pub(super) bytes: u8,
    /// How many of them are read; the rest are zeros.
    pub(super) real: u8,
}

pub(super) struct Warp {
    pub(super) words: Vec<[u32; LANES]>,
    pub(super) doubles: Vec<[u64; LANES]>,
    pub(super) predicates: Vec<u32>,
    pub(super) carry: u32,
    /// Lanes that take the instruction `at`.
    pub(super) lanes: u32,
    at: u32,
    /// Lanes that have not ended; where those that are not among `lanes` are, and the first such place.
    pub(super) live: u32,
    places: [u32; LANES],
    next: u32,
    /// Lanes that wait for others at an instruction that names them.
    waiting: u32,
    /// The lanes that lived when all of them waited.
    stalled: u32,
    /// Copies on their way, and groups of them that are complete, oldest first.
    pub(super) copies: Vec<Copy16>,
    pub(super) groups: VecDeque<Vec<Copy16>>,
    /// Whether it has waited for the launch before.
    pub(super) waited: bool,
    /// The range of memory that was accessed last.
    pub(super) recent: (u64, u64),
    first_thread: u32,
}

impl Warp {
    pub(super) fn new(kernel: &Kernel) -> Warp {
        let mut warp = Warp {
            words: vec![[0; LANES]; kernel.words],
            doubles: vec![[0; LANES]; kernel.doubles],
            predicates: vec![0; kernel.predicates],
            carry: 0,
            lanes: 0,
            at: 0,
            live: 0,
            places: [0; LANES],
            next: NOWHERE,
            waiting: 0,
            stalled: 0,
            copies: Vec::new(),
            groups: VecDeque::new(),
            waited: false,
            recent: (0, 0),
            first_thread: 0,
        };
        for &(register, value) in &kernel.word_constants {
            warp.words[usize::from(register)] = [value; LANES];
        }
        for &(register, value) in &kernel.double_constants {
            warp.doubles[usize::from(register)] = [value; LANES];
        }
        for &(register, value) in &kernel.predicate_constants {
            warp.predicates[usize::from(register)] = if value { ALL } else { 0 };
        }
        warp
    }

    /// The `number`-th warp of a block, at its first instruction. Registers keep what they held: constants, which nothing
    /// writes, and what a kernel that reads one before it writes it deserves.
    pub(super) fn begin(&mut self, launch: &Launch<'_>, space: &Space, number: usize) {
        let kernel = launch.kernel;
        let first = (number * LANES) as u32;
        let [x, y, z] = launch.threads;
        for &(register, special) in &kernel.specials {
            let values = &mut self.words[usize::from(register)];
            match special {
                Special::Thread(axis) => {
                    for (value, thread) in values.iter_mut().zip(first..) {
                        *value = if y * z == 1 {
                            if axis == 0 { thread } else { 0 }
                        } else {
                            [thread % x, thread / x % y, thread / x / y][axis]
                        };
                    }
                }
                Special::Threads(axis) => values.fill(launch.threads[axis]),
                Special::Block(axis) => values.fill(space.index[axis]),
                Special::Blocks(axis) => values.fill(launch.grid[axis]),
                Special::Lane => values.iter_mut().zip(0..).for_each(|(value, lane)| *value = lane),
            }
        }
        if let Some(register) = kernel.local_base {
            let bytes = kernel.local_bytes.next_multiple_of(16) as u64;
            self.doubles[usize::from(register)] =
                std::array::from_fn(|lane| space.local_base() + (u64::from(first) + lane as u64) * bytes);
        }
        let threads = x * y * z - first;
        self.live = if threads >= LANES as u32 { ALL } else { (1 << threads) - 1 };
        (self.lanes, self.at, self.next) = (self.live, 0, NOWHERE);
        (self.waiting, self.stalled, self.carry) = (0, 0, 0);
        self.copies.clear();
        self.groups.clear();
        self.waited = false;
        self.recent = (0, 0);
        self.first_thread = first;
    }

    /// Goes on until a barrier or the end.
    pub(super) fn run(&mut self, launch: &Launch<'_>, space: &mut Space) -> Result<Stop, Fault> {
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
                // SAFETY: the machine has these instructions.
                return unsafe { self.run_wide(launch, space) };
            }
        }
        self.run_any(launch, space)
    }

    /// The same, compiled for wide registers.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,popcnt,lzcnt,bmi1,bmi2")]
    fn run_wide(&mut self, launch: &Launch<'_>, space: &mut Space) -> Result<Stop, Fault> {
        self.run_any(launch, space)
    }

    #[inline(always)]
    fn run_any(&mut self, launch: &Launch<'_>, space: &mut Space) -> Result<Stop, Fault> {
        let code = &launch.kernel.code[..];
        loop {
            if self.lanes == 0 && !self.switch() {
                if self.live == 0 {
                    self.arrive(space, launch, None).map_err(|what| self.fault(what, space, 0))?;
                    return Ok(Stop::Exit);
                }
                let at = code[self.places[self.live.trailing_zeros() as usize] as usize].at;
                return Err(self.fault("lanes wait for each other at different places".to_owned(), space, at));
            }
            let instruction = &code[self.at as usize];
            let mut mask = self.guarded(instruction);
            match instruction.op {
                Op::Branch => {
                    self.branch(mask, instruction.offset as u32);
                    continue;
                }
                Op::Exit => {
                    self.live &= !mask;
                    self.lanes &= !mask;
                    if self.lanes != 0 {
                        self.advance();
                    }
                    continue;
                }
                // (A barrier that not all threads reach waits for ever on a device; here those that ended do not count,
                // as there.)
                Op::Barrier => {
                    if !self.together(self.live) {
                        continue;
                    }
                    self.advance();
                    return Ok(Stop::Barrier);
                }
                _ if mask == 0 => {}
                Op::WarpBarrier | Op::Shuffle(_) | Op::Vote(_) => {
                    let named = self.named(instruction, mask);
                    if !self.together(named & self.live) {
                        continue;
                    }
                    mask = self.guarded(instruction);
                }
                Op::LoadMatrices { .. } | Op::TransposeMatrix | Op::Mma { .. } => {
                    if !self.together(self.live) {
                        continue;
                    }
                    mask = self.guarded(instruction);
                    if mask != ALL {
                        return Err(self.fault("takes all lanes of a warp".to_owned(), space, instruction.at));
                    }
                }
                _ => {}
            }
            if mask != 0 {
                self.execute(instruction, mask, launch, space)
                    .map_err(|what| self.fault(what, space, instruction.at))?;
            }
            self.advance();
        }
    }

    fn fault(&self, what: String, space: &Space, at: u32) -> Fault {
        Fault { what, at, block: space.index, thread: self.first_thread }
    }

    /// The lanes here that an instruction's guard lets take part.
    #[inline(always)]
    fn guarded(&self, instruction: &Instruction) -> u32 {
        if instruction.guard == NONE {
            return self.lanes;
        }
        let guard = self.predicates[usize::from(instruction.guard)];
        self.lanes & if instruction.negated { !guard } else { guard }
    }

    /// The lanes that a shuffle, a vote or a barrier names: the last of what it reads.
    fn named(&self, instruction: &Instruction, mask: u32) -> u32 {
        let last = match instruction.op {
            Op::Shuffle(_) => 3,
            Op::Vote(_) => 1,
            _ => 0,
        };
        let register: Register = instruction.from[last];
        self.words[usize::from(register)][mask.trailing_zeros() as usize]
    }

    /// The next instruction, with the lanes that are there already.
    #[inline(always)]
    fn advance(&mut self) {
        self.at += 1;
        if self.at >= self.next {
            self.meet();
        }
    }

    fn meet(&mut self) {
        if self.at == self.next {
            self.join();
        } else {
            self.leave();
        }
    }

    /// Puts the lanes where they are, for others go first.
    fn leave(&mut self) {
        for lane in lanes_of(self.lanes) {
            self.places[lane] = self.at;
        }
        self.lanes = 0;
    }

    /// Takes the lanes along that stand here.
    fn join(&mut self) {
        for lane in lanes_of(self.live & !self.lanes & !self.waiting) {
            if self.places[lane] == self.at {
                self.lanes |= 1 << lane;
            }
        }
        self.find_next();
    }

    fn find_next(&mut self) {
        let others = self.live & !self.lanes & !self.waiting;
        self.next = lanes_of(others).fold(NOWHERE, |least, lane| least.min(self.places[lane]));
    }

    /// The lanes furthest behind go on. False if none can.
    fn switch(&mut self) -> bool {
        if self.live & !self.waiting == 0 {
            if self.live == 0 || self.stalled == self.live {
                return false;
            }
            // Some may have ended meanwhile: whoever waits looks again, once.
            (self.stalled, self.waiting) = (self.live, 0);
        }
        self.find_next();
        self.at = self.next;
        self.join();
        true
    }

    fn branch(&mut self, mask: u32, target: u32) {
        let others = self.lanes & !mask;
        if others == 0 {
            self.at = target;
        } else if mask == 0 {
            self.at += 1;
        } else {
            // Two groups: written down, and the one behind goes first.
            for lane in lanes_of(mask) {
                self.places[lane] = target;
            }
            for lane in lanes_of(others) {
                self.places[lane] = self.at + 1;
            }
            self.lanes = 0;
            return;
        }
        if self.at >= self.next {
            self.meet();
        }
    }

    /// Whether all the lanes that are needed stand here. Otherwise those that do wait, and are not among the lanes any more.
    fn together(&mut self, needed: u32) -> bool {
        // Those that wait here already.
        for lane in lanes_of(self.waiting) {
            if self.places[lane] == self.at {
                self.waiting &= !(1 << lane);
                self.lanes |= 1 << lane;
            }
        }
        if needed & !self.lanes == 0 {
            self.stalled = 0;
            return true;
        }
        self.waiting |= self.lanes;
        self.leave();
        false
    }
}

/// The lanes of a mask, in ascending order.
#[inline(always)]
pub(super) fn lanes_of(mask: u32) -> LanesOf {
    LanesOf(mask)
}

pub(super) struct LanesOf(u32);

impl Iterator for LanesOf {
    type Item = usize;

    #[inline(always)]
    fn next(&mut self) -> Option<usize> {
        if self.0 == 0 {
            return None;
        }
        let lane = self.0.trailing_zeros() as usize;
        self.0 &= self.0 - 1;
        Some(lane)
    }
}
