//! Which entry of a run lies in which slot of the device: the table under the hot cache and the policies that drop.

/// No row.
const NONE: u32 = u32::MAX;

/// Slots of one layer and KV head, dense from 0: what attention reads is always a prefix of the run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlotTable {
    /// Row in each slot.
    rows: Vec<u32>,
    /// Slot of each row, or `NONE`.
    slots: Vec<u32>,
}

impl SlotTable {
    /// Slots in use.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether no slot is in use.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The row in each slot.
    pub fn rows(&self) -> &[u32] {
        &self.rows
    }

    /// Where a row lies.
    #[inline]
    pub fn slot(&self, row: u32) -> Option<u32> {
        self.slots.get(row as usize).copied().filter(|&slot| slot != NONE)
    }

    /// Puts a row that has no slot into the next one.
    pub fn push(&mut self, row: u32) -> u32 {
        let slot = self.rows.len() as u32;
        self.rows.push(row);
        self.point(row, slot);
        slot
    }

    /// Puts a row that has no slot in the place of another, which is returned.
    pub fn replace(&mut self, slot: u32, row: u32) -> u32 {
        let before = std::mem::replace(&mut self.rows[slot as usize], row);
        self.slots[before as usize] = NONE;
        self.point(row, slot);
        before
    }

    /// Empties the last slot.
    pub fn pop(&mut self) {
        if let Some(row) = self.rows.pop() {
            self.slots[row as usize] = NONE;
        }
    }

    /// Empties a slot by moving the last one's row into it; says which row that was, if it was another.
    pub fn swap_remove(&mut self, slot: u32) -> Option<u32> {
        self.slots[self.rows[slot as usize] as usize] = NONE;
        self.rows.swap_remove(slot as usize);
        let moved = self.rows.get(slot as usize).copied();
        if let Some(row) = moved {
            self.point(row, slot);
        }
        moved
    }

    /// Empties all slots.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.slots.clear();
    }

    fn point(&mut self, row: u32, slot: u32) {
        if self.slots.len() <= row as usize {
            self.slots.resize(row as usize + 1, NONE);
        }
        debug_assert_eq!(self.slots[row as usize], NONE, "row {row} has a slot already");
        self.slots[row as usize] = slot;
    }
}
