//! Instructions as they are executed: registers by number, operands that are numbers as registers that hold them.

/// A register's number in its file: words of 32 bits (16-bit ones too), doubles of 64, or predicates.
pub(crate) type Register = u16;

/// No register.
pub(crate) const NONE: Register = Register::MAX;

/// An instruction. Which files its registers are in is the operation's to say.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Instruction {
    pub(crate) op: Op,
    /// The predicate that lanes need to take part, or its opposite.
    pub(crate) guard: Register,
    pub(crate) negated: bool,
    /// What it writes and what it reads.
    pub(crate) to: [Register; 4],
    pub(crate) from: [Register; 10],
    /// Added to an address; or the lowest of an operation's small numbers.
    pub(crate) offset: i64,
    /// Where it stands in the module's text.
    pub(crate) at: u32,
}

/// A kernel that can be executed.
#[derive(Debug, Default)]
pub(crate) struct Kernel {
    pub(crate) name: String,
    pub(crate) code: Vec<Instruction>,
    /// Registers of each file.
    pub(crate) words: usize,
    pub(crate) doubles: usize,
    pub(crate) predicates: usize,
    /// Registers that hold a number, or something that the machine knows, from the beginning.
    pub(crate) word_constants: Vec<(Register, u32)>,
    pub(crate) double_constants: Vec<(Register, u64)>,
    pub(crate) predicate_constants: Vec<(Register, bool)>,
    pub(crate) specials: Vec<(Register, Special)>,
    /// A double that holds the address of each thread's local memory.
    pub(crate) local_base: Option<Register>,
    pub(crate) local_bytes: usize,
    /// Shared memory that it declares itself. What a launch adds lies behind it.
    pub(crate) shared_bytes: usize,
    /// Where its parameters lie, and their bytes.
    pub(crate) params: Vec<(usize, usize)>,
    pub(crate) param_bytes: usize,
    /// Whether it waits for the launch before.
    pub(crate) waits: bool,
    pub(crate) most_threads: Option<u32>,
}

/// A word that says where a thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Special {
    Thread(usize),
    Threads(usize),
    Block(usize),
    Blocks(usize),
    Lane,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compare {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    /// Of floats: as above, or one of them is no number.
    Equ,
    Neu,
    Ltu,
    Leu,
    Gtu,
    Geu,
}

/// A number's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Type {
    U8,
    S8,
    U16,
    S16,
    U32,
    S32,
    U64,
    S64,
    F16,
    Bf16,
    F32,
    F64,
}

impl Type {
    pub(crate) fn wide(self) -> bool {
        matches!(self, Type::U64 | Type::S64 | Type::F64)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    /// To nearest, ties to even.
    Nearest,
    Zero,
    Down,
    Up,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    /// Global, local, and any memory by its address.
    Generic,
    Shared,
    Param,
}

/// Values that move between memory and registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) space: Space,
    /// Bytes of one element.
    pub(crate) bytes: u8,
    pub(crate) count: u8,
    pub(crate) signed: bool,
    /// Whether registers are doubles.
    pub(crate) wide: bool,
    /// Whether the address is a word.
    pub(crate) short: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Atomic {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Exchange,
    /// The second source replaces what equals the first.
    Swap,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shuffle {
    Up,
    Down,
    Butterfly,
    Index,
}

/// One word from one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum W1 {
    Move,
    Not,
    Neg,
    AbsS,
    Popc,
    Clz,
    Brev,
    Bfind,
    BfindShift,
    NegF,
    AbsF,
    Exp2F,
    Exp2FlushedF,
    ReciprocalF,
    RootF,
    Not16,
    Neg16,
}

/// One word from two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum W2 {
    Add,
    Sub,
    Mul,
    MulHighU,
    MulHighS,
    DivU,
    DivS,
    RemU,
    RemS,
    MinU,
    MinS,
    MaxU,
    MaxS,
    And,
    Or,
    Xor,
    Shl,
    ShrU,
    ShrS,
    AddF,
    SubF,
    MulF,
    DivF,
    MinF,
    MaxF,
    Add16,
    Sub16,
    Mul16,
    Shl16,
    ShrU16,
    ShrS16,
    MulWideU16,
    MulWideS16,
    /// Two floats narrowed, the first into the upper half.
    PairBf16,
    PairF16,
}

/// One word from three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum W3 {
    Mad,
    FmaF,
    /// Rounded down.
    FmaDownF,
    Permute,
    Dot4SS,
    Dot4UU,
    Dot2LowUU,
}

/// One double from one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum D1 {
    Move,
    Not,
    Neg,
    NegF,
    AbsF,
    ReciprocalF,
}

/// One double from two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum D2 {
    Add,
    Sub,
    Mul,
    MulHighU,
    DivU,
    DivS,
    RemU,
    RemS,
    MinU,
    MinS,
    MaxU,
    MaxS,
    And,
    Or,
    Xor,
    AddF,
    SubF,
    MulF,
    DivF,
}

/// One double from three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum D3 {
    Mad,
    FmaF,
}

/// One double from a double and a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shift {
    Left,
    RightU,
    RightS,
}

/// One predicate from one or two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Logic {
    And,
    Or,
    Xor,
    Not,
    Move,
}

/// Sums with a carry, which the flag of each thread keeps between two of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carried {
    Add,
    Sub,
    /// Lower and upper half of a product, and a third word.
    MadLow,
    MadHigh,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vote {
    Ballot,
    All,
    Any,
    Match,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Exit,
    Trap,
    /// To the code's `offset`-th instruction.
    Branch,
    /// All threads of the block.
    Barrier,
    /// The threads of the mask.
    WarpBarrier,
    /// For the launch before, beside which this one may have begun.
    WaitForPrevious,
    W1(W1),
    W2(W2),
    W3(W3),
    D1(D1),
    D2(D2),
    D3(D3),
    Shift(Shift),
    /// A double from two words: their product.
    MulWide {
        signed: bool,
    },
    /// A double from two words and a double.
    MadWide {
        signed: bool,
    },
    Carried {
        what: Carried,
        reads: bool,
        writes: bool,
    },
    BitInsert {
        wide: bool,
    },
    CompareW(Compare, Type),
    CompareD(Compare, Type),
    SelectW,
    SelectD,
    Logic(Logic),
    /// Words to doubles and back, of which nothing is lost but what does not fit.
    Widen {
        signed: bool,
    },
    Truncate,
    Convert {
        from: Type,
        to: Type,
        rounding: Rounding,
        /// Clamped to 0 and 1.
        saturated: bool,
        /// A whole number, still a float.
        whole: bool,
    },
    /// Elements of so many bytes into one register, or out of it; `wide` says of what files.
    Pack {
        bytes: u8,
        count: u8,
        into_wide: bool,
    },
    Unpack {
        bytes: u8,
        count: u8,
        from_wide: bool,
    },
    Load(Access),
    Store(Access),
    Atomic {
        what: Atomic,
        access: Access,
    },
    SharedToGeneric,
    GenericToShared,
    /// 16 bytes on their way to shared memory; `from[2]` says how many are real.
    CopyAsync {
        bytes: u8,
    },
    CopyGroup,
    /// Until no more than `offset` groups are on their way; all copies, if that is negative.
    CopyWait,
    Shuffle(Shuffle),
    Vote(Vote),
    LoadMatrices {
        transposed: bool,
        count: u8,
    },
    TransposeMatrix,
    /// Products of 16 × 16 and 16 × 8 numbers.
    Mma {
        bf16: bool,
    },
}
