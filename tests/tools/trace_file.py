"""Trace files as the library writes them, from Python values."""

import struct


def record(step, layer, head, candidates, selected, missed):
    counts = (candidates, len(selected), len(selected) - len(missed), len(missed))
    return struct.pack("<IHH4I", step, layer, head, *counts) + struct.pack(
        f"<{len(selected) + len(missed)}I", *selected, *missed
    )


def trace(layers, heads, records, magic=b"KVATRACE", version=1):
    return magic + struct.pack("<4I", version, layers, heads, 0) + b"".join(records)
