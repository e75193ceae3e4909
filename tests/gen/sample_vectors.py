#!/usr/bin/env python3
"""Write tests/data/sample/draws.txt: what numpy keeps and draws for given logits and options.

usage: sample_vectors.py > tests/data/sample/draws.txt       (needs numpy)

A case is five lines:
  case NAME n_vocab temperature top_k top_p min_p repeat presence frequency window seed
  history id...
  logits hexfloat...
  kept id...      the tokens that can be drawn
  tokens id...    the first draws
"""
import numpy as np

M = (1 << 64) - 1


class Xoshiro256ss:
    """xoshiro256** and splitmix64 as published at https://prng.di.unimi.it/."""

    def __init__(self, seed=None, state=None):
        self.s = state or []
        while len(self.s) < 4:
            seed = (seed + 0x9E3779B97F4A7C15) & M
            z = seed
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M
            self.s.append(z ^ (z >> 31))

    @staticmethod
    def rotl(x, k):
        return ((x << k) | (x >> (64 - k))) & M

    def next(self):
        s = self.s
        result = (self.rotl((s[1] * 5) & M, 7) * 9) & M
        t = (s[1] << 17) & M
        s[2] ^= s[0]
        s[3] ^= s[1]
        s[1] ^= s[2]
        s[0] ^= s[3]
        s[2] ^= t
        s[3] = self.rotl(s[3], 45)
        return result


# The first outputs that other programs print (splitmix64 of seed 0; xoshiro256** from state 1, 2, 3, 4).
assert Xoshiro256ss(0).s == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
known = Xoshiro256ss(state=[1, 2, 3, 4])
assert [known.next() for _ in range(4)] == [11520, 0, 1509978240, 1215971899390074240]


def penalize(logits, history, o):
    x = logits.copy()
    if o["window"] >= 0:
        history = history[len(history) - min(o["window"], len(history)):]
    for t in sorted(set(history)):
        x[t] = x[t] / np.float32(o["repeat"]) if x[t] > 0 else x[t] * np.float32(o["repeat"])
        x[t] = x[t] - np.float32(history.count(t)) * np.float32(o["frequency"]) - np.float32(o["presence"])
    return x


def kept(x, o):
    """Ids by falling logit (of equals the lower first), cut by top-k, top-p, min-p."""
    ids = [i for i in np.lexsort((np.arange(len(x)), -x)) if np.isfinite(x[i])]
    if o["top_k"]:
        ids = ids[: o["top_k"]]
    w = np.exp(x[ids].astype(np.float64) - np.float64(x[ids[0]]))
    p = w / w.sum()
    if o["top_p"] < 1:
        n = int(np.searchsorted(np.cumsum(p), np.float64(np.float32(o["top_p"])))) + 1
        ids, p = ids[:n], p[:n]
    ids = [i for i, q in zip(ids, p) if q >= np.float64(np.float32(o["min_p"])) * p[0]]
    return sorted(ids)


def draws(x, ids, o, n):
    w = np.exp((x[ids].astype(np.float64) - np.float64(x[ids].max())) / np.float64(np.float32(o["temperature"])))
    cum, rng = np.cumsum(w), Xoshiro256ss(o["seed"])
    return [ids[int(np.searchsorted(cum, (rng.next() >> 11) * 2.0**-53 * cum[-1], side="right"))] for _ in range(n)]


OFF = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repeat=1.0, presence=0.0, frequency=0.0, window=64, seed=1)
CASES = [
    ("plain", 50, {}),
    ("hot", 50, dict(temperature=1.7, seed=2)),
    ("cold", 50, dict(temperature=0.3, seed=3)),
    ("top_k", 50, dict(top_k=7, seed=4)),
    ("top_k_ties", 40, dict(top_k=5, seed=5)),
    ("top_p", 60, dict(top_p=0.7, seed=6)),
    ("top_p_flat", 40, dict(top_p=0.33, seed=7)),
    ("top_p_zero", 40, dict(top_p=0.0, seed=8)),
    ("min_p", 60, dict(min_p=0.08, seed=9)),
    ("all_cuts", 80, dict(top_k=30, top_p=0.9, min_p=0.05, temperature=0.8, seed=10)),
    ("top_p_after_top_k", 60, dict(top_k=10, top_p=0.6, seed=11)),
    ("repeat", 50, dict(repeat=1.3, seed=12)),
    ("presence_frequency", 50, dict(presence=0.6, frequency=0.4, window=-1, seed=13)),
    ("penalty_window", 50, dict(repeat=2.0, presence=1.0, frequency=-0.5, window=5, top_k=9, seed=14)),
    ("masked", 50, dict(top_k=12, top_p=0.95, seed=0xFFFFFFFFFFFFFFFF)),
]


def main():
    rng = np.random.default_rng(20261)
    for name, n, changed in CASES:
        o = {**OFF, **changed}
        x = (rng.standard_normal(n) * 2).astype(np.float32)
        if name == "all_cuts":
            x /= 2
        if name == "top_k_ties":
            x = np.round(x)
            x[3], x[4] = 0.0, -0.0
        if name == "top_p_flat":
            x[:] = -1.25
        if name == "masked":
            x[::3] = -np.inf
            x[1] = np.nan
            x[2] = np.inf
        history = [int(t) for t in rng.integers(0, n // 3, 40)]
        y = penalize(x, history, o)
        ids = kept(y, o)
        print("case", name, n, *(o[k] for k in ("temperature top_k top_p min_p repeat presence frequency window seed").split()))
        print("history", *history)
        print("logits", *(float(v).hex() for v in x))
        print("kept", *ids)
        print("tokens", *draws(y, ids, o, 24))


main()
