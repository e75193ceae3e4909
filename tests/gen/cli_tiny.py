#!/usr/bin/env python3
"""Whole models of 60 KB that say nonsense: what the command line is tested with.

  cli_tiny.py OUT_DIR     (tests/data/cli)

Llama family, one layer, 260 tokens (256 bytes, one merge, three control tokens), weights drawn from a fixed seed. thinks.gguf has two
tokens more, and a template that begins the answer amid a thought unless it is told not to.
"""
import os
import random
import struct
import sys

from gguf_bytes import byte_letters, string, value

TEMPLATE = ("{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}")

THINKS = ("{% if effort %}effort {{ effort }}\n{% endif %}" + TEMPLATE.removesuffix("{% endif %}") +
          "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
          "{% endif %}")


def q8_0(rng, n):
    return b"".join(struct.pack("<e32b", 0.002, *(rng.randint(-127, 127) for _ in range(32))) for _ in range(n // 32))


def f32(n):
    return struct.pack("<%df" % n, *([1.0] * n))


def make(path, template, more):
    rng = random.Random(7)
    tokens = byte_letters() + ["he", "<|start|>", "<|end|>", "<|pad|>"] + more
    d, ff = 64, 64
    keys = {"general.architecture": "llama", "general.name": "tiny", "llama.block_count": 1, "llama.context_length": 512,
            "llama.embedding_length": d, "llama.feed_forward_length": ff, "llama.attention.head_count": 2,
            "llama.attention.head_count_kv": 1, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0,
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * 257 + [3] * 3 + [4] * len(more), "tokenizer.ggml.merges": ["h e"], "tokenizer.ggml.bos_token_id": 257,
            "tokenizer.ggml.eos_token_id": 258, "tokenizer.ggml.padding_token_id": 259, "tokenizer.ggml.add_bos_token": False,
            "tokenizer.chat_template": template}
    shapes = [("token_embd.weight", (d, len(tokens))), ("output_norm.weight", (d,)), ("blk.0.attn_norm.weight", (d,)),
              ("blk.0.attn_q.weight", (d, d)), ("blk.0.attn_k.weight", (d, 32)), ("blk.0.attn_v.weight", (d, 32)),
              ("blk.0.attn_output.weight", (d, d)), ("blk.0.ffn_norm.weight", (d,)), ("blk.0.ffn_gate.weight", (d, ff)),
              ("blk.0.ffn_up.weight", (d, ff)), ("blk.0.ffn_down.weight", (ff, d))]
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(shapes), len(keys))
    for k, v in keys.items():
        head += string(k) + value(v)
    data = b""
    for name, ne in shapes:
        head += string(name) + struct.pack("<I%dQIQ" % len(ne), len(ne), *ne, 0 if len(ne) == 1 else 8, len(data))
        data += f32(ne[0]) if len(ne) == 1 else q8_0(rng, ne[0] * ne[1])
        data += bytes(-len(data) % 32)
    head += bytes(-len(head) % 32)
    with open(path, "wb") as f:
        f.write(head + data)


os.makedirs(sys.argv[1], exist_ok=True)
make(os.path.join(sys.argv[1], "tiny.gguf"), TEMPLATE, [])
make(os.path.join(sys.argv[1], "thinks.gguf"), THINKS, ["<think>", "</think>"])
