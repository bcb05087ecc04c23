//! A full pool whose rows a device gives away by itself: which token lies in which row, how it was used, and what a step has
//! written over.
//!
//! Where nothing is evicted, row t of every run is the token at position t. With a pool each KV head of each layer has an
//! order of its own, once it was full: a new token takes the row of a victim, in store and index. The hot cache's tables
//! speak of rows, guards of tokens; [`PoolGeometry`] says where what is known of a row lies.

use super::{Buffer, IndexRunsMut, StoredRunsMut};

/// The shape of a sequence's pool.
///
/// One buffer holds, for every layer and KV head, in words: [`PoolGeometry::HEADER`] of them (see [`PoolHeader`]), the token
/// in each row and the use of each row. All of it is relative, so that zeros are a pool in order: a word is the token and
/// one, or 0 where row t holds token t; a use is the time of the last one, or 0 where the row's token was not selected yet. (A
/// token's step has three times: what it selects, what a correction adds, the token itself.)
///
/// Another buffer has, for every layer and KV head, room for what a step overwrites: the rows, a word each, then the
/// entries as they were stored, then the partial keys and their scales, in the backend's own order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolGeometry {
    /// Layers of the store.
    pub layers: usize,
    /// KV heads per layer.
    pub kv_heads: usize,
    /// Rows of every run, at most.
    pub rows: usize,
    /// Rows of every run that a step may overwrite.
    pub lost: usize,
    /// Bytes of a row as it is stored.
    pub stored_bytes: usize,
    /// Bytes of a partial key and its scale.
    pub index_bytes: usize,
}

/// Words at the beginning of a KV head's pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum PoolHeader {
    /// The first token that was ever lost, and one; 0 for none.
    Lost = 0,
    /// Rows that the call under way has overwritten, of those that it began with.
    Kept = 1,
    /// Which call that is: the tokens before it, and one.
    Begun = 2,
}

impl PoolGeometry {
    /// Words of a header.
    pub const HEADER: usize = 4;

    /// Words of one KV head.
    pub const fn table_words(&self) -> usize {
        Self::HEADER + 2 * self.rows
    }

    /// Where a KV head's words begin, with its header.
    pub const fn header_at(&self, table: usize) -> usize {
        table * self.table_words()
    }

    /// Where the tokens in its rows begin.
    pub const fn tokens_at(&self, table: usize) -> usize {
        self.header_at(table) + Self::HEADER
    }

    /// Where the uses of its rows begin.
    pub const fn uses_at(&self, table: usize) -> usize {
        self.tokens_at(table) + self.rows
    }

    /// Bytes of the words of all layers and KV heads.
    pub const fn bytes(&self) -> usize {
        4 * self.layers * self.kv_heads * self.table_words()
    }

    /// Bytes from the list of a KV head's overwritten rows to their entries.
    pub const fn lost_entries_at(&self) -> usize {
        (4 * self.lost).next_multiple_of(16)
    }

    /// Bytes of an entry there.
    pub const fn lost_entry_bytes(&self) -> usize {
        self.stored_bytes.next_multiple_of(16)
    }

    /// Bytes from the list to the partial keys.
    pub const fn lost_keys_at(&self) -> usize {
        self.lost_entries_at() + self.lost * self.lost_entry_bytes()
    }

    /// Bytes of what a step may overwrite of a KV head.
    pub const fn lost_stride(&self) -> usize {
        (self.lost_keys_at() + self.lost * self.index_bytes).next_multiple_of(16)
    }

    /// Bytes of that of all layers and KV heads.
    pub const fn lost_bytes(&self) -> usize {
        self.layers * self.kv_heads * self.lost_stride()
    }
}

/// Which entry of a full pool gives way: of those that are neither guarded nor selected by this step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum VictimRule {
    /// The one that came first.
    Fifo = 0,
    /// The one selected longest ago; one that never was counts from when it came. Of equals the older.
    Lru = 1,
    /// The one selected least often, of equals the older. A count that reaches [`VictimRule::SATURATED`] halves all of its
    /// KV head's, row by row in ascending order.
    Counter = 2,
}

impl VictimRule {
    /// Eight bits, as in the paper's pool.
    pub const SATURATED: u32 = u8::MAX as u32;
}

/// The pool of one layer for one token.
#[derive(Debug)]
pub struct PoolMut<'a> {
    /// What is known of each row.
    pub tables: &'a mut Buffer,
    /// What the call under way overwrites.
    pub lost: &'a mut Buffer,
    /// The shape of both.
    pub geometry: PoolGeometry,
    /// Who gives way.
    pub rule: VictimRule,
    /// Rows that hold tokens.
    pub rows: usize,
    /// Position of the token.
    pub token: usize,
    /// Whether the token takes the row of a victim.
    pub full: bool,
    /// Tokens before the call that this token belongs to: a victim among them can be brought back.
    pub begun: usize,
}

/// What [`super::Backend::take_back`] brings back, and where to: one layer.
#[derive(Debug)]
pub struct Lost<'a> {
    /// What is known of each row, as when the step was given up.
    pub tables: &'a Buffer,
    /// What the call has overwritten.
    pub lost: &'a Buffer,
    /// The shape of both.
    pub geometry: PoolGeometry,
    /// Layer of the store.
    pub layer: usize,
    /// Tokens before the call.
    pub begun: usize,
    /// Entries of the layer.
    pub store: StoredRunsMut<'a>,
    /// Partial keys of the layer.
    pub index: IndexRunsMut<'a>,
}
