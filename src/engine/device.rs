//! Where a model computes, and how that is decided.

use std::sync::Arc;

use crate::Result;
use crate::backend::Backend;
use crate::backend::cpu::{CpuBackend, CpuOptions};
use crate::backend::cuda::CudaBackend;

use super::{LogLevel, Logger};

/// Where a model computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The best device that this build can use here: CUDA where it works, and the processor otherwise.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// The first CUDA device that the driver shows (`CUDA_VISIBLE_DEVICES` chooses it).
    Cuda,
}

impl Device {
    /// Opens it; `threads` are the processor's. Errors: `Device` where it is not there or too old.
    pub(super) fn open(self, threads: usize, logger: Option<&Logger>) -> Result<Arc<dyn Backend>> {
        let cpu = || Ok(Arc::new(CpuBackend::new(CpuOptions { threads, level: None })?) as Arc<dyn Backend>);
        match self {
            Device::Cpu => cpu(),
            Device::Cuda => Ok(Arc::new(CudaBackend::new(0)?)),
            // Without a driver this costs a few failed look-ups of a library's name.
            Device::Auto => match CudaBackend::new(0) {
                Ok(cuda) => Ok(Arc::new(cuda)),
                Err(error) => {
                    if let Some(logger) = logger.filter(|logger| logger.level >= LogLevel::Info) {
                        (logger.sink)(LogLevel::Info, &format!("device auto: computing on the CPU: {error}"));
                    }
                    cpu()
                }
            },
        }
    }
}
