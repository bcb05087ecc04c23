//! The C boundary, and nothing else: pointers are checked, panics become errors, handles are made and freed.
//!
//! `include/kvahead.h` is generated from this room by cbindgen (`cbindgen.toml`), and the documentation comments here are
//! its documentation: they are written for people who program in C. Start with the guide at its top.
//!
//! | file | what |
//! |---|---|
//! | `boundary`, `options`, `user_data` | the infrastructure: one place each for pointers and panics, for `struct_size`, for callbacks |
//! | `version`, `error`, `model`, `text`, `detokenizer`, `policy`, `session`, `batch`, `timing`, `sampling`, `generate` | one file a handle, or a group of calls of one |
//!
//! How a function here looks: its whole body is a closure in [`boundary::guard`]; one `unsafe` block at its start turns
//! the arguments into checked Rust values; everything after that is safe, and the out-parameters are written last.
//! Signatures say who owns what: `Option<&T>` is borrowed, `Option<Box<T>>` is given away.
//!
//! What every `SAFETY` comment here leans on is the header's guide: a pointer is NULL or points to what its
//! documentation says, alive and not written to by another thread for the length of the call. Everything beyond that
//! (NULL, alignment, lengths, sizes, enum values, UTF-8) is checked.
//!
//! What may not enter: anything that a Rust caller of [`crate::engine`] would miss.

#![allow(non_camel_case_types, reason = "types carry their C names, as in the header")]
#![allow(clippy::missing_safety_doc, reason = "the header's guide is the safety contract of every function")]

mod boundary;
mod options;
mod user_data;

// The header lists functions in this order; the empty lines keep rustfmt from sorting it.
pub mod version;

pub mod error;

pub mod model;

pub mod text;

pub mod detokenizer;

pub mod policy;

pub mod session;

pub mod timing;

pub mod batch;

pub mod sampling;

pub mod generate;
