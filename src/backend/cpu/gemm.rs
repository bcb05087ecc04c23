//! Matrix products for prefill: many rows of activations share every weight that is read.
//!
//! Both operands are cut into blocks of depth [`DEPTH`] and rows [`BLOCK`], so that scratch memory stays bounded. A block
//! of activations is packed once and then used by all threads; each thread packs one panel of [`PANEL`] outputs of the
//! weight at a time into its cache and multiplies it with all the block's rows. What the packed form is, and how it is
//! multiplied, is the [`Unit`]'s affair. Blocks are widened to bf16 a panel at a time, just before it is packed.

use super::CpuBackend;
use super::memory::ALIGN;
use super::simd::{Element, Proven};
use super::stored::Widen;
use super::unit::{PANEL, Runner, Task, Unit, for_unit};
use super::view::{Shared, row};
use crate::Result;
use crate::backend::{Linear, Product, Rows, RowsMut};
use half::bf16;
use std::marker::PhantomData;
use std::ops::Range;

/// Depth of a block: a panel of it (f32: 128 KiB) fits the second-level cache beside the rows that meet it.
const DEPTH: usize = 1024;

/// Rows of a block.
const BLOCK: usize = 512;

/// `out = x · weightᵀ (+ out) + bias`.
pub(super) fn matmul(cpu: &CpuBackend, x: Rows<'_>, weight: &Linear, accumulate: bool, out: RowsMut<'_>) -> Result<()> {
    for_unit!(cpu.level, weight.dtype, (unit, E) => product::<E, _>(cpu, unit, x, weight, accumulate, out))
}

/// Bytes of scratch memory.
struct Packed {
    /// Of a block of packed rows.
    a_bytes: usize,
    /// Of a packed panel.
    panel_bytes: usize,
    /// Of a thread: its packed panel, and behind it, where the weight lies in blocks, the panel widened.
    own_bytes: usize,
}

fn packed<E: Element, R: Runner<E>>(unit: R, rows: usize, inputs: usize, in_blocks: bool) -> Packed {
    let sizes = unit.sizes(inputs.min(DEPTH));
    let a_bytes = rows.min(BLOCK).next_multiple_of(sizes.rows) * sizes.a_row_bytes;
    let panel_bytes = sizes.panel_bytes.next_multiple_of(ALIGN);
    let wide = if in_blocks { PANEL * inputs.min(DEPTH) * size_of::<bf16>() } else { 0 };
    let own_bytes = panel_bytes + wide.next_multiple_of(ALIGN);
    Packed { a_bytes: a_bytes.next_multiple_of(ALIGN), panel_bytes, own_bytes }
}

/// Bytes of scratch memory that a product of `rows` rows takes.
pub(super) fn scratch_bytes(cpu: &CpuBackend, rows: usize, product: &Product) -> usize {
    let &Product { inputs, dtype, in_blocks, .. } = product;
    let Packed { a_bytes, own_bytes, .. } =
        for_unit!(cpu.level, dtype, (unit, E) => packed::<E, _>(unit, rows, inputs, in_blocks));
    a_bytes + cpu.pool.threads() * own_bytes
}

fn product<E: Element, R: Runner<E>>(
    cpu: &CpuBackend,
    unit: R,
    x: Rows<'_>,
    weight: &Linear,
    accumulate: bool,
    out: RowsMut<'_>,
) -> Result<()> {
    let sizes = unit.sizes(weight.inputs.min(DEPTH));
    let panels = weight.outputs.div_ceil(PANEL);
    let Packed { a_bytes, panel_bytes, own_bytes } =
        packed::<E, R>(unit, x.rows(), weight.inputs, weight.blocks.is_some());
    let bytes = a_bytes + cpu.pool.threads() * own_bytes;
    let mut scratch = cpu.scratch.take(bytes, "packed operands of a matrix product")?;
    let scratch = Shared(scratch.address_mut());

    for rows in blocks(x.rows(), BLOCK) {
        for depth in blocks(weight.inputs, DEPTH) {
            let add = accumulate || depth.start > 0;
            let last = depth.end == weight.inputs;
            let slice = sizes.rows.max(32);
            cpu.pool.split(rows.len().div_ceil(slice), 1, &|slices| {
                for i in slices {
                    let first = i * slice;
                    let count = (rows.len() - first).min(slice);
                    let (rows, depth) = (rows.clone(), depth.clone());
                    unit.run(PackRows { x, from: rows.start + first, count, first, depth, a: scratch, e: PhantomData });
                }
            });
            cpu.pool.split_indexed(panels, 1, &|thread, range| {
                // SAFETY: the scratch holds `a_bytes` and then `own_bytes` for each thread; these are the thread's own.
                let panel = unsafe { scratch.get().add(a_bytes + thread * own_bytes) };
                unit.run(MultiplyPanels {
                    weight,
                    out: &out,
                    panels: range,
                    rows: rows.clone(),
                    depth: depth.clone(),
                    a: scratch,
                    panel: Shared(panel),
                    wide: Shared(panel.wrapping_add(panel_bytes)),
                    level: cpu.level,
                    add,
                    bias: last,
                    e: PhantomData,
                });
            });
        }
    }
    Ok(())
}

