//! From logits to the next token.
//!
//! The steps, in the order in which Hugging Face's `generate` applies them:
//!
//! 1. logit bias: `logit += bias`;
//! 2. repetition penalty (Keskar et al. 2019): of every token in the window, a positive logit is divided by the
//!    penalty, a negative one multiplied with it;
//! 3. frequency and presence penalty (OpenAI): `logit -= frequency · count + presence` for tokens in the window;
//! 4. temperature: `logit /= temperature`; at 0 the highest logit wins, and nothing of what follows happens;
//! 5. top-k: logits below the k-th highest go; others as high as that one stay;
//! 6. top-p (Holtzman et al. 2020): of the probabilities in descending order, those before which less than p has been
//!    gathered stay;
//! 7. min-p (Nguyen et al. 2024): probabilities below p times the highest go;
//! 8. one draw from what is left.
//!
//! The draw is a function of the seed and of its index only: ChaCha8 is a counter-based generator, and the index is
//! the counter. So there is no generator state to keep with a session, and a session that was truncated and continued
//! makes the same choices again.
//!
//! The exponential is our own (multiplications and additions, which every machine rounds alike), so that a seed means
//! the same tokens wherever the logits are the same, and the compiler can vectorize it.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::{Error, ErrorCode, Result};

/// How the next token is chosen. The default is greedy: the token with the highest logit.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; 0 takes the token with the highest one.
    pub temperature: f32,
    /// Keep the k highest logits; 0 keeps all.
    pub top_k: usize,
    /// Keep the most likely tokens that make up this probability, from 0 to 1; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this likely, as a share of the most likely one, from 0 to 1; 0 keeps all.
    pub min_p: f32,
    /// Above 1 makes tokens of the window less likely; 1 changes nothing. Must be above 0.
    pub repetition_penalty: f32,
    /// Taken from a logit for each time the token is in the window; 0 changes nothing.
    pub frequency_penalty: f32,
    /// Taken from a logit once if the token is in the window; 0 changes nothing.
    pub presence_penalty: f32,
    /// How many of the last tokens the penalties look at; 0 means all.
    pub penalty_window: usize,
    /// Chooses the sequence of random numbers.
    pub seed: u64,
    /// Added to logits, by token; minus infinity forbids a token. A token that occurs twice gets both.
    pub logit_bias: Vec<(u32, f32)>,
}

impl Default for SamplingOptions {
    fn default() -> SamplingOptions {
        SamplingOptions {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            penalty_window: 0,
            seed: 0,
            logit_bias: Vec::new(),
        }
    }
}

impl SamplingOptions {
    /// Checks every field, for a model with `vocabulary` tokens.
    pub fn validate(&self, vocabulary: usize) -> Result<()> {
        let check = |name: &str, value: f32, valid: bool, expected: &str| match valid {
            true => Ok(()),
            false => Err(Error::invalid_argument(format!("{name} is {value}; expected {expected}"))),
        };
        let share = |value: f32| (0.0..=1.0).contains(&value);
        let finite = "a finite number";
        let temperature = self.temperature;
        check(
            "temperature",
            temperature,
            temperature.is_finite() && temperature >= 0.0,
            "a finite number, 0 or above",
        )?;
        check("top_p", self.top_p, share(self.top_p), "0 to 1")?;
        check("min_p", self.min_p, share(self.min_p), "0 to 1")?;
        let repetition = self.repetition_penalty;
        let valid = repetition.is_finite() && repetition > 0.0;
        check("repetition_penalty", repetition, valid, "a finite number above 0")?;
        check("frequency_penalty", self.frequency_penalty, self.frequency_penalty.is_finite(), finite)?;
        check("presence_penalty", self.presence_penalty, self.presence_penalty.is_finite(), finite)?;
        for &(token, bias) in &self.logit_bias {
            if token as usize >= vocabulary {
                return Err(Error::invalid_argument(format!(
                    "logit_bias names the token {token}; the vocabulary has {vocabulary} tokens"
                )));
            }
            let valid = bias.is_finite() || bias == f32::NEG_INFINITY;
            check(&format!("the logit_bias of token {token}"), bias, valid, "a finite number or minus infinity")?;
        }
        Ok(())
    }

    fn penalizes(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }
}

