#!/usr/bin/env python3
"""Compiles kernels/*.cu to kernels/ptx/*.ptx with NVRTC; needs no GPU and no CUDA toolkit.

    tools/kernels/compile.py            writes the PTX, to be committed
    tools/kernels/compile.py --check    compiles again and says whether the committed PTX is of these sources: what CI runs

NVRTC does not write the same bytes every time (register numbers differ), so PTX is not compared with PTX: its first line
is a digest of the source, the headers, the options and the compiler's version, and that and the kernels' names must agree.
Both commands also assemble what is committed, as each kind of device gets it, so that no driver is the first to read it.

The compiler comes from PyPI, in a version old enough that drivers of the last two years load its PTX (12.4 writes PTX 8.4,
which driver 550 and later read), and is kept in .cache/kernels.
"""

import argparse
import ctypes
import hashlib
import pathlib
import re
import subprocess
import sys
import tempfile
import venv

ROOT = pathlib.Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
VENV = ROOT / ".cache" / "kernels"
PACKAGES = ["nvidia-cuda-nvrtc-cu12==12.4.127", "nvidia-cuda-runtime-cu12==12.4.127"]
# The assembler that reads what they write.
ASSEMBLER = ["nvidia-cuda-nvcc-cu12==12.4.131"]
# The lowest compute capability that is supported: PTX runs on every later one.
OPTIONS = ["--gpu-architecture=compute_80", "--std=c++17", "--device-as-default-execution-space"]


def toolchain():
    """The NVRTC library, the folder of CUDA's headers, and the assembler."""

    def found(pattern):
        return sorted(VENV.glob(f"lib/python3*/site-packages/nvidia/{pattern}"))

    if not (found("cuda_nvrtc/lib/libnvrtc.so.12") and found("cuda_runtime/include") and found("cuda_nvcc/bin/ptxas")):
        venv.create(VENV, with_pip=True)
        pip = [VENV / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *PACKAGES, *ASSEMBLER], check=True)
    return found("cuda_nvrtc/lib/libnvrtc.so.12")[0], found("cuda_runtime/include")[0], found("cuda_nvcc/bin/ptxas")[0]


class Nvrtc:
    """The few calls of NVRTC that compiling takes."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(self, name, *arguments):
        status = getattr(self.library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name}: {self.library.nvrtcGetErrorString(status).decode()}")

    def text(self, size, get, program):
        length = ctypes.c_size_t()
        self.call(size, program, ctypes.byref(length))
        text = ctypes.create_string_buffer(length.value)
        self.call(get, program, text)
        return text.value.decode()

    def compile(self, source, options):
        """The PTX of a source file; a RuntimeError with the compiler's messages if it has errors or warnings."""
        program = ctypes.c_void_p()
        self.call(
            "nvrtcCreateProgram", ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None
        )
        flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = self.library.nvrtcCompileProgram(program, len(options), flags)
        log = self.text("nvrtcGetProgramLogSize", "nvrtcGetProgramLog", program).strip()
        if status or log:
            raise RuntimeError(log or f"{source.name}: error {status}")
        return self.text("nvrtcGetPTXSize", "nvrtcGetPTX", program)


def stamp(source):
    """The first line of the PTX of a source."""
    digest = hashlib.sha256(repr([*PACKAGES, *OPTIONS]).encode())
    for path in [source, *sorted(KERNELS.glob("*.cuh"))]:
        digest.update(path.read_bytes())
    return f"// sources: {digest.hexdigest()}\n"


def entries(ptx):
    """The names of the kernels in a PTX text."""
    return sorted(re.findall(r"\.entry (\w+)", ptx))


def is_current(committed, stamped, ptx):
    """Whether the committed text is of the sources that `ptx` was compiled from."""
    return committed.startswith(stamped) and entries(committed) == entries(ptx)


def variants(ptx):
    """A PTX text as devices get it, by compute capability (src/backend/cuda/kernels.rs makes them)."""
    hopper = ptx.replace("//sm_90 ", "").replace(".target sm_80", ".target sm_90")
    return {"sm_80": ptx} | ({"sm_90": hopper} if "//sm_90 " in ptx else {})


def assemble(ptxas, ptx, device):
    """What the assembler finds wrong with a PTX text; whether it is fast code does not matter here."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-O0", f"-arch={device}", file.name, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip() if done.returncode else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed PTX instead of writing it")
    arguments = parser.parse_args()

    library, headers, ptxas = toolchain()
    nvrtc = Nvrtc(library)
    options = [*OPTIONS, f"--include-path={headers}", f"--include-path={KERNELS}"]
    failed = False
    sources = sorted(KERNELS.glob("*.cu"))
    for source in sources:
        try:
            ptx = nvrtc.compile(source, options)
        except RuntimeError as error:
            print(f"{source.relative_to(ROOT)}:\n{error}", file=sys.stderr)
            failed = True
            continue
        target = KERNELS / "ptx" / f"{source.stem}.ptx"
        current = target.exists() and is_current(target.read_text(), stamp(source), ptx)
        if not current and not arguments.check:
            target.write_text(stamp(source) + ptx)
            current = True
        for device, text in variants(target.read_text() if current else ptx).items():
            if wrong := assemble(ptxas, text, device):
                print(f"{target.relative_to(ROOT)} for {device}:\n{wrong}", file=sys.stderr)
                failed = True
        if not current:
            print(f"{target.relative_to(ROOT)} is not what {source.name} compiles to: run {sys.argv[0]}", file=sys.stderr)
            failed = True
    stale = {path.stem for path in (KERNELS / "ptx").glob("*.ptx")} - {source.stem for source in sources}
    for name in sorted(stale):
        print(f"kernels/ptx/{name}.ptx has no source", file=sys.stderr)
        failed = True
    if failed:
        sys.exit(1)
    print(f"{len(sources)} kernels {'are as committed' if arguments.check else 'compiled'}")


if __name__ == "__main__":
    main()
