#!/bin/sh
# tree.sh PREFIX MODEL: the installed tree has the links that loaders and linkers look for, and works where it is moved to.
set -eu
prefix=$1 model=$2
fail() { echo "tree.sh: $*" >&2; exit 1; }

library=$(find "$prefix" -name 'libkvahead.so')
[ -L "$library" ] || fail "libkvahead.so is not a link"
[ "$(readlink "$library")" = libkvahead.so.0 ] || fail "libkvahead.so leads to $(readlink "$library")"
real=$(readlink "$library.0")
case $real in libkvahead.so.0.[0-9]*.[0-9]*) ;; *) fail "libkvahead.so.0 leads to $real" ;; esac
[ -f "$library.0" ] && [ ! -L "$(dirname "$library")/$real" ] || fail "$real is not a file"
readelf -d "$library" | grep -q 'SONAME.*\[libkvahead\.so\.0\]' || fail "the SONAME is not libkvahead.so.0"

moved=$(mktemp -d)
trap 'rm -rf "$moved"' EXIT
cp -a "$prefix/." "$moved"
PKG_CONFIG_PATH=$(dirname "$(find "$moved" -name kvahead.pc)") pkg-config --cflags kvahead | grep -q "$moved" ||
  fail "kvahead.pc does not follow the tree"
"$moved/bin/kva-generate" --model "$model" --prompt Hello -n 2 >/dev/null
