//! Structs that begin with their size, so that later versions can append fields.
//!
//! A caller writes `sizeof` of the struct it was compiled with into `struct_size`; the library touches no byte past
//! that. A struct of an older version is read as if the fields it lacks had their defaults. In one of a newer version,
//! what this library does not know must be zero, which is what "unchanged" is in every appended field.

use std::ptr;

use crate::{Error, Result};

/// Above this a `struct_size` is not a size but garbage.
const LARGEST: usize = 4096;

/// A struct of the ABI whose first member is `uint32_t struct_size`.
///
/// # Safety
///
/// `repr(C)`; the first field is a `u32`; every bit pattern is valid for every field (integers, floats, raw
/// pointers, optional function pointers, arrays of those); there is no padding after the last field, lest a later
/// version put a field there that nobody can tell from padding.
pub(super) unsafe trait Sized32: Copy {
    /// The name in C.
    const NAME: &'static str;

    /// Sizes of all versions there ever were, ascending; the last is this one's.
    const VERSIONS: &'static [usize];
}

/// Options: a [`Sized32`] that is read, and that has defaults.
pub(super) trait Options: Sized32 {
    /// The defaults, with `struct_size` set.
    fn defaults() -> Self;
}

/// How many bytes of a struct of `size` bytes mean something to this library.
fn known<T: Sized32>(size: usize, name: &str) -> Result<usize> {
    let smallest = T::VERSIONS[0];
    if size > LARGEST {
        return Err(Error::invalid_argument(format!(
            "{name}: struct_size is {size}, which cannot be: {} has {} bytes in this version (was it initialised?)",
            T::NAME,
            size_of::<T>()
        )));
    }
    T::VERSIONS.iter().copied().filter(|&version| version <= size).max().ok_or_else(|| {
        Error::invalid_argument(format!(
            "{name}: struct_size is {size}, but {} has at least {smallest} bytes (was it initialised?)",
            T::NAME
        ))
    })
}

fn check_pointer<T: Sized32>(pointer: *const T, name: &str) -> Result<()> {
    if pointer.is_null() {
        return Err(Error::invalid_argument(format!("{name} is NULL")));
    }
    if !pointer.is_aligned() {
        return Err(Error::invalid_argument(format!("{name} is {pointer:p}, which is not aligned for a {}", T::NAME)));
    }
    Ok(())
}

/// Options as given.
pub(super) struct Given<T> {
    /// The fields; defaults in those that the caller does not know.
    pub(super) value: T,
    /// An error where the caller has set fields that this library does not know. Look at it only after taking
    /// charge of the user data in `value`, which must be freed in that case too.
    pub(super) unknown: Result<()>,
}

/// Reads options; NULL stands for the defaults.
///
/// # Safety
///
/// `pointer` is NULL or points to a `struct_size` and as many readable bytes in all as that says.
pub(super) unsafe fn read<T: Options>(pointer: *const T, name: &str) -> Result<Given<T>> {
    let mut value = T::defaults();
    if pointer.is_null() {
        return Ok(Given { value, unknown: Ok(()) });
    }
    check_pointer(pointer, name)?;
    // SAFETY: not NULL and aligned (just checked); the first field is a readable u32 (the trait and the caller).
    let size = unsafe { pointer.cast::<u32>().read() } as usize;
    let known = known::<T>(size, name)?;
    // SAFETY: `known` is at most `size`, so that many bytes are readable (the caller), and at most `size_of::<T>()`, so
    // they fit `value`, in which every bit pattern is valid (the trait); `value` is ours alone.
    unsafe { ptr::copy_nonoverlapping(pointer.cast::<u8>(), (&raw mut value).cast::<u8>(), known) };
    let rest = size.saturating_sub(size_of::<T>());
    // SAFETY: the bytes from `size_of::<T>()` to `size` are readable (the caller).
    let unknown = rest > 0 && unsafe { any_set(pointer.add(1).cast::<u8>(), rest) };
    let unknown = if unknown {
        Err(Error::unsupported(format!(
            "{name}: a field of {} that this version of kvahead ({}) does not know is set",
            T::NAME,
            env!("CARGO_PKG_VERSION")
        )))
    } else {
        Ok(())
    };
    Ok(Given { value, unknown })
}

/// # Safety
///
/// `length` bytes from `pointer` on are readable.
unsafe fn any_set(pointer: *const u8, length: usize) -> bool {
    // SAFETY: the caller's promise.
    (0..length).any(|i| unsafe { pointer.add(i).read() } != 0)
}

/// Writes the defaults into the first `size` bytes; the bytes of fields that this library does not know become
/// zero.
///
/// # Safety
///
/// `pointer` is NULL or points to `size` bytes that may be written to.
pub(super) unsafe fn initialise<T: Options>(pointer: *mut T, size: usize, name: &str) -> Result<()> {
    // SAFETY: the caller's promise is the same.
    unsafe { initialise_with(pointer, size, T::defaults(), name) }
}

