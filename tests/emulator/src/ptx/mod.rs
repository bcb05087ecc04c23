//! PTX modules: read once, their kernels decoded when they are first asked for.
//!
//! What is not understood is an error that names the line: nothing is skipped. The instruction set is what NVRTC makes of
//! this repository's kernels, and what they write themselves.

mod arithmetic;
mod decode;
mod instruction;
mod operation;
mod syntax;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

pub(crate) use instruction::*;
use syntax::Text;

/// A module that has been loaded, with its variables.
pub(crate) struct Module {
    text: Text,
    addresses: HashMap<String, u64>,
    /// What the module's variables lie in.
    pub(crate) variables: Box<[u128]>,
    kernels: Mutex<HashMap<String, Arc<Kernel>>>,
}

impl Module {
    pub(crate) fn read(text: &str) -> Result<Module, String> {
        let text = Text::read(text)?;
        let mut bytes: Vec<u8> = Vec::new();
        let mut offsets = Vec::new();
        for global in &text.globals {
            bytes.resize(bytes.len().next_multiple_of(global.align.max(16)), 0);
            offsets.push((global.name.clone(), bytes.len()));
            bytes.extend(&global.values);
        }
        let words = bytes.chunks(16).map(|chunk| {
            let mut word = [0; 16];
            word[..chunk.len()].copy_from_slice(chunk);
            u128::from_le_bytes(word)
        });
        let variables: Box<[u128]> = words.collect();
        let base = variables.as_ptr().expose_provenance() as u64;
        let addresses = offsets.into_iter().map(|(name, offset)| (name, base + offset as u64)).collect();
        Ok(Module { text, addresses, variables, kernels: Mutex::default() })
    }

    /// The kernel of this name, or what of it is not understood.
    pub(crate) fn kernel(&self, name: &str) -> Result<Arc<Kernel>, String> {
        let mut kernels = self.kernels.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(kernel) = kernels.get(name) {
            return Ok(kernel.clone());
        }
        let kernel = Arc::new(decode::decode(&self.text, name, &self.addresses)?);
        kernels.insert(name.to_owned(), kernel.clone());
        Ok(kernel)
    }

    /// The line of an instruction.
    pub(crate) fn line(&self, at: u32) -> &str {
        self.text.line(at)
    }

    /// Whether there is a kernel of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.text.kernels.contains_key(name)
    }
}
