//! Sessions: one sequence each, used by one call at a time.

use std::ffi::c_char;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use super::boundary::{Out, OutSlice, guard, guard_void, handle, slice};
use super::error::kva_error;
use super::model::{KVA_DTYPE_AUTO, dtype, kva_model};
use super::options::{self, Options, OutStruct, sized32};
use super::policy::{
    KVA_EVICTION_OFF, KVA_KV_PAYLOAD_EXACT, KVA_KV_TIER_DEVICE, KVA_POLICY_FULL, kva_infinigen_options, policy_options,
};
use crate::engine::{Control, Session, SessionOptions};
use crate::policy::{Budget, PolicyOptions};
use crate::{Error, ErrorCode, Result};

/// One sequence of tokens and its KV.
///
/// It keeps its model alive. Used by one thread at a time: while a call is in progress, every other call returns
/// `KVA_ERROR_BUSY` and changes nothing, except those documented for any thread at any time: `kva_session_cancel`,
/// `kva_session_clear_cancel`, `kva_session_length`, `kva_session_capacity`.
pub struct kva_session {
    session: Mutex<Session>,
    /// The session's own; outside the lock, for the calls that may come at any time.
    control: Arc<Control>,
    capacity: usize,
}

/// How to create a session. Fill it with `kva_session_options_init`, then change fields.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kva_session_options {
    /// Set by `kva_session_options_init`.
    pub struct_size: u32,
    /// What each layer attends, one of `KVA_POLICY_...`. Default: `KVA_POLICY_FULL`.
    pub policy: i32,
    /// Type of keys and values in memory, one of `KVA_DTYPE_...`. Default: `KVA_DTYPE_AUTO`, the type of the
    /// weights.
    pub kv_dtype: i32,
    /// Tokens of a prompt that are computed at once, which bounds scratch memory; 0 (the default) for 512, on a
    /// GPU 4096.
    pub prefill_chunk: u32,
    /// Most tokens that the session may hold; 0 (the default) for the model's context length. KV memory is taken as
    /// the session grows.
    pub capacity: u64,
    /// Where the policy keeps the KV that it does not hold on the device, one of `KVA_KV_TIER_...`. Default:
    /// `KVA_KV_TIER_DEVICE`.
    pub kv_tier: i32,
    /// How KV is stored there, one of `KVA_KV_PAYLOAD_...`. Default: `KVA_KV_PAYLOAD_EXACT`.
    pub kv_payload: i32,
    /// `KVA_KV_TIER_FILE`: `KVA_KV_FILE_...` flags, combined with `|`. Default: 0.
    pub kv_file_flags: u32,
    /// `KVA_POLICY_INFINIGEN`: what happens when there is no more room for KV, one of `KVA_EVICTION_...`. Default:
    /// `KVA_EVICTION_OFF`.
    ///
    /// With eviction the session holds as many tokens as there is room for (`pool_tokens`), and each KV head of each
    /// layer loses one for each new one; first tokens and window stay. The resident layers lose none: their room, for
    /// `capacity` tokens, is taken at once. A prompt's tokens past the pool are decoded one by one.
    pub eviction: i32,
    /// `KVA_POLICY_WINDOW` and `KVA_POLICY_H2O`: tokens to attend, sinks included, as a share of those that the session
    /// holds, above 0 and at most 1; not looked at where `budget_tokens` is not 0. Default: 0.2.
    pub budget_share: f32,
    /// `KVA_POLICY_WINDOW`: first tokens, always attended. Default: 4.
    pub sinks: u32,
    /// In place of `budget_share`, a number of tokens; 0 (the default) for the share.
    pub budget_tokens: u64,
    /// `KVA_POLICY_INFINIGEN`: most tokens that the session keeps KV of, in each layer and KV head; 0 (the default) for as
    /// many as there is room for: below `kv_limit_bytes` of the model, and `kv_file_limit_bytes`. Eviction begins here, or
    /// sooner where there is no room; without it, a step that would pass it is a `KVA_ERROR_CAPACITY` before it begins.
    pub pool_tokens: u64,
    /// `KVA_KV_TIER_FILE`: most bytes of the file; 0 (the default) for what `capacity` needs.
    pub kv_file_limit_bytes: u64,
    /// `KVA_KV_TIER_FILE`: the file, made anew for the session; one that exists is an error. NULL (the default): a
    /// nameless file in the system's temporary folder.
    pub kv_file_path: *const c_char,
    /// Settings of `KVA_POLICY_INFINIGEN`; NULL (the default) for the defaults of `KVA_INFINIGEN_DEFAULT`.
    pub infinigen: *const kva_infinigen_options,
    /// A file to write what was speculated, selected, hit, missed and fetched to; NULL (the default) for none.
    /// docs/policies.md describes it.
    pub trace_path: *const c_char,
    /// `KVA_POLICY_WINDOW`: first layers, whose tokens are all attended, as those of `KVA_POLICY_INFINIGEN` are; 0 for
    /// StreamingLLM as published. Default: 2.
    pub resident_layers: u64,
}

