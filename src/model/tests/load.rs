//! Whole checkpoints into memory.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::gguf::{self, small_llama};
use super::{data, real_model, tensor};
use crate::ErrorCode;
use crate::backend::cpu::{CpuBackend, CpuOptions};
use crate::backend::{Backend, Blocks, DType, Linear, Rows, Vector};
use crate::model::config::{Config, SHAPES};
use crate::model::decoder::{Decoder, NormPlacement, Positions};
use crate::model::load::{self, LoadOptions};

fn load(path: &Path, dtype: Option<DType>) -> Decoder {
    let checkpoint = load::open(path).unwrap();
    load::decoder(&*checkpoint, &backend(), LoadOptions { dtype, ..LoadOptions::default() }).unwrap()
}

fn backend() -> CpuBackend {
    CpuBackend::new(CpuOptions { threads: 1, level: None }).unwrap()
}

/// The elements of a matrix, widened to f32.
fn matrix(linear: &Linear) -> Vec<f32> {
    let mut bytes = vec![0; linear.outputs * linear.inputs * linear.dtype.bytes()];
    let backend = backend();
    backend.download_weight(&backend.stream().unwrap(), linear, 0..linear.outputs, &mut bytes).unwrap();
    widen(linear.dtype, &bytes)
}

/// The elements of a vector.
fn vector(vector: &Vector) -> Vec<f32> {
    values(vector.row())
}

fn values(rows: Rows<'_>) -> Vec<f32> {
    let mut bytes = vec![0; rows.rows() * rows.cols() * rows.dtype().bytes()];
    let backend = backend();
    backend.download(&backend.stream().unwrap(), rows, &mut bytes).unwrap();
    widen(rows.dtype(), &bytes)
}

fn widen(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        DType::F32 => bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        DType::F16 => bytes.as_chunks().0.iter().map(|bytes| half::f16::from_le_bytes(*bytes).to_f32()).collect(),
        DType::BF16 => bytes.as_chunks().0.iter().map(|bytes| half::bf16::from_le_bytes(*bytes).to_f32()).collect(),
        DType::U32 => unreachable!(),
    }
}

/// Every matrix and every vector of a decoder.
fn parts(decoder: &Decoder) -> (Vec<&Linear>, Vec<&Vector>) {
    let mut matrices = vec![&decoder.embedding];
    if let Positions::Learned { table, .. } = &decoder.positions {
        matrices.push(table);
    }
    matrices.extend([&decoder.project_in, &decoder.project_out, &decoder.head].into_iter().flatten());
    let mut norms: Vec<_> = decoder.final_norm.iter().collect();
    for block in &decoder.blocks {
        norms.extend([&block.attention_norm, &block.mlp_norm]);
        norms.extend(block.attention.query_norm.iter().chain(&block.attention.key_norm));
        matrices.extend([&block.attention.qkv, &block.attention.output, &block.mlp.up, &block.mlp.down]);
    }
    let biases = matrices.iter().filter_map(|matrix| matrix.bias.as_ref());
    let vectors = norms.into_iter().flat_map(|norm| [Some(&norm.weight), norm.bias.as_ref()]).flatten();
    let vectors = vectors.chain(biases).collect();
    (matrices, vectors)
}

/// Everything in a decoder, as f32.
fn contents(decoder: &Decoder) -> Vec<Vec<f32>> {
    let (matrices, vectors) = parts(decoder);
    matrices.into_iter().map(matrix).chain(vectors.into_iter().map(vector)).collect()
}

fn bytes(decoder: &Decoder) -> u64 {
    let (matrices, vectors) = parts(decoder);
    let matrices = matrices.iter().map(|matrix| matrix.data.bytes());
    matrices.chain(vectors.iter().map(|vector| vector.data.bytes())).sum::<usize>() as u64
}

#[test]
fn every_golden_folder_loads_whole() {
    for entry in std::fs::read_dir(data("golden")).unwrap() {
        let path = entry.unwrap().path();
        let checkpoint = load::open(&path).unwrap();
        let survey = load::survey(&*checkpoint, None, true).unwrap();
        assert_eq!(survey.unused, Vec::<String>::new(), "{}", path.display());
        let decoder = load::decoder(&*checkpoint, &backend(), LoadOptions::default()).unwrap();
        assert_eq!(bytes(&decoder), survey.bytes);
        assert_eq!(Some(decoder.embedding.dtype), checkpoint.config().stored, "{}", path.display());
        assert_eq!(decoder.blocks.len(), checkpoint.config().layers);
        // In any type the same values, as far as the type goes.
        let exact = contents(&decoder);
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let converted = contents(&load(&path, Some(dtype)));
            for (exact, converted) in exact.iter().zip(&converted) {
                for (exact, converted) in exact.iter().zip(converted) {
                    assert!((exact - converted).abs() <= exact.abs() / 128.0 + 1e-7, "{exact} {converted} {dtype}");
                }
            }
            assert_eq!(exact.len(), converted.len());
        }
    }
}

