//! Tokenizer files that are broken or hostile end in errors that name the file; nothing panics through.

use std::fs;
use std::path::Path;

use kvahead::ErrorCode;
use kvahead::model::chat::ChatTemplate;
use kvahead::model::tokenizer::Tokenizer;
use serde_json::{Value, json};

fn golden(name: &str) -> (Value, Value) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokenizer").join(name);
    let read = |name: &str| serde_json::from_slice(&fs::read(folder.join(name)).unwrap()).unwrap();
    (read("tokenizer.json"), read("tokenizer_config.json"))
}

fn load(tokenizer: &Value, config: &Value) -> kvahead::Result<Tokenizer> {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    Tokenizer::from_folder(folder.path())
}

#[test]
fn missing_and_unreadable_files() {
    let folder = tempfile::tempdir().unwrap();
    let error = Tokenizer::from_folder(folder.path()).unwrap_err();
    assert_eq!(error.code(), ErrorCode::NotFound);
    assert!(error.message().contains("tokenizer.json"), "{error}");

    let file = folder.path().join("tokenizer.json");
    for bytes in
        [&b""[..], b"{", b"[]", b"null", b"{}", b"\xff\xfe", b"{\"model\": 1}", b"{\"model\": {\"type\": \"BPE\"}}"]
    {
        fs::write(&file, bytes).unwrap();
        let error = Tokenizer::from_folder(folder.path()).unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidFormat, "{error}");
        assert!(error.message().contains("tokenizer.json"), "{error}");
    }
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    assert_eq!(Tokenizer::from_folder(folder.path()).unwrap_err().code(), ErrorCode::InvalidFormat);
}

#[test]
fn changes_that_must_be_noticed() {
    let (tokenizer, config) = golden("smollm2");
    type Change = fn(&mut Value, &mut Value);
    let changes: [(&str, Change); 19] = [
        ("version", |t, _| t["version"] = json!("9.9")),
        ("model", |t, _| t["model"]["type"] = json!("Unheard")),
        ("model", |t, _| t["model"]["vocab"] = json!([1, 2])),
        ("model", |t, _| t["model"]["vocab"]["a"] = json!(-1)),
        ("model", |t, _| t["model"]["vocab"]["a"] = json!(1u64 << 40)),
        ("absurd", |t, _| t["model"]["vocab"]["zzzz"] = json!(u32::MAX)),
        ("model", |t, _| t["model"]["merges"] = json!([["q", "no such token"]])),
        ("model", |t, _| t["model"]["merges"] = json!(["one-word"])),
        ("tokenizer.json", |t, _| t["model"]["continuing_subword_prefix"] = json!("a prefix longer than any token")),
        ("added_tokens", |t, _| t["added_tokens"][0]["id"] = json!(77)),
        ("added_tokens", |t, _| t["added_tokens"][0]["content"] = json!("another")),
        ("decoder", |t, _| t["decoder"] = json!({"type": "Nonsense"})),
        ("WordPiece", |t, _| t["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true})),
        ("decoder", |t, _| t["decoder"] = json!(1e300)),
        ("pre_tokenizer", |t, _| {
            t["pre_tokenizer"] =
                json!({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false})
        }),
        ("Precompiled", |t, _| t["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
        ("bos_token", |_, c| c["bos_token"] = json!("<no such token>")),
        ("added_tokens_decoder", |_, c| c["added_tokens_decoder"]["x"] = json!({"content": "y"})),
        ("chat_template", |_, c| c["chat_template"] = json!(7)),
    ];
    load(&tokenizer, &config).unwrap();
    for (index, (name, change)) in changes.into_iter().enumerate() {
        let (mut tokenizer, mut config) = (tokenizer.clone(), config.clone());
        change(&mut tokenizer, &mut config);
        let error = load(&tokenizer, &config).expect_err(&format!("change {index}, {name}"));
        assert!(error.message().contains(name), "change {index}, {name}: {error}");
        assert!(matches!(error.code(), ErrorCode::InvalidFormat | ErrorCode::Unsupported), "{error}");
    }
}

#[test]
fn patterns_that_never_end() {
    // Exponential for a backtracking matcher.
    let (mut tokenizer, config) = golden("smollm2");
    tokenizer["pre_tokenizer"] = json!({
        "type": "Split", "pattern": {"Regex": "(a+)+\\1(?!x)$"}, "behavior": "Isolated", "invert": false
    });
    if let Ok(tokenizer) = load(&tokenizer, &config) {
        // Any answer will do, as long as there is one.
        let _ = tokenizer.encode(&("a".repeat(200) + "b"), false, false);
    }
}

/// Replaces every value of the files, one after the other, by others: an error or a tokenizer that can be used, and
/// never a panic that gets out.
#[test]
fn any_value_may_be_wrong() {
    fn paths(value: &Value, path: &str, out: &mut Vec<String>) {
        let children: Vec<(String, &Value)> = match value {
            Value::Object(map) => {
                map.iter().map(|(key, value)| (key.replace('~', "~0").replace('/', "~1"), value)).collect()
            }
            Value::Array(items) => items.iter().enumerate().map(|(at, value)| (at.to_string(), value)).collect(),
            _ => Vec::new(),
        };
        // Of long lists a few stand for all.
        for (key, child) in children.into_iter().take(4) {
            let path = format!("{path}/{key}");
            paths(child, &path, out);
            out.push(path);
        }
    }
    let values = [
        json!(null),
        json!(true),
        json!(-1),
        json!(0),
        json!(4_000_000_000u32),
        json!(""),
        json!("é"),
        json!("a"),
        json!([]),
        json!([null]),
        json!({}),
        json!({"type": "ByteLevel"}),
    ];
    // Panics that the library is stopped at are expected here, by the dozen.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !info.location().is_some_and(|location| location.file().contains("/registry/")) {
            report(info);
        }
    }));
    let mut loaded = 0;
    for name in ["llama2", "smollm2"] {
        let (tokenizer, config) = golden(name);
        for which in [true, false] {
            let mut all = Vec::new();
            paths(if which { &tokenizer } else { &config }, "", &mut all);
            for path in all {
                for value in &values {
                    let (mut tokenizer, mut config) = (tokenizer.clone(), config.clone());
                    *(if which { &mut tokenizer } else { &mut config }).pointer_mut(&path).unwrap() = value.clone();
                    let result = std::panic::catch_unwind(|| {
                        let Ok(tokenizer) = load(&tokenizer, &config) else { return false };
                        if let Ok(ids) = tokenizer.encode("Hello <s> wörld\n<|im_end|> 12", true, true) {
                            // A file may give added tokens ids that others have, but none out of range.
                            tokenizer.decode(&ids, true).unwrap();
                            tokenizer.decode(&ids, false).unwrap();
                        }
                        let _ = ChatTemplate::of(&tokenizer);
                        true
                    });
                    match result {
                        Ok(usable) => loaded += usize::from(usable),
                        Err(_) => panic!("{name}, {path} = {value}: a panic got out"),
                    }
                }
            }
        }
    }
    assert!(loaded > 100, "{loaded}");
}

