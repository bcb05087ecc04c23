//! Policies: against each other through the engine, against naive ones layer by layer, and one that is not the library's.

mod around;
mod basis;
#[path = "../common/mod.rs"]
mod common;
mod correct;
mod device;
mod engine;
mod estimate;
mod evict;
mod example;
mod failing;
mod oracle;
mod replay;
mod reuse;
