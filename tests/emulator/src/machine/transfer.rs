//! What instructions bring from memory, and put there. Every access is of memory that exists, and aligned to its size.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::warp::{ALL, Copy16, Step, Warp, lanes_of};
use super::{LANES, Launch, Space};
use crate::ptx::{Access, Atomic, Instruction, NONE, Space as Named};

impl Warp {
    /// A place in the block's shared memory.
    #[inline(always)]
    pub(super) fn shared(&self, address: u64, bytes: u64, space: &Space) -> Step<*mut u8> {
        if address.checked_add(bytes).is_none_or(|end| end > space.shared_bytes as u64) {
            return Err(format!("{bytes} bytes at {address:#x} of {} shared ones", space.shared_bytes));
        }
        if !address.is_multiple_of(bytes) {
            return Err(format!("{bytes} bytes at {address:#x} of shared memory, which is not aligned"));
        }
        Ok(std::ptr::with_exposed_provenance_mut((space.shared_base() + address) as usize))
    }

    /// A place by its address.
    #[inline(always)]
    fn generic(&mut self, address: u64, bytes: u64, launch: &Launch<'_>, space: &Space) -> Step<*mut u8> {
        let (begin, end) = self.recent;
        if address < begin || address.checked_add(bytes).is_none_or(|last| last > end) {
            self.recent = look_up(address, bytes, launch, space)?;
        }
        if !address.is_multiple_of(bytes) {
            return Err(format!("{bytes} bytes at {address:#x}, which is not aligned"));
        }
        Ok(std::ptr::with_exposed_provenance_mut(address as usize))
    }

    /// Where each lane of a mask accesses memory, which is there; of other lanes, anything.
    #[inline(always)]
    fn places(
        &mut self,
        access: Access,
        i: &Instruction,
        mask: u32,
        launch: &Launch<'_>,
        space: &Space,
    ) -> Step<[u64; LANES]> {
        let mut places = [0; LANES];
        if access.short {
            let (base, mut lane) = (self.word(i.from[0]), 0);
            while lane < LANES {
                places[lane] = u64::from(base[lane]);
                lane += 1;
            }
        } else {
            places = *self.double(i.from[0]);
        }
        move_by(&mut places, i.offset as u64);
        let bytes = u64::from(access.bytes) * u64::from(access.count);
        let (mut least, mut most, mut low) = (u64::MAX, 0, 0);
        if mask == ALL {
            let mut lane = 0;
            while lane < LANES {
                (least, most, low) = (least.min(places[lane]), most.max(places[lane]), low | places[lane]);
                lane += 1;
            }
        } else {
            for lane in lanes_of(mask) {
                (least, most, low) = (least.min(places[lane]), most.max(places[lane]), low | places[lane]);
            }
        }
        let aligned = low & (bytes - 1) == 0;
        match access.space {
            Named::Shared => {
                if !aligned || most.checked_add(bytes).is_none_or(|end| end > space.shared_bytes as u64) {
                    for lane in lanes_of(mask) {
                        self.shared(places[lane], bytes, space)?;
                    }
                }
                move_by(&mut places, space.shared_base());
            }
            Named::Generic => {
                let (begin, end) = self.recent;
                if !aligned || least < begin || most.checked_add(bytes).is_none_or(|last| last > end) {
                    for lane in lanes_of(mask) {
                        self.generic(places[lane], bytes, launch, space)?;
                    }
                }
            }
            Named::Param => {
                let params = launch.params;
                if !aligned || most.checked_add(bytes).is_none_or(|end| end > params.len() as u64) {
                    return Err(format!("{bytes} bytes at {most:#x} of {} bytes of parameters", params.len()));
                }
                move_by(&mut places, params.as_ptr().expose_provenance() as u64);
            }
        }
        Ok(places)
    }

    #[inline(always)]
    pub(super) fn load(
        &mut self,
        access: Access,
        i: &Instruction,
        mask: u32,
        launch: &Launch<'_>,
        space: &Space,
    ) -> Step<()> {
        let places = self.places(access, i, mask, launch, space)?;
        for at in 0..usize::from(access.count) {
            let offset = at as u64 * u64::from(access.bytes);
            macro_rules! read {
                ($type:ty, $as:ty) => {
                    for lane in lanes_of(mask) {
                        let from = std::ptr::with_exposed_provenance::<$type>((places[lane] + offset) as usize);
                        // SAFETY: `places` found that the access lies in memory that exists and is aligned; kernels' own
                        // races are theirs, as on a device.
                        let value = unsafe { from.read() } as $as as u64;
                        if access.wide {
                            self.doubles[usize::from(i.to[at])][lane] = value;
                        } else {
                            self.words[usize::from(i.to[at])][lane] = value as u32;
                        }
                    }
                };
            }
            match (access.bytes, access.signed) {
                (1, false) => read!(u8, u64),
                (1, true) => read!(i8, i64),
                (2, false) => read!(u16, u64),
                (2, true) => read!(i16, i64),
                (4, false) => read!(u32, u64),
                (4, true) => read!(i32, i64),
                _ => read!(u64, u64),
            }
        }
        Ok(())
    }

    #[inline(always)]
    pub(super) fn store(
        &mut self,
        access: Access,
        i: &Instruction,
        mask: u32,
        launch: &Launch<'_>,
        space: &Space,
    ) -> Step<()> {
        match access.space {
            Named::Param => return Err("a store to parameters".to_owned()),
            Named::Generic if launch.early && !self.waited => {
                return Err("a store before it has waited for the launch before".to_owned());
            }
            _ => {}
        }
        let places = self.places(access, i, mask, launch, space)?;
        for at in 0..usize::from(access.count) {
            let offset = at as u64 * u64::from(access.bytes);
            let from = i.from[1 + at];
            macro_rules! write {
                ($type:ty) => {
                    for lane in lanes_of(mask) {
                        let value =
                            if access.wide { self.double(from)[lane] } else { u64::from(self.word(from)[lane]) };
                        let to = std::ptr::with_exposed_provenance_mut::<$type>((places[lane] + offset) as usize);
                        // SAFETY: as for loads.
                        unsafe { to.write(value as $type) };
                    }
                };
            }
            match access.bytes {
                1 => write!(u8),
                2 => write!(u16),
                4 => write!(u32),
                _ => write!(u64),
            }
        }
        Ok(())
    }

