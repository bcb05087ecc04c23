//! Small kernels, whose results are known.

use super::{Fault, Launch, Machine};
use crate::ptx::Module;

/// Runs a kernel of one parameter, the address of `memory`, of which it gets `grid` blocks of `threads` threads.
fn run(body: &str, grid: u32, threads: u32, early: bool, memory: &mut [u32]) -> Result<(), (String, Fault)> {
    let text = format!(
        ".version 8.4\n.target sm_90\n.address_size 64\n.visible .entry test(.param .u64 to)\n{{\n\
         .reg .pred %p<8>;\n.reg .b32 %r<32>;\n.reg .f32 %f<8>;\n.reg .b64 %rd<8>;\n.shared .align 16 .b8 block[512];\n\
         ld.param.u64 %rd1, [to];\nmov.u32 %r1, %tid.x;\nmul.wide.u32 %rd2, %r1, 4;\nadd.s64 %rd3, %rd1, %rd2;\n{body}\nret;\n}}\n"
    );
    let module = Module::read(&text).unwrap();
    let kernel = module.kernel("test").unwrap();
    let address = memory.as_mut_ptr().expose_provenance() as u64;
    let end = address + 4 * memory.len() as u64;
    let launch = Launch {
        kernel: &kernel,
        params: &address.to_le_bytes(),
        grid: [grid, 1, 1],
        threads: [threads, 1, 1],
        shared_bytes: kernel.shared_bytes,
        memory: &|at, bytes| (at >= address && at.checked_add(bytes)? <= end).then_some((address, end)),
        early,
        seed: 5,
    };
    Machine::default().run(&launch, 2).map_err(|fault| (module.line(fault.at).to_owned(), fault))
}

/// What 64 threads store into a word each.
fn words(body: &str) -> Vec<u32> {
    let mut memory = vec![0; 64];
    run(&format!("{body}\nst.global.u32 [%rd3], %r9;"), 1, 64, false, &mut memory).unwrap();
    memory
}

fn fault(body: &str) -> (String, String) {
    let (line, fault) = run(body, 1, 64, false, &mut [0; 64]).unwrap_err();
    (line, fault.what)
}

#[test]
fn lanes_part_and_meet() {
    let got = words(
        "setp.lt.u32 %p1, %r1, 10;\n@%p1 bra $few;\nadd.u32 %r2, %r1, 100;\nbra $all;\n\
         $few:\nmul.lo.u32 %r2, %r1, 2;\n$all:\nshfl.sync.bfly.b32 %r9, %r2, 16, 31, -1;",
    );
    let own = |thread: u32| if thread < 10 { 2 * thread } else { thread + 100 };
    assert!(got.iter().zip(0..).all(|(&got, thread)| got == own(thread ^ 16)), "{got:?}");
}

#[test]
fn loops_of_different_lengths_end() {
    // As many rounds as the thread's number, and a vote in each of those that still go on.
    let got = words(
        "mov.u32 %r9, 0;\nmov.u32 %r2, 0;\n$again:\nsetp.ge.u32 %p1, %r2, %r1;\n@%p1 bra $end;\n\
         add.u32 %r9, %r9, %r2;\nadd.u32 %r2, %r2, 1;\nbra $again;\n$end:\nbar.warp.sync -1;",
    );
    assert!(got.iter().zip(0u32..).all(|(&got, n)| got == n * n.saturating_sub(1) / 2), "{got:?}");
}

#[test]
fn a_barrier_brings_what_others_wrote() {
    let reversed = "mov.u32 %r2, block;\nshl.b32 %r3, %r1, 2;\nadd.u32 %r3, %r2, %r3;\nst.shared.u32 [%r3], %r1;\n\
                    BARRIER\nmov.u32 %r4, 63;\nsub.u32 %r4, %r4, %r1;\nshl.b32 %r4, %r4, 2;\nadd.u32 %r4, %r2, %r4;\n\
                    ld.shared.u32 %r9, [%r4];";
    let got = words(&reversed.replace("BARRIER", "bar.sync 0;"));
    assert!(got.iter().zip(0..).all(|(&got, thread)| got == 63 - thread), "{got:?}");
    // Without it a warp reads what the other has not written: ones.
    assert!(words(&reversed.replace("BARRIER", "")).contains(&u32::MAX));
}

