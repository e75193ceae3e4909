#!/usr/bin/env python3
"""How far apart two files of logits are: compare.py A.f32 B.f32 --vocab N [--json] [--max-kl X]

Both hold float32 (n_tok, N). KL is that of A's distribution to B's, in nats per token: A is the reference.
With --max-kl the exit status is 1 if the mean KL is larger.
"""
import argparse
import json
import sys

import numpy as np


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def compare(a, b):
    """a, b: (n_tok, n_vocab)."""
    kl = []
    for row in range(0, len(a), 64):  # by 64 rows: float64 copies of a large vocabulary are big
        p, q = log_softmax(a[row:row + 64]), log_softmax(b[row:row + 64])
        kl.append((np.exp(p) * (p - q)).sum(axis=1))
    kl = np.concatenate(kl)
    diff = np.abs(a - b)
    return {
        "n_tok": len(a),
        "mean_kl": float(kl.mean()),
        "max_kl": float(kl.max()),
        "top1_agree": float((a.argmax(axis=1) == b.argmax(axis=1)).mean()),
        "max_abs_diff": float(diff.max()),
        "max_abs": float(np.abs(a).max()),
        "same_bits": bool(np.array_equal(a.view(np.uint32), b.view(np.uint32))),
    }


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("a")
    ap.add_argument("b")
    ap.add_argument("--vocab", type=int, required=True)
    ap.add_argument("--json", action="store_true")
    ap.add_argument("--max-kl", type=float)
    o = ap.parse_args()
    a, b = (np.fromfile(p, dtype=np.float32) for p in (o.a, o.b))
    if a.size != b.size or a.size % o.vocab:
        sys.exit("%s has %d values, %s %d: not the same rows of %d" % (o.a, a.size, o.b, b.size, o.vocab))
    r = compare(a.reshape(-1, o.vocab), b.reshape(-1, o.vocab))
    if o.json:
        print(json.dumps(r))
    else:
        print("%(n_tok)d tokens: mean KL %(mean_kl).3e, max KL %(max_kl).3e, top-1 agreement %(top1_agree).4f, "
              "max |a-b| %(max_abs_diff).3e of max |a| %(max_abs).3g%(same)s"
              % dict(r, same=", same bits" if r["same_bits"] else ""))
    return 1 if o.max_kl is not None and not r["mean_kl"] <= o.max_kl else 0


if __name__ == "__main__":
    sys.exit(main())
