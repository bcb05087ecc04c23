#!/usr/bin/env python3
"""Compares the binary interface that kvahead.h declares with the one that was recorded last (abidiff of libabigail).

usage: abi_diff.py INCLUDE_DIR RECORDED.abi [--write]

libabigail reads no types of Rust, so the header speaks for the library (tests/header.rs holds the two together): every
declared function is compiled as an empty one, every constant as an enumerator. What may be added without a new SONAME
is allowed: functions, constants, and members at the end of a struct that begins with its size. `--write` records the
present interface.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

APPENDED = """[suppress_type]
  type_kind = struct
  name_regexp = ^kva_
  has_data_member_inserted_at = end
"""


def definitions(header, text):
    """A C file that defines what the header (`text`, without comments and macros) declares."""
    constants = re.findall(r"^#define (KVA_\w+) \(?-?\d", header, re.M)
    functions = re.findall(r"^((?:const )?\w+ \*?kva_\w+\([^;]*\));", text, re.M)
    if len(constants) < 20 or len(functions) < 20:
        sys.exit("kvahead.h does not look as it used to: this script finds too little in it")
    lines = ["#include <kvahead.h>", "#pragma GCC diagnostic ignored \"-Wunused-parameter\""]
    lines += [f"{function} {{ __builtin_trap(); }}" for function in functions]
    lines += ["enum kva_constant {"] + [f"    of_{name} = {name}," for name in constants] + ["};"]
    lines += ["enum kva_constant kva_constants(void) { return 0; }"]
    return "\n".join(lines) + "\n"


def main():
    include, recorded = Path(sys.argv[1]), Path(sys.argv[2])
    compiler = os.environ.get("CC", "cc")
    header = include / "kvahead.h"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        text = subprocess.run([compiler, "-E", "-P", header], check=True, capture_output=True, text=True).stdout
        (folder / "kvahead.c").write_text(definitions(header.read_text(), text))
        library = folder / "libkvahead.so"
        build = [compiler, "-g", "-O0", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libkvahead.so.0", "-o", library]
        subprocess.run([*build, folder / "kvahead.c"], check=True)
        if "--write" in sys.argv[3:]:
            plain = ["--no-corpus-path", "--no-comp-dir-path", "--no-show-locs", "--drop-undefined-syms"]
            subprocess.run(["abidw", *plain, "--out-file", recorded, library], check=True)
            return
        (folder / "appended.suppr").write_text(APPENDED)
        answer = subprocess.run(["abidiff", "--no-added-syms", "--suppressions", folder / "appended.suppr", recorded, library])
        if answer.returncode:
            sys.exit(
                "Programs that were linked before would break. If that is meant, raise the SONAME, and record the interface:\n"
                f"    {sys.argv[0]} {include} {recorded} --write"
            )


main()
