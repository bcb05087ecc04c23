//! kvahead — *KV, ahead of time*.
//!
//! Runs LLM decode with the key/value cache of the running sequences wherever memory is cheap, behind a C ABI
//! ([`ffi`]). The rooms of the crate, and the only directions in which they may call each other:
//!
//! ```text
//! ffi ──► engine ──► policy ──► kv ──► backend
//!            │          │                 ▲
//!            ├────► speculate ───┬────────┤
//!            └────────► model ◄──┘────────┘
//! ```
//!
//! `docs/architecture.md` says what each room promises.

pub mod backend;
pub mod engine;
pub mod error;
pub mod ffi;
pub mod kv;
pub mod model;
pub mod policy;
pub mod speculate;

pub use error::{Error, ErrorCode, Result};
