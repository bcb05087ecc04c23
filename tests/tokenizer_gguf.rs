//! Tokenizers out of GGUF metadata: SentencePiece against the algorithm itself, flags, and files that lie.

use std::io::Write;

use kvahead::model::checkpoint::gguf::Gguf;
use kvahead::model::tokenizer::{TextStream, Tokenizer};
use kvahead::{ErrorCode, Result};
use proptest::prelude::*;

/// A metadata value to write.
#[derive(Clone, Debug)]
enum Value {
    U32(u32),
    Bool(bool),
    Text(String),
    Strings(Vec<String>),
    U32s(Vec<u32>),
    F32s(Vec<f32>),
}
use Value::*;

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

impl Value {
    fn bytes(&self) -> Vec<u8> {
        fn array(kind: u32, count: usize, items: impl Iterator<Item = Vec<u8>>) -> Vec<u8> {
            let head = [&9u32.to_le_bytes()[..], &kind.to_le_bytes(), &(count as u64).to_le_bytes()].concat();
            head.into_iter().chain(items.flatten()).collect()
        }
        match self {
            U32(value) => [4u32.to_le_bytes(), value.to_le_bytes()].concat(),
            Bool(value) => [&7u32.to_le_bytes()[..], &[u8::from(*value)]].concat(),
            Text(value) => [&8u32.to_le_bytes()[..], &string(value)].concat(),
            Strings(values) => array(8, values.len(), values.iter().map(|value| string(value))),
            U32s(values) => array(4, values.len(), values.iter().map(|value| value.to_le_bytes().to_vec())),
            F32s(values) => array(6, values.len(), values.iter().map(|value| value.to_le_bytes().to_vec())),
        }
    }
}

/// The tokenizer of a GGUF file with this metadata and no tensors.
fn load(pairs: &[(&str, Value)]) -> Result<Tokenizer> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"GGUF\x03\0\0\0").unwrap();
    file.write_all(&0u64.to_le_bytes()).unwrap();
    file.write_all(&(pairs.len() as u64).to_le_bytes()).unwrap();
    for (key, value) in pairs {
        let key = if key.contains('.') { key.to_string() } else { format!("tokenizer.ggml.{key}") };
        file.write_all(&string(&key)).unwrap();
        file.write_all(&value.bytes()).unwrap();
    }
    file.write_all(&[0; 64]).unwrap();
    Tokenizer::from_gguf(Gguf::open(file.path())?.metadata())
}

