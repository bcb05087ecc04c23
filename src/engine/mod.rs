//! One model, many sessions: prefill, decode, sampling, generation, statistics.
//!
//! | part | what it promises |
//! |---|---|
//! | [`Model`] | weights, tokenizer, backend and KV pool of one checkpoint; shared by reference count, usable from many threads |
//! | [`Session`] | one sequence; every call is a transaction: it succeeds, or the session is as it was |
//! | `calibrate` | the run that speculation learns from, once a model |
//! | `forward` | the step loop: embed, blocks, head; knows the backend as a trait and the KV as a policy |
//! | [`sampling`] | logits to a token, without state |
//! | [`generate`] | sample, stream the text, stop |
//!
//! What may not enter: pointers from C (`ffi`), file formats (`model`), arithmetic (`backend`).

mod calibrate;
mod control;
mod device;
mod estimate;
mod fill;
mod forward;
pub mod generate;
mod model;
mod rehearse;
pub mod sampling;
mod session;
mod timeline;
mod workspace;

pub use control::Control;
pub use device::Device;
pub use estimate::Estimate;
pub use model::{LogLevel, LogSink, Logger, Model, ModelOptions};
pub use session::{Session, SessionOptions, Statistics, decode_batch};
