//! Checkpoints that lie: cut short, flipped, overlapping, enormous, missing. Each must end in an error that says what
//! is wrong and where; none may panic, or reserve more memory than a small multiple of the file.
//!
//! The allocator of this test program counts what each thread holds, so "no allocation before the check" is a fact.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use common::gguf::{self, Value, small_llama};
use kvahead::backend::cpu::{CpuBackend, CpuOptions};
use kvahead::model::load::{self, LoadOptions};
use kvahead::{Error, ErrorCode, Result};
use serde_json::json;
use tempfile::TempDir;

struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator unchanged; counting neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.get() + layout.size() as isize;
        HELD.set(held);
        PEAK.set(PEAK.get().max(held));
        // SAFETY: the caller's contract is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        HELD.set(HELD.get() - layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.dealloc(address, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

static BACKEND: LazyLock<CpuBackend> =
    LazyLock::new(|| CpuBackend::new(CpuOptions { threads: 1, level: None }).unwrap());

/// Opens and loads, within the memory that a file of this size may cost.
fn open(path: &Path) -> Result<()> {
    let size: u64 = match path.is_dir() {
        true => std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum(),
        false => std::fs::metadata(path).unwrap().len(),
    };
    let before = HELD.get();
    PEAK.set(before);
    let result = load::open(path).and_then(|checkpoint| {
        let options = LoadOptions { threads: 1, ..LoadOptions::default() };
        load::decoder(&*checkpoint, &*BACKEND, options).map(|_| ())
    });
    let peak = PEAK.get() - before;
    assert!(peak < 2 * 1024 * 1024 + 16 * size as isize, "{peak} bytes for a file of {size}: {result:?}");
    result
}