sized32!(kva_session_options, versions: [capacity: u64, trace_path: *const c_char, resident_layers: u64]);

impl Options for kva_session_options {
    fn defaults() -> Self {
        let policy = PolicyOptions::default();
        let Budget::Share(budget_share) = policy.budget else { unreachable!("the default is a share") };
        kva_session_options {
            struct_size: size_of::<Self>() as u32,
            policy: KVA_POLICY_FULL,
            kv_dtype: KVA_DTYPE_AUTO,
            prefill_chunk: 0,
            capacity: 0,
            kv_tier: KVA_KV_TIER_DEVICE,
            kv_payload: KVA_KV_PAYLOAD_EXACT,
            kv_file_flags: 0,
            eviction: KVA_EVICTION_OFF,
            budget_share,
            sinks: policy.sinks as u32,
            budget_tokens: 0,
            pool_tokens: 0,
            kv_file_limit_bytes: 0,
            kv_file_path: std::ptr::null(),
            infinigen: std::ptr::null(),
            trace_path: std::ptr::null(),
            resident_layers: policy.resident_layers as u64,
        }
    }
}

/// Counts and times of a session since it was created or since the last reset, and the KV it holds now. Set
/// `struct_size` to `sizeof(kva_statistics)` before the call that fills it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kva_statistics {
    /// `sizeof(kva_statistics)`, set by the caller.
    pub struct_size: u32,
    /// Always 0.
    pub reserved: u32,
    /// Tokens that were appended by prefill, score or a generation's prompt.
    pub prefill_tokens: u64,
    /// Seconds that took.
    pub prefill_seconds: f64,
    /// Tokens that were appended by decode, in batches or by generate.
    pub decode_tokens: u64,
    /// Seconds that took; a batch counts whole for each of its sessions.
    pub decode_seconds: f64,
    /// Tokens that were sampled.
    pub sampled_tokens: u64,
    /// Seconds that took.
    pub sample_seconds: f64,
    /// Bytes of KV held in device memory (main memory, where the device is the processor).
    pub kv_device_bytes: u64,
    /// Bytes of KV held in pinned host memory.
    pub kv_pinned_bytes: u64,
    /// Bytes of KV held in files.
    pub kv_file_bytes: u64,
    /// Decode steps. This and what follows is what the policy did in them; an entry is the key and value of one token
    /// of one KV head of one layer.
    pub kv_steps: u64,
    /// Entries of past tokens that the policy selected (or attended, if it does not select), over speculated layers.
    pub kv_selected: u64,
    /// Entries of past tokens that there were, over speculated layers.
    pub kv_candidates: u64,
    /// Entries that were attended, over all layers.
    pub kv_attended: u64,
    /// Entries that full attention would have attended, over all layers.
    pub kv_held: u64,
    /// Selected entries that were on the device already.
    pub kv_hits: u64,
    /// Selected entries that were not, and were fetched.
    pub kv_misses: u64,
    /// Bytes fetched from host memory.
    pub kv_host_fetched_bytes: u64,
    /// Bytes fetched from files, as the entries need them.
    pub kv_file_fetched_bytes: u64,
    /// Bytes really read from files: whole blocks, and the gaps between entries.
    pub kv_file_read_bytes: u64,
    /// Seconds that reads from files were in flight.
    pub kv_read_seconds: f64,
    /// Seconds that steps stood still for them.
    pub kv_wait_seconds: f64,
    /// Entries overwritten because there was no more room.
    pub kv_evicted: u64,
    /// Selected entries that a correction has added (`kva_infinigen_options.correct`).
    pub kv_corrected: u64,
    /// Seconds of decode steps in which entries were on their way from host memory, where that is measured
    /// (`kva_model_set_timing`); a batch counts whole for each of its sessions.
    pub kv_link_seconds: f64,
    /// Of `kv_device_bytes`, those of the speculation index.
    pub kv_index_bytes: u64,
    /// Of `kv_device_bytes`, those of the hot cache and its tables.
    pub kv_cache_bytes: u64,
    /// Bytes of scratch memory that the session's model holds in device memory (main memory, where the device is the
    /// processor), once for all its sessions.
    pub scratch_bytes: u64,
    /// Bytes of scratch memory that it holds in pinned host memory.
    pub scratch_pinned_bytes: u64,
}

