//! What instructions' names say: memory, lanes, branches, and moves between registers.

use super::decode::{Decoder, File, Name, Operand, type_of, wrong};
use super::instruction::*;
use super::syntax::type_bytes;

impl Decoder<'_> {
    pub(super) fn instruction(&mut self, opcode: &str, operands: &[Operand]) -> Result<(), String> {
        let parts: Vec<&str> = opcode.split('.').collect();
        let has = |part: &str| parts.contains(&part);
        let last = *parts.last().expect("there is a first");
        match parts[0] {
            "ret" => {
                self.return_();
                Ok(())
            }
            "exit" => {
                self.emit(Op::Exit, &[], &[]);
                Ok(())
            }
            "trap" => {
                self.emit(Op::Trap, &[], &[]);
                Ok(())
            }
            "bra" => {
                let [Operand::Name(label)] = operands else { return wrong("a branch to no label") };
                self.branch(label);
                Ok(())
            }
            "griddepcontrol" if last == "wait" => {
                self.kernel.waits = true;
                self.emit(Op::WaitForPrevious, &[], &[]);
                Ok(())
            }
            // Launches run one behind the other here, and nothing is kept from memory.
            "griddepcontrol" | "membar" | "fence" => Ok(()),
            "bar" if has("warp") => {
                let mask = self.word(&operands[0])?;
                self.emit(Op::WarpBarrier, &[], &[mask]);
                Ok(())
            }
            "bar" | "barrier" => {
                if operands != [Operand::Number(0)] {
                    return wrong("a barrier of some threads");
                }
                self.emit(Op::Barrier, &[], &[]);
                Ok(())
            }
            "mov" => self.move_(last, operands),
            "setp" => self.compare(parts[1], last, operands),
            "selp" => {
                let file = File::of(type_bytes(last)? == 8);
                let to = self.register(&operands[0], file)?;
                let (a, b) = (self.register(&operands[1], file)?, self.register(&operands[2], file)?);
                let p = self.predicate(&operands[3])?;
                self.emit(if file == File::Double { Op::SelectD } else { Op::SelectW }, &[to], &[a, b, p]);
                Ok(())
            }
            "cvt" => self.convert(&parts, operands),
            "cvta" => self.convert_address(&parts, operands),
            "ld" | "st" => self.access(&parts, operands),
            "atom" | "red" => self.atomic(&parts, operands),
            "cp" => self.copy(&parts, operands),
            "createpolicy" => {
                let to = self.double(&operands[0])?;
                let zero = self.constant(File::Double, 0);
                self.emit(Op::D1(D1::Move), &[to], &[zero]);
                Ok(())
            }
            "shfl" => self.shuffle(parts[2], operands),
            "vote" | "match" => self.vote(&parts, operands),
            "ldmatrix" => {
                let Operand::Vector(list) = &operands[0] else { return wrong("a vector is wanted") };
                let to: Vec<_> = list.iter().map(|o| self.word(o)).collect::<Result<_, _>>()?;
                let Operand::Address(base, offset) = &operands[1] else { return wrong("an address is wanted") };
                let from = self.word(base)?;
                let op = Op::LoadMatrices { transposed: has("trans"), count: to.len() as u8 };
                self.emit(op, &to, &[from]).offset = *offset;
                Ok(())
            }
            "movmatrix" => self.uniform(Op::TransposeMatrix, File::Word, operands),
            "mma" => self.mma(opcode, operands),
            "call" => self.call(operands),
            "bfi" => {
                let wide = last == "b64";
                let file = File::of(wide);
                let to = self.register(&operands[0], file)?;
                let (a, b) = (self.register(&operands[1], file)?, self.register(&operands[2], file)?);
                let (at, bits) = (self.word(&operands[3])?, self.word(&operands[4])?);
                self.emit(Op::BitInsert { wide }, &[to], &[a, b, at, bits]);
                Ok(())
            }
            _ if last == "pred" => {
                let logic = match parts[0] {
                    "and" => Logic::And,
                    "or" => Logic::Or,
                    "xor" => Logic::Xor,
                    "not" => Logic::Not,
                    _ => return wrong(format_args!("the instruction {opcode}")),
                };
                self.uniform(Op::Logic(logic), File::Predicate, operands)
            }
            _ => self.arithmetic(opcode, &parts, operands),
        }
    }

    fn move_(&mut self, kind: &str, operands: &[Operand]) -> Result<(), String> {
        let [to, from] = operands else { return wrong("two operands are wanted") };
        if kind == "pred" {
            return self.uniform(Op::Logic(Logic::Move), File::Predicate, operands);
        }
        let bytes = type_bytes(kind)?;
        match (to, from) {
            (to, Operand::Vector(list)) => {
                let element = (bytes / list.len()) as u8;
                let into_wide = bytes == 8;
                let to = self.register(to, File::of(into_wide))?;
                let from: Vec<_> = list.iter().map(|o| self.word(o)).collect::<Result<_, _>>()?;
                self.emit(Op::Pack { bytes: element, count: list.len() as u8, into_wide }, &[to], &from);
            }
            (Operand::Vector(list), from) => {
                let element = (bytes / list.len()) as u8;
                let from_wide = bytes == 8;
                let from = self.register(from, File::of(from_wide))?;
                let to: Vec<_> = list.iter().map(|o| self.word(o)).collect::<Result<_, _>>()?;
                self.emit(Op::Unpack { bytes: element, count: list.len() as u8, from_wide }, &to, &[from]);
            }
            _ if bytes == 8 => return self.uniform(Op::D1(D1::Move), File::Double, operands),
            _ => return self.uniform(Op::W1(W1::Move), File::Word, operands),
        }
        Ok(())
    }

    fn compare(&mut self, how: &str, kind: &str, operands: &[Operand]) -> Result<(), String> {
        let [to, a, b] = operands else { return wrong("a comparison of two") };
        let kind = type_of(kind)?;
        let compare = match how {
            "eq" => Compare::Eq,
            "ne" => Compare::Ne,
            "lt" | "lo" => Compare::Lt,
            "le" | "ls" => Compare::Le,
            "gt" | "hi" => Compare::Gt,
            "ge" | "hs" => Compare::Ge,
            "equ" => Compare::Equ,
            "neu" => Compare::Neu,
            "ltu" => Compare::Ltu,
            "leu" => Compare::Leu,
            "gtu" => Compare::Gtu,
            "geu" => Compare::Geu,
            _ => return wrong(format_args!("the comparison {how}")),
        };
        let file = File::of(kind.wide());
        let (to, a, b) = (self.predicate(to)?, self.register(a, file)?, self.register(b, file)?);
        let op = if kind.wide() { Op::CompareD(compare, kind) } else { Op::CompareW(compare, kind) };
        self.emit(op, &[to], &[a, b]);
        Ok(())
    }

    fn convert(&mut self, parts: &[&str], operands: &[Operand]) -> Result<(), String> {
        let kinds = &parts[parts.len() - 2..];
        if let ["bf16x2" | "f16x2", "f32"] = kinds {
            let op = if kinds[0] == "bf16x2" { W2::PairBf16 } else { W2::PairF16 };
            return self.uniform(Op::W2(op), File::Word, operands);
        }
        let (to_type, from_type) = (type_of(kinds[0])?, type_of(kinds[1])?);
        let file = |kind: Type| File::of(kind.wide());
        let (to, from) = (self.register(&operands[0], file(to_type))?, self.register(&operands[1], file(from_type))?);
        let op = match (to_type, from_type) {
            (Type::U64 | Type::S64, Type::U32) => Op::Widen { signed: false },
            (Type::U64 | Type::S64, Type::S32) => Op::Widen { signed: true },
            (Type::U32 | Type::S32, Type::U64 | Type::S64) => Op::Truncate,
            _ => {
                let rounding = parts.iter().find_map(|part| match *part {
                    "rn" | "rni" => Some(Rounding::Nearest),
                    "rz" | "rzi" => Some(Rounding::Zero),
                    "rm" | "rmi" => Some(Rounding::Down),
                    "rp" | "rpi" => Some(Rounding::Up),
                    _ => None,
                });
                Op::Convert {
                    from: from_type,
                    to: to_type,
                    rounding: rounding.unwrap_or(Rounding::Nearest),
                    saturated: parts.contains(&"sat"),
                    whole: parts.iter().any(|part| matches!(*part, "rni" | "rzi" | "rmi" | "rpi")),
                }
            }
        };
        self.emit(op, &[to], &[from]);
        Ok(())
    }

    fn convert_address(&mut self, parts: &[&str], operands: &[Operand]) -> Result<(), String> {
        let op = match parts[1..] {
            ["to", "shared", "u64"] => Op::GenericToShared,
            ["shared", "u64"] => Op::SharedToGeneric,
            ["to", "global" | "local", "u64"] | ["global" | "local", "u64"] => Op::D1(D1::Move),
            _ => return wrong("the address conversion"),
        };
        self.uniform(op, File::Double, operands)
    }

    /// What an access of memory is, by the parts of its name, with its address.
    fn address(
        &mut self,
        parts: &[&str],
        address: &Operand,
        wide: bool,
        count: usize,
    ) -> Result<(Access, Register, i64), String> {
        let Operand::Address(base, mut offset) = address.clone() else { return wrong("an address is wanted") };
        let kind = *parts.last().expect("there is a type");
        let find = |part: &&&str| matches!(**part, "shared" | "param" | "local" | "global" | "const");
        let space = match parts.iter().find(find).copied() {
            Some("shared") => Space::Shared,
            Some("param") => Space::Param,
            _ => Space::Generic,
        };
        let (file, base) = match &*base {
            Operand::Name(name) => match self.find(name)? {
                Name::Register(file, register) => (file, register),
                Name::Shared(at) | Name::Param(at) => {
                    offset += at as i64;
                    (File::Word, self.constant(File::Word, 0))
                }
                Name::Local(at) => {
                    offset += at as i64;
                    (File::Double, self.local_base())
                }
                Name::Global(at) => (File::Double, self.constant(File::Double, at)),
            },
            _ => return wrong("an address without a base"),
        };
        if file == File::Predicate || (file == File::Word && space == Space::Generic) {
            return wrong("an address in such a register");
        }
        let access = Access {
            space,
            bytes: type_bytes(kind)? as u8,
            count: count as u8,
            signed: kind.starts_with('s'),
            wide,
            short: file == File::Word,
        };
        Ok((access, base, offset))
    }

    fn access(&mut self, parts: &[&str], operands: &[Operand]) -> Result<(), String> {
        let load = parts[0] == "ld";
        let (value, address) = if load { (&operands[0], &operands[1]) } else { (&operands[1], &operands[0]) };
        // What goes into a call and comes out of it.
        if parts[1] == "param"
            && let Operand::Address(base, 0) = address
            && let Some(file) = self.file(base)
            && let Operand::Name(name) = &**base
            && !name.starts_with('%')
        {
            let other = self.register(value, file)?;
            let own = self.register(base, file)?;
            let op = if file == File::Double { Op::D1(D1::Move) } else { Op::W1(W1::Move) };
            let (to, from) = if load { (other, own) } else { (own, other) };
            self.emit(op, &[to], &[from]);
            return Ok(());
        }
        let single = [value.clone()];
        let list = if let Operand::Vector(list) = value { &list[..] } else { &single[..] };
        let wide = match self.file(&list[0]) {
            Some(file) => file == File::Double,
            None => type_bytes(parts[parts.len() - 1])? == 8,
        };
        let (access, base, offset) = self.address(parts, address, wide, list.len())?;
        let file = File::of(wide);
        let values: Vec<_> = list.iter().map(|o| self.register(o, file)).collect::<Result<_, _>>()?;
        if load {
            self.emit(Op::Load(access), &values, &[base]).offset = offset;
        } else {
            let from: Vec<_> = [base].into_iter().chain(values).collect();
            self.emit(Op::Store(access), &[], &from).offset = offset;
        }
        Ok(())
    }

    fn atomic(&mut self, parts: &[&str], operands: &[Operand]) -> Result<(), String> {
        let what = parts.iter().find_map(|part| match *part {
            "add" => Some(Atomic::Add),
            "min" => Some(Atomic::Min),
            "max" => Some(Atomic::Max),
            "and" => Some(Atomic::And),
            "or" => Some(Atomic::Or),
            "xor" => Some(Atomic::Xor),
            "exch" => Some(Atomic::Exchange),
            "cas" => Some(Atomic::Swap),
            _ => None,
        });
        let what = what.ok_or("the atomic operation")?;
        let kind = *parts.last().expect("there is a type");
        if kind.starts_with('f') {
            return wrong("atomic floats");
        }
        let wide = kind.ends_with("64");
        let file = File::of(wide);
        let (to, rest) = if parts[0] == "atom" { (Some(&operands[0]), &operands[1..]) } else { (None, operands) };
        let (access, base, offset) = self.address(parts, &rest[0], wide, 1)?;
        let mut from = vec![base];
        for value in &rest[1..] {
            from.push(self.register(value, file)?);
        }
        let to = to.map(|to| self.register(to, file)).transpose()?;
        self.emit(Op::Atomic { what, access }, to.as_slice(), &from).offset = offset;
        Ok(())
    }

    fn copy(&mut self, parts: &[&str], operands: &[Operand]) -> Result<(), String> {
        match parts[2] {
            "commit_group" => {
                self.emit(Op::CopyGroup, &[], &[]);
            }
            "wait_all" => self.emit(Op::CopyWait, &[], &[]).offset = -1,
            "wait_group" => {
                let [Operand::Number(groups)] = operands else { return wrong("a number of groups") };
                self.emit(Op::CopyWait, &[], &[]).offset = *groups as i64;
            }
            _ => {
                let [to, from, Operand::Number(bytes), rest @ ..] = operands else { return wrong("the copy") };
                let (Operand::Address(to, 0), Operand::Address(from, 0)) = (to, from) else {
                    return wrong("addresses are wanted");
                };
                let (to, from) = (self.word(to)?, self.double(from)?);
                let hinted = parts.contains(&"L2::cache_hint");
                let real = match rest {
                    [] => self.constant(File::Word, *bytes),
                    [_] if hinted => self.constant(File::Word, *bytes),
                    [real, ..] => self.word(real)?,
                };
                self.emit(Op::CopyAsync { bytes: *bytes as u8 }, &[], &[to, from, real]);
            }
        }
        Ok(())
    }

    fn shuffle(&mut self, how: &str, operands: &[Operand]) -> Result<(), String> {
        let how = match how {
            "up" => Shuffle::Up,
            "down" => Shuffle::Down,
            "bfly" => Shuffle::Butterfly,
            "idx" => Shuffle::Index,
            _ => return wrong(format_args!("the shuffle {how}")),
        };
        let (to, rest) = operands.split_at(operands.len() - 4);
        let mut registers = vec![self.word(&to[0])?];
        if let [_, valid] = to {
            registers.push(self.predicate(valid)?);
        }
        let from: Vec<_> = rest.iter().map(|o| self.word(o)).collect::<Result<_, _>>()?;
        self.emit(Op::Shuffle(how), &registers, &from);
        Ok(())
    }

    fn vote(&mut self, parts: &[&str], operands: &[Operand]) -> Result<(), String> {
        let [to, value, mask] = operands else { return wrong("three operands are wanted") };
        let mask = self.word(mask)?;
        if parts[0] == "match" {
            let (to, value) = (self.word(to)?, self.word(value)?);
            self.emit(Op::Vote(Vote::Match), &[to], &[value, mask]);
            return Ok(());
        }
        let value = match value {
            Operand::Not(name) => {
                let value = self.predicate(&Operand::Name(name.clone()))?;
                let opposite = self.fresh(File::Predicate);
                self.emit(Op::Logic(Logic::Not), &[opposite], &[value]);
                opposite
            }
            value => self.predicate(value)?,
        };
        let (vote, to) = match parts[2] {
            "ballot" => (Vote::Ballot, self.word(to)?),
            "all" => (Vote::All, self.predicate(to)?),
            "any" => (Vote::Any, self.predicate(to)?),
            _ => return wrong("the vote"),
        };
        self.emit(Op::Vote(vote), &[to], &[value, mask]);
        Ok(())
    }

    fn mma(&mut self, opcode: &str, operands: &[Operand]) -> Result<(), String> {
        let bf16 = match opcode {
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" => true,
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" => false,
            _ => return wrong("the product"),
        };
        let mut lists = Vec::new();
        for operand in operands {
            let Operand::Vector(list) = operand else { return wrong("vectors are wanted") };
            lists.push(list.iter().map(|o| self.word(o)).collect::<Result<Vec<_>, _>>()?);
        }
        let from = lists[1..].concat();
        self.emit(Op::Mma { bf16 }, &lists[0], &from);
        Ok(())
    }
}
