//! The driver, a device of it, and its primary context.
//!
//! The driver is opened when a backend is first asked for, never linked: one library serves machines with and without
//! a GPU. The primary context is the one that CUDA's runtime uses too, so device pointers of an embedding program and
//! ours live side by side; a calling thread's own current context is put back after every operation.

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdevice_attribute_enum as Attribute, CUresult};

use crate::{Error, ErrorCode, Result};

/// The compute capability that the kernels are compiled for, and the lowest that runs them.
const LOWEST_CAPABILITY: (i32, i32) = (8, 0);

/// What the driver said, as an error of what was being done.
pub(super) fn check<T>(doing: &str, result: std::result::Result<T, DriverError>) -> Result<T> {
    result.map_err(|error| {
        let code = match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => ErrorCode::OutOfMemory,
            _ => ErrorCode::Device,
        };
        let name = error.error_name().map_or_else(|_| format!("{:?}", error.0), |name| name.to_string_lossy().into());
        let text = error.error_string().map_or_else(|_| String::new(), |text| format!(" ({})", text.to_string_lossy()));
        Error::new(code, format!("CUDA cannot {doing}: {name}{text}"))
    })
}

fn no_device(message: impl Into<String>) -> Error {
    Error::new(ErrorCode::Device, message)
}

/// A device with its primary context retained.
pub(super) struct Context {
    device: CUdevice,
    context: CUcontext,
    /// The device's name and compute capability.
    pub(super) name: String,
    pub(super) capability: (i32, i32),
    /// Most bytes of shared memory that a block may ask for.
    pub(super) shared_bytes: usize,
    pub(super) multiprocessors: usize,
}

// SAFETY: a context handle may be used from every thread that makes it current, which `enter` does; the rest is data.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Opens device `ordinal`. Errors, all of them `Device`: no driver, no such device, one that is too old.
    pub(super) fn new(ordinal: i32) -> Result<Context> {
        // cudarc panics in its first call when there is no driver, so that is asked before.
        // SAFETY: opening the driver library runs its initialisers, which are the driver's own and expect to be loaded so.
        if !unsafe { sys::is_culib_present() } {
            return Err(no_device("there is no CUDA driver on this machine (libcuda.so.1 cannot be loaded)"));
        }
        check("initialise its driver", result::init())?;
        let count = check("count its devices", result::device::get_count())?;
        if ordinal < 0 || ordinal >= count {
            return Err(no_device(format!("CUDA device {ordinal} does not exist: the driver shows {count} devices")));
        }
        let device = check("open the device", result::device::get(ordinal))?;
        // SAFETY: `device` was returned by the driver just now.
        let attribute = |which| check("describe the device", unsafe { result::device::get_attribute(device, which) });
        let name = check("name the device", result::device::get_name(device))?;
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < LOWEST_CAPABILITY {
            return Err(no_device(format!(
                "{name} has compute capability {}.{}; kvahead needs {}.{} or later",
                capability.0, capability.1, LOWEST_CAPABILITY.0, LOWEST_CAPABILITY.1
            )));
        }
        let shared_bytes = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize;
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        // SAFETY: `device` is valid; the context is released once, in `drop`.
        let context = check("make a context", unsafe { result::primary_ctx::retain(device) })?;
        Ok(Context { device, context, name, capability, shared_bytes, multiprocessors })
    }

    /// Makes the context current on this thread until the guard is dropped.
    pub(super) fn enter(&self) -> Result<Entered> {
        let mut current = std::ptr::null_mut();
        // SAFETY: writes the current context, which may be null, to a local.
        check("tell its context", unsafe { sys::cuCtxGetCurrent(&mut current) }.result())?;
        let pushed = current != self.context;
        if pushed {
            // SAFETY: the context is retained as long as `self` lives.
            check("enter its context", unsafe { sys::cuCtxPushCurrent_v2(self.context) }.result())?;
        }
        Ok(Entered { pushed })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once in `new`. An error (a driver that is shutting down) leaves nothing to do.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// Puts the thread's own context back.
pub(super) struct Entered {
    pushed: bool,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = std::ptr::null_mut();
            // SAFETY: pops what `enter` pushed on this thread: the guard is not Send, for it holds nothing that moves.
            let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut popped) };
        }
    }
}