sized32!(kva_statistics, versions: [kv_file_bytes: u64, kv_evicted: u64, scratch_pinned_bytes: u64]);

/// Options as the engine takes them.
///
/// # Safety
///
/// As [`options::read`], and what the fields point to is as documented there.
pub(super) unsafe fn session_options(pointer: *const kva_session_options) -> Result<SessionOptions> {
    // SAFETY: the caller's promise.
    let given = unsafe { options::read(pointer, "options") }?;
    given.unknown?;
    let options = given.value;
    Ok(SessionOptions {
        // SAFETY: the caller's promise.
        policy: unsafe { policy_options(&options) }?,
        capacity: usize::try_from(options.capacity).unwrap_or(usize::MAX),
        prefill_chunk: options.prefill_chunk as usize,
        kv_dtype: dtype(options.kv_dtype, "options.kv_dtype")?,
    })
}

/// Takes a lock that nobody waits for. One that a panic has broken is never given out again: what it guards may be
/// half done.
pub(super) fn try_lock<'a, T>(mutex: &'a Mutex<T>, what: &str) -> Result<MutexGuard<'a, T>> {
    mutex.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => Error::new(ErrorCode::Busy, format!("{what} is busy with another call")),
        TryLockError::Poisoned(_) => Error::new(
            ErrorCode::Internal,
            format!("{what} was left unusable by an internal error; it may only be freed"),
        ),
    })
}

impl kva_session {
    /// The session, for one call.
    pub(super) fn lock(&self, name: &str) -> Result<MutexGuard<'_, Session>> {
        try_lock(&self.session, name)
    }
}

/// A session that must be there, for one call.
///
/// Functions that change a session take it as `*mut`, because a C programmer reads `const` that way; to Rust it is
/// always shared, and its lock is what may change.
///
/// # Safety
///
/// `session` is NULL or a session that is not freed as long as the result lives.
pub(super) unsafe fn lock<'a>(session: *const kva_session) -> Result<MutexGuard<'a, Session>> {
    // SAFETY: the caller's promise; sessions are made by `Box`, so it is aligned.
    handle(unsafe { session.as_ref() }, "session")?.lock("session")
}

/// Fills `options` with the defaults.
///
/// Ownership: `options` is the caller's; the library keeps no reference. Threads: any.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` for NULL or for a `struct_size` that is not `sizeof(kva_session_options)`
/// of some version.
/// After an error: nothing was written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_session_options_init(
    options: *mut kva_session_options,
    struct_size: usize,
) -> Option<Box<kva_error>> {
    guard(|| {
        // SAFETY: the caller's promise: NULL, or `struct_size` bytes.
        unsafe { options::initialise(options, struct_size, "options") }
    })
}