/// Expects an error that names the file and has all of `fragments`.
fn refused(path: &Path, fragments: &[&str]) -> Error {
    let error = open(path).expect_err(&format!("expected a refusal with {fragments:?}"));
    for fragment in fragments {
        assert!(error.message().contains(fragment), "no {fragment:?} in: {error}");
    }
    assert!(
        matches!(error.code(), ErrorCode::InvalidFormat | ErrorCode::Unsupported | ErrorCode::NotFound),
        "{:?}: {error}",
        error.code()
    );
    assert!(error.message().contains(path.to_str().unwrap()), "the file is not named in: {error}");
    error
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// A GGUF file in a folder of its own.
struct Scene {
    _folder: TempDir,
    path: PathBuf,
}

impl Scene {
    fn new() -> Scene {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        Scene { _folder: folder, path }
    }

    fn refused(&self, bytes: &[u8], fragments: &[&str]) -> Error {
        std::fs::write(&self.path, bytes).unwrap();
        refused(&self.path, fragments)
    }
}

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

// ----------------------------------------------------------------------------------------------------------- GGUF

/// Bytes of the small model's header, about.
const HEADER: usize = 1400;

#[test]
fn gguf_cut_short_anywhere() {
    let scene = Scene::new();
    let bytes = small_llama().bytes();
    std::fs::write(&scene.path, &bytes).unwrap();
    open(&scene.path).unwrap();
    let file = std::fs::File::options().write(true).open(&scene.path).unwrap();
    // The last tensor ends with the file: it is 8 KiB long and needs no padding.
    let lengths = (0..HEADER).chain((HEADER..bytes.len()).step_by(199)).chain([bytes.len() - 1]);
    for length in lengths.collect::<BTreeSet<_>>().into_iter().rev() {
        file.set_len(length as u64).unwrap();
        let error = open(&scene.path).expect_err("a cut file");
        assert_eq!(error.code(), ErrorCode::InvalidFormat, "{length}: {error}");
    }
}

#[test]
fn gguf_with_flipped_bits() {
    let scene = Scene::new();
    let mut random = Random(1);
    for (name, rounds) in [("small", 2000), ("gguf/smollm2.gguf", 200)] {
        let bytes = match name {
            "small" => small_llama().bytes(),
            name => std::fs::read(data(name)).unwrap(),
        };
        let header = if name == "small" { HEADER } else { 60_000.min(bytes.len()) };
        for _ in 0..rounds {
            let mut flipped = bytes.clone();
            for _ in 0..=random.below(3) {
                let bit = random.below(8 * header);
                flipped[bit / 8] ^= 1 << (bit % 8);
            }
            std::fs::write(&scene.path, &flipped).unwrap();
            // Some flips only change a number or a name that nobody reads.
            let _ = open(&scene.path);
        }
    }
}

#[test]
fn gguf_with_extreme_numbers_everywhere() {
    let scene = Scene::new();
    let bytes = small_llama().bytes();
    let numbers = [0, u64::MAX, u64::MAX / 2, 1 << 32, u64::MAX - 7, 1 << 62];
    for (at, number) in (0..HEADER).zip(numbers.into_iter().cycle()) {
        let mut changed = bytes.clone();
        changed[at..at + 8].copy_from_slice(&u64::to_le_bytes(number));
        std::fs::write(&scene.path, &changed).unwrap();
        let _ = open(&scene.path);
    }
}

#[test]
fn gguf_headers() {
    let scene = Scene::new();
    let refused = |change: fn(&mut gguf::File), fragments: &[&str]| {
        let mut file = small_llama();
        change(&mut file);
        scene.refused(&file.bytes(), fragments)
    };
    scene.refused(b"", &["ends inside the magic number"]);
    scene.refused(b"GGU", &["ends inside the magic number"]);
    scene.refused(&[0; 4096], &["not a GGUF file"]);
    refused(|f| f.magic = *b"ggjt", &["not a GGUF file"]);
    refused(|f| f.version = 1, &["version 1"]);
    refused(|f| f.version = 4, &["version 4"]);
    refused(|f| f.version = 3 << 24, &["big-endian"]);
    refused(|f| f.pair_count = Some(u64::MAX), &["18446744073709551615 metadata pairs"]);
    refused(|f| f.pair_count = Some(1 << 40), &["1099511627776 metadata pairs"]);
    refused(|f| f.tensor_count = Some(u64::MAX), &["18446744073709551615 tensors"]);
    refused(|f| f.tensor_count = Some(600), &[]);
    refused(|f| f.tensor_count = Some(12), &[]);
    refused(|f| f.pair_count = Some(11), &[]);
    refused(|f| f.pairs.push(("a".repeat(70_000), Value::U32(1))), &["claims 70000 bytes"]);
}

#[test]
fn gguf_metadata() {
    let scene = Scene::new();
    let refused = |key: &str, value: Value, fragments: &[&str]| {
        let mut file = small_llama();
        file.set(key, value);
        scene.refused(&file.bytes(), fragments)
    };
    // Types and lengths.
    let array = |kind: u32, count: u64, rest: &[u8]| {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend(rest);
        Value::Raw(9, bytes)
    };
    refused("x", Value::Raw(13, vec![]), &["\"x\"", "type 13"]);
    refused("x", Value::Raw(u32::MAX, vec![]), &["\"x\"", "type 4294967295"]);
    refused("x", Value::Raw(7, vec![2]), &["\"x\"", "bool of value 2"]);
    refused("x", Value::Raw(8, u64::MAX.to_le_bytes().to_vec()), &["\"x\"", "claims"]);
    refused("x", Value::Raw(8, [&2u64.to_le_bytes()[..], &[0xc3, 0x28]].concat()), &["\"x\"", "not UTF-8"]);
    for kind in [0, 4, 6, 8, 9, 12] {
        refused("x", array(kind, u64::MAX, &[]), &["\"x\"", "past the end of the file"]);
        refused("x", array(kind, 1 << 40, &[]), &["\"x\"", "past the end of the file"]);
    }
    refused("x", array(77, 1, &[]), &["type 77"]);
    let nested =
        (0..8).fold(Vec::new(), |inner: Vec<u8>, _| [&9u32.to_le_bytes()[..], &1u64.to_le_bytes(), &inner].concat());
    refused("x", Value::Raw(9, nested), &["\"x\"", "nests arrays"]);

    // Values.
    refused("general.alignment", 0.into(), &["general.alignment", "power of two"]);
    refused("general.alignment", 33.into(), &["general.alignment", "power of two"]);
    refused("general.alignment", Value::U64(1 << 63), &["general.alignment", "power of two"]);
    refused(
        "general.alignment",
        "32".into(),
        &["general.alignment", "expected a non-negative integer, found a string"],
    );
    refused("general.architecture", 3.into(), &["general.architecture", "expected a string"]);
    refused("general.architecture", "mamba".into(), &["mamba", "llama, phi3, qwen2, qwen3"]);
    let sizes = [
        "llama.block_count",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.head_count_kv",
        "llama.attention.key_length",
        "llama.context_length",
        "llama.rope.dimension_count",
    ];
    for key in sizes {
        for value in [0, 1 << 30, u64::MAX] {
            refused(key, Value::U64(value), &[]);
        }
        refused(key, Value::I32(-1), &[key, "non-negative"]);
        refused(key, Value::Bool(true), &[key]);
        refused(key, Value::U32s(vec![]), &[key]);
    }
    for key in ["llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base"] {
        for value in [f32::NAN, f32::INFINITY, -1.0] {
            refused(key, value.into(), &[]);
        }
    }
    refused("llama.rope.scaling.factor", f32::NAN.into(), &["factor"]);
    refused("llama.attention.value_length", 4.into(), &["values of 4"]);
    refused("tokenizer.ggml.eos_token_id", 40.into(), &["40"]);
    refused("tokenizer.ggml.bos_token_id", u32::MAX.into(), &["4294967295"]);
    for key in ["general.architecture", "llama.block_count", "llama.context_length", "llama.embedding_length"] {
        let mut file = small_llama();
        file.remove(key);
        scene.refused(&file.bytes(), &[key, "missing"]);
    }
}

#[test]
fn gguf_key_twice() {
    let mut file = small_llama();
    file.pairs.push(("llama.block_count".into(), 1.into()));
    Scene::new().refused(&file.bytes(), &["llama.block_count", "twice"]);
}

#[test]
fn gguf_tensors() {
    let scene = Scene::new();
    let refused = |name: &str, change: fn(&mut gguf::Tensor), fragments: &[&str]| {
        let mut file = small_llama();
        change(file.find(name));
        scene.refused(&file.bytes(), fragments)
    };
    const Q: &str = "blk.0.attn_q.weight";
    refused(Q, |t| t.dims.clear(), &[Q, "0 dimensions"]);
    refused(Q, |t| t.dims = vec![2; 5], &[Q, "5 dimensions"]);
    refused(Q, |t| t.dims = vec![32, 0], &[Q, "dimension of 0"]);
    refused(Q, |t| t.dims = vec![u64::MAX, 32], &[Q, "too many elements"]);
    refused(Q, |t| t.dims = vec![1 << 32, 1 << 32], &[Q, "too many elements"]);
    refused(Q, |t| t.dims = vec![1 << 16; 4], &[Q, "too many elements"]);
    refused(Q, |t| t.dims = vec![32, 1 << 30], &[Q, "outside the file"]);
    refused(Q, |t| t.kind = 39, &[Q, "type 39", "supported are F32, F16"]);
    refused(Q, |t| t.kind = u32::MAX, &[Q, "supported are"]);
    refused(Q, |t| (t.kind, t.dims) = (gguf::Q8_0, vec![33, 31]), &[Q, "multiple of 32"]);
    refused(Q, |t| t.offset = Some(8), &[Q, "multiple of 32"]);
    refused(Q, |t| t.offset = Some(u64::MAX - 31), &[Q, "outside the file"]);
    refused(Q, |t| t.offset = Some(1 << 40), &[Q, "outside the file"]);
    refused(Q, |t| t.offset = Some(0), &[Q, "token_embd.weight", "overlap"]);
    refused(Q, |t| t.offset = Some(32), &[Q, "token_embd.weight", "overlap"]);
    refused(Q, |t| t.name = "blk.0.attn_k.weight".into(), &["blk.0.attn_k.weight", "twice"]);
    refused(Q, |t| t.name = "other".into(), &[Q, "missing"]);
    refused(Q, |t| t.dims = vec![16, 64], &[Q, "expected the shape [32, 32], found [64, 16]"]);
    refused(Q, |t| t.dims = vec![1024], &[Q, "expected the shape [32, 32], found [1024]"]);
    refused("output_norm.weight", |t| t.dims = vec![32, 1], &["output_norm.weight", "expected the shape [32]"]);
    refused("token_embd.weight", |t| t.name = "x".into(), &["token_embd.weight", "missing"]);
    refused("token_embd.weight", |t| t.dims = vec![1280], &["token_embd.weight", "found [1280]"]);

    let mut file = small_llama();
    file.tensor("output.weight", &[39, 32], &[0.0; 39 * 32]);
    scene.refused(&file.bytes(), &["output.weight", "expected the shape [40, 32]"]);
    let mut file = small_llama();
    file.tensor("rope_freqs.weight", &[5], &[1.0; 5]);
    scene.refused(&file.bytes(), &["rope_freqs.weight", "expected F32 [4], found F32 [5]"]);
    let mut file = small_llama();
    file.tensor("rope_freqs.weight", &[4], &[1.0, f32::NAN, 1.0, 1.0]);
    scene.refused(&file.bytes(), &["frequency factors"]);
    let names: Vec<String> = small_llama().tensors.iter().map(|tensor| tensor.name.clone()).collect();
    for name in names {
        let mut file = small_llama();
        file.tensors.retain(|tensor| tensor.name != name);
        scene.refused(&file.bytes(), &[&name, "missing"]);
    }
}

// ---------------------------------------------------------------------------------------------------- safetensors

/// The golden folder `name`, copied so that it can be mutilated.
struct Copy {
    folder: TempDir,
}

impl Copy {
    fn new(name: &str) -> Copy {
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(data("golden").join(name)).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
        open(folder.path()).unwrap();
        Copy { folder }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    fn write(&self, file: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.path(file), bytes).unwrap();
    }

    /// Expects an error that names `file`.
    fn refused(&self, file: &str, fragments: &[&str]) -> Error {
        let error = refused(self.folder.path(), fragments);
        assert!(error.message().starts_with(self.path(file).to_str().unwrap()), "{file} is not named in: {error}");
        error
    }
}

type Header = BTreeMap<String, serde_json::Value>;

/// A safetensors file in its two parts.
fn take_apart(path: &Path) -> (Header, Vec<u8>) {
    let bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + length]).unwrap(), bytes[8 + length..].to_vec())
}

