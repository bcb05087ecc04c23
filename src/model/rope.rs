//! Rotary position embedding: which frequencies a model rotates with.
//!
//! The plain rule is one inverse frequency per pair of dimensions, θ^(−2i/d). Models that were stretched to longer
//! contexts change it, each in its own way. Every rule is computed in f32 where transformers computes it in f32 and in
//! f64 where Python does, so that the frequencies are the ones the reference implementation rotates with.

use std::f64::consts::PI;

use crate::backend::Rotation;
use crate::model::decoder::Rotary;
use crate::{Error, ErrorCode, Result};

/// Widest rotation that is believed: a hostile file must not make a long table of frequencies.
const MAX_DIMS: usize = 1 << 12;

/// A model's rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the wavelengths, θ.
    pub theta: f64,
    /// Dimensions of each head that rotate; the rest stays as it is.
    pub dims: usize,
    /// How the model was stretched.
    pub scaling: Scaling,
}

/// A rule that changes the plain frequencies.
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    /// Not stretched.
    None,
    /// Positions divided by a factor.
    Linear {
        /// How many times longer the context became.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided, short ones kept, a ramp between.
    Llama3 {
        /// What long wavelengths are divided by.
        factor: f64,
        /// Wavelengths above `original / low` are long.
        low: f64,
        /// Wavelengths below `original / high` are short.
        high: f64,
        /// Context length before.
        original: f64,
    },
    /// YaRN (Peng et al. 2023): the same idea by dimension, and attention sharpened.
    Yarn(Yarn),
    /// LongRoPE (Ding et al. 2024): a divisor for each frequency, one set for short and one for long sequences.
    LongRope {
        /// Divisors for sequences up to `original` tokens.
        short: Vec<f32>,
        /// Divisors for longer ones.
        long: Vec<f32>,
        /// Context length before.
        original: usize,
        /// Factor on cosines and sines.
        attention: f64,
    },
    /// A divisor for each frequency, the same for every sequence (`rope_freqs` of GGUF files).
    Divisors(Vec<f32>),
}

/// The parameters of YaRN.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// How many times longer the context became.
    pub factor: f64,
    /// Context length before.
    pub original: f64,
    /// Dimensions that turn more often than this in the original context are kept.
    pub beta_fast: f64,
    /// Dimensions that turn less often than this are divided by the factor.
    pub beta_slow: f64,
    /// Whether the borders of the ramp are rounded to whole dimensions.
    pub truncate: bool,
    /// Factor on cosines and sines.
    pub attention: f64,
}

impl Yarn {
    /// The factor on cosines and sines that the paper recommends: 0.1 ln(factor) + 1.
    pub fn recommended_attention(factor: f64, mscale: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
    }
}

/// LongRoPE's factor on cosines and sines for a context stretched from `original` by `factor`.
pub fn longrope_attention(factor: f64, original: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() }
}

impl Rope {
    /// Checks the numbers against each other and against the head dimension.
    pub(super) fn validate(&self, head_dim: usize) -> Result<()> {
        let wrong = |message: String| Err(Error::new(ErrorCode::InvalidFormat, message));
        let number = |name: &str, value: f64, least: f64| {
            let message = format!("rope {name} is {value}; expected a finite number above {least}");
            if value.is_finite() && value > least { Ok(()) } else { Err(Error::new(ErrorCode::InvalidFormat, message)) }
        };
        if self.dims == 0 || self.dims > head_dim.min(MAX_DIMS) || !self.dims.is_multiple_of(2) || head_dim % 2 == 1 {
            return wrong(format!("{} of {head_dim} head dimensions rotate; expected even numbers", self.dims));
        }
        number("theta", self.theta, 1.0)?;
        let divisors = |name: &str, divisors: &[f32]| {
            if divisors.len() != self.dims / 2 {
                return wrong(format!("rope {name} has {} values; expected {}", divisors.len(), self.dims / 2));
            }
            divisors.iter().try_for_each(|&value| number(name, value.into(), 0.0))
        };
        match &self.scaling {
            Scaling::None => Ok(()),
            Scaling::Linear { factor } => number("factor", *factor, 0.0),
            Scaling::Llama3 { factor, low, high, original } => {
                number("factor", *factor, 0.0)?;
                number("low_freq_factor", *low, 0.0)?;
                number("high_freq_factor", *high, *low)?;
                number("original context length", *original, 0.0)
            }
            Scaling::Yarn(yarn) => {
                number("factor", yarn.factor, 0.0)?;
                number("original context length", yarn.original, 0.0)?;
                number("beta_slow", yarn.beta_slow, 0.0)?;
                number("beta_fast", yarn.beta_fast, 0.0)?;
                number("attention factor", yarn.attention, 0.0)
            }
            Scaling::LongRope { short, long, original, attention } => {
                divisors("short factors", short)?;
                divisors("long factors", long)?;
                number("original context length", *original as f64, 1.0)?;
                number("attention factor", *attention, 0.0)
            }
            Scaling::Divisors(values) => divisors("frequency factors", values),
        }
    }