/// Where a matrix lies, by the lines of `/proc/self/maps`: the file's name, if it is a file's.
#[cfg(target_os = "linux")]
fn file_of(matrix: &Linear) -> Option<String> {
    let address = matrix.data.address() as u64;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| {
        let (from, to) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        (u64::from_str_radix(from, 16).unwrap()..u64::from_str_radix(to, 16).unwrap()).contains(&address)
    })?;
    line.split_once('/').map(|(_, path)| format!("/{path}"))
}

/// What stays in the file is what a copy would be, outlives the file's name, and is counted alike.
#[test]
#[cfg(target_os = "linux")]
fn matrices_stay_in_a_mapped_file() {
    let (mut mapped, mut copied) = (0, 0);
    for entry in std::fs::read_dir(data("golden")).unwrap() {
        let original = entry.unwrap().path();
        let folder = tempfile::tempdir().unwrap();
        for file in std::fs::read_dir(&original).unwrap() {
            let file = file.unwrap().path();
            std::fs::copy(&file, folder.path().join(file.file_name().unwrap())).unwrap();
        }
        let checkpoint = load::open(folder.path()).unwrap();
        let load = |dtype| {
            let options = LoadOptions { map: true, dtype, ..LoadOptions::default() };
            load::decoder(&*checkpoint, &backend(), options).unwrap()
        };
        let (whole, converted) = (load(None), load(Some(DType::BF16)));
        drop(checkpoint);
        folder.close().unwrap();
        assert_eq!(contents(&whole), contents(&self::load(&original, None)), "{}", original.display());
        assert_eq!(bytes(&whole), bytes(&self::load(&original, None)));
        for matrix in parts(&whole).0 {
            match file_of(matrix) {
                Some(file) => {
                    assert!(file.contains(".safetensors"), "{file}");
                    mapped += 1;
                }
                None => copied += 1,
            }
        }
        if whole.embedding.dtype != DType::BF16 {
            assert!(parts(&converted).0.into_iter().all(|matrix| file_of(matrix).is_none()));
        }
    }
    // Embeddings, outputs and MLPs stay; q, k and v lie apart in the files and are stacked.
    assert!(mapped > copied && copied > 0, "{mapped} in files, {copied} not");
}

#[test]
fn rows_are_stacked_in_order() {
    let file = data("golden/qwen2/model.safetensors");
    let decoder = load(&data("golden/qwen2"), None);
    let layer = "model.layers.1.self_attn";
    let stacked = |suffix: &str| -> Vec<f32> {
        ["q_proj", "k_proj", "v_proj"].iter().flat_map(|p| tensor(&file, &format!("{layer}.{p}.{suffix}")).1).collect()
    };
    let qkv = &decoder.blocks[1].attention.qkv;
    assert_eq!((qkv.outputs, qkv.inputs), (128, 64));
    assert_eq!(matrix(qkv), stacked("weight"));
    assert_eq!(vector(qkv.bias.as_ref().unwrap()), stacked("bias"));
    let gate_up: Vec<f32> = ["gate_proj", "up_proj"]
        .iter()
        .flat_map(|part| tensor(&file, &format!("model.layers.1.mlp.{part}.weight")).1)
        .collect();
    assert_eq!(matrix(&decoder.blocks[1].mlp.up), gate_up);
}

#[test]
fn opt_has_its_own_parts() {
    let decoder = load(&data("golden/opt-post-norm"), None);
    assert!(decoder.final_norm.is_none() && decoder.head.is_none());
    let (project_in, project_out) = (decoder.project_in.unwrap(), decoder.project_out.unwrap());
    assert_eq!((project_in.outputs, project_in.inputs), (64, 32));
    assert_eq!((project_out.outputs, project_out.inputs), (32, 64));
    let Positions::Learned { table, offset } = &decoder.positions else { panic!() };
    assert_eq!((table.outputs, *offset), (98, 2));
    assert_eq!(decoder.blocks[0].placement, NormPlacement::Post);
    assert!(decoder.blocks[0].mlp.up.bias.is_some());
}