/// Memory that [`sample`] uses again from call to call.
#[derive(Clone, Debug, Default)]
pub struct Scratch {
    /// Logits after bias and penalties.
    logits: Vec<f32>,
    /// How often each token is in the window; all zero between calls.
    counts: Vec<u32>,
    /// Probabilities by token, as shares of the best one's.
    weights: Vec<f32>,
    /// For sorting by weight.
    candidates: Vec<Candidate>,
    /// For finding the k-th highest logit.
    highest: Vec<f32>,
}

/// A token and its weight.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    token: u32,
    weight: f32,
}

/// Chooses the next token.
///
/// `logits` are the model's, one for each token of the vocabulary; `history` is the sequence so far, for the
/// penalties; `draw` is the index of the random number, by convention the length of the sequence. Takes no memory
/// after the first call with a [`Scratch`].
///
/// Ties go to the lower id. A logit of minus infinity is never chosen; several of plus infinity share everything. NaN,
/// and logits that leave no token to choose, are errors, as are ids in `history` or `logit_bias` outside the
/// vocabulary. `options` are not checked in other ways here: call [`SamplingOptions::validate`] once.
pub fn sample(
    logits: &[f32],
    options: &SamplingOptions,
    history: &[u32],
    draw: u64,
    scratch: &mut Scratch,
) -> Result<u32> {
    let Scratch { logits: adjusted, counts, weights, candidates, highest } = scratch;
    let logits = if options.logit_bias.is_empty() && (!options.penalizes() || history.is_empty()) {
        logits
    } else {
        adjusted.clear();
        adjusted.extend_from_slice(logits);
        adjust(adjusted, options, history, counts)?;
        adjusted
    };

    let best = maximum(logits)?;
    if options.temperature == 0.0 {
        return first(logits, |logit| logit == best);
    }

    weights.clear();
    if best == f32::INFINITY {
        weights.extend(logits.iter().map(|&logit| f32::from(logit == best)));
        return choose(weights, 1.0, uniform(options.seed, draw));
    }
    let floor = match options.top_k {
        0 => f32::NEG_INFINITY,
        k => kth_highest(logits, k, highest),
    };
    // A temperature this low leaves the best alone, and its reciprocal is finite.
    let scale = 1.0 / options.temperature.max(f32::MIN_POSITIVE);
    // Always computed and then perhaps not used: a branch would keep this from being vectorized.
    weights.extend(logits.iter().map(|&logit| exponential((logit - best) * scale) * f32::from(logit >= floor)));
    if options.top_p < 1.0 {
        top_p(weights, options.top_p, candidates);
    }
    choose(weights, options.min_p, uniform(options.seed, draw))
}

/// Natural logarithm of the probability that softmax gives `token`; minus infinity where the logits give it none, NaN
/// where they give no probabilities (a NaN or plus infinity among them) or `token` is outside the vocabulary.
pub fn log_probability(logits: &[f32], token: u32) -> f32 {
    let Some(&logit) = logits.get(token as usize) else { return f32::NAN };
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // The scores of an evaluation are compared with other programs', so this is exact, not `exponential`.
    let total: f64 = logits.iter().map(|&logit| f64::from(logit - best).exp()).sum();
    (f64::from(logit - best) - total.ln()) as f32
}

/// Bias and penalties, in place.
fn adjust(logits: &mut [f32], options: &SamplingOptions, history: &[u32], counts: &mut Vec<u32>) -> Result<()> {
    let vocabulary = logits.len();
    for &(token, bias) in &options.logit_bias {
        let Some(logit) = logits.get_mut(token as usize) else {
            return Err(Error::invalid_argument(format!(
                "logit_bias names the token {token}; the vocabulary has {vocabulary} tokens"
            )));
        };
        // What is forbidden stays so, even against a logit of plus infinity.
        *logit = if bias == f32::NEG_INFINITY { bias } else { *logit + bias };
    }
    if !options.penalizes() {
        return Ok(());
    }

    let from = match options.penalty_window {
        0 => 0,
        window => history.len().saturating_sub(window),
    };
    let window = &history[from..];
    if let Some(token) = window.iter().find(|&&token| token as usize >= vocabulary) {
        return Err(Error::invalid_argument(format!(
            "the history has the token {token}; the vocabulary has {vocabulary} tokens"
        )));
    }
    if counts.len() < vocabulary {
        counts.resize(vocabulary, 0);
    }
    for &token in window {
        counts[token as usize] = counts[token as usize].saturating_add(1);
    }
    for &token in window {
        // The first occurrence pays for all, and leaves the counts as they were.
        let count = std::mem::take(&mut counts[token as usize]);
        if count > 0 {
            let logit = &mut logits[token as usize];
            let penalty = options.repetition_penalty;
            *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
            *logit -= options.frequency_penalty * count as f32 + options.presence_penalty;
        }
    }
    Ok(())
}

