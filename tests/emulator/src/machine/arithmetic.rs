//! What instructions do to registers.
//!
//! Every lane is computed, which a compiler makes wide instructions of, and those that take part are written.

use super::warp::{ALL, Step, Warp, lanes_of};
use super::{LANES, Launch, Space};
use crate::ptx::*;

type Words = [u32; LANES];
type Doubles = [u64; LANES];

/// An array of what an expression is for each lane. (Loops that a compiler surely unrolls: functions of the standard library
/// that take closures are compiled for narrow registers.)
macro_rules! lanes {
    ($zero:expr, |$lane:ident| $value:expr) => {{
        let mut values = [$zero; LANES];
        let mut $lane = 0;
        while $lane < LANES {
            values[$lane] = $value;
            $lane += 1;
        }
        values
    }};
}

/// A word of each lane's words.
macro_rules! words {
    ($self:ident, $i:ident, $mask:ident, |$a:ident| $value:expr) => {{
        let from = $self.word($i.from[0]);
        let values = lanes!(0u32, |lane| {
            let $a = from[lane];
            $value
        });
        $self.set_word($i.to[0], $mask, &values)
    }};
    ($self:ident, $i:ident, $mask:ident, |$a:ident, $b:ident| $value:expr) => {{
        let (first, second) = ($self.word($i.from[0]), $self.word($i.from[1]));
        let values = lanes!(0u32, |lane| {
            let ($a, $b) = (first[lane], second[lane]);
            $value
        });
        $self.set_word($i.to[0], $mask, &values)
    }};
    ($self:ident, $i:ident, $mask:ident, |$a:ident, $b:ident, $c:ident| $value:expr) => {{
        let (first, second, third) = ($self.word($i.from[0]), $self.word($i.from[1]), $self.word($i.from[2]));
        let values = lanes!(0u32, |lane| {
            let ($a, $b, $c) = (first[lane], second[lane], third[lane]);
            $value
        });
        $self.set_word($i.to[0], $mask, &values)
    }};
}

/// The same of two floats.
macro_rules! floats {
    ($self:ident, $i:ident, $mask:ident, |$a:ident, $b:ident| $value:expr) => {
        words!($self, $i, $mask, |$a, $b| {
            let ($a, $b) = (f($a), f($b));
            ($value).to_bits()
        })
    };
}

/// A double of each lane's doubles.
macro_rules! doubles {
    ($self:ident, $i:ident, $mask:ident, |$a:ident| $value:expr) => {{
        let from = $self.double($i.from[0]);
        let values = lanes!(0u64, |lane| {
            let $a = from[lane];
            $value
        });
        $self.set_double($i.to[0], $mask, &values)
    }};
    ($self:ident, $i:ident, $mask:ident, |$a:ident, $b:ident| $value:expr) => {{
        let (first, second) = ($self.double($i.from[0]), $self.double($i.from[1]));
        let values = lanes!(0u64, |lane| {
            let ($a, $b) = (first[lane], second[lane]);
            $value
        });
        $self.set_double($i.to[0], $mask, &values)
    }};
}

/// A predicate of each lane's two numbers, as `of` reads them.
macro_rules! compared {
    ($self:ident, $i:ident, $mask:ident, $how:ident, $file:ident, |$a:ident| $of:expr) => {{
        let (first, second) = ($self.$file($i.from[0]), $self.$file($i.from[1]));
        macro_rules! all {
            ($compare:tt) => {{
                let (mut values, mut lane) = (0u32, 0);
                while lane < LANES {
                    let $a = first[lane];
                    let x = $of;
                    let $a = second[lane];
                    let y = $of;
                    values |= u32::from(x $compare y) << lane;
                    lane += 1;
                }
                values
            }};
        }
        // (What holds of floats that are no numbers is what does not of others.)
        let values = match $how {
            Compare::Eq => all!(==),
            Compare::Ne => all!(<) | all!(>),
            Compare::Lt => all!(<),
            Compare::Le => all!(<=),
            Compare::Gt => all!(>),
            Compare::Ge => all!(>=),
            Compare::Equ => !(all!(<) | all!(>)),
            Compare::Neu => !all!(==),
            Compare::Ltu => !all!(>=),
            Compare::Leu => !all!(>),
            Compare::Gtu => !all!(<=),
            Compare::Geu => !all!(<),
        };
        $self.set_predicate($i.to[0], $mask, values)
    }};
}

