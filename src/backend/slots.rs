//! The hot cache where the device keeps its tables: selection, lookup and fetch without the host.
//!
//! One buffer holds the tables of all layers and KV heads of a sequence, in words of 32 bits. The host reads and writes
//! it between steps only ([`SlotGeometry`] says where what lies); within a step [`super::Backend::prefetch`] and
//! [`super::Backend::admit`] do.

use super::{
    Buffer, DType, HeadMaps, IndexRunsMut, KvRunsMut, PoolMut, Rehearsal, Rows, RowsMut, StoredRuns, StoredRunsMut,
};

/// The shape of a sequence's tables.
///
/// The buffer holds, one behind the other, each in words:
/// 1. for every layer and KV head four words: two zeros, the slots in use, one zero (what attention reads);
/// 2. for every layer and KV head [`SlotGeometry::HEADER`] words, see [`Header`];
/// 3. for every layer and KV head its table: the step in which each slot was used last, the row in each slot, the slot of
///    each row (`NONE` for none), and the journal: [`SlotGeometry::CHANGE`] words for each change of the last step;
/// 4. for every KV head what the last rehearsal selected: a count, then room for rows; and the moves that it made: a
///    count, then room for pairs of row and slot. All layers share the lists of what was selected, and even and odd layers
///    those of moves, because one layer's moves are made while the next one's are found; unless [`SlotGeometry::lists`]
///    says that each layer has its own;
/// 5. where steps are corrected ([`Correction`]), for every KV head a count and rows that a rehearsal by a layer's own queries
///    has picked, of whichever layer was last; then lists and moves as above of what corrections added, each layer's own or
///    one for all;
/// 6. where steps list what they attend, for every KV head the list of the last layer that did: what attention reads (two
///    words that are the backend's own, the length, one zero), and for every KV head room for slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotGeometry {
    /// Layers that have tables.
    pub layers: usize,
    /// KV heads per layer.
    pub kv_heads: usize,
    /// Slots of each table.
    pub slots: usize,
    /// Rows of the sequence: positions from 0.
    pub rows: usize,
    /// Most rows that a step selects.
    pub selected: usize,
    /// Layers whose lists of a step are kept: `layers` where somebody reads them when the step is over, else 1.
    pub lists: usize,
    /// Most rows that a correction adds to them; 0 where there is none.
    pub corrected: usize,
    /// Most slots that a step lists for a KV head; 0 where it never does.
    pub attended: usize,
}

/// Words of a table's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Header {
    /// The step that the journal is of.
    Step = 0,
    /// Changes in the journal.
    Changes = 1,
    /// Rows that this step selected, but for those of a correction.
    Selected = 2,
    /// Those of both that were not here.
    Missed = 3,
    /// Of all steps the rows selected, corrections included, those that were not here, and entries attended: two words each,
    /// the lower first.
    AllSelected = 4,
    /// See above.
    AllMissed = 6,
    /// See above.
    AllAttended = 8,
    /// Entries that this step attended.
    Attended = 10,
    /// Rows that a correction added in this step, and in all steps.
    Corrected = 11,
    /// See above.
    AllCorrected = 12,
    /// Where a device notes, as it looks for victims, which slot a new token of this step will take; it is its own affair.
    Next = 14,
}

/// Where a layer's lists lie, as words of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lists {
    /// Most rows of a KV head.
    pub room: usize,
    /// Counts of rows, one a KV head.
    pub counts: usize,
    /// The rows, `room` words a KV head.
    pub rows: usize,
    /// Counts of moves, one a KV head.
    pub move_counts: usize,
    /// The moves, `2 · room` words a KV head.
    pub moves: usize,
}

impl SlotGeometry {
    /// Words of what attention reads, a table.
    pub const COUNT: usize = 4;
    /// Words of a header.
    pub const HEADER: usize = 15;
    /// Words of a change: the slot, the row before (`NONE` where the slot was empty), its last use before.
    pub const CHANGE: usize = 3;
    /// No row, no slot.
    pub const NONE: u32 = u32::MAX;

    /// Tables.
    pub const fn tables(&self) -> usize {
        self.layers * self.kv_heads
    }

    /// Words of one table.
    pub const fn table_words(&self) -> usize {
        2 * self.slots + self.rows + Self::CHANGE * (self.selected + self.corrected + 1)
    }

    /// Where a table's slots in use are told.
    pub const fn count_at(&self, table: usize) -> usize {
        Self::COUNT * table + 2
    }

    /// Where a table's header begins.
    pub const fn header_at(&self, table: usize) -> usize {
        Self::COUNT * self.tables() + Self::HEADER * table
    }

    /// Where a table begins: its slots' last uses.
    pub const fn used_at(&self, table: usize) -> usize {
        (Self::COUNT + Self::HEADER) * self.tables() + table * self.table_words()
    }

    /// Where the rows in a table's slots begin.
    pub const fn rows_at(&self, table: usize) -> usize {
        self.used_at(table) + self.slots
    }

    /// Where the slots of a table's rows begin.
    pub const fn slots_at(&self, table: usize) -> usize {
        self.rows_at(table) + self.slots
    }

