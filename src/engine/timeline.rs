//! What a step measures of itself where the backend can: seconds of fetching, and when each operation began and ended.

use std::path::Path;

use serde_json::{Value, json};

use crate::backend::{Timed, Timing};
use crate::{Error, Result};

use super::Model;
use super::forward::Forward;

/// What is measured, and what was measured of the last decode step.
#[derive(Default)]
pub(super) struct Measured {
    timing: Timing,
    last: Vec<Timed>,
}

impl Model {
    /// What decode steps measure of themselves from now on. Measuring slows a step down a little: two events around each
    /// operation that is measured.
    ///
    /// Errors: `Unsupported` for anything but [`Timing::Off`] on the CPU.
    pub fn set_timing(&self, timing: Timing) -> Result<()> {
        self.forward(|forward| {
            forward.backend.set_timing(&forward.workspace.stream, timing)?;
            forward.workspace.measured = Measured { timing, last: Vec::new() };
            Ok(())
        })
    }

    /// What the last decode step has measured, in the order in which its operations were enqueued.
    pub fn timed(&self) -> Result<Vec<Timed>> {
        self.forward(|forward| Ok(forward.workspace.measured.last.clone()))
    }

    /// Writes what the last decode step has measured to a file, as Chrome's trace events (JSON; ui.perfetto.dev shows it,
    /// `tools/timeline.py` draws it). Times are microseconds, a thread is a stream, the category says which operations
    /// fetch.
    ///
    /// Errors: `InvalidArgument` where nothing was measured; `Io`.
    pub fn write_timeline(&self, path: &Path) -> Result<()> {
        let timed = self.timed()?;
        if timed.is_empty() {
            return Err(Error::invalid_argument(
                "no step has been measured: switch timing on, decode (three times for a step that is replayed), then write",
            ));
        }
        let text = trace(&self.backend().description(), &timed).to_string();
        std::fs::write(path, text).map_err(|error| Error::io(path, "write the timeline", &error))
    }
}

impl Forward<'_> {
    /// A step begins.
    pub(super) fn begin_measuring(&self) -> Result<()> {
        match self.workspace.measured.timing {
            Timing::Off => Ok(()),
            _ => self.backend.take_timed(&self.workspace.stream).map(drop),
        }
    }

    /// The step's results are here. Returns the seconds in which it fetched, as far as that is measured.
    pub(super) fn end_measuring(&mut self) -> Result<f64> {
        let measured = &mut self.workspace.measured;
        if measured.timing == Timing::Off {
            return Ok(0.0);
        }
        measured.last = self.backend.take_timed(&self.workspace.stream)?;
        Ok(Timed::fetching(&measured.last))
    }
}

/// Launches as Chrome's trace events.
fn trace(device: &str, timed: &[Timed]) -> Value {
    let start = timed.iter().map(|t| t.begin).fold(f64::INFINITY, f64::min);
    let microseconds = |seconds: f64| (seconds * 1e9).round() / 1e3;
    let streams = timed.iter().map(|t| t.stream).max().unwrap_or(0);
    let name = |what: &str, tid: usize, name: &str| json!({"name": what, "ph": "M", "pid": 0, "tid": tid, "args": {"name": name}});
    let thread = |stream: usize| match stream {
        0 => name("thread_name", 0, "main"),
        side => name("thread_name", side, &format!("side {side}")),
    };
    let events = timed.iter().map(|t| {
        json!({
            "name": t.name,
            "cat": if t.fetches { "fetch" } else { "compute" },
            "ph": "X",
            "pid": 0,
            "tid": t.stream,
            "ts": microseconds(t.begin - start),
            "dur": microseconds(t.end - t.begin),
        })
    });
    let all: Vec<Value> =
        [name("process_name", 0, device)].into_iter().chain((0..=streams).map(thread)).chain(events).collect();
    json!({"displayTimeUnit": "ns", "traceEvents": all})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_begins_with_its_first_operation() {
        let timed = [
            Timed { name: "norm", stream: 0, fetches: false, begin: 3e-6, end: 4.5e-6 },
            Timed { name: "slots_gather_16", stream: 1, fetches: true, begin: 4e-6, end: 9e-6 },
        ];
        let trace = trace("a device", &timed);
        let events = trace["traceEvents"].as_array().unwrap();
        let of = |phase: &str| events.iter().filter(|e| e["ph"] == phase).collect::<Vec<_>>();
        let names: Vec<_> = of("M").iter().map(|e| e["args"]["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["a device", "main", "side 1"]);
        let spans = of("X");
        assert_eq!(spans.len(), 2);
        assert_eq!(
            (&spans[0]["ts"], &spans[0]["dur"], &spans[0]["tid"], &spans[0]["cat"]),
            (&json!(0.0), &json!(1.5), &json!(0), &json!("compute"))
        );
        assert_eq!(
            (&spans[1]["ts"], &spans[1]["dur"], &spans[1]["tid"], &spans[1]["cat"]),
            (&json!(1.0), &json!(5.0), &json!(1), &json!("fetch"))
        );
    }
}