#[inline(always)]
fn f(x: u32) -> f32 {
    f32::from_bits(x)
}

#[inline(always)]
fn d(x: u64) -> f64 {
    f64::from_bits(x)
}

impl Warp {
    #[inline(always)]
    pub(super) fn word(&self, register: Register) -> &Words {
        &self.words[usize::from(register)]
    }

    #[inline(always)]
    pub(super) fn double(&self, register: Register) -> &Doubles {
        &self.doubles[usize::from(register)]
    }

    #[inline(always)]
    pub(super) fn set_word(&mut self, register: Register, mask: u32, values: &Words) {
        let to = &mut self.words[usize::from(register)];
        if mask == ALL {
            *to = *values;
        } else {
            for lane in lanes_of(mask) {
                to[lane] = values[lane];
            }
        }
    }

    #[inline(always)]
    pub(super) fn set_double(&mut self, register: Register, mask: u32, values: &Doubles) {
        let to = &mut self.doubles[usize::from(register)];
        if mask == ALL {
            *to = *values;
        } else {
            for lane in lanes_of(mask) {
                to[lane] = values[lane];
            }
        }
    }

    #[inline(always)]
    pub(super) fn set_predicate(&mut self, register: Register, mask: u32, values: u32) {
        let to = &mut self.predicates[usize::from(register)];
        *to = (*to & !mask) | (values & mask);
    }

