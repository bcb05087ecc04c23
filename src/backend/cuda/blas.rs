//! cuBLAS, opened at run time if it is there.
//!
//! The library is looked for under the names of its last major versions, whose few functions that are used here have not
//! changed; the variable `KVAHEAD_CUBLAS` names another file, or nothing (an empty value) to go without. (cudarc looks
//! for the names of one version only, and panics when a function is missing.)

use std::ffi::{c_int, c_void};

use cudarc::driver::sys::CUstream;
use libloading::Library;

use crate::backend::DType;
use crate::{Error, ErrorCode, Result};

const NAMES: [&str; 4] = ["libcublas.so.13", "libcublas.so.12", "libcublas.so.11", "libcublas.so"];

// Values of cublas_api.h and library_types.h.
const SUCCESS: c_int = 0;
const OP_N: c_int = 0;
const OP_T: c_int = 1;
const R_32F: c_int = 0;
const R_16F: c_int = 2;
const R_16BF: c_int = 14;
/// f32 products and sums; without the flag for TF32, which has 10 bits.
const COMPUTE_32F: c_int = 68;
const GEMM_DEFAULT: c_int = -1;

type Create = unsafe extern "C" fn(*mut *mut c_void) -> c_int;
type Destroy = unsafe extern "C" fn(*mut c_void) -> c_int;
type SetStream = unsafe extern "C" fn(*mut c_void, CUstream) -> c_int;
type GemmEx = unsafe extern "C" fn(
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const c_void,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
) -> c_int;

/// An open library with a handle.
pub(super) struct Blas {
    handle: *mut c_void,
    name: String,
    destroy: Destroy,
    set_stream: SetStream,
    gemm_ex: GemmEx,
    /// Keeps the functions where they are.
    _library: Library,
}

// SAFETY: a handle may be used by any thread, one at a time; it is kept behind a lock.
unsafe impl Send for Blas {}

/// `out = x · weightᵀ`, or `out +=`; strides in elements, `out` in f32, `x` of the weights' type.
pub(super) struct Product {
    pub(super) x: u64,
    pub(super) x_stride: usize,
    pub(super) weight: u64,
    pub(super) dtype: DType,
    pub(super) out: u64,
    pub(super) out_stride: usize,
    pub(super) rows: usize,
    pub(super) outputs: usize,
    pub(super) depth: usize,
    pub(super) accumulate: bool,
}

impl Blas {
    /// The first library that loads and makes a handle. The context is current.
    pub(super) fn open() -> Option<Blas> {
        match std::env::var("KVAHEAD_CUBLAS") {
            Ok(file) if file.is_empty() => None,
            Ok(file) => Blas::load(&file),
            Err(_) => NAMES.into_iter().find_map(Blas::load),
        }
    }

    fn load(name: &str) -> Option<Blas> {
        // SAFETY: cuBLAS's initialisers expect to be loaded so.
        let library = unsafe { Library::new(name) }.ok()?;
        // SAFETY: the types are those of cublas_api.h, the same in all versions above.
        let (create, destroy, set_stream, gemm_ex) = unsafe {
            (
                *library.get::<Create>(b"cublasCreate_v2\0").ok()?,
                *library.get::<Destroy>(b"cublasDestroy_v2\0").ok()?,
                *library.get::<SetStream>(b"cublasSetStream_v2\0").ok()?,
                *library.get::<GemmEx>(b"cublasGemmEx\0").ok()?,
            )
        };
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes a handle of the current context to a local.
        let created = unsafe { create(&mut handle) };
        (created == SUCCESS).then(|| Blas {
            handle,
            name: name.to_owned(),
            destroy,
            set_stream,
            gemm_ex,
            _library: library,
        })
    }

    /// The file that was loaded.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Enqueues a product.
    pub(super) fn multiply(&self, stream: CUstream, p: &Product) -> Result<()> {
        let dtype = match p.dtype {
            DType::F32 => R_32F,
            DType::F16 => R_16F,
            DType::BF16 => R_16BF,
            DType::U32 => unreachable!("weights are not u32"),
        };
        let (alpha, beta) = (1.0f32, if p.accumulate { 1.0f32 } else { 0.0 });
        let int =
            |n: usize| c_int::try_from(n).map_err(|_| Error::unsupported(format!("a matrix of {n} rows or columns")));
        // cuBLAS counts by columns: our row-major matrices are its transposed ones, so it is asked for outᵀ = weight · xᵀ.
        // SAFETY: the windows hold what their shapes say, and live until the stream has passed this point; alpha and beta
        // are read during the call.
        let status = unsafe {
            let streamed = (self.set_stream)(self.handle, stream);
            if streamed != SUCCESS {
                streamed
            } else {
                (self.gemm_ex)(
                    self.handle,
                    OP_T,
                    OP_N,
                    int(p.outputs)?,
                    int(p.rows)?,
                    int(p.depth)?,
                    (&raw const alpha).cast(),
                    p.weight as *const c_void,
                    dtype,
                    int(p.depth)?,
                    p.x as *const c_void,
                    dtype,
                    int(p.x_stride)?,
                    (&raw const beta).cast(),
                    p.out as *mut c_void,
                    R_32F,
                    int(p.out_stride)?,
                    COMPUTE_32F,
                    GEMM_DEFAULT,
                )
            }
        };
        if status != SUCCESS {
            return Err(Error::new(
                ErrorCode::Device,
                format!(
                    "{} cannot multiply {} x {} by {} x {} ({}): status {status}",
                    self.name, p.rows, p.depth, p.depth, p.outputs, p.dtype
                ),
            ));
        }
        Ok(())
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: made by `load`, destroyed once.
        let _ = unsafe { (self.destroy)(self.handle) };
    }
}