/// The GGUF files hold the weights of the folders: with q and k permuted (llama) or not (qwen2), and with Llama 3's
/// rope scaling as a tensor.
#[test]
fn gguf_files_hold_what_the_folders_do() {
    let pairs = [("smollm2", "smollm2"), ("llama3-rope", "llama3-rope"), ("qwen2", "qwen2"), ("qwen2.v2", "qwen2")];
    for (file, folder) in pairs {
        let gguf = load(&data(&format!("gguf/{file}.gguf")), Some(DType::F32));
        let folder = load(&data(&format!("golden/{folder}")), Some(DType::F32));
        assert_eq!(contents(&gguf), contents(&folder), "{file}");
        let (Positions::Rotary(one), Positions::Rotary(other)) = (&gguf.positions, &folder.positions) else { panic!() };
        for (one, other) in one.short.frequencies.iter().zip(&other.short.frequencies) {
            assert!((one - other).abs() <= 2e-7 * other, "{file}: {one} {other}");
        }
    }
    let checkpoint = load::open(&data("gguf/llama3-rope.gguf")).unwrap();
    assert!(load::survey(&*checkpoint, None, true).unwrap().unused.is_empty());
    assert_eq!(checkpoint.config().stored, Some(DType::F32));
}

#[test]
fn the_real_model_loads() {
    let Some(path) = real_model() else { return };
    let start = Instant::now();
    let checkpoint = load::open(&path).unwrap();
    let opened = start.elapsed();
    let config = checkpoint.config();
    assert_eq!((config.layers, config.hidden, config.vocabulary), (30, 576, 49152));
    assert_eq!((config.heads, config.kv_heads, config.head_dim, config.tied), (9, 3, 64, true));
    let survey = load::survey(&*checkpoint, None, true).unwrap();
    assert_eq!(survey.unused, Vec::<String>::new());
    let fractions = Arc::new(Mutex::new(Vec::new()));
    let seen = fractions.clone();
    let progress: load::Progress = Box::new(move |fraction| {
        seen.lock().unwrap().push(fraction);
        true
    });
    let options = LoadOptions { progress: Some(progress), ..LoadOptions::default() };
    let decoder = load::decoder(&*checkpoint, &backend(), options).unwrap();
    eprintln!("opened in {opened:?}, loaded after {:?}, {} bytes", start.elapsed(), survey.bytes);
    assert_eq!((decoder.embedding.dtype, decoder.embedding.blocks), (DType::BF16, Some(Blocks::Q8_0)));
    assert!(decoder.blocks.iter().all(|block| block.attention.qkv.blocks == Some(Blocks::Q4_1)));
    assert_eq!(bytes(&decoder), survey.bytes);
    let fractions = fractions.lock().unwrap();
    assert!(fractions.len() > 50 && fractions.is_sorted(), "{fractions:?}");
    assert_eq!((fractions[0], *fractions.last().unwrap()), (0.0, 1.0));
    assert!(matrix(&decoder.embedding).iter().all(|value| value.abs() < 10.0));
}

#[test]
fn progress_can_cancel() {
    let checkpoint = load::open(&data("golden/smollm2")).unwrap();
    for limit in [0, 1, 20] {
        let mut calls = 0;
        let progress: load::Progress = Box::new(move |_| {
            calls += 1;
            calls <= limit
        });
        // One thread, whose every piece of work is told: others may do much before the caller looks.
        let options = LoadOptions { threads: 1, progress: Some(progress), ..LoadOptions::default() };
        let error = load::decoder(&*checkpoint, &backend(), options).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Cancelled, "{limit}");
    }
}