    /// Takes an instruction that does not say where to go on, for the lanes of a mask.
    #[inline(always)]
    pub(super) fn execute(&mut self, i: &Instruction, mask: u32, launch: &Launch<'_>, space: &mut Space) -> Step<()> {
        match i.op {
            Op::WarpBarrier => {}
            Op::WaitForPrevious => self.waited = true,
            Op::Exit | Op::Branch | Op::Barrier => unreachable!("these are the warp's to take"),
            Op::Trap => return Err("a trap".to_owned()),
            Op::W1(op) => self.w1(op, i, mask),
            Op::W2(op) => self.w2(op, i, mask),
            Op::W3(op) => self.w3(op, i, mask),
            Op::D1(op) => match op {
                D1::Move => doubles!(self, i, mask, |a| a),
                D1::Not => doubles!(self, i, mask, |a| !a),
                D1::Neg => doubles!(self, i, mask, |a| a.wrapping_neg()),
                D1::NegF => doubles!(self, i, mask, |a| a ^ 1 << 63),
                D1::AbsF => doubles!(self, i, mask, |a| a & !(1 << 63)),
                D1::ReciprocalF => doubles!(self, i, mask, |a| (1.0 / d(a)).to_bits()),
            },
            Op::D2(op) => self.d2(op, i, mask),
            Op::D3(op) => {
                let (a, b, c) = (self.double(i.from[0]), self.double(i.from[1]), self.double(i.from[2]));
                let values = lanes!(0u64, |lane| match op {
                    D3::Mad => a[lane].wrapping_mul(b[lane]).wrapping_add(c[lane]),
                    D3::FmaF => d(a[lane]).mul_add(d(b[lane]), d(c[lane])).to_bits(),
                });
                self.set_double(i.to[0], mask, &values);
            }
            Op::Shift(shift) => {
                let (a, by) = (self.double(i.from[0]), self.word(i.from[1]));
                let values = lanes!(0u64, |lane| {
                    let (a, by) = (a[lane], by[lane]);
                    match shift {
                        Shift::Left => a.checked_shl(by).unwrap_or(0),
                        Shift::RightU => a.checked_shr(by).unwrap_or(0),
                        Shift::RightS => (a as i64 >> by.min(63)) as u64,
                    }
                });
                self.set_double(i.to[0], mask, &values);
            }
            Op::MulWide { signed } => {
                let (a, b) = (self.word(i.from[0]), self.word(i.from[1]));
                let values = lanes!(0u64, |lane| product(signed, a[lane], b[lane]));
                self.set_double(i.to[0], mask, &values);
            }
            Op::MadWide { signed } => {
                let (a, b, c) = (self.word(i.from[0]), self.word(i.from[1]), self.double(i.from[2]));
                let values = lanes!(0u64, |lane| product(signed, a[lane], b[lane]).wrapping_add(c[lane]));
                self.set_double(i.to[0], mask, &values);
            }
            Op::Carried { what, reads, writes } => self.carried(what, reads, writes, i, mask),
            Op::BitInsert { wide } => {
                for lane in lanes_of(mask) {
                    let (at, bits) = (self.word(i.from[2])[lane] & 0xff, self.word(i.from[3])[lane] & 0xff);
                    if wide {
                        let (a, b) = (self.double(i.from[0])[lane], self.double(i.from[1])[lane]);
                        self.doubles[usize::from(i.to[0])][lane] = insert(a, b, at, bits, 64);
                    } else {
                        let (a, b) = (self.word(i.from[0])[lane], self.word(i.from[1])[lane]);
                        self.words[usize::from(i.to[0])][lane] =
                            insert(u64::from(a), u64::from(b), at, bits, 32) as u32;
                    }
                }
            }
            Op::CompareW(how, kind) => match kind {
                Type::U32 => compared!(self, i, mask, how, word, |a| a),
                Type::S32 => compared!(self, i, mask, how, word, |a| a as i32),
                Type::U16 => compared!(self, i, mask, how, word, |a| a as u16),
                Type::S16 => compared!(self, i, mask, how, word, |a| a as i16),
                Type::F32 => compared!(self, i, mask, how, word, |a| f(a)),
                _ => return Err(format!("a comparison of {kind:?}")),
            },
            Op::CompareD(how, kind) => match kind {
                Type::U64 => compared!(self, i, mask, how, double, |a| a),
                Type::S64 => compared!(self, i, mask, how, double, |a| a as i64),
                Type::F64 => compared!(self, i, mask, how, double, |a| d(a)),
                _ => return Err(format!("a comparison of {kind:?}")),
            },
            Op::SelectW => {
                let (a, b) = (self.word(i.from[0]), self.word(i.from[1]));
                let p = self.predicates[usize::from(i.from[2])];
                let values = lanes!(0u32, |lane| if p >> lane & 1 == 1 { a[lane] } else { b[lane] });
                self.set_word(i.to[0], mask, &values);
            }
            Op::SelectD => {
                let (a, b) = (self.double(i.from[0]), self.double(i.from[1]));
                let p = self.predicates[usize::from(i.from[2])];
                let values = lanes!(0u64, |lane| if p >> lane & 1 == 1 { a[lane] } else { b[lane] });
                self.set_double(i.to[0], mask, &values);
            }
            Op::Logic(op) => {
                let of = |at: usize| self.predicates[usize::from(i.from[at])];
                let values = match op {
                    Logic::And => of(0) & of(1),
                    Logic::Or => of(0) | of(1),
                    Logic::Xor => of(0) ^ of(1),
                    Logic::Not => !of(0),
                    Logic::Move => of(0),
                };
                self.set_predicate(i.to[0], mask, values);
            }
            Op::Widen { signed } => {
                let a = self.word(i.from[0]);
                let values = lanes!(0u64, |lane| if signed { a[lane] as i32 as u64 } else { u64::from(a[lane]) });
                self.set_double(i.to[0], mask, &values);
            }
            Op::Truncate => {
                let a = self.double(i.from[0]);
                let values = lanes!(0u32, |lane| a[lane] as u32);
                self.set_word(i.to[0], mask, &values);
            }
            Op::Convert { from, to, rounding, saturated, whole } => {
                for lane in lanes_of(mask) {
                    let a =
                        if from.wide() { self.double(i.from[0])[lane] } else { u64::from(self.word(i.from[0])[lane]) };
                    let value = convert(from, to, rounding, saturated, whole, a)?;
                    if to.wide() {
                        self.doubles[usize::from(i.to[0])][lane] = value;
                    } else {
                        self.words[usize::from(i.to[0])][lane] = value as u32;
                    }
                }
            }
            Op::Pack { bytes, count, into_wide } => {
                let bits = u32::from(bytes) * 8;
                for lane in lanes_of(mask) {
                    let mut value = 0;
                    for at in (0..usize::from(count)).rev() {
                        let element = u64::from(self.word(i.from[at])[lane]) & ((1 << bits) - 1);
                        value = value << bits | element;
                    }
                    if into_wide {
                        self.doubles[usize::from(i.to[0])][lane] = value;
                    } else {
                        self.words[usize::from(i.to[0])][lane] = value as u32;
                    }
                }
            }
            Op::Unpack { bytes, count, from_wide } => {
                let bits = u32::from(bytes) * 8;
                for lane in lanes_of(mask) {
                    let mut value =
                        if from_wide { self.double(i.from[0])[lane] } else { u64::from(self.word(i.from[0])[lane]) };
                    for at in 0..usize::from(count) {
                        self.words[usize::from(i.to[at])][lane] = (value & ((1 << bits) - 1)) as u32;
                        value >>= bits;
                    }
                }
            }
            Op::Load(access) => self.load(access, i, mask, launch, space)?,
            Op::Store(access) => self.store(access, i, mask, launch, space)?,
            Op::Atomic { what, access } => self.atomic(what, access, i, mask, launch, space)?,
            Op::SharedToGeneric => {
                let base = space.shared_base();
                doubles!(self, i, mask, |a| a.wrapping_add(base));
            }
            Op::GenericToShared => {
                let base = space.shared_base();
                doubles!(self, i, mask, |a| a.wrapping_sub(base));
            }
            Op::CopyAsync { bytes } => self.copy_async(bytes, i, mask),
            Op::CopyGroup => {
                let group = std::mem::take(&mut self.copies);
                self.groups.push_back(group);
            }
            Op::CopyWait => {
                self.arrive(space, launch, usize::try_from(i.offset).ok())?;
            }
            Op::Shuffle(how) => self.shuffle(how, i, mask),
            Op::Vote(vote) => self.vote(vote, i, mask),
            Op::LoadMatrices { transposed, count } => self.load_matrices(transposed, count, i, space)?,
            Op::TransposeMatrix => self.transpose_matrix(i),
            Op::Mma { bf16 } => self.mma(bf16, i),
        }
        Ok(())
    }

