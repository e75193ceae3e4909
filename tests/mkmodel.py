#!/usr/bin/env python3
"""Small models of every family, with random weights and the shapes of real ones, for make check.

  mkmodel.py FAMILY OUT.gguf     one model (mkmodel.py --list names them)
  mkmodel.py --all FOLDER        all of them, and what the float reference says: NAME.gguf, NAME.f32

NAME.f32 holds float32 logits (24, 288) of the ids in ids.txt, keys and values rounded to half precision as a cache does.
Matrices are half precision, so that the file states its weights exactly and nothing but the order of sums may differ.
Each variant turns on what its family's files are known to have: the odd ones are named after it. Windows are short
enough, and contexts long enough, for 24 tokens to leave them. Needs python3 with numpy and gguf.
"""
import argparse
import os
import sys

import numpy as np
import gguf
from gguf import GGMLQuantizationType as T

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, "..", "tools"), os.path.join(HERE, "reference")]
import ggufout  # noqa: E402
import reference  # noqa: E402

N_VOCAB, N_TOK, SEED = 288, 24, 20

BASE = dict(layers=2, embd=32, heads=4, kv_heads=2, head_dim=16, ff=48, freq_base=10000.0, eps=1e-5, ctx=256)
MOE = dict(experts=6, used=2, ff=32)
MODELS = {
    "llama": dict(BASE, arch="llama", rope_freqs=True),
    "llama-bias-linear": dict(BASE, arch="llama", bias=True, out_bias=True, tied=True, keys=[("rope.scaling.type", "linear"), ("rope.scaling.factor", 4.0)]),
    "llama-yarn": dict(BASE, arch="llama", keys=[("rope.scaling.type", "yarn"), ("rope.scaling.factor", 4.0), ("rope.scaling.original_context_length", 64)]),
    "llama-moe": dict(BASE, **MOE, arch="llama"),
    "llama-scaled": dict(BASE, arch="llama", scale=True),
    "qwen2": dict(BASE, arch="qwen2", head_dim=8, bias=True, tied=True, freq_base=1e6),
    "qwen3": dict(BASE, arch="qwen3", qk_norm="head", freq_base=1e6),
    "qwen3moe": dict(BASE, **MOE, arch="qwen3moe", qk_norm="head"),
    "olmoe": dict(BASE, **MOE, arch="olmoe", qk_norm="row", kv_heads=4, head_dim=8, seed=1),
    "gemma2": dict(BASE, arch="gemma2", post_norm=True, tied=True, keys=[
        ("attention.sliding_window", 8), ("attn_logit_softcapping", 2.0), ("final_logit_softcapping", 3.0)]),
    "gemma3": dict(BASE, arch="gemma3", post_norm=True, tied=True, qk_norm="head", layers=3, freq_base=1e6, kv_heads=1, keys=[
        ("attention.sliding_window", 8), ("attention.sliding_window_pattern", 3), ("rope.scaling.type", "linear"), ("rope.scaling.factor", 8.0)]),
}


def ids():
    return [int(i) for i in np.random.default_rng(SEED).integers(0, 256, N_TOK)]


