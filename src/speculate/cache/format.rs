//! The bytes of a cache file.
//!
//! ```text
//! header   magic "KVASPEC\0", version, key (128 bits), and the model's shape; 64 bytes
//! block    one for each layer from 1 on: fitted query weight, its bias if it has one, skew, balanced maps of queries,
//!          balanced maps of keys; then a checksum (XXH3, 64 bits) of these and of the layer's number
//! ```
//!
//! All numbers are little-endian, all matrices row-major.

use std::io::{Read, Write};
use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3;

use crate::backend::{Backend, Buffer, DType, HeadMaps, Linear, Place, Rows, Stream, Vector};
use crate::model::checkpoint::quant;
use crate::model::decoder::Decoder;
use crate::speculate::{IndexMaps, LayerSpeculation, Layout, Speculation};
use crate::{Error, ErrorCode, Result};

use super::Key;

const MAGIC: &[u8; 8] = b"KVASPEC\0";

/// Counts up with every change of the format, and of how products are computed.
const VERSION: u32 = 1;

const HEADER_BYTES: usize = 64;
const CHECKSUM_BYTES: usize = 8;

/// What the cache file of one model must be.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    key: Key,
    layout: Layout,
    layers: usize,
    /// Type of fitted weights.
    dtype: DType,
    biased: bool,
}

impl Format {
    /// The format for a model, which has at least one layer.
    pub fn new(key: Key, layout: Layout, decoder: &Decoder) -> Format {
        let qkv = &decoder.blocks[0].attention.qkv;
        Format { key, layout, layers: decoder.blocks.len(), dtype: qkv.dtype, biased: qkv.bias.is_some() }
    }

    /// The file's name, which the key is part of.
    pub fn file_name(&self) -> String {
        format!("kvahead-{}.speculation", self.key)
    }

    /// Size of the file.
    pub fn bytes(&self) -> u64 {
        let block = self.block_bytes() + CHECKSUM_BYTES;
        // No overflow: the configuration's limits hold, and such a model is in memory.
        (HEADER_BYTES + (self.layers - 1) * block) as u64
    }

