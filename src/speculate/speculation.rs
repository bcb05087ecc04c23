//! The products of all layers in memory of a backend, the way sessions use them.

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::Result;
use crate::backend::{Backend, Buffer, DType, HeadMaps, Linear, Place, Stream, Vector};
use crate::model::decoder::{Attention, Block};

use super::Layout;

/// Maps of queries and keys to the columns of an index: (map_q · q)·(map_k · k) approximates q·k.
#[derive(Debug)]
pub struct IndexMaps {
    /// For queries, one map a KV head, shared by its group.
    pub query: HeadMaps,
    /// For keys.
    pub key: HeadMaps,
}

/// The products of one layer.
#[derive(Debug)]
pub struct LayerSpeculation {
    fitted: Linear,
    skew: HeadMaps,
    balanced: IndexMaps,
    /// Made when it is first asked for.
    own: OnceLock<Linear>,
}

impl LayerSpeculation {
    /// Takes products that fit together: maps are d × d, one a KV head.
    pub(super) fn new(fitted: Linear, skew: HeadMaps, balanced: IndexMaps) -> LayerSpeculation {
        LayerSpeculation { fitted, skew, balanced, own: OnceLock::new() }
    }

    /// The fitted query weight, heads·d × hidden, biased: queries of this layer, before norm and rotation, from the
    /// attention input of the layer before.
    pub fn fitted(&self) -> &Linear {
        &self.fitted
    }

    /// Aᵀ of the paper's skew, d × d and orthogonal, for rotated queries and keys alike; the direction in which queries
    /// are largest comes first.
    pub fn skew(&self) -> &HeadMaps {
        &self.skew
    }

    /// The balanced basis, whole: d × d, for rotated queries and keys.
    pub fn balanced(&self) -> &IndexMaps {
        &self.balanced
    }
}

/// The balanced maps of one width, by layer.
type Cut = Arc<Vec<Option<IndexMaps>>>;

/// The offline products of a model, in memory of its backend. Shared by all sessions.
pub struct Speculation {
    backend: Arc<dyn Backend>,
    layers: Vec<Option<LayerSpeculation>>,
    /// Leading rows of the balanced maps, by their number.
    cuts: Mutex<Vec<(usize, Cut)>>,
    /// Made when it is first asked for.
    identity: OnceLock<Arc<HeadMaps>>,
}

impl Speculation {
    /// The products of every layer; layer 0 has none, because nothing comes before it.
    pub fn new(backend: Arc<dyn Backend>, layers: Vec<Option<LayerSpeculation>>) -> Speculation {
        Speculation { backend, layers, cuts: Mutex::default(), identity: OnceLock::new() }
    }

    /// Products of a model whose weights are random, from which there is nothing to learn: each layer's own query weight
    /// predicts, and bases are the heads' own columns. For measuring speed.
    pub fn plain(backend: Arc<dyn Backend>, blocks: &[Block], layout: Layout) -> Result<Speculation> {
        let (kv_heads, d) = (layout.kv_heads, layout.head_dim);
        let stream = backend.stream()?;
        let maps = || identity(&*backend, &stream, kv_heads, d);
        let of = |block: &Block| -> Result<LayerSpeculation> {
            let fitted = query_part(&*backend, &block.attention, layout.heads * d)?;
            Ok(LayerSpeculation::new(fitted, maps()?, IndexMaps { query: maps()?, key: maps()? }))
        };
        let layers = (0..blocks.len()).map(|i| if i == 0 { Ok(None) } else { of(&blocks[i]).map(Some) });
        let layers = layers.collect::<Result<_>>()?;
        backend.synchronize(&stream)?;
        Ok(Speculation::new(backend, layers))
    }

    /// Products by layer.
    pub fn layers(&self) -> &[Option<LayerSpeculation>] {
        &self.layers
    }

    /// The products of `layer`.
    ///
    /// # Panics
    /// For layer 0, and past the last.
    pub fn layer(&self, layer: usize) -> &LayerSpeculation {
        self.layers[layer].as_ref().expect("layer 0 is not speculated")
    }

    /// See [`LayerSpeculation::fitted`].
    pub fn fitted(&self, layer: usize) -> &Linear {
        self.layer(layer).fitted()
    }

    /// See [`LayerSpeculation::skew`].
    pub fn skew(&self, layer: usize) -> &HeadMaps {
        self.layer(layer).skew()
    }

    /// The query part of `attention.qkv`, which is the attention of `layer`, as a weight of its own: the paper's
    /// predictor. A copy, made when it is first asked for.
    pub fn own(&self, layer: usize, attention: &Attention) -> Result<&Linear> {
        let products = self.layer(layer);
        if let Some(own) = products.own.get() {
            return Ok(own);
        }
        let copy = query_part(&*self.backend, attention, products.fitted.outputs)?;
        // Another thread may have been faster; both copies are the same.
        Ok(products.own.get_or_init(|| copy))
    }

