//! Tables of a hot cache in a buffer, as [`SlotGeometry`] lays them out: what a device does by itself, here on the host.
//! Simple rather than fast, and the oracle of every other backend. (`kv::HotCache` is what sessions on the CPU use.)

use super::evict;
use crate::backend::{Buffer, Guard, Header, Lists, Move, SlotGeometry, Slots, SlotsMut};

/// One table.
struct Table<'a> {
    words: &'a mut [u32],
    geometry: SlotGeometry,
    at: usize,
    limit: usize,
    guard: Guard,
    step: u32,
    /// The token in each row, where it is not the row's number.
    tokens: Option<Vec<u32>>,
    by_list: bool,
}

impl<'a> Table<'a> {
    fn new(slots: &'a mut SlotsMut<'_>, head: usize) -> Table<'a> {
        let SlotsMut { geometry, limit, guard, step, by_list, .. } = *slots;
        let at = slots.layer * geometry.kv_heads + head;
        let tokens = slots.pool.as_ref().map(|pool| evict::tokens(pool, at));
        let words = words_mut(slots.tables, &geometry);
        let mut table = Table { words, geometry, at, limit, guard, step, tokens, by_list };
        if table.header(Header::Step) != step {
            table.set(Header::Step, step);
            for header in [Header::Changes, Header::Selected, Header::Missed, Header::Attended, Header::Corrected] {
                table.set(header, 0);
            }
        }
        table
    }

    fn header(&self, which: Header) -> u32 {
        self.words[self.geometry.header_at(self.at) + which as usize]
    }

    fn set(&mut self, which: Header, value: u32) {
        self.words[self.geometry.header_at(self.at) + which as usize] = value;
    }

    /// Adds to a number of two words.
    fn add(&mut self, which: Header, more: u32) {
        let at = self.geometry.header_at(self.at) + which as usize;
        let sum = (u64::from(self.words[at]) | u64::from(self.words[at + 1]) << 32) + u64::from(more);
        (self.words[at], self.words[at + 1]) = (sum as u32, (sum >> 32) as u32);
    }

    fn held(&self) -> usize {
        self.words[self.geometry.count_at(self.at)] as usize
    }

    fn slot_of(&mut self, row: u32) -> &mut u32 {
        &mut self.words[self.geometry.slots_at(self.at) + row as usize]
    }

    /// Whether a row's token never gives way.
    fn protects(&self, row: u32) -> bool {
        self.guard.protects(self.tokens.as_ref().map_or(row, |tokens| tokens[row as usize]))
    }

    /// The `i`-th change of this step: `slot` had `row`, last used in `used`.
    fn journal(&mut self, i: usize, slot: u32, row: u32, used: u32) {
        let at = self.geometry.journal_at(self.at) + SlotGeometry::CHANGE * i;
        self.words[at..at + SlotGeometry::CHANGE].copy_from_slice(&[slot, row, used]);
    }

    /// Puts a row into a slot, as the `change`-th change of the step.
    fn put(&mut self, change: usize, slot: u32, row: u32) {
        let (used, rows) = (self.geometry.used_at(self.at), self.geometry.rows_at(self.at));
        if (slot as usize) < self.held() {
            let before = self.words[rows + slot as usize];
            self.journal(change, slot, before, self.words[used + slot as usize]);
            *self.slot_of(before) = SlotGeometry::NONE; // or, where its row is a new token's, again below
        } else {
            self.journal(change, slot, SlotGeometry::NONE, 0);
            self.words[self.geometry.count_at(self.at)] += 1;
        }
        self.words[rows + slot as usize] = row;
        self.words[used + slot as usize] = self.step;
        *self.slot_of(row) = slot;
    }

    /// Writes down what this step selected, or a correction added, and the moves that it made.
    fn list(&mut self, selected: &[u32], moves: &[Move], corrects: bool) {
        let g = self.geometry;
        let (layer, head) = (self.at / g.kv_heads, self.at % g.kv_heads);
        let Lists { room, counts, rows, move_counts, moves: moves_at } = g.lists_of(layer, corrects);
        assert!(selected.len() <= room, "more rows selected than the tables have room for");
        self.words[counts + head] = selected.len() as u32;
        self.words[rows + head * room..][..selected.len()].copy_from_slice(selected);
        self.words[move_counts + head] = moves.len() as u32;
        let at = moves_at + 2 * head * room;
        for (i, m) in moves.iter().enumerate() {
            self.words[at + 2 * i..at + 2 * i + 2].copy_from_slice(&[m.from, m.to]);
        }
    }

    /// Lists the slots that this step has used and those that are guarded; says how many.
    fn list_attended(&mut self, head: usize) -> usize {
        let g = self.geometry;
        let (used, rows, to) = (g.used_at(self.at), g.rows_at(self.at), g.attended_at() + head * g.attended);
        let mut count = 0;
        for slot in 0..self.held() {
            if self.words[used + slot] == self.step || self.protects(self.words[rows + slot]) {
                assert!(count < g.attended, "more slots listed than the tables have room for");
                self.words[to + count] = slot as u32;
                count += 1;
            }
        }
        self.words[g.attended_lists_at() + SlotGeometry::COUNT * head + 2] = count as u32;
        count
    }

    /// The `count` slots unused for longest, ascending.
    fn victims(&self, count: usize) -> Vec<u32> {
        let (used, rows) = (self.geometry.used_at(self.at), self.geometry.rows_at(self.at));
        let mut candidates: Vec<(u32, u32)> = (0..self.held())
            .filter(|&slot| self.words[used + slot] < self.step && !self.protects(self.words[rows + slot]))
            .map(|slot| (self.words[used + slot], slot as u32))
            .collect();
        candidates.sort_unstable();
        assert!(candidates.len() >= count, "fewer slots than what is guarded and selected");
        let mut victims: Vec<u32> = candidates[..count].iter().map(|&(_, slot)| slot).collect();
        victims.sort_unstable();
        victims
    }
}

