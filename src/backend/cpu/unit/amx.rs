//! The AMX tile unit: 16 × 16 blocks of C, 16 × 32 by 32 × 16 products of bf16 accumulated in f32, sixteen times the
//! multiply-adds per cycle of the vector unit.
//!
//! A bf16 has 8 significant bits, so an f32 operand goes in as two: *high* = bf16(x), *low* = bf16(x − high), together
//! at least 16 bits. Against bf16 weights, which are exact, a product takes two tile instructions and errs by 2⁻¹⁶ of
//! its size at most, with signs that average out in the sum: measured, 2.4·10⁻⁶ of a sum's own spread (plain f32:
//! 1 to 5·10⁻⁷). An f16 weight (11 bits) is high + low exactly; of the four products the one of both lows is left out:
//! 3.6·10⁻⁶.
//!
//! The unit has no stable intrinsics; one block of assembly computes a 32 × 32 (or 16 × 32) block of C from end to end,
//! so that tile registers never live across it. Tiles flush subnormal bf16 to zero and round to nearest.

use super::{PANEL, Unit};
use crate::backend::cpu::simd::{Element, LANES, transpose_512};
use half::{bf16, f16};
use std::arch::asm;
use std::arch::x86_64::*;

/// Depth of one tile product.
const STEP: usize = 32;

/// Bytes of a tile: 16 rows of 64 bytes.
const TILE: usize = 1024;

/// Whether the processor has AMX-BF16 and the kernel lets this process use it (Linux hands out the tile registers' 8 KiB
/// of state on request, for all threads of the process).
pub(in crate::backend::cpu) fn available() -> bool {
    #[cfg(target_os = "linux")]
    {
        // The kernel may be asked again and again; asked once, the answer stays.
        static AVAILABLE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
        *AVAILABLE.get_or_init(|| {
            const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
            const XFEATURE_XTILEDATA: libc::c_long = 18;
            // SAFETY: every x86-64 processor has cpuid. (Older compilers want the block, newer ones do not.)
            #[allow(unused_unsafe)]
            let (leaves, basic, features) = unsafe { (__cpuid(0).eax, __cpuid(1).ecx, __cpuid_count(7, 0).edx) };
            if leaves < 7 || basic & (1 << 27) == 0 {
                return false;
            }
            let (amx_bf16, amx_tile) = (features & (1 << 22) != 0, features & (1 << 24) != 0);
            // SAFETY: OSXSAVE (cpuid 1, ecx bit 27) was seen, so xgetbv exists.
            let enabled = unsafe { xcr0() };
            if !(amx_bf16 && amx_tile && enabled & (0b11 << 17) == 0b11 << 17) {
                return false;
            }
            // SAFETY: this request changes nothing but the set of features the process may use.
            unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
        })
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// The register states that the operating system saves.
///
/// # Safety
/// The processor has OSXSAVE.
#[cfg(target_os = "linux")]
unsafe fn xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: xgetbv exists by the caller's promise and reads a control register only.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// The tile unit, together with AVX-512 and AVX512-BF16 for packing.
#[derive(Clone, Copy)]
pub(in crate::backend::cpu) struct Amx(());

impl Amx {
    /// # Safety
    /// [`available`] was seen to be true, and so were AVX-512 F, BW, DQ, VL and BF16.
    pub(in crate::backend::cpu) unsafe fn new() -> Amx {
        Amx(())
    }
}

/// What `ldtilecfg` reads: palette 1, all eight tiles 16 rows of 64 bytes.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: TileConfig = TileConfig {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Tiles configured on this thread, until dropped.
struct Session;

impl Session {
    /// # Safety
    /// [`available`] was seen to be true.
    unsafe fn new() -> Session {
        // SAFETY: AMX may be used by the caller's promise; CONFIG is a valid configuration of 64 bytes. Tile registers
        // are used inside this file's assembly only.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(readonly, nostack)) };
        Session
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // SAFETY: a Session is made with AMX available. Released tiles cost the kernel nothing to save.
        unsafe { asm!("tilerelease", options(nomem, nostack)) };
    }
}

/// Stored types that the unit takes, split into [`Split::PARTS`] bf16.
pub(in crate::backend::cpu) trait Split: Element {
    /// Tiles per 32 × 16 block of B: 1 where bf16 is exact, 2 for high and low.
    const PARTS: usize;

    /// 32 consecutive elements (the first `n`, then zeros) as high and low bf16.
    ///
    /// # Safety
    /// `from` is readable for `n` ≤ 32 elements; the features of [`Amx`].
    unsafe fn split(from: *const Self, n: usize) -> [__m512i; 2];
}

impl Split for bf16 {
    const PARTS: usize = 1;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn split(from: *const bf16, n: usize) -> [__m512i; 2] {
        // SAFETY: masked-out elements are not touched; `n` are readable by the caller's promise.
        [unsafe { _mm512_maskz_loadu_epi16(first(n), from.cast()) }, _mm512_setzero_si512()]
    }
}

impl Split for f16 {
    const PARTS: usize = 2;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn split(from: *const f16, n: usize) -> [__m512i; 2] {
        // SAFETY: masked-out elements are not touched; `n` are readable by the caller's promise.
        let x = unsafe { _mm512_maskz_loadu_epi16(first(n), from.cast()) };
        let low = _mm512_cvtph_ps(_mm512_castsi512_si256(x));
        let high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(x));
        split_floats(low, high)
    }
}

/// The first `n` of 32 lanes.
#[inline(always)]
fn first(n: usize) -> __mmask32 {
    debug_assert!(n <= STEP);
    ((1u64 << n) - 1) as __mmask32
}

/// Two vectors of f32 as 32 bf16, high and low.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn split_floats(a: __m512, b: __m512) -> [__m512i; 2] {
    // SAFETY: __m512bh and __m512i are both 64 bytes of plain integers.
    let high = unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a)) };
    let widen = |x: __m256i| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)));
    let a_rest = _mm512_sub_ps(a, widen(_mm512_castsi512_si256(high)));
    let b_rest = _mm512_sub_ps(b, widen(_mm512_extracti64x4_epi64::<1>(high)));
    // SAFETY: as above.
    let low = unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b_rest, a_rest)) };
    [high, low]
}

