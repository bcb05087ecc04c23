//! The one device: its handles, and what it does when somebody waits.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};
use std::time::Instant;

use cudarc::driver::sys::CUresult;
use fastrand::Rng;

use super::memory::{Kind, Memory};
use super::work::{Copy2d, Function, Graph, Launch, Node, Stream, Work};
use crate::machine::{self, Machine};
use crate::ptx::Module;

/// Shared memory of a block: at most, and unless a kernel's attribute is raised.
pub(super) const MOST_SHARED: u32 = 227 << 10;
const USUAL_SHARED: u32 = 48 << 10;

/// Most threads of a block.
const MOST_THREADS: u32 = 1024;

pub(super) const MULTIPROCESSORS: i32 = 16;

pub(super) type Outcome<T = ()> = Result<T, CUresult>;

/// An event: how often a program has asked for it to be recorded, which of those recordings are not done yet (several streams
/// may have one, and come to it in any order), and when it was last.
#[derive(Default)]
pub(super) struct Event {
    pub(super) asked: u64,
    open: BTreeSet<u64>,
    pub(super) when: Option<Instant>,
}

impl Event {
    /// One recording more.
    pub(super) fn ask(&mut self) -> u64 {
        self.asked += 1;
        self.open.insert(self.asked);
        self.asked
    }
}

#[derive(Default)]
pub(super) struct Device {
    next_handle: u64,
    pub(super) memory: Memory,
    /// Modules by their text: one that was read stays.
    texts: HashMap<String, Arc<Module>>,
    pub(super) modules: HashMap<u64, Arc<Module>>,
    pub(super) functions: HashMap<u64, Function>,
    pub(super) streams: HashMap<u64, Stream>,
    pub(super) events: HashMap<u64, Event>,
    pub(super) graphs: HashMap<u64, Graph>,
    pub(super) execs: HashMap<u64, Arc<Graph>>,
    /// Once something has gone wrong, every call says so.
    failed: Option<CUresult>,
    random: Option<Rng>,
    machine: Machine,
}

/// The device, for one call at a time.
pub(super) fn device() -> MutexGuard<'static, Device> {
    static DEVICE: LazyLock<Mutex<Device>> = LazyLock::new(Mutex::default);
    DEVICE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// What chance begins with.
fn seed() -> u64 {
    static SEED: LazyLock<u64> = LazyLock::new(|| {
        let said = std::env::var("EMULATED_CUDA_SEED").ok().and_then(|seed| seed.parse().ok());
        said.unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.map_or(0, |now| now.subsec_nanos().into())
        })
    });
    *SEED
}

/// The device's compute capability.
pub(super) fn capability() -> (i32, i32) {
    let said = std::env::var("EMULATED_CUDA_CAPABILITY").unwrap_or_default();
    let parsed = said.split_once('.').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    parsed.unwrap_or((9, 0))
}

impl Device {
    pub(super) fn handle(&mut self) -> u64 {
        self.next_handle += 1;
        self.next_handle
    }

    pub(super) fn state(&self) -> Outcome {
        self.failed.map_or(Ok(()), Err)
    }

    fn fail<T>(&mut self, code: CUresult, what: &str) -> Outcome<T> {
        eprintln!("emulated CUDA: {what}");
        self.failed = Some(code);
        Err(code)
    }

    fn random(&mut self) -> &mut Rng {
        self.random.get_or_insert_with(|| Rng::with_seed(seed()))
    }

    pub(super) fn load(&mut self, text: &str) -> Outcome<u64> {
        let module = match self.texts.get(text) {
            Some(module) => module.clone(),
            None => {
                let module = Module::read(text).map_err(|error| {
                    eprintln!("emulated CUDA: a module cannot be read: {error}");
                    CUresult::CUDA_ERROR_INVALID_PTX
                })?;
                let module = Arc::new(module);
                if !module.variables.is_empty() {
                    let address = module.variables.as_ptr().expose_provenance() as u64;
                    self.memory.insert(address, std::mem::size_of_val(&*module.variables) as u64, Kind::Module);
                }
                self.texts.insert(text.to_owned(), module.clone());
                module
            }
        };
        let handle = self.handle();
        self.modules.insert(handle, module);
        Ok(handle)
    }

