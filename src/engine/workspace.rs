//! The scratch memory of a step: allocated once per model, grown to the largest step seen, bounded by the chunk size.

use crate::Result;
use crate::backend::{Backend, Buffer, DType, Place, Rows, RowsMut, Stream};

use super::forward::Dimensions;
use super::timeline::Measured;

/// One named buffer of rows of a fixed width.
pub(super) struct Slot {
    purpose: &'static str,
    width: usize,
    dtype: DType,
    buffer: Option<Buffer>,
    rows: usize,
}

impl Slot {
    fn new(purpose: &'static str, width: usize, dtype: DType) -> Slot {
        Slot { purpose, width, dtype, buffer: None, rows: 0 }
    }

    /// Makes room for `rows` rows. The old content is lost.
    fn reserve(&mut self, backend: &dyn Backend, rows: usize) -> Result<()> {
        if rows > self.rows {
            self.buffer = None;
            self.rows = 0;
            self.buffer = Some(backend.allocate(self.bytes(rows), Place::Device, self.purpose)?);
            self.rows = rows;
        }
        Ok(())
    }

    fn bytes(&self, rows: usize) -> usize {
        rows.saturating_mul(self.width * self.dtype.bytes())
    }

    /// The first `rows` rows.
    pub(super) fn get(&self, rows: usize) -> Rows<'_> {
        self.buffer.as_ref().expect("reserved before use").rows(self.dtype, rows, self.width)
    }

    /// The first `rows` rows, for writing.
    pub(super) fn get_mut(&mut self, rows: usize) -> RowsMut<'_> {
        self.buffer.as_mut().expect("reserved before use").rows_mut(self.dtype, rows, self.width)
    }

    /// Fills the first rows from host values; `values` is `rows × width` elements.
    pub(super) fn upload<T: Copy>(&mut self, backend: &dyn Backend, stream: &Stream, values: &[T]) -> Result<()> {
        // SAFETY: `T` is u32 or f32 here (plain data without padding), and the byte view covers exactly `values`.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), std::mem::size_of_val(values)) };
        backend.upload(stream, bytes, self.buffer.as_mut().expect("reserved before use"), 0)
    }
}

/// Every intermediate of a step.
pub(super) struct Workspace {
    pub(super) stream: Stream,
    /// Beside it: what is fetched for a layer while the one before is computed.
    pub(super) fetch: Stream,
    pub(super) measured: Measured,
    /// Beside both: what finds that out, so that it is known when the fetch before ends.
    pub(super) ahead: Stream,
    /// Token ids.
    pub(super) tokens: Slot,
    /// Positions of the tokens.
    pub(super) positions: Slot,
    /// Rows of the learned position table.
    pub(super) lookups: Slot,
    /// Cosines and sines.
    pub(super) rotation: Slot,
    /// The embedding, where its width is not the hidden width.
    pub(super) embedded: Slot,
    /// The residual stream.
    pub(super) hidden: Slot,
    /// The normalised input of attention or MLP.
    pub(super) normed: Slot,
    /// Queries, keys and values side by side.
    pub(super) qkv: Slot,
    /// Queries of the coming layer, guessed.
    pub(super) predicted: Slot,
    /// The same in the basis of the index.
    pub(super) partial: Slot,
    /// One row of input of the coming layer's norm.
    pub(super) renormalised: Slot,
    /// Attention output, all heads.
    pub(super) attended: Slot,
    /// First half of the MLP.
    pub(super) up: Slot,
    /// Activated.
    pub(super) activated: Slot,
    /// The rows that go through the head, after the final norm.
    pub(super) selected: Slot,
    /// The same in the embedding's width, where it is not the hidden width.
    pub(super) projected: Slot,
    /// Logits.
    pub(super) logits: Slot,
    /// The tokens whose log probabilities are wanted.
    pub(super) targets: Slot,
    /// Log probabilities.
    pub(super) scores: Slot,
}

/// What attention or MLP reads: the normalised state, or the residual stream itself in post-norm models.
#[derive(Clone, Copy, Debug)]
pub(super) enum Input {
    Normed,
    Hidden,
}

