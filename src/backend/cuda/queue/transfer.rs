//! What a queue brings to the device, and back.

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUmemorytype};

use super::super::Shared;
use super::super::block::plain;
use super::super::context::check;
use super::super::kernels::{Kernel, Module};
use super::super::memory::Raw;
use super::{Queue, STAGING};
use crate::Result;
use crate::backend::Rows;

/// Uploads up to this size travel in the block.
const SMALL_UPLOAD: usize = 16 << 10;

plain! {
    struct Upload {
        from: u64,
        to: u64,
        words: u64,
    }
}

impl Queue {
    /// See `Backend::upload`: small ones travel with the next launch, large ones at once.
    pub(in crate::backend::cuda) fn upload(&mut self, shared: &Shared, source: &[u8], target: u64) -> Result<()> {
        if source.is_empty() {
            return Ok(());
        }
        if source.len() <= SMALL_UPLOAD && source.len().is_multiple_of(4) && target.is_multiple_of(4) {
            self.reserve(source.len(), 1)?;
            let params = Upload { from: self.block.push(source), to: target, words: source.len() as u64 / 4 };
            let threads = (source.len() / 4).next_multiple_of(32).min(1024);
            return self.push(shared, Kernel::new(Module::Upload, "upload"), [1, 1, 1], threads, &params);
        }
        let stream = self.stream()?;
        // SAFETY: the caller checked the target's range. From pageable memory the driver has copied the source on return.
        check("upload", unsafe { result::memcpy_htod_async(target, source, stream) })
    }

    /// Copies `count` pieces of `bytes` bytes, `pitch` apart at both ends, by the device's copy engines, at once.
    pub(in crate::backend::cuda) fn copy_pieces(
        &mut self,
        from: u64,
        to: u64,
        pitch: usize,
        bytes: usize,
        count: usize,
    ) -> Result<()> {
        let stream = self.stream()?;
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: CUmemorytype::CU_MEMORYTYPE_UNIFIED,
            srcHost: std::ptr::null(),
            srcDevice: from,
            srcArray: std::ptr::null_mut(),
            srcPitch: pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: CUmemorytype::CU_MEMORYTYPE_UNIFIED,
            dstHost: std::ptr::null_mut(),
            dstDevice: to,
            dstArray: std::ptr::null_mut(),
            dstPitch: pitch,
            WidthInBytes: bytes,
            Height: count,
        };
        // SAFETY: the caller's pieces lie inside live runs of device or pinned memory, which stay until the stream has
        // passed: whoever gives them back synchronises first.
        check("copy entries", unsafe { sys::cuMemcpy2DAsync_v2(&copy, stream) }.result())
    }

    /// See `Backend::download`.
    pub(in crate::backend::cuda) fn download(&mut self, source: Rows<'_>, target: &mut [u8]) -> Result<()> {
        self.launch(true)?;
        self.join()?;
        let width = source.cols() * source.dtype().bytes();
        if !target.is_empty() {
            let staged = target.len() <= STAGING;
            if staged && self.staging.bytes == 0 {
                self.staging = Raw::pinned(STAGING, "results")?;
            }
            let to = if staged { self.staging.host() } else { target.as_mut_ptr() };
            let copy = sys::CUDA_MEMCPY2D {
                srcXInBytes: 0,
                srcY: 0,
                srcMemoryType: CUmemorytype::CU_MEMORYTYPE_UNIFIED,
                srcHost: std::ptr::null(),
                srcDevice: source.base().expose_provenance() as u64,
                srcArray: std::ptr::null_mut(),
                srcPitch: source.stride() * source.dtype().bytes(),
                dstXInBytes: 0,
                dstY: 0,
                dstMemoryType: CUmemorytype::CU_MEMORYTYPE_HOST,
                dstHost: to.cast(),
                dstDevice: 0,
                dstArray: std::ptr::null_mut(),
                dstPitch: width,
                WidthInBytes: width,
                Height: source.rows(),
            };
            // SAFETY: the window lies inside its buffer, and `to` has room for all rows, packed. The copy ends before
            // `finish` below returns, while `target` is borrowed.
            let copied = check("download", unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.lanes[0].stream) }.result());
            let finished = self.finish();
            copied.and(finished)?;
            if staged {
                // SAFETY: the staging memory holds at least as many bytes, which the copy has written.
                target.copy_from_slice(unsafe { std::slice::from_raw_parts(self.staging.host(), target.len()) });
            }
            return Ok(());
        }
        self.finish()
    }
}