/// Creates an empty session of a model. `options` may be NULL for the defaults.
///
/// Ownership: `*session` is the caller's, freed with `kva_session_free`; it keeps the model alive. Threads: any,
/// many at once.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` (NULL, an unknown enum value, a number out of its range, a `capacity` above the
/// model's context length), `KVA_ERROR_UNSUPPORTED` (a policy, tier or payload that do not go together),
/// `KVA_ERROR_OUT_OF_MEMORY`, `KVA_ERROR_IO` (the KV file or the trace).
/// After an error: `*session` is unchanged and nothing is held.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_session_create(
    model: Option<&kva_model>,
    options: *const kva_session_options,
    session: *mut *mut kva_session,
) -> Option<Box<kva_error>> {
    guard(|| {
        let model = &handle(model, "model")?.model;
        // SAFETY: the arguments are as documented.
        let (options, out) = unsafe { (session_options(options)?, Out::new(session, "session")?) };
        let session = Session::new(model, &options)?;
        let (control, capacity) = (session.control().clone(), session.capacity());
        out.write(Box::into_raw(Box::new(kva_session { session: Mutex::new(session), control, capacity })));
        Ok(())
    })
}

/// Frees a session, and gives its KV back to the model.
///
/// Ownership: takes `session`, which must not be used afterwards, nor by a call still in progress (a callback of
/// that call included); NULL is allowed.
/// Threads: any, once. Errors: none.
#[unsafe(no_mangle)]
pub extern "C" fn kva_session_free(session: Option<Box<kva_session>>) {
    guard_void(|| drop(session));
}

/// Number of tokens that a session holds; 0 for NULL.
///
/// Threads: any, at any time, also while a call is in progress: then what the session held after its last complete
/// step. Errors: none.
#[unsafe(no_mangle)]
pub extern "C" fn kva_session_length(session: Option<&kva_session>) -> usize {
    session.map_or(0, |session| session.control.length())
}

/// Most tokens that a session may hold; 0 for NULL.
///
/// Threads: any, at any time. Errors: none.
#[unsafe(no_mangle)]
pub extern "C" fn kva_session_capacity(session: Option<&kva_session>) -> usize {
    session.map_or(0, |session| session.capacity)
}

/// The tokens that a session holds, in order: writes them to `tokens` and their number to `*count`.
///
/// With `tokens` NULL and `capacity` 0 they are only counted.
///
/// Ownership: all memory is the caller's; nothing is kept. Threads: any, one at a time.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` (NULL, or a `capacity` that is too small), `KVA_ERROR_BUSY`. After an
/// error: nothing was written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_session_get_tokens(
    session: Option<&kva_session>,
    tokens: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> Option<Box<kva_error>> {
    guard(|| {
        let session = handle(session, "session")?.lock("session")?;
        // SAFETY: the arguments are as documented.
        let (mut out, count) = unsafe { (OutSlice::new(tokens, capacity, "tokens")?, Out::new(count, "count")?) };
        let tokens = session.tokens();
        out.check_room(tokens.len(), "tokens", "tokens")?;
        out.write(0, tokens);
        count.write(tokens.len());
        Ok(())
    })
}

/// Forgets every token from position `length` on. Unless `length` is the session's own, its logits are forgotten
/// too: prefill or decode before the next sample.
///
/// Threads: any, one at a time.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` (NULL, or a `length` above what the session holds), `KVA_ERROR_UNSUPPORTED` (the
/// policy has dropped, or evicted, entries that the shorter sequence would have), `KVA_ERROR_BUSY`. After an error: the
/// session is as it was.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_session_truncate(session: *mut kva_session, length: usize) -> Option<Box<kva_error>> {
    // SAFETY: the caller's promise: NULL, or a session.
    guard(|| unsafe { lock(session) }?.truncate(length))
}

/// Appends `count` tokens (at least one) and computes the logits after the last of them.
///
/// The logits are kept in the session for `kva_session_sample`; if `logits` is not NULL they are written there too:
/// `logits_len` must be the model's `vocabulary_size`. Logits are what the model's head gives, neither scaled nor
/// normalised.
///
/// Ownership: all memory is the caller's; nothing is kept. Threads: any, one at a time.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` (NULL, no tokens, a token outside the vocabulary, a wrong `logits_len`),
/// `KVA_ERROR_CAPACITY` (the session or the model's `kv_limit_bytes` is full), `KVA_ERROR_OUT_OF_MEMORY`,
/// `KVA_ERROR_CANCELLED`, `KVA_ERROR_BUSY`.
/// After an error: the session is as it was before the call, and nothing was written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_session_prefill(
    session: *mut kva_session,
    tokens: *const u32,
    count: usize,
    logits: *mut f32,
    logits_len: usize,
) -> Option<Box<kva_error>> {
    guard(|| {
        // SAFETY: the arguments are as documented.
        let mut session = unsafe { lock(session) }?;
        // SAFETY: as above.
        let (tokens, mut out) =
            unsafe { (slice(tokens, count, "tokens")?, OutSlice::new(logits, logits_len, "logits")?) };
        out.check_length(session.model().config().vocabulary, "logits", "the model's vocabulary_size")?;
        session.prefill(tokens)?;
        out.write(0, session.logits()?);
        Ok(())
    })
}

