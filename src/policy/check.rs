//! Whether a session's choices make sense, before anything is made of them.
//!
//! Each message names the field, its value and what would be right; the names are the same in Rust, in C and in the other
//! bindings. Only what the chosen policy uses is looked at: settings of `infinigen` may lie about while `full` runs.

use std::fmt::Display;

use super::{Budget, InfinigenOptions, PolicyKind, PolicyOptions, Predictor, Rule};
use crate::kv::{Eviction, KvTier};
use crate::{Error, Result};

impl PolicyOptions {
    /// Errors where a value is out of its range, or two exclude each other. Sinks and windows may be longer than a
    /// session: all of it is attended then.
    pub fn check(&self) -> Result<()> {
        if let KvTier::File(file) = &self.tier
            && file.keep
            && file.path.is_none()
        {
            return Err(Error::invalid_argument(
                "the KV file has no path, so it cannot be kept: name it, or leave keep out",
            ));
        }
        match self.kind {
            PolicyKind::Full | PolicyKind::Int4 => {}
            PolicyKind::Window => self.check_budget(self.sinks)?,
            PolicyKind::H2o => self.check_budget(0)?,
            PolicyKind::Infinigen => self.infinigen.check().map_err(|error| error.within("infinigen"))?,
        }
        self.check_eviction()
    }

    /// `fixed`: tokens of the budget that are spoken for.
    fn check_budget(&self, fixed: usize) -> Result<()> {
        match self.budget {
            Budget::Share(share) => check_share("budget", share),
            Budget::Tokens(tokens) if tokens <= fixed => Err(Error::invalid_argument(format!(
                "budget is {tokens} tokens, of which {fixed} are sinks: {} or more leave room for a recent one",
                fixed + 1
            ))),
            Budget::Tokens(_) => Ok(()),
        }
    }

    fn check_eviction(&self) -> Result<()> {
        if self.eviction == Eviction::Off {
            return Ok(());
        }
        if self.kind != PolicyKind::Infinigen {
            return Err(Error::invalid_argument(format!(
                "eviction needs policy infinigen, which says what is used: {} drops nothing that it attends",
                self.kind.name()
            )));
        }
        if matches!(self.infinigen.rule, Rule::Replay { .. }) {
            return Err(Error::invalid_argument(
                "eviction does not go with a trace that is replayed: its rows are positions",
            ));
        }
        // The newest token is part of the window, and there without one.
        let kept = self.infinigen.sinks.saturating_add(self.infinigen.window.max(1));
        if self.pool_tokens != 0 && self.pool_tokens <= kept {
            return Err(Error::invalid_argument(format!(
                "pool_tokens is {}, but sinks and window, {kept} together, are never evicted: {} or more, or 0 for no \
                 limit of the session's own",
                self.pool_tokens,
                kept.saturating_add(1)
            )));
        }
        Ok(())
    }
}

impl InfinigenOptions {
    fn check(&self) -> Result<()> {
        check_share("ratio", self.ratio)?;
        if ![4, 8, 32].contains(&self.index_bits) {
            return Err(Error::invalid_argument(format!("index_bits is {}, not 4, 8 or 32", self.index_bits)));
        }
        match self.rule {
            Rule::Share(share) => check_share("select_share", share)?,
            Rule::Probability { below, most } => {
                check_positive("select_below", below)?;
                check_share("select_cap", most)?;
            }
            Rule::Paper { alpha, most } => {
                check_positive("alpha", alpha)?;
                check_share("select_cap", most)?;
            }
            Rule::Random { count, renewed } => {
                if let Budget::Share(share) = count {
                    check_share("select_share", share)?;
                }
                check_share("select_renewed", renewed)?;
            }
            Rule::Replay { most } => {
                check_share("select_cap", most)?;
                if self.replay.is_none() {
                    return Err(Error::invalid_argument("the rule replays a trace, but replay names none"));
                }
            }
        }
        if self.resident_layers == 0 && self.predictor != Predictor::Exact {
            return Err(Error::invalid_argument(
                "resident_layers is 0, but no layer comes before the first to predict its queries from: 1 or more \
                 (0 with predictor exact only)",
            ));
        }
        if self.sinks.checked_add(self.window).is_none() {
            return Err(out_of_range("window", self.window, "a number of tokens"));
        }
        if self.correct.is_nan() || !(0.0..=1.0).contains(&self.correct) {
            return Err(out_of_range("correct", self.correct, "a share of the tokens from 0 (no correction) to 1"));
        }
        match self.cache {
            Budget::Share(share) if share.is_nan() || !(0.0..=1.0).contains(&share) => {
                Err(out_of_range("cache", share, "a share of the tokens from 0 to 1"))
            }
            _ => Ok(()),
        }
    }
}

fn check_share(name: &str, share: f32) -> Result<()> {
    if share > 0.0 && share <= 1.0 {
        return Ok(());
    }
    Err(out_of_range(name, share, "a share above 0 and at most 1"))
}

fn check_positive(name: &str, value: f32) -> Result<()> {
    if value > 0.0 && value.is_finite() {
        return Ok(());
    }
    Err(out_of_range(name, value, "a number above 0"))
}