/// 16 × 16 pairs of bf16, transposed.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose_pairs(x: [__m512i; LANES]) -> [__m512i; LANES] {
    let mut floats = [_mm512_setzero_ps(); LANES];
    for i in 0..LANES {
        floats[i] = _mm512_castsi512_ps(x[i]);
    }
    let floats = transpose_512(floats);
    let mut out = [_mm512_setzero_si512(); LANES];
    for i in 0..LANES {
        out[i] = _mm512_castps_si512(floats[i]);
    }
    out
}

/// Packs A: for each 16 rows and each step of 32 a tile of highs, then one of lows.
///
/// # Safety
/// As [`Unit::pack_a`], with the features of [`Amx`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pack_a(from: *const f32, stride: usize, rows: usize, k: usize, a: *mut u8, first_row: usize) {
    let steps = k.div_ceil(STEP);
    for r in 0..rows.next_multiple_of(2 * LANES) {
        let row = first_row + r;
        // SAFETY: `a` has room for the padded number of rows, 16 of which take `steps` × 2 tiles.
        let to = unsafe { a.add((row / LANES) * steps * 2 * TILE + (row % LANES) * 64) };
        for step in 0..steps {
            let mut halves = [_mm512_setzero_ps(); 2];
            if r < rows {
                for (i, half) in halves.iter_mut().enumerate() {
                    let at = step * STEP + i * LANES;
                    let n = k.saturating_sub(at).min(LANES);
                    let mask = ((1u32 << n) - 1) as __mmask16;
                    // SAFETY: row r is readable for k floats; only the n from `at` on are touched.
                    *half = unsafe { _mm512_maskz_loadu_ps(mask, from.add(r * stride + at.min(k))) };
                }
            }
            let [high, low] = split_floats(halves[0], halves[1]);
            // SAFETY: row `row % 16` of this step's two tiles; see `to`.
            unsafe {
                _mm512_store_si512(to.add(step * 2 * TILE).cast(), high);
                _mm512_store_si512(to.add(step * 2 * TILE + TILE).cast(), low);
            }
        }
    }
}

