//! Routines as instructions.

use std::collections::HashMap;

use super::instruction::*;
use super::syntax::{Routine, Text, number, type_bytes};

/// The file of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum File {
    Word,
    Double,
    Predicate,
}

impl File {
    /// Of numbers of 64 bits, or fewer.
    pub(super) fn of(wide: bool) -> File {
        if wide { File::Double } else { File::Word }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Name {
    Register(File, Register),
    /// Bytes into shared memory.
    Shared(usize),
    /// Of each thread's own memory.
    Local(usize),
    /// Bytes into the parameters.
    Param(usize),
    Global(u64),
}

/// An operand as it stands in the text.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Operand {
    Name(String),
    Number(u64),
    Not(String),
    Vector(Vec<Operand>),
    Address(Box<Operand>, i64),
}

/// Makes a kernel of its text. `globals` are where the module's variables lie.
pub(super) fn decode(text: &Text, name: &str, globals: &HashMap<String, u64>) -> Result<Kernel, String> {
    let routine = text.kernels.get(name).ok_or_else(|| format!("no kernel {name}"))?;
    let mut decoder = Decoder {
        text,
        kernel: Kernel { name: name.to_owned(), most_threads: routine.most_threads, ..Kernel::default() },
        scopes: vec![HashMap::new()],
        labels: HashMap::new(),
        branches: Vec::new(),
        instance: 0,
        instances: 0,
        leave: None,
        constants: HashMap::new(),
        specials: HashMap::new(),
        at: 0,
    };
    for (name, &address) in globals {
        decoder.declare(name.clone(), Name::Global(address));
    }
    for variable in text.shared.iter().filter(|variable| text.names(routine, &variable.name)) {
        let offset = decoder.kernel.shared_bytes.next_multiple_of(variable.align);
        decoder.kernel.shared_bytes = offset + variable.bytes;
        decoder.declare(variable.name.clone(), Name::Shared(offset));
    }
    let mut offset = 0usize;
    for param in &routine.params {
        offset = offset.next_multiple_of(param.align);
        decoder.declare(param.name.clone(), Name::Param(offset));
        decoder.kernel.params.push((offset, param.bytes));
        offset += param.bytes;
    }
    decoder.kernel.param_bytes = offset;
    decoder.routine(routine)?;
    decoder.emit(Op::Exit, &[], &[]);
    // What a launch adds lies behind what the kernel declares, wherever that is declared.
    let own = decoder.kernel.shared_bytes.next_multiple_of(16);
    decoder.kernel.shared_bytes = own;
    for (at, label) in std::mem::take(&mut decoder.branches) {
        let target = decoder.labels.get(&label).ok_or_else(|| format!("no label {}", label.1))?;
        decoder.kernel.code[at].offset = *target as i64;
    }
    Ok(decoder.kernel)
}

pub(super) struct Decoder<'a> {
    text: &'a Text,
    pub(super) kernel: Kernel,
    scopes: Vec<HashMap<String, Name>>,
    /// By the inlined function's number and their names.
    labels: HashMap<(usize, String), usize>,
    branches: Vec<(usize, (usize, String))>,
    /// Which inlined function's labels these are; 0 are the kernel's own.
    instance: usize,
    instances: usize,
    /// Inside an inlined function: the label that a return goes to.
    leave: Option<String>,
    constants: HashMap<(File, u64), Register>,
    specials: HashMap<String, Register>,
    at: u32,
}

pub(super) fn wrong<T>(what: impl std::fmt::Display) -> Result<T, String> {
    Err(what.to_string())
}

fn file_of(kind: &str) -> Result<File, String> {
    match kind {
        ".pred" => Ok(File::Predicate),
        _ => Ok(File::of(type_bytes(kind)? == 8)),
    }
}

pub(super) fn type_of(kind: &str) -> Result<Type, String> {
    Ok(match kind {
        "u8" | "b8" => Type::U8,
        "s8" => Type::S8,
        "u16" | "b16" => Type::U16,
        "s16" => Type::S16,
        "u32" | "b32" => Type::U32,
        "s32" => Type::S32,
        "u64" | "b64" => Type::U64,
        "s64" => Type::S64,
        "f16" => Type::F16,
        "bf16" => Type::Bf16,
        "f32" => Type::F32,
        "f64" => Type::F64,
        _ => return wrong(format_args!("the type {kind}")),
    })
}

