//! The header, the list of exports and the library say the same thing.
//!
//! `KVAHEAD_UPDATE_HEADER=1 cargo test --test header` writes the header anew.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The library that cargo built together with this test.
fn library() -> PathBuf {
    let directory = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let library = directory.join("libkvahead.so");
    assert!(library.exists(), "{} is not there", library.display());
    library
}

fn run(program: &str, arguments: &[&str], file: &Path) -> String {
    let output = Command::new(program).args(arguments).arg(file).output();
    let output = output.unwrap_or_else(|error| panic!("cannot run {program} (package binutils): {error}"));
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The names of the functions that the header declares.
fn declared() -> BTreeSet<String> {
    let header = read("include/kvahead.h");
    let declarations = header.lines().filter(|line| !line.starts_with([' ', '/', '#', '}']) && line.contains('('));
    let names = declarations.filter(|line| !line.starts_with("typedef")).map(|line| {
        let before = line.split('(').next().unwrap();
        before.rsplit([' ', '*']).next().unwrap().to_owned()
    });
    names.collect()
}

fn listed() -> Vec<String> {
    read("tests/abi/exports.txt").lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
}

#[test]
fn the_header_is_what_cbindgen_makes() {
    let config = cbindgen::Config::from_file(root().join("cbindgen.toml")).unwrap();
    let builder = cbindgen::Builder::new().with_config(config).with_src(root().join("src/ffi/mod.rs"));
    let mut header = Vec::new();
    builder.generate().expect("cbindgen refuses src/ffi").write(&mut header);
    let header = String::from_utf8(header).unwrap();
    if std::env::var_os("KVAHEAD_UPDATE_HEADER").is_some() {
        std::fs::write(root().join("include/kvahead.h"), &header).unwrap();
    }
    // Not `assert_eq!`: it would print both headers on one line each.
    let same = header == read("include/kvahead.h");
    assert!(same, "include/kvahead.h is stale: KVAHEAD_UPDATE_HEADER=1 cargo test --test header");
}

#[test]
fn the_header_declares_what_is_listed() {
    let listed = listed();
    assert!(listed.is_sorted(), "tests/abi/exports.txt is not sorted");
    assert_eq!(declared(), listed.into_iter().collect());
}

#[test]
fn the_library_exports_what_is_listed() {
    let symbols = run("nm", &["--dynamic", "--defined-only", "--format=posix"], &library());
    let exported: BTreeSet<_> = symbols.lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect();
    assert_eq!(exported, listed().into_iter().collect());
}

#[test]
fn the_library_is_bound_by_its_soname_and_needs_the_system_only() {
    let dynamic = run("readelf", &["--dynamic", "--wide"], &library());
    let values = |tag: &str| -> Vec<String> {
        let lines = dynamic.lines().filter(|line| line.contains(tag));
        lines.filter_map(|line| Some(line.split_once('[')?.1.split_once(']')?.0.to_owned())).collect()
    };
    assert_eq!(values("(SONAME)"), ["libkvahead.so.0"]);
    let system = ["libc.", "libm.", "libgcc_s.", "libpthread.", "libdl.", "ld-linux"];
    for needed in values("(NEEDED)") {
        assert!(system.iter().any(|name| needed.starts_with(name)), "the library needs {needed}");
    }
}

#[test]
fn the_header_has_the_version_of_the_package() {
    let header = read("include/kvahead.h");
    let value = |name: &str| {
        let line = header.lines().find_map(|line| line.strip_prefix("#define ")?.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name}")).trim_matches('"').to_owned()
    };
    let parts = ["MAJOR", "MINOR", "PATCH"].map(|part| value(&format!("KVA_VERSION_{part}")));
    assert_eq!(parts.join("."), env!("CARGO_PKG_VERSION"));
    assert_eq!(value("KVA_VERSION"), env!("CARGO_PKG_VERSION"));
}
