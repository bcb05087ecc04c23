//! A full pool as [`PoolGeometry`] lays it out: what a device does by itself, here on the host. Simple rather than fast, and
//! the oracle of every other backend. (`kv::Victims` is what sessions on the CPU use.)

use super::index;
use crate::backend::{
    Buffer, IndexRunsMut, Lost, PoolGeometry, PoolHeader, PoolMut, SlotsMut, StoredRunsMut, VictimRule,
};

/// The token in each row of a KV head.
pub(super) fn tokens(pool: &PoolMut<'_>, table: usize) -> Vec<u32> {
    let (words, at) = (words(pool.tables, &pool.geometry), pool.geometry.tokens_at(table));
    let token = |(row, &word): (u32, &u32)| word.checked_sub(1).unwrap_or(row);
    (0..).zip(&words[at..at + pool.geometry.rows]).map(token).collect()
}

/// Leaves of what was selected (rows, ascending) what is not guarded, and notes its use. `corrects`: others have been used in
/// this step before.
pub(super) fn select(slots: &mut SlotsMut<'_>, head: usize, selected: &mut Vec<u32>, corrects: bool) {
    let table = slots.layer * slots.geometry.kv_heads + head;
    let Some(pool) = &mut slots.pool else { return };
    let (tokens, g) = (tokens(pool, table), pool.geometry);
    selected.retain(|&row| !slots.guard.protects(tokens[row as usize]));
    let uses = &mut words_mut(pool.tables, &g)[g.uses_at(table)..][..g.rows];
    for &row in &*selected {
        match pool.rule {
            VictimRule::Fifo => {}
            VictimRule::Lru => uses[row as usize] = 3 * pool.token as u32 + u32::from(corrects),
            VictimRule::Counter => {
                uses[row as usize] += 1;
                if uses[row as usize] == VictimRule::SATURATED {
                    uses.iter_mut().for_each(|uses| *uses /= 2);
                }
            }
        }
    }
}

/// Finds a row for the pool's token, for which `selected` must not give way, and keeps what it will overwrite.
pub(super) fn place(
    slots: &mut SlotsMut<'_>,
    head: usize,
    selected: impl Fn(u32) -> bool,
    store: &StoredRunsMut<'_>,
    index: &mut IndexRunsMut<'_>,
) -> u32 {
    let table = slots.layer * slots.geometry.kv_heads + head;
    let (guard, pool) = (slots.guard, slots.pool.as_mut().expect("a pool"));
    let (tokens, g, token) = (tokens(pool, table), pool.geometry, pool.token as u32);
    let words = words_mut(pool.tables, &g);
    let mut row = pool.rows as u32;
    if pool.full {
        let uses = &words[g.uses_at(table)..];
        let rank = |row: u32| {
            let (token, uses) = (tokens[row as usize], uses[row as usize]);
            let by_use = match pool.rule {
                VictimRule::Fifo => 0,
                VictimRule::Lru if uses == 0 => 3 * token + 2,
                VictimRule::Lru | VictimRule::Counter => uses,
            };
            (by_use, token)
        };
        let may = |&row: &u32| !guard.protects(tokens[row as usize]) && !selected(row);
        row = (0..pool.rows as u32).filter(may).min_by_key(|&row| rank(row)).expect("a row that may give way");
        let victim = tokens[row as usize];
        let header = &mut words[g.header_at(table)..][..PoolGeometry::HEADER];
        let lost = &mut header[PoolHeader::Lost as usize];
        *lost = if *lost == 0 { victim + 1 } else { (*lost).min(victim + 1) };
        if header[PoolHeader::Begun as usize] != pool.begun as u32 + 1 {
            (header[PoolHeader::Begun as usize], header[PoolHeader::Kept as usize]) = (pool.begun as u32 + 1, 0);
        }
        if (victim as usize) < pool.begun {
            let i = header[PoolHeader::Kept as usize] as usize;
            header[PoolHeader::Kept as usize] += 1;
            let lost = &mut bytes_mut(pool.lost, g.lost_bytes())[table * g.lost_stride()..][..g.lost_stride()];
            lost[4 * i..4 * i + 4].copy_from_slice(&row.to_ne_bytes());
            let from = store.runs().slot(head, row as usize);
            let entry = &bytes(&store.runs().buffers()[from.buffer])[from.offset..][..g.stored_bytes];
            lost[g.lost_entries_at() + i * g.lost_entry_bytes()..][..g.stored_bytes].copy_from_slice(entry);
            let key = &mut lost[g.lost_keys_at() + i * g.index_bytes..][..g.index_bytes];
            index::exchange_row(index, head, row, |words| {
                key.iter_mut().zip(words.iter().flat_map(|w| w.to_ne_bytes())).for_each(|(to, byte)| *to = byte);
            });
        }
    }
    words[g.tokens_at(table) + row as usize] = token + 1;
    words[g.uses_at(table) + row as usize] = 0;
    row
}

/// See `Backend::take_back`.
pub(super) fn take_back(lost: Lost<'_>) {
    let Lost { tables, lost, geometry: g, layer, begun, mut store, mut index } = lost;
    for head in 0..g.kv_heads {
        let table = layer * g.kv_heads + head;
        let header = &words(tables, &g)[g.header_at(table)..][..PoolGeometry::HEADER];
        if header[PoolHeader::Begun as usize] != begun as u32 + 1 {
            continue;
        }
        let lost = &bytes(lost)[table * g.lost_stride()..][..g.lost_stride()];
        for i in 0..header[PoolHeader::Kept as usize] as usize {
            let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|i| lost[at + i]));
            let (row, key) = (word(4 * i), g.lost_keys_at() + i * g.index_bytes);
            let to = store.runs().slot(head, row as usize);
            let entry = &lost[g.lost_entries_at() + i * g.lost_entry_bytes()..][..g.stored_bytes];
            let buffer = &mut store.buffers_mut()[to.buffer];
            let bytes = buffer.bytes();
            bytes_mut(buffer, bytes)[to.offset..][..g.stored_bytes].copy_from_slice(entry);
            index::exchange_row(&mut index, head, row, |words| {
                words.iter_mut().enumerate().for_each(|(w, to)| *to = word(key + 4 * w));
            });
        }
    }
}

fn bytes(buffer: &Buffer) -> &[u8] {
    // SAFETY: as many initialised bytes; nobody writes while the buffer is borrowed.
    unsafe { std::slice::from_raw_parts(buffer.address(), buffer.bytes()) }
}

fn bytes_mut(buffer: &mut Buffer, length: usize) -> &mut [u8] {
    assert!(buffer.bytes() >= length, "a buffer that is too short");
    // SAFETY: as many initialised bytes; the buffer is borrowed mutably.
    unsafe { std::slice::from_raw_parts_mut(buffer.address_mut(), length) }
}

fn words<'a>(tables: &'a Buffer, geometry: &PoolGeometry) -> &'a [u32] {
    assert!(tables.bytes() >= geometry.bytes(), "a pool that is too short");
    // SAFETY: as many initialised bytes, aligned to 64; any bytes are a u32; nobody writes while the buffer is borrowed.
    unsafe { std::slice::from_raw_parts(tables.address().cast(), geometry.bytes() / 4) }
}

fn words_mut<'a>(tables: &'a mut Buffer, geometry: &PoolGeometry) -> &'a mut [u32] {
    assert!(tables.bytes() >= geometry.bytes(), "a pool that is too short");
    // SAFETY: as in `words`; the buffer is borrowed mutably.
    unsafe { std::slice::from_raw_parts_mut(tables.address_mut().cast(), geometry.bytes() / 4) }
}
