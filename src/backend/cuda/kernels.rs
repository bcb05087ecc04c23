//! The kernels: PTX compiled ahead of time from `kernels/*.cu`, loaded when first used.

use std::collections::HashMap;
use std::ffi::{CString, c_void};

use cudarc::driver::result;
use cudarc::driver::sys::{CUfunction, CUfunction_attribute_enum as Attribute, CUmodule};
use parking_lot::Mutex;

use super::context::{Context, check};
use crate::Result;
use crate::backend::Place;

macro_rules! modules {
    ($($module:ident: $file:literal;)*) => {
        /// A file of kernels.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub(super) enum Module {
            $(#[doc = concat!("`kernels/", $file, ".cu`")] $module,)*
        }

        impl Module {
            /// Its PTX. (`tools/kernels/compile.py` makes it, and checks in CI that it is what the source compiles to.)
            fn ptx(self) -> &'static str {
                match self {
                    $(Module::$module => include_str!(concat!("../../../kernels/ptx/", $file, ".ptx")),)*
                }
            }
        }
    };
}

modules! {
    Activate: "activate";
    AttentionMass: "attention_mass";
    AttendDecodeMmaBf16: "attend_decode_mma_bf16";
    AttendDecodeMmaF16: "attend_decode_mma_f16";
    AttendDecodePlain: "attend_decode_plain";
    AttendPrefill: "attend_prefill";
    AttendPrefillMma: "attend_prefill_mma";
    Embed: "embed";
    Evict: "evict";
    Gather: "gather";
    Gemm: "gemm";
    Index: "index";
    LogProbability: "log_probability";
    Matvec: "matvec";
    MatvecMma: "matvec_mma";
    Norm: "norm";
    ProjectHeads: "project_heads";
    Rank: "rank";
    Rehearse: "rehearse";
    Payload: "payload";
    Rotary: "rotary";
    Slots: "slots";
    StoreKv: "store_kv";
    Tail: "tail";
    Upload: "upload";
}

/// A kernel of a module.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel {
    pub(super) module: Module,
    pub(super) name: &'static str,
    /// Bytes of dynamic shared memory that it is launched with.
    pub(super) shared_bytes: usize,
    /// Whether it reads host memory, for who measures the link.
    pub(super) fetches: bool,
}

impl Kernel {
    pub(super) const fn new(module: Module, name: &'static str) -> Kernel {
        Kernel { module, name, shared_bytes: 0, fetches: false }
    }

    pub(super) const fn with_shared(self, shared_bytes: usize) -> Kernel {
        Kernel { shared_bytes, ..self }
    }

    /// A kernel that reads entries from `place`.
    pub(super) fn reading(self, place: Place) -> Kernel {
        Kernel { fetches: place == Place::Pinned, ..self }
    }
}

/// The modules and kernels that have been loaded into a context.
#[derive(Default)]
pub(super) struct Kernels {
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    modules: HashMap<Module, CUmodule>,
    /// By name, which no two kernels share.
    functions: HashMap<&'static str, CUfunction>,
}

// SAFETY: the handles belong to a context, not to a thread, and are used with that context current only.
unsafe impl Send for Loaded {}

impl Kernels {
    /// The kernel, compiled for the device when its module is first asked for (the driver keeps the result on disk).
    pub(super) fn get(&self, context: &Context, kernel: Kernel) -> Result<CUfunction> {
        let mut loaded = self.loaded.lock();
        if let Some(&function) = loaded.functions.get(kernel.name) {
            return Ok(function);
        }
        let module = match loaded.modules.get(&kernel.module) {
            Some(&module) => module,
            None => {
                let ptx = CString::new(kernel.module.ptx()).expect("PTX is text");
                // SAFETY: a nul-terminated PTX text; the context is current.
                let module = check("load kernels", unsafe { result::module::load_data(ptx.as_ptr().cast::<c_void>()) })
                    .map_err(|error| error.within(format!("{:?}", kernel.module)))?;
                loaded.modules.insert(kernel.module, module);
                module
            }
        };
        let name = CString::new(kernel.name).expect("a name is text");
        // SAFETY: the module is loaded and stays so as long as its context.
        let function = check("find a kernel", unsafe { result::module::get_function(module, name) })
            .map_err(|error| error.within(kernel.name))?;
        if kernel.shared_bytes > 0 {
            // As much as the device has beside what the kernel declares itself, for a later launch may need more.
            let (own, most) = (Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, context.shared_bytes as i32);
            // SAFETY: `function` is valid.
            let own = check("ask a kernel's size", unsafe { result::function::get_function_attribute(function, own) })?;
            let dynamic = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: `function` is valid; the sum is within the device's limit.
            let raised = unsafe { result::function::set_function_attribute(function, dynamic, most - own) };
            check("raise a kernel's shared memory", raised)?;
        }
        loaded.functions.insert(kernel.name, function);
        Ok(function)
    }

    /// Unloads everything. The context is current and nothing runs.
    pub(super) fn unload(&self) {
        let mut loaded = self.loaded.lock();
        loaded.functions.clear();
        for (_, module) in loaded.modules.drain() {
            // SAFETY: loaded by `get`, unloaded once. Errors of a failed device leave nothing to do.
            let _ = unsafe { result::module::unload(module) };
        }
    }
}
