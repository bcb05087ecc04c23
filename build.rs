//! Gives the shared library its SONAME: programs are bound to the ABI (0), not to a file name.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let target = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    if target != "macos" && target != "windows" {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libkvahead.so.0");
    }
}
