//! The constant inputs of operations: matrices, vectors, norms and rotations of a model, in backend memory.

use super::{Blocks, Buffer, DType, Rows};

/// A dense matrix, `outputs` × `inputs`, with an optional bias. Row-major as checkpoints store it, or in tiles of blocks.
#[derive(Debug)]
pub struct Linear {
    /// Rows of the matrix.
    pub outputs: usize,
    /// Columns of the matrix.
    pub inputs: usize,
    /// f32, f16 or bf16.
    pub dtype: DType,
    /// Whether `data` holds blocks, each element of which stands for its value rounded to `dtype`, which is bf16 then.
    /// Operations give the same bits as for the elements themselves.
    pub blocks: Option<Blocks>,
    /// The elements, or tiles.
    pub data: Buffer,
    /// `outputs` values, f32.
    pub bias: Option<Vector>,
}

impl Linear {
    /// Bytes that the matrix takes.
    pub fn bytes(&self) -> usize {
        match self.blocks {
            None => self.outputs * self.inputs * self.dtype.bytes(),
            Some(blocks) => blocks.bytes(self.outputs, self.inputs),
        }
    }

    /// The matrix as rows of elements.
    ///
    /// # Panics
    /// For a matrix of blocks, which has none.
    #[inline]
    pub fn rows(&self) -> Rows<'_> {
        assert!(self.blocks.is_none(), "blocks are not elements");
        self.data.rows(self.dtype, self.outputs, self.inputs)
    }
}

/// A constant vector of f32.
#[derive(Debug)]
pub struct Vector {
    /// Number of elements.
    pub len: usize,
    /// The elements, f32.
    pub data: Buffer,
}

impl Vector {
    /// The vector as one row.
    pub fn row(&self) -> Rows<'_> {
        self.data.rows(DType::F32, 1, self.len)
    }
}

/// A small dense matrix for each KV head, `outputs` × `inputs`, row-major, f32: a change of basis, or some columns of one.
#[derive(Debug)]
pub struct HeadMaps {
    /// Number of KV heads, each with a matrix of its own.
    pub kv_heads: usize,
    /// Columns: the head dimension.
    pub inputs: usize,
    /// Rows: the columns of the index.
    pub outputs: usize,
    /// The elements, head after head.
    pub data: Buffer,
}

impl HeadMaps {
    /// The matrix of one KV head as rows.
    pub fn map(&self, head: usize) -> Rows<'_> {
        let all = self.data.rows(DType::F32, self.kv_heads * self.outputs, self.inputs);
        all.row_range(head * self.outputs, self.outputs)
    }
}

/// What a normalisation subtracts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// x / rms(x) · w (Zhang and Sennrich 2019).
    Rms,
    /// (x − mean) / std · w + b (Ba et al. 2016).
    Layer,
}

/// A normalisation with its weights.
#[derive(Debug)]
pub struct Norm {
    /// Which one.
    pub kind: NormKind,
    /// Added to the mean square or variance.
    pub epsilon: f32,
    /// Scale, f32.
    pub weight: Vector,
    /// Shift, for [`NormKind::Layer`].
    pub bias: Option<Vector>,
}

/// The non-linearity of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// silu(gate) · up.
    SiluGated,
    /// gelu_tanh(gate) · up.
    GeluTanhGated,
    /// max(x, 0).
    Relu,
    /// x/2 · (1 + erf(x/√2)).
    Gelu,
    /// The tanh approximation of gelu.
    GeluTanh,
}

impl Activation {
    /// Whether the input holds gate and up halves side by side.
    pub fn gated(self) -> bool {
        matches!(self, Activation::SiluGated | Activation::GeluTanhGated)
    }
}

/// Rotary position embedding (Su et al. 2021): angle = position · frequency, computed in f32 as the reference
/// implementation does, cosines and sines multiplied by `factor`.
/// Dimension i rotates with i + dims/2, as in Hugging Face checkpoints.
#[derive(Clone, Debug)]
pub struct Rotation {
    /// One inverse frequency a pair, after the model's scaling rule.
    pub frequencies: Vec<f32>,
    /// Attention factor of YaRN and LongRoPE, 1 elsewhere.
    pub factor: f32,
}

impl Rotation {
    /// Dimensions of a head that rotate.
    pub fn dims(&self) -> usize {
        2 * self.frequencies.len()
    }
}
