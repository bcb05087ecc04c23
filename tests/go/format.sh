#!/bin/sh
# Fails, and says which, where gofmt would change a file.
set -eu
unformatted=$(gofmt -l .)
[ -z "$unformatted" ] || { echo "run gofmt -w on: $unformatted" >&2; exit 1; }