/// Ranges of at most `size` that cover `0..n`.
fn blocks(n: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..n).step_by(size).map(move |from| from..(from + size).min(n))
}

/// Packs some rows of a block of activations.
struct PackRows<'a, E> {
    x: Rows<'a>,
    /// Row of `x`.
    from: usize,
    count: usize,
    /// Row of the block.
    first: usize,
    depth: Range<usize>,
    a: Shared,
    e: PhantomData<E>,
}

impl<E: Element> Task<E> for PackRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<U: Unit<E>>(self, unit: U) {
        let from = row(&self.x, self.from)[self.depth.start..].as_ptr();
        // SAFETY: `count` rows from `from` on lie in the window `x`, each with the columns of `depth`. `a` has room for
        // the block's rows, padded; rows are packed in slices of a multiple of `U::ROWS`, each by one thread.
        unsafe { unit.pack_a(from, self.x.stride(), self.count, self.depth.len(), self.a.get(), self.first) }
    }
}

/// Multiplies the packed block of activations by some panels of the weight.
struct MultiplyPanels<'a, E> {
    weight: &'a Linear,
    out: &'a RowsMut<'a>,
    panels: Range<usize>,
    rows: Range<usize>,
    depth: Range<usize>,
    a: Shared,
    /// Place for one packed panel, this thread's own.
    panel: Shared,
    /// Place for one panel of widened blocks, this thread's own.
    wide: Shared,
    level: Proven,
    add: bool,
    /// Whether this depth is the last, after which the bias is due.
    bias: bool,
    e: PhantomData<E>,
}

impl<E: Element> Task<E> for MultiplyPanels<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<U: Unit<E>>(self, unit: U) {
        let _session = unit.session();
        let bias = self.weight.bias.as_ref().filter(|_| self.bias).map(|b| row(&b.row(), 0));
        for index in self.panels.clone() {
            let from = index * PANEL;
            let cols = (self.weight.outputs - from).min(PANEL);
            let (elements, stride) = self.elements(from, cols);
            let mut columns = [elements; PANEL];
            for (i, column) in columns.iter_mut().enumerate().take(cols) {
                // SAFETY: there are `cols` rows of elements, `stride` apart.
                *column = unsafe { elements.add(i * stride) };
            }
            // SAFETY: `cols` columns of depth.len() elements each; the panel's place is this thread's own and was sized
            // for the largest depth. `a` holds the block's rows packed at this depth. Columns `from..from + cols` of
            // the block's rows of `out` are written by nobody else, since each panel belongs to one thread.
            unsafe {
                unit.pack_columns(&columns[..cols], self.depth.len(), self.panel.get());
                let c = self.out.base().cast::<f32>().add(self.rows.start * self.out.stride() + from);
                unit.multiply(
                    self.a.get(),
                    0,
                    self.rows.len(),
                    self.panel.get(),
                    self.depth.len(),
                    c,
                    self.out.stride(),
                    cols,
                    self.add,
                );
                if let Some(bias) = bias {
                    for r in 0..self.rows.len() {
                        let out = std::slice::from_raw_parts_mut(c.add(r * self.out.stride()), cols);
                        out.iter_mut().zip(&bias[from..]).for_each(|(y, b)| *y += b);
                    }
                }
            }
        }
    }
}

impl<E: Element> MultiplyPanels<'_, E> {
    /// Where the elements of outputs `from..from + cols` at this depth begin, and how far apart the rows are. Blocks are
    /// widened, to `E`, which is their weight's type.
    #[inline(always)]
    fn elements(&self, from: usize, cols: usize) -> (*const E, usize) {
        let (weight, columns) = (self.weight, self.depth.clone());
        let Some(blocks) = weight.blocks else {
            let first = from * weight.inputs + columns.start;
            // SAFETY: output `from` is a row of the weight, and `depth` lies inside its `inputs` elements.
            return (unsafe { weight.rows().base().cast::<E>().add(first) }, weight.inputs);
        };
        let width = columns.len();
        // SAFETY: the place is this thread's own, zeroed or written before, and was sized for a panel of the largest depth.
        let to = unsafe { std::slice::from_raw_parts_mut(self.wide.get().cast::<bf16>(), cols * width) };
        self.level.run(Widen { weight, blocks, rows: from..from + cols, columns, to });
        (self.wide.get().cast::<E>(), width)
    }
}