#[test]
fn copies_arrive_when_somebody_waits() {
    let copy = "mov.u32 %r2, block;\nshl.b32 %r3, %r1, 4;\nand.b32 %r3, %r3, 511;\nadd.u32 %r3, %r2, %r3;\n\
                and.b64 %rd4, %rd3, -16;\nst.global.u32 [%rd3], %r1;\nbar.sync 0;\n\
                cp.async.cg.shared.global [%r3], [%rd4], 16;\ncp.async.commit_group;\nWAIT\nld.shared.u32 %r9, [%r3];";
    assert!(words(&copy.replace("WAIT", "")).iter().all(|&got| got == u32::MAX));
    assert!(words(&copy.replace("WAIT", "cp.async.wait_group 1;")).iter().all(|&got| got == u32::MAX));
    let got = words(&copy.replace("WAIT", "cp.async.wait_group 0;"));
    // (Two warps copy to the same places; each reads what it has copied itself, if the other has not been there since.)
    assert!(got.iter().all(|&got| got < 64 && got % 4 == 0), "{got:?}");
}

#[test]
fn what_is_not_there_is_named() {
    let (line, what) = fault("st.global.u32 [%rd3+4], %r1;");
    assert_eq!(line, "st.global.u32 [%rd3+4], %r1;");
    assert!(what.contains("where there is no memory"), "{what}");
    assert!(fault("ld.global.u32 %r2, [%rd3+-1024];").1.contains("where there is no memory"));
    assert!(fault("ld.global.u64 %rd5, [%rd3];").1.contains("aligned"));
    assert!(fault("mov.u32 %r2, 512;\nst.shared.u32 [%r2], %r1;").1.contains("of 512 shared ones"));
    assert!(fault("trap;").1.contains("trap"));
    let apart = "setp.lt.u32 %p1, %r1, 10;\n@%p1 bra $few;\nbar.warp.sync -1;\nret;\n$few:\nbar.warp.sync -1;";
    assert!(fault(apart).1.contains("different places"));
}

#[test]
fn a_launch_that_begins_early_waits_before_it_writes() {
    let store = "st.global.u32 [%rd3], %r1;";
    let early = |body: &str| run(body, 1, 64, true, &mut [0; 64]).map_err(|(_, fault)| fault.what);
    assert!(early(store).unwrap_err().contains("before it has waited"));
    assert!(early("").unwrap_err().contains("before one has waited"));
    early(&format!("griddepcontrol.wait;\n{store}")).unwrap();
    // Warps with nothing to do may end.
    early(&format!("setp.gt.u32 %p1, %r1, 31;\n@%p1 bra $end;\ngriddepcontrol.wait;\n{store}\n$end:")).unwrap();
}

#[test]
fn blocks_add_up() {
    let mut memory = [0; 64];
    run("red.global.add.u32 [%rd1+4], 3;\natom.global.add.u32 %r2, [%rd1], %r1;", 50, 64, false, &mut memory).unwrap();
    assert_eq!(memory[..2], [50 * 63 * 32, 50 * 64 * 3]);
}

#[test]
fn what_is_not_understood_is_an_error() {
    let kernel = |body: &str| {
        let text = format!(
            ".version 8.4\n.target sm_90\n.address_size 64\n.visible .entry test()\n{{\n.reg .b32 %r<4>;\n{body}\n}}\n"
        );
        Module::read(&text).and_then(|module| module.kernel("test")).err().unwrap_or_default()
    };
    assert_eq!(kernel("add.u32 %r1, %r2, 1;"), "");
    assert!(kernel("frobnicate.b32 %r1, %r2;").contains("frobnicate.b32 %r1, %r2;"));
    assert!(kernel("add.sat.s32 %r1, %r2, %r3;").contains("add.sat.s32"));
    assert!(kernel("add.u32 %r1, %r9, 1;").contains("%r9"));
    assert!(kernel("bra $nowhere;").contains("$nowhere"));
}