/// As [`initialise`], for options that have more than one set of defaults.
///
/// # Safety
///
/// As [`initialise`].
pub(super) unsafe fn initialise_with<T: Options>(pointer: *mut T, size: usize, value: T, name: &str) -> Result<()> {
    check_pointer(pointer, name)?;
    // SAFETY: as `write_sized` asks: not NULL and aligned (just checked), writable (the caller).
    unsafe { write_sized(pointer, size, value, name) }
}

/// Errors where a field that must be zero is not.
pub(super) fn check_reserved(value: u32, name: &str) -> Result<()> {
    if value != 0 {
        return Err(Error::invalid_argument(format!("{name}: reserved is {value}, but must be 0")));
    }
    Ok(())
}

/// Where a struct of results goes, as far as the caller knows its fields.
pub(super) struct OutStruct<T> {
    pointer: *mut T,
    size: usize,
}

impl<T: Sized32> OutStruct<T> {
    /// # Safety
    ///
    /// `pointer` is NULL or points to a `struct_size` and as many writable bytes in all as that says, which nobody
    /// else uses until the results are written.
    pub(super) unsafe fn new(pointer: *mut T, name: &str) -> Result<OutStruct<T>> {
        check_pointer(pointer, name)?;
        // SAFETY: not NULL and aligned (just checked); the first field is a readable u32 (the trait and the caller).
        let size = unsafe { pointer.cast::<u32>().read() } as usize;
        known::<T>(size, name)?;
        Ok(OutStruct { pointer, size })
    }

    /// Writes what the caller knows of `value`, and zero where it knows more; its `struct_size` stays.
    pub(super) fn write(self, value: T) {
        // SAFETY: not NULL and aligned (checked in `new`), `size` bytes writable and nobody else's (promised there).
        let written = unsafe { write_sized(self.pointer, self.size, value, T::NAME) };
        debug_assert!(written.is_ok(), "`new` has checked the size");
    }
}

/// # Safety
///
/// `pointer` is not NULL, aligned, and points to `size` bytes that may be written to.
unsafe fn write_sized<T: Sized32>(pointer: *mut T, size: usize, value: T, name: &str) -> Result<()> {
    let known = known::<T>(size, name)?;
    let bytes = pointer.cast::<u8>();
    // SAFETY: `known` is at most `size_of::<T>()`, the length of `value`, and at most `size`, which the caller says is
    // writable, as are the bytes between the two; the first four are the struct_size (the trait), and every version is
    // that long.
    unsafe {
        ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), bytes, known);
        bytes.add(known).write_bytes(0, size - known);
        pointer.cast::<u32>().write(size as u32);
    }
    Ok(())
}

/// Versions ascend, the last is the whole struct, and each was a struct of its own once, without padding at its end.
pub(super) const fn check_versions(versions: &[usize], size: usize, align: usize) {
    let mut i = 0;
    while i < versions.len() {
        assert!(
            versions[i].is_multiple_of(align),
            "a version ended in padding: a field of the next one would have filled it"
        );
        assert!(i == 0 || versions[i - 1] < versions[i], "versions are listed oldest first");
        i += 1;
    }
    assert!(versions[versions.len() - 1] == size, "the last version ends with the struct's last field");
}

/// Asserts at compile time what [`Sized32`] asks of a layout that the compiler can see.
///
/// `last` names the last field, and nothing comes after it. A struct that has grown lists the last field of each of its
/// versions instead, oldest first: `versions: [capacity: u64, trace_path: *const c_char]`. Entries are only ever added.
macro_rules! sized32 {
    ($type:ident, last: $last:ident: $last_type:ty) => {
        $crate::ffi::options::sized32!($type, versions: [$last: $last_type]);
    };
    ($type:ident, versions: [$($last:ident: $last_type:ty),+]) => {
        const _: () = assert!(std::mem::offset_of!($type, struct_size) == 0);

        // SAFETY: `repr(C)` with integers, floats, raw pointers and optional function pointers only, as can be seen
        // above; the first field and the absence of padding at the end are asserted here and below.
        unsafe impl $crate::ffi::options::Sized32 for $type {
            const NAME: &'static str = stringify!($type);
            const VERSIONS: &'static [usize] = &[$(std::mem::offset_of!($type, $last) + size_of::<$last_type>()),+];
        }

        const _: () = $crate::ffi::options::check_versions(
            <$type as $crate::ffi::options::Sized32>::VERSIONS,
            size_of::<$type>(),
            align_of::<$type>(),
        );
    };
}
pub(super) use sized32;