fn put_together(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

const WEIGHTS: &str = "model.safetensors";
const NORM: &str = "model.norm.weight";

#[test]
fn safetensors_cut_short() {
    let copy = Copy::new("smollm2");
    let length = std::fs::metadata(copy.path(WEIGHTS)).unwrap().len();
    let file = std::fs::File::options().write(true).open(copy.path(WEIGHTS)).unwrap();
    let header = u64::from_le_bytes(std::fs::read(copy.path(WEIGHTS)).unwrap()[..8].try_into().unwrap());
    let steps = (0..32).chain((32..8 + header + 64).step_by(13)).chain((8 + header..length).step_by(4099));
    let mut lengths: Vec<u64> = steps.chain([length - 1]).collect();
    lengths.sort_unstable();
    for length in lengths.into_iter().rev() {
        file.set_len(length).unwrap();
        copy.refused(WEIGHTS, &[]);
    }
}

#[test]
fn safetensors_with_flipped_bits() {
    let copy = Copy::new("smollm2");
    let bytes = std::fs::read(copy.path(WEIGHTS)).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut random = Random(2);
    for _ in 0..800 {
        let mut flipped = bytes.clone();
        let bit = random.below(8 * header);
        flipped[bit / 8] ^= 1 << (bit % 8);
        copy.write(WEIGHTS, &flipped);
        let _ = open(copy.folder.path());
    }
}

#[test]
fn safetensors_headers() {
    let copy = Copy::new("smollm2");
    let (header, data) = take_apart(&copy.path(WEIGHTS));
    let refused_text = |text: &str, fragments: &[&str]| {
        copy.write(WEIGHTS, put_together(text, &data));
        copy.refused(WEIGHTS, fragments)
    };
    copy.write(WEIGHTS, u64::MAX.to_le_bytes());
    copy.refused(WEIGHTS, &["claims 18446744073709551615 bytes"]);
    copy.write(WEIGHTS, [&(1u64 << 40).to_le_bytes()[..], b"{}"].concat());
    copy.refused(WEIGHTS, &["claims 1099511627776 bytes"]);
    refused_text("", &["not a valid safetensors header"]);
    refused_text("[]", &["not a valid safetensors header"]);
    refused_text("{\"a\": 1}", &["not a valid safetensors header"]);
    refused_text("{} trailing", &["not a valid safetensors header"]);
    refused_text(&"[".repeat(100_000), &["not a valid safetensors header"]);
    refused_text(&format!("{{\"a\":{}", "{\"a\":".repeat(100_000)), &["not a valid safetensors header"]);
    refused_text("{}", &["the tensors have 0"]);
    let text = serde_json::to_string(&header).unwrap();
    let norm = format!("\"{NORM}\":{}", header[NORM]);
    refused_text(&text.replacen('{', &format!("{{{norm},"), 1), &[NORM, "twice"]);
    copy.write(WEIGHTS, [put_together(&text, &data).as_slice(), b"x"].concat());
    copy.refused(WEIGHTS, &["damaged"]);
    let mut not_utf8 = put_together(&text, &data);
    not_utf8[12] = 0xff;
    copy.write(WEIGHTS, not_utf8);
    copy.refused(WEIGHTS, &["not a valid safetensors header"]);

    let refused = |name: &str, entry: serde_json::Value, fragments: &[&str]| {
        let mut changed = header.clone();
        changed.insert(name.into(), entry);
        refused_text(&serde_json::to_string(&changed).unwrap(), fragments)
    };
    let [from, to] = [0, 1].map(|i| header[NORM]["data_offsets"][i].as_u64().unwrap());
    let norm = |dtype: &str, shape: serde_json::Value, offsets: [u64; 2]| json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets });
    let offsets = [from, to];
    refused(NORM, norm("BF16", json!([72]), [to, from]), &[NORM, "outside"]);
    refused(NORM, norm("BF16", json!([72]), [from, u64::MAX]), &[NORM, "outside"]);
    refused(NORM, norm("BF16", json!([72]), [u64::MAX - 144, u64::MAX]), &[NORM, "outside"]);
    refused(NORM, norm("BF16", json!([72]), [0, 144]), &[NORM, "overlap"]);
    refused(NORM, norm("BF16", json!([73]), offsets), &[NORM, "does not have the 144 bytes"]);
    refused(NORM, norm("F32", json!([72]), offsets), &[NORM, "does not have the 144 bytes"]);
    refused(NORM, norm("BF16", json!([u64::MAX, 2]), offsets), &[NORM, "does not have"]);
    refused(NORM, norm("BF16", json!([u64::MAX]), offsets), &[NORM, "does not have"]);
    refused(NORM, norm("BF16", json!([-72]), offsets), &["not a valid safetensors header"]);
    refused(NORM, norm("BF16", json!([7.5]), offsets), &["not a valid safetensors header"]);
    refused(NORM, norm("Q4", json!([72]), offsets), &["not a valid safetensors header"]);
    refused(NORM, norm("I16", json!([72]), offsets), &[NORM, "type I16", "expected F32, F16 or BF16"]);
    refused(NORM, norm("F8_E4M3", json!([144]), offsets), &[NORM, "expected the shape [72], found [144]"]);
    refused(NORM, norm("BF16", json!([8, 9]), offsets), &[NORM, "expected the shape [72], found [8, 9]"]);
    refused(NORM, norm("BF16", json!([36]), [from, from + 72]), &["damaged"]);
    refused("none", norm("BF16", json!([0]), [1 << 50, 1 << 50]), &["none", "outside"]);
    for name in header.keys().filter(|name| *name != "__metadata__") {
        let mut changed = header.clone();
        let entry = changed.remove(name).unwrap();
        changed.insert("renamed".into(), entry);
        refused_text(&serde_json::to_string(&changed).unwrap(), &[name, "missing"]);
    }
}

