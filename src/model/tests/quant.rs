//! Decoding against what the gguf package makes of the same file.

use super::{data, tensor};
use crate::model::checkpoint::gguf::Gguf;
use crate::model::checkpoint::{Stored, quant};

#[test]
fn every_encoding_decodes_to_the_reference_values() {
    let path = data("gguf/quants.gguf");
    let gguf = Gguf::open(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let mut seen = Vec::new();
    for (name, entry) in gguf.entries() {
        let Stored::Known(encoding) = entry.stored else { panic!("{name}") };
        let (shape, expected) = tensor(&data("gguf/quants.safetensors"), name);
        assert_eq!(entry.shape, shape, "{name}");
        let mut values = vec![0.0; shape.iter().product()];
        encoding.decode(&bytes[entry.offset as usize..][..entry.bytes as usize], &mut values);
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&values), bits(&expected), "{name}");
        seen.push(encoding.to_string().to_lowercase());
        assert_eq!(seen.last(), Some(name));
    }
    assert_eq!(seen.len(), quant::Encoding::ggml_list().split(", ").count());
}
