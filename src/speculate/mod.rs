//! Placeholder until the offline products land.
use crate::Result;
use crate::backend::{HeadMaps, Linear};
use std::sync::Arc;
/// Placeholder.
pub struct IndexMaps {
    /// q
    pub query: HeadMaps,
    /// k
    pub key: HeadMaps,
}
/// Placeholder.
pub struct Speculation {}
#[allow(missing_docs, unused)]
impl Speculation {
    pub fn balanced(&self, columns: usize) -> Result<Arc<Vec<Option<IndexMaps>>>> {
        todo!()
    }
    pub fn own_copy(&self, layer: usize) -> Option<&Linear> {
        todo!()
    }
    pub fn fitted(&self, layer: usize) -> &Linear {
        todo!()
    }
    pub fn skew(&self, layer: usize) -> &HeadMaps {
        todo!()
    }
}