    #[inline(always)]
    fn w1(&mut self, op: W1, i: &Instruction, mask: u32) {
        match op {
            W1::Move => words!(self, i, mask, |a| a),
            W1::Not => words!(self, i, mask, |a| !a),
            W1::Neg => words!(self, i, mask, |a| a.wrapping_neg()),
            W1::AbsS => words!(self, i, mask, |a| (a as i32).wrapping_abs() as u32),
            W1::Popc => words!(self, i, mask, |a| a.count_ones()),
            W1::Clz => words!(self, i, mask, |a| a.leading_zeros()),
            W1::Brev => words!(self, i, mask, |a| a.reverse_bits()),
            W1::Bfind => words!(self, i, mask, |a| 31u32.wrapping_sub(a.leading_zeros())),
            W1::BfindShift => words!(self, i, mask, |a| if a == 0 { u32::MAX } else { a.leading_zeros() }),
            W1::NegF => words!(self, i, mask, |a| a ^ 1 << 31),
            W1::AbsF => words!(self, i, mask, |a| a & !(1 << 31)),
            W1::Exp2F => words!(self, i, mask, |a| f(a).exp2().to_bits()),
            W1::Exp2FlushedF => words!(self, i, mask, |a| flushed(flushed(f(a)).exp2()).to_bits()),
            W1::ReciprocalF => words!(self, i, mask, |a| (1.0 / f(a)).to_bits()),
            W1::RootF => words!(self, i, mask, |a| f(a).sqrt().to_bits()),
            W1::Not16 => words!(self, i, mask, |a| !a & 0xffff),
            W1::Neg16 => words!(self, i, mask, |a| a.wrapping_neg() & 0xffff),
        }
    }

