//! stub
use super::*;
pub struct CpuOptions {
    pub threads: usize,
    pub level: Option<()>,
}
pub struct CpuBackend;
impl CpuBackend {
    pub fn new(_: CpuOptions) -> Result<CpuBackend> {
        todo!()
    }
}
macro_rules! t {
    ($($sig:tt)*) => {};
}

#[allow(unused_variables)]
impl Backend for CpuBackend {
    fn description(&self) -> String {
        todo!()
    }
    fn activation(&self) -> DType {
        todo!()
    }
    fn allocate(&self, bytes: usize, place: Place, purpose: &str) -> Result<Buffer> {
        todo!()
    }
    fn stream(&self) -> Result<Stream> {
        todo!()
    }
    fn record(&self, stream: &Stream) -> Result<Event> {
        todo!()
    }
    fn wait(&self, stream: &Stream, event: &Event) -> Result<()> {
        todo!()
    }
    fn synchronize(&self, stream: &Stream) -> Result<()> {
        todo!()
    }
    fn upload(&self, stream: &Stream, source: &[u8], target: &mut Buffer, offset: usize) -> Result<()> {
        todo!()
    }
    fn download(&self, stream: &Stream, source: Rows<'_>, target: &mut [u8]) -> Result<()> {
        todo!()
    }
    fn embed(&self, stream: &Stream, table: &Linear, ids: Rows<'_>, accumulate: bool, out: RowsMut<'_>) -> Result<()> {
        todo!()
    }
    fn norm(&self, stream: &Stream, x: Rows<'_>, norm: &Norm, out: RowsMut<'_>) -> Result<()> {
        todo!()
    }
    fn norm_heads(&self, stream: &Stream, x: RowsMut<'_>, norm: &Norm) -> Result<()> {
        todo!()
    }
    fn matmul(
        &self,
        stream: &Stream,
        x: Rows<'_>,
        weight: &Linear,
        accumulate: bool,
        shape: Shape,
        out: RowsMut<'_>,
    ) -> Result<()> {
        todo!()
    }
    fn activate(&self, stream: &Stream, x: Rows<'_>, activation: Activation, out: RowsMut<'_>) -> Result<()> {
        todo!()
    }
    fn rotation_table(
        &self,
        stream: &Stream,
        rotation: &Rotation,
        positions: Rows<'_>,
        table: RowsMut<'_>,
    ) -> Result<()> {
        todo!()
    }
    fn rotate(
        &self,
        stream: &Stream,
        rotation: &Rotation,
        table: Rows<'_>,
        head_dim: usize,
        x: RowsMut<'_>,
    ) -> Result<()> {
        todo!()
    }
    fn store_kv(
        &self,
        stream: &Stream,
        keys: Rows<'_>,
        values: Rows<'_>,
        runs: &mut KvRunsMut<'_>,
        position: usize,
    ) -> Result<()> {
        todo!()
    }
    fn attend(
        &self,
        stream: &Stream,
        q: Rows<'_>,
        attention: &AttentionShape,
        segments: &[Segment<'_>],
        out: RowsMut<'_>,
    ) -> Result<()> {
        todo!()
    }
    fn log_probability(&self, stream: &Stream, logits: Rows<'_>, targets: Rows<'_>, out: RowsMut<'_>) -> Result<()> {
        todo!()
    }
}