/// Replaces or adds pairs; `None` removes one.
fn with<'a>(
    mut pairs: Vec<(&'a str, Value)>,
    changes: impl IntoIterator<Item = (&'a str, Option<Value>)>,
) -> Vec<(&'a str, Value)> {
    for (key, value) in changes {
        pairs.retain(|&(name, _)| name != key);
        pairs.extend(value.map(|value| (key, value)));
    }
    pairs
}

const UNKNOWN: u32 = 2;
const CONTROL: u32 = 3;
const USER_DEFINED: u32 = 4;
const BYTE: u32 = 6;

/// Pieces of a small SentencePiece vocabulary, best first.
const PIECES: [&str; 23] = [
    "▁a", "ab", "bc", "ca", "abc", "▁ab", "aa", "▁▁", "bca", "▁abc", "éa", "cab", "aaaa", "aab", "cc", "▁", "a", "b",
    "c", "é", "<s", "<", "s",
];

/// Special tokens, 256 bytes, pieces.
fn sentence_piece() -> Vec<(&'static str, Value)> {
    let mut tokens = vec!["<unk>".to_string(), "<s>".into(), "</s>".into()];
    let mut kinds = vec![UNKNOWN, CONTROL, CONTROL];
    tokens.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    kinds.resize(tokens.len(), BYTE);
    let mut scores = vec![0.0; tokens.len()];
    tokens.extend(PIECES.map(str::to_string));
    kinds.resize(tokens.len(), 1);
    scores.extend((0..PIECES.len()).map(|rank| -(rank as f32)));
    vec![
        ("model", Text("llama".into())),
        ("tokens", Strings(tokens)),
        ("token_type", U32s(kinds)),
        ("scores", F32s(scores)),
        ("unknown_token_id", U32(0)),
        ("bos_token_id", U32(1)),
        ("eos_token_id", U32(2)),
    ]
}

/// What SentencePiece does: start with characters, and as long as two neighbours make a piece, join those that make
/// the best one, the first of equals; characters that are no piece become bytes.
fn by_definition(text: &str) -> Vec<u32> {
    let rank = |piece: &str| PIECES.iter().position(|&known| known == piece);
    let text = if text.is_empty() { text.to_string() } else { format!("▁{}", text.replace(' ', "▁")) };
    let mut symbols: Vec<String> = text.chars().map(|character| character.to_string()).collect();
    loop {
        let pairs = symbols.windows(2).enumerate();
        let best = pairs.filter_map(|(at, pair)| Some((rank(&pair.concat())?, at))).min();
        let Some((_, at)) = best else { break };
        let right = symbols.remove(at + 1);
        symbols[at].push_str(&right);
    }
    let ids = symbols.iter().flat_map(|symbol| match rank(symbol) {
        Some(rank) => vec![259 + rank as u32],
        None => symbol.bytes().map(|byte| 3 + u32::from(byte)).collect(),
    });
    ids.collect()
}

#[test]
fn sentence_piece_by_example() {
    let tokenizer = load(&sentence_piece()).unwrap();
    let id = |piece: &str| tokenizer.token_id(piece).unwrap();
    assert_eq!(tokenizer.encode("abc", false, false).unwrap(), by_definition("abc"));
    // BOS is added unless the file says otherwise.
    assert_eq!(tokenizer.encode("a", true, false).unwrap(), [1, id("▁a")]);
    assert_eq!(tokenizer.encode("", true, false).unwrap(), [1]);
    assert_eq!(tokenizer.encode("x", false, false).unwrap(), [id("▁"), id("<0x78>")]);
    assert_eq!(tokenizer.encode("</s>a", false, true).unwrap(), [2, id("▁a")]);
    assert!(!tokenizer.encode("</s>a", false, false).unwrap().contains(&2));
    assert_eq!(tokenizer.stop_tokens(), [2]);
    assert_eq!(tokenizer.vocabulary(), 259 + PIECES.len());
}

#[test]
fn flags() {
    let id = |tokenizer: &Tokenizer, piece: &str| tokenizer.token_id(piece).unwrap();
    let tokenizer = load(&with(sentence_piece(), [("add_bos_token", Some(Bool(false)))])).unwrap();
    assert_eq!(tokenizer.encode("a", true, false).unwrap(), [id(&tokenizer, "▁a")]);
    let tokenizer = load(&with(sentence_piece(), [("add_eos_token", Some(Bool(true)))])).unwrap();
    assert_eq!(tokenizer.encode("a", true, false).unwrap(), [1, id(&tokenizer, "▁a"), 2]);
    let tokenizer = load(&with(sentence_piece(), [("add_space_prefix", Some(Bool(false)))])).unwrap();
    let ids = tokenizer.encode("a a", false, false).unwrap();
    assert_eq!(ids, [id(&tokenizer, "a"), id(&tokenizer, "▁a")]);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a a");
    assert_eq!(tokenizer.decode(&ids[1..], true).unwrap(), " a");
}

#[test]
fn user_defined_tokens_are_found_in_any_text() {
    let mut tokens = match &sentence_piece()[1].1 {
        Strings(tokens) => tokens.clone(),
        _ => unreachable!(),
    };
    tokens.push("<tool>".into());
    let mut kinds = vec![1; tokens.len()];
    (kinds[0], kinds[1], kinds[2]) = (UNKNOWN, CONTROL, CONTROL);
    kinds[3..259].fill(BYTE);
    *kinds.last_mut().unwrap() = USER_DEFINED;
    let scores = vec![0.0; tokens.len()];
    let changes = [("scores", F32s(scores)), ("token_type", U32s(kinds)), ("tokens", Strings(tokens))];
    let pairs = with(sentence_piece(), changes.map(|(key, value)| (key, Some(value))));
    let tokenizer = load(&pairs).unwrap();
    let tool = tokenizer.token_id("<tool>").unwrap();
    let ids = tokenizer.encode("a<tool>a", false, false).unwrap();
    assert!(ids.contains(&tool));
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a<tool> a");
}

#[test]
fn turns_of_phi3_swallow_line_breaks() {
    let phi3 = with(sentence_piece(), [("general.architecture", Some(Text("phi3".into())))]);
    let (phi3, llama) = (load(&phi3).unwrap(), load(&sentence_piece()).unwrap());
    assert_eq!(phi3.encode("</s>\n \na<s>\n", false, true).unwrap(), [2, 259, 1, 274, 3 + 10]);
    assert_eq!(llama.encode("</s>\n", false, true).unwrap(), [2, 274, 3 + 10]);
}

#[test]
fn bytes_that_are_no_text() {
    let tokenizer = load(&sentence_piece()).unwrap();
    let byte = |byte: u8| 3 + u32::from(byte);
    let a = tokenizer.token_id("a").unwrap();
    for (ids, text) in [
        (vec![byte(0xc3), byte(0xa9)], "é"),
        (vec![byte(0xc3), a], "\u{fffd}a"),
        (vec![byte(0xe2), byte(0x82), a], "\u{fffd}\u{fffd}a"),
        (vec![byte(0xc3), byte(0xa9), byte(0xff), byte(0x41)], "é\u{fffd}A"),
        (vec![byte(0xf0), byte(0x9f), byte(0x99)], "\u{fffd}\u{fffd}\u{fffd}"),
        (vec![byte(0xf0), byte(0x9f), byte(0x99), byte(0x82), 2], "🙂</s>"),
        (vec![byte(0x20), byte(0x20), a], " a"),
    ] {
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text, "{ids:?}");
    }
}

