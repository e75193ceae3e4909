#!/usr/bin/env python3
"""What predictions have to be, by arithmetic that shares nothing with src/plan/cost*.c.

  cost_facts.py OUT_DIR     (tests/data/cost)

facts.txt: seconds of steps of the model `moe` of plan_heads.py on a machine with the round rates below; a router's hits and different experts;
hits_*_simulated come from a simulated cache in front of simulated routers. shapes.txt: bytes of the shapes of tools/make-synthetic. Needs numpy.
"""
import math
import os
import sys
from statistics import NormalDist

import numpy as np

# ---- a router ----


def chosen(n, k, skew):
    """Chance that a token wants each expert: logits normal with spread exp(skew z), above a threshold that k pass on average."""
    spread = [math.exp(skew * NormalDist().inv_cdf((i + 0.5) / n)) for i in range(n)]
    lo, hi = -50.0, 50.0
    while hi - lo > 1e-13:
        mid = (lo + hi) / 2
        if sum(1 - NormalDist(0, s).cdf(mid) for s in spread) > k:
            lo = mid
        else:
            hi = mid
    return np.array([1 - NormalDist(0, s).cdf(lo) for s in spread])


HALF = 2 ** (-1 / 64)  # what a count fades by with each token


def faded(q, slots):
    """Slots have those whose faded counts pass a threshold that so many pass on average; counts are taken for normal."""
    counts = [NormalDist(x / (1 - HALF), max(1e-6, math.sqrt(x * (1 - x) / (1 - HALF * HALF)))) for x in q]
    lo, hi = -100.0, 200.0
    while hi - lo > 1e-12:
        mid = (lo + hi) / 2
        if sum(1 - c.cdf(mid) for c in counts) > slots:
            lo = mid
        else:
            hi = mid
    return float(sum(x * (1 - c.cdf(lo)) for x, c in zip(q, counts)) / np.sum(q))


def simulate(n, k, skew, slots, seed, n_tok=2500):
    rng = np.random.default_rng(seed)
    spread = np.array([math.exp(skew * NormalDist().inv_cdf((i + 0.5) / n)) for i in range(n)])
    heat, there, hits, wanted = np.zeros(n), np.zeros(n, bool), 0, 0
    for t in range(n_tok):
        ids = np.argpartition(-rng.standard_normal(n) * spread, k)[:k]
        heat *= HALF
        heat[ids] += 1
        if t > n_tok // 4:
            wanted += k
            hits += np.sum(there[ids])
        for e in ids[~there[ids]]:
            if np.sum(there) >= slots:
                others = np.setdiff1d(np.flatnonzero(there), ids)
                there[others[np.argmin(heat[others])]] = False
            there[e] = True
    return hits / wanted


# ---- a step of plan_heads.py's moe: 3 layers, width 2048, 32 heads of 128, 4 of keys, 128 experts of 768, 8 used ----
LAYERS, D, FF, E, K, HEADS, HEAD, VOCAB = 3, 2048, 768, 128, 8, 32, 128, 2048
BITS = {"Q5_K": (256, 176), "Q4_K": (256, 144), "Q6_K": (256, 210), "Q5_0": (32, 22), "Q8_0": (32, 34), "F32": (1, 4)}
TOKEN = {"Q4_K": 8e9, "Q6_K": 6e9, "F32": 16e9}   # bytes/s
FEW = {"Q4_K": 100e9, "Q6_K": 80e9, "F32": 30e9}  # op/s, 16 rows
MANY = {"Q4_K": 200e9, "Q6_K": 150e9, "F32": 40e9}  # 256 rows
MATMUL_OP, MOE_OP, MOE_UNIT, ATTENTION_UNIT, RUN = 2e-6, 5e-6, 1e-9, 2e-10, 7e-6
DISK = [(1, 1e9), (8, 2e9), (32, 4e9)]  # depth, bytes/s


def nbytes(kind, n_in, n_out):
    length, size = BITS[kind]
    return n_in // length * size * n_out


def matmul(kind, n_in, n_out, rows):
    weights = n_in * n_out
    one = nbytes(kind, n_in, n_out) / TOKEN[kind]
    few, many = 2 * 16 * weights / FEW[kind], 2 * 256 * weights / MANY[kind]
    return float(np.interp(rows, [1, 16], [one, few])) if rows <= 16 else few + (rows - 16) * (many - few) / 240


def dense(rows, pos):
    s = LAYERS * sum(matmul(*m, rows) for m in (("Q4_K", D, 4096), ("Q4_K", D, 512), ("Q4_K", D, 512), ("Q4_K", 4096, D), ("F32", D, E)))
    s += matmul("Q6_K", D, VOCAB, 1) + (3 * LAYERS + 1) * MATMUL_OP
    s += LAYERS * ATTENTION_UNIT * sum(pos + i + 1 for i in range(rows)) * HEADS * 2 * HEAD
    return s + RUN * (1 + 2 * LAYERS + (LAYERS if rows > 8 else 0))