def add_key(writer, name, value):
    if isinstance(value, str):
        writer.add_string(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    else:
        writer.add_float32(name, value)


def make(name, path):
    p = MODELS[name]
    # A seed of its own where a router's choice is too close to a tie: there the order of sums decides.
    rng = np.random.default_rng([SEED, p.get("seed", 0), sum(map(ord, name))])
    out = ggufout.Out(path, p["arch"])
    w = out.writer
    w.add_name("made " + name)
    w.add_block_count(p["layers"])
    w.add_context_length(p["ctx"])
    w.add_embedding_length(p["embd"])
    w.add_feed_forward_length(p["ff"])
    w.add_head_count(p["heads"])
    w.add_head_count_kv(p["kv_heads"])
    w.add_key_length(p["head_dim"])
    w.add_value_length(p["head_dim"])
    w.add_rope_dimension_count(p["head_dim"])
    w.add_rope_freq_base(p["freq_base"])
    w.add_layer_norm_rms_eps(p["eps"])
    w.add_vocab_size(N_VOCAB)
    if "experts" in p:
        w.add_expert_count(p["experts"])
        w.add_expert_used_count(p["used"])
        if p["arch"] == "qwen3moe":
            w.add_expert_feed_forward_length(p["ff"])
    for key, value in p.get("keys", []):
        add_key(w, p["arch"] + "." + key, value)
    ggufout.add_made_vocabulary(out, N_VOCAB)

    def vector(name, *shape, mean=0.0, spread=0.2):
        out.add_array(name, mean + spread * rng.standard_normal(shape))

    def matrix(name, *shape, gain=1.0):
        x = (rng.standard_normal(shape) * gain / np.sqrt(shape[-1])).astype(np.float16)
        out.add(name, T.F16, shape, lambda: [x])

    def norm(name, n):
        vector(name, n, mean=1.0)

    embd, ff, q, kv = p["embd"], p["ff"], p["heads"] * p["head_dim"], p["kv_heads"] * p["head_dim"]
    matrix("token_embd.weight", N_VOCAB, embd, gain=2.0)
    norm("output_norm.weight", embd)
    if not p.get("tied"):
        matrix("output.weight", N_VOCAB, embd, gain=2.0)
    if p.get("rope_freqs"):
        out.add_array("rope_freqs.weight", np.geomspace(1, 8, p["head_dim"] // 2))
    for layer in range(p["layers"]):
        blk = "blk.%d." % layer
        norm(blk + "attn_norm.weight", embd)
        for which, rows, cols in (("q", q, embd), ("k", kv, embd), ("v", kv, embd), ("output", embd, q)):
            matrix(blk + "attn_%s.weight" % which, rows, cols, gain=1.5)
            if p.get("out_bias") or (p.get("bias") and which != "output"):
                vector(blk + "attn_%s.bias" % which, rows)
            if p.get("scale"):
                vector(blk + "attn_%s.scale" % which, 1, mean=1.0)
        if p.get("qk_norm"):
            norm(blk + "attn_q_norm.weight", p["head_dim"] if p["qk_norm"] == "head" else q)
            norm(blk + "attn_k_norm.weight", p["head_dim"] if p["qk_norm"] == "head" else kv)
        if p.get("post_norm"):
            norm(blk + "post_attention_norm.weight", embd)
            norm(blk + "post_ffw_norm.weight", embd)
        norm(blk + "ffn_norm.weight", embd)
        n_exp = (p["experts"],) if "experts" in p else ()
        if n_exp:
            out.add_array(blk + "ffn_gate_inp.weight", ggufout.router(rng, p["experts"], embd, 1.5, 0.35))
        for which, rows, cols in (("gate", ff, embd), ("up", ff, embd), ("down", embd, ff)):
            stem = blk + "ffn_" + which + ("_exps" if n_exp else "")
            matrix(stem + ".weight", *n_exp, rows, cols, gain=1.5)
            if p.get("out_bias") and not n_exp:
                vector(stem + ".bias", rows)
            if p.get("scale"):
                vector(stem + ".scale", *(n_exp or (1,)), mean=1.0)
    out.write(quiet=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("family", nargs="?", choices=MODELS, metavar="FAMILY")
    ap.add_argument("out", nargs="?")
    ap.add_argument("--all", metavar="FOLDER")
    ap.add_argument("--list", action="store_true")
    a = ap.parse_args()
    if a.list:
        print("\n".join(MODELS))
    elif a.all:
        with open(os.path.join(a.all, "ids.txt"), "w") as f:
            f.write(" ".join(map(str, ids())) + "\n")
        for name in MODELS:
            path = os.path.join(a.all, name)
            make(name, path + ".gguf")
            reference.Model(path + ".gguf").logits(ids(), "f16").tofile(path + ".f32")
    elif a.out:
        make(a.family, a.out)
    else:
        ap.error("FAMILY and OUT.gguf, --all FOLDER, or --list")


if __name__ == "__main__":
    main()
