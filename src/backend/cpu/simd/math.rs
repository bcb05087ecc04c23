//! Functions of a vector, the same on every level.

use super::Simd;

/// Below this `exp` is 0 (results would be subnormal), above [`EXP_MOST`] it is infinite.
const EXP_LEAST: f32 = -87.336_54;
const EXP_MOST: f32 = 88.376_26;

/// eˣ to about one unit in the last place. NaN stays NaN.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2 (Cody and Waite: the upper part of ln 2 has so few bits that n times it is exact),
/// then the polynomial of Cephes' `expf` for eʳ.
#[inline(always)]
pub(in crate::backend::cpu) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    let clamped = s.min(s.splat(EXP_MOST), s.max(s.splat(EXP_LEAST), x));
    let n = s.round(s.mul(clamped, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(n, s.splat(-0.693_359_4), clamped);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_1e-4);
    p = s.fma(p, r, s.splat(1.398_199_9e-3));
    p = s.fma(p, r, s.splat(8.333_452e-3));
    p = s.fma(p, r, s.splat(4.166_579_6e-2));
    p = s.fma(p, r, s.splat(1.666_666_5e-1));
    p = s.fma(p, r, s.splat(0.5));
    let y = s.add(s.fma(p, s.mul(r, r), r), s.splat(1.0));
    let y = s.scale2(y, n);
    let y = s.if_less(x, s.splat(EXP_LEAST), s.zero(), y);
    s.if_less(s.splat(EXP_MOST), x, s.splat(f32::INFINITY), y)
}

/// 1 / (1 + e⁻ˣ)
#[inline(always)]
pub(in crate::backend::cpu) fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let e = exp(s, s.sub(s.zero(), x));
    s.div(s.splat(1.0), s.add(s.splat(1.0), e))
}

/// 1 − erf(x) for x ≥ 0, to 2·10⁻⁷: formula 7.1.26 of Abramowitz and Stegun.
#[inline(always)]
pub(in crate::backend::cpu) fn erfc_positive<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    let t = s.div(one, s.fma(x, s.splat(0.327_591_1), one));
    let mut p = s.splat(1.061_405_4);
    p = s.fma(p, t, s.splat(-1.453_152));
    p = s.fma(p, t, s.splat(1.421_413_7));
    p = s.fma(p, t, s.splat(-0.284_496_74));
    p = s.fma(p, t, s.splat(0.254_829_6));
    let decay = exp(s, s.sub(s.zero(), s.mul(x, x)));
    s.mul(s.mul(p, t), decay)
}

#[cfg(test)]
mod tests {
    use super::super::{Kernel, LANES, Level, Proven};
    use super::*;

    struct Exp([f32; LANES]);

    impl Kernel for Exp {
        type Output = [f32; LANES];

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> [f32; LANES] {
            let mut out = [f32::NAN; LANES];
            s.store_slice(&mut out, exp(s, s.load_slice(&self.0)));
            out
        }
    }

    #[test]
    fn exp_is_right_to_two_units_in_the_last_place() {
        for level in Level::available().filter_map(Proven::new) {
            let mut worst: f64 = 0.0;
            for i in 0..200_000 {
                let x = [(i as f32 / 200_000.0).mul_add(175.6, -87.3); LANES];
                let got = level.run(Exp(x))[i % LANES];
                let want = f64::from(x[0]).exp();
                let unit = f64::from((want as f32).next_up()) - f64::from(want as f32);
                worst = worst.max((f64::from(got) - want).abs() / unit);
            }
            assert!(worst < 2.0, "{level:?}: {worst} units");
        }
    }

    #[test]
    fn exp_of_the_extremes() {
        for level in Level::available().filter_map(Proven::new) {
            let mut x = [0.0; LANES];
            x[..6].copy_from_slice(&[f32::NEG_INFINITY, -1e30, -100.0, 100.0, f32::INFINITY, f32::NAN]);
            let got = level.run(Exp(x));
            assert_eq!(got[..5], [0.0, 0.0, 0.0, f32::INFINITY, f32::INFINITY]);
            assert!(got[5].is_nan());
            assert_eq!(got[6], 1.0);
        }
    }
}
