//! Frequencies against transformers'.

use super::data;
use crate::model::config;

/// Equal but for the last bits: the two compute powers with different libraries.
fn close(found: &[f32], expected: &serde_json::Value, name: &str) {
    let expected: Vec<f64> = expected.as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect();
    assert_eq!(found.len(), expected.len(), "{name}");
    for (i, (&found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs() / expected;
        assert!(error < 3e-7, "{name}: frequency {i} is {found}, not {expected}");
    }
}

#[test]
fn every_rule_gives_the_reference_frequencies() {
    let text = std::fs::read_to_string(data("rope.json")).unwrap();
    let cases: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text).unwrap();
    for (name, case) in &cases {
        let config = config::from_json(&case["config"].to_string(), name.as_ref()).unwrap();
        let rotary = config.rope.unwrap().rotary();
        close(&rotary.short.frequencies, &case["inv_freq"], name);
        let factor = case["attention_factor"].as_f64().unwrap();
        assert_eq!(rotary.short.factor, factor as f32, "{name}");
        match case.get("long_inv_freq") {
            Some(expected) => {
                let (limit, long) = rotary.long.unwrap();
                assert_eq!(limit, 4096);
                assert_eq!(long.factor, factor as f32, "{name}");
                close(&long.frequencies, expected, name);
            }
            None => assert!(rotary.long.is_none(), "{name}"),
        }
    }
    assert_eq!(cases.len(), 7);
}