pub(super) fn switch(value: u32, name: &str) -> Result<bool> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(Error::invalid_argument(format!("{name} is {other}, not 0 or 1"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorCode;

    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct First {
        struct_size: u32,
        threads: u32,
        limit: u64,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Second {
        first: First,
        window: u64,
    }

    // SAFETY: integers only, `struct_size` first, no padding.
    unsafe impl Sized32 for Second {
        const NAME: &'static str = "kva_test_options";
        const VERSIONS: &'static [usize] = &[size_of::<First>(), size_of::<Second>()];
    }

    impl Options for Second {
        fn defaults() -> Second {
            Second { first: First { struct_size: size_of::<Second>() as u32, threads: 2, limit: 3 }, window: 4 }
        }
    }

    /// A caller's memory: `words` of it, the first holding `struct_size` and `threads` as one number.
    fn memory(struct_size: u32, threads: u32, rest: [u64; 4]) -> [u64; 5] {
        let mut first = [0; 8];
        first[..4].copy_from_slice(&struct_size.to_ne_bytes());
        first[4..].copy_from_slice(&threads.to_ne_bytes());
        [u64::from_ne_bytes(first), rest[0], rest[1], rest[2], rest[3]]
    }

    fn read_memory(memory: &[u64]) -> Result<Given<Second>> {
        // SAFETY: the memory is longer than any struct_size that the tests put in it and that is accepted.
        unsafe { read(memory.as_ptr().cast::<Second>(), "options") }
    }

    #[test]
    fn null_is_the_defaults() {
        // SAFETY: NULL is allowed.
        let given = unsafe { read(ptr::null::<Second>(), "options") }.unwrap();
        assert_eq!(given.value, Second::defaults());
        given.unknown.unwrap();
    }

    #[test]
    fn an_older_struct_keeps_the_defaults_of_the_rest() {
        let first = size_of::<First>();
        // Sizes that end within the new field count as the old version: half a field means nothing.
        for size in first..size_of::<Second>() {
            let given = read_memory(&memory(size as u32, 7, [8, 9, 0, 0])).unwrap();
            assert_eq!((given.value.first.threads, given.value.first.limit, given.value.window), (7, 8, 4));
            given.unknown.unwrap();
        }
        let given = read_memory(&memory(size_of::<Second>() as u32, 7, [8, 9, 10, 11])).unwrap();
        assert_eq!(given.value.window, 9);
        given.unknown.unwrap();
    }

    #[test]
    fn a_newer_struct_may_not_ask_for_what_is_unknown() {
        let size = size_of::<Second>() as u32 + 8;
        read_memory(&memory(size, 7, [8, 9, 0, 11])).unwrap().unknown.unwrap();
        let given = read_memory(&memory(size, 7, [8, 9, 10, 0])).unwrap();
        assert_eq!(given.unknown.unwrap_err().code(), ErrorCode::Unsupported);
        assert_eq!(given.value.window, 9, "the known fields are there all the same");
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for size in [0, 3, 4, size_of::<First>() as u32 - 1, LARGEST as u32 + 1, u32::MAX] {
            let error = read_memory(&memory(size, 7, [0; 4])).err().unwrap();
            assert_eq!(error.code(), ErrorCode::InvalidArgument, "struct_size {size}");
            assert!(error.message().contains(&size.to_string()), "{error}");
        }
    }

    #[test]
    fn initialising_and_writing_stay_within_the_size() {
        for size in size_of::<First>()..=4 * 8 {
            let mut memory = [0xffff_ffff_ffff_ffff_u64; 5];
            // SAFETY: the memory is longer than `size`.
            unsafe { initialise(memory.as_mut_ptr().cast::<Second>(), size, "options") }.unwrap();
            let bytes: Vec<u8> = memory.iter().flat_map(|word| word.to_ne_bytes()).collect();
            assert_eq!(bytes[..4], (size as u32).to_ne_bytes());
            assert_eq!(bytes[4..8], 2u32.to_ne_bytes());
            let window = if size >= size_of::<Second>() { 4u64 } else { 0 };
            let rest = bytes[16..size].iter().copied();
            assert!(rest.eq(window.to_ne_bytes().into_iter().chain([0; 64]).take(size - 16)));
            assert!(bytes[size..].iter().all(|&byte| byte == 0xff), "wrote past {size}");
        }
        let mut memory = memory(size_of::<First>() as u32, 0, [0, 77, 0, 0]);
        // SAFETY: the memory is longer than its struct_size.
        let out = unsafe { OutStruct::new(memory.as_mut_ptr().cast::<Second>(), "info") }.unwrap();
        out.write(Second::defaults());
        assert_eq!(memory[1..3], [3, 77]);
        // SAFETY: NULL is allowed, and refused.
        unsafe {
            assert!(initialise(ptr::null_mut::<Second>(), 16, "options").is_err());
            assert!(OutStruct::new(ptr::null_mut::<Second>(), "info").is_err());
        }
    }
}