/// Packs a panel of columns: for each step, the highs of columns 0–15 and 16–31, then (f16) their lows. Row p of a tile
/// holds elements 2p and 2p + 1 of each of 16 columns side by side: the rows of the source, transposed in pairs.
///
/// # Safety
/// As [`Unit::pack_columns`], with the features of [`Amx`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pack_columns<E: Split>(columns: &[*const E], k: usize, panel: *mut u8) {
    let steps = k.div_ceil(STEP);
    for step in 0..steps {
        let n = (k - step * STEP).min(STEP);
        for group in 0..PANEL / LANES {
            let mut parts = [[_mm512_setzero_si512(); LANES]; 2];
            for i in 0..LANES {
                if let Some(&column) = columns.get(group * LANES + i) {
                    // SAFETY: the column is readable for k elements, of which n from the step's first on are read.
                    let [high, low] = unsafe { E::split(column.add(step * STEP), n) };
                    parts[0][i] = high;
                    parts[1][i] = low;
                }
            }
            for (part, rows) in parts.into_iter().enumerate().take(E::PARTS) {
                let rows = transpose_pairs(rows);
                // SAFETY: the panel has `steps` × PARTS × 2 tiles of 16 rows of 64 bytes.
                unsafe {
                    let to = panel.add(((step * E::PARTS + part) * 2 + group) * TILE);
                    for (i, row) in rows.into_iter().enumerate() {
                        _mm512_store_si512(to.add(i * 64).cast(), row);
                    }
                }
            }
        }
    }
}

/// Packs a panel of rows: two rows of the source, interleaved, are a row of a tile.
///
/// # Safety
/// As [`Unit::pack_rows`], with the features of [`Amx`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pack_rows<E: Split>(rows: &[*const E], width: usize, panel: *mut u8) {
    let interleave = |even: __m256i, odd: __m256i| {
        let odd = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(odd));
        _mm512_or_si512(_mm512_cvtepu16_epi32(even), odd)
    };
    for pair in 0..rows.len().next_multiple_of(STEP) / 2 {
        let mut both = [[_mm512_setzero_si512(); 2]; 2];
        for (i, parts) in both.iter_mut().enumerate() {
            if let Some(&row) = rows.get(2 * pair + i) {
                // SAFETY: the row is readable for `width` ≤ 32 elements.
                *parts = unsafe { E::split(row, width) };
            }
        }
        let (step, line) = (pair / LANES, pair % LANES);
        for part in 0..E::PARTS {
            let (even, odd) = (both[0][part], both[1][part]);
            let left = interleave(_mm512_castsi512_si256(even), _mm512_castsi512_si256(odd));
            let right = interleave(_mm512_extracti64x4_epi64::<1>(even), _mm512_extracti64x4_epi64::<1>(odd));
            // SAFETY: line `line` of this step's and part's two tiles, as in `pack_columns`.
            unsafe {
                let to = panel.add((step * E::PARTS + part) * 2 * TILE + line * 64);
                _mm512_store_si512(to.cast(), left);
                _mm512_store_si512(to.add(TILE).cast(), right);
            }
        }
    }
}

/// The operands of one block of C.
#[derive(Clone, Copy)]
struct Block {
    /// Packed A of the block's first 16 rows; the next 16 rows follow `a_bytes` later.
    a: *const u8,
    a_bytes: usize,
    panel: *const u8,
    steps: usize,
    c: *mut f32,
    /// Floats.
    stride: usize,
    add: bool,
}

