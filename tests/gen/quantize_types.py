#!/usr/bin/env python3
"""Which type llama-quantize gives each tensor: the truth that recipe.c is held against.

  quantize_types.py LLAMA_QUANTIZE OUT_DIR     (tests/data/quantize)

Writes OUT_DIR/types: per line a model, a file type, 0 or 1 for an importance matrix, a kind of tensor and a letter per layer
(or one). Models are made up here, of zeros, and again by the test: 32 layers of rows of 256, all matrices of 32 rows. They
differ in heads that share keys and values, in experts, and in tied embeddings. Needs the `gguf` package.
"""
import os
import re
import subprocess
import sys
import tempfile

import gguf
import numpy as np

N_LAYER = 32
MODELS = {  # heads, heads of keys, experts, output.weight
    "gqa": (32, 8, 0, True),
    "mha-tied": (32, 32, 0, False),
    "moe8": (32, 8, 8, True),
    "moe16": (32, 8, 16, True),
}
KINDS = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
TYPES = ["Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_1", "Q5_K_S", "Q5_K_M",
         "Q6_K", "Q8_0", "MXFP4_MOE", "F16", "BF16", "F32"]
LETTERS = {"f32": "f", "f16": "h", "bf16": "b", "q2_K": "2", "q3_K": "3", "q4_K": "4", "q5_K": "5", "q6_K": "6", "q8_0": "8", "q4_0": "p",
           "q4_1": "q", "q5_0": "r", "q5_1": "s", "iq4_nl": "n", "iq4_xs": "x", "mxfp4": "m"}


def make_model(path, n_head, n_kv, n_expert, has_output):
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(N_LAYER)
    w.add_context_length(64)
    w.add_embedding_length(256)
    w.add_feed_forward_length(256)
    w.add_head_count(n_head)
    w.add_head_count_kv(n_kv)
    w.add_layer_norm_rms_eps(1e-5)
    if n_expert:
        w.add_expert_count(n_expert)
        w.add_expert_used_count(2)
    w.add_tensor("token_embd.weight", np.zeros((32, 256), np.float32))
    if has_output:
        w.add_tensor("output.weight", np.zeros((32, 256), np.float32))
    for layer in range(N_LAYER):
        for kind in KINDS:
            is_stack = n_expert and kind.startswith("ffn")
            shape = (n_expert, 32, 256) if is_stack else (32, 256)
            w.add_tensor("blk.%d.%s%s.weight" % (layer, kind, "_exps" if is_stack else ""), np.zeros(shape, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def make_imatrix(path):
    w = gguf.GGUFWriter(path, "imatrix")
    w.add_string("general.type", "imatrix")
    w.add_array("imatrix.datasets", ["none"])
    w.add_uint32("imatrix.chunk_count", 1)
    w.add_uint32("imatrix.chunk_size", 512)
    w.add_tensor("none.in_sum2", np.ones((1, 256), np.float32))
    w.add_tensor("none.counts", np.ones((1, 1), np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def types_of(program, model, kind, imatrix):
    command = [program] + (["--imatrix", imatrix] if imatrix else []) + ["--dry-run", model, kind]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    got = {}
    for line in (said.stdout + said.stderr).split("\n"):
        m = re.match(r"\[ *\d+/ *\d+\] +(\S+) .*type = +(\S+), size = .*", line)
        if m:
            to = re.search(r"\((\w+)\)\s*$", line)
            got[m.group(1)] = to.group(1) if to else m.group(2)
    return got


def main():
    program, out = sys.argv[1:]
    os.makedirs(out, exist_ok=True)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        imatrix, model = os.path.join(folder, "i.gguf"), os.path.join(folder, "m.gguf")
        make_imatrix(imatrix)
        for name, shape in MODELS.items():
            make_model(model, *shape)
            for kind in TYPES:
                for weighted in (0, 1):
                    got = types_of(program, model, kind, imatrix if weighted else None)
                    for single in ("token_embd", "output"):
                        if single + ".weight" in got:
                            lines.append("%s %s %d %s %s" % (name, kind, weighted, single, LETTERS[got[single + ".weight"].rstrip(",")]))
                    for k in KINDS:
                        end = "_exps" if shape[2] and k.startswith("ffn") else ""
                        row = "".join(LETTERS[got["blk.%d.%s%s.weight" % (i, k, end)].rstrip(",")] for i in range(N_LAYER))
                        lines.append("%s %s %d %s %s" % (name, kind, weighted, k + end, row))
    with open(os.path.join(out, "types"), "w") as f:
        f.write("\n".join(lines) + "\n")


main()
