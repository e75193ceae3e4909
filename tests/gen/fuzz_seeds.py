#!/usr/bin/env python3
"""fuzz_seeds.py DIR - first inputs for tests/fuzz/fuzz_tok and fuzz_template, from tests/data; DIR gets tok/ and template/."""
import json, os, sys

here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "data")
out = sys.argv[1]
for d in ("tok", "template"):
    os.makedirs(os.path.join(out, d), exist_ok=True)


def tok(name, kind, n_text=150):
    """The shortest tokens and all special ones of a vocabulary, the merges that stay within, some text."""
    v = json.load(open(os.path.join(here, "tok", name + ".json"), encoding="utf-8"))
    rows = sorted(zip(v["tokens"], v["types"]), key=lambda r: (r[1] == "1", len(r[0])))[:200]
    have = {t for t, _ in rows}
    data = bytes([kind])
    for t, ty in rows:
        raw = t.encode()[:255]
        data += bytes([len(raw), int(ty) + 8 * min(len(t), 20)]) + raw if raw else b""
    data += b"\0"
    for m in [m for m in v["merges"] if set(m.split(" ", 1)) <= have][:100]:
        data += bytes([len(m.encode())]) + m.encode()
    data += b"\0" + "".join(c["text"] for c in v["cases"])[:n_text].encode()
    open(os.path.join(out, "tok", name), "wb").write(data)


for i, (name, kind) in enumerate([("gpt-2", 1), ("smollm2", 2), ("falcon", 3), ("llama-bpe", 4), ("qwen2", 5), ("qwen35", 6), ("deepseek-llm", 9),
                                  ("deepseek-coder", 10), ("llama-spm", 128), ("phi-3", 192 + 32), ("gemma3", 160)]):
    tok(name, kind)
cases = json.load(open(os.path.join(here, "template", "language.json"), encoding="utf-8"))["cases"]
for i in range(0, len(cases), 8): # together, where they do not break each other
    good = "\n".join(c["source"] for c in cases[i:i + 8] if "text" in c)
    open(os.path.join(out, "template", "language-%02d" % (i // 8)), "w", encoding="utf-8").write(good)
for name in ("Qwen-Qwen3-0.6B", "meta-llama-Llama-3.1-8B-Instruct", "openai-gpt-oss-120b"):
    source = json.load(open(os.path.join(here, "template", name + ".json"), encoding="utf-8"))["source"]
    open(os.path.join(out, "template", name), "w", encoding="utf-8").write(source)