/// The highest logit; an error where one is NaN, or all are minus infinity, or there are none.
fn maximum(logits: &[f32]) -> Result<f32> {
    // Independent lanes, so that this vectorizes; `max` alone would hide NaN.
    const LANES: usize = 16;
    let mut best = [f32::NEG_INFINITY; LANES];
    let mut nan = [false; LANES];
    let chunks = logits.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for lane in 0..LANES {
            best[lane] = if chunk[lane] > best[lane] { chunk[lane] } else { best[lane] };
            nan[lane] |= chunk[lane].is_nan();
        }
    }
    for (lane, &logit) in rest.iter().enumerate() {
        best[lane] = best[lane].max(logit);
        nan[lane] |= logit.is_nan();
    }
    if nan.contains(&true) {
        let token = logits.iter().position(|logit| logit.is_nan()).unwrap_or_default();
        return Err(Error::invalid_argument(format!("the logit of token {token} is NaN")));
    }
    match best.into_iter().fold(f32::NEG_INFINITY, f32::max) {
        f32::NEG_INFINITY => Err(Error::invalid_argument(format!(
            "none of the {} tokens can be chosen: every logit is minus infinity",
            logits.len()
        ))),
        best => Ok(best),
    }
}

/// The first token that is `wanted`; there is one.
fn first(values: &[f32], wanted: impl Fn(f32) -> bool) -> Result<u32> {
    let token = values.iter().position(|&value| wanted(value));
    token.map(|token| token as u32).ok_or_else(|| Error::new(ErrorCode::Internal, "sampling left no token to choose"))
}

/// The k-th highest of `logits`, minus infinity where there are fewer; k ≥ 1.
///
/// One pass that mostly compares: `highest` gathers what may be among the k highest, and when it has grown to twice
/// its use the lower part is thrown out and the bar raised.
fn kth_highest(logits: &[f32], k: usize, highest: &mut Vec<f32>) -> f32 {
    if k >= logits.len() {
        return f32::NEG_INFINITY;
    }
    let descending = |a: &f32, b: &f32| b.total_cmp(a);
    let mut bar = f32::NEG_INFINITY;
    highest.clear();
    for &logit in logits {
        // Once there are k as high as the bar, only higher ones can change which is the k-th.
        if logit > bar {
            highest.push(logit);
            if highest.len() >= 2 * k + 64 {
                bar = *highest.select_nth_unstable_by(k - 1, descending).1;
                highest.truncate(k);
            }
        }
    }
    match highest.len() >= k {
        true => *highest.select_nth_unstable_by(k - 1, descending).1,
        false => f32::NEG_INFINITY,
    }
}

/// Leaves the most likely tokens that make up `p` of the weight, and sets the weights of the others to 0.
fn top_p(weights: &mut [f32], p: f32, candidates: &mut Vec<Candidate>) {
    let total = sum(weights);
    // Tokens this light go in any case: all of them together weigh less than what is to go. So only the others need
    // sorting, and they are few where the model is sure of itself. The best weighs 1 and stays.
    let least = (total * (1.0 - f64::from(p)) / weights.len() as f64).min(1.0) as f32;
    candidates.clear();
    for (token, weight) in (0..).zip(weights.iter_mut()) {
        let weight = std::mem::take(weight);
        if weight > 0.0 && weight >= least {
            candidates.push(Candidate { token, weight });
        }
    }
    candidates.sort_unstable_by(|a, b| b.weight.total_cmp(&a.weight).then(a.token.cmp(&b.token)));
    let goal = total * f64::from(p);
    let mut gathered = 0.0;
    for (rank, candidate) in candidates.iter().enumerate() {
        if rank > 0 && gathered >= goal {
            break;
        }
        gathered += f64::from(candidate.weight);
        weights[candidate.token as usize] = candidate.weight;
    }
}