    pub(super) fn function(&mut self, module: u64, name: &str) -> Outcome<u64> {
        let module = self.modules.get(&module).ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)?.clone();
        if !module.has(name) {
            return Err(CUresult::CUDA_ERROR_NOT_FOUND);
        }
        let kernel = module.kernel(name).map_err(|error| {
            eprintln!("emulated CUDA: {name}: {error}");
            CUresult::CUDA_ERROR_INVALID_PTX
        })?;
        let handle = self.handle();
        self.functions.insert(handle, Function { module, kernel, most_dynamic: USUAL_SHARED });
        Ok(handle)
    }

    /// A launch, if the kernel may be launched so.
    pub(super) fn launch(
        &self,
        function: u64,
        grid: [u32; 3],
        threads: [u32; 3],
        dynamic: u32,
        params: impl Fn(usize, usize, &mut [u8]),
    ) -> Outcome<Launch> {
        let function = self.functions.get(&function).ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)?;
        let kernel = &function.kernel;
        let block = threads.iter().product::<u32>();
        let most = kernel.most_threads.unwrap_or(MOST_THREADS).min(MOST_THREADS);
        let fits = dynamic <= function.most_dynamic && dynamic + kernel.shared_bytes as u32 <= MOST_SHARED;
        if grid.contains(&0) || grid[1] > 65535 || grid[2] > 65535 || block == 0 || block > most || !fits {
            eprintln!(
                "emulated CUDA: {} cannot be launched as {grid:?} blocks of {threads:?} threads with {dynamic} bytes more",
                kernel.name
            );
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        let mut bytes = vec![0; kernel.param_bytes];
        for (at, &(offset, size)) in kernel.params.iter().enumerate() {
            params(at, size, &mut bytes[offset..offset + size]);
        }
        let (module, kernel) = (function.module.clone(), kernel.clone());
        Ok(Launch { module, kernel, grid, threads, dynamic, params: bytes })
    }

    pub(super) fn enqueue(&mut self, stream: u64, work: Work) -> Outcome {
        self.state()?;
        self.streams.get_mut(&stream).ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)?.work.push_back(work);
        Ok(())
    }

    /// Works until nothing waits on the stream; on all of them when there is none.
    pub(super) fn synchronize(&mut self, stream: Option<u64>) -> Outcome {
        loop {
            self.state()?;
            let left = match stream {
                Some(stream) => !self.streams.get(&stream).ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)?.work.is_empty(),
                None => self.streams.values().any(|stream| !stream.work.is_empty()),
            };
            if !left {
                return Ok(());
            }
            let mut ready: Vec<u64> = self.streams.iter().filter(|(_, s)| self.may_go_on(s)).map(|(&s, _)| s).collect();
            ready.sort_unstable();
            if ready.is_empty() {
                return self.fail(CUresult::CUDA_ERROR_LAUNCH_TIMEOUT, "streams wait for each other");
            }
            let picked = ready[self.random().usize(..ready.len())];
            let work = self.streams.get_mut(&picked).expect("it is ready").work.pop_front().expect("it has work");
            self.work(work)?;
        }
    }

    fn may_go_on(&self, stream: &Stream) -> bool {
        match stream.work.front() {
            None => false,
            // An event that is gone is waited for no more.
            Some(&Work::Wait(event, times)) => self.events.get(&event).is_none_or(|event| !event.open.contains(&times)),
            Some(_) => true,
        }
    }

    fn work(&mut self, work: Work) -> Outcome {
        match work {
            Work::Launch(launch) => self.execute(&launch, false),
            Work::Copy(copy) => self.copy(copy),
            Work::Put(to, bytes) => {
                if !self.memory.holds(to, bytes.len() as u64) {
                    return self.fail(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, "a copy to where there is no memory");
                }
                // SAFETY: the target is memory that exists, of which the program has said that nothing else uses it.
                unsafe {
                    let to: *mut u8 = std::ptr::with_exposed_provenance_mut(to as usize);
                    to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
                }
                Ok(())
            }
            Work::Record(event, times) => {
                self.record(event, times);
                Ok(())
            }
            Work::Wait(..) => Ok(()),
            Work::Graph(graph) => {
                let random = self.random();
                let Some(order) = graph.order(|n| random.usize(..n)) else {
                    return self.fail(CUresult::CUDA_ERROR_INVALID_VALUE, "a graph whose nodes wait for each other");
                };
                for at in order {
                    match &graph.nodes[at].0 {
                        Node::Launch(launch) => self.execute(launch, graph.early[at])?,
                        Node::Record(event) => {
                            let times = self.events.get_mut(event).map_or(0, Event::ask);
                            self.record(*event, times);
                        }
                    }
                }
                Ok(())
            }
        }
    }

    fn record(&mut self, event: u64, times: u64) {
        if let Some(event) = self.events.get_mut(&event) {
            event.open.remove(&times);
            event.when = Some(Instant::now());
        }
    }

    /// Copies now. Both sides are memory that the device knows, or the program's own while it waits.
    pub(super) fn copy(&mut self, copy: Copy2d) -> Outcome {
        for row in 0..copy.height {
            let (from, to) = (copy.from + row * copy.from_pitch, copy.to + row * copy.to_pitch);
            if !self.memory.holds(from, copy.width) && !self.memory.holds(to, copy.width) {
                return self.fail(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, "a copy of memory that is not there");
            }
            // SAFETY: the device's memory exists, and the program vouches for its own.
            unsafe {
                let from: *const u8 = std::ptr::with_exposed_provenance(from as usize);
                std::ptr::copy(from, std::ptr::with_exposed_provenance_mut(to as usize), copy.width as usize);
            }
        }
        Ok(())
    }

    fn execute(&mut self, launch: &Launch, early: bool) -> Outcome {
        let seed = self.random().u64(..);
        let what = machine::Launch {
            kernel: &launch.kernel,
            params: &launch.params,
            grid: launch.grid,
            threads: launch.threads,
            shared_bytes: launch.kernel.shared_bytes + launch.dynamic as usize,
            memory: &|address, bytes| self.memory.find(address, bytes),
            early,
            seed,
        };
        let host_threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let done = self.machine.run(&what, host_threads);
        done.or_else(|fault| {
            let line = launch.module.line(fault.at);
            let text = format!(
                "{} ({:?} blocks of {:?} threads): {} in block {:?}, in the warp of thread {}, at: {line} (EMULATED_CUDA_SEED={})",
                launch.kernel.name, launch.grid, launch.threads, fault.what, fault.block, fault.thread, self::seed(),
            );
            self.fail(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, &text)
        })
    }
}
