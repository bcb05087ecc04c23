//! What a checkpoint is: configuration, weights, tokenizer and chat template, from a Hugging Face folder or a GGUF file.
//!
//! - [`checkpoint`] opens either form and offers tensors under Hugging Face names; nothing is believed before it is
//!   checked against the file's size and the configuration.
//! - [`architecture`] turns a checkpoint into a [`decoder::Decoder`], one file a family; [`load`] drives it.
//! - [`tokenizer`] turns text into token ids and back, also one token at a time; [`chat`] renders a conversation
//!   through the checkpoint's own template.
//! - What may not enter: sessions, steps, policies. This room is read by the engine and knows the backend only as the
//!   place where weights go.

pub mod architecture;
pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod decoder;
pub mod load;
pub mod rope;
pub mod tokenizer;
pub mod weights;

#[cfg(test)]
mod tests;
