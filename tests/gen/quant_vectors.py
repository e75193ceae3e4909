#!/usr/bin/env python3
"""Writes tests/data/quant/: blocks with the floats that the numpy code of the `gguf` package (0.19) makes of them.

Usage: tests/gen/quant_vectors.py [DIR]

NAME.blocks  a few blocks: ordinary ones (random codes, scales near 1), all bits set, and random bytes throughout
NAME.f32     what they stand for, raw little-endian float32
floats.f32   eight runs of 256 floats of different kinds
NAME.packed  those, quantized, for the types that the package can quantize
sums         a line a type: name, id, elements and bytes per block, then a checksum of the floats of many random blocks and
             one of the blocks of many random floats ("-" where the package has no quantizer); the test makes the same
             random bytes and floats, so that every code-book entry is met without storing it

All 26 types have a numpy dequantizer in that version."""
import re
import struct
import sys
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

TREE = Path(__file__).resolve().parent.parent.parent
MASK = (1 << 64) - 1
N_SUM_BYTES = 1 << 17    # random bytes per type behind the first checksum, rounded down to whole blocks
N_SUM_FLOATS = 256 * 256  # random floats behind the second

# Bytes at which a half lies in the block, for types where ordinary blocks are to have ordinary scales.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2],
    "Q5_K": [0, 2], "Q6_K": [208], "IQ2_XXS": [0], "IQ2_XS": [0], "IQ3_XXS": [0], "IQ1_S": [0], "IQ4_NL": [0], "IQ3_S": [0],
    "IQ2_S": [0], "IQ4_XS": [0], "TQ1_0": [52], "TQ2_0": [64], "F16": [0],
}


def types():
    row = re.compile(r'^T\((\w+), "(\w+)", (\d+), (\d+), (\d+), ', re.M)
    for name, text, gguf_id, n, n_bytes in row.findall((TREE / "quant/types.def").read_text()):
        kind = GGMLQuantizationType(int(gguf_id))
        assert kind.name == name == text and GGML_QUANT_SIZES[kind] == (int(n), int(n_bytes)), name
        yield name, kind, int(n), int(n_bytes)


class Words:
    """splitmix64 (Steele, Lea, Flood 2014), as in the test."""

    def __init__(self, seed):
        self.state = seed

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    def bytes(self, n):
        return b"".join(struct.pack("<Q", self.next()) for _ in range((n + 7) // 8))[:n]


def random_floats(n, seed):
    """Runs of 256 of one magnitude each; all values are exact in float32."""
    words, out = Words(seed), np.empty(n, np.float32)
    for run in range(n // 256):
        w = words.next()
        scale = 2.0 ** (w % 24 - 33)
        shift = 100000 if w >> 32 & 3 == 0 else 0
        if w >> 40 & 15 == 0:
            scale = 0.0
        for k in range(256):
            w = words.next()
            total = (w & 0xFFFF) + (w >> 16 & 0xFFFF) + (w >> 32 & 0xFFFF) + (w >> 48) - 131070
            out[run * 256 + k] = (total + shift) * scale + 0.0  # no -0: which of the two a minimum is depends on the CPU
    return out


def checksum(words):
    h = 0xCBF29CE484222325
    for w in words.tolist():
        h = ((h ^ w) * 0x100000001B3) & MASK
    return h


def float_words(x):
    bits = x.view(np.uint32).copy()
    bits[np.isnan(x)] = 0x7FC00000
    return bits


def dequantize(raw, kind):
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(quants.dequantize(np.frombuffer(raw, np.uint8).reshape(1, -1), kind)).reshape(-1)


def quantize(x, kind):
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(quants.quantize(x.reshape(1, -1), kind)).view(np.uint8).reshape(-1)


def small_blocks(name, n, n_bytes, rng):
    n_blocks = {1: 64, 32: 8}.get(n, 4)
    blocks = rng.integers(0, 256, (n_blocks, n_bytes), dtype=np.uint8)
    ordinary = blocks[:n_blocks // 2]
    for at in HALVES.get(name, []):
        d = rng.uniform(0.25, 2.0, len(ordinary)).astype(np.float16)
        ordinary[:, at:at + 2] = d.view(np.uint8).reshape(-1, 2)
    if name == "MXFP4":
        ordinary[:, 0] = rng.integers(110, 140, len(ordinary))
    if name == "NVFP4":
        ordinary[:, :4] = rng.integers(0x20, 0x50, (len(ordinary), 4))
    if name == "IQ1_M":  # the half 0x3xxx, its top nibble in the last word
        ordinary[:, 55] = ordinary[:, 55] & 0x0F | 0x30
    blocks[n_blocks // 2] = 0xFF
    return blocks.tobytes()


def sample_floats(rng):
    runs = [
        np.zeros(256), np.full(256, 0.7), np.full(256, -3.0), rng.standard_normal(256) * 0.02,
        rng.standard_normal(256) * 3 + 5, np.where(np.arange(256) % 67 == 13, 40.0, rng.standard_normal(256) * 0.1),
        rng.uniform(-1e-6, 1e-6, 256), np.linspace(-8, 8, 256),
    ]
    return np.concatenate(runs).astype(np.float32)


def main():
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else TREE / "tests/data/quant"
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(20)
    floats = sample_floats(rng)
    (out / "floats.f32").write_bytes(floats.tobytes())
    many = random_floats(N_SUM_FLOATS, 7)
    lines = []
    for name, kind, n, n_bytes in types():
        raw = small_blocks(name, n, n_bytes, rng)
        (out / f"{name}.blocks").write_bytes(raw)
        (out / f"{name}.f32").write_bytes(dequantize(raw, kind).tobytes())
        raw = Words(int(kind)).bytes(N_SUM_BYTES // n_bytes * n_bytes)
        to_sum = "%016x" % checksum(float_words(dequantize(raw, kind)))
        try:
            (out / f"{name}.packed").write_bytes(quantize(floats, kind).tobytes())
            from_sum = "%016x" % checksum(quantize(many, kind))
        except NotImplementedError:
            from_sum = "-"
        lines.append(f"{name} {int(kind)} {n} {n_bytes} {to_sum} {from_sum}\n")
    (out / "sums").write_text("".join(lines))


main()
