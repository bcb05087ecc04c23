"""Trace files as the library writes them, from Python values."""

import struct


def record(step, layer, head, candidates, selected, missed, corrected=()):
    counts = (candidates, len(selected), len(selected) - len(missed), len(missed), len(corrected))
    rows = (*selected, *missed, *corrected)
    return struct.pack("<IHH5I", step, layer, head, *counts) + struct.pack(f"<{len(rows)}I", *rows)


def trace(layers, heads, records, magic=b"KVATRACE", version=2):
    return magic + struct.pack("<4I", version, layers, heads, 0) + b"".join(records)
