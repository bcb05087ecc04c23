//! Requests on a few threads that block in `preadv` and `pwritev`.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

use super::io::{Done, Io, Request};
use crate::{Error, ErrorCode, Result};

/// Enough to keep a drive busy with reads of a block; they block in the kernel and take no processor.
const THREADS: usize = 8;

pub(super) struct Threads {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    file: Arc<File>,
    state: Mutex<State>,
    /// For workers: something is queued, or they are to stop.
    queued: Condvar,
    /// For the caller: something has completed.
    completed: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Request>,
    running: usize,
    done: Vec<Done>,
    stop: bool,
}

impl Threads {
    pub(super) fn new(file: &Arc<File>) -> Result<Threads> {
        let shared = Arc::new(Shared {
            file: Arc::clone(file),
            state: Mutex::default(),
            queued: Condvar::new(),
            completed: Condvar::new(),
        });
        let mut threads = Threads { shared, workers: Vec::new() };
        for i in 0..THREADS {
            let shared = Arc::clone(&threads.shared);
            let spawned = std::thread::Builder::new().name(format!("kvahead-file-{i}")).spawn(move || shared.work());
            // On failure the drop of `threads` joins those that did start.
            threads.workers.push(spawned.map_err(|e| {
                Error::new(ErrorCode::OutOfMemory, format!("cannot start thread {i} of {THREADS} for file reads: {e}"))
            })?);
        }
        Ok(threads)
    }
}

impl Shared {
    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            if state.stop {
                return;
            }
            let Some(request) = state.queue.pop_front() else {
                self.queued.wait(&mut state);
                continue;
            };
            state.running += 1;
            drop(state);
            let result = run(&self.file, &request);
            state = self.state.lock();
            state.running -= 1;
            state.done.push((request, result));
            self.completed.notify_one();
        }
    }
}

fn run(file: &File, request: &Request) -> io::Result<usize> {
    let (fd, count) = (file.as_raw_fd(), request.parts.len() as libc::c_int);
    let (parts, offset) = (request.parts.as_ptr(), request.offset as libc::off_t);
    // SAFETY: the array has `count` parts, whose memory the submitter keeps for this request alone until it is reaped.
    let moved = unsafe {
        if request.write { libc::pwritev(fd, parts, count, offset) } else { libc::preadv(fd, parts, count, offset) }
    };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

impl Io for Threads {
    fn submit(&mut self, requests: Vec<Request>) -> io::Result<()> {
        self.shared.state.lock().queue.extend(requests);
        self.shared.queued.notify_all();
        Ok(())
    }

    fn reap(&mut self, wait: bool, done: &mut Vec<Done>) -> io::Result<()> {
        let mut state = self.shared.state.lock();
        while wait && state.done.is_empty() && (state.running > 0 || !state.queue.is_empty()) {
            self.shared.completed.wait(&mut state);
        }
        done.append(&mut state.done);
        Ok(())
    }

    fn drain(&mut self) -> bool {
        let mut state = self.shared.state.lock();
        state.queue.clear();
        while state.running > 0 {
            self.shared.completed.wait(&mut state);
        }
        state.done.clear();
        true
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.state.lock().stop = true;
        self.shared.queued.notify_all();
        for worker in self.workers.drain(..) {
            // A worker has nothing that could panic but a lock.
            let _ = worker.join();
        }
    }
}