fn byte_level(pre: &str) -> Vec<(&'static str, Value)> {
    let tokens = ["a", "b", "Ġ", "ab", "Ġa", "1", "11", "<|im_end|>", "é"].map(str::to_string);
    let merges = ["a b", "Ġ a", "1 1"].map(str::to_string);
    vec![
        ("model", Text("gpt2".into())),
        ("pre", Text(pre.into())),
        ("tokens", Strings(tokens.to_vec())),
        ("token_type", U32s(vec![1, 1, 1, 1, 1, 1, 1, CONTROL, 5])),
        ("merges", Strings(merges.to_vec())),
        ("eos_token_id", U32(7)),
    ]
}

#[test]
fn words_are_cut_as_the_file_says() {
    for (pre, ids) in [
        ("smollm", &[3, 4, 5, 5][..]),
        ("gpt-2", &[3, 4, 6]),
        ("default", &[3, 4, 6]),
        ("qwen2", &[3, 4, 5, 5]),
        ("llama-bpe", &[3, 4, 6]),
        ("tekken", &[3, 4, 5, 5]),
        ("gpt-4o", &[3, 4, 6]),
    ] {
        let tokenizer = load(&byte_level(pre)).unwrap();
        assert_eq!(tokenizer.encode("ab a11", true, false).unwrap(), ids, "{pre}");
        assert_eq!(tokenizer.decode(ids, true).unwrap(), "ab a11", "{pre}");
    }
    let error = load(&byte_level("klingon")).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Unsupported);
    assert!(error.message().contains("klingon"), "{error}");
}

#[test]
fn files_that_lie() {
    let cases: Vec<(&str, Vec<(&str, Value)>)> = vec![
        ("tokenizer.ggml.model", with(sentence_piece(), [("model", Some(Text("rwkv".into())))])),
        ("tokenizer.ggml.model", with(sentence_piece(), [("model", None)])),
        ("tokenizer.ggml.tokens", with(sentence_piece(), [("tokens", None)])),
        ("tokenizer.ggml.tokens", with(sentence_piece(), [("tokens", Some(Strings(vec![])))])),
        ("tokenizer.ggml.tokens", with(sentence_piece(), [("tokens", Some(U32s(vec![1])))])),
        ("tokenizer.ggml.scores", with(sentence_piece(), [("scores", Some(F32s(vec![1.0])))])),
        ("tokenizer.ggml.scores", with(sentence_piece(), [("scores", None)])),
        ("tokenizer.ggml.token_type", with(sentence_piece(), [("token_type", Some(U32s(vec![1])))])),
        ("tokenizer.ggml.unknown_token_id", with(sentence_piece(), [("unknown_token_id", Some(U32(9999)))])),
        ("tokenizer.ggml.bos_token_id", with(sentence_piece(), [("bos_token_id", Some(U32(9999)))])),
        ("tokenizer.ggml.eos_token_id", with(byte_level("gpt-2"), [("eos_token_id", Some(U32(9)))])),
        ("tokenizer.ggml.merges", with(byte_level("gpt-2"), [("merges", None)])),
        ("tokenizer.ggml.merges", with(byte_level("gpt-2"), [("merges", Some(Strings(vec!["ab".into()])))])),
        ("tokenizer.ggml.merges", with(byte_level("gpt-2"), [("merges", Some(Strings(vec!["é".into()])))])),
        ("tokenizer.ggml.merges", with(byte_level("gpt-2"), [("merges", Some(Strings(vec!["b b".into()])))])),
        ("tokenizer.ggml.merges", with(byte_level("gpt-2"), [("merges", Some(Strings(vec!["".into()])))])),
    ];
    for (name, pairs) in cases {
        let error = load(&pairs).unwrap_err();
        assert!(error.message().contains(name), "{name}: {error}");
        assert!(matches!(error.code(), ErrorCode::InvalidFormat | ErrorCode::Unsupported), "{error}");
    }
    // Odd, but no reason to refuse a file.
    for scores in [f32::NAN, f32::INFINITY, -f32::INFINITY] {
        load(&with(sentence_piece(), [("scores", Some(F32s(vec![scores; 259 + PIECES.len()])))])).unwrap();
    }
    load(&with(sentence_piece(), [("unknown_token_id", None)])).unwrap();
    let twice = vec!["a".to_string(); 259 + PIECES.len()];
    load(&with(sentence_piece(), [("tokens", Some(Strings(twice)))])).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn sentence_piece_by_definition(text in "[abcé x<s]{0,30}") {
        let tokenizer = load(&sentence_piece()).unwrap();
        let ids = tokenizer.encode(&text, false, false).unwrap();
        prop_assert_eq!(&ids, &by_definition(&text));
        prop_assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    }

    /// Any tokens at all: the pieces of the stream are the text.
    #[test]
    fn streams_of_any_tokens(ids in prop::collection::vec(0u32..280, 0..40), skip_special: bool) {
        let tokenizer = load(&sentence_piece()).unwrap();
        let mut stream = TextStream::new(&tokenizer, skip_special);
        let mut text = String::new();
        for &id in &ids {
            text.push_str(&stream.push(id).unwrap());
        }
        text.push_str(&stream.finish());
        prop_assert_eq!(text, tokenizer.decode(&ids, skip_special).unwrap());
    }
}