#[test]
fn indices() {
    const INDEX: &str = "model.safetensors.index.json";
    const FIRST: &str = "model-00001-of-00002.safetensors";
    const SECOND: &str = "model-00002-of-00002.safetensors";
    let copy = Copy::new("sharded");
    let index: serde_json::Value = serde_json::from_slice(&std::fs::read(copy.path(INDEX)).unwrap()).unwrap();
    let refused = |tensor: &str, file: &str, fragments: &[&str]| {
        let mut changed = index.clone();
        changed["weight_map"][tensor] = file.into();
        copy.write(INDEX, changed.to_string());
        copy.refused(INDEX, fragments)
    };
    let outside = tempfile::tempdir().unwrap();
    std::fs::copy(copy.path(FIRST), outside.path().join(FIRST)).unwrap();
    let absolute = outside.path().join(FIRST);
    for name in [
        "../model.safetensors",
        "..",
        ".",
        "",
        "/etc/passwd",
        "a/b.safetensors",
        "a/../../x",
        absolute.to_str().unwrap(),
    ] {
        refused(NORM, name, &["not a file in this folder"]);
    }
    let missing =
        refused(NORM, "model-00003-of-00002.safetensors", &["model-00003-of-00002.safetensors", "not in the folder"]);
    assert_eq!(missing.code(), ErrorCode::NotFound);
    refused(NORM, FIRST, &[NORM, FIRST, SECOND]);
    refused("extra.weight", SECOND, &["extra.weight", "not there"]);
    refused(NORM, "nul\0byte", &[]);
    copy.write(INDEX, "{\"weight_map\": {}}");
    copy.refused(INDEX, &["names no files"]);
    for text in ["", "{}", "{\"weight_map\": []}", "{\"weight_map\": {\"a\": 1}}", "\u{feff}{}"] {
        copy.write(INDEX, text);
        copy.refused(INDEX, &["not a valid index"]);
    }
    copy.write(INDEX, [0xff, 0xfe]);
    copy.refused(INDEX, &["not UTF-8"]);

    // One tensor in both shards.
    copy.write(INDEX, index.to_string());
    let (mut header, mut data) = take_apart(&copy.path(SECOND));
    let start = data.len();
    data.extend([0; 4]);
    let twice = "model.embed_tokens.weight";
    header.insert(twice.into(), json!({ "dtype": "F16", "shape": [2], "data_offsets": [start, start + 4] }));
    copy.write(SECOND, put_together(&serde_json::to_string(&header).unwrap(), &data));
    copy.refused(SECOND, &[twice, FIRST]);
    std::fs::remove_file(copy.path(SECOND)).unwrap();
    assert_eq!(copy.refused(INDEX, &[SECOND]).code(), ErrorCode::NotFound);
}