#[test]
fn opt_style_folders() {
    // OPT is published with vocab.json and merges.txt only.
    let (tokenizer, config) = golden("gpt2");
    let folder = tempfile::tempdir().unwrap();
    let merges: Vec<&str> =
        tokenizer["model"]["merges"].as_array().unwrap().iter().map(|m| m.as_str().unwrap()).collect();
    let mut vocab = tokenizer["model"]["vocab"].clone();
    for token in tokenizer["added_tokens"].as_array().unwrap() {
        vocab[token["content"].as_str().unwrap()] = token["id"].clone();
    }
    fs::write(folder.path().join("vocab.json"), vocab.to_string()).unwrap();
    fs::write(folder.path().join("merges.txt"), format!("#version: 0.2\n{}\n", merges.join("\n"))).unwrap();
    let text = "It was 1811; wörld 🙂<|endoftext|>";

    let plain = load(&tokenizer, &config).unwrap();
    let ids = plain.encode(text, false, true).unwrap();
    let map = json!({"bos_token": "<|endoftext|>", "eos_token": {"content": "<|endoftext|>"}});
    fs::write(folder.path().join("special_tokens_map.json"), map.to_string()).unwrap();
    let old = Tokenizer::from_folder(folder.path()).unwrap();
    assert_eq!(old.encode(text, true, true).unwrap(), ids);
    assert_eq!(old.eos(), plain.eos());
    assert_eq!(old.decode(&ids, true).unwrap(), "It was 1811; wörld 🙂");

    // OPT's tokenizer puts BOS in front by a flag only.
    let config = json!({"add_bos_token": true, "tokenizer_class": "GPT2Tokenizer"});
    fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    fs::write(folder.path().join("generation_config.json"), json!({"eos_token_id": [3, 5]}).to_string()).unwrap();
    let opt = Tokenizer::from_folder(folder.path()).unwrap();
    assert_eq!(opt.encode(text, true, true).unwrap(), [&[opt.bos().unwrap()], &ids[..]].concat());
    assert_eq!(opt.encode(text, false, true).unwrap(), ids);
    let mut stop = vec![3, 5, opt.eos().unwrap()];
    stop.sort_unstable();
    assert_eq!(opt.stop_tokens(), stop);
}