/// Loads the block's accumulators tmm0–3 from C, or clears them, around `$body`, and stores them. `$body` is the
/// arithmetic of one step, with `{a}` and `{b}` at the step's operands, and advances them.
macro_rules! tiles {
    ($block:ident, two_rows, $body:literal) => {
        asm!(
            "test {add:e}, {add:e}",
            "jz 3f",
            "tileloadd tmm0, [{c} + {stride}]",
            "tileloadd tmm1, [{c} + {stride} + 64]",
            "tileloadd tmm2, [{c2} + {stride}]",
            "tileloadd tmm3, [{c2} + {stride} + 64]",
            "jmp 2f",
            "3:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            $body,
            "dec {steps}",
            "jnz 2b",
            "tilestored [{c} + {stride}], tmm0",
            "tilestored [{c} + {stride} + 64], tmm1",
            "tilestored [{c2} + {stride}], tmm2",
            "tilestored [{c2} + {stride} + 64], tmm3",
            a = inout(reg) $block.a => _,
            a2 = inout(reg) $block.a.add($block.a_bytes) => _,
            b = inout(reg) $block.panel => _,
            steps = inout(reg) $block.steps => _,
            c = in(reg) $block.c,
            c2 = in(reg) $block.c.add(LANES * $block.stride),
            stride = in(reg) $block.stride * 4,
            row = in(reg) 64usize,
            add = in(reg) u32::from($block.add),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
    ($block:ident, one_row, $body:literal) => {
        asm!(
            "test {add:e}, {add:e}",
            "jz 3f",
            "tileloadd tmm0, [{c} + {stride}]",
            "tileloadd tmm1, [{c} + {stride} + 64]",
            "jmp 2f",
            "3:",
            "tilezero tmm0",
            "tilezero tmm1",
            "2:",
            $body,
            "dec {steps}",
            "jnz 2b",
            "tilestored [{c} + {stride}], tmm0",
            "tilestored [{c} + {stride} + 64], tmm1",
            a = inout(reg) $block.a => _,
            b = inout(reg) $block.panel => _,
            steps = inout(reg) $block.steps => _,
            c = in(reg) $block.c,
            stride = in(reg) $block.stride * 4,
            row = in(reg) 64usize,
            add = in(reg) u32::from($block.add),
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// C of 32 × 32 or (`!two`) 16 × 32.
///
/// # Safety
/// Tiles are configured; A (32 or 16 rows) and the panel are packed for `steps` ≥ 1 steps of a type of `parts` parts;
/// C's rows are writable for 32 floats.
#[inline(always)]
unsafe fn block(block: Block, parts: usize, two: bool) {
    // SAFETY: the assembly reads `steps` × 2 tiles of each A block and `steps` × 2 × parts tiles of the panel, which is
    // what packing wrote; it reads and writes 16 rows of 32 floats at `c`, and 16 further ones with `two`.
    unsafe {
        match (parts, two) {
            (1, true) => tiles!(
                block,
                two_rows,
                "tileloadd tmm6, [{b} + {row}]
                 tileloadd tmm4, [{a} + {row}]
                 tileloadd tmm7, [{b} + {row} + 1024]
                 tdpbf16ps tmm0, tmm4, tmm6
                 tileloadd tmm5, [{a2} + {row}]
                 tdpbf16ps tmm1, tmm4, tmm7
                 tileloadd tmm4, [{a} + {row} + 1024]
                 tdpbf16ps tmm2, tmm5, tmm6
                 tdpbf16ps tmm3, tmm5, tmm7
                 tileloadd tmm5, [{a2} + {row} + 1024]
                 tdpbf16ps tmm0, tmm4, tmm6
                 tdpbf16ps tmm1, tmm4, tmm7
                 tdpbf16ps tmm2, tmm5, tmm6
                 tdpbf16ps tmm3, tmm5, tmm7
                 add {a}, 2048
                 add {a2}, 2048
                 add {b}, 2048"
            ),
            (1, false) => tiles!(
                block,
                one_row,
                "tileloadd tmm6, [{b} + {row}]
                 tileloadd tmm4, [{a} + {row}]
                 tileloadd tmm7, [{b} + {row} + 1024]
                 tileloadd tmm5, [{a} + {row} + 1024]
                 tdpbf16ps tmm0, tmm4, tmm6
                 tdpbf16ps tmm1, tmm4, tmm7
                 tdpbf16ps tmm0, tmm5, tmm6
                 tdpbf16ps tmm1, tmm5, tmm7
                 add {a}, 2048
                 add {b}, 2048"
            ),
            (_, true) => tiles!(
                block,
                two_rows,
                "tileloadd tmm6, [{b} + {row}]
                 tileloadd tmm4, [{a} + {row} + 1024]
                 tileloadd tmm7, [{b} + {row} + 1024]
                 tdpbf16ps tmm0, tmm4, tmm6
                 tileloadd tmm5, [{a2} + {row} + 1024]
                 tdpbf16ps tmm1, tmm4, tmm7
                 tileloadd tmm4, [{a} + {row}]
                 tdpbf16ps tmm2, tmm5, tmm6
                 tdpbf16ps tmm3, tmm5, tmm7
                 tileloadd tmm5, [{a2} + {row}]
                 tdpbf16ps tmm0, tmm4, tmm6
                 tdpbf16ps tmm1, tmm4, tmm7
                 tdpbf16ps tmm2, tmm5, tmm6
                 tileloadd tmm6, [{b} + {row} + 2048]
                 tdpbf16ps tmm3, tmm5, tmm7
                 tileloadd tmm7, [{b} + {row} + 3072]
                 tdpbf16ps tmm0, tmm4, tmm6
                 tdpbf16ps tmm1, tmm4, tmm7
                 tdpbf16ps tmm2, tmm5, tmm6
                 tdpbf16ps tmm3, tmm5, tmm7
                 add {a}, 2048
                 add {a2}, 2048
                 add {b}, 4096"
            ),
            (_, false) => tiles!(
                block,
                one_row,
                "tileloadd tmm6, [{b} + {row}]
                 tileloadd tmm4, [{a} + {row}]
                 tileloadd tmm7, [{b} + {row} + 1024]
                 tileloadd tmm5, [{a} + {row} + 1024]
                 tdpbf16ps tmm0, tmm4, tmm6
                 tdpbf16ps tmm1, tmm4, tmm7
                 tdpbf16ps tmm0, tmm5, tmm6
                 tdpbf16ps tmm1, tmm5, tmm7
                 tileloadd tmm6, [{b} + {row} + 2048]
                 tileloadd tmm7, [{b} + {row} + 3072]
                 tdpbf16ps tmm0, tmm4, tmm6
                 tdpbf16ps tmm1, tmm4, tmm7
                 add {a}, 2048
                 add {b}, 4096"
            ),
        }
    }
}

/// Room for one block of C that sticks out of the matrix.
#[repr(align(64))]
struct Edge([f32; 2 * LANES * PANEL]);

impl<E: Split> Unit<E> for Amx {
    const ROWS: usize = 2 * LANES;

    fn a_row_bytes(k: usize) -> usize {
        k.div_ceil(STEP) * 2 * TILE / LANES
    }

    fn panel_bytes(k: usize) -> usize {
        k.div_ceil(STEP) * 2 * TILE * E::PARTS
    }

    unsafe fn pack_a(self, from: *const f32, stride: usize, rows: usize, k: usize, a: *mut u8, first: usize) {
        // SAFETY: the caller's promises; an `Amx` proves the features.
        unsafe { pack_a(from, stride, rows, k, a, first) }
    }

    unsafe fn pack_columns(self, columns: &[*const E], k: usize, panel: *mut u8) {
        // SAFETY: the caller's promises; an `Amx` proves the features.
        unsafe { pack_columns(columns, k, panel) }
    }

    unsafe fn pack_rows(self, rows: &[*const E], width: usize, panel: *mut u8) {
        // SAFETY: the caller's promises; an `Amx` proves the features.
        unsafe { pack_rows(rows, width, panel) }
    }

    unsafe fn multiply(
        self,
        a: *const u8,
        first: usize,
        rows: usize,
        panel: *const u8,
        k: usize,
        c: *mut f32,
        stride: usize,
        cols: usize,
        add: bool,
    ) {
        let steps = k.div_ceil(STEP);
        let a_bytes = steps * 2 * TILE;
        for r in (0..rows).step_by(2 * LANES) {
            let here = (rows - r).min(2 * LANES);
            let two = here > LANES;
            // SAFETY: `first` is a multiple of 32 rows, so the block's rows begin a packed group of 16; `r < rows`.
            let (a, c) = unsafe { (a.add((first + r) / LANES * a_bytes), c.add(r * stride)) };
            let inside = cols == PANEL && here.is_multiple_of(LANES);
            if inside {
                // SAFETY: all 32 columns and 16 or 32 rows belong to the result.
                unsafe { block(Block { a, a_bytes, panel, steps, c, stride, add }, E::PARTS, two) };
                continue;
            }
            let mut edge = Edge([0.0; 2 * LANES * PANEL]);
            for i in 0..if add { here } else { 0 } {
                // SAFETY: row i of C has `cols` floats; row i of the edge has PANEL ≥ cols.
                unsafe { std::ptr::copy_nonoverlapping(c.add(i * stride), edge.0.as_mut_ptr().add(i * PANEL), cols) };
            }
            let own = Block { a, a_bytes, panel, steps, c: edge.0.as_mut_ptr(), stride: PANEL, add };
            // SAFETY: the edge holds 32 rows of 32 floats.
            unsafe { block(own, E::PARTS, two) };
            for i in 0..here {
                // SAFETY: as above, the other way.
                unsafe { std::ptr::copy_nonoverlapping(edge.0.as_ptr().add(i * PANEL), c.add(i * stride), cols) };
            }
        }
    }

    fn session(self) -> impl Sized {
        // SAFETY: an `Amx` proves that AMX may be used.
        unsafe { Session::new() }
    }
}
