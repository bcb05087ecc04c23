//! The real model's tokenizer, out of its GGUF file, against the passages that transformers tokenized.
//!
//! Skipped where the model has not been fetched to `.cache/`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use kvahead::model::checkpoint::gguf::Gguf;
use kvahead::model::tokenizer::Tokenizer;

fn open() -> Option<Tokenizer> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/SmolLM2-135M-Instruct.Q4_1.gguf");
    if !path.exists() {
        eprintln!("skipped: {} is not there", path.display());
        return None;
    }
    let gguf = Gguf::open(&path).unwrap();
    let start = Instant::now();
    let tokenizer = Tokenizer::from_gguf(gguf.metadata()).unwrap();
    eprintln!("tokenizer built in {:?}", start.elapsed());
    Some(tokenizer)
}

/// Passages with `text` and `token_ids`.
fn passages() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/reference");
    let Ok(entries) = folder.read_dir() else { return Vec::new() };
    entries.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_some_and(|e| e == "json")).collect()
}

#[test]
fn passages_become_the_ids_of_transformers() {
    let Some(tokenizer) = open() else { return };
    for path in passages() {
        let passage: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let text = passage["text"].as_str().unwrap();
        let expected: Vec<u32> = serde_json::from_value(passage["token_ids"].clone()).unwrap();
        let start = Instant::now();
        let ids = tokenizer.encode(text, true, false).unwrap();
        eprintln!("{}: {} bytes, {} tokens in {:?}", path.display(), text.len(), ids.len(), start.elapsed());
        assert!(ids == expected, "{}: other ids", path.display());
        let start = Instant::now();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        eprintln!("decoded in {:?}", start.elapsed());
        let mut stream = tokenizer.stream(false);
        let mut streamed = String::new();
        for &id in &ids {
            streamed.push_str(&stream.push(id).unwrap());
        }
        streamed.push_str(&stream.finish());
        assert_eq!(streamed, text);
    }
}

#[test]
fn special_tokens() {
    let Some(mut tokenizer) = open() else { return };
    assert_eq!(tokenizer.vocabulary(), 49152);
    tokenizer.match_vocabulary(49152).unwrap();
    let error = tokenizer.match_vocabulary(49000).unwrap_err();
    assert!(error.message().contains("49151") && error.message().contains("49000"), "{error}");

    let start = tokenizer.token_id("<|im_start|>").unwrap();
    let end = tokenizer.token_id("<|im_end|>").unwrap();
    assert_eq!((start, end), (1, 2));
    assert_eq!(tokenizer.bos(), Some(start));
    assert_eq!(tokenizer.eos(), Some(end));
    assert!(tokenizer.stop_tokens().contains(&end));
    assert_eq!(tokenizer.chat_templates().len(), 1);

    let parsed = tokenizer.encode("<|im_start|>user", true, true).unwrap();
    assert_eq!(parsed[0], start);
    let plain = tokenizer.encode("<|im_start|>user", true, false).unwrap();
    assert!(!plain.contains(&start) && plain.len() > parsed.len());
    assert_eq!(tokenizer.decode(&plain, true).unwrap(), "<|im_start|>user");
    assert_eq!(tokenizer.decode(&parsed, true).unwrap(), "user");
    assert_eq!(tokenizer.decode(&parsed, false).unwrap(), "<|im_start|>user");
}
