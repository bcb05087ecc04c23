//! What arithmetic instructions' names say.

use super::decode::{Decoder, File, Operand, type_of};
use super::instruction::*;

impl Decoder<'_> {
    pub(super) fn arithmetic(&mut self, opcode: &str, parts: &[&str], operands: &[Operand]) -> Result<(), String> {
        let last = *parts.last().expect("there is a first");
        let has = |part: &str| parts.contains(&part);
        let unknown = || Err(format!("the instruction {opcode}"));
        // Names whose type does not end them.
        match opcode {
            "dp4a.s32.s32" => return self.uniform(Op::W3(W3::Dot4SS), File::Word, operands),
            "dp4a.u32.u32" => return self.uniform(Op::W3(W3::Dot4UU), File::Word, operands),
            "dp2a.lo.u32.u32" => return self.uniform(Op::W3(W3::Dot2LowUU), File::Word, operands),
            "prmt.b32" => return self.uniform(Op::W3(W3::Permute), File::Word, operands),
            "ex2.approx.f32" => return self.uniform(Op::W1(W1::Exp2F), File::Word, operands),
            "ex2.approx.ftz.f32" => return self.uniform(Op::W1(W1::Exp2FlushedF), File::Word, operands),
            _ => {}
        }
        let kind = type_of(last)?;
        if has("ftz") && parts[0] != "rcp" {
            return unknown();
        }
        let signed = matches!(kind, Type::S16 | Type::S32 | Type::S64);
        let whole = !matches!(kind, Type::F16 | Type::Bf16 | Type::F32 | Type::F64);
        if (has("cc") || matches!(parts[0], "addc" | "subc" | "madc")) && matches!(kind, Type::U32 | Type::S32) {
            let what = match parts[0] {
                "add" | "addc" => Carried::Add,
                "sub" | "subc" => Carried::Sub,
                "mad" | "madc" if has("lo") => Carried::MadLow,
                "mad" | "madc" if has("hi") => Carried::MadHigh,
                _ => return unknown(),
            };
            let op = Op::Carried { what, reads: parts[0].ends_with('c'), writes: has("cc") };
            return self.uniform(op, File::Word, operands);
        }
        if has("wide") {
            let (a, b) = (self.word(&operands[1])?, self.word(&operands[2])?);
            match (parts[0], kind) {
                ("mul", Type::U16 | Type::S16) => {
                    let to = self.word(&operands[0])?;
                    self.emit(Op::W2(if signed { W2::MulWideS16 } else { W2::MulWideU16 }), &[to], &[a, b]);
                }
                ("mul", Type::U32 | Type::S32) => {
                    let to = self.double(&operands[0])?;
                    self.emit(Op::MulWide { signed }, &[to], &[a, b]);
                }
                ("mad", Type::U32 | Type::S32) => {
                    let (to, c) = (self.double(&operands[0])?, self.double(&operands[3])?);
                    self.emit(Op::MadWide { signed }, &[to], &[a, b, c]);
                }
                _ => return unknown(),
            }
            return Ok(());
        }
        if parts[0] == "fma" && has("rm") && kind == Type::F32 {
            return self.uniform(Op::W3(W3::FmaDownF), File::Word, operands);
        }
        if ["rm", "rp", "rz", "sat", "hi"].iter().any(|part| has(part)) && parts[0] != "mul" {
            return unknown();
        }
        if kind.wide() {
            if matches!(parts[0], "shl" | "shr") {
                let shift = match (parts[0], signed) {
                    ("shl", _) => Shift::Left,
                    (_, false) => Shift::RightU,
                    (_, true) => Shift::RightS,
                };
                let (to, from) = (self.double(&operands[0])?, self.double(&operands[1])?);
                let by = self.word(&operands[2])?;
                self.emit(Op::Shift(shift), &[to], &[from, by]);
                return Ok(());
            }
            if matches!(parts[0], "popc" | "clz") {
                return self.count_bits(parts[0], operands);
            }
            let op = match (parts[0], whole, signed) {
                ("not", true, _) => Op::D1(D1::Not),
                ("neg", true, _) => Op::D1(D1::Neg),
                ("neg", false, _) => Op::D1(D1::NegF),
                ("abs", false, _) => Op::D1(D1::AbsF),
                ("rcp", false, _) => Op::D1(D1::ReciprocalF),
                ("add", true, _) => Op::D2(D2::Add),
                ("sub", true, _) => Op::D2(D2::Sub),
                ("mul", true, false) if has("hi") => Op::D2(D2::MulHighU),
                ("mul", true, _) if has("lo") => Op::D2(D2::Mul),
                ("div", true, false) => Op::D2(D2::DivU),
                ("div", true, true) => Op::D2(D2::DivS),
                ("rem", true, false) => Op::D2(D2::RemU),
                ("rem", true, true) => Op::D2(D2::RemS),
                ("min", true, false) => Op::D2(D2::MinU),
                ("min", true, true) => Op::D2(D2::MinS),
                ("max", true, false) => Op::D2(D2::MaxU),
                ("max", true, true) => Op::D2(D2::MaxS),
                ("and", true, _) => Op::D2(D2::And),
                ("or", true, _) => Op::D2(D2::Or),
                ("xor", true, _) => Op::D2(D2::Xor),
                ("add", false, _) => Op::D2(D2::AddF),
                ("sub", false, _) => Op::D2(D2::SubF),
                ("mul", false, _) => Op::D2(D2::MulF),
                ("div", false, _) => Op::D2(D2::DivF),
                ("mad", true, _) if has("lo") => Op::D3(D3::Mad),
                ("fma", false, _) => Op::D3(D3::FmaF),
                _ => return unknown(),
            };
            return self.uniform(op, File::Double, operands);
        }
        let op = match (parts[0], kind) {
            ("add", Type::U16 | Type::S16) => Op::W2(W2::Add16),
            ("sub", Type::U16 | Type::S16) => Op::W2(W2::Sub16),
            ("mul", Type::U16 | Type::S16) if has("lo") => Op::W2(W2::Mul16),
            ("shl", Type::U16) => Op::W2(W2::Shl16),
            ("shr", Type::U16) => Op::W2(W2::ShrU16),
            ("shr", Type::S16) => Op::W2(W2::ShrS16),
            ("not", Type::U16) => Op::W1(W1::Not16),
            ("neg", Type::S16) => Op::W1(W1::Neg16),
            ("and", Type::U16 | Type::U32) => Op::W2(W2::And),
            ("or", Type::U16 | Type::U32) => Op::W2(W2::Or),
            ("xor", Type::U16 | Type::U32) => Op::W2(W2::Xor),
            ("add", Type::U32 | Type::S32) => Op::W2(W2::Add),
            ("sub", Type::U32 | Type::S32) => Op::W2(W2::Sub),
            ("mul", Type::U32) if has("hi") => Op::W2(W2::MulHighU),
            ("mul", Type::S32) if has("hi") => Op::W2(W2::MulHighS),
            ("mul", Type::U32 | Type::S32) if has("lo") => Op::W2(W2::Mul),
            ("div", Type::U32) => Op::W2(W2::DivU),
            ("div", Type::S32) => Op::W2(W2::DivS),
            ("rem", Type::U32) => Op::W2(W2::RemU),
            ("rem", Type::S32) => Op::W2(W2::RemS),
            ("min", Type::U32) => Op::W2(W2::MinU),
            ("min", Type::S32) => Op::W2(W2::MinS),
            ("max", Type::U32) => Op::W2(W2::MaxU),
            ("max", Type::S32) => Op::W2(W2::MaxS),
            ("shl", Type::U32) => Op::W2(W2::Shl),
            ("shr", Type::U32) => Op::W2(W2::ShrU),
            ("shr", Type::S32) => Op::W2(W2::ShrS),
            ("mad", Type::U32 | Type::S32) if has("lo") => Op::W3(W3::Mad),
            ("not", Type::U32) => Op::W1(W1::Not),
            ("neg", Type::S32) => Op::W1(W1::Neg),
            ("abs", Type::S32) => Op::W1(W1::AbsS),
            ("popc", Type::U32) => Op::W1(W1::Popc),
            ("clz", Type::U32) => Op::W1(W1::Clz),
            ("brev", Type::U32) => Op::W1(W1::Brev),
            ("bfind", Type::U32) if has("shiftamt") => Op::W1(W1::BfindShift),
            ("bfind", Type::U32) => Op::W1(W1::Bfind),
            ("add", Type::F32) => Op::W2(W2::AddF),
            ("sub", Type::F32) => Op::W2(W2::SubF),
            ("mul", Type::F32) if !has("rm") && !has("rz") && !has("rp") => Op::W2(W2::MulF),
            ("div", Type::F32) => Op::W2(W2::DivF),
            ("min", Type::F32) => Op::W2(W2::MinF),
            ("max", Type::F32) => Op::W2(W2::MaxF),
            ("fma", Type::F32) => Op::W3(W3::FmaF),
            ("neg", Type::F32) => Op::W1(W1::NegF),
            ("abs", Type::F32) => Op::W1(W1::AbsF),
            ("rcp", Type::F32) => Op::W1(W1::ReciprocalF),
            ("sqrt", Type::F32) => Op::W1(W1::RootF),
            _ => return unknown(),
        };
        self.uniform(op, File::Word, operands)
    }

    /// Bits of a double, as a word: those of its halves.
    fn count_bits(&mut self, what: &str, operands: &[Operand]) -> Result<(), String> {
        let (to, from) = (self.word(&operands[0])?, self.double(&operands[1])?);
        let (low, high) = (self.fresh(File::Word), self.fresh(File::Word));
        self.emit(Op::Unpack { bytes: 4, count: 2, from_wide: true }, &[low, high], &[from]);
        if what == "popc" {
            self.emit(Op::W1(W1::Popc), &[low], &[low]);
            self.emit(Op::W1(W1::Popc), &[high], &[high]);
            self.emit(Op::W2(W2::Add), &[to], &[low, high]);
            return Ok(());
        }
        // Leading zeros: those of the upper half, or 32 and those of the lower.
        let (zero, bits, none) =
            (self.constant(File::Word, 0), self.constant(File::Word, 32), self.fresh(File::Predicate));
        self.emit(Op::CompareW(Compare::Eq, Type::U32), &[none], &[high, zero]);
        self.emit(Op::W1(W1::Clz), &[low], &[low]);
        self.emit(Op::W1(W1::Clz), &[high], &[high]);
        self.emit(Op::W2(W2::Add), &[low], &[low, bits]);
        self.emit(Op::SelectW, &[to], &[low, high, none]);
        Ok(())
    }
}