/// Weights that are not numbers, and weights that do not fit the type they are wanted in.
#[test]
fn weights_must_be_finite() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let refused = |change: fn(&mut gguf::File), dtype, fragments: &[&str]| {
        let mut file = small_llama();
        change(&mut file);
        std::fs::write(&path, file.bytes()).unwrap();
        let checkpoint = load::open(&path).unwrap();
        let options = LoadOptions { dtype, ..LoadOptions::default() };
        let error = load::decoder(&*checkpoint, &backend(), options).unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidFormat);
        for fragment in fragments {
            assert!(error.message().contains(fragment), "no {fragment:?} in: {error}");
        }
        assert!(error.message().starts_with(path.to_str().unwrap()), "{error}");
    };
    fn set(file: &mut gguf::File, name: &str, value: f32) {
        file.find(name).data[128..132].copy_from_slice(&value.to_le_bytes());
    }
    load(&data("gguf/smollm2.gguf"), None);
    for dtype in [None, Some(DType::F32), Some(DType::BF16), Some(DType::F16)] {
        refused(|file| set(file, "token_embd.weight", f32::NAN), dtype, &["token_embd.weight", "rows 0 to 39"]);
        refused(|file| set(file, "blk.0.attn_q.weight", f32::INFINITY), dtype, &["blk.0.attn_q.weight"]);
        refused(|file| file.find("output_norm.weight").data[..4].fill(0xff), dtype, &["output_norm.weight"]);
        // A quantized matrix whose first scale is NaN, and one whose scale is infinite.
        refused(|file| quantize(file, 0x7e00), dtype, &["blk.0.ffn_down.weight"]);
        refused(|file| quantize(file, 0x7c00), dtype, &["blk.0.ffn_down.weight"]);
    }
    refused(
        |file| set(file, "blk.0.ffn_up.weight", 1e6),
        Some(DType::F16),
        &["blk.0.ffn_up.weight", "too large for f16"],
    );
    fn quantize(file: &mut gguf::File, scale: u16) {
        let tensor = file.find("blk.0.ffn_down.weight");
        let block = [&scale.to_le_bytes()[..], &[1; 32]].concat();
        (tensor.kind, tensor.data) = (gguf::Q8_0, block.repeat(32 * 2));
    }
}

/// Encodes a tensor anew, with elements at random and scales (and minima) between 2⁻⁷ and 2⁻⁵, some of them negative.
fn quantize(file: &mut gguf::File, name: &str, kind: u32, blocks: Blocks) {
    let tensor = file.find(&format!("{name}.weight"));
    let count = tensor.data.len() / 4 / Blocks::COLUMNS;
    let mut state = kind;
    let bytes = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    });
    let mut data: Vec<u8> = bytes.take(count * blocks.block_bytes()).collect();
    for block in data.chunks_exact_mut(blocks.block_bytes()) {
        // The upper bytes of both halves; where there is one, the second is an element.
        block[1] = block[1] & 0x87 | 0x20;
        block[3] = block[3] & 0x87 | 0x20;
    }
    (tensor.kind, tensor.data) = (kind, data);
}

/// What a file has in blocks stays in blocks where it can, and stands for the same values as in bf16.
#[test]
fn blocks_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut file = small_llama();
    quantize(&mut file, "token_embd", gguf::Q8_0, Blocks::Q8_0);
    for name in ["blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v"] {
        quantize(&mut file, name, gguf::Q4_0, Blocks::Q4_0);
    }
    quantize(&mut file, "blk.0.ffn_gate", gguf::Q4_1, Blocks::Q4_1);
    // Not in the encoding of the rows above it.
    quantize(&mut file, "blk.0.ffn_up", gguf::Q4_0, Blocks::Q4_0);
    quantize(&mut file, "blk.0.ffn_down", gguf::Q4_1, Blocks::Q4_1);
    std::fs::write(&path, file.bytes()).unwrap();

    let kept = load(&path, None);
    let of = |linear: &Linear| (linear.dtype, linear.blocks);
    assert_eq!(of(&kept.embedding), (DType::BF16, Some(Blocks::Q8_0)));
    let block = &kept.blocks[0];
    assert_eq!(of(&block.attention.qkv), (DType::BF16, Some(Blocks::Q4_0)));
    assert_eq!(of(&block.attention.output), (DType::F32, None));
    assert_eq!(of(&block.mlp.up), (DType::BF16, None));
    assert_eq!(of(&block.mlp.down), (DType::BF16, Some(Blocks::Q4_1)));

    // Without blocks, the type of a matrix is the same, and so are its values: compared bit by bit.
    let bits = |decoder: &Decoder, matrices: [fn(&Decoder) -> &Linear; 4]| {
        matrices.map(|of| matrix(of(decoder)).iter().map(|x| x.to_bits()).collect::<Vec<_>>())
    };
    let quantized: [fn(&Decoder) -> &Linear; 4] = [
        |decoder| &decoder.embedding,
        |decoder| &decoder.blocks[0].attention.qkv,
        |decoder| &decoder.blocks[0].mlp.up,
        |decoder| &decoder.blocks[0].mlp.down,
    ];
    let widened = load(&path, Some(DType::BF16));
    assert!(parts(&widened).0.iter().all(|matrix| of(matrix) == (DType::BF16, None)));
    assert_eq!(bits(&kept, quantized), bits(&widened, quantized));

    let checkpoint = load::open(&path).unwrap();
    let survey = |dtype, blocks| load::survey(&*checkpoint, dtype, blocks).unwrap().bytes;
    assert_eq!(bytes(&kept), survey(None, true));
    assert_eq!(bytes(&widened), survey(Some(DType::BF16), true));
    assert!(survey(None, true) < survey(None, false));
}