    #[inline(always)]
    fn w2(&mut self, op: W2, i: &Instruction, mask: u32) {
        match op {
            W2::Add => words!(self, i, mask, |a, b| a.wrapping_add(b)),
            W2::Sub => words!(self, i, mask, |a, b| a.wrapping_sub(b)),
            W2::Mul => words!(self, i, mask, |a, b| a.wrapping_mul(b)),
            W2::MulHighU => words!(self, i, mask, |a, b| (product(false, a, b) >> 32) as u32),
            W2::MulHighS => words!(self, i, mask, |a, b| (product(true, a, b) >> 32) as u32),
            // (What a device makes of a division by zero: all ones.)
            W2::DivU => words!(self, i, mask, |a, b| a.checked_div(b).unwrap_or(u32::MAX)),
            W2::DivS => words!(self, i, mask, |a, b| {
                if b == 0 { u32::MAX } else { (a as i32).wrapping_div(b as i32) as u32 }
            }),
            W2::RemU => words!(self, i, mask, |a, b| a.checked_rem(b).unwrap_or(a)),
            W2::RemS => words!(self, i, mask, |a, b| if b == 0 { a } else { (a as i32).wrapping_rem(b as i32) as u32 }),
            W2::MinU => words!(self, i, mask, |a, b| a.min(b)),
            W2::MinS => words!(self, i, mask, |a, b| (a as i32).min(b as i32) as u32),
            W2::MaxU => words!(self, i, mask, |a, b| a.max(b)),
            W2::MaxS => words!(self, i, mask, |a, b| (a as i32).max(b as i32) as u32),
            W2::And => words!(self, i, mask, |a, b| a & b),
            W2::Or => words!(self, i, mask, |a, b| a | b),
            W2::Xor => words!(self, i, mask, |a, b| a ^ b),
            W2::Shl => words!(self, i, mask, |a, b| if b > 31 { 0 } else { a << b }),
            W2::ShrU => words!(self, i, mask, |a, b| if b > 31 { 0 } else { a >> b }),
            W2::ShrS => words!(self, i, mask, |a, b| (a as i32 >> b.min(31)) as u32),
            W2::AddF => floats!(self, i, mask, |a, b| a + b),
            W2::SubF => floats!(self, i, mask, |a, b| a - b),
            W2::MulF => floats!(self, i, mask, |a, b| a * b),
            W2::DivF => floats!(self, i, mask, |a, b| a / b),
            W2::MinF => floats!(self, i, mask, |a, b| a.min(b)),
            W2::MaxF => floats!(self, i, mask, |a, b| a.max(b)),
            W2::Add16 => words!(self, i, mask, |a, b| a.wrapping_add(b) & 0xffff),
            W2::Sub16 => words!(self, i, mask, |a, b| a.wrapping_sub(b) & 0xffff),
            W2::Mul16 => words!(self, i, mask, |a, b| a.wrapping_mul(b) & 0xffff),
            W2::Shl16 => words!(self, i, mask, |a, b| if b > 15 { 0 } else { a << b & 0xffff }),
            W2::ShrU16 => words!(self, i, mask, |a, b| if b > 15 { 0 } else { (a & 0xffff) >> b }),
            W2::ShrS16 => words!(self, i, mask, |a, b| u32::from((a as i16 >> b.min(15)) as u16)),
            W2::MulWideU16 => words!(self, i, mask, |a, b| (a & 0xffff) * (b & 0xffff)),
            W2::MulWideS16 => words!(self, i, mask, |a, b| (i32::from(a as i16) * i32::from(b as i16)) as u32),
            W2::PairBf16 => words!(self, i, mask, |a, b| {
                let bits = |x| u32::from(half::bf16::from_f32(f(x)).to_bits());
                bits(a) << 16 | bits(b)
            }),
            W2::PairF16 => words!(self, i, mask, |a, b| {
                let bits = |x| u32::from(half::f16::from_f32(f(x)).to_bits());
                bits(a) << 16 | bits(b)
            }),
        }
    }

