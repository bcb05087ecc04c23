//! Tokenizers, streams and chat templates against what Hugging Face makes of them (`tests/data/tokenizer/`).

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvahead::model::chat::{ChatTemplate, Message};
use kvahead::model::checkpoint::gguf::Gguf;
use kvahead::model::tokenizer::{TextStream, Tokenizer};
use kvahead::{Error, ErrorCode};
use serde::Deserialize;

#[derive(Deserialize)]
struct Expected {
    tokenize: Vec<Tokenize>,
    stream: Vec<Stream>,
    chat: Vec<Chat>,
}

#[derive(Deserialize)]
struct Tokenize {
    tokenizer: String,
    text: String,
    add_special_tokens: bool,
    ids: Vec<u32>,
    decoded: String,
    decoded_without_special: String,
}

#[derive(Deserialize)]
struct Stream {
    tokenizer: String,
    ids: Vec<u32>,
    decoded_prefixes: Vec<String>,
}

#[derive(Deserialize)]
struct Chat {
    tokenizer: String,
    messages: Vec<Message>,
    add_generation_prompt: bool,
    rendered: Option<String>,
    error: Option<String>,
}

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

fn expected() -> Expected {
    serde_json::from_slice(&std::fs::read(data().join("tokenizer/expected.json")).unwrap()).unwrap()
}

/// All tokenizers, by the folder they are in.
fn tokenizers() -> HashMap<String, Tokenizer> {
    let folders = data().join("tokenizer").read_dir().unwrap().map(|entry| entry.unwrap().path());
    let folders = folders.filter(|path| path.is_dir());
    folders
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_string();
            (name, Tokenizer::from_folder(&path).unwrap())
        })
        .collect()
}

#[test]
fn ids_and_texts() {
    let tokenizers = tokenizers();
    for case in expected().tokenize {
        let tokenizer = &tokenizers[&case.tokenizer];
        let Tokenize { text, ids, .. } = &case;
        assert_eq!(
            &tokenizer.encode(text, case.add_special_tokens, true).unwrap(),
            ids,
            "{}: {text:?}",
            case.tokenizer
        );
        assert_eq!(tokenizer.decode(ids, false).unwrap(), case.decoded, "{}: {ids:?}", case.tokenizer);
        assert_eq!(
            tokenizer.decode(ids, true).unwrap(),
            case.decoded_without_special,
            "{}: {ids:?} without special tokens",
            case.tokenizer
        );
    }
}

#[test]
fn streams_are_the_text_in_pieces() {
    let tokenizers = tokenizers();
    let expected = expected();
    for case in &expected.tokenize {
        let tokenizer = &tokenizers[&case.tokenizer];
        for (skip_special, text) in [(false, &case.decoded), (true, &case.decoded_without_special)] {
            let mut stream = tokenizer.stream(skip_special);
            // Twice: a stream is as new after `finish`.
            for _ in 0..2 {
                let mut streamed: String = case.ids.iter().map(|&id| stream.push(id).unwrap()).collect();
                streamed.push_str(&stream.finish());
                assert_eq!(&streamed, text, "{}: {:?}", case.tokenizer, case.ids);
            }
        }
    }
    for case in &expected.stream {
        let mut stream = tokenizers[&case.tokenizer].stream(false);
        let mut streamed = String::new();
        let whole = case.decoded_prefixes.last().unwrap();
        for (&id, prefix) in case.ids.iter().zip(&case.decoded_prefixes) {
            streamed.push_str(&stream.push(id).unwrap());
            assert!(whole.starts_with(&streamed), "{}: {streamed:?} is not the start of {whole:?}", case.tokenizer);
            let certain = prefix.trim_end_matches(char::REPLACEMENT_CHARACTER);
            // SentencePiece decoders of Hugging Face take back whole characters as long as a run of bytes is unfinished.
            assert!(streamed == certain || streamed.starts_with(certain) && prefix.contains("\u{fffd}\u{fffd}"));
        }
        assert_eq!(&streamed, whole);
    }
}

#[test]
fn unfinished_characters_become_u_fffd() {
    let tokenizers = tokenizers();
    for case in expected().stream {
        let tokenizer = &tokenizers[&case.tokenizer];
        for end in 0..=case.ids.len() {
            let ids = &case.ids[..end];
            let text = tokenizer.decode(ids, false).unwrap();
            let mut stream = tokenizer.stream(false);
            let mut streamed: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
            streamed.push_str(&stream.finish());
            assert_eq!(streamed, text);
            let Some(prefix) = end.checked_sub(1).map(|last| &case.decoded_prefixes[last]) else { continue };
            if !prefix.contains("\u{fffd}\u{fffd}") {
                assert_eq!(&text, prefix, "{}: {ids:?}", case.tokenizer);
            }
        }
    }
}

#[test]
fn a_continuation_keeps_its_first_space() {
    let tokenizers = tokenizers();
    let tokenizer = &tokenizers["llama2"];
    let ids = tokenizer.encode("Hello world", false, false).unwrap();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "Hello world");
    let mut stream = TextStream::continuing(tokenizer, true);
    let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    text.push_str(&stream.finish());
    assert_eq!(text, " Hello world");
}

