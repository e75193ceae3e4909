#!/usr/bin/env python3
"""What `ferry quantize` is measured with, beside llama-quantize.

  quantize.py source MODEL OUT          a 16-bit model with MODEL's weights: quantized ones are spread evenly over the step that
                                        rounding took from them, so that no quantizer finds the old grid again
  quantize.py imatrix MODEL IDS OUT     importance of columns by the float reference (reference.py); OUT.gguf or OUT.dat
  quantize.py compare SOURCE IMATRIX FILE...   error of FILE's tensors, type by type: sqrt(sum w (x - y)^2 / sum w x^2), with w from
                                        IMATRIX (a .gguf; "-": 1 throughout), and the same for each tensor against the first FILE

Needs numpy and the `gguf` package.
"""
import struct
import sys

import gguf
import numpy as np
from gguf.quants import dequantize

import reference

F32 = np.float32


def floats(t):
    """All of a tensor, (rows, columns)."""
    return dequantize(t.data, t.tensor_type).astype(F32, copy=False).reshape(-1, int(t.shape[0]))


# ---- source ----

def spread(x, rng):
    """Uniform noise as wide as the steps of 32 elements in a row, which 4 bits leave 15 of."""
    g = x.reshape(-1, 32)
    step = (g.max(axis=1, keepdims=True) - g.min(axis=1, keepdims=True)) / 15
    return (g + step * (rng.random(g.shape, dtype=F32) - F32(0.5))).reshape(x.shape).astype(F32)


def source(model, out):
    r, rng = gguf.GGUFReader(model), np.random.default_rng(1)
    w = gguf.GGUFWriter(out, r.fields["general.architecture"].contents())
    for name, f in r.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = f.types[0]
        w.add_key_value(name, f.contents(), kind, f.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    w.add_uint32("general.file_type", 1)
    for t in r.tensors:
        x = floats(t)
        if len(t.shape) > 1 and t.tensor_type not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            x = spread(x, rng).astype(np.float16)
        w.add_tensor(t.name, x.reshape([int(n) for n in reversed(t.shape)]))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


# ---- imatrix ----

class Watched(reference.Model):
    """Keeps the sum of squares of what each weight is multiplied with."""

    def __init__(self, path):
        super().__init__(path)
        self.sums = {}

    def linear(self, x, name, extras=("scale", "bias")):
        key = name + ".weight"
        s = np.sum(x.astype(np.float64) ** 2, axis=0)
        old = self.sums.get(key, (0.0, 0))
        self.sums[key] = (old[0] + s, old[1] + len(x))
        return super().linear(x, name, extras)


def write_dat(path, sums, dataset):
    with open(path, "wb") as f:
        f.write(struct.pack("<i", len(sums)))
        for name, (s, n) in sorted(sums.items()):
            raw = name.encode()
            f.write(struct.pack("<i", len(raw)) + raw + struct.pack("<ii", 1, len(s)) + (s / n).astype("<f4").tobytes())
        raw = dataset.encode()
        f.write(struct.pack("<ii", 1, len(raw)) + raw)


def write_gguf(path, sums, dataset):
    w = gguf.GGUFWriter(path, "imatrix")
    w.add_string("general.type", "imatrix")
    w.add_array("imatrix.datasets", [dataset])
    w.add_uint32("imatrix.chunk_count", 1)
    w.add_uint32("imatrix.chunk_size", 512)
    for name, (s, n) in sorted(sums.items()):
        w.add_tensor(name + ".in_sum2", s.astype(F32).reshape(1, -1))
        w.add_tensor(name + ".counts", np.array([[n]], F32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def imatrix(model, ids, out):
    m = Watched(model)
    m.logits(reference.read_ids(ids))
    (write_dat if out.endswith(".dat") else write_gguf)(out, m.sums, ids.lstrip("@"))


# ---- compare ----

def importance(path):
    if path == "-":
        return {}
    t = {x.name: x for x in gguf.GGUFReader(path).tensors}
    return {n[:-8]: np.asarray(x.data, np.float64).reshape(-1) for n, x in t.items() if n.endswith(".in_sum2")}


def compare(src, weights, files):
    a, w = {t.name: t for t in gguf.GGUFReader(src).tensors}, importance(weights)
    readers = [{t.name: t for t in gguf.GGUFReader(f).tensors} for f in files]
    total, worse = {}, [0] * len(files)
    for name, t in a.items():
        if len(t.shape) < 2 or readers[0][name].tensor_type == t.tensor_type:
            continue
        types = [r[name].tensor_type.name for r in readers]
        if len(set(types)) > 1:
            print("%s: types differ: %s" % (name, " ".join(types)))
            continue
        x = floats(t)
        columns = w.get(name, np.ones(x.shape[1]))
        scale = float(np.sum((x.astype(F32) ** 2).sum(axis=0, dtype=np.float64) * columns))
        errors = [float(np.sum(((floats(r[name]) - x) ** 2).sum(axis=0, dtype=np.float64) * columns)) for r in readers]
        sums = total.setdefault(types[0], [0, 0.0, [0.0] * len(files)])
        sums[0] += 1
        sums[1] += scale
        for i, e in enumerate(errors):
            sums[2][i] += e
            worse[i] += e < errors[0] * (1 - 1e-6)
    for kind, (n, scale, errors) in sorted(total.items()):
        print("%-7s %4d tensors  %s" % (kind, n, "  ".join("%.5f" % (e / scale) ** 0.5 for e in errors)))
    print("tensors where the first file is worse than file i:", worse[1:])


def main():
    if len(sys.argv) == 4 and sys.argv[1] == "source":
        source(*sys.argv[2:])
    elif len(sys.argv) == 5 and sys.argv[1] == "imatrix":
        imatrix(*sys.argv[2:])
    elif len(sys.argv) > 4 and sys.argv[1] == "compare":
        compare(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