/// Marks the selected rows of a KV head as used and gives those that are not here a slot. `corrects`: they join others.
pub(super) fn request(slots: &mut SlotsMut<'_>, head: usize, selected: &[u32], moves: &mut Vec<Move>, corrects: bool) {
    let geometry = slots.geometry;
    let mut table = Table::new(slots, head);
    let before = if corrects { table.header(Header::Changes) as usize } else { 0 };
    let mut missed = Vec::new();
    for (i, &row) in selected.iter().enumerate() {
        match *table.slot_of(row) {
            SlotGeometry::NONE => missed.push((i, row)),
            slot => {
                let used = geometry.used_at(table.at) + slot as usize;
                table.journal(before + i, slot, row, table.words[used]);
                table.words[used] = table.step;
            }
        }
    }
    let held = table.held();
    let pushed = missed.len().min(table.limit.saturating_sub(held));
    let mut free: Vec<u32> = (held..held + pushed).map(|slot| slot as u32).collect();
    free.extend(table.victims(missed.len() - pushed));
    for (&(i, row), &slot) in missed.iter().zip(&free) {
        table.put(before + i, slot, row);
        moves.push(Move { head: head as u32, from: row, to: slot });
    }
    table.list(selected, &moves[moves.len() - missed.len()..], corrects);
    let (all, missed) = (selected.len() as u32, missed.len() as u32);
    table.set(Header::Changes, before as u32 + all);
    table.add(Header::AllSelected, all);
    table.add(Header::AllMissed, missed);
    if corrects {
        table.set(Header::Missed, table.header(Header::Missed) + missed);
        table.set(Header::Corrected, all);
        table.add(Header::AllCorrected, all);
    } else {
        table.set(Header::Missed, missed);
        table.set(Header::Selected, all);
    }
}

/// Whether this step has selected a row.
pub(super) fn has_selected(slots: &SlotsMut<'_>, head: usize) -> impl Fn(u32) -> bool + use<> {
    let (g, table, step) = (slots.geometry, slots.layer * slots.geometry.kv_heads + head, slots.step);
    let words = words(slots.tables, &g).to_vec();
    move |row| match words[g.slots_at(table) + row as usize] {
        SlotGeometry::NONE => false,
        slot => words[g.used_at(table) + slot as usize] == step,
    }
}

/// Gives a new row a slot, or a row that holds another token now the one that it has.
pub(super) fn admit(slots: &mut SlotsMut<'_>, head: usize, row: u32) -> u32 {
    let mut table = Table::new(slots, head);
    let slot = match (*table.slot_of(row), table.held()) {
        (SlotGeometry::NONE, held) if held < table.limit => held as u32,
        (SlotGeometry::NONE, _) => table.victims(1)[0],
        (own, _) => own,
    };
    let change = table.header(Header::Changes);
    table.put(change as usize, slot, row);
    table.set(Header::Changes, change + 1);
    let attended = if table.by_list { table.list_attended(head) } else { table.held() } as u32;
    table.set(Header::Attended, attended);
    table.add(Header::AllAttended, attended);
    slot
}

/// Fills the table of a KV head anew; see `Backend::load_slots`.
pub(super) fn load(slots: &mut SlotsMut<'_>, head: usize, length: usize, ranked: &[u32]) {
    let (g, guard, limit) = (slots.geometry, slots.guard, slots.limit);
    let table = slots.layer * g.kv_heads + head;
    let words = words_mut(slots.tables, &g);
    let (below, from) = guard.ends(length);
    let always = (0..below).chain(from..length as u32);
    let rows: Vec<u32> = always.chain(ranked.iter().copied().filter(|&row| !guard.protects(row))).take(limit).collect();
    words[g.slots_at(table)..][..g.rows].fill(SlotGeometry::NONE);
    for (slot, &row) in rows.iter().enumerate() {
        words[g.rows_at(table) + slot] = row;
        words[g.used_at(table) + slot] = (rows.len() - slot) as u32;
        words[g.slots_at(table) + row as usize] = slot as u32;
    }
    words[g.count_at(table)] = rows.len() as u32;
    words[g.header_at(table) + Header::Step as usize] = 0;
}