/// The file gets shorter after it was opened: an error, where a mapping would have killed the process.
#[test]
fn a_file_may_shrink_while_it_is_open() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, small_llama().bytes()).unwrap();
    let checkpoint = load::open(&path).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(9000).unwrap();
    let error = load::decoder(&*checkpoint, &backend(), LoadOptions::default()).unwrap_err();
    assert!(error.message().contains("has become shorter"), "{error}");
    // Where matrices stay in the file, too, as long as it is being loaded.
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(data("golden/smollm2").join(name), folder.path().join(name)).unwrap();
    }
    let checkpoint = load::open(folder.path()).unwrap();
    let weights = std::fs::File::options().write(true).open(folder.path().join("model.safetensors")).unwrap();
    weights.set_len(weights.metadata().unwrap().len() / 2).unwrap();
    let error =
        load::decoder(&*checkpoint, &backend(), LoadOptions { map: true, ..LoadOptions::default() }).unwrap_err();
    assert!(error.message().contains("has become shorter"), "{error}");
}

#[test]
fn threads_change_nothing() {
    let checkpoint = load::open(&data("gguf/llama3-rope.gguf")).unwrap();
    let with = |threads| {
        let options = LoadOptions { threads, ..LoadOptions::default() };
        contents(&load::decoder(&*checkpoint, &backend(), options).unwrap())
    };
    assert_eq!(with(1), with(5));
}

#[test]
fn weights_cannot_be_integers() {
    let checkpoint = load::open(&data("golden/smollm2")).unwrap();
    assert_eq!(load::survey(&*checkpoint, Some(DType::U32), true).unwrap_err().code(), ErrorCode::InvalidArgument);
}

#[test]
fn random_weights_are_reproducible_and_sane() {
    let config = Config { layers: 2, windows: vec![None; 2], ..Config::shape("smollm2-135m").unwrap() };
    let make = |seed| load::random_decoder(&config, seed, &backend(), LoadOptions::default()).unwrap();
    let one = make(7);
    assert_eq!(contents(&one), contents(&make(7)));
    assert_ne!(matrix(&one.embedding), matrix(&make(8).embedding));
    assert_ne!(matrix(&one.blocks[0].mlp.down), matrix(&one.blocks[1].mlp.down));
    let values = matrix(&one.blocks[0].mlp.down);
    let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / values.len() as f64;
    let variance = values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / values.len() as f64;
    assert!(mean.abs() < 1e-3 && (variance * 1536.0 - 1.0).abs() < 0.02, "{mean} {variance}");
    assert!(vector(&one.final_norm.unwrap().weight).iter().all(|&x| x == 1.0));
}

/// As published: parameters of the real models.
#[test]
fn shapes_have_the_parameters_of_their_models() {
    let published = [6.66e9, 12.85e9, 29.97e9, 6.738e9, 13.016e9, 8.030e9, 134.5e6];
    for (name, published) in SHAPES.iter().zip(published) {
        let bytes = load::random_survey(&Config::shape(name).unwrap(), None).unwrap().bytes;
        let parameters = bytes as f64 / 2.0;
        assert!((parameters / published - 1.0).abs() < 0.003, "{name}: {parameters}, published {published}");
    }
}

#[test]
fn wrong_paths_are_explained() {
    let error = |path: &Path| load::open(path).err().unwrap();
    let missing = error(Path::new("/no/such/model"));
    assert_eq!(missing.code(), ErrorCode::NotFound);
    assert!(missing.message().starts_with("/no/such/model"), "{missing}");

    let folder = tempfile::tempdir().unwrap();
    let empty = error(folder.path());
    assert_eq!(empty.code(), ErrorCode::NotFound);
    assert!(empty.message().contains("config.json"), "{empty}");
    std::fs::write(folder.path().join("x.gguf"), b"GGUF").unwrap();
    assert!(error(folder.path()).message().contains("x.gguf"));
    assert!(error(&data("golden/smollm2/model.safetensors")).message().contains("golden/smollm2"));

    std::fs::copy(data("golden/smollm2/config.json"), folder.path().join("config.json")).unwrap();
    std::fs::write(folder.path().join("pytorch_model.bin"), b"").unwrap();
    let pickle = error(folder.path());
    assert_eq!(pickle.code(), ErrorCode::NotFound);
    assert!(pickle.message().contains("pytorch_model.bin"), "{pickle}");
}