    /// Where a table's journal begins.
    pub const fn journal_at(&self, table: usize) -> usize {
        self.slots_at(table) + self.rows
    }

    /// Where the lists of all layers begin.
    pub const fn lists_at(&self) -> usize {
        self.used_at(self.tables())
    }

    /// Layers whose moves are kept: two at least.
    const fn move_lists(&self) -> usize {
        if self.lists < 2 { 2 } else { self.lists }
    }

    /// Where a layer's counts of selected rows begin, one a KV head.
    pub const fn selected_counts_at(&self, layer: usize) -> usize {
        self.lists_at() + self.kv_heads * (layer % self.lists)
    }

    /// Where a layer's selected rows begin: `selected` words a KV head.
    pub const fn selected_rows_at(&self, layer: usize) -> usize {
        self.lists_at() + self.kv_heads * (self.lists + layer % self.lists * self.selected)
    }

    /// Where a layer's counts of moves begin, one a KV head.
    pub const fn move_counts_at(&self, layer: usize) -> usize {
        self.lists_at() + self.kv_heads * (self.lists * (1 + self.selected) + layer % self.move_lists())
    }

    /// Where a layer's moves begin: `2 · selected` words a KV head.
    pub const fn moves_at(&self, layer: usize) -> usize {
        let (lists, moves) = (self.lists, self.move_lists());
        let before = lists * (1 + self.selected) + moves + 2 * (layer % moves) * self.selected;
        self.lists_at() + self.kv_heads * before
    }

    /// Where the counts of rows that were picked for a correction begin, one a KV head.
    pub const fn picked_counts_at(&self) -> usize {
        let (lists, moves) = (self.lists, self.move_lists());
        self.lists_at() + self.kv_heads * (lists * (1 + self.selected) + moves * (1 + 2 * self.selected))
    }

    /// Where those rows begin: `selected` words a KV head.
    pub const fn picked_rows_at(&self) -> usize {
        self.picked_counts_at() + self.kv_heads
    }

    /// As [`SlotGeometry::selected_counts_at`], of what a correction added.
    pub const fn corrected_counts_at(&self, layer: usize) -> usize {
        self.picked_rows_at() + self.kv_heads * (self.selected + layer % self.lists)
    }

    /// Where those rows begin: `corrected` words a KV head.
    pub const fn corrected_rows_at(&self, layer: usize) -> usize {
        self.corrected_counts_at(0) + self.kv_heads * (self.lists + layer % self.lists * self.corrected)
    }

    /// As [`SlotGeometry::move_counts_at`], of corrections.
    pub const fn correction_counts_at(&self, layer: usize) -> usize {
        self.corrected_rows_at(0) + self.kv_heads * (self.lists * self.corrected + layer % self.lists)
    }

    /// Where those moves begin: `2 · corrected` words a KV head.
    pub const fn correction_moves_at(&self, layer: usize) -> usize {
        self.correction_counts_at(0) + self.kv_heads * (self.lists + 2 * (layer % self.lists) * self.corrected)
    }

    /// Where a layer's lists lie: those of what it selected, or of what a correction added.
    pub const fn lists_of(&self, layer: usize, corrects: bool) -> Lists {
        if corrects {
            return Lists {
                room: self.corrected,
                counts: self.corrected_counts_at(layer),
                rows: self.corrected_rows_at(layer),
                move_counts: self.correction_counts_at(layer),
                moves: self.correction_moves_at(layer),
            };
        }
        Lists {
            room: self.selected,
            counts: self.selected_counts_at(layer),
            rows: self.selected_rows_at(layer),
            move_counts: self.move_counts_at(layer),
            moves: self.moves_at(layer),
        }
    }

    /// Where the lists of all layers end.
    pub const fn lists_end(&self) -> usize {
        match self.corrected {
            0 => self.picked_counts_at(),
            corrected => self.correction_moves_at(0) + self.kv_heads * 2 * self.lists * corrected,
        }
    }

    /// Where the headers of what is attended begin: [`SlotGeometry::COUNT`] words a KV head. (Addresses are among them.)
    pub const fn attended_lists_at(&self) -> usize {
        self.lists_end().next_multiple_of(Self::COUNT)
    }

    /// Where the listed slots begin: `attended` words a KV head.
    pub const fn attended_at(&self) -> usize {
        self.attended_lists_at() + Self::COUNT * self.kv_heads
    }

    /// Words of the whole buffer.
    pub const fn words(&self) -> usize {
        self.attended_at() + self.attended * self.kv_heads
    }

    /// Bytes of the whole buffer.
    pub const fn bytes(&self) -> usize {
        4 * self.words()
    }
}

/// Rows that never give way: the sinks and the recent window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guard {
    /// Rows below this.
    pub below: u32,
    /// Rows from this on.
    pub from: u32,
}

impl Guard {
    /// What never gives way of a sequence of `length` tokens: below the first, and from the second on.
    pub(super) fn ends(&self, length: usize) -> (u32, u32) {
        let length = length as u32;
        let below = self.below.min(length);
        (below, self.from.clamp(below, length))
    }

