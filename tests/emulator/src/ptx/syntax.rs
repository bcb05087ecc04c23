//! PTX as text: tokens, and where routines and variables are.

use std::collections::HashMap;

/// A token: a piece of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) at: u32,
    len: u32,
}

/// A kernel, or a function that kernels call.
#[derive(Debug, Default)]
pub(super) struct Routine {
    pub(super) params: Vec<Variable>,
    pub(super) returns: Vec<Variable>,
    /// Most threads of a block, where it says so.
    pub(super) most_threads: Option<u32>,
    /// Its body's tokens, without the outer braces.
    pub(super) body: std::ops::Range<usize>,
}

/// A declared variable that is no register.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Variable {
    pub(super) name: String,
    pub(super) align: usize,
    pub(super) bytes: usize,
    /// `.global` or `.const`: what it holds at first.
    pub(super) values: Vec<u8>,
}

/// A module that has been read, without its routines' bodies.
#[derive(Debug, Default)]
pub(super) struct Text {
    pub(super) text: String,
    pub(super) tokens: Vec<Token>,
    pub(super) kernels: HashMap<String, Routine>,
    pub(super) functions: HashMap<String, Routine>,
    pub(super) globals: Vec<Variable>,
    /// Shared memory that is declared outside routines, of who names it.
    pub(super) shared: Vec<Variable>,
    /// The same, whose size a launch says.
    pub(super) dynamic: Vec<Variable>,
}

/// Bytes of an element of a type such as `.b32`.
pub(super) fn type_bytes(name: &str) -> Result<usize, String> {
    let digits = name.trim_start_matches(|c: char| !c.is_ascii_digit());
    match digits {
        "8" => Ok(1),
        "16" => Ok(2),
        "32" | "16x2" => Ok(4),
        "64" => Ok(8),
        _ => Err(format!("the type {name}")),
    }
}

/// A number's 64 bits: integers with their sign extended, floats as their own 32 or 64 bits.
pub(super) fn number(text: &str) -> Option<u64> {
    let hex = |digits: &str| u64::from_str_radix(digits, 16).ok();
    match text.as_bytes() {
        [b'0', b'f' | b'F', ..] | [b'0', b'd' | b'D', ..] | [b'0', b'x' | b'X', ..] => hex(&text[2..]),
        [first, ..] if first.is_ascii_digit() => {
            let text = text.trim_end_matches('U');
            text.parse().ok().or_else(|| text.parse::<f64>().ok().map(f64::to_bits))
        }
        _ => None,
    }
}

impl Text {
    pub(super) fn read(text: &str) -> Result<Text, String> {
        let mut module = Text { text: text.to_owned(), ..Text::default() };
        module.tokenize()?;
        module.declarations()?;
        Ok(module)
    }

    pub(super) fn token(&self, at: usize) -> &str {
        self.tokens.get(at).map_or("", |token| &self.text[token.at as usize..(token.at + token.len) as usize])
    }

    /// Whether a routine's body names a variable.
    pub(super) fn names(&self, routine: &Routine, name: &str) -> bool {
        routine.body.clone().any(|at| self.token(at) == name)
    }

    /// The line of the text that a byte of it is in.
    pub(super) fn line(&self, at: u32) -> &str {
        let at = at as usize;
        let begin = self.text[..at].rfind('\n').map_or(0, |i| i + 1);
        self.text[begin..].lines().next().unwrap_or("").trim()
    }

