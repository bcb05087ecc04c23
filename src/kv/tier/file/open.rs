//! Making the file.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::kv::FileOptions;
use crate::{Error, ErrorCode, Result};

/// A new file of some length.
pub(super) struct Opened {
    pub file: File,
    /// Its path, or that of its folder where it has no name: for messages.
    pub path: PathBuf,
    /// Whether reads and writes go around the page cache.
    pub direct: bool,
}

/// Makes the file, `bytes` long. On an error none is left behind, and one that was there before is untouched.
pub(super) fn open(options: &FileOptions, bytes: u64) -> Result<Opened> {
    let (file, path, linked) = match &options.path {
        Some(path) => {
            let file = named(path).map_err(|e| match e.kind() {
                ErrorKind::AlreadyExists => Error::invalid_argument(format!(
                    "{}: the file for keys and values exists already; choose a path that does not",
                    path.display()
                )),
                _ => Error::io(path, "create the file for keys and values", &e),
            })?;
            (file, path.clone(), true)
        }
        None => {
            let folder = std::env::temp_dir();
            let (file, name) =
                nameless(&folder).map_err(|e| Error::io(&folder, "create a file for keys and values in it", &e))?;
            (file, name.clone().unwrap_or(folder), name.is_some())
        }
    };
    let allocated = allocate(&file, &path, bytes);
    if linked && (allocated.is_err() || !options.keep) {
        // A name that cannot be removed is no reason to fail: the file is ours, and works.
        let _ = std::fs::remove_file(&path);
    }
    allocated?;
    let direct = !options.buffered && direct(&file);
    Ok(Opened { file, path, direct })
}

fn named(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// A file without a name in `folder`, or with one that is still to be removed.
fn nameless(folder: &Path) -> io::Result<(File, Option<PathBuf>)> {
    #[cfg(target_os = "linux")]
    if let Ok(file) = OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(folder) {
        return Ok((file, None));
    }
    // Not every file system has nameless files.
    let mut taken = io::Error::from(ErrorKind::AlreadyExists);
    for attempt in 0..100 {
        let path = folder.join(format!("kvahead-{}-{attempt}.kv", std::process::id()));
        match named(&path) {
            Ok(file) => return Ok((file, Some(path))),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => taken = e,
            Err(e) => return Err(e),
        }
    }
    Err(taken)
}

/// Reserves the bytes, so that a full disk is an error now and not in the middle of a text.
fn allocate(file: &File, path: &Path, bytes: u64) -> Result<()> {
    let refused = |e: io::Error| match e.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Error::new(
            ErrorCode::Capacity,
            format!("{}: there is no room for the {bytes} bytes of keys and values: {e}", path.display()),
        ),
        _ => Error::io(path, &format!("reserve {bytes} bytes"), &e),
    };
    // Past the process's limit the kernel would not only refuse but send a signal that ends the process.
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a place for the answer.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &mut limit) } == 0;
    if known && limit.rlim_cur != libc::RLIM_INFINITY && bytes > limit.rlim_cur {
        return Err(refused(io::Error::from_raw_os_error(libc::EFBIG)));
    }
    #[cfg(target_os = "linux")]
    {
        let length = libc::off64_t::try_from(bytes).map_err(|_| refused(io::Error::from_raw_os_error(libc::EFBIG)))?;
        loop {
            // SAFETY: the descriptor is open.
            if unsafe { libc::fallocate64(file.as_raw_fd(), 0, 0, length) } == 0 {
                return Ok(());
            }
            let e = io::Error::last_os_error();
            match e.raw_os_error() {
                Some(libc::EINTR) => continue,
                Some(libc::EOPNOTSUPP | libc::ENOSYS) => break, // a hole of that length must do
                _ => return Err(refused(e)),
            }
        }
    }
    file.set_len(bytes).map_err(refused)
}

/// Switches to direct I/O; whether that works here.
#[cfg(target_os = "linux")]
fn direct(file: &File) -> bool {
    use super::pages::ALIGN;
    let fd = file.as_raw_fd();
    // Not at opening: where it is unsupported, that fails after the file has been made.
    // SAFETY: the descriptor is open; these commands take and give flags.
    let set = |on: bool| unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        let flags = if on { flags | libc::O_DIRECT } else { flags & !libc::O_DIRECT };
        libc::fcntl(fd, libc::F_SETFL, flags) == 0
    };
    #[repr(align(4096))]
    struct Block([u8; ALIGN]);
    let mut block = Block([0; ALIGN]);
    // Some file systems take the flag and refuse the read.
    // SAFETY: the block is writable for its length.
    let works =
        set(true) && unsafe { libc::pread(fd, block.0.as_mut_ptr().cast(), ALIGN, 0) } == ALIGN as libc::ssize_t;
    works || {
        set(false);
        false
    }
}

/// Direct I/O is asked for in other ways elsewhere.
#[cfg(not(target_os = "linux"))]
fn direct(_: &File) -> bool {
    false
}