    pub(super) fn atomic(
        &mut self,
        what: Atomic,
        access: Access,
        i: &Instruction,
        mask: u32,
        launch: &Launch<'_>,
        space: &Space,
    ) -> Step<()> {
        let places = self.places(access, i, mask, launch, space)?;
        for lane in lanes_of(mask) {
            let at = std::ptr::with_exposed_provenance_mut::<u8>(places[lane] as usize);
            let operand = |this: &Warp, at: usize| match i.from[at] {
                NONE => 0,
                register if access.wide => this.double(register)[lane],
                register => u64::from(this.word(register)[lane]),
            };
            let (a, b) = (operand(self, 1), operand(self, 2));
            // SAFETY: `places` found that the access lies in memory that exists and is aligned to its size; other blocks
            // may touch it at once, with atomic operations.
            let before = unsafe {
                if access.wide {
                    let cell = AtomicU64::from_ptr(at.cast());
                    let update = |old: u64| Some(updated(what, access.signed, 64, old, a, b));
                    cell.fetch_update(Ordering::SeqCst, Ordering::SeqCst, update)
                } else {
                    let cell = AtomicU32::from_ptr(at.cast());
                    let update = |old: u32| Some(updated(what, access.signed, 32, u64::from(old), a, b) as u32);
                    cell.fetch_update(Ordering::SeqCst, Ordering::SeqCst, update).map(u64::from).map_err(u64::from)
                }
            };
            let (Ok(before) | Err(before)) = before;
            if i.to[0] != NONE {
                if access.wide {
                    self.doubles[usize::from(i.to[0])][lane] = before;
                } else {
                    self.words[usize::from(i.to[0])][lane] = before as u32;
                }
            }
        }
        Ok(())
    }

    pub(super) fn copy_async(&mut self, bytes: u8, i: &Instruction, mask: u32) {
        for lane in lanes_of(mask) {
            let copy = Copy16 {
                to: self.word(i.from[0])[lane],
                from: self.double(i.from[1])[lane],
                bytes,
                real: self.word(i.from[2])[lane].min(u32::from(bytes)) as u8,
            };
            self.copies.push(copy);
        }
    }

    /// Lets copies arrive until no more than `left` groups are on their way; without a number all of them, in groups or not.
    pub(super) fn arrive(&mut self, space: &Space, launch: &Launch<'_>, left: Option<usize>) -> Step<()> {
        while self.groups.len() > left.unwrap_or(0) {
            let group = self.groups.pop_front().expect("there is one");
            self.put(&group, space, launch)?;
        }
        if left.is_none() {
            let copies = std::mem::take(&mut self.copies);
            self.put(&copies, space, launch)?;
        }
        Ok(())
    }

    fn put(&mut self, copies: &[Copy16], space: &Space, launch: &Launch<'_>) -> Step<()> {
        for copy in copies {
            let bytes = u64::from(copy.bytes);
            let to = self.shared(u64::from(copy.to), bytes, space)?;
            let real = usize::from(copy.real);
            // SAFETY: the target was found in shared memory, the source, unless nothing of it is read, in memory that exists.
            unsafe {
                std::ptr::write_bytes(to, 0, usize::from(copy.bytes));
                if real > 0 {
                    let from = self.generic(copy.from, bytes, launch, space)?;
                    std::ptr::copy_nonoverlapping(from, to, real);
                }
            }
        }
        Ok(())
    }
}

/// Adds a base to addresses.
#[inline(always)]
fn move_by(places: &mut [u64; LANES], base: u64) {
    let mut lane = 0;
    while lane < LANES {
        places[lane] = places[lane].wrapping_add(base);
        lane += 1;
    }
}

/// The range that an access by address lies in: device or pinned memory, or the block's own.
fn look_up(address: u64, bytes: u64, launch: &Launch<'_>, space: &Space) -> Step<(u64, u64)> {
    let own = [(space.shared_base(), space.shared_bytes as u64), (space.local_base(), space.local.len() as u64 * 16)];
    let own = own.into_iter().map(|(begin, bytes)| (begin, begin + bytes));
    let end = address.checked_add(bytes);
    own.into_iter()
        .find(|range| address >= range.0 && end.is_some_and(|end| end <= range.1))
        .or_else(|| (launch.memory)(address, bytes))
        .ok_or_else(|| format!("{bytes} bytes at {address:#x}, where there is no memory"))
}

fn updated(what: Atomic, signed: bool, bits: u32, old: u64, a: u64, b: u64) -> u64 {
    let signed_of = |x: u64| if bits == 32 { i64::from(x as u32 as i32) } else { x as i64 };
    let less = |x: u64, y: u64| if signed { signed_of(x) < signed_of(y) } else { x < y };
    match what {
        Atomic::Add => old.wrapping_add(a),
        Atomic::Min if less(a, old) => a,
        Atomic::Max if less(old, a) => a,
        Atomic::Swap if old == a => b,
        Atomic::Min | Atomic::Max | Atomic::Swap => old,
        Atomic::And => old & a,
        Atomic::Or => old | a,
        Atomic::Xor => old ^ a,
        Atomic::Exchange => a,
    }
}
