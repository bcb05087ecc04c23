//! When a device's operations begin and end: for measuring, never for deciding anything.

/// What is measured of what runs on a stream and on those beside it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Timing {
    /// Nothing, which costs nothing.
    #[default]
    Off,
    /// What fetches entries over the link from host memory.
    Fetches,
    /// Everything.
    Operations,
}

/// One launch, as it was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timed {
    /// The kernel.
    pub name: &'static str,
    /// The stream: 0, or 1 and so on for those beside it.
    pub stream: usize,
    /// Whether it reads host memory over the link.
    pub fetches: bool,
    /// Seconds from a point that all launches of a step share.
    pub begin: f64,
    /// The same.
    pub end: f64,
}

impl Timed {
    /// Seconds in which at least one of the fetches among `launches` was under way.
    pub fn fetching(launches: &[Timed]) -> f64 {
        let mut spans: Vec<(f64, f64)> = launches.iter().filter(|t| t.fetches).map(|t| (t.begin, t.end)).collect();
        spans.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (mut sum, mut until) = (0.0, f64::NEG_INFINITY);
        for (begin, end) in spans {
            sum += (end - begin.max(until)).max(0.0);
            until = until.max(end);
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fetches_that_overlap_are_counted_once() {
        let timed = |begin: f64, end, fetches| Timed { name: "a", stream: 1, fetches, begin, end };
        let launches = [
            timed(4.0, 6.0, true),
            timed(0.0, 2.0, true),
            timed(1.0, 1.5, true),
            timed(0.0, 99.0, false),
            timed(5.5, 7.0, true),
        ];
        assert_eq!(Timed::fetching(&launches), 5.0);
        assert_eq!(Timed::fetching(&[]), 0.0);
    }
}