#[test]
fn folders() {
    let copy = Copy::new("smollm2");
    std::fs::remove_file(copy.path(WEIGHTS)).unwrap();
    assert_eq!(refused(copy.folder.path(), &[WEIGHTS]).code(), ErrorCode::NotFound);
    std::fs::create_dir(copy.path(WEIGHTS)).unwrap();
    copy.refused(WEIGHTS, &["not a regular file"]);
    copy.write("config.json", vec![b' '; 5 << 20]);
    copy.refused("config.json", &["the most such a file may have"]);
    copy.write("config.json", [0x7b, 0xff, 0x7d]);
    copy.refused("config.json", &["not UTF-8"]);
    copy.write("config.json", "[".repeat(1 << 20));
    copy.refused("config.json", &["not valid JSON"]);
    let copy = Copy::new("smollm2");
    copy.write("generation_config.json", "{\"eos_token_id\": \"x\"}");
    copy.refused("generation_config.json", &["eos_token_id"]);
}

/// A pipe would block whoever opens it for reading.
#[test]
fn pipes_are_not_opened() {
    let scene = Scene::new();
    let path = std::ffi::CString::new(scene.path.to_str().unwrap()).unwrap();
    // SAFETY: a terminated string, and a call that touches nothing else.
    assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
    refused(&scene.path, &["not a regular file"]);
}
