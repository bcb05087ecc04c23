//! Skewing the model itself, where no rotation stands between the weights and the scores (paper §4.2; OPT).

use crate::backend::{Backend, HeadMaps, Linear, Stream, Vector};
use crate::model::decoder::{Decoder, Positions};
use crate::{Error, Result};

use super::fit::{download, download_weight, upload};
use super::{Layout, Speculation};

/// Puts each layer's skew into its weights and biases: Wq ← AᵀWq, bq ← Aᵀbq, and likewise for keys. Scores stay as they
/// are, because AAᵀ = 1 (but for rounding to the weights' type); queries and keys come out skewed, so that an index of
/// partial keys is a slice of the key cache. Layer 0, which is not speculated, stays as it is.
///
/// Errors: `Unsupported` for a model that rotates queries and keys, or normalises them by head: neither commutes with A.
pub fn fold(backend: &dyn Backend, decoder: &mut Decoder, layout: Layout, speculation: &Speculation) -> Result<()> {
    let normed =
        decoder.blocks.iter().any(|block| block.attention.query_norm.is_some() || block.attention.key_norm.is_some());
    if normed || matches!(decoder.positions, Positions::Rotary(_)) {
        return Err(Error::unsupported(
            "skewing cannot be folded into this model: its queries and keys are rotated or normalised after projection",
        ));
    }
    let stream = backend.stream()?;
    for (block, products) in decoder.blocks.iter_mut().zip(speculation.layers()) {
        if let Some(products) = products {
            let qkv = &mut block.attention.qkv;
            *qkv = skewed(backend, &stream, qkv, layout, products.skew())?;
        }
    }
    backend.synchronize(&stream)
}

fn skewed(backend: &dyn Backend, stream: &Stream, qkv: &Linear, layout: Layout, skew: &HeadMaps) -> Result<Linear> {
    let mut weight = download_weight(backend, stream, qkv, qkv.outputs)?;
    turn(backend, stream, &mut weight, qkv.inputs, layout, skew)?;
    let data = upload(backend, stream, &weight, qkv.dtype, "skewed query, key and value weights")?;
    let bias = match &qkv.bias {
        Some(bias) => {
            let mut values = download(backend, stream, bias.row())?;
            turn(backend, stream, &mut values, 1, layout, skew)?;
            let data = upload(backend, stream, &values, bias.row().dtype(), "skewed biases")?;
            Some(Vector { len: bias.len, data })
        }
        None => None,
    };
    Ok(Linear { outputs: qkv.outputs, inputs: qkv.inputs, dtype: qkv.dtype, blocks: None, data, bias })
}

/// Multiplies the d rows (of `columns` values) of every query and key head by its KV head's map.
fn turn(
    backend: &dyn Backend,
    stream: &Stream,
    rows: &mut [f32],
    columns: usize,
    layout: Layout,
    skew: &HeadMaps,
) -> Result<()> {
    let Layout { heads, kv_heads, head_dim: d, .. } = layout;
    for head in 0..heads + kv_heads {
        let kv_head = if head < heads { head * kv_heads / heads } else { head - heads };
        let map = download(backend, stream, skew.map(kv_head))?;
        let own = &mut rows[head * d * columns..(head + 1) * d * columns];
        let mut turned = vec![0.0f64; own.len()];
        for (out, map) in turned.chunks_exact_mut(columns).zip(map.chunks_exact(d)) {
            for (row, &factor) in own.chunks_exact(columns).zip(map) {
                out.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(factor) * f64::from(x));
            }
        }
        own.iter_mut().zip(&turned).for_each(|(x, &value)| *x = value as f32);
    }
    Ok(())
}
