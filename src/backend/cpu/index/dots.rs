//! Dot products of quantized queries with blocks of an index, in whole numbers: the same on every instruction set.
//!
//! Written once over [`Integers`], sixteen lanes of i32, of which a token is one. A door a set, as in [`simd`], which has
//! floats only.
//!
//! [`simd`]: super::super::simd

use super::super::simd::{Level, Proven};
use super::layout::{BLOCK, GROUP_BYTES, OFFSET_EIGHT, OFFSET_FOUR};

/// Query heads that share one pass over the blocks at most.
const HEADS: usize = 4;

/// Sixteen 32-bit lanes, seen as integers or as four bytes each.
trait Integers: Copy {
    type I: Copy;

    fn splat(self, x: i32) -> Self::I;
    /// # Safety
    /// `from` is readable for 64 bytes.
    unsafe fn load(self, from: *const u8) -> Self::I;
    /// The lower half of every byte.
    fn low(self, x: Self::I) -> Self::I;
    /// The upper half of every byte.
    fn high(self, x: Self::I) -> Self::I;
    /// In each lane, `sum` and the products of its four bytes, `a` unsigned and `b` signed. `SMALL`: a's are below 16.
    fn dot<const SMALL: bool>(self, a: Self::I, b: Self::I, sum: Self::I) -> Self::I;
    /// Converts to float and writes.
    /// # Safety
    /// `to` is writable for 16 floats.
    unsafe fn store(self, to: *mut f32, x: Self::I);
}

/// Blocks that lie one behind the other.
#[derive(Clone, Copy)]
pub(super) struct Stretch {
    pub blocks: *const u8,
    pub count: usize,
}

/// Dot products of `heads` queries with the blocks of some stretches.
///
/// One block of each stretch in turn: each is a stream that memory reads ahead in, and several together it reads faster.
#[derive(Clone, Copy)]
pub(super) struct Dots<'a> {
    /// Whether a word holds eight columns of four bits, or four of eight.
    pub four: bool,
    pub heads: usize,
    /// Words of the first query: four columns each; the others follow.
    pub queries: *const i32,
    /// Words of a query.
    pub query_words: usize,
    pub stretches: &'a [Stretch],
    pub block_bytes: usize,
    /// Where the first query's dot products go, sixteen floats a block, stretch after stretch.
    pub out: *mut f32,
    /// Floats from one query's to the next one's.
    pub out_stride: usize,
}

