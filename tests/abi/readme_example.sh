#!/usr/bin/env bash
# Compiles the C program in README.md, links it and runs it on a checkpoint.
# usage: readme_example.sh README INCLUDE_DIR RUNTIME_DIR CHECKPOINT
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
sed -n '/^```c$/,/^```$/p' "$1" | sed '1d;$d' >"$folder/program.c"
"${CC:-cc}" -std=c11 -Wall -Wextra -Wpedantic -Werror -I"$2" "$folder/program.c" "$3/libkvahead.so" -Wl,-rpath,"$3" -o "$folder/program"
test -n "$("$folder/program" "$4")"
