//! Batches: one decode step of several sessions.

use super::boundary::{OutSlice, guard, handle, slice};
use super::error::kva_error;
use super::session::kva_session;
use crate::engine::{Session, decode_batch};
use crate::{Error, Result};

/// One decode step of `count` sessions (at least one) of one model, each given once: appends `tokens[i]` to
/// `sessions[i]` and computes the logits after it.
///
/// The weights are read once for all sessions. Each session's results are the same, bit for bit, as those of
/// `kva_session_decode`. The logits are kept in the sessions; if `logits` is not NULL, row i of it gets those of
/// `sessions[i]`: `logits_len` must be `count` times the model's `vocabulary_size`.
///
/// Ownership: all memory is the caller's; nothing is kept. Threads: any; all the sessions are busy during the call.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` (NULL anywhere, no sessions, a session given twice, sessions of different
/// models, a token outside the vocabulary, a wrong `logits_len`), `KVA_ERROR_BUSY` (any of the sessions),
/// `KVA_ERROR_CANCELLED` (any of them), `KVA_ERROR_CAPACITY`, `KVA_ERROR_OUT_OF_MEMORY`.
/// After an error: every session is as it was before the call, and nothing was written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_batch_decode(
    sessions: *const *mut kva_session,
    tokens: *const u32,
    count: usize,
    logits: *mut f32,
    logits_len: usize,
) -> Option<Box<kva_error>> {
    guard(|| {
        // SAFETY: the arguments are as documented. An optional reference is laid out as the pointer that C passes, NULL
        // being `None`.
        let (sessions, tokens, mut out) = unsafe {
            (
                slice(sessions.cast::<Option<&kva_session>>(), count, "sessions")?,
                slice(tokens, count, "tokens")?,
                OutSlice::new(logits, logits_len, "logits")?,
            )
        };
        let sessions: Vec<&kva_session> = sessions
            .iter()
            .enumerate()
            .map(|(i, session)| handle(*session, &format!("sessions[{i}]")))
            .collect::<Result<_>>()?;
        check_distinct(&sessions)?;
        let mut locks: Vec<_> = sessions
            .iter()
            .enumerate()
            .map(|(i, session)| session.lock(&format!("sessions[{i}]")))
            .collect::<Result<_>>()?;
        let vocabulary = locks.first().map_or(0, |session| session.model().config().vocabulary);
        let expected = vocabulary.saturating_mul(count);
        out.check_length(expected, "logits", "count times the model's vocabulary_size")?;
        let mut batch: Vec<&mut Session> = locks.iter_mut().map(|lock| &mut **lock).collect();
        decode_batch(&mut batch, tokens)?;
        for (i, session) in batch.iter().enumerate() {
            out.write(i * vocabulary, session.logits()?);
        }
        Ok(())
    })
}

/// A session given twice would find itself busy; say what is really wrong.
fn check_distinct(sessions: &[&kva_session]) -> Result<()> {
    let mut order: Vec<usize> = (0..sessions.len()).collect();
    order.sort_by_key(|&i| (&raw const *sessions[i], i));
    match order.windows(2).find(|pair| std::ptr::eq(sessions[pair[0]], sessions[pair[1]])) {
        Some(pair) => Err(Error::invalid_argument(format!(
            "sessions[{}] and sessions[{}] are the same session",
            pair[0], pair[1]
        ))),
        None => Ok(()),
    }
}