    /// Whether a row never gives way.
    #[inline]
    pub fn protects(&self, row: u32) -> bool {
        (row < self.below) | (row >= self.from) // no jump: thousands are asked for in a row
    }
}

/// The tables of one layer in this step.
#[derive(Debug)]
pub struct SlotsMut<'a> {
    /// The sequence's tables.
    pub tables: &'a mut Buffer,
    /// Their shape.
    pub geometry: SlotGeometry,
    /// Layer of the tables.
    pub layer: usize,
    /// Slots that may be used: enough for what is guarded, what is selected, and one more.
    pub limit: usize,
    /// What never gives way: tokens.
    pub guard: Guard,
    /// The step's number, from 1, higher in every step.
    pub step: u32,
    /// The pool whose rows these are, where it may be full; elsewhere row t is token t.
    pub pool: Option<PoolMut<'a>>,
    /// Whether this step attends the slots of what is guarded and what it has used (selected, or new), which
    /// [`super::Backend::admit`] lists in ascending order, and not every slot in use.
    pub by_list: bool,
}

/// The tables of one layer, for attention.
#[derive(Clone, Copy, Debug)]
pub struct Slots<'a> {
    /// The sequence's tables.
    pub tables: &'a Buffer,
    /// Their shape.
    pub geometry: SlotGeometry,
    /// Layer of the tables.
    pub layer: usize,
    /// Slots that may be in use.
    pub limit: usize,
    /// Whether the slots that the step has listed are attended, and not every slot in use.
    pub by_list: bool,
}

/// One sequence in [`super::Backend::prefetch`].
#[derive(Debug)]
pub struct Prefetch<'a> {
    /// What is selected.
    pub rehearsal: Rehearsal<'a>,
    /// Where it is looked up.
    pub slots: SlotsMut<'a>,
    /// Entries of the layer, by row: host memory that the device reads in place.
    pub from: StoredRuns<'a>,
    /// Entries of the layer, by slot.
    pub to: KvRunsMut<'a>,
    /// Where what lay in the slots of this step's misses is kept, where the store would not give back the same bits: for each
    /// KV head that of the i-th move in row i. (A correction has moves of its own, and another place.)
    pub saved: Option<KvRunsMut<'a>>,
    /// Given, where the tail is wanted: for each query head the speculated probability, 0 to 1, of all rows of the index that
    /// are neither selected nor were in a slot before (or are not guarded, where the step lists); one row of f32. Not with [`super::Selection::Paper`], which knows no
    /// probabilities.
    pub tail: Option<RowsMut<'a>>,
    /// Given, where the layer has been rehearsed in this step and its own queries add to that.
    pub correction: Option<Correction>,
}

/// The second look of a layer (docs/policies.md): of what is selected, a KV head leaves out the rows that the step attends
/// already, whatever else it does: those in a slot, or where the step lists those that are guarded or used in this step.
/// The best of the others join what the step has selected. With a tail its weight becomes that of all rows that are
/// neither attended already nor among these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Correction {
    /// Most rows that join.
    pub most: usize,
    /// Most rows that the step selects of a KV head, together with these.
    pub room: usize,
}

impl Correction {
    /// Most rows that join `selected` others.
    pub fn most_beside(&self, selected: usize) -> usize {
        self.most.min(self.room.saturating_sub(selected))
    }
}

/// One token in [`super::Backend::admit`].
#[derive(Debug)]
pub struct Admission<'a> {
    /// Its row; where the pool is full it takes that of a victim instead.
    pub row: usize,
    /// Where it gets a slot: that of the victim, if it has one.
    pub slots: SlotsMut<'a>,
    /// Entries of the layer, by row.
    pub store: StoredRunsMut<'a>,
    /// Entries of the layer, by slot: the new one is exact here, however it is stored.
    pub cache: KvRunsMut<'a>,
    /// As in [`Prefetch`]: what lay in the token's slot, in row [`SlotGeometry::selected`].
    pub saved: Option<KvRunsMut<'a>>,
    /// Partial keys of the layer, by row.
    pub index: IndexRunsMut<'a>,
    /// From keys to partial keys.
    pub maps: &'a HeadMaps,
    /// Given, where the layer's mean value is kept: how it moves towards the token's values.
    pub mean: Option<Blend<'a>>,
}

/// How rows of f32 move towards others of the same shape; see [`super::Backend::blend`].
#[derive(Debug)]
pub struct Blend<'a> {
    /// Where they begin. None: what `out` holds.
    pub from: Option<Rows<'a>>,
    /// Where they end.
    pub out: RowsMut<'a>,
    /// How far they go: 0 and they stay, 1 and they get there.
    pub factor: f32,
}

impl Blend<'_> {
    /// Asserts that all shapes are that of `toward`.
    pub(super) fn check(&self, toward: Rows<'_>) {
        let shape = (toward.rows(), toward.cols());
        assert_eq!((self.out.rows(), self.out.cols(), self.out.dtype()), (shape.0, shape.1, DType::F32));
        if let Some(from) = &self.from {
            assert_eq!((from.rows(), from.cols(), from.dtype()), (shape.0, shape.1, DType::F32));
        }
    }
}