    fn header(&self) -> [u8; HEADER_BYTES] {
        let Layout { hidden, heads, kv_heads, head_dim } = self.layout;
        let dtype = match self.dtype {
            DType::F32 => 0,
            DType::F16 => 1,
            DType::BF16 => 2,
            DType::U32 => unreachable!("weights are floats"),
        };
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.key.bytes());
        for number in [self.layers, hidden, heads, kv_heads, head_dim, dtype, usize::from(self.biased)] {
            bytes.extend((number as u32).to_le_bytes());
        }
        bytes.resize(HEADER_BYTES, 0);
        bytes.try_into().expect("56 bytes and padding")
    }

    fn query_width(&self) -> usize {
        self.layout.heads * self.layout.head_dim
    }

    /// Bytes of a block's parts, in order: fitted weight, bias, three sets of maps.
    fn part_bytes(&self) -> [usize; 5] {
        let Layout { hidden, kv_heads, head_dim, .. } = self.layout;
        let maps = 4 * kv_heads * head_dim * head_dim;
        let bias = if self.biased { 4 * self.query_width() } else { 0 };
        [self.query_width() * hidden * self.dtype.bytes(), bias, maps, maps, maps]
    }

    fn block_bytes(&self) -> usize {
        self.part_bytes().iter().sum()
    }

    /// Writes the products.
    pub fn write(&self, backend: &dyn Backend, speculation: &Speculation, to: &mut dyn Write) -> std::io::Result<()> {
        let failed = |error: Error| std::io::Error::other(error.to_string());
        let stream = backend.stream().map_err(failed)?;
        to.write_all(&self.header())?;
        let mut block = vec![0; self.block_bytes()];
        for layer in 1..self.layers {
            let products = speculation.layer(layer);
            let bias = products.fitted().bias.as_ref().map(Vector::row);
            let maps = [products.skew(), &products.balanced().query, &products.balanced().key];
            let parts = [Some(products.fitted().rows()), bias].into_iter().chain(maps.map(|maps| Some(all(maps))));
            let mut rest = &mut block[..];
            for (part, bytes) in parts.zip(self.part_bytes()) {
                let (own, after) = rest.split_at_mut(bytes);
                if let Some(rows) = part {
                    backend.download(&stream, rows, own).map_err(failed)?;
                }
                rest = after;
            }
            to.write_all(&block)?;
            to.write_all(&checksum(layer, &block).to_le_bytes())?;
        }
        Ok(())
    }

    /// Reads products that [`Format::write`] of the same format has written, `length` bytes in all. Anything else is an
    /// error of `InvalidFormat` that says what is wrong; nothing that the bytes say is believed without proof.
    pub fn read(&self, backend: &Arc<dyn Backend>, length: u64, from: &mut dyn Read) -> Result<Speculation> {
        let wrong = |message: String| Err(Error::new(ErrorCode::InvalidFormat, message));
        if length != self.bytes() {
            return wrong(format!("it has {length} bytes; expected {}", self.bytes()));
        }
        let mut header = [0; HEADER_BYTES];
        read_exact(from, &mut header)?;
        if header != self.header() {
            let what = if &header[..8] == MAGIC { "another model, text or version" } else { "another program" };
            return wrong(format!("its header is of {what}"));
        }
        let stream = backend.stream()?;
        let mut block = vec![0; self.block_bytes()];
        let mut layers = vec![None];
        for layer in 1..self.layers {
            read_exact(from, &mut block)?;
            let mut stored = [0; CHECKSUM_BYTES];
            read_exact(from, &mut stored)?;
            if u64::from_le_bytes(stored) != checksum(layer, &block) {
                return wrong(format!("the checksum of layer {layer} does not match"));
            }
            let weight = self.part_bytes()[0];
            if !quant::all_finite(&block[..weight], self.dtype) || !quant::all_finite(&block[weight..], DType::F32) {
                return wrong(format!("layer {layer} has a value that is not finite"));
            }
            layers.push(Some(self.unpack(&**backend, &stream, &block)?));
        }
        backend.synchronize(&stream)?;
        Ok(Speculation::new(backend.clone(), layers))
    }

    fn unpack(&self, backend: &dyn Backend, stream: &Stream, block: &[u8]) -> Result<LayerSpeculation> {
        let Layout { hidden, kv_heads, head_dim, .. } = self.layout;
        let mut parts = self.part_bytes().into_iter().scan(block, |rest, bytes| {
            let (own, after) = rest.split_at(bytes);
            *rest = after;
            Some(own)
        });
        let mut part = |purpose| -> Result<Buffer> {
            let bytes = parts.next().expect("five parts");
            let mut data = backend.allocate(bytes.len(), Place::Device, purpose)?;
            backend.upload(stream, bytes, &mut data, 0)?;
            Ok(data)
        };
        let data = part("fitted query weight")?;
        let bias = part("bias of a fitted query weight")?;
        let fitted = Linear {
            outputs: self.query_width(),
            inputs: hidden,
            dtype: self.dtype,
            blocks: None,
            data,
            bias: self.biased.then(|| Vector { len: self.query_width(), data: bias }),
        };
        let mut maps = || -> Result<HeadMaps> {
            Ok(HeadMaps { kv_heads, inputs: head_dim, outputs: head_dim, data: part("speculation basis")? })
        };
        let skew = maps()?;
        Ok(LayerSpeculation::new(fitted, skew, IndexMaps { query: maps()?, key: maps()? }))
    }
}

/// All heads' maps as one matrix.
fn all(maps: &HeadMaps) -> Rows<'_> {
    maps.data.rows(DType::F32, maps.kv_heads * maps.outputs, maps.inputs)
}

fn checksum(layer: usize, block: &[u8]) -> u64 {
    let mut hash = Xxh3::with_seed(layer as u64);
    hash.update(block);
    hash.digest()
}

fn read_exact(from: &mut dyn Read, target: &mut [u8]) -> Result<()> {
    from.read_exact(target).map_err(|error| {
        let code = match error.kind() {
            std::io::ErrorKind::UnexpectedEof => ErrorCode::InvalidFormat,
            _ => ErrorCode::Io,
        };
        Error::new(code, format!("cannot read it: {error}"))
    })
}