fn out_of_range(name: &str, value: impl Display, right: impl Display) -> Error {
    Error::invalid_argument(format!("{name} is {value}, which is not {right}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorCode;
    use crate::kv::FileOptions;
    use crate::policy::InfinigenMode;

    fn of(kind: PolicyKind) -> PolicyOptions {
        PolicyOptions { kind, ..PolicyOptions::default() }
    }

    fn infinigen(change: impl FnOnce(&mut InfinigenOptions)) -> PolicyOptions {
        let mut options = of(PolicyKind::Infinigen);
        change(&mut options.infinigen);
        options
    }

    /// Refused, in a message that has `says` in it.
    fn refused(options: &PolicyOptions, says: &str) {
        let error = options.check().expect_err(says);
        assert_eq!(error.code(), ErrorCode::InvalidArgument);
        assert!(error.message().contains(says), "\"{error}\" does not say \"{says}\"");
    }

    #[test]
    fn defaults_are_right_for_every_policy_and_mode() {
        for kind in PolicyKind::ALL {
            of(kind).check().unwrap();
        }
        for mode in [InfinigenMode::Default, InfinigenMode::Paper] {
            infinigen(|options| *options = InfinigenOptions::of(mode)).check().unwrap();
        }
    }

    #[test]
    fn shares_lie_within_their_range() {
        let wrong = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, -0.1, 1.000_001, 20.0];
        for share in wrong {
            for kind in [PolicyKind::Window, PolicyKind::H2o] {
                refused(&PolicyOptions { budget: Budget::Share(share), ..of(kind) }, &format!("budget is {share}"));
            }
            refused(&infinigen(|o| o.ratio = share), &format!("infinigen: ratio is {share}"));
            refused(&infinigen(|o| o.rule = Rule::Share(share)), &format!("select_share is {share}"));
            refused(&infinigen(|o| o.rule = Rule::Probability { below: 7.0, most: share }), "select_cap");
            refused(&infinigen(|o| o.rule = Rule::Paper { alpha: 4.0, most: share }), "select_cap");
        }
        for share in [f32::MIN_POSITIVE, 0.2, 1.0] {
            PolicyOptions { budget: Budget::Share(share), ..of(PolicyKind::Window) }.check().unwrap();
            infinigen(|o| (o.ratio, o.rule) = (share, Rule::Share(share))).check().unwrap();
        }
        // Nothing need be cached.
        for share in [0.0, 1.0] {
            infinigen(|o| o.cache = Budget::Share(share)).check().unwrap();
            infinigen(|o| o.correct = share).check().unwrap();
        }
        for share in [f32::NAN, -0.1, 1.1] {
            refused(&infinigen(|o| o.correct = share), &format!("correct is {share}"));
            refused(&infinigen(|o| o.cache = Budget::Share(share)), "cache is");
        }
        for value in [f32::NAN, f32::INFINITY, 0.0, -1.0] {
            refused(&infinigen(|o| o.rule = Rule::Probability { below: value, most: 0.1 }), "select_below");
            refused(&infinigen(|o| o.rule = Rule::Paper { alpha: value, most: 0.1 }), "alpha");
        }
    }

    #[test]
    fn counts_leave_room() {
        let window = |tokens, sinks| PolicyOptions { budget: Budget::Tokens(tokens), sinks, ..of(PolicyKind::Window) };
        window(5, 4).check().unwrap();
        window(1, 0).check().unwrap();
        refused(&window(4, 4), "budget is 4 tokens");
        refused(&window(0, 0), "budget is 0 tokens");
        refused(&PolicyOptions { budget: Budget::Tokens(0), ..of(PolicyKind::H2o) }, "budget is 0 tokens");
        refused(&infinigen(|o| o.window = usize::MAX), "window is 18446744073709551615");
        infinigen(|o| o.window = 1 << 40).check().unwrap();
        for bits in [0, 1, 5, 16, 64, u32::MAX] {
            refused(&infinigen(|o| o.index_bits = bits), &format!("index_bits is {bits}"));
        }
        refused(&infinigen(|o| o.resident_layers = 0), "resident_layers is 0");
        infinigen(|o| (o.resident_layers, o.predictor) = (0, Predictor::Exact)).check().unwrap();
    }

    #[test]
    fn what_excludes_each_other_is_refused() {
        let keep = FileOptions { keep: true, ..FileOptions::default() };
        refused(&PolicyOptions { tier: KvTier::File(keep.clone()), ..PolicyOptions::default() }, "no path");
        let named = FileOptions { path: Some("/tmp/kv".into()), ..keep };
        PolicyOptions { tier: KvTier::File(named), ..PolicyOptions::default() }.check().unwrap();
        refused(&PolicyOptions { eviction: Eviction::Lru, ..of(PolicyKind::Full) }, "eviction needs policy infinigen");
        let evict =
            |tokens| PolicyOptions { eviction: Eviction::Fifo, pool_tokens: tokens, ..of(PolicyKind::Infinigen) };
        refused(&evict(68), "pool_tokens is 68");
        evict(69).check().unwrap();
        evict(0).check().unwrap();
    }

    #[test]
    fn what_is_not_used_is_not_looked_at() {
        let mut options = infinigen(|o| o.ratio = f32::NAN);
        options.kind = PolicyKind::Full;
        options.budget = Budget::Share(f32::NAN);
        options.check().unwrap();
    }
}
