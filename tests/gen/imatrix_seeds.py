#!/usr/bin/env python3
"""imatrix_seeds.py DIR - first inputs for tests/fuzz/fuzz_imatrix (tests/fuzz/corpus/imatrix): both forms, whole and broken."""
import os
import struct
import sys

NAMES = ("blk.0.attn_k.weight", "blk.0.ffn_up_exps.weight")


def text(s):
    return struct.pack("<Q", len(s)) + s.encode()


def dat(entries, tail):
    out = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii%df" % len(values), calls, len(values), *values)
    return out + tail


def gguf(tensors, keys=()):
    head, data = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys)) + b"".join(keys), b""
    for name, shape, values in tensors:
        head += text(name) + struct.pack("<I%dQIQ" % len(shape), len(shape), *shape, 0, len(data))
        data += struct.pack("<%df" % len(values), *values)
        data += b"\0" * (-len(data) % 32)
    return head + b"\0" * (-len(head) % 32) + data


def main():
    out = sys.argv[1]
    entries = [(NAMES[0], 2, [1.0, 2.0, 3.0, 4.0]), (NAMES[1], 1, [0.5] * 6)]
    tail = struct.pack("<ii", 3, 5) + b"a.txt"
    keys = (text("imatrix.chunk_count") + struct.pack("<II", 4, 3),
            text("imatrix.datasets") + struct.pack("<IIQ", 9, 8, 1) + text("a.txt"))
    sums = [(NAMES[0] + ".in_sum2", (4, 1), [1.0, 2.0, 3.0, 4.0]), (NAMES[0] + ".counts", (1, 1), [2.0]),
            (NAMES[1] + ".in_sum2", (2, 3), [0.5] * 6), (NAMES[1] + ".counts", (1, 3), [1.0, 0.0, 4.0])]
    seeds = {
        "dat": dat(entries, tail), "dat-no-tail": dat(entries, b""), "dat-no-dataset": dat(entries, tail[:4]),
        "dat-cut": dat(entries, tail)[:60], "dat-twice": dat([entries[0], entries[0]], tail), "dat-nan": dat([(NAMES[0], 1, [float("nan")])], tail),
        "dat-negative": dat([(NAMES[0], 1, [-1.0])], tail), "dat-no-entries": dat([], tail), "dat-calls-negative": dat([(NAMES[0], -3, [1.0])], tail),
        "dat-huge-count": struct.pack("<i", 0x7FFFFFFF), "dat-huge-name": struct.pack("<ii", 1, 0x7FFFFFFF),
        "dat-huge-values": struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 0x40000000),
        "gguf": gguf(sums, keys), "gguf-no-keys": gguf(sums), "gguf-no-counts": gguf(sums[:1]), "gguf-no-sums": gguf(sums[1:2]),
        "gguf-counts-do-not-divide": gguf([sums[0], (NAMES[0] + ".counts", (1, 3), [1.0, 1.0, 1.0])]),
        "gguf-infinite": gguf([(NAMES[0] + ".in_sum2", (1, 1), [float("inf")]), (NAMES[0] + ".counts", (1, 1), [1.0])]),
        "gguf-dataset-is-a-number": gguf(sums, (text("imatrix.datasets") + struct.pack("<II", 4, 3),)),
        "gguf-cut": gguf(sums, keys)[:-40], "empty": b"", "three": b"\1\0\0",
    }
    for name, raw in seeds.items():
        with open(os.path.join(out, name), "wb") as f:
            f.write(raw)


main()
