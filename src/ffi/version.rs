//! Which version this is.

use std::ffi::c_char;

/// Major part of the version of this header. Versions with the same SONAME (`libkvahead.so.0`) can replace each
/// other.
pub const KVA_VERSION_MAJOR: u32 = 0;
/// Minor part of the version of this header.
pub const KVA_VERSION_MINOR: u32 = 1;
/// Patch part of the version of this header.
pub const KVA_VERSION_PATCH: u32 = 0;

/// The version of the library that is loaded, as "MAJOR.MINOR.PATCH"; compare with `KVA_VERSION`, the header's.
///
/// Ownership: a static string, never freed. Threads: any. Errors: none.
#[unsafe(no_mangle)]
pub extern "C" fn kva_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}
