//! The offline products of speculation: what is learnt about a model once, on one short text, and used ever after. (And the
//! skew that a prompt gives, which is learnt anew by every session that asks for it: [`PromptBasis`].)
//!
//! | product | what it is | source |
//! |---|---|---|
//! | fitted query weight | the next layer's query weight, corrected so that it fits this layer's input | ALGORITHM.md §7.2 |
//! | balanced basis | maps of queries and keys whose leading rows carry most of q·k, at any distance | §7.1 |
//! | skew | the orthogonal basis of the paper: singular vectors of the queries | §2 |
//!
//! - [`fit`] turns what a calibration run has captured of a layer into its products; [`ridge`], [`moments`] and [`basis`]
//!   are the arithmetic, on matrices of the host.
//! - [`fold()`] puts the skew into the weights of a model that does not rotate.
//! - [`cache`] keeps the products on disk.
//! - [`Speculation`] holds them in memory of a backend, the way sessions use them.
//! - What may not enter: sessions, steps, who runs the model (that is `engine`), and what is selected (`policy`).

mod basis;
pub mod cache;
mod fit;
mod fold;
pub(crate) mod moments;
mod prompt;
mod ridge;
mod speculation;

#[cfg(test)]
mod tests;

pub use fit::{Captured, Fitter, Layout};
pub use fold::fold;
pub(crate) use prompt::PromptBasis;
pub use speculation::{IndexMaps, LayerSpeculation, Speculation};

/// The text that models are calibrated on unless the caller gives one: the beginning of Jane Austen's *Mansfield Park*
/// (1814, public domain), from the Debian package r-cran-janeaustenr 1.0.0-1.
pub const CALIBRATION_TEXT: &str = include_str!("calibration.txt");
