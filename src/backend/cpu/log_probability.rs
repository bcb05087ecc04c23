//! Log-probabilities of given tokens.

use super::CpuBackend;
use super::simd::{Kernel, LANES, Simd, exp};
use super::view::{id, row, row_mut};
use crate::backend::{Rows, RowsMut};

/// Logits whose exponentials are summed in f32 before the sum moves on to f64.
const RUN: usize = 64 * LANES;

/// `out[i] = logits[i][targets[i]] − log Σ exp(logits[i])`.
pub(super) fn log_probability(cpu: &CpuBackend, logits: Rows<'_>, targets: Rows<'_>, out: RowsMut<'_>) {
    cpu.pool.split(logits.rows(), 1, &|rows| {
        for i in rows {
            let logits = row(&logits, i);
            let target = id(&targets, i);
            assert!(target < logits.len(), "target {target} of {} logits", logits.len());
            let (most, log_sum) = cpu.level.run(LogSumExp(logits));
            // SAFETY: row i belongs to this thread alone.
            let to = unsafe { row_mut(&out, i) };
            to[0] = ((f64::from(logits[target]) - f64::from(most)) - log_sum) as f32;
        }
    });
}

/// The largest x, and log Σ exp(x − largest).
struct LogSumExp<'a>(&'a [f32]);

impl Kernel for LogSumExp<'_> {
    type Output = (f32, f64);

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> (f32, f64) {
        let x = self.0;
        let mut most = s.splat(f32::NEG_INFINITY);
        for i in (0..x.len() / LANES * LANES).step_by(LANES) {
            most = s.max(most, s.load_slice(&x[i..]));
        }
        let tail = &x[x.len() / LANES * LANES..];
        let most = tail.iter().fold(s.largest(most), |a, &b| a.max(b));
        let mut total = 0.0;
        for run in x.chunks(RUN) {
            let mut sums = s.zero();
            for i in (0..run.len()).step_by(LANES) {
                let mut e = exp(s, s.sub(s.load_slice(&run[i..]), s.splat(most)));
                if run.len() - i < LANES {
                    let mut lanes = [0.0; LANES];
                    s.store_slice(&mut lanes[..run.len() - i], e);
                    e = s.load_slice(&lanes);
                }
                sums = s.add(sums, e);
            }
            total += f64::from(s.sum(sums));
        }
        (most, total.ln())
    }
}