/// Operations that are easily wrong, with operands of their own.
#[test]
fn single_operations() {
    let one = |body: &str| words(body)[7];
    let float = |body: &str| f32::from_bits(one(&format!("{body}\nmov.b32 %r9, %f1;")));
    assert_eq!(one("prmt.b32 %r9, 0x33221100, 0x77665544, 0x7250;"), 0x77225500);
    assert_eq!(one("prmt.b32 %r9, 0x80, 0, 0x8888;"), u32::MAX);
    assert_eq!(one("bfi.b32 %r9, 0xff, 0, 4, 5;"), 0x1f0);
    assert_eq!(one("bfind.u32 %r9, 0x00800000;"), 23);
    assert_eq!(one("bfind.shiftamt.u32 %r9, 0x00800000;"), 8);
    assert_eq!(one("clz.b32 %r9, 1;"), 31);
    assert_eq!(one("shl.b32 %r9, 1, 32;"), 0);
    assert_eq!(one("shr.s32 %r9, -8, 40;"), u32::MAX);
    assert_eq!(one("dp4a.s32.s32 %r9, 0xff020304, 0x01010101, 10;"), 10 + 9 - 1);
    assert_eq!(one("dp2a.lo.u32.u32 %r9, 0x00030005, 0x00000702, 1;"), 1 + 5 * 2 + 3 * 7);
    assert_eq!(one("mul.hi.u32 %r9, 0xffffffff, 0xffffffff;"), 0xffff_fffe);
    assert_eq!(one("add.cc.u32 %r2, 0xffffffff, 1;\naddc.u32 %r9, 5, 0;"), 6);
    assert_eq!(one("sub.cc.u32 %r2, 0, 1;\nsubc.u32 %r9, 5, 0;"), 4);
    assert_eq!(one("mad.lo.cc.u32 %r2, 0x80000000, 2, 1;\nmadc.hi.u32 %r9, 0x80000000, 2, 0;"), 1);
    assert_eq!(one("popc.b32 %r9, 0xf0f0;"), 8);
    assert_eq!(one("vote.sync.ballot.b32 %r9, %p1, -1;".replace("%p1", "1").as_str()), u32::MAX);
    // A sum a little above one, rounded down; its next float is above.
    let down = float("mov.f32 %f2, 0f3F800001;\nfma.rm.f32 %f1, %f2, 0f33000000, 0f3F800000;");
    assert_eq!(down, 1.0);
    assert_eq!(float("fma.rm.f32 %f1, 0fBF800000, 0f33000000, 0f3F800000;"), 1.0f32.next_down());
    assert_eq!(float("cvt.sat.f32.f32 %f1, 0f40000000;"), 1.0);
    assert_eq!(float("cvt.rni.f32.f32 %f1, 0f40200000;"), 2.0);
    assert_eq!(one("cvt.rzi.s32.f32 %r9, 0fBFE66666;") as i32, -1);
    assert_eq!(one("cvt.rn.bf16x2.f32 %r9, 0f3F800000, 0f40000000;"), 0x3f80_4000);
    assert_eq!(one("cvt.rn.f16x2.f32 %r9, 0f3F800000, 0f40000000;"), 0x3c00_4000);
    assert_eq!(float("ex2.approx.ftz.f32 %f1, 0fC3000000;"), 0.0);
    let no_number = |how: &str| {
        words(&format!("mov.f32 %f2, 0f7FC00000;\nsetp.{how}.f32 %p1, %f2, 0f3F800000;\nselp.u32 %r9, 1, 0, %p1;"))[0]
    };
    let held = ["eq", "ne", "lt", "ge", "equ", "neu", "ltu", "geu"].map(no_number);
    assert_eq!(held, [0, 0, 0, 0, 1, 1, 1, 1]);
}

/// Fragments as the PTX manual lays them out, with products that no two elements share.
#[test]
fn matrices_are_multiplied() {
    let a = |row: u32, k: u32| (row * 3 + k * 5) % 17;
    let b = |k: u32, column: u32| (k * 7 + column * 2) % 13;
    let pair = |low: u32, high: u32| {
        half::bf16::from_f32(low as f32).to_bits() as u32 | (half::bf16::from_f32(high as f32).to_bits() as u32) << 16
    };
    let mut memory = vec![0u32; 32 * 16];
    for lane in 0..32 {
        let (g, t) = (lane / 4, lane % 4 * 2);
        let of = [
            pair(a(g, t), a(g, t + 1)),
            pair(a(g + 8, t), a(g + 8, t + 1)),
            pair(a(g, t + 8), a(g, t + 9)),
            pair(a(g + 8, t + 8), a(g + 8, t + 9)),
            pair(b(t, g), b(t + 1, g)),
            pair(b(t + 8, g), b(t + 9, g)),
        ];
        for (at, word) in of.into_iter().enumerate() {
            memory[at * 32 + lane as usize] = word;
        }
    }
    let loads: String = (0..6).map(|at| format!("ld.global.u32 %r{}, [%rd3+{}];\n", 10 + at, at * 128)).collect();
    let stores: String = (0..4).map(|at| format!("st.global.f32 [%rd3+{}], %f{};\n", (8 + at) * 128, 1 + at)).collect();
    let mut clear: String = (1..5).map(|at| format!("mov.f32 %f{at}, 0f3F800000;\n")).collect();
    clear += &loads;
    // (Of words: accumulators are words whatever they are called.)
    let mma = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1,%f2,%f3,%f4}, {%r10,%r11,%r12,%r13}, {%r14,%r15}, {%f1,%f2,%f3,%f4};\n";
    run(&format!("{clear}{mma}{stores}"), 1, 32, false, &mut memory).unwrap();
    for lane in 0..32u32 {
        for part in 0..4 {
            let (row, column) = (lane / 4 + part / 2 * 8, lane % 4 * 2 + part % 2);
            let want = 1 + (0..16).map(|k| a(row, k) * b(k, column)).sum::<u32>();
            let got = f32::from_bits(memory[((8 + part) * 32 + lane) as usize]);
            assert_eq!(got, want as f32, "row {row}, column {column}");
        }
    }
}
