//! What a caller's callback is given, and the promise to free it exactly once.

use std::ffi::c_void;

/// Called once when kvahead needs a callback's `user_data` no more; from whichever thread that happens in.
///
/// It must not call back into kvahead, and must not throw or `longjmp`.
pub type kva_free_callback = Option<unsafe extern "C" fn(user_data: *mut c_void)>;

/// A caller's data, freed when dropped. Make one as soon as the options can be read, before anything can fail.
pub(super) struct UserData {
    pointer: *mut c_void,
    free: kva_free_callback,
}

// SAFETY: the header asks that callbacks (and with them their data) may be called from any thread where it says so (log
// lines and the freeing of a model's data); all other uses stay on the thread of the call that was given the data.
unsafe impl Send for UserData {}
// SAFETY: as for `Send`: only the log callback is shared, and the header says that several threads may call it at once.
unsafe impl Sync for UserData {}

impl UserData {
    pub(super) fn new(pointer: *mut c_void, free: kva_free_callback) -> UserData {
        UserData { pointer, free }
    }

    pub(super) fn pointer(&self) -> *mut c_void {
        self.pointer
    }
}

impl Drop for UserData {
    fn drop(&mut self) {
        if let Some(free) = self.free {
            // SAFETY: the function and its argument came from one caller together, and this is the only call.
            unsafe { free(self.pointer) }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::ffi::boundary::guard;

    unsafe extern "C" fn count(user_data: *mut c_void) {
        // SAFETY: the tests pass a counter.
        unsafe { &*user_data.cast::<AtomicU32>() }.fetch_add(1, Ordering::Relaxed);
    }

    #[test]
    fn freed_exactly_once_on_every_path() {
        let counter = AtomicU32::new(0);
        let data = || UserData::new((&raw const counter).cast_mut().cast(), Some(count));
        drop(data());
        assert_eq!(counter.load(Ordering::Relaxed), 1);
        let moved = data();
        assert!(guard(move || Err(crate::Error::unsupported(format!("with {:?}", moved.pointer())))).is_some());
        assert_eq!(counter.load(Ordering::Relaxed), 2);
        let moved = data();
        assert!(guard(move || panic!("while holding {:?}", moved.pointer())).is_some());
        assert_eq!(counter.load(Ordering::Relaxed), 3);
        drop(UserData::new(std::ptr::null_mut(), None));
        assert_eq!(counter.load(Ordering::Relaxed), 3);
    }
}