/// Rows, of `rows` rows, that this step will attend whatever it selects from now on, KV head by KV head: those in slots, or
/// those that are guarded and, if it was rehearsed before, those that it has selected.
pub(super) fn present(slots: &SlotsMut<'_>, rows: usize, rehearsed: bool) -> Vec<Vec<u32>> {
    let SlotsMut { tables, geometry: g, layer, limit, guard, by_list, pool, step } = slots;
    let of_layer = Slots { tables, geometry: *g, layer: *layer, limit: *limit, by_list: false };
    let mut in_slots = vec![Vec::new(); g.kv_heads];
    held(&of_layer).iter().for_each(|held| in_slots[held.head as usize].push(held.from));
    if !by_list {
        return in_slots;
    }
    let words = words(tables, g);
    let of_head = |(head, in_slots): (usize, Vec<u32>)| {
        let table = layer * g.kv_heads + head;
        let tokens = pool.as_ref().map(|pool| evict::tokens(pool, table));
        let token = |row: u32| tokens.as_ref().map_or(row, |tokens| tokens[row as usize]);
        let used = |row: u32| {
            let slot = words[g.slots_at(table) + row as usize] as usize;
            words[g.used_at(table) + slot] == *step
        };
        // In the order of tokens, what is guarded first. (With a pool, it is in slots, too.)
        let mut present: Vec<u32> = match &tokens {
            None => (0..guard.below.min(guard.from)).chain(guard.from..rows as u32).collect(),
            Some(_) => in_slots.iter().copied().filter(|&row| guard.protects(token(row))).collect(),
        };
        present.sort_unstable_by_key(|&row| token(row));
        let mut selected = in_slots;
        selected.retain(|&row| rehearsed && used(row) && !guard.protects(token(row)));
        selected.sort_unstable_by_key(|&row| token(row));
        present.extend(selected);
        present
    };
    in_slots.into_iter().enumerate().map(of_head).collect()
}

/// Rows that this step has selected of each KV head.
pub(super) fn selected(slots: &SlotsMut<'_>) -> Vec<usize> {
    let g = &slots.geometry;
    let words = words(slots.tables, g);
    let of_head = |head| words[g.header_at(slots.layer * g.kv_heads + head) + Header::Selected as usize] as usize;
    (0..g.kv_heads).map(of_head).collect()
}

/// Slots in use of each KV head.
pub(super) fn counts(slots: &Slots<'_>) -> Vec<u32> {
    let geometry = slots.geometry;
    let words = words(slots.tables, &geometry);
    (0..geometry.kv_heads).map(|head| words[geometry.count_at(slots.layer * geometry.kv_heads + head)]).collect()
}

/// The slots that the last layer to list has listed.
pub(super) fn listed(slots: &Slots<'_>) -> Vec<Vec<u32>> {
    let g = slots.geometry;
    let words = words(slots.tables, &g);
    let count = |head: usize| words[g.attended_lists_at() + SlotGeometry::COUNT * head + 2] as usize;
    (0..g.kv_heads).map(|head| words[g.attended_at() + head * g.attended..][..count(head)].to_vec()).collect()
}

/// Every row that has a slot, and where.
pub(super) fn held(slots: &Slots<'_>) -> Vec<Move> {
    let geometry = slots.geometry;
    let words = words(slots.tables, &geometry);
    let of_head = |(head, count): (usize, u32)| {
        let rows = geometry.rows_at(slots.layer * geometry.kv_heads + head);
        (0..count).map(move |to| Move { head: head as u32, from: words[rows + to as usize], to })
    };
    counts(slots).into_iter().enumerate().flat_map(of_head).collect()
}

fn words<'a>(tables: &'a Buffer, geometry: &SlotGeometry) -> &'a [u32] {
    assert!(tables.bytes() >= geometry.bytes(), "tables that are too short");
    // SAFETY: as many initialised bytes, aligned to 64; any bytes are a u32; nobody writes while the buffer is borrowed.
    unsafe { std::slice::from_raw_parts(tables.address().cast(), geometry.words()) }
}

fn words_mut<'a>(tables: &'a mut Buffer, geometry: &SlotGeometry) -> &'a mut [u32] {
    assert!(tables.bytes() >= geometry.bytes(), "tables that are too short");
    // SAFETY: as in `words`; the buffer is borrowed mutably.
    unsafe { std::slice::from_raw_parts_mut(tables.address_mut().cast(), geometry.words()) }
}
