#!/bin/sh
# pkg_config.sh PREFIX SOURCE PROGRAM MODEL: builds SOURCE with what pkg-config says about the package in PREFIX, and runs it.
set -eu
prefix=$1 source=$2 program=$3 model=$4
export PKG_CONFIG_PATH="$(dirname "$(find "$prefix" -name kvahead.pc)")"
pkg-config --exists --print-errors 'kvahead >= 0.1.0'
# shellcheck disable=SC2046  # flags are words
${CXX:-c++} -std=c++17 -Wall -Wextra -Werror $(pkg-config --cflags kvahead) "$source" -o "$program" \
  $(pkg-config --libs kvahead) "-Wl,-rpath,$(pkg-config --variable=libdir kvahead)"
"$program" "$model"