impl Input {
    /// Picks it. Two arguments rather than the workspace, so that the caller may write its other slots meanwhile.
    pub(super) fn of<'a>(self, hidden: &'a Slot, normed: &'a Slot) -> &'a Slot {
        match self {
            Input::Normed => normed,
            Input::Hidden => hidden,
        }
    }
}

impl Workspace {
    pub(super) fn new(backend: &dyn Backend, d: &Dimensions) -> Result<Workspace> {
        let a = backend.activation();
        let stream = backend.stream()?;
        Ok(Workspace {
            fetch: backend.side_stream(&stream)?,
            ahead: backend.side_stream(&stream)?,
            stream,
            measured: Measured::default(),
            tokens: Slot::new("token ids", 1, DType::U32),
            positions: Slot::new("positions", 1, DType::U32),
            lookups: Slot::new("position rows", 1, DType::U32),
            rotation: Slot::new("rotation table", d.rotary, DType::F32),
            embedded: Slot::new("embedding", if d.embedding == d.hidden { 0 } else { d.embedding }, a),
            hidden: Slot::new("hidden state", d.hidden, a),
            normed: Slot::new("normalised hidden state", d.hidden, a),
            qkv: Slot::new("queries, keys and values", d.qkv, a),
            predicted: Slot::new("predicted queries", d.heads * d.head_dim, a),
            partial: Slot::new("partial queries", d.heads * d.head_dim, a),
            renormalised: Slot::new("renormalised hidden state", d.hidden, a),
            attended: Slot::new("attention output", d.attended, a),
            up: Slot::new("MLP input", d.up, a),
            activated: Slot::new("MLP activation", d.activated, a),
            selected: Slot::new("head input", d.hidden, a),
            projected: Slot::new("projected head input", if d.embedding == d.hidden { 0 } else { d.embedding }, a),
            logits: Slot::new("logits", d.vocabulary, DType::F32),
            targets: Slot::new("scored tokens", 1, DType::U32),
            scores: Slot::new("log probabilities", 1, DType::F32),
        })
    }

    /// Makes room for a step of `rows` tokens, `logit_rows` of which reach the head at once.
    pub(super) fn reserve(&mut self, backend: &dyn Backend, rows: usize, logit_rows: usize) -> Result<()> {
        for slot in self.row_slots() {
            slot.reserve(backend, rows)?;
        }
        for slot in self.logit_slots() {
            slot.reserve(backend, logit_rows)?;
        }
        Ok(())
    }

    /// What [`Workspace::reserve`] would hold for the same arguments, in bytes.
    pub(super) fn bytes(&mut self, rows: usize, logit_rows: usize) -> usize {
        let add = usize::saturating_add;
        let rows = self.row_slots().into_iter().map(|slot| slot.bytes(rows.max(slot.rows))).fold(0, add);
        self.logit_slots().into_iter().map(|slot| slot.bytes(logit_rows.max(slot.rows))).fold(rows, add)
    }

    /// Bytes that are held.
    pub(super) fn held(&mut self) -> usize {
        self.bytes(0, 0)
    }

    /// The stream, and the one beside it.
    pub(super) fn streams(&self) -> (&Stream, &Stream) {
        (&self.stream, &self.fetch)
    }

    /// Makes the normalised state the residual stream (post-norm models).
    pub(super) fn exchange_hidden_and_normed(&mut self) {
        std::mem::swap(&mut self.hidden, &mut self.normed);
    }

    fn row_slots(&mut self) -> [&mut Slot; 11] {
        [
            &mut self.tokens,
            &mut self.positions,
            &mut self.lookups,
            &mut self.rotation,
            &mut self.embedded,
            &mut self.hidden,
            &mut self.normed,
            &mut self.qkv,
            &mut self.attended,
            &mut self.up,
            &mut self.activated,
        ]
    }

    /// Slots with a row for each token whose logits are wanted; every token that is decoded is one of them.
    fn logit_slots(&mut self) -> [&mut Slot; 8] {
        [
            &mut self.selected,
            &mut self.projected,
            &mut self.logits,
            &mut self.targets,
            &mut self.scores,
            &mut self.predicted,
            &mut self.partial,
            &mut self.renormalised,
        ]
    }
}