impl Dots<'_> {
    /// # Safety
    /// `queries` is readable for `heads` × `query_words` words, each stretch for its blocks of `block_bytes`, whose groups hold
    /// the columns of a query; `out` is writable for sixteen floats a block and query.
    pub(super) unsafe fn run(self, level: Proven) {
        #[cfg(target_arch = "x86_64")]
        match level.level() {
            Level::Scalar => {}
            // SAFETY: `Proven` is made for detected levels only; the rest is the caller's promise.
            Level::Avx2 => return unsafe { x86::avx2(self) },
            // SAFETY: as above.
            Level::Avx512 => return unsafe { x86::avx512(self) },
            // SAFETY: as above.
            Level::Vnni | Level::Amx => return unsafe { x86::vnni(self) },
        }
        let _ = level;
        // SAFETY: the caller's promise.
        unsafe { self.all(Plain) }
    }

    /// # Safety
    /// As [`Dots::run`].
    #[inline(always)]
    unsafe fn all<N: Integers>(self, n: N) {
        let mut head = 0;
        while head < self.heads {
            // SAFETY: at most `heads` − head queries at a time; the rest is the caller's promise.
            unsafe {
                match (self.heads - head, self.four) {
                    (1, true) => self.some::<N, true, 1>(n, head),
                    (2, true) => self.some::<N, true, 2>(n, head),
                    (3, true) => self.some::<N, true, 3>(n, head),
                    (_, true) => self.some::<N, true, HEADS>(n, head),
                    (1, false) => self.some::<N, false, 1>(n, head),
                    (2, false) => self.some::<N, false, 2>(n, head),
                    (3, false) => self.some::<N, false, 3>(n, head),
                    (_, false) => self.some::<N, false, HEADS>(n, head),
                }
            }
            head += HEADS;
        }
    }

    /// `H` queries from `first` on.
    ///
    /// # Safety
    /// As [`Dots::run`]; first + H ≤ `heads`.
    #[inline(always)]
    unsafe fn some<N: Integers, const FOUR: bool, const H: usize>(self, n: N, first: usize) {
        // SAFETY: query and output of head `first`, of `heads`.
        let (queries, out) =
            unsafe { (self.queries.add(first * self.query_words), self.out.add(first * self.out_stride)) };
        // Stored integers have an offset: Σ k·q = Σ (k + offset)·q − offset · Σ q.
        let offset = if FOUR { OFFSET_FOUR } else { OFFSET_EIGHT };
        let mut starts = [n.splat(0); H];
        for h in 0..H {
            let mut sum = 0;
            for at in 0..self.query_words {
                // SAFETY: words of query first + h.
                let word = unsafe { queries.add(h * self.query_words + at).read() };
                sum += word.to_le_bytes().iter().map(|&b| i32::from(b as i8)).sum::<i32>();
            }
            starts[h] = n.splat(-offset * sum);
        }
        let longest = self.stretches.iter().map(|stretch| stretch.count).max().unwrap_or(0);
        for i in 0..longest {
            let mut before = 0;
            for stretch in self.stretches {
                if i < stretch.count {
                    // SAFETY: block i of the stretch; its results follow those of the blocks before.
                    unsafe {
                        let block = stretch.blocks.add(i * self.block_bytes);
                        self.block::<N, FOUR, H>(n, queries, block, starts, out.add((before + i) * BLOCK));
                    }
                }
                before += stretch.count;
            }
        }
    }

    /// Of `H` queries with one block.
    ///
    /// # Safety
    /// As [`Dots::run`].
    #[inline(always)]
    unsafe fn block<N: Integers, const FOUR: bool, const H: usize>(
        self,
        n: N,
        queries: *const i32,
        block: *const u8,
        starts: [N::I; H],
        out: *mut f32,
    ) {
        let mut sums = starts;
        // SAFETY: each of the block's groups meets one word of a query, or two where it holds eight columns; the results are
        // sixteen floats a query.
        unsafe {
            let mut at = 0;
            while at < self.query_words {
                if FOUR {
                    let pair = n.load(block.add(at / 2 * GROUP_BYTES));
                    let (low, high) = (n.low(pair), n.high(pair));
                    for h in 0..H {
                        let query = queries.add(h * self.query_words + at);
                        sums[h] = n.dot::<true>(low, n.splat(query.read()), sums[h]);
                        sums[h] = n.dot::<true>(high, n.splat(query.add(1).read()), sums[h]);
                    }
                    at += 2;
                } else {
                    let columns = n.load(block.add(at * GROUP_BYTES));
                    for h in 0..H {
                        let query = queries.add(h * self.query_words + at);
                        sums[h] = n.dot::<false>(columns, n.splat(query.read()), sums[h]);
                    }
                    at += 1;
                }
            }
            for h in 0..H {
                n.store(out.add(h * self.out_stride), sums[h]);
            }
        }
    }
}

/// Arrays: what runs everywhere.
#[derive(Clone, Copy)]
struct Plain;

impl Integers for Plain {
    type I = [i32; BLOCK];

    #[inline(always)]
    fn splat(self, x: i32) -> [i32; BLOCK] {
        [x; BLOCK]
    }

    #[inline(always)]
    unsafe fn load(self, from: *const u8) -> [i32; BLOCK] {
        // SAFETY: 64 readable bytes by the caller's promise.
        unsafe { from.cast::<[i32; BLOCK]>().read_unaligned() }
    }

    #[inline(always)]
    fn low(self, x: [i32; BLOCK]) -> [i32; BLOCK] {
        x.map(|x| x & 0x0f0f_0f0f)
    }

    #[inline(always)]
    fn high(self, x: [i32; BLOCK]) -> [i32; BLOCK] {
        x.map(|x| (x >> 4) & 0x0f0f_0f0f)
    }