    #[inline(always)]
    fn w3(&mut self, op: W3, i: &Instruction, mask: u32) {
        match op {
            W3::Mad => words!(self, i, mask, |a, b, c| a.wrapping_mul(b).wrapping_add(c)),
            W3::FmaF => words!(self, i, mask, |a, b, c| f(a).mul_add(f(b), f(c)).to_bits()),
            W3::FmaDownF => words!(self, i, mask, |a, b, c| fma_down(f(a), f(b), f(c)).to_bits()),
            W3::Permute => words!(self, i, mask, |a, b, c| permute(a, b, c)),
            W3::Dot4SS => words!(self, i, mask, |a, b, c| {
                let (a, b) = (a.to_le_bytes(), b.to_le_bytes());
                (0..4).fold(c, |sum, k| sum.wrapping_add((i32::from(a[k] as i8) * i32::from(b[k] as i8)) as u32))
            }),
            W3::Dot4UU => words!(self, i, mask, |a, b, c| {
                let (a, b) = (a.to_le_bytes(), b.to_le_bytes());
                (0..4).fold(c, |sum, k| sum.wrapping_add(u32::from(a[k]) * u32::from(b[k])))
            }),
            W3::Dot2LowUU => words!(self, i, mask, |a, b, c| {
                c.wrapping_add((a & 0xffff) * (b & 0xff)).wrapping_add((a >> 16) * (b >> 8 & 0xff))
            }),
        }
    }

    #[inline(always)]
    fn d2(&mut self, op: D2, i: &Instruction, mask: u32) {
        match op {
            D2::Add => doubles!(self, i, mask, |a, b| a.wrapping_add(b)),
            D2::Sub => doubles!(self, i, mask, |a, b| a.wrapping_sub(b)),
            D2::Mul => doubles!(self, i, mask, |a, b| a.wrapping_mul(b)),
            D2::MulHighU => doubles!(self, i, mask, |a, b| ((u128::from(a) * u128::from(b)) >> 64) as u64),
            D2::DivU => doubles!(self, i, mask, |a, b| a.checked_div(b).unwrap_or(u64::MAX)),
            D2::DivS => doubles!(self, i, mask, |a, b| {
                if b == 0 { u64::MAX } else { (a as i64).wrapping_div(b as i64) as u64 }
            }),
            D2::RemU => doubles!(self, i, mask, |a, b| a.checked_rem(b).unwrap_or(a)),
            D2::RemS => {
                doubles!(self, i, mask, |a, b| if b == 0 { a } else { (a as i64).wrapping_rem(b as i64) as u64 })
            }
            D2::MinU => doubles!(self, i, mask, |a, b| a.min(b)),
            D2::MinS => doubles!(self, i, mask, |a, b| (a as i64).min(b as i64) as u64),
            D2::MaxU => doubles!(self, i, mask, |a, b| a.max(b)),
            D2::MaxS => doubles!(self, i, mask, |a, b| (a as i64).max(b as i64) as u64),
            D2::And => doubles!(self, i, mask, |a, b| a & b),
            D2::Or => doubles!(self, i, mask, |a, b| a | b),
            D2::Xor => doubles!(self, i, mask, |a, b| a ^ b),
            D2::AddF => doubles!(self, i, mask, |a, b| (d(a) + d(b)).to_bits()),
            D2::SubF => doubles!(self, i, mask, |a, b| (d(a) - d(b)).to_bits()),
            D2::MulF => doubles!(self, i, mask, |a, b| (d(a) * d(b)).to_bits()),
            D2::DivF => doubles!(self, i, mask, |a, b| (d(a) / d(b)).to_bits()),
        }
    }

