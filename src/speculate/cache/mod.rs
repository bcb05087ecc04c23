//! The products on disk, so that a model is calibrated once.
//!
//! | part | what it promises |
//! |---|---|
//! | [`Key`] | names what the products were made from; another model, text or library version has another key |
//! | [`Format`] | the bytes of a file: whatever they are, reading gives the products of this key or an error |
//! | [`Folders`] | where files lie; written whole or not at all |
//!
//! A file is never parsed: everything in it but the numbers follows from the model, so its header is *compared* with the
//! one that the model asks for, and its size with the one that follows from it. Nothing is allocated by what it says.

mod folder;
mod format;
mod key;

pub use folder::Folders;
pub use format::Format;
pub use key::Key;
