//! Fewer cases where each takes long.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Whether tests are to be brief, for tools under which a kernel takes a hundred times as long (`tests/gpu/run.sh sanitize`,
/// `tests/emulator/run.sh`).
pub fn brief() -> bool {
    std::env::var_os("KVAHEAD_TEST_BRIEF").is_some()
}

/// All cases, or where tests are to be brief one in four of them, others from call to call, and one at least.
pub fn some<T>(cases: impl IntoIterator<Item = T>) -> impl Iterator<Item = T> {
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    let cases: Vec<T> = cases.into_iter().collect();
    let (first, step) =
        if brief() { (CALLS.fetch_add(1, Ordering::Relaxed) % cases.len().clamp(1, 4), 4) } else { (0, 1) };
    cases.into_iter().skip(first).step_by(step)
}
