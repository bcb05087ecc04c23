//! Writes GGUF files, right and wrong ones.

#![allow(dead_code)]

/// A metadata value.
#[derive(Clone, Debug)]
pub enum Value {
    U32(u32),
    I32(i32),
    U64(u64),
    F32(f32),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    U32s(Vec<u32>),
    F32s(Vec<f32>),
    /// Type and bytes as they shall stand in the file.
    Raw(u32, Vec<u8>),
}

impl From<&str> for Value {
    fn from(text: &str) -> Value {
        Value::String(text.into())
    }
}

impl From<u32> for Value {
    fn from(value: u32) -> Value {
        Value::U32(value)
    }
}

impl From<f32> for Value {
    fn from(value: f32) -> Value {
        Value::F32(value)
    }
}

/// A tensor description and its data.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    /// Innermost first, as in the file.
    pub dims: Vec<u64>,
    pub kind: u32,
    pub data: Vec<u8>,
    /// Instead of the place where the data really goes.
    pub offset: Option<u64>,
}

/// A file before it is bytes.
#[derive(Clone, Debug)]
pub struct File {
    pub magic: [u8; 4],
    pub version: u32,
    pub pairs: Vec<(String, Value)>,
    pub tensors: Vec<Tensor>,
    /// Instead of the true counts.
    pub tensor_count: Option<u64>,
    pub pair_count: Option<u64>,
    pub alignment: usize,
}

pub const F32: u32 = 0;
pub const F16: u32 = 1;
pub const Q4_0: u32 = 2;
pub const Q4_1: u32 = 3;
pub const Q8_0: u32 = 8;

impl File {
    pub fn new() -> File {
        File {
            magic: *b"GGUF",
            version: 3,
            pairs: Vec::new(),
            tensors: Vec::new(),
            tensor_count: None,
            pair_count: None,
            alignment: 32,
        }
    }

    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> &mut File {
        let value = value.into();
        match self.pairs.iter_mut().find(|(own, _)| own == key) {
            Some((_, own)) => *own = value,
            None => self.pairs.push((key.into(), value)),
        }
        self
    }

    pub fn remove(&mut self, key: &str) -> &mut File {
        self.pairs.retain(|(own, _)| own != key);
        self
    }

    /// Adds an F32 tensor of `shape`, outermost first.
    pub fn tensor(&mut self, name: &str, shape: &[usize], values: &[f32]) -> &mut File {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}");
        self.tensors.push(Tensor {
            name: name.into(),
            dims: shape.iter().rev().map(|&n| n as u64).collect(),
            kind: F32,
            data: values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            offset: None,
        });
        self
    }

    pub fn find(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.pair_count.unwrap_or(self.pairs.len() as u64).to_le_bytes());
        for (key, value) in &self.pairs {
            string(&mut out, key);
            write(&mut out, value);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            string(&mut out, &tensor.name);
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(offset).to_le_bytes());
            offset += tensor.data.len().next_multiple_of(self.alignment) as u64;
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        for tensor in &self.tensors {
            out.extend(&tensor.data);
            out.resize(out.len().next_multiple_of(self.alignment), 0);
        }
        out
    }
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn write(out: &mut Vec<u8>, value: &Value) {
    let array = |out: &mut Vec<u8>, kind: u32, len: usize| {
        out.extend(9u32.to_le_bytes());
        out.extend(kind.to_le_bytes());
        out.extend((len as u64).to_le_bytes());
    };
    let number = |out: &mut Vec<u8>, kind: u32, bytes: &[u8]| {
        out.extend(kind.to_le_bytes());
        out.extend(bytes);
    };
    match value {
        Value::U32(value) => number(out, 4, &value.to_le_bytes()),
        Value::I32(value) => number(out, 5, &value.to_le_bytes()),
        Value::F32(value) => number(out, 6, &value.to_le_bytes()),
        Value::Bool(value) => number(out, 7, &[u8::from(*value)]),
        Value::U64(value) => number(out, 10, &value.to_le_bytes()),
        Value::String(text) => {
            out.extend(8u32.to_le_bytes());
            string(out, text);
        }
        Value::Strings(texts) => {
            array(out, 8, texts.len());
            texts.iter().for_each(|text| string(out, text));
        }
        Value::U32s(values) => {
            array(out, 4, values.len());
            values.iter().for_each(|value| out.extend(value.to_le_bytes()));
        }
        Value::F32s(values) => {
            array(out, 6, values.len());
            values.iter().for_each(|value| out.extend(value.to_le_bytes()));
        }
        Value::Raw(kind, bytes) => number(out, *kind, bytes),
    }
}

/// A complete llama of one layer: hidden 32, 4 heads, 2 KV heads of 8, intermediate 64, vocabulary 40.
pub fn small_llama() -> File {
    let mut file = File::new();
    file.set("general.architecture", "llama")
        .set("llama.block_count", 1)
        .set("llama.embedding_length", 32)
        .set("llama.feed_forward_length", 64)
        .set("llama.attention.head_count", 4)
        .set("llama.attention.head_count_kv", 2)
        .set("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .set("llama.context_length", 128)
        .set("llama.rope.freq_base", 10_000.0)
        .set("tokenizer.ggml.eos_token_id", 2);
    let shapes: [(&str, &[usize]); 11] = [
        ("token_embd.weight", &[40, 32]),
        ("output_norm.weight", &[32]),
        ("blk.0.attn_norm.weight", &[32]),
        ("blk.0.attn_q.weight", &[32, 32]),
        ("blk.0.attn_k.weight", &[16, 32]),
        ("blk.0.attn_v.weight", &[16, 32]),
        ("blk.0.attn_output.weight", &[32, 32]),
        ("blk.0.ffn_norm.weight", &[32]),
        ("blk.0.ffn_gate.weight", &[64, 32]),
        ("blk.0.ffn_up.weight", &[64, 32]),
        ("blk.0.ffn_down.weight", &[32, 64]),
    ];
    for (name, shape) in shapes {
        let count = shape.iter().product::<usize>();
        let values: Vec<f32> = (0..count).map(|i| (i % 17) as f32 / 17.0 - 0.5).collect();
        file.tensor(name, shape, &values);
    }
    file
}