    /// The copy that [`Speculation::own`] has made of a layer's query weight.
    pub fn own_copy(&self, layer: usize) -> Option<&Linear> {
        self.layer(layer).own.get()
    }

    /// The first `columns` rows of every layer's balanced maps: the best index of that width. Made once per width.
    ///
    /// # Panics
    /// When `columns` is 0 or more than the head dimension.
    pub fn balanced(&self, columns: usize) -> Result<Cut> {
        let mut cuts = self.cuts.lock();
        if let Some((_, cut)) = cuts.iter().find(|(width, _)| *width == columns) {
            return Ok(cut.clone());
        }
        let stream = self.backend.stream()?;
        let cut = |layer: &Option<LayerSpeculation>| {
            let Some(products) = layer else { return Ok(None) };
            let lead = |maps| leading_rows(&*self.backend, &stream, maps, columns);
            Ok(Some(IndexMaps { query: lead(&products.balanced.query)?, key: lead(&products.balanced.key)? }))
        };
        let cut: Cut = Arc::new(self.layers.iter().map(cut).collect::<Result<_>>()?);
        cuts.push((columns, cut.clone()));
        Ok(cut)
    }

    /// The heads' own columns, as a basis like the others. Made once.
    pub fn identity(&self, kv_heads: usize, head_dim: usize) -> Result<Arc<HeadMaps>> {
        if let Some(maps) = self.identity.get() {
            return Ok(maps.clone());
        }
        let stream = self.backend.stream()?;
        let maps = identity(&*self.backend, &stream, kv_heads, head_dim)?;
        self.backend.synchronize(&stream)?;
        // Another thread may have been faster; both are the same.
        Ok(self.identity.get_or_init(|| Arc::new(maps)).clone())
    }

    /// Bytes held in backend memory, copies that were asked for not counted.
    pub fn bytes(&self) -> usize {
        let maps = |maps: &HeadMaps| maps.data.bytes();
        let of = |layer: &LayerSpeculation| {
            let bias = layer.fitted.bias.as_ref().map_or(0, |bias| bias.data.bytes());
            let balanced = maps(&layer.balanced.query) + maps(&layer.balanced.key);
            layer.fitted.data.bytes() + bias + maps(&layer.skew) + balanced
        };
        self.layers.iter().flatten().map(of).sum()
    }
}

/// A map for each KV head that changes nothing.
fn identity(backend: &dyn Backend, stream: &Stream, kv_heads: usize, d: usize) -> Result<HeadMaps> {
    let bytes: Vec<u8> = (0..kv_heads * d * d).flat_map(|i| f32::from(i / d % d == i % d).to_ne_bytes()).collect();
    let mut data = backend.allocate(bytes.len(), Place::Device, "speculation basis")?;
    backend.upload(stream, &bytes, &mut data, 0)?;
    Ok(HeadMaps { kv_heads, inputs: d, outputs: d, data })
}

/// The first `columns` rows of each head's map.
fn leading_rows(backend: &dyn Backend, stream: &Stream, maps: &HeadMaps, columns: usize) -> Result<HeadMaps> {
    assert!((1..=maps.outputs).contains(&columns), "{columns} columns of {}", maps.outputs);
    let head_bytes = columns * maps.inputs * DType::F32.bytes();
    let mut bytes = vec![0; head_bytes];
    let mut data = backend.allocate(maps.kv_heads * head_bytes, Place::Device, "speculation basis")?;
    for head in 0..maps.kv_heads {
        backend.download(stream, maps.map(head).row_range(0, columns), &mut bytes)?;
        backend.upload(stream, &bytes, &mut data, head * head_bytes)?;
    }
    // The upload may still be under way on another stream than the reader's.
    backend.synchronize(stream)?;
    Ok(HeadMaps { kv_heads: maps.kv_heads, inputs: maps.inputs, outputs: columns, data })
}

/// The first `width` outputs of a layer's qkv.
fn query_part(backend: &dyn Backend, attention: &Attention, width: usize) -> Result<Linear> {
    let stream = backend.stream()?;
    let store = |bytes: &[u8]| -> Result<Buffer> {
        let mut data = backend.allocate(bytes.len(), Place::Device, "query weight")?;
        backend.upload(&stream, bytes, &mut data, 0)?;
        Ok(data)
    };
    let qkv = &attention.qkv;
    let bias = match &qkv.bias {
        Some(bias) => {
            let mut bytes = vec![0; width * DType::F32.bytes()];
            backend.download(&stream, bias.row().col_range(0, width), &mut bytes)?;
            Some(Vector { len: width, data: store(&bytes)? })
        }
        None => None,
    };
    // Of a weight in blocks a copy of what they stand for.
    let mut bytes = vec![0; width * qkv.inputs * qkv.dtype.bytes()];
    backend.download_weight(&stream, qkv, 0..width, &mut bytes)?;
    let data = store(&bytes)?;
    backend.synchronize(&stream)?;
    Ok(Linear { outputs: width, inputs: qkv.inputs, dtype: qkv.dtype, blocks: None, data, bias })
}
