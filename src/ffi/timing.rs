//! Measurements that decode steps take of themselves.

use std::ffi::c_char;

use super::boundary::{guard, handle, path};
use super::error::kva_error;
use super::model::kva_model;
use crate::backend::Timing;
use crate::{Error, Result};

/// Decode steps measure nothing but their whole length.
pub const KVA_TIMING_OFF: i32 = 0;
/// They measure what fetches entries from host memory: `kv_link_seconds` of their sessions' statistics.
pub const KVA_TIMING_FETCHES: i32 = 1;
/// They measure every operation, for `kva_model_write_timeline`; fetches are among them.
pub const KVA_TIMING_OPERATIONS: i32 = 2;

fn timing(value: i32) -> Result<Timing> {
    match value {
        KVA_TIMING_OFF => Ok(Timing::Off),
        KVA_TIMING_FETCHES => Ok(Timing::Fetches),
        KVA_TIMING_OPERATIONS => Ok(Timing::Operations),
        _ => Err(Error::invalid_argument(format!("timing is {value}, which is no KVA_TIMING"))),
    }
}

/// Says what decode steps of a model measure of themselves from now on, one of `KVA_TIMING_...`; at first
/// `KVA_TIMING_OFF`. What is measured costs the step two events an operation, some microseconds.
///
/// Threads: any, many at once; it waits while another thread's step of the model ends.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` (NULL, no `KVA_TIMING`), `KVA_ERROR_UNSUPPORTED` (anything but `KVA_TIMING_OFF`
/// where the device is the processor), `KVA_ERROR_DEVICE`. After an error: nothing has changed.
#[unsafe(no_mangle)]
pub extern "C" fn kva_model_set_timing(model: Option<&kva_model>, timing: i32) -> Option<Box<kva_error>> {
    guard(|| handle(model, "model")?.model.set_timing(self::timing(timing)?))
}

/// Writes when each operation of the model's last decode step began and ended to a file, as JSON in the form of Chrome's
/// trace events: one complete event ("ph": "X") an operation, with microseconds in "ts" and "dur", its stream in "tid",
/// and "fetch" or "compute" in "cat". A file that is there is overwritten.
///
/// A step is replayed as a whole from the third time on that one like it runs; what comes before is launched operation by
/// operation, and slower.
///
/// Threads: any, many at once; it may wait while another thread's step of the model ends.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` (NULL, or nothing was measured since `kva_model_set_timing`), `KVA_ERROR_IO`.
/// After an error: the file may be there in part.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_model_write_timeline(
    model: Option<&kva_model>,
    path: *const c_char,
) -> Option<Box<kva_error>> {
    guard(|| {
        // SAFETY: the caller's promise: NULL, or a string.
        let path = unsafe { self::path(path, "path") }?;
        handle(model, "model")?.model.write_timeline(path)
    })
}