#[test]
fn chat_templates() {
    let tokenizers = tokenizers();
    let mut templates = HashMap::new();
    for case in expected().chat {
        let name = case.tokenizer.as_str();
        let template =
            templates.entry(name.to_string()).or_insert_with(|| ChatTemplate::of(&tokenizers[name]).unwrap());
        let rendered = template.render(&case.messages, case.add_generation_prompt);
        match (case.rendered, case.error) {
            (Some(text), None) => assert_eq!(rendered.unwrap(), text, "{name}: {:?}", case.messages),
            (None, Some(message)) => {
                let error = rendered.unwrap_err();
                assert_eq!(error.code(), ErrorCode::InvalidArgument);
                assert!(error.message().ends_with(&message), "{error}");
            }
            _ => panic!("a case has either a text or an error"),
        }
    }
    let error = ChatTemplate::of(&tokenizers["gpt2"]).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Unsupported);
    assert!(error.message().contains("no chat template"), "{error}");
}

/// A GGUF file's tokenizer is the one of the folder that it was made from.
#[test]
fn gguf_makes_the_same_tokenizer() {
    let tokenizers = tokenizers();
    let expected = expected();
    for (file, name) in [
        ("smollm2.gguf", "smollm2"),
        ("llama3-rope.gguf", "llama3"),
        ("qwen2.gguf", "qwen2"),
        ("qwen2.v2.gguf", "qwen2"),
    ] {
        let gguf = Gguf::open(&data().join("gguf").join(file)).unwrap();
        let tokenizer = Tokenizer::from_gguf(gguf.metadata()).unwrap();
        let folder = &tokenizers[name];
        assert_eq!(tokenizer.vocabulary(), folder.vocabulary(), "{file}");
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (folder.bos(), folder.eos()), "{file}");
        for id in 0..tokenizer.vocabulary() as u32 {
            assert_eq!(tokenizer.token_text(id), folder.token_text(id), "{file}: {id}");
            assert_eq!(tokenizer.token_bytes(id), folder.token_bytes(id), "{file}: {id}");
            assert_eq!(tokenizer.is_special(id), folder.is_special(id), "{file}: {id}");
        }
        let mut cases = 0;
        for case in expected.tokenize.iter().filter(|case| case.tokenizer == name) {
            let ids = tokenizer.encode(&case.text, case.add_special_tokens, true).unwrap();
            assert_eq!(ids, case.ids, "{file}: {:?}", case.text);
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), case.decoded, "{file}");
            cases += 1;
        }
        assert!(cases > 10);
    }
}

#[test]
fn special_tokens_written_in_text() {
    let tokenizers = tokenizers();
    for (name, text) in [("smollm2", "a<|im_end|>b"), ("llama3", "a<|eot_id|>b"), ("llama2", "a</s>b")] {
        let tokenizer = &tokenizers[name];
        let parsed = tokenizer.encode(text, false, true).unwrap();
        assert!(parsed.iter().any(|&id| tokenizer.is_special(id)), "{name}");
        let plain = tokenizer.encode(text, false, false).unwrap();
        assert!(!plain.iter().any(|&id| tokenizer.is_special(id)), "{name}");
        assert_eq!(tokenizer.decode(&plain, true).unwrap(), text, "{name}");
        assert!(tokenizer.stop_tokens().contains(&tokenizer.eos().unwrap()));
    }
}

#[test]
fn ids_outside_the_vocabulary() {
    let mut tokenizer = Tokenizer::from_folder(&data().join("tokenizer/gpt2")).unwrap();
    let size = tokenizer.vocabulary() as u32;
    let check = |result: Result<String, Error>| assert_eq!(result.unwrap_err().code(), ErrorCode::InvalidArgument);
    check(tokenizer.decode(&[size], false));
    check(tokenizer.decode(&[u32::MAX], false));
    check(tokenizer.stream(false).push(size));
    // The model may have more rows than there are tokens: such ids decode to nothing.
    tokenizer.match_vocabulary(size as usize + 24).unwrap();
    assert_eq!(tokenizer.decode(&[size, size + 23], false).unwrap(), "");
    check(tokenizer.decode(&[size + 24], false));
    assert_eq!(tokenizer.match_vocabulary(size as usize - 1).unwrap_err().code(), ErrorCode::InvalidFormat);
}

#[test]
fn usable_from_many_threads() {
    let tokenizer = Arc::new(Tokenizer::from_folder(&data().join("tokenizer/gpt2")).unwrap());
    let text = "It is a truth universally acknowledged, that a single man in possession of a good fortune";
    let ids = tokenizer.encode(text, false, false).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut stream = TextStream::new(tokenizer.clone(), false);
                for _ in 0..50 {
                    assert_eq!(tokenizer.encode(text, false, false).unwrap(), ids);
                    let mut streamed: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
                    streamed.push_str(&stream.finish());
                    assert_eq!(streamed, text);
                }
            });
        }
    });
}
