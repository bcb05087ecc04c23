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

        #[cfg(test)]
        const ALL: &[Module] = &[$(Module::$module),*];

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
    functions: HashMap<&'static str, Function>,
}

/// A kernel that has been loaded.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Function {
    pub(super) handle: CUfunction,
    /// Whether it waits itself for the launch before it, which it may begin beside.
    pub(super) overlaps: bool,
}

/// The compute capability from which on a launch may begin while the one before it still runs.
const OVERLAP_CAPABILITY: (i32, i32) = (9, 0);

/// Where a kernel waits for the launch before it (`wait_for_previous` in `kernels/common.cuh`).
const WAIT: &str = "griddepcontrol.wait;";

/// PTX of compute capability 8.0 as that of 9.0: what stands behind the mark is no longer a comment.
fn for_hopper(ptx: &str) -> String {
    ptx.replace("//sm_90 ", "").replace(".target sm_80", ".target sm_90")
}

/// Whether a kernel waits for the launch before it, by its module's PTX.
fn waits(ptx: &str, kernel: &str) -> bool {
    let after = ptx.split_once(&format!(".entry {kernel}(")).map_or("", |(_, after)| after);
    after.split(".entry ").next().is_some_and(|own| own.contains(WAIT))
}

// SAFETY: the handles belong to a context, not to a thread, and are used with that context current only.
unsafe impl Send for Loaded {}

impl Kernels {
    /// The kernel, compiled for the device when its module is first asked for (the driver keeps the result on disk).
    pub(super) fn get(&self, context: &Context, kernel: Kernel) -> Result<Function> {
        let mut loaded = self.loaded.lock();
        if let Some(&function) = loaded.functions.get(kernel.name) {
            return Ok(function);
        }
        let overlaps = context.capability >= OVERLAP_CAPABILITY;
        let module = match loaded.modules.get(&kernel.module) {
            Some(&module) => module,
            None => {
                let ptx = kernel.module.ptx();
                let ptx = if overlaps { for_hopper(ptx) } else { ptx.to_owned() };
                let ptx = CString::new(ptx).expect("PTX is text");
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
        let function = Function { handle: function, overlaps: overlaps && waits(kernel.module.ptx(), kernel.name) };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mark_is_taken_away() {
        let count = |text| ALL.iter().map(|module| module.ptx().matches(text).count()).sum::<usize>();
        let (kernels, marked) = (count(".entry "), count(WAIT));
        assert!(marked > 50 && marked < kernels, "{marked} of {kernels} kernels");
        for module in ALL {
            let ptx = for_hopper(module.ptx());
            assert!(!ptx.contains("//sm_90") && !ptx.contains("sm_80"), "{module:?}");
            assert_eq!(ptx.matches(".target sm_90\n").count(), 1, "{module:?}");
            // Each by itself in its line.
            let lines = ptx.lines().filter(|line| line.trim() == WAIT).count();
            assert_eq!(lines, module.ptx().matches(&format!("//sm_90 {WAIT}")).count(), "{module:?}");
            assert_eq!(lines, module.ptx().matches(WAIT).count(), "{module:?}");
        }
    }

    #[test]
    fn a_kernel_is_known_by_its_own_mark() {
        assert!(waits(Module::MatvecMma.ptx(), "matvec_mma_8_96"));
        assert!(waits(Module::MatvecMma.ptx(), "matvec_mma_24_160"));
        assert!(waits(Module::Slots.ptx(), "slots_admit_int8_bf16"));
        // Its neighbours have one.
        assert!(!waits(Module::Slots.ptx(), "slots_load"));
        assert!(!waits(Module::Gather.ptx(), "gather_16"));
        // What it brings to the device may be anything, weights too.
        assert!(!waits(Module::Upload.ptx(), "upload"));
        assert!(!waits(Module::Upload.ptx(), "no_such_kernel"));
    }
}
