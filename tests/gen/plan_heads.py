#!/usr/bin/env python3
"""Heads of three GGUF files without their weights, and what a plan for them has to say, by arithmetic.

  plan_heads.py OUT_DIR     (tests/data/plan)

NAME.head is the file up to its data; the test appends a hole of the size that NAME.txt names. Shapes are those of the published
models (Qwen2.5-0.5B, Qwen3-30B-A3B, Gemma3-270M) with few layers and a small vocabulary.
"""
import os
import struct
import sys

TYPES = {"F32": (0, 1, 4), "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144), "Q6_K": (14, 256, 210)}
PAGE = 64


def up(x, a):
    return (x + a - 1) // a * a


def string(s):
    return struct.pack("<Q", len(s)) + s.encode()


def value(v):
    if isinstance(v, bool):
        return struct.pack("<I?", 7, v)
    if isinstance(v, int):
        return struct.pack("<II", 4, v)
    if isinstance(v, float):
        return struct.pack("<If", 6, v)
    return struct.pack("<I", 8) + string(v)


def nbytes(kind, ne):
    n, (_, length, size) = 1, TYPES[kind]
    for x in ne:
        n *= x
    return n // length * size


class Model:
    def __init__(self, name, arch, keys):
        self.name, self.keys, self.tensors = name, {"general.architecture": arch, "general.name": name}, []
        self.keys.update({arch + "." + k: v for k, v in keys.items()})

    def add(self, name, kind, *ne):
        self.tensors.append((name, kind, ne))

    def write(self, out, facts):
        head = struct.pack("<4sIQQ", b"GGUF", 3, len(self.tensors), len(self.keys))
        for k, v in self.keys.items():
            head += string(k) + value(v)
        off = 0
        for name, kind, ne in self.tensors:
            head += string(name) + struct.pack("<I%dQIQ" % len(ne), len(ne), *ne, TYPES[kind][0], off)
            off = up(off + nbytes(kind, ne), 32)
        head += bytes(up(len(head), 32) - len(head))
        with open(os.path.join(out, self.name + ".head"), "wb") as f:
            f.write(head)
        name, kind, ne = self.tensors[-1]
        end = len(head) + off - up(nbytes(kind, ne), 32) + nbytes(kind, ne)
        expert = sum(nbytes(t[1], t[2]) for t in self.tensors if "_exps" in t[0])
        every = sum(nbytes(t[1], t[2]) for t in self.tensors)
        # In memory the file's blocks of 4 KiB that hold weights; mapped, the weights themselves.
        facts = dict(facts, file_bytes=len(head) + off, held_bytes=up(end, 4096) - len(head) // 4096 * 4096, mapped_bytes=every,
                     expert_bytes=expert)
        with open(os.path.join(out, self.name + ".txt"), "w") as f:
            for k, v in facts.items():
                f.write("%s %d\n" % (k, v))


def kv(layers, head, n_head_kv, n_ctx, chunk, n_seq, row_bytes):
    """layers: window of each, 0 full. K and V of a layer are each rounded to 64 bytes; pages of a kind are counted apart."""
    total = 0
    for windows in ([w for w in layers if not w], [w for w in layers if w]):
        if not windows:
            continue
        page_bytes = len(windows) * 2 * up(n_head_kv * PAGE * row_bytes(head), 64)
        pages = (n_ctx + PAGE - 1) // PAGE
        if windows[0] and chunk < n_ctx:
            span = max(windows) - 1 + chunk
            pages = min(pages, (span - 2) // PAGE + 2)
        total += n_seq * pages * page_bytes
    return up(total, 4096)


def f16(n):
    return 2 * n


def q8_0(n):
    return n // 32 * 34


def dense(m, i, d, q, k, ff, kind):
    b = "blk.%d." % i
    m.add(b + "attn_norm.weight", "F32", d)
    m.add(b + "attn_q.weight", kind, d, q)
    m.add(b + "attn_k.weight", kind, d, k)
    m.add(b + "attn_v.weight", kind, d, k)
    m.add(b + "attn_output.weight", kind, q, d)
    m.add(b + "ffn_norm.weight", "F32", d)
    if ff:
        m.add(b + "ffn_gate.weight", kind, d, ff)
        m.add(b + "ffn_up.weight", kind, d, ff)
        m.add(b + "ffn_down.weight", kind, ff, d)


def read_per_token(m, expert_share):
    """All but the embedding table, of which a row is nothing; of experts the share that a token uses."""
    n = 0
    for name, kind, ne in m.tensors:
        size = nbytes(kind, ne)
        if "_exps" in name:
            n += int(size * expert_share)
        elif name != "token_embd.weight" or not any(t[0] == "output.weight" for t in m.tensors):
            n += size
    return n


def qwen2(out):
    d, layers, vocab = 896, 4, 2048
    m = Model("dense", "qwen2", {"block_count": layers, "context_length": 32768, "embedding_length": d, "feed_forward_length": 4864,
                                 "attention.head_count": 14, "attention.head_count_kv": 2,
                                 "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6})
    m.add("token_embd.weight", "Q8_0", d, vocab)
    m.add("output_norm.weight", "F32", d)
    for i in range(layers):
        dense(m, i, d, d, 128, 4864, "Q8_0")
        for part, n in (("q", d), ("k", 128), ("v", 128)):
            m.add("blk.%d.attn_%s.bias" % (i, part), "F32", n)
    full = [0] * layers
    m.write(out, {"decode_bytes": read_per_token(m, 1), "kv_8192_f16": kv(full, 64, 2, 8192, 512, 1, f16),
                  "kv_8192_q8_0": kv(full, 64, 2, 8192, 512, 1, q8_0), "kv_100_f16_x3": kv(full, 64, 2, 100, 100, 3, f16)})


def qwen3moe(out):
    d, layers, vocab, ff, experts = 2048, 3, 2048, 768, 128
    m = Model("moe", "qwen3moe", {"block_count": layers, "context_length": 40960, "embedding_length": d, "feed_forward_length": 6144,
                                  "attention.head_count": 32, "attention.head_count_kv": 4, "attention.key_length": 128,
                                  "attention.value_length": 128, "attention.layer_norm_rms_epsilon": 1e-6,
                                  "rope.freq_base": 1e6, "expert_count": experts, "expert_used_count": 8,
                                  "expert_feed_forward_length": ff})
    m.add("token_embd.weight", "Q4_K", d, vocab)
    m.add("output_norm.weight", "F32", d)
    m.add("output.weight", "Q6_K", d, vocab)
    for i in range(layers):
        dense(m, i, d, 4096, 512, 0, "Q4_K")
        b = "blk.%d." % i
        m.add(b + "attn_q_norm.weight", "F32", 128)
        m.add(b + "attn_k_norm.weight", "F32", 128)
        m.add(b + "ffn_gate_inp.weight", "F32", d, experts)
        m.add(b + "ffn_gate_exps.weight", "Q4_K", d, ff, experts)
        m.add(b + "ffn_up_exps.weight", "Q4_K", d, ff, experts)
        m.add(b + "ffn_down_exps.weight", "Q6_K", ff, d, experts)
    full = [0] * layers
    m.write(out, {"decode_bytes": read_per_token(m, 8 / experts), "kv_8192_f16": kv(full, 128, 4, 8192, 512, 1, f16)})


def gemma3(out):
    d, layers, vocab = 640, 6, 2048
    m = Model("window", "gemma3", {"block_count": layers, "context_length": 32768, "embedding_length": d, "feed_forward_length": 2048,
                                   "attention.head_count": 4, "attention.head_count_kv": 1, "attention.key_length": 256,
                                   "attention.value_length": 256, "attention.layer_norm_rms_epsilon": 1e-6,
                                   "attention.sliding_window": 512, "rope.freq_base": 1e6})
    m.add("token_embd.weight", "Q8_0", d, vocab)
    m.add("output_norm.weight", "F32", d)
    for i in range(layers):
        dense(m, i, d, 1024, 256, 2048, "Q8_0")
        b = "blk.%d." % i
        m.add(b + "attn_q_norm.weight", "F32", 256)
        m.add(b + "attn_k_norm.weight", "F32", 256)
        m.add(b + "post_attention_norm.weight", "F32", d)
        m.add(b + "post_ffw_norm.weight", "F32", d)
    # Gemma3: every sixth layer looks at everything.
    windows = [0 if i % 6 == 5 else 512 for i in range(layers)]
    m.write(out, {"decode_bytes": read_per_token(m, 1), "kv_8192_f16": kv(windows, 256, 1, 8192, 512, 1, f16)})


def main():
    out = sys.argv[1]
    os.makedirs(out, exist_ok=True)
    qwen2(out)
    qwen3moe(out)
    gemma3(out)


main()