EXPERT = 2 * nbytes("Q4_K", D, FF) + nbytes("Q6_K", FF, D)


def expert(rows):
    return 2 * matmul("Q4_K", D, FF, rows) + matmul("Q6_K", FF, D, rows)


def layer_experts(tokens):
    """(how many different, seconds) of one layer's experts."""
    n = K if tokens == 1 else E * (1 - (1 - K / E) ** tokens)
    return n, n * expert(1 if tokens == 1 else tokens * K / n) + MOE_OP + MOE_UNIT * tokens * K * (D + FF)


def disk(n):
    return n * EXPERT / float(np.interp(min(3 * n, 32), [d for d, _ in DISK], [r for _, r in DISK])) if n else 0


def beside(compute, reading, share):
    """While the disk reads, computing gets on at `share` of its speed."""
    return compute / share if reading * share >= compute else reading + (compute - share * reading)


def asking():
    """Where experts are read, each router but the first is asked about the layer before, too."""
    return (LAYERS - 1) * (matmul("F32", D, E, 1) + MATMUL_OP + RUN)


def token(hits, share=1):
    n, s = layer_experts(1)
    mean = 0
    for absent in range(K + 1):
        chance = math.comb(K, absent) * (1 - hits) ** absent * hits ** (K - absent)
        mean += chance * (max(beside(s, disk(absent), share), disk(absent) + s / K) if absent else s)
    return dense(1, 0) + LAYERS * mean + (asking() if hits < 1 else 0)


def prompt(tokens, hits, share=1):
    n, s = layer_experts(tokens)
    reading = LAYERS * disk(n * (1 - hits))
    return max(beside(dense(tokens, 0) + LAYERS * s, reading, share), reading)


def prompt_by_layers(tokens, hits):
    n, s = layer_experts(tokens)
    return dense(tokens, 0) + LAYERS * max(s, disk(n * (1 - hits)))


# ---- shapes: what tools/make-synthetic writes ----
SHAPES = {  # layers, embd, heads, kv heads, head, experts, used, ff, vocab, kind, layers without experts, their ff
    "qwen3-30b-a3b": (48, 2048, 32, 4, 128, 128, 8, 768, 151936, "qwen3"), "olmoe-1b-7b": (16, 2048, 16, 16, 128, 64, 8, 1024, 50304, "olmoe"),
    "mixtral-8x7b": (32, 4096, 32, 8, 128, 8, 2, 14336, 32000, "llama"), "small-qwen3moe": (16, 1024, 16, 4, 64, 64, 8, 512, 49152, "qwen3"),
    "glm-4.5-air": (46, 4096, 96, 8, 128, 128, 8, 1408, 151552, "air", 1, 10944), "glm-4.5": (92, 5120, 96, 8, 128, 160, 8, 1536, 151552, "glm", 3, 12288),
    "minimax-m2": (62, 3072, 48, 8, 128, 256, 8, 1536, 200064, "minimax"),
    "qwen3-next-80b-a3b": (48, 2048, 16, 2, 256, 512, 10, 512, 151936, "next"), "qwen3.5-35b-a3b": (40, 2048, 16, 2, 256, 256, 8, 512, 248320, "qwen35")}


def fitting(kind, n_in, n_out):
    """As llama-quantize where rows are no whole superblocks."""
    return nbytes(kind if n_in % 256 == 0 else {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}[kind], n_in, n_out)


def delta_bytes(d, kind):
    """A gated delta net: 16 key heads, 32 value heads of 128."""
    keys, values, n = 16 * 128, 32 * 128, 32
    gates = nbytes("Q4_K", d, 2 * n) if kind == "next" else 2 * nbytes("Q4_K", d, n)
    return (nbytes("Q5_K", d, 2 * keys + values) + nbytes("Q4_K", d, values) + gates + nbytes("Q4_K", values, d) +
            4 * (4 * (2 * keys + values) + 2 * n + 128))