    fn carried(&mut self, what: Carried, reads: bool, writes: bool, i: &Instruction, mask: u32) {
        for lane in lanes_of(mask) {
            let of = |at: usize| u64::from(self.word(i.from[at])[lane]);
            let carry = if reads { u64::from(self.carry >> lane & 1) } else { 0 };
            let sum = match what {
                Carried::Add => of(0) + of(1) + carry,
                // The flag of a difference says that something was borrowed.
                Carried::Sub => of(0).wrapping_sub(of(1)).wrapping_sub(carry),
                Carried::MadLow => ((of(0) * of(1)) & 0xffff_ffff) + of(2) + carry,
                Carried::MadHigh => ((of(0) * of(1)) >> 32) + of(2) + carry,
            };
            self.words[usize::from(i.to[0])][lane] = sum as u32;
            if writes {
                self.carry = (self.carry & !(1 << lane)) | ((sum >> 32) as u32 & 1) << lane;
            }
        }
    }

    fn shuffle(&mut self, how: Shuffle, i: &Instruction, mask: u32) {
        let (value, by, limits) = (*self.word(i.from[0]), *self.word(i.from[1]), *self.word(i.from[2]));
        let (mut values, mut valid) = ([0; LANES], 0);
        for lane in lanes_of(mask) {
            let at = lane as u32;
            let (by, clamp, segment) = (by[lane] & 31, limits[lane] & 31, limits[lane] >> 8 & 31);
            let (most, least) = ((at & segment) | (clamp & !segment), at & segment);
            let (source, within) = match how {
                Shuffle::Up => (at.wrapping_sub(by), at as i32 - by as i32 >= most as i32),
                Shuffle::Down => (at + by, at + by <= most),
                Shuffle::Butterfly => (at ^ by, at ^ by <= most),
                Shuffle::Index => {
                    let source = least | (by & !segment);
                    (source, source <= most)
                }
            };
            values[lane] = value[if within { source as usize } else { lane }];
            valid |= u32::from(within) << lane;
        }
        self.set_word(i.to[0], mask, &values);
        if i.to[1] != NONE {
            self.set_predicate(i.to[1], mask, valid);
        }
    }

    fn vote(&mut self, vote: Vote, i: &Instruction, mask: u32) {
        if vote == Vote::Match {
            let value = *self.word(i.from[0]);
            let values = lanes!(0u32, |lane| {
                lanes_of(mask).filter(|&other| value[other] == value[lane]).fold(0, |same, other| same | 1 << other)
            });
            return self.set_word(i.to[0], mask, &values);
        }
        let value = self.predicates[usize::from(i.from[0])] & mask;
        match vote {
            Vote::Ballot => self.set_word(i.to[0], mask, &[value; LANES]),
            Vote::All => self.set_predicate(i.to[0], mask, if value == mask { ALL } else { 0 }),
            Vote::Any => self.set_predicate(i.to[0], mask, if value != 0 { ALL } else { 0 }),
            Vote::Match => unreachable!("done above"),
        }
    }
}

#[inline(always)]
fn product(signed: bool, a: u32, b: u32) -> u64 {
    if signed { (i64::from(a as i32) * i64::from(b as i32)) as u64 } else { u64::from(a) * u64::from(b) }
}

/// What is denormal as zero.
#[inline(always)]
fn flushed(x: f32) -> f32 {
    if x.is_subnormal() { 0.0f32.copysign(x) } else { x }
}

