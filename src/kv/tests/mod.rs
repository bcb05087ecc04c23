//! The bookkeeping of this room against naive models, under random operations.

mod hot;
mod undo;
