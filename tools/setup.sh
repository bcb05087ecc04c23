#!/usr/bin/env bash
# Makes sure that the system packages named in tools/packages.txt are there: installs them where this is root and apt
# is there, and otherwise prints the exact line to run. Prints nothing when all is well.
set -euo pipefail
cd "$(dirname "$0")/.."

missing=()
while read -r command package; do
    case $command in '' | '#'*) continue ;; esac
    case $command in
    /*) [ -e "$command" ] || missing+=("$package") ;;
    *) command -v "$command" >/dev/null || missing+=("$package") ;;
    esac
done <tools/packages.txt

if ! command -v cargo >/dev/null; then
    echo "kvahead needs a Rust toolchain, $(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) or newer (cargo is not on the PATH)." >&2
    exit 1
fi
if ! python3 -m venv --help >/dev/null 2>&1 || ! python3 -c 'import ensurepip' >/dev/null 2>&1; then
    missing+=(python3-venv)
fi
[ ${#missing[@]} -eq 0 ] && exit 0

install="apt-get install -y --no-install-recommends ${missing[*]}"
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq && $install
else
    echo "Some system packages are missing. Run this, then make again:" >&2
    echo "    sudo apt-get update && sudo $install" >&2
    exit 1
fi
