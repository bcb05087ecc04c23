#!/bin/sh
# run.sh PREFIX COMMAND...: runs COMMAND with the environment that cgo needs to find the package installed in PREFIX.
set -eu
prefix=$1
shift
export PKG_CONFIG_PATH="$(dirname "$(find "$prefix" -name kvahead.pc)")"
export CGO_LDFLAGS="-Wl,-rpath,$(pkg-config --variable=libdir kvahead)"
exec "$@"
