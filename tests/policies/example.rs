//! The small policy that docs/policies.md shows: every other token of the past, and the recent ones.

use kvahead::backend::{DType, KvRuns, Rows, Visible};
use kvahead::engine::{Session, SessionOptions};
use kvahead::kv::SequenceKv;
use kvahead::policy::{Policy, Setting, Step, TierBytes};
use kvahead::{Error, Result};

use crate::common::{Golden, data, load, relative_error, root};

// example: begin
/// Keeps every token on the device, and lets a decoded one attend those at even positions and the `recent` last ones.
struct EveryOther {
    recent: usize,
    kv: SequenceKv,
    /// Rows that the newest token attends: one list a KV head.
    rows: Vec<Vec<u32>>,
}

impl EveryOther {
    fn new(recent: usize, setting: Setting) -> Result<EveryOther> {
        if setting.window.is_some() {
            return Err(Error::unsupported("policy every-other does not go with a model's own sliding window"));
        }
        let rows = vec![Vec::new(); setting.geometry.kv_heads];
        Ok(EveryOther { recent, kv: SequenceKv::new(setting.pool, setting.geometry), rows })
    }
}

impl Policy for EveryOther {
    /// The only call that may find no room.
    fn reserve(&mut self, length: usize) -> Result<()> {
        self.kv.reserve(length)
    }

    /// Row t of a run is the token at position t, in every layer.
    fn append(&mut self, step: &Step<'_>, keys: Rows<'_>, values: Rows<'_>) -> Result<()> {
        step.backend.store_kv(step.stream, keys, values, &mut self.kv.layer_mut(step.layer), step.position)?;
        let (newest, recent) = (step.position as u32, (step.position + 1).saturating_sub(self.recent) as u32);
        for rows in &mut self.rows {
            rows.clear();
            rows.extend((0..=newest).filter(|&row| row % 2 == 0 || row >= recent));
        }
        Ok(())
    }

    /// A prompt attends everything before it, which is what `Causal` means.
    fn attended(&self, step: &Step<'_>) -> (KvRuns<'_>, Visible<'_>) {
        let visible = if step.rows == 1 { Visible::Listed(&self.rows) } else { Visible::Causal };
        (self.kv.layer(step.layer), visible)
    }

    /// What lies past the length means nothing, so there is nothing to undo but the room.
    fn roll_back(&mut self, _step: &Step<'_>, length: usize) -> Result<()> {
        self.kv.truncate(length);
        Ok(())
    }

    fn truncate(&mut self, _step: &Step<'_>, length: usize) -> Result<()> {
        self.kv.truncate(length);
        Ok(())
    }

    fn bytes(&self) -> TierBytes {
        TierBytes { device: self.kv.bytes(), ..TierBytes::default() }
    }
}
// example: end

#[test]
fn the_example_attends_what_it_says() {
    let folder = data().join("golden/smollm2");
    let (model, golden) = (load(&folder, Some(DType::F32)), Golden::read(&folder, ""));
    let options = SessionOptions { kv_dtype: Some(DType::F32), ..SessionOptions::default() };
    let n = golden.tokens.len() - 1;
    let error = |recent: usize| {
        let make = |setting| EveryOther::new(recent, setting).map(|policy| Box::new(policy) as Box<dyn Policy>);
        let mut session = Session::with_policy(&model, &options, make).unwrap();
        session.prefill(&golden.tokens[..n]).unwrap();
        session.decode(golden.tokens[n]).unwrap();
        relative_error(session.logits().unwrap(), &golden.logits[n])
    };
    assert!(error(n + 1) < 1e-4, "with everything recent it attends everything");
    assert!(error(1) > 1e-4, "it leaves something out");
}

#[test]
fn the_documentation_shows_the_example() {
    let page = std::fs::read_to_string(root().join("docs/policies.md")).unwrap();
    let own = include_str!("example.rs");
    let example =
        own.split("// example: begin\n").nth(1).and_then(|rest| rest.split("// example: end").next()).unwrap();
    assert!(
        page.contains(&format!("```rust\n{example}```\n")),
        "docs/policies.md does not quote tests/policies/example.rs"
    );
}
