#!/usr/bin/env python3
"""Write F16 and BF16 copies of a quantized GGUF, for peers that have no use for its quantization.

Every tensor is dequantized to f32 and rounded to nearest even; one-dimensional tensors (norms, biases)
stay F32, as llama.cpp's own converter leaves them. Metadata is carried over field by field; only
general.file_type changes. Each file is read back and compared before the next one is begun.

The F16 and the BF16 file hold the *quantized* model's values, so they measure speed and agreement
between engines, not the quality of the unquantized checkpoint.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from gguf import (
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
)
from gguf.quants import dequantize, quantize

# Name -> (tensor type, general.file_type, largest relative rounding error, smallest normal number).
TARGETS = {
    "F16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16, 2.0**-11, 2.0**-14),
    "BF16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16, 2.0**-8, 2.0**-126),
}

# Written by GGUFWriter itself: the container's header fields and the architecture.
WRITER_FIELDS = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture")


def tensor_target(tensor, target):
    return GGMLQuantizationType.F32 if len(tensor.shape) == 1 else target


def convert(source, target, file_type, path):
    """Write `source` (a GGUFReader) to `path` with matrices of type `target`."""
    writer = GGUFWriter(path, source.fields["general.architecture"].contents())
    for field in source.fields.values():
        if field.name in WRITER_FIELDS:
            continue
        if field.name == "general.alignment":
            writer.add_custom_alignment(field.contents())
            continue
        value = int(file_type) if field.name == "general.file_type" else field.contents()
        element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], sub_type=element)
    for tensor in source.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        kind = tensor_target(tensor, target)
        writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def verify(source, path, target, file_type, tolerance, smallest_normal):
    """Read `path` back; raise ValueError unless it is `source` rounded to `target`. Return the largest relative error."""
    copy = GGUFReader(path)
    if list(copy.fields) != list(source.fields):
        raise ValueError(f"{path}: metadata fields differ: {set(copy.fields) ^ set(source.fields) or 'order'}")
    for name, field in source.fields.items():
        expected = int(file_type) if name == "general.file_type" else field.contents()
        if copy.fields[name].types != field.types or copy.fields[name].contents() != expected:
            raise ValueError(f"{path}: metadata field {name} differs")
    if [t.name for t in copy.tensors] != [t.name for t in source.tensors]:
        raise ValueError(f"{path}: tensor names differ")

    worst = 0.0
    for ours, theirs in zip(copy.tensors, source.tensors):
        if ours.tensor_type != tensor_target(theirs, target) or list(ours.shape) != list(theirs.shape):
            raise ValueError(f"{path}: {ours.name} is {ours.tensor_type.name} {list(ours.shape)}")
        expected = dequantize(theirs.data, theirs.tensor_type)
        # Below the smallest normal number the error is absolute, not relative.
        scale = np.maximum(np.abs(expected), smallest_normal)
        error = float(np.max(np.abs(dequantize(ours.data, ours.tensor_type) - expected) / scale))
        if not error <= tolerance:
            raise ValueError(f"{path}: {ours.name}: relative error {error:.3g} > {tolerance:.3g}")
        worst = max(worst, error)
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the quantized GGUF")
    parser.add_argument("folder", type=Path, help="where the copies go; made when missing")
    parser.add_argument("--types", nargs="+", choices=TARGETS, default=list(TARGETS))
    arguments = parser.parse_args()

    arguments.folder.mkdir(parents=True, exist_ok=True)
    source = GGUFReader(arguments.source)
    # "Model.Q4_1.gguf" -> "Model"
    stem = arguments.source.name.removesuffix(".gguf").rpartition(".")[0] or arguments.source.stem
    for name in arguments.types:
        target, file_type, tolerance, smallest_normal = TARGETS[name]
        path = arguments.folder / f"{stem}.{name}.gguf"
        partial = path.with_suffix(".partial")
        convert(source, target, file_type, partial)
        worst = verify(source, partial, target, file_type, tolerance, smallest_normal)
        partial.rename(path)
        print(f"{path}: {len(source.tensors)} tensors, largest relative error {worst:.3g}")


if __name__ == "__main__":
    sys.exit(main())
