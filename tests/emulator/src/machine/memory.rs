//! Which memory there is.

/// Ranges of addresses that may be accessed, in ascending order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ranges(Vec<(u64, u64)>);

impl Ranges {
    /// Of pairs of an address and a number of bytes, no two of which overlap.
    pub(crate) fn new(pieces: impl Iterator<Item = (u64, u64)>) -> Ranges {
        let mut ranges: Vec<_> = pieces.map(|(begin, bytes)| (begin, begin + bytes)).collect();
        ranges.sort_unstable();
        Ranges(ranges)
    }

    /// The range that holds all of these bytes.
    pub(crate) fn find(&self, address: u64, bytes: u64) -> Option<(u64, u64)> {
        let behind = self.0.partition_point(|range| range.0 <= address);
        let range = *self.0.get(behind.checked_sub(1)?)?;
        (address.checked_add(bytes)? <= range.1).then_some(range)
    }
}

/// What a kernel did that it may not.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Fault {
    pub(crate) what: String,
    /// Where the instruction stands in the module's text, the block and the thread.
    pub(crate) at: u32,
    pub(crate) block: [u32; 3],
    pub(crate) thread: u32,
}
