//! Requests through io_uring.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};

use super::io::{Done, Io, Request};

/// Requests in the kernel at a time: those of a step's fetch of one layer, so that none waits for the next call. More
/// would not make a drive faster.
const DEPTH: usize = 1024;

pub(super) struct Ring {
    ring: IoUring,
    file: Arc<File>,
    /// In the kernel, by token. Their parts stay where they are until the kernel has answered.
    running: HashMap<u64, Request>,
    waiting: VecDeque<Request>,
}

impl Ring {
    /// Errors where the kernel has no io_uring or forbids it (seccomp, `kernel.io_uring_disabled`).
    pub(super) fn new(file: Arc<File>) -> io::Result<Ring> {
        Ok(Ring { ring: IoUring::new(DEPTH as u32)?, file, running: HashMap::new(), waiting: VecDeque::new() })
    }

    /// Moves what waits into the kernel, as far as there is room.
    fn fill(&mut self) -> io::Result<()> {
        let fd = types::Fd(self.file.as_raw_fd());
        while self.running.len() < DEPTH {
            let Some(request) = self.waiting.pop_front() else { break };
            let entry = entry(fd, &request).user_data(request.token);
            // SAFETY: the file is open as long as `self`; the array of parts lies on the heap and moves with its owner into
            // `running` unchanged, until the completion is reaped; the memory they name is the submitter's promise.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            if pushed.is_err() {
                // The queue is as long as DEPTH, and entries leave it when they are submitted below.
                self.waiting.push_front(request);
                break;
            }
            self.running.insert(request.token, request);
        }
        match self.ring.submit() {
            Err(e) if !transient(&e) => Err(e),
            // What the kernel did not take stays in the queue for the next call.
            _ => Ok(()),
        }
    }
}

fn entry(fd: types::Fd, request: &Request) -> squeue::Entry {
    let (parts, count) = (request.parts.as_ptr(), request.parts.len() as u32);
    match (request.write, &request.parts[..]) {
        (false, [one]) => opcode::Read::new(fd, one.iov_base.cast(), one.iov_len as u32).offset(request.offset).build(),
        (true, [one]) => {
            opcode::Write::new(fd, one.iov_base.cast_const().cast(), one.iov_len as u32).offset(request.offset).build()
        }
        (false, _) => opcode::Readv::new(fd, parts, count).offset(request.offset).build(),
        (true, _) => opcode::Writev::new(fd, parts, count).offset(request.offset).build(),
    }
}

/// Errors of entering the kernel that say "again", not "no".
fn transient(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

impl Io for Ring {
    fn submit(&mut self, requests: Vec<Request>) -> io::Result<()> {
        self.waiting.extend(requests);
        self.fill()
    }

    fn reap(&mut self, wait: bool, done: &mut Vec<Done>) -> io::Result<()> {
        let before = done.len();
        loop {
            for entry in self.ring.completion() {
                if let Some(request) = self.running.remove(&entry.user_data()) {
                    let result = entry.result();
                    let result =
                        if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result as usize) };
                    done.push((request, result));
                }
            }
            if !self.waiting.is_empty() {
                self.fill()?;
            }
            if !wait || done.len() > before || self.running.is_empty() {
                return Ok(());
            }
            match self.ring.submit_and_wait(1) {
                Err(e) if !transient(&e) => return Err(e),
                _ => {}
            }
        }
    }

    fn drain(&mut self) -> bool {
        self.waiting.clear();
        let mut done = Vec::new();
        while !self.running.is_empty() {
            if self.reap(true, &mut done).is_err() {
                return false;
            }
        }
        true
    }
}