    fn tokenize(&mut self) -> Result<(), String> {
        let bytes = self.text.as_bytes();
        let word = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'$' | b'.' | b'%');
        let mut at = 0;
        while at < bytes.len() {
            let begin = at;
            match bytes[at] {
                b if b.is_ascii_whitespace() => {
                    at += 1;
                    continue;
                }
                b'/' if bytes.get(at + 1) == Some(&b'/') => {
                    at += bytes[at..].iter().position(|&b| b == b'\n').unwrap_or(bytes.len() - at);
                    continue;
                }
                b'"' => {
                    let end = bytes[at + 1..].iter().position(|&b| b == b'"').ok_or("a string without an end")?;
                    at += end + 2;
                }
                b if word(b) => {
                    // A double colon belongs to a modifier (.L2::128B), a single one ends a label.
                    while at < bytes.len() && (word(bytes[at]) || bytes[at..].starts_with(b"::")) {
                        at += if bytes[at] == b':' { 2 } else { 1 };
                    }
                }
                _ => at += 1,
            }
            self.tokens.push(Token { at: begin as u32, len: (at - begin) as u32 });
        }
        Ok(())
    }

    fn declarations(&mut self) -> Result<(), String> {
        let mut at = 0;
        while at < self.tokens.len() {
            match self.token(at) {
                ".version" | ".target" | ".address_size" => at += 2,
                ".visible" | ".extern" | ".weak" => at += 1,
                ".entry" => {
                    let name = self.token(at + 1).to_owned();
                    let mut routine = Routine::default();
                    at = self.variables(at + 2, &mut routine.params)?;
                    at = self.body(at, &mut routine)?;
                    self.kernels.insert(name, routine);
                }
                ".func" => {
                    let mut routine = Routine::default();
                    at += 1;
                    if self.token(at) == "(" {
                        at = self.variables(at, &mut routine.returns)?;
                    }
                    let name = self.token(at).to_owned();
                    at = self.variables(at + 1, &mut routine.params)?;
                    if self.token(at) == ";" {
                        at += 1; // It follows below.
                    } else {
                        at = self.body(at, &mut routine)?;
                        self.functions.insert(name, routine);
                    }
                }
                space @ (".global" | ".const" | ".shared") => {
                    let shared = space == ".shared";
                    let (variable, end) = self.variable(at + 1)?;
                    at = end;
                    if self.token(at) != ";" {
                        return Err(self.unexpected(at));
                    }
                    at += 1;
                    match shared {
                        true if variable.bytes == 0 => self.dynamic.push(variable),
                        true => self.shared.push(variable),
                        false => self.globals.push(variable),
                    }
                }
                _ => return Err(self.unexpected(at)),
            }
        }
        Ok(())
    }

    pub(super) fn unexpected(&self, at: usize) -> String {
        let line = self.tokens.get(at).map_or("the end", |token| self.line(token.at));
        format!("'{}' is not understood in: {line}", self.token(at))
    }

    /// A parenthesised list of `.param`s; returns where it ends.
    fn variables(&self, mut at: usize, list: &mut Vec<Variable>) -> Result<usize, String> {
        if self.token(at) != "(" {
            return Err(self.unexpected(at));
        }
        at += 1;
        while self.token(at) != ")" {
            if self.token(at) != ".param" {
                return Err(self.unexpected(at));
            }
            let (variable, end) = self.variable(at + 1)?;
            list.push(variable);
            at = if self.token(end) == "," { end + 1 } else { end };
        }
        Ok(at + 1)
    }

    /// `[.align N] .type name[count] = {values}`, from behind the space; returns where it ends.
    pub(super) fn variable(&self, mut at: usize) -> Result<(Variable, usize), String> {
        let wrong = |at| self.unexpected(at);
        let mut align = 0;
        if self.token(at) == ".align" {
            align = self.token(at + 1).parse().map_err(|_| wrong(at + 1))?;
            at += 2;
        }
        let element = type_bytes(self.token(at))?;
        let name = self.token(at + 1).to_owned();
        at += 2;
        let mut bytes = element;
        if self.token(at) == "[" {
            if self.token(at + 1) == "]" {
                (bytes, at) = (0, at + 2);
            } else {
                bytes = element * self.token(at + 1).parse::<usize>().map_err(|_| wrong(at + 1))?;
                at += 3;
            }
        }
        let mut values = Vec::new();
        if self.token(at) == "=" {
            at += 1;
            let list = self.token(at) == "{";
            at += usize::from(list);
            loop {
                let negative = self.token(at) == "-";
                at += usize::from(negative);
                let value = number(self.token(at)).ok_or_else(|| wrong(at))?;
                let value = if negative { value.wrapping_neg() } else { value };
                values.extend_from_slice(&value.to_le_bytes()[..element]);
                at += 1;
                if !list {
                    break;
                }
                at += 1;
                match self.token(at - 1) {
                    "," => {}
                    "}" => break,
                    _ => return Err(wrong(at - 1)),
                }
            }
        }
        values.resize(bytes, 0);
        Ok((Variable { name, align: align.max(element), bytes, values }, at))
    }

    /// What stands before a routine's braces, and what is between them; returns where they end.
    fn body(&self, mut at: usize, routine: &mut Routine) -> Result<usize, String> {
        while self.token(at) != "{" {
            match self.token(at) {
                ".maxntid" | ".reqntid" => {
                    let sides = [at + 1, at + 3, at + 5].map(|at| self.token(at).parse::<u32>());
                    let product = sides.into_iter().try_fold(1, |product, side| side.map(|side| product * side));
                    routine.most_threads = Some(product.map_err(|_| self.unexpected(at + 1))?);
                    at += 6;
                }
                ".minnctapersm" => at += 2,
                _ => return Err(self.unexpected(at)),
            }
        }
        let begin = at + 1;
        let mut depth = 0;
        while at < self.tokens.len() {
            match self.token(at) {
                "{" => depth += 1,
                "}" => depth -= 1,
                _ => {}
            }
            at += 1;
            if depth == 0 {
                routine.body = begin..at - 1;
                return Ok(at);
            }
        }
        Err("a routine without an end".to_owned())
    }
}