    #[inline(always)]
    fn dot<const SMALL: bool>(self, a: [i32; BLOCK], b: [i32; BLOCK], mut sum: [i32; BLOCK]) -> [i32; BLOCK] {
        for lane in 0..BLOCK {
            for (a, b) in a[lane].to_le_bytes().into_iter().zip(b[lane].to_le_bytes()) {
                sum[lane] += i32::from(a) * i32::from(b as i8);
            }
        }
        sum
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: [i32; BLOCK]) {
        // SAFETY: 16 writable floats by the caller's promise.
        unsafe { to.cast::<[f32; BLOCK]>().write_unaligned(x.map(|x| x as f32)) }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Dots, Integers};
    use std::arch::x86_64::*;

    /// # Safety
    /// As [`Dots::run`], on a machine with AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn avx2(dots: Dots<'_>) {
        // SAFETY: the caller's promise.
        unsafe { dots.all(Avx2(())) }
    }

    /// # Safety
    /// As [`Dots::run`], on a machine with AVX-512 F and BW.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) unsafe fn avx512(dots: Dots<'_>) {
        // SAFETY: the caller's promise.
        unsafe { dots.all(Avx512::<false>(())) }
    }

    /// # Safety
    /// As [`Dots::run`], on a machine with AVX-512 F, BW and VNNI.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) unsafe fn vnni(dots: Dots<'_>) {
        // SAFETY: the caller's promise.
        unsafe { dots.all(Avx512::<true>(())) }
    }

    /// Proof of AVX2; made in its door only.
    #[derive(Clone, Copy)]
    struct Avx2(());

    /// Proof of AVX-512 F and BW, and of VNNI when that is so; made in their doors only.
    #[derive(Clone, Copy)]
    struct Avx512<const VNNI: bool>(());

    /// Calls intrinsics that need nothing but the instruction set.
    macro_rules! with_proof {
        ($e:expr) => {
            // SAFETY: a value of the proof's type exists only inside its door, whose caller has seen the features; the
            // intrinsic touches registers only.
            unsafe { $e }
        };
    }

    impl Integers for Avx2 {
        type I = [__m256i; 2];

        #[inline(always)]
        fn splat(self, x: i32) -> Self::I {
            with_proof!([_mm256_set1_epi32(x); 2])
        }

        #[inline(always)]
        unsafe fn load(self, from: *const u8) -> Self::I {
            // SAFETY: 64 readable bytes by the caller's promise; features by `self`.
            unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())] }
        }

        #[inline(always)]
        fn low(self, x: Self::I) -> Self::I {
            let mask = with_proof!(_mm256_set1_epi8(15));
            with_proof!([_mm256_and_si256(x[0], mask), _mm256_and_si256(x[1], mask)])
        }

        #[inline(always)]
        fn high(self, x: Self::I) -> Self::I {
            self.low(with_proof!([_mm256_srli_epi16::<4>(x[0]), _mm256_srli_epi16::<4>(x[1])]))
        }

        #[inline(always)]
        fn dot<const SMALL: bool>(self, a: Self::I, b: Self::I, mut sum: Self::I) -> Self::I {
            for i in 0..2 {
                // Pairs of products of small numbers fit 16 bits: 2 · 15 · 127. Others are widened before.
                sum[i] = with_proof!(if SMALL {
                    let pairs = _mm256_maddubs_epi16(a[i], b[i]);
                    _mm256_add_epi32(sum[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
                } else {
                    let even = _mm256_and_si256(a[i], _mm256_set1_epi16(255));
                    let even = _mm256_madd_epi16(even, _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(b[i])));
                    let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(a[i]), _mm256_srai_epi16::<8>(b[i]));
                    _mm256_add_epi32(sum[i], _mm256_add_epi32(even, odd))
                });
            }
            sum
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32, x: Self::I) {
            // SAFETY: 16 writable floats by the caller's promise; features by `self`.
            unsafe {
                _mm256_storeu_ps(to, _mm256_cvtepi32_ps(x[0]));
                _mm256_storeu_ps(to.add(8), _mm256_cvtepi32_ps(x[1]));
            }
        }
    }

    impl<const VNNI: bool> Integers for Avx512<VNNI> {
        type I = __m512i;

        #[inline(always)]
        fn splat(self, x: i32) -> __m512i {
            with_proof!(_mm512_set1_epi32(x))
        }

        #[inline(always)]
        unsafe fn load(self, from: *const u8) -> __m512i {
            // SAFETY: 64 readable bytes by the caller's promise; features by `self`.
            unsafe { _mm512_loadu_si512(from.cast()) }
        }

        #[inline(always)]
        fn low(self, x: __m512i) -> __m512i {
            with_proof!(_mm512_and_si512(x, _mm512_set1_epi8(15)))
        }

        #[inline(always)]
        fn high(self, x: __m512i) -> __m512i {
            self.low(with_proof!(_mm512_srli_epi16::<4>(x)))
        }

        #[inline(always)]
        fn dot<const SMALL: bool>(self, a: __m512i, b: __m512i, sum: __m512i) -> __m512i {
            with_proof!(if VNNI {
                _mm512_dpbusd_epi32(sum, a, b)
            } else if SMALL {
                let pairs = _mm512_maddubs_epi16(a, b);
                _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
            } else {
                let even = _mm512_and_si512(a, _mm512_set1_epi16(255));
                let even = _mm512_madd_epi16(even, _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(b)));
                let odd = _mm512_madd_epi16(_mm512_srli_epi16::<8>(a), _mm512_srai_epi16::<8>(b));
                _mm512_add_epi32(sum, _mm512_add_epi32(even, odd))
            })
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32, x: __m512i) {
            // SAFETY: 16 writable floats by the caller's promise; features by `self`.
            unsafe { _mm512_storeu_ps(to, _mm512_cvtepi32_ps(x)) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every door of this machine, the one without VNNI too, against whole numbers, with the largest operands there are.
    #[test]
    fn doors_agree_with_whole_numbers() {
        let mut random = super::super::super::tests::Random(11);
        for four in [true, false] {
            for (heads, query_words, count) in [(1, 2, 1), (3, 8, 5), (7, 4, 2), (4, 64, 3)] {
                let groups = if four { query_words / 2 } else { query_words };
                let block_bytes = (groups + 1) * GROUP_BYTES;
                let extreme = count == 3;
                let blocks: Vec<u8> =
                    (0..count * block_bytes).map(|_| if extreme { 255 } else { random.next() as u8 }).collect();
                let queries: Vec<i32> = (0..heads * query_words)
                    .map(|_| if extreme { 0x7f7f_7f7f } else { random.next() as i32 })
                    .collect();
                let mut want = Vec::new();
                for h in 0..heads {
                    for token in 0..count * BLOCK {
                        let mut sum = 0i64;
                        for column in 0..4 * query_words {
                            let q = queries[h * query_words + column / 4].to_le_bytes()[column % 4] as i8;
                            let block = &blocks[token / BLOCK * block_bytes..];
                            let k = if four {
                                let byte = block[column / 8 * GROUP_BYTES + token % BLOCK * 4 + column % 4];
                                i64::from(byte >> (column % 8 / 4 * 4) & 15) - 8
                            } else {
                                i64::from(block[column / 4 * GROUP_BYTES + token % BLOCK * 4 + column % 4]) - 128
                            };
                            sum += k * i64::from(q);
                        }
                        want.push(sum as f32);
                    }
                }
                // As one stretch, and as several, not all of one length.
                let stretches = |lengths: &[usize]| {
                    let mut before = 0;
                    let mut stretch = |&count: &usize| {
                        before += count;
                        Stretch { blocks: blocks[(before - count) * block_bytes..].as_ptr(), count }
                    };
                    lengths.iter().map(&mut stretch).collect::<Vec<_>>()
                };
                let run = |door: &dyn Fn(Dots<'_>), stretches: &[Stretch]| {
                    let mut out = vec![f32::NAN; heads * count * BLOCK];
                    door(Dots {
                        four,
                        heads,
                        queries: queries.as_ptr(),
                        query_words,
                        stretches,
                        block_bytes,
                        out: out.as_mut_ptr(),
                        out_stride: count * BLOCK,
                    });
                    out
                };
                for level in Level::available().filter_map(Proven::new) {
                    for lengths in [&[count][..], &[count / 2, count - count / 2], &[0, count - 1, 1]] {
                        // SAFETY: the sizes are those of the vectors above.
                        let got = run(&|d| unsafe { d.run(level) }, &stretches(lengths));
                        assert_eq!(got, want, "{level:?}, four: {four}, {lengths:?}");
                    }
                }
            }
        }
    }
}
