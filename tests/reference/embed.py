#!/usr/bin/env python3
"""Embeddings (hidden states after the final norm, pooled) by programs that share nothing with the engine.

  embed.py make DIR                    DIR/NAME.embed for the tiny models of tests/data/models: float32 (2, n_embd), the mean over all ids of
                                       ids.txt and the last one, not normalised, by reference.py
  embed.py compare FERRY MODEL [--text FILE]   ferry batch --embed, llama.cpp (python with llama_cpp) and reference.py on pieces of a text, as
                                       token ids, by mean and last: cosine and the largest difference of the normalised vectors
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
TINY = ["llama", "gemma3", "qwen3moe"]


def make(folder):
    sys.path.insert(0, HERE)
    import reference
    ids = reference.read_ids("@" + os.path.join(folder, "ids.txt"))
    for name in TINY:
        x = reference.Model(os.path.join(folder, name + ".gguf")).hidden(ids, "f16")
        out = np.stack([x.mean(axis=0, dtype=np.float64), x[-1]]).astype(np.float32)
        out.tofile(os.path.join(folder, name + ".embed"))
        print(name, out.shape, "rms %.3f" % np.sqrt(np.mean(out * out)))


def peer_vectors(model_path, prompts, pooling):
    import ctypes
    import llama_cpp as L
    silent = L.llama_log_callback(lambda level, text, _: None)
    L.llama_log_set(silent, ctypes.c_void_p(0))
    params = L.llama_model_default_params()
    params.n_gpu_layers = 0
    model = L.llama_model_load_from_file(model_path.encode(), params)
    c = L.llama_context_default_params()
    c.n_ctx = c.n_batch = c.n_ubatch = 1024
    c.embeddings = True
    c.pooling_type = {"mean": L.LLAMA_POOLING_TYPE_MEAN, "last": L.LLAMA_POOLING_TYPE_LAST}[pooling]
    ctx = L.llama_init_from_model(model, c)
    out = []
    for ids in prompts:
        L.llama_memory_clear(L.llama_get_memory(ctx), True)
        b = L.llama_batch_init(len(ids), 0, 1)
        b.n_tokens = len(ids)
        for i, t in enumerate(ids):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = t, i, 1, 1
            b.seq_id[i][0] = 0
        if L.llama_decode(ctx, b):
            sys.exit("llama_decode failed")
        x = np.ctypeslib.as_array(L.llama_get_embeddings_seq(ctx, 0), shape=(L.llama_model_n_embd(model),)).astype(np.float64)
        out.append(x / np.linalg.norm(x))
        L.llama_batch_free(b)
    L.llama_free(ctx)
    L.llama_model_free(model)
    return np.array(out)


def ferry_vectors(ferry, model_path, prompts, pooling):
    with tempfile.TemporaryDirectory() as d:
        with open(d + "/in", "w") as f:
            for ids in prompts:
                f.write(json.dumps({"input": ids}) + "\n")
        subprocess.run([ferry, "batch", model_path, "-i", d + "/in", "-o", d + "/out", "--embed", pooling, "--order", "input", "-q",
                        "--ctx", "1024"], check=True)
        with open(d + "/out") as f:
            return np.array([json.loads(line)["embedding"] for line in f])


def true_vectors(model_path, prompts):
    sys.path.insert(0, HERE)
    import reference
    model, out = reference.Model(model_path), {"mean": [], "last": []}
    for ids in prompts:
        x = model.hidden(ids, "f16").astype(np.float64)
        for pooling, v in ("mean", x.mean(axis=0)), ("last", x[-1]):
            out[pooling].append(v / np.linalg.norm(v))
    return out


def compare(ferry, model_path, text_path):
    with open(text_path, "rb") as f:
        ids = json.loads(subprocess.run([ferry, "tokenize", model_path], stdin=f, stdout=subprocess.PIPE, check=True).stdout)
    prompts = [ids[at:at + n] for at, n in [(0, 1), (0, 2), (5, 17), (30, 64), (100, 200), (0, 700)] if len(ids) >= at + n]
    truth = true_vectors(model_path, prompts)
    for pooling in "mean", "last":
        theirs, ours = peer_vectors(model_path, prompts, pooling), ferry_vectors(ferry, model_path, prompts, pooling)
        pairs = [("ferry, llama.cpp", ours, theirs), ("ferry, reference", ours, truth[pooling]), ("llama.cpp, reference", theirs, truth[pooling])]
        for i, p in enumerate(prompts):
            print("%s of %d tokens:" % (pooling, len(p)))
            for what, x, y in pairs:
                print("  %-20s cosine %.6f, largest difference %.1e of values up to %.1e" %
                      (what, x[i] @ y[i], np.abs(x[i] - y[i]).max(), np.abs(y[i]).max()))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("what", choices=("make", "compare"))
    ap.add_argument("paths", nargs="+")
    ap.add_argument("--text", default=os.path.join(HERE, "text.txt"))
    a = ap.parse_args()
    if a.what == "make":
        make(*a.paths)
    else:
        compare(*a.paths, a.text)


if __name__ == "__main__":
    main()
