//! Where cache files lie.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::backend::Backend;
use crate::speculate::Speculation;
use crate::{Error, Result};

use super::Format;

/// The folders that a cache file may lie in, the preferred one first. None: nothing is read or written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Folders(Vec<PathBuf>);

impl Folders {
    /// By option: the folder that was asked for, and no other; an empty path for no cache at all. Without the option,
    /// the model's own folder, then `kvahead` in the user's cache folder (`$XDG_CACHE_HOME`, or `~/.cache`).
    ///
    /// `model` is the path of a GGUF file or of a checkpoint's folder; `None` for a model without files.
    pub fn new(option: Option<&Path>, model: Option<&Path>) -> Folders {
        let variable = |name| std::env::var_os(name).map(PathBuf::from);
        Folders::of(option, model, variable("XDG_CACHE_HOME"), variable("HOME"))
    }

    pub(in crate::speculate) fn of(
        option: Option<&Path>,
        model: Option<&Path>,
        cache: Option<PathBuf>,
        home: Option<PathBuf>,
    ) -> Folders {
        match option {
            Some(folder) if folder.as_os_str().is_empty() => Folders::default(),
            Some(folder) => Folders(vec![folder.to_path_buf()]),
            None => {
                let beside = model.map(|path| match path.is_dir() {
                    true => path.to_path_buf(),
                    // The parent of a bare file name is the empty path.
                    false => match path.parent() {
                        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
                        _ => PathBuf::from("."),
                    },
                });
                // The specification wants relative paths to be ignored.
                let absolute = |path: &PathBuf| path.is_absolute();
                let cache = cache.filter(absolute).or(home.filter(absolute).map(|home| home.join(".cache")));
                Folders(beside.into_iter().chain(cache.map(|cache| cache.join("kvahead"))).collect())
            }
        }
    }

    /// The folders.
    pub fn paths(&self) -> &[PathBuf] {
        &self.0
    }

    /// Products from the first folder that has a valid file; `rejected` hears of every file that is not.
    pub fn load(
        &self,
        format: &Format,
        backend: &Arc<dyn Backend>,
        rejected: &mut dyn FnMut(&Path, &Error),
    ) -> Option<Speculation> {
        self.0.iter().find_map(|folder| {
            let path = folder.join(format.file_name());
            match open(&path) {
                Ok(None) => None,
                Ok(Some((mut file, length))) => {
                    format.read(backend, length, &mut file).map_err(|error| rejected(&path, &error)).ok()
                }
                Err(error) => {
                    rejected(&path, &error);
                    None
                }
            }
        })
    }

    /// Writes products to the first folder that takes them, and returns the file; an error, about the last folder, when
    /// none does. `None` when there is no folder.
    pub fn save(&self, format: &Format, backend: &dyn Backend, speculation: &Speculation) -> Result<Option<PathBuf>> {
        let mut result = Ok(None);
        for folder in &self.0 {
            let path = folder.join(format.file_name());
            match write(folder, &path, |file| format.write(backend, speculation, file)) {
                Ok(()) => return Ok(Some(path)),
                Err(error) => result = Err(Error::io(&path, "write it", &error)),
            }
        }
        result
    }
}

/// A regular file and its size; `None` where there is no such file.
fn open(path: &Path) -> Result<Option<(File, u64)>> {
    // Not blocking, should it be a FIFO.
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(path, "open it", &error)),
    };
    let metadata = file.metadata().map_err(|error| Error::io(path, "read its size", &error))?;
    if !metadata.is_file() {
        return Err(Error::invalid_format(path, "not a regular file"));
    }
    Ok(Some((file, metadata.len())))
}

/// Writes a file so that other processes, and this one after a crash, see all of it or what was there before.
fn write(
    folder: &Path,
    path: &Path,
    content: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> std::io::Result<()> {
    /// Tells files of one process apart.
    static COUNT: AtomicU64 = AtomicU64::new(0);
    fs::create_dir_all(folder)?;
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let temporary = folder.join(format!(".kvahead-{}-{number}.tmp", std::process::id()));
    // A file of this name is left from a process that had the same id and is gone.
    let _ = fs::remove_file(&temporary);
    let file = OpenOptions::new().write(true).create_new(true).open(&temporary)?;
    let mut file = BufWriter::with_capacity(1 << 20, file);
    let result = content(&mut file)
        .and_then(|()| file.flush())
        .and_then(|()| file.get_ref().sync_all())
        .and_then(|()| fs::rename(&temporary, path));
    if result.is_err() {
        let _ = fs::remove_file(&temporary);
        return result;
    }
    // The rename itself; a file system that cannot do this has done what it can.
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
    Ok(())
}
