//! A backend that keeps buffers on the heap and computes nothing.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::Result;
use crate::backend::*;

/// Counts what it has given out.
#[derive(Default)]
pub(super) struct Heap {
    pub(super) allocated: AtomicUsize,
}

/// 64 bytes with the alignment that buffers promise.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([u8; 64]);

impl Backend for Heap {
    fn description(&self) -> String {
        "heap".into()
    }

    fn activation(&self) -> DType {
        DType::F32
    }

    fn allocate(&self, bytes: usize, place: Place, _purpose: &str) -> Result<Buffer> {
        self.allocated.fetch_add(bytes, Ordering::Relaxed);
        let mut lines = vec![Line([0; 64]); bytes.div_ceil(64)].into_boxed_slice();
        let address = lines.as_mut_ptr().cast::<u8>();
        // The release closure owns the memory: moving a box leaves what it points to in place.
        let owner = SendPointer(Box::into_raw(lines));
        let release = Box::new(move |_, _| {
            let owner = owner;
            // SAFETY: the pointer came from `into_raw` above, and a buffer releases once.
            drop(unsafe { Box::from_raw(owner.0) });
        });
        // SAFETY: `bytes` zeroed bytes, aligned by `Line`, that only the release closure refers to.
        Ok(unsafe { Buffer::from_raw(address, bytes, place, release) })
    }

    fn stream(&self) -> Result<Stream> {
        Ok(Stream(0))
    }

    fn record(&self, _: &Stream) -> Result<Event> {
        Ok(Event(0))
    }

    fn wait(&self, _: &Stream, _: &Event) -> Result<()> {
        Ok(())
    }

    fn synchronize(&self, _: &Stream) -> Result<()> {
        Ok(())
    }

    fn upload(&self, _: &Stream, source: &[u8], target: &mut Buffer, offset: usize) -> Result<()> {
        assert!(offset + source.len() <= target.bytes());
        // SAFETY: inside the buffer, by the assertion; the borrows exclude an overlap.
        unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), target.address_mut().add(offset), source.len()) };
        Ok(())
    }

    fn download(&self, _: &Stream, source: Rows<'_>, target: &mut [u8]) -> Result<()> {
        assert_eq!(source.stride(), source.cols());
        assert_eq!(target.len(), source.rows() * source.cols() * source.dtype().bytes());
        // SAFETY: a window that is contiguous has that many bytes, and lies in a live buffer.
        unsafe { std::ptr::copy_nonoverlapping(source.base(), target.as_mut_ptr(), target.len()) };
        Ok(())
    }

    fn embed(&self, _: &Stream, _: &Linear, _: Rows<'_>, _: bool, _: RowsMut<'_>) -> Result<()> {
        unimplemented!()
    }

    fn norm(&self, _: &Stream, _: Rows<'_>, _: &Norm, _: RowsMut<'_>) -> Result<()> {
        unimplemented!()
    }

    fn norm_heads(&self, _: &Stream, _: RowsMut<'_>, _: &Norm) -> Result<()> {
        unimplemented!()
    }

    fn matmul(&self, _: &Stream, _: Rows<'_>, _: &Linear, _: bool, _: Shape, _: RowsMut<'_>) -> Result<()> {
        unimplemented!()
    }

    fn activate(&self, _: &Stream, _: Rows<'_>, _: Activation, _: RowsMut<'_>) -> Result<()> {
        unimplemented!()
    }

    fn rotation_table(&self, _: &Stream, _: &Rotation, _: Rows<'_>, _: RowsMut<'_>) -> Result<()> {
        unimplemented!()
    }

    fn rotate(&self, _: &Stream, _: &Rotation, _: Rows<'_>, _: usize, _: RowsMut<'_>) -> Result<()> {
        unimplemented!()
    }

    fn store_kv(&self, _: &Stream, _: Rows<'_>, _: Rows<'_>, _: &mut KvRunsMut<'_>, _: usize) -> Result<()> {
        unimplemented!()
    }

    fn attend(&self, _: &Stream, _: Rows<'_>, _: &AttentionShape, _: &[Segment<'_>], _: RowsMut<'_>) -> Result<()> {
        unimplemented!()
    }

    fn log_probability(&self, _: &Stream, _: Rows<'_>, _: Rows<'_>, _: RowsMut<'_>) -> Result<()> {
        unimplemented!()
    }
}

struct SendPointer(*mut [Line]);

// SAFETY: the memory belongs to whoever holds this pointer, and is not tied to a thread.
unsafe impl Send for SendPointer {}
// SAFETY: nothing can be done with a shared reference to it.
unsafe impl Sync for SendPointer {}

/// The elements of a matrix, widened to f32.
pub(super) fn matrix(linear: &Linear) -> Vec<f32> {
    values(&linear.data, linear.dtype)
}

/// The elements of a vector.
pub(super) fn vector(vector: &Vector) -> Vec<f32> {
    values(&vector.data, DType::F32)
}

fn values(buffer: &Buffer, dtype: DType) -> Vec<f32> {
    let rows = buffer.rows(dtype, 1, buffer.bytes() / dtype.bytes());
    let mut bytes = vec![0; buffer.bytes()];
    Heap::default().download(&Stream(0), rows, &mut bytes).unwrap();
    match dtype {
        DType::F32 => bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        DType::F16 => bytes.as_chunks().0.iter().map(|bytes| half::f16::from_le_bytes(*bytes).to_f32()).collect(),
        DType::BF16 => bytes.as_chunks().0.iter().map(|bytes| half::bf16::from_le_bytes(*bytes).to_f32()).collect(),
        DType::U32 => unreachable!(),
    }
}