/// Fills an empty session with `count` tokens of id 0 whose keys and values are random numbers from `seed`; nothing is
/// computed, and the logits are zeros. For measuring decode at lengths whose prefill would take too long: what is decoded
/// afterwards means nothing.
///
/// Threads: any, one at a time. Errors: `KVA_ERROR_INVALID_ARGUMENT` (NULL, no tokens, a session that is not empty), else
/// as `kva_session_prefill`. After an error: the session is as it was before the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_session_fill(
    session: *mut kva_session,
    count: usize,
    seed: u64,
) -> Option<Box<kva_error>> {
    guard(|| {
        // SAFETY: the caller's promise: NULL, or a session.
        unsafe { lock(session) }?.fill(count, seed)
    })
}

/// Appends `count` tokens (at least one), as `kva_session_prefill`, and writes to `log_probabilities[i]` the
/// natural logarithm of the probability of `tokens[i]` after everything before it. The first token of an empty
/// session has nothing before it: its place gets NaN.
///
/// `log_probabilities` has `count` places. The mean of their negatives is the text's negative log likelihood per
/// token.
///
/// Ownership: all memory is the caller's; nothing is kept. Threads: any, one at a time.
/// Errors: as `kva_session_prefill`; also `KVA_ERROR_INVALID_ARGUMENT` for a session that has tokens but, after a
/// truncation, no logits.
/// After an error: the session is as it was before the call, and nothing was written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_session_score(
    session: *mut kva_session,
    tokens: *const u32,
    count: usize,
    log_probabilities: *mut f32,
) -> Option<Box<kva_error>> {
    guard(|| {
        // SAFETY: the arguments are as documented.
        let mut session = unsafe { lock(session) }?;
        // SAFETY: as above.
        let (tokens, mut out) =
            unsafe { (slice(tokens, count, "tokens")?, OutSlice::new(log_probabilities, count, "log_probabilities")?) };
        // Not straight into the caller's memory: nothing is written on failure, and it may be uninitialised.
        let mut scores = vec![f32::NAN; count];
        session.score(tokens, &mut scores)?;
        out.write(0, &scores);
        Ok(())
    })
}

/// Appends one token and computes the logits after it: one decode step.
///
/// `logits` and `logits_len` as in `kva_session_prefill`. To decode several sessions together, which is faster, use
/// `kva_batch_decode`; the results are the same, bit for bit.
///
/// Ownership: all memory is the caller's; nothing is kept. Threads: any, one at a time.
/// Errors: as `kva_session_prefill`. After an error: the session is as it was before the call, and nothing was
/// written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_session_decode(
    session: *mut kva_session,
    token: u32,
    logits: *mut f32,
    logits_len: usize,
) -> Option<Box<kva_error>> {
    guard(|| {
        // SAFETY: the arguments are as documented.
        let mut session = unsafe { lock(session) }?;
        // SAFETY: as above.
        let mut out = unsafe { OutSlice::new(logits, logits_len, "logits") }?;
        out.check_length(session.model().config().vocabulary, "logits", "the model's vocabulary_size")?;
        session.decode(token)?;
        out.write(0, session.logits()?);
        Ok(())
    })
}

