//! A policy that fails when told to.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvahead::policy::Policy;
use kvahead::{Error, ErrorCode, Result};

use crate::around::{Around, Watch};

/// Fails at the call that counts `left` down to zero; never while it is zero.
pub struct Failing {
    left: Arc<AtomicUsize>,
}

impl Failing {
    pub fn around(inner: Box<dyn Policy>, left: &Arc<AtomicUsize>) -> Box<dyn Policy> {
        Around::boxed(inner, Failing { left: left.clone() })
    }
}

impl Watch for Failing {
    fn call(&self) -> Result<()> {
        let before = self.left.load(Ordering::Relaxed);
        self.left.store(before.saturating_sub(1), Ordering::Relaxed);
        if before == 1 { Err(Error::new(ErrorCode::Device, "made to fail")) } else { Ok(()) }
    }
}