/// a · b + c, rounded down once.
#[inline(always)]
fn fma_down(a: f32, b: f32, c: f32) -> f32 {
    // The product is exact; what the sum of two doubles loses is found exactly (Knuth).
    let (p, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let sum = p + c;
    let part = sum - p;
    let lost = (p - (sum - part)) + (c - part);
    let near = sum as f32;
    let above = f64::from(near) > sum || (f64::from(near) == sum && lost < 0.0);
    if above && near.is_finite() { near.next_down() } else { near }
}

/// `prmt`: each nibble of the selector picks a byte of two words, or its sign.
#[inline(always)]
fn permute(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = (u64::from(b) << 32 | u64::from(a)).to_le_bytes();
    let of = |k: u32| {
        let nibble = selector >> (4 * k) & 15;
        let byte = bytes[(nibble & 7) as usize];
        if nibble & 8 == 0 { byte } else { (byte as i8 >> 7) as u8 }
    };
    u32::from_le_bytes([of(0), of(1), of(2), of(3)])
}

/// `bfi`: the lower `bits` of `a` over those of `b` from `at` on.
#[inline(always)]
fn insert(a: u64, b: u64, at: u32, bits: u32, width: u32) -> u64 {
    let bits = bits.min(width.saturating_sub(at));
    if bits == 0 {
        return b;
    }
    let field = (u64::MAX >> (64 - bits)) << at;
    (b & !field) | (a << at & field)
}

/// `cvt`, for what is neither a widening nor a truncation.
fn convert(from: Type, to: Type, rounding: Rounding, saturated: bool, whole: bool, a: u64) -> Step<u64> {
    let integer = match from {
        Type::U8 => Some(i128::from(a as u8)),
        Type::S8 => Some(i128::from(a as i8)),
        Type::U16 => Some(i128::from(a as u16)),
        Type::S16 => Some(i128::from(a as i16)),
        Type::U32 => Some(i128::from(a as u32)),
        Type::S32 => Some(i128::from(a as i32)),
        Type::U64 => Some(i128::from(a)),
        Type::S64 => Some(i128::from(a as i64)),
        _ => None,
    };
    // (A narrowing of an integer takes its lower bits; one that comes from a float is clamped.)
    if let (Some(integer), Some(bits)) = (integer, bits_of_integer(to)) {
        let mask = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
        return Ok(integer as u64 & mask);
    }
    let round = |x: f64| match rounding {
        Rounding::Nearest => x.round_ties_even(),
        Rounding::Zero => x.trunc(),
        Rounding::Down => x.floor(),
        Rounding::Up => x.ceil(),
    };
    let mut x = match from {
        Type::F16 => f64::from(half::f16::from_bits(a as u16).to_f32()),
        Type::Bf16 => f64::from(half::bf16::from_bits(a as u16).to_f32()),
        Type::F32 => f64::from(f(a as u32)),
        Type::F64 => d(a),
        // Exact, or of 64 bits: of those none is met.
        _ => integer.ok_or("a conversion")? as f64,
    };
    if whole {
        x = round(x);
    }
    if saturated {
        x = if x.is_nan() { 0.0 } else { x.clamp(0.0, 1.0) };
    }
    if rounding != Rounding::Nearest && !whole {
        return Err("a conversion that does not round to nearest".to_owned());
    }
    Ok(match to {
        Type::F16 => u64::from(half::f16::from_f64(x).to_bits()),
        // (Of a float, which has no more than a double: rounded once.)
        Type::Bf16 => u64::from(half::bf16::from_f32(x as f32).to_bits()),
        Type::F32 => u64::from((x as f32).to_bits()),
        Type::F64 => x.to_bits(),
        Type::U32 => u64::from(x as u32),
        Type::S32 => u64::from(x as i32 as u32),
        Type::U64 => x as u64,
        Type::S64 => x as i64 as u64,
        Type::U8 | Type::S8 | Type::U16 | Type::S16 => return Err(format!("a conversion to {to:?}")),
    })
}

fn bits_of_integer(kind: Type) -> Option<u32> {
    match kind {
        // (In registers of 16 or 32 bits, of which conversions from them read what they need.)
        Type::U8 | Type::S8 => Some(8),
        Type::U16 | Type::S16 => Some(16),
        Type::U32 | Type::S32 => Some(32),
        Type::U64 | Type::S64 => Some(64),
        _ => None,
    }
}