/// Writes the logits after the session's last token to `logits`; `logits_len` must be the model's `vocabulary_size`. They
/// are those that the last prefill, score or decode computed.
///
/// Ownership: all memory is the caller's; nothing is kept. Threads: any, one at a time.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` (NULL, a wrong `logits_len`, or a session without logits: an empty one, or one
/// that was truncated since), `KVA_ERROR_BUSY`. After an error: nothing was written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_session_get_logits(
    session: Option<&kva_session>,
    logits: *mut f32,
    logits_len: usize,
) -> Option<Box<kva_error>> {
    guard(|| {
        let session = handle(session, "session")?.lock("session")?;
        // SAFETY: the arguments are as documented.
        let mut out = unsafe { OutSlice::new(logits, logits_len, "logits") }?;
        if out.is_absent() {
            return Err(Error::invalid_argument("logits is NULL"));
        }
        out.check_length(session.model().config().vocabulary, "logits", "the model's vocabulary_size")?;
        out.write(0, session.logits()?);
        Ok(())
    })
}

/// Asks the call in progress on a session to stop; within one layer it returns `KVA_ERROR_CANCELLED`. If no call is
/// in progress, the next prefill, score, decode or generate does. Either way that call consumes the request.
///
/// NULL is allowed. Threads: any, at any time, also from a signal handler or from a callback. Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_session_cancel(session: *mut kva_session) {
    // SAFETY: the caller's promise: NULL, or a session.
    if let Some(session) = unsafe { session.as_ref() } {
        session.control.cancel();
    }
}

/// Takes a cancellation back that no call has consumed yet, for a session that is to go on. NULL is allowed.
///
/// Threads: any, at any time. Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_session_clear_cancel(session: *mut kva_session) {
    // SAFETY: the caller's promise: NULL, or a session.
    if let Some(session) = unsafe { session.as_ref() } {
        session.control.clear();
    }
}

/// Says what a session has done, how long it took, and how much KV it holds.
///
/// Ownership: nothing is kept. Threads: any, one at a time.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` (NULL, or a wrong `statistics->struct_size`), `KVA_ERROR_BUSY`. After an
/// error: `*statistics` is unchanged.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_session_get_statistics(
    session: Option<&kva_session>,
    statistics: *mut kva_statistics,
) -> Option<Box<kva_error>> {
    guard(|| {
        let mut session = handle(session, "session")?.lock("session")?;
        // SAFETY: the caller's promise: NULL, or a struct as long as it says.
        let out = unsafe { OutStruct::new(statistics, "statistics") }?;
        let counters = session.kv_counters()?;
        let scratch = session.model().scratch()?;
        let (statistics, kv, parts) = (session.statistics(), session.kv_bytes(), session.device_parts());
        out.write(kva_statistics {
            struct_size: 0,
            reserved: 0,
            prefill_tokens: statistics.prefill_tokens,
            prefill_seconds: statistics.prefill_seconds,
            decode_tokens: statistics.decode_tokens,
            decode_seconds: statistics.decode_seconds,
            sampled_tokens: statistics.sampled_tokens,
            sample_seconds: statistics.sample_seconds,
            kv_device_bytes: kv.device as u64,
            kv_pinned_bytes: kv.pinned as u64,
            kv_file_bytes: kv.file as u64,
            kv_steps: counters.steps,
            kv_selected: counters.selected,
            kv_candidates: counters.candidates,
            kv_attended: counters.attended,
            kv_held: counters.held,
            kv_hits: counters.hits,
            kv_misses: counters.misses,
            kv_host_fetched_bytes: counters.host_bytes,
            kv_file_fetched_bytes: counters.file_bytes,
            kv_file_read_bytes: counters.file_read_bytes,
            kv_read_seconds: counters.read_seconds,
            kv_wait_seconds: counters.wait_seconds,
            kv_evicted: counters.evicted,
            kv_corrected: counters.corrected,
            kv_link_seconds: statistics.link_seconds,
            kv_index_bytes: parts.index as u64,
            kv_cache_bytes: parts.cache as u64,
            scratch_bytes: scratch.device as u64,
            scratch_pinned_bytes: scratch.pinned as u64,
        });
        Ok(())
    })
}

/// Sets a session's counts and times to zero.
///
/// Threads: any, one at a time. Errors: `KVA_ERROR_INVALID_ARGUMENT` (NULL), `KVA_ERROR_BUSY`. After an error:
/// nothing has changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_session_reset_statistics(session: *mut kva_session) -> Option<Box<kva_error>> {
    guard(|| {
        // SAFETY: the caller's promise: NULL, or a session.
        unsafe { lock(session) }?.reset_statistics()
    })
}
