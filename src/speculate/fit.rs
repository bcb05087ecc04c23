//! From what a calibration run has captured to the products, one layer at a time.

use crate::backend::{Backend, DType, HeadMaps, Linear, Place, Rotation, Stream, Vector};
use crate::model::checkpoint::quant;
use crate::model::decoder::Attention;
use crate::{Error, ErrorCode, Result};

use super::speculation::{IndexMaps, LayerSpeculation};
use super::{basis, moments, ridge};

/// The attention's shape.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Width of the attention's input, D.
    pub hidden: usize,
    /// Query heads, H.
    pub heads: usize,
    /// KV heads, G.
    pub kv_heads: usize,
    /// Head dimension, d.
    pub head_dim: usize,
}

/// What a run has captured of one layer, the same n rows in each; sink rows are not among them.
#[derive(Clone, Copy, Debug)]
pub struct Captured<'a> {
    /// The attention's input of the layer before, n × D.
    pub previous: &'a [f32],
    /// Queries as projected, biased, before any norm or rotation: n × H·d.
    pub projected: &'a [f32],
    /// Queries after the norm, if there is one, and before rotation: n × H·d.
    pub queries: &'a [f32],
    /// Keys, likewise: n × G·d.
    pub keys: &'a [f32],
    /// Position of each row.
    pub positions: &'a [usize],
}

/// Makes products.
pub struct Fitter<'a> {
    /// Where they go.
    pub backend: &'a dyn Backend,
    /// Shape of every layer's attention.
    pub layout: Layout,
    /// The rotation of the calibration run, and the one of the longest context; `None` where positions are learned.
    pub rotations: Option<(&'a Rotation, &'a Rotation)>,
    /// Positions that queries and keys will be rotated to.
    pub context_length: usize,
    /// Threads for matrix products.
    pub threads: usize,
}

impl Fitter<'_> {
    /// The products of a layer whose attention is given.
    pub fn layer(&self, stream: &Stream, attention: &Attention, captured: &Captured<'_>) -> Result<LayerSpeculation> {
        let (skew, balanced) = self.bases(stream, captured)?;
        Ok(LayerSpeculation::new(self.fitted(stream, attention, captured)?, skew, balanced))
    }

    fn fitted(&self, stream: &Stream, attention: &Attention, captured: &Captured<'_>) -> Result<Linear> {
        let Layout { hidden, heads, head_dim, .. } = self.layout;
        let (width, dtype) = (heads * head_dim, attention.qkv.dtype);
        let weight = download_weight(self.backend, stream, &attention.qkv, width)?;
        let bias = match &attention.qkv.bias {
            Some(bias) => Some(download(self.backend, stream, bias.row().col_range(0, width))?),
            None => None,
        };
        let unbiased = bias.as_ref().map(|bias| {
            captured.projected.chunks_exact(width).flat_map(|row| row.iter().zip(bias).map(|(q, b)| q - b)).collect()
        });
        let targets: &Vec<f32> = match &unbiased {
            Some(targets) => targets,
            None => &captured.projected.to_vec(),
        };
        let fitted = ridge::fit(captured.previous, hidden, targets, &weight, self.threads)?;
        let data = upload(self.backend, stream, &fitted, dtype, "fitted query weight")?;
        let bias = match bias {
            Some(bias) => Some(Vector {
                len: width,
                data: upload(self.backend, stream, &bias, DType::F32, "bias of a fitted query weight")?,
            }),
            None => None,
        };
        Ok(Linear { outputs: width, inputs: hidden, dtype, blocks: None, data, bias })
    }

    fn bases(&self, stream: &Stream, captured: &Captured<'_>) -> Result<(HeadMaps, IndexMaps)> {
        let Layout { heads, kv_heads, head_dim: d, .. } = self.layout;
        let group = heads / kv_heads;
        let (mut skew, mut query, mut key) = (Vec::new(), Vec::new(), Vec::new());
        for head in 0..kv_heads {
            let of_group = || (head * group..(head + 1) * group).map(|h| h * d..(h + 1) * d);
            let queries = moments::second_moment(captured.queries, heads * d, of_group(), |_, _| ());
            let of_head = std::iter::once(head * d..(head + 1) * d);
            let keys = moments::second_moment(captured.keys, kv_heads * d, of_head, |_, _| ());
            let (in_place, queries, keys) = match self.rotations {
                Some((own, longest)) => {
                    let rotate = |row: usize, q: &mut [f64]| moments::rotate(own, captured.positions[row], q);
                    (
                        moments::second_moment(captured.queries, heads * d, of_group(), rotate),
                        moments::spread(&queries, longest, self.context_length),
                        moments::spread(&keys, longest, self.context_length),
                    )
                }
                None => (queries.clone(), queries, keys),
            };
            skew.extend(basis::skew(&in_place)?);
            let (query_map, key_map) = basis::balanced(&queries, &keys)?;
            query.extend(query_map);
            key.extend(key_map);
        }
        let maps = |values: &[f32]| -> Result<HeadMaps> {
            let data = upload(self.backend, stream, values, DType::F32, "speculation basis")?;
            Ok(HeadMaps { kv_heads, inputs: d, outputs: d, data })
        };
        Ok((maps(&skew)?, IndexMaps { query: maps(&query)?, key: maps(&key)? }))
    }
}

/// The elements of a matrix as f32.
pub(super) fn download(backend: &dyn Backend, stream: &Stream, rows: crate::backend::Rows<'_>) -> Result<Vec<f32>> {
    let mut bytes = vec![0; rows.rows() * rows.cols() * rows.dtype().bytes()];
    backend.download(stream, rows, &mut bytes)?;
    Ok(widen(&bytes, rows.dtype()))
}

/// The first `rows` rows of a weight, widened to f32.
pub(super) fn download_weight(
    backend: &dyn Backend,
    stream: &Stream,
    weight: &Linear,
    rows: usize,
) -> Result<Vec<f32>> {
    let mut bytes = vec![0; rows * weight.inputs * weight.dtype.bytes()];
    backend.download_weight(stream, weight, 0..rows, &mut bytes)?;
    Ok(widen(&bytes, weight.dtype))
}

fn widen(bytes: &[u8], dtype: DType) -> Vec<f32> {
    let encoding = match dtype {
        DType::F32 => quant::Encoding::F32,
        DType::F16 => quant::Encoding::F16,
        DType::BF16 => quant::Encoding::BF16,
        DType::U32 => unreachable!("weights are floats"),
    };
    let mut values = vec![0.0; bytes.len() / dtype.bytes()];
    encoding.decode(bytes, &mut values);
    values
}

/// Values in memory of a backend, rounded to `dtype`.
pub(super) fn upload(
    backend: &dyn Backend,
    stream: &Stream,
    values: &[f32],
    dtype: DType,
    purpose: &str,
) -> Result<crate::backend::Buffer> {
    let mut bytes = vec![0; values.len() * dtype.bytes()];
    if !quant::round(values, dtype, &mut bytes) {
        return Err(not_finite());
    }
    let mut data = backend.allocate(bytes.len(), Place::Device, purpose)?;
    backend.upload(stream, &bytes, &mut data, 0)?;
    Ok(data)
}

/// The error for a model that does not survive its own calibration.
pub(super) fn not_finite() -> Error {
    Error::new(
        ErrorCode::Unsupported,
        "calibration: the model's queries, keys or hidden states on the calibration text are not finite",
    )
}