def shape_bytes(layers, d, heads, kv, head, experts, used, ff, vocab, kind, lead=0, lead_ff=0):
    q, k = heads * head, kv * head
    norms = {"qwen3": 2 * head, "glm": 2 * head, "olmoe": q + k, "minimax": q + k, "llama": 0, "air": 0, "next": 2 * head, "qwen35": 2 * head}[kind]
    biases = q + 2 * k if kind in ("glm", "air") else 0
    dense_bytes = nbytes("Q4_K", d, vocab) + nbytes("Q6_K", d, vocab) + 4 * d
    expert_bytes = 0
    for i in range(layers):
        high = "Q6_K" if i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2 else "Q4_K"
        is_hybrid = kind in ("next", "qwen35")
        if is_hybrid and i % 4 != 3:
            dense_bytes += delta_bytes(d, kind) + 8 * d
        else:
            dense_bytes += nbytes("Q4_K", d, 2 * q if is_hybrid else q) + nbytes("Q4_K", d, k) + nbytes(high, d, k) + nbytes("Q4_K", q, d)
            dense_bytes += 4 * (2 * d + norms + biases)
        if i < lead:
            dense_bytes += 2 * nbytes("Q4_K", d, lead_ff) + fitting(high, lead_ff, d)
            continue
        expert = 2 * nbytes("Q4_K", d, ff) + fitting(high, ff, d)
        expert_bytes += experts * expert
        dense_bytes += 4 * experts * (d + (kind in ("glm", "air", "minimax"))) + (expert if kind in ("glm", "air") or is_hybrid else 0)
        dense_bytes += 4 * d if is_hybrid else 0
    return dense_bytes, expert_bytes


# layers, embd, heads, ranks of queries and of keys and values, rotated and other values of a head, those it gives, experts, ff, shared ones, vocab,
# layers without experts, their ff, a bias of the choice
LATENT = {"deepseek-v2-lite": (27, 2048, 16, 0, 512, 64, 128, 128, 64, 1408, 2, 102400, 1, 10944, 0),
          "deepseek-v3": (61, 7168, 128, 1536, 512, 64, 128, 128, 256, 2048, 1, 129280, 3, 18432, 1),
          "kimi-k2": (61, 7168, 64, 1536, 512, 64, 128, 128, 384, 2048, 1, 163840, 1, 18432, 1),
          "glm-4.7-flash": (47, 2048, 20, 768, 512, 64, 192, 256, 64, 1536, 1, 154880, 1, 10240, 1)}


def latent_bytes(layers, d, heads, q_rank, rank, rot, nope, v, experts, ff, shared, vocab, lead, lead_ff, bias):
    q = heads * (nope + rot)
    dense_bytes, expert_bytes = nbytes("Q4_K", d, vocab) + nbytes("Q6_K", d, vocab) + 4 * d, 0
    for i in range(layers):
        high = "Q6_K" if i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2 else "Q4_K"
        dense_bytes += nbytes("Q4_K", d, q_rank) + 4 * q_rank + nbytes("Q4_K", q_rank, q) if q_rank else nbytes("Q4_K", d, q)
        dense_bytes += nbytes("Q4_K", d, rank + rot) + 4 * rank + fitting("Q4_K", nope, heads * rank) + nbytes(high, rank, heads * v)
        dense_bytes += nbytes("Q4_K", heads * v, d) + 4 * 2 * d
        if i < lead:
            dense_bytes += 2 * nbytes("Q4_K", d, lead_ff) + fitting(high, lead_ff, d)
            continue
        expert_bytes += experts * (2 * nbytes("Q4_K", d, ff) + fitting(high, ff, d))
        dense_bytes += 4 * experts * (d + bias) + 2 * nbytes("Q4_K", d, shared * ff) + fitting(high, shared * ff, d)
    return dense_bytes, expert_bytes


def main():
    out = sys.argv[1]
    facts = {"token": token(1), "token_hits_25": token(0.25), "prompt_512": prompt(512, 1), "prompt_512_hits_25": prompt(512, 0.25),
             "token_hits_75_share_80": token(0.75, 0.8), "prompt_512_hits_75_share_60": prompt(512, 0.75, 0.6), "prompt_21_cold": prompt(21, 0), "prompt_21_cold_by_layers": prompt_by_layers(21, 0), "missed_25": K * LAYERS * EXPERT * 0.75}
    for skew in (0, 0.35, 0.7):
        q = chosen(128, 8, skew)
        name = "%d" % round(100 * skew)
        facts["distinct_%s_100" % name] = float(np.sum(1 - (1 - q) ** 100))
        for slots in (32, 51, 77):
            facts["hits_%s_%d" % (name, slots)] = faded(q, slots)
            facts["hits_%s_%d_simulated" % (name, slots)] = float(np.mean([simulate(128, 8, skew, slots, seed) for seed in range(8)]))
    with open(os.path.join(out, "facts.txt"), "w") as f:
        f.writelines("%s %.17g\n" % x for x in facts.items())
    with open(os.path.join(out, "shapes.txt"), "w") as f:
        f.writelines("%s %d %d\n" % ((name,) + shape_bytes(*x)) for name, x in SHAPES.items())
        f.writelines("%s %d %d\n" % ((name,) + latent_bytes(*x)) for name, x in LATENT.items())


main()