    /// What the engine rotates with.
    pub fn rotary(&self) -> Rotary {
        let single = |frequencies: Vec<f32>, factor: f64| Rotary {
            short: Rotation { frequencies, factor: factor as f32 },
            long: None,
        };
        match &self.scaling {
            Scaling::None => single(self.plain(), 1.0),
            Scaling::Linear { factor } => {
                single(self.plain().into_iter().map(|frequency| frequency / *factor as f32).collect(), 1.0)
            }
            Scaling::Llama3 { factor, low, high, original } => {
                let stretch = |frequency| llama3(frequency, *factor, *low, *high, *original);
                single(self.plain().into_iter().map(stretch).collect(), 1.0)
            }
            Scaling::Yarn(yarn) => single(self.yarn(yarn), yarn.attention),
            Scaling::LongRope { short, long, original, attention } => {
                let rotation = |divisors| Rotation { frequencies: self.divided(divisors), factor: *attention as f32 };
                Rotary { short: rotation(short), long: Some((*original, rotation(long))) }
            }
            Scaling::Divisors(divisors) => single(self.divided(divisors), 1.0),
        }
    }

    /// θ^(2i/d), the reciprocals of the plain frequencies.
    fn periods(&self) -> impl Iterator<Item = f32> + '_ {
        (0..self.dims).step_by(2).map(|i| (self.theta as f32).powf(i as f32 / self.dims as f32))
    }

    fn plain(&self) -> Vec<f32> {
        self.periods().map(|period| 1.0 / period).collect()
    }

    fn divided(&self, divisors: &[f32]) -> Vec<f32> {
        self.periods().zip(divisors).map(|(period, divisor)| 1.0 / (divisor * period)).collect()
    }

    fn yarn(&self, yarn: &Yarn) -> Vec<f32> {
        // The dimension that turns `rotations` times in the original context.
        let dims = self.dims as f64;
        let dimension = |rotations: f64| dims * (yarn.original / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
        let (mut low, mut high) = (dimension(yarn.beta_fast), dimension(yarn.beta_slow));
        if yarn.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dims - 1.0));
        if low == high {
            high += 0.001;
        }
        let ramp = |i: usize| ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
        self.periods()
            .enumerate()
            .map(|(i, period)| {
                let (extrapolated, interpolated) = (1.0 / period, 1.0 / (yarn.factor as f32 * period));
                let keep = 1.0 - ramp(i);
                interpolated * (1.0 - keep) + extrapolated * keep
            })
            .collect()
    }
}

/// Llama 3.1's rule for one frequency, in the order of operations of transformers: scalars in f64, the rest in f32,
/// and a scalar divided by a tensor is the tensor's reciprocal times the scalar.
fn llama3(frequency: f32, factor: f64, low: f64, high: f64, original: f64) -> f32 {
    let wavelength = 1.0 / frequency * (2.0 * PI) as f32;
    if wavelength > (original / low) as f32 {
        frequency / factor as f32
    } else if wavelength < (original / high) as f32 {
        frequency
    } else {
        let smooth = (1.0 / wavelength * original as f32 - low as f32) / (high - low) as f32;
        (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
    }
}