impl Decoder<'_> {
    fn declare(&mut self, name: String, what: Name) {
        self.scopes.last_mut().expect("there is a scope").insert(name, what);
    }

    pub(super) fn fresh(&mut self, file: File) -> Register {
        let count = match file {
            File::Word => &mut self.kernel.words,
            File::Double => &mut self.kernel.doubles,
            File::Predicate => &mut self.kernel.predicates,
        };
        *count += 1;
        Register::try_from(*count - 1).expect("fewer than 65,535 registers")
    }

    pub(super) fn find(&self, name: &str) -> Result<Name, String> {
        if let Some(&found) = self.scopes.iter().rev().find_map(|scope| scope.get(name)) {
            return Ok(found);
        }
        // Memory whose size the launch says begins behind the kernel's own, which is known when all of it has been read:
        // variables of a kernel's own stand before its instructions.
        if self.text.dynamic.iter().any(|variable| variable.name == name) {
            return Ok(Name::Shared(self.kernel.shared_bytes.next_multiple_of(16)));
        }
        wrong(format_args!("the name {name}"))
    }

    fn routine(&mut self, routine: &Routine) -> Result<(), String> {
        let mut at = routine.body.start;
        while at < routine.body.end {
            self.at = self.text.tokens[at].at;
            let line = self.text.line(self.at);
            at = self.statement(at).map_err(|error| format!("{error}: {line}"))?;
        }
        Ok(())
    }

    /// One statement; returns where the next one begins.
    fn statement(&mut self, mut at: usize) -> Result<usize, String> {
        let text = self.text;
        match text.token(at) {
            "{" => {
                self.scopes.push(HashMap::new());
                return Ok(at + 1);
            }
            "}" => {
                self.scopes.pop();
                return Ok(at + 1);
            }
            ";" => return Ok(at + 1),
            ".pragma" => return Ok(at + 3),
            ".reg" => return self.registers(at + 1),
            space @ (".local" | ".shared") => {
                let (variable, end) = text.variable(at + 1)?;
                let kernel = &mut self.kernel;
                let used = if space == ".local" { &mut kernel.local_bytes } else { &mut kernel.shared_bytes };
                *used = used.next_multiple_of(variable.align);
                let offset = *used;
                *used += variable.bytes;
                let name = if space == ".local" { Name::Local(offset) } else { Name::Shared(offset) };
                self.declare(variable.name, name);
                return Ok(end + 1);
            }
            // Of a call: what goes in and out are registers here.
            ".param" => {
                let file = file_of(text.token(at + 1))?;
                let register = self.fresh(file);
                self.declare(text.token(at + 2).to_owned(), Name::Register(file, register));
                return Ok(at + 4);
            }
            _ => {}
        }
        if text.token(at + 1) == ":" {
            let here = self.kernel.code.len();
            self.labels.insert((self.instance, text.token(at).to_owned()), here);
            return Ok(at + 2);
        }
        let mut guard = (NONE, false);
        if text.token(at) == "@" {
            let negated = text.token(at + 1) == "!";
            at += 1 + usize::from(negated);
            guard = (self.predicate(&Operand::Name(text.token(at).to_owned()))?, negated);
            at += 1;
        }
        let opcode = text.token(at).to_owned();
        let mut operands = Vec::new();
        at += 1;
        while text.token(at) != ";" {
            if matches!(text.token(at), "," | "|") {
                at += 1;
                continue;
            }
            let (operand, end) = self.operand(at)?;
            operands.push(operand);
            at = end;
        }
        let first = self.kernel.code.len();
        self.instruction(&opcode, &operands)?;
        if guard.0 != NONE {
            if opcode.starts_with("call") {
                return wrong("a call of some threads");
            }
            for instruction in &mut self.kernel.code[first..] {
                (instruction.guard, instruction.negated) = guard;
            }
        }
        Ok(at + 1)
    }

    /// `.reg`'s list, from its type on.
    fn registers(&mut self, mut at: usize) -> Result<usize, String> {
        let text = self.text;
        let file = file_of(text.token(at))?;
        at += 1;
        loop {
            let name = text.token(at).to_owned();
            at += 1;
            if text.token(at) == "<" {
                let count: usize = text.token(at + 1).parse().map_err(|_| text.unexpected(at + 1))?;
                for i in 0..count {
                    let register = self.fresh(file);
                    self.declare(format!("{name}{i}"), Name::Register(file, register));
                }
                at += 3;
            } else {
                let register = self.fresh(file);
                self.declare(name, Name::Register(file, register));
            }
            at += 1;
            match text.token(at - 1) {
                "," => {}
                ";" => return Ok(at),
                _ => return Err(text.unexpected(at - 1)),
            }
        }
    }

    fn operand(&self, at: usize) -> Result<(Operand, usize), String> {
        let text = self.text;
        match text.token(at) {
            open @ ("{" | "(") => {
                let close = if open == "{" { "}" } else { ")" };
                let (mut list, mut at) = (Vec::new(), at + 1);
                while text.token(at) != close {
                    if text.token(at) == "," {
                        at += 1;
                        continue;
                    }
                    let (operand, end) = self.operand(at)?;
                    list.push(operand);
                    at = end;
                }
                Ok((Operand::Vector(list), at + 1))
            }
            "[" => {
                let (base, mut at) = self.operand(at + 1)?;
                let mut offset = 0;
                if text.token(at) == "+" {
                    let negative = text.token(at + 1) == "-";
                    at += 1 + usize::from(negative);
                    let value = number(text.token(at)).ok_or_else(|| text.unexpected(at))? as i64;
                    offset = if negative { -value } else { value };
                    at += 1;
                }
                if text.token(at) != "]" {
                    return Err(text.unexpected(at));
                }
                Ok((Operand::Address(Box::new(base), offset), at + 1))
            }
            "-" => {
                let value = number(text.token(at + 1)).ok_or_else(|| text.unexpected(at + 1))?;
                Ok((Operand::Number(value.wrapping_neg()), at + 2))
            }
            "!" => Ok((Operand::Not(text.token(at + 1).to_owned()), at + 2)),
            token => match number(token) {
                Some(value) => Ok((Operand::Number(value), at + 1)),
                None => Ok((Operand::Name(token.to_owned()), at + 1)),
            },
        }
    }

    pub(super) fn constant(&mut self, file: File, value: u64) -> Register {
        if let Some(&register) = self.constants.get(&(file, value)) {
            return register;
        }
        let register = self.fresh(file);
        match file {
            File::Word => self.kernel.word_constants.push((register, value as u32)),
            File::Double => self.kernel.double_constants.push((register, value)),
            File::Predicate => self.kernel.predicate_constants.push((register, value != 0)),
        }
        self.constants.insert((file, value), register);
        register
    }

    fn special(&mut self, name: &str) -> Option<Register> {
        if let Some(&register) = self.specials.get(name) {
            return Some(register);
        }
        let axis = |name: &str| ["x", "y", "z"].iter().position(|axis| name.ends_with(axis));
        let special = match name.split_once('.').map_or(name, |(name, _)| name) {
            "%tid" => Special::Thread(axis(name)?),
            "%ntid" => Special::Threads(axis(name)?),
            "%ctaid" => Special::Block(axis(name)?),
            "%nctaid" => Special::Blocks(axis(name)?),
            "%laneid" => Special::Lane,
            _ => return None,
        };
        let register = self.fresh(File::Word);
        self.kernel.specials.push((register, special));
        self.specials.insert(name.to_owned(), register);
        Some(register)
    }

    pub(super) fn register(&mut self, operand: &Operand, file: File) -> Result<Register, String> {
        match operand {
            Operand::Number(value) => {
                // Of a float with 32 bits its own, of an integer the lower ones.
                let value = if file == File::Word { *value & 0xffff_ffff } else { *value };
                Ok(self.constant(file, value))
            }
            Operand::Name(name) => {
                if file == File::Word
                    && let Some(register) = self.special(name)
                {
                    return Ok(register);
                }
                match self.find(name)? {
                    Name::Register(found, register) if found == file => Ok(register),
                    Name::Shared(offset) | Name::Param(offset) if file != File::Predicate => {
                        Ok(self.constant(file, offset as u64))
                    }
                    Name::Global(address) if file == File::Double => Ok(self.constant(file, address)),
                    Name::Local(offset) if file == File::Double => {
                        let (base, offset) = (self.local_base(), self.constant(File::Double, offset as u64));
                        let sum = self.fresh(File::Double);
                        self.emit(Op::D2(D2::Add), &[sum], &[base, offset]);
                        Ok(sum)
                    }
                    found => wrong(format_args!("{name} is {found:?} where a {file:?} is wanted")),
                }
            }
            _ => wrong(format_args!("{operand:?} where a {file:?} is wanted")),
        }
    }

    pub(super) fn local_base(&mut self) -> Register {
        match self.kernel.local_base {
            Some(register) => register,
            None => {
                let register = self.fresh(File::Double);
                *self.kernel.local_base.insert(register)
            }
        }
    }

    pub(super) fn word(&mut self, operand: &Operand) -> Result<Register, String> {
        self.register(operand, File::Word)
    }

    pub(super) fn double(&mut self, operand: &Operand) -> Result<Register, String> {
        self.register(operand, File::Double)
    }

    pub(super) fn predicate(&mut self, operand: &Operand) -> Result<Register, String> {
        self.register(operand, File::Predicate)
    }

    pub(super) fn file(&self, operand: &Operand) -> Option<File> {
        match operand {
            Operand::Name(name) => match self.find(name) {
                Ok(Name::Register(file, _)) => Some(file),
                _ => None,
            },
            _ => None,
        }
    }

    pub(super) fn emit(&mut self, op: Op, to: &[Register], from: &[Register]) -> &mut Instruction {
        let mut instruction =
            Instruction { op, guard: NONE, negated: false, to: [NONE; 4], from: [NONE; 10], offset: 0, at: self.at };
        instruction.to[..to.len()].copy_from_slice(to);
        instruction.from[..from.len()].copy_from_slice(from);
        self.kernel.code.push(instruction);
        self.kernel.code.last_mut().expect("pushed just now")
    }

    /// A branch to a label of the routine.
    pub(super) fn branch(&mut self, label: &str) {
        self.branches.push((self.kernel.code.len(), (self.instance, label.to_owned())));
        self.emit(Op::Branch, &[], &[]);
    }

    /// The end of the routine: of an inlined one, what follows the call.
    pub(super) fn return_(&mut self) {
        match self.leave.clone() {
            Some(label) => self.branch(&label),
            None => {
                self.emit(Op::Exit, &[], &[]);
            }
        }
    }

    /// An operation whose operands are all of one file.
    pub(super) fn uniform(&mut self, op: Op, file: File, operands: &[Operand]) -> Result<(), String> {
        let registers: Vec<_> = operands.iter().map(|o| self.register(o, file)).collect::<Result<_, _>>()?;
        self.emit(op, &registers[..1], &registers[1..]);
        Ok(())
    }

    /// A call is the function's instructions, with names of their own.
    pub(super) fn call(&mut self, operands: &[Operand]) -> Result<(), String> {
        let [Operand::Vector(returns), Operand::Name(name), Operand::Vector(arguments)] = operands else {
            return wrong("a call of a function with a result");
        };
        let routine = self.text.functions.get(name).ok_or_else(|| format!("no function {name}"))?;
        let mut scope = HashMap::new();
        let formal = routine.returns.iter().chain(&routine.params);
        for (formal, actual) in formal.zip(returns.iter().chain(arguments)) {
            let Operand::Name(actual) = actual else { return wrong("an argument without a name") };
            scope.insert(formal.name.clone(), self.find(actual)?);
        }
        // The function knows its own names and the module's, which are the outermost.
        let outer = std::mem::take(&mut self.scopes);
        self.scopes.push(
            outer[0].iter().filter(|(_, name)| matches!(name, Name::Global(_))).map(|(n, &v)| (n.clone(), v)).collect(),
        );
        self.scopes.push(scope);
        self.instances += 1;
        let (instance, leave) = (self.instance, self.leave.take());
        self.instance = self.instances;
        self.leave = Some("(return)".to_owned());
        let result = self.routine(routine);
        self.labels.insert((self.instance, "(return)".to_owned()), self.kernel.code.len());
        (self.instance, self.leave) = (instance, leave);
        self.scopes = outer;
        result
    }
}