/// The token at `uniform`, from 0 to 1, of the summed weights, the best of which is 1. Weights below `least` do not
/// count.
fn choose(weights: &mut [f32], least: f32, uniform: f64) -> Result<u32> {
    for weight in weights.iter_mut() {
        *weight = if *weight >= least { *weight } else { 0.0 };
    }
    let goal = uniform * sum(weights);
    // Whole blocks are summed as `sum` does it, and passed over.
    let mut gathered = 0.0;
    let mut last = None;
    for (block, weights) in weights.chunks(BLOCK).enumerate() {
        let more = sum(weights);
        if more > 0.0 {
            last = Some((block, weights, gathered));
        }
        if gathered + more > goal {
            break;
        }
        gathered += more;
    }
    // Rounding may leave the goal a hair above the sum: then it is in the last block that weighs anything.
    let (block, weights, mut gathered) = last.unwrap_or((0, weights, 0.0));
    let mut chosen = None;
    for (at, &weight) in weights.iter().enumerate() {
        if weight > 0.0 {
            chosen = Some(at);
            gathered += f64::from(weight);
            if gathered > goal {
                break;
            }
        }
    }
    match chosen {
        Some(at) => Ok((block * BLOCK + at) as u32),
        None => Err(Error::new(ErrorCode::Internal, "sampling left no token to choose")),
    }
}

/// Weights that [`choose`] passes over at a time.
const BLOCK: usize = 1024;

/// The sum, in lanes, so that it vectorizes.
fn sum(weights: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let chunks = weights.chunks_exact(8);
    let rest = chunks.remainder();
    for chunk in chunks {
        for lane in 0..8 {
            lanes[lane] += f64::from(chunk[lane]);
        }
    }
    lanes.into_iter().sum::<f64>() + rest.iter().map(|&weight| f64::from(weight)).sum::<f64>()
}

