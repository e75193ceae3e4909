#!/usr/bin/env python3
"""fuzz_model_seeds.py OUT - first inputs of tests/fuzz/fuzz_model: the headers of tests/data/models with a small vocabulary.

OUT/NAME is three bytes of options and the header; the fuzz entry makes up the weights. Needs numpy and gguf."""
import os
import sys

import gguf
import numpy as np

N_VOCAB = 24
models = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "data", "models")


def header(path, out, is_stacked=False):
    """The header alone; is_stacked: experts' gate and up in one tensor."""
    r = gguf.GGUFReader(path)
    f = {k: v for k, v in r.fields.items() if not k.startswith("GGUF.")}
    w = gguf.GGUFWriter(out, f["general.architecture"].contents())
    for key, v in f.items():
        value = v.contents()
        if key in ("general.architecture", "tokenizer.chat_template"):
            continue
        if key.startswith("tokenizer.ggml.") and isinstance(value, list):
            value = value[32:32 + N_VOCAB] if key != "tokenizer.ggml.merges" else ["B C"]
        if key.endswith("_token_id"):
            value = 1
        if key.endswith(".vocab_size"):
            value = N_VOCAB
        sub = v.types[1] if len(v.types) > 1 else None
        w.add_key_value(key, value, v.types[0], sub)
    for t in r.tensors:
        shape = [int(x) for x in reversed(t.shape)]
        if t.name in ("token_embd.weight", "output.weight", "output.bias"):
            shape[0] = N_VOCAB
        name = t.name
        if is_stacked and name.endswith("ffn_up_exps.weight"):
            continue
        if is_stacked and name.endswith("ffn_gate_exps.weight"):
            name = name.replace("gate_exps", "gate_up_exps")
            shape[1] *= 2
        dtype, raw = np.dtype(np.float32), None
        if t.tensor_type != gguf.GGMLQuantizationType.F32:
            shape = gguf.quant_shape_to_byte_shape(shape, t.tensor_type)
            dtype, raw = np.dtype(np.uint8), t.tensor_type
        w.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize, raw_dtype=raw)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    w.close()


os.makedirs(sys.argv[1], exist_ok=True)
names = sorted(n[:-5] for n in os.listdir(models) if n.endswith(".gguf"))
seeds = [(n, n, False, i % 4) for i, n in enumerate(names) if n != "mixed"]
seeds += [("mixed-%d" % weights, "mixed", False, weights) for weights in range(4)] + [("stacked", "qwen3moe", True, 1)]
for i, (seed, name, is_stacked, weights) in enumerate(seeds):
    out = os.path.join(sys.argv[1], seed)
    header(os.path.join(models, name + ".gguf"), out, is_stacked)
    data = open(out, "rb").read()
    with open(out, "wb") as f:
        f.write(bytes([weights + 128 * (i % 2), i, i % 4 + 16]) + data)