/// Random number `index` of the sequence of `seed`, from 0 up to, not including, 1.
fn uniform(seed: u64, index: u64) -> f64 {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_stream(index);
    (generator.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// `e^x` for x ≤ 0, to about two units in the last place; 0 below -87.
#[inline(always)]
fn exponential(x: f32) -> f32 {
    // e^x = 2^n · e^r with r = x - n·ln 2, |r| ≤ ln 2 / 2. ln 2 is subtracted in two parts, the first exact in few bits,
    // and e^r is a minimax polynomial (Cephes). Adding and subtracting 1.5·2^23 rounds to an integer.
    const ROUND: f32 = 12_582_912.0;
    // No branches, so that it vectorizes.
    let normal = f32::from(x >= -87.0);
    let x = if x >= -87.0 { x } else { -87.0 };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut polynomial = 1.987_569_1e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        polynomial = polynomial * r + coefficient;
    }
    let mantissa = polynomial * r * r + r + 1.0;
    // The integer n sits in the low bits of `shifted`; n ≥ -126, so the power is a normal number.
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    mantissa * power * normal
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn once(logits: &[f32], options: &SamplingOptions, history: &[u32], draw: u64) -> Result<u32> {
        sample(logits, options, history, draw, &mut Scratch::default())
    }

    fn warm() -> SamplingOptions {
        SamplingOptions { temperature: 1.0, ..Default::default() }
    }

    /// The definition, in f64 and with nothing clever: probabilities by token.
    fn reference(logits: &[f32], options: &SamplingOptions, history: &[u32]) -> Vec<f64> {
        let mut logits: Vec<f64> = logits.iter().map(|&logit| logit.into()).collect();
        for &(token, bias) in &options.logit_bias {
            logits[token as usize] += f64::from(bias);
        }
        let from = if options.penalty_window == 0 { 0 } else { history.len().saturating_sub(options.penalty_window) };
        for (token, logit) in logits.iter_mut().enumerate() {
            let count = history[from..].iter().filter(|&&id| id as usize == token).count();
            if count > 0 {
                let penalty = f64::from(options.repetition_penalty);
                *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
                *logit -= f64::from(options.frequency_penalty) * count as f64 + f64::from(options.presence_penalty);
            }
        }
        for logit in &mut logits {
            *logit /= f64::from(options.temperature);
        }
        let softmax = |logits: &[f64]| -> Vec<f64> {
            let best = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = logits.iter().map(|logit| (logit - best).exp()).collect();
            let total: f64 = weights.iter().sum();
            weights.iter().map(|weight| weight / total).collect()
        };
        let remove = |logits: &mut [f64], keep: &dyn Fn(usize) -> bool| {
            for (token, logit) in logits.iter_mut().enumerate() {
                if !keep(token) {
                    *logit = f64::NEG_INFINITY;
                }
            }
        };
        if options.top_k > 0 && options.top_k < logits.len() {
            let mut sorted = logits.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let floor = sorted[options.top_k - 1];
            let old = logits.clone();
            remove(&mut logits, &|token| old[token] >= floor);
        }
        if options.top_p < 1.0 {
            let p = softmax(&logits);
            let mut order: Vec<usize> = (0..p.len()).collect();
            order.sort_by(|&a, &b| p[b].total_cmp(&p[a]).then(a.cmp(&b)));
            let (mut keep, mut gathered) = (vec![false; p.len()], 0.0);
            for (rank, &token) in order.iter().enumerate() {
                keep[token] = rank == 0 || gathered < f64::from(options.top_p);
                gathered += p[token];
            }
            remove(&mut logits, &|token| keep[token]);
        }
        let p = softmax(&logits);
        let best = p.iter().copied().fold(0.0, f64::max);
        remove(&mut logits, &|token| p[token] >= f64::from(options.min_p) * best);
        softmax(&logits)
    }

    /// Draws often and compares the counts with `expected` by Pearson's chi-square.
    fn check_distribution(logits: &[f32], options: &SamplingOptions, history: &[u32]) {
        let expected = reference(logits, options, history);
        let draws = 20_000;
        let mut counts = vec![0u32; logits.len()];
        let mut scratch = Scratch::default();
        for draw in 0..draws {
            counts[sample(logits, options, history, draw, &mut scratch).unwrap() as usize] += 1;
        }
        let (mut statistic, mut freedom) = (0.0, -1.0);
        for (&count, &p) in counts.iter().zip(&expected) {
            if p == 0.0 {
                assert_eq!(count, 0, "{options:?}: a token was chosen that the filters remove");
                continue;
            }
            let mean = p * draws as f64;
            statistic += (f64::from(count) - mean).powi(2) / mean;
            freedom += 1.0;
        }
        // Mean and variance of chi-square are n and 2n; the seeds are fixed, so this passes always or never.
        let limit = freedom + 5.0 * (2.0 * freedom + 1.0f64).sqrt() + 5.0;
        assert!(statistic < limit, "{options:?}: chi-square {statistic} with {freedom} degrees of freedom");
    }

    /// Logits as models make them: a few likely tokens and a broad rest.
    fn random_logits(count: usize, seed: u64) -> Vec<f32> {
        let normal = |index: u64| (0..12).map(|part| uniform(seed, 12 * index + part)).sum::<f64>() - 6.0;
        (0..count as u64).map(|index| (2.0 * normal(index)) as f32).collect()
    }

    #[test]
    fn greedy_takes_the_highest_and_of_equals_the_first() {
        let greedy = SamplingOptions::default();
        assert_eq!(once(&[0.0, 3.0, -1.0, 3.0], &greedy, &[], 0).unwrap(), 1);
        assert_eq!(once(&[f32::NEG_INFINITY, -5.0], &greedy, &[], 0).unwrap(), 1);
        assert_eq!(once(&[1.0, f32::INFINITY, f32::INFINITY], &greedy, &[], 0).unwrap(), 1);
        let mut logits = random_logits(1003, 1);
        for at in [0, 15, 16, 500, 1002] {
            logits[at] = 100.0 + at as f32;
            assert_eq!(once(&logits, &greedy, &[], 0).unwrap(), at as u32);
        }
        let penalized = SamplingOptions { repetition_penalty: 2.0, ..greedy.clone() };
        assert_eq!(once(&[3.0, 2.0], &penalized, &[0], 0).unwrap(), 1);
        let biased = SamplingOptions { logit_bias: vec![(0, f32::NEG_INFINITY)], ..greedy };
        assert_eq!(once(&[f32::INFINITY, 2.0], &biased, &[], 0).unwrap(), 1);
    }

    #[test]
    fn what_cannot_be_sampled_is_an_error() {
        for options in [SamplingOptions::default(), warm()] {
            for logits in [&[1.0, f32::NAN][..], &[f32::NEG_INFINITY; 3], &[], &[f32::NAN; 40]] {
                assert!(once(logits, &options, &[], 0).is_err(), "{logits:?}");
            }
        }
        let penalized = SamplingOptions { presence_penalty: 1.0, ..warm() };
        assert!(once(&[1.0, 2.0], &penalized, &[2], 0).unwrap_err().message().contains("token 2"));
        let biased = SamplingOptions { logit_bias: vec![(7, 1.0)], ..warm() };
        assert!(once(&[1.0, 2.0], &biased, &[], 0).unwrap_err().message().contains("token 7"));
    }

    #[test]
    fn infinities() {
        let logits = [f32::NEG_INFINITY, f32::INFINITY, 0.0, f32::INFINITY];
        let mut seen = [0; 4];
        for draw in 0..100 {
            seen[once(&logits, &warm(), &[], draw).unwrap() as usize] += 1;
        }
        assert!(seen[0] == 0 && seen[2] == 0 && seen[1] > 20 && seen[3] > 20, "{seen:?}");
        let cold = SamplingOptions { temperature: f32::from_bits(1), ..warm() };
        assert_eq!(once(&[1.0, 2.0, 1.999], &cold, &[], 0).unwrap(), 1);
    }

    #[test]
    fn validation_names_the_field() {
        let valid = SamplingOptions { logit_bias: vec![(9, -1.0), (0, f32::NEG_INFINITY)], ..warm() };
        valid.validate(10).unwrap();
        type Spoil = fn(&mut SamplingOptions);
        let spoiled: [(&str, Spoil); 13] = [
            ("temperature", |o| o.temperature = -1.0),
            ("temperature", |o| o.temperature = f32::NAN),
            ("temperature", |o| o.temperature = f32::INFINITY),
            ("top_p", |o| o.top_p = 1.5),
            ("top_p", |o| o.top_p = f32::NAN),
            ("min_p", |o| o.min_p = -0.1),
            ("repetition_penalty", |o| o.repetition_penalty = 0.0),
            ("repetition_penalty", |o| o.repetition_penalty = f32::INFINITY),
            ("frequency_penalty", |o| o.frequency_penalty = f32::NAN),
            ("presence_penalty", |o| o.presence_penalty = f32::INFINITY),
            ("logit_bias", |o| o.logit_bias.push((10, 1.0))),
            ("logit_bias", |o| o.logit_bias.push((1, f32::NAN))),
            ("logit_bias", |o| o.logit_bias.push((1, f32::INFINITY))),
        ];
        for (name, spoil) in spoiled {
            let mut options = valid.clone();
            spoil(&mut options);
            let error = options.validate(10).unwrap_err();
            assert!(error.message().contains(name), "{error}");
        }
    }

    #[test]
    fn distribution_of_every_filter() {
        let logits = random_logits(60, 3);
        let history = [3, 5, 5, 9, 3, 3, 59];
        for options in [
            warm(),
            SamplingOptions { temperature: 0.5, ..warm() },
            SamplingOptions { temperature: 3.0, ..warm() },
            SamplingOptions { top_k: 5, ..warm() },
            SamplingOptions { top_k: 1000, ..warm() },
            SamplingOptions { top_p: 0.8, ..warm() },
            SamplingOptions { top_p: 0.0, ..warm() },
            SamplingOptions { min_p: 0.1, ..warm() },
            SamplingOptions { repetition_penalty: 1.7, ..warm() },
            SamplingOptions { frequency_penalty: 0.5, presence_penalty: -0.5, ..warm() },
            SamplingOptions { frequency_penalty: 1.0, penalty_window: 2, ..warm() },
            SamplingOptions { logit_bias: vec![(1, 4.0), (2, -3.0), (1, 1.0)], ..warm() },
            SamplingOptions {
                temperature: 1.3,
                top_k: 20,
                top_p: 0.9,
                min_p: 0.05,
                repetition_penalty: 1.2,
                frequency_penalty: 0.1,
                presence_penalty: 0.2,
                penalty_window: 5,
                seed: 7,
                logit_bias: vec![(8, 1.0)],
            },
        ] {
            check_distribution(&logits, &options, &history);
        }
    }

    #[test]
    fn top_k_keeps_ties() {
        let options = SamplingOptions { top_k: 2, ..warm() };
        check_distribution(&[1.0, 2.0, 1.0, 0.5, 1.0], &options, &[]);
        check_distribution(&[1.0; 300], &SamplingOptions { top_k: 3, ..warm() }, &[]);
    }

    #[test]
    fn a_draw_depends_on_seed_and_index_only() {
        let logits = random_logits(1000, 5);
        let choose = |seed: u64, draw: u64, scratch: &mut Scratch| {
            sample(&logits, &SamplingOptions { seed, ..warm() }, &[], draw, scratch).unwrap()
        };
        let mut scratch = Scratch::default();
        let forward: Vec<u32> = (0..50).map(|draw| choose(1, draw, &mut scratch)).collect();
        let mut backward: Vec<u32> = (0..50).rev().map(|draw| choose(1, draw, &mut Scratch::default())).collect();
        backward.reverse();
        assert_eq!(forward, backward);
        let other: Vec<u32> = (0..50).map(|draw| choose(2, draw, &mut scratch)).collect();
        assert_ne!(forward, other);
        // The generator is part of the contract: seeds in logs must go on meaning the same.
        assert_eq!((uniform(0, 0), uniform(0, 1), uniform(u64::MAX, u64::MAX)), GOLDEN);
    }

    const GOLDEN: (f64, f64, f64) = (0.7090754154265618, 0.755531016687046, 0.20686705120748516);

    #[test]
    fn log_probabilities_are_those_of_softmax() {
        let logits = random_logits(300, 11);
        let expected = reference(&logits, &warm(), &[]);
        for (token, p) in expected.iter().enumerate() {
            assert!((f64::from(log_probability(&logits, token as u32)) - p.ln()).abs() < 1e-5);
        }
        assert_eq!(log_probability(&[0.0, f32::NEG_INFINITY], 1), f32::NEG_INFINITY);
        assert!(log_probability(&[0.0, f32::NAN], 0).is_nan());
        assert!(log_probability(&[0.0], 1).is_nan());
        assert_eq!(log_probability(&[-3e38, 3e38], 1), 0.0);
    }

    #[test]
    fn the_exponential_is_one() {
        assert_eq!(exponential(0.0), 1.0);
        assert_eq!(exponential(-87.5), 0.0);
        assert_eq!(exponential(f32::NEG_INFINITY), 0.0);
        for step in 0..870_000 {
            let x = -(step as f32) * 1e-4;
            let (ours, exact) = (f64::from(exponential(x)), f64::from(x).exp());
            assert!((ours - exact).abs() <= 3e-7 * exact, "e^{x}: {ours}, not {exact}");
        }
    }

    #[test]
    fn takes_no_memory_after_the_first_call() {
        let logits = random_logits(5000, 9);
        let history: Vec<u32> = (0..300).collect();
        let options = SamplingOptions { top_k: 40, top_p: 0.9, presence_penalty: 0.1, ..warm() };
        let mut scratch = Scratch::default();
        sample(&logits, &options, &history, 0, &mut scratch).unwrap();
        let held = |scratch: &Scratch| {
            let Scratch { logits, counts, weights, candidates, highest } = scratch;
            (logits.capacity(), counts.capacity(), weights.capacity(), candidates.capacity(), highest.capacity())
        };
        let before = held(&scratch);
        for draw in 1..100 {
            sample(&logits, &options, &history, draw, &mut scratch).unwrap();
        }
        assert_eq!(held(&scratch), before);
        assert!(scratch.counts.iter().all(|&count| count == 0));
    }

    proptest! {
        #[test]
        fn kth_highest_is_that(
            logits in prop::collection::vec(prop::sample::select(vec![-1.0f32, 0.0, 0.5, 1.0, 2.0, f32::NEG_INFINITY]), 1..400),
            k in 1usize..60,
        ) {
            let mut sorted = logits.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let expected = sorted.get(k - 1).copied().unwrap_or(f32::NEG_INFINITY);
            let found = kth_highest(&logits, k, &mut Vec::new());
            // With no more than k logits nothing is to be removed, whatever the floor.
            prop_assert!(found == expected || (k >= logits.len() && found == f32::NEG_INFINITY));
        }

        #[test]
        fn choices_are_within_the_reference(
            logits in prop::collection::vec(-20.0f32..20.0, 1..200),
            temperature in 0.05f32..5.0,
            top_k in 0usize..50,
            top_p in 0.0f32..1.0,
            min_p in 0.0f32..1.0,
            draw in any::<u64>(),
        ) {
            let options = SamplingOptions { temperature, top_k, top_p, min_p, ..Default::default() };
            let token = once(&logits, &options, &[], draw).unwrap();
            // Filters compare floats: a token a hair outside the reference's bounds is none too few.
            let wider = SamplingOptions { top_p: (top_p + 1e-5).min(1.0), min_p: min_p * (1.0 - 1e-5), ..options };
            prop_assert!(reference(&logits, &wider, &[])[token as usize] > 0.0);
        }
    }
}
