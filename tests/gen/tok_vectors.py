#!/usr/bin/env python3
"""tok_vectors.py PEER_MODELS [MODEL.gguf ...] OUT_DIR - small vocabularies with texts and the ids that outside programs give them.

PEER_MODELS is the folder of ggml-vocab-*.gguf with their .inp and .out files (inside the llama-cpp-python sdist). The ids come from
  * the .out files, which llama.cpp's authors made with each model's own tokenizer;
  * llama.cpp itself (python module llama_cpp), for more texts, for special tokens, and for splits that no file there uses;
  * the Hugging Face `tokenizers` package, for the splits of gpt-4o, tekken and kimi-k2, which llama.cpp only approximates.
A vocabulary is cut down to the tokens and merges that its texts can reach (those whose spelling occurs in a text) and renumbered in
the old order, so that every choice stays what it was. Needs: llama_cpp, tokenizers, gguf.
"""
import ctypes, json, os, struct, sys, tempfile
import gguf
import llama_cpp as L
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

KINDS = ["command-r", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "llama-spm", "mpt", "phi-3", "qwen2", "qwen35",
         "refact", "starcoder"]
BORROWED = {  # splits shown on the vocabulary of gpt-2
    "llama": ["default", None, "smollm", "glm4", "chatglm-bpe", "deepseek-v3", "llama3", "qwen2", "qwen35", "falcon", "starcoder",
              "command-r", "mpt", "refact", "bailingmoe", "seed-coder", "dbrx", "stablelm2"],
    "hf": ["gpt-4o", "llama4", "tekken", "kimi-k2"],
}
CASED = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
         r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|"
         r"\s+(?!\S)|\s+")
C = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
UPPER, LOWER = (r"[%s\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]" % kind for kind in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
KIMI = (r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?" + UPPER + "*" + LOWER + "+" + C + r"|[^\r\n\p{L}\p{N}]?" + UPPER + "+" + LOWER + "*" + C +
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
HF_REGEX = {"gpt-4o": CASED % (C, C, r"\p{N}{1,3}"), "llama4": CASED % (C, C, r"\p{N}{1,3}"), "tekken": CASED % ("", "", r"\p{N}"),
            "kimi-k2": KIMI}

TEXTS = [
    "", " ", "  ", "\n", "\t\n", " \n \n", "a", "'", "It's we'Re I'LL they've 'D x'ſ",
    "CamelCaseÉcoleÉCOLE HTTPServer iOS straßeẞ ǅabc",
    "1 12 123 1234 12345 ٣٤٥٦٧ ⅧⅨ ½ 3.14159e-10 0x7fff_ffff",
    "नमस्ते दुनिया! สวัสดีชาวโลก مرحبا بالعالم שָׁלוֹם ქართული Ქართული",
    "今日は世界。안녕하세요 세계 龥龦ࠀ퟿ ｆｕｌｌ－ｗｉｄｔｈ！",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇪🇺 e\u0301 a\u0300\u0301\u0302 ∑∫√∞ ±$€£ ←→ «»“”‘’…",
    "x\u0085y\u00a0z\u180ew\u2003v\u3000u\ufeff\u200b\u2028\r\n\r\r\n  \t  end   ",
    "def f(x):\n    if x > 0:\n\treturn x**2  # ok\n\n\n    return {'a': [1,2,3]}\n/* */ //\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa                                 b!!!!!!!!!!!!!!!!????",
    "\u0000\u0001\u001b[31m\u007f \U0001f600\U0010ffff \ue000\u0378",
]


@L.llama_log_callback
def quiet(level, text, _):
    pass


def read(path):
    """What of a GGUF's keys matters here."""
    r = gguf.GGUFReader(path)
    get = lambda k: r.fields[k].contents() if k in r.fields else None
    v = {"model": get("tokenizer.ggml.model"), "pre": get("tokenizer.ggml.pre"), "name": get("general.name")}
    v["tokens"] = get("tokenizer.ggml.tokens")
    v["types"] = get("tokenizer.ggml.token_type") or [1] * len(v["tokens"])
    v["scores"] = get("tokenizer.ggml.scores") if v["model"] == "llama" else None
    v["merges"] = get("tokenizer.ggml.merges") or []
    for k in ("bos", "eos", "eot", "eom"):
        v[k] = get("tokenizer.ggml.%s_token_id" % k)
    v["unk"] = get("tokenizer.ggml.unknown_token_id")
    for k in ("add_bos", "add_eos"):
        v[k] = get("tokenizer.ggml.%s_token" % k)
    v["add_space_prefix"] = get("tokenizer.ggml.add_space_prefix")
    return v


def with_pre(path, pre):
    """A copy of a vocabulary-only file whose tokenizer.ggml.pre is another (None: gone, by renaming the key)."""
    data = open(path, "rb").read()
    key = b"tokenizer.ggml.pre"
    at = data.index(struct.pack("<Q", len(key)) + key)
    val = at + 8 + len(key) + 4
    n = struct.unpack_from("<Q", data, val)[0]
    if pre is None:
        data = data.replace(key, b"tokenizer.ggml.pr_", 1)
    else:
        data = data[:val] + struct.pack("<Q", len(pre)) + pre.encode() + data[val + 8 + n:]
    f = tempfile.NamedTemporaryFile(suffix=".gguf", delete=False)
    f.write(data)
    f.close()
    return f.name


class Peer:
    def __init__(self, path):
        mp = L.llama_model_default_params()
        mp.vocab_only = True
        self.model = L.llama_model_load_from_file(path.encode(), mp)
        assert self.model, path
        self.vocab = L.llama_model_get_vocab(self.model)

    def ids(self, text, special):
        raw = text.encode()
        buf = (L.llama_token * (len(raw) * 2 + 16))()
        n = L.llama_tokenize(self.vocab, raw, len(raw), buf, len(buf), False, special)
        assert n >= 0
        return list(buf[:n])

    def text(self, ids):
        buf = ctypes.create_string_buffer(1 << 16)
        out = b""
        for i in ids:
            n = L.llama_token_to_piece(self.vocab, i, buf, len(buf), 0, True)
            out += buf.raw[:n]
        return out

    def eog(self, n):
        return [i for i in range(n) if L.llama_vocab_is_eog(self.vocab, i)]

    def close(self):
        L.llama_model_free(self.model)


def byte_alphabet():
    """GPT-2's: byte -> character."""
    same = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in same]
    return {**{b: chr(b) for b in same}, **{b: chr(256 + i) for i, b in enumerate(rest)}}


ALPHABET = byte_alphabet()


def spelled(v, text):
    """A text as the vocabulary would spell it."""
    if v["model"] == "llama":
        return "\u2581" + text.replace(" ", "\u2581")
    return "".join(ALPHABET[b] for b in text.encode())


def reduce(v, cases, keep):
    """v with the tokens that the cases can reach, and the map from old to new ids."""
    blob = "\uffff".join(spelled(v, c["text"]) for c in cases)
    raw = "\uffff".join(c["text"] for c in cases)
    keep = set(keep)
    for i, (t, ty) in enumerate(zip(v["tokens"], v["types"])):
        if ty == 6 or t in ALPHABET.values() or (t in blob if ty == 1 else t in raw):
            keep.add(i)
    for c in cases:
        keep.update(c["ids"])
    for k in ("bos", "eos", "eot", "eom", "unk"):
        if v[k] is not None:
            keep.add(v[k])
    order = sorted(keep)
    new = {old: i for i, old in enumerate(order)}
    out = {k: v[k] for k in ("model", "pre", "name", "add_bos", "add_eos", "add_space_prefix")}
    for k in ("bos", "eos", "eot", "eom", "unk"):
        out[k] = None if v[k] is None else new[v[k]]
    out["tokens"] = [v["tokens"][i] for i in order]
    out["types"] = "".join(str(v["types"][i]) for i in order)
    if v["scores"]:
        out["scores"] = [float("%.9g" % v["scores"][i]) for i in order]
    out["merges"] = [m for m in v["merges"] if "".join(m.split(" ", 1)) in blob]
    return out, new


def special_texts(v):
    """Texts that spell some special tokens of a vocabulary."""
    pick = lambda want: [t for t, ty in zip(v["tokens"], v["types"]) if ty == want and t.strip()]
    control, user = pick(3), pick(4)
    control = control[:2] + control[-1:] + [t for t in control if "im_" in t or "eot" in t or "turn" in t]
    user = user[:2] + user[-1:]
    out = ["Hi" + t + " there \n" for t in control + user]
    out.append("".join(control + user) + "x" + "  ".join(control + user) + " ")
    return out


def cases_of(path, v, peer):
    cases = []
    if os.path.exists(path + ".inp"):
        texts = open(path + ".inp", encoding="utf-8", newline="").read().split("\n__ggml_vocab_test__\n")
        rows = open(path + ".out").read().split("\n")
        for text, row in zip(texts, rows):
            cases.append({"text": text, "flags": 0, "ids": [int(i) for i in row.split()]})
    for text in TEXTS:
        cases.append({"text": text, "flags": 0, "ids": peer.ids(text, False)})
    for text in special_texts(v):
        for flags in (0, 1):
            cases.append({"text": text, "flags": flags, "ids": peer.ids(text, flags == 1)})
    return cases


def finish(v, cases, keep, path):
    out, new = reduce(v, cases, keep)
    out["cases"] = [{**c, "ids": [new[i] for i in c["ids"]]} for c in cases]
    return out, new


def write(out, path):
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        json.dump(out, f, ensure_ascii=False, separators=(",", ":"))
        f.write("\n")
    print(path, os.path.getsize(path), len(out["tokens"]), "tokens", len(out["merges"]), "merges", len(out["cases"]), "cases")


def one(path, out_dir, name):
    v = read(path)
    peer = Peer(path)
    cases = cases_of(path, v, peer)
    eog = peer.eog(len(v["tokens"]))
    out, new = finish(v, cases, eog, path)
    out["eog"] = [new[i] for i in eog]
    out["decoded"] = [{"ids": c["ids"], "hex": peer.text([i for i in o["ids"]]).hex()} for c, o in list(zip(out["cases"], cases))[-12:]]
    peer.close()
    write(out, os.path.join(out_dir, name + ".json"))


def borrowed(base, out_dir):
    v = read(base)
    cases = []
    for pre in BORROWED["llama"]:
        path = with_pre(base, pre)
        peer = Peer(path)
        cases += [{"text": t, "flags": 0, "pre": pre, "ids": peer.ids(t, False)} for t in TEXTS]
        peer.close()
        os.unlink(path)
    for pre in BORROWED["hf"]:
        merges = [tuple(m.split(" ", 1)) for m in v["merges"]]
        hf = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(v["tokens"])}, merges=merges, ignore_merges=pre == "tekken"))
        hf.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(HF_REGEX[pre]), "isolated"),
                                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        # U+017F: see src/model/tok_split.c
        cases += [{"text": t, "flags": 0, "pre": pre, "ids": hf.encode(t).ids} for t in TEXTS if "ſ" not in t]
    write(finish(v, cases, [], base)[0], os.path.join(out_dir, "splits.json"))


def main():
    peer_dir, *models_, out_dir = sys.argv[1:]
    L.llama_log_set(quiet, ctypes.c_void_p(0))
    L.llama_backend_init()
    os.makedirs(out_dir, exist_ok=True)
    for kind in KINDS:
        one(os.path.join(peer_dir, "ggml-vocab-%s.gguf" % kind), out_dir, kind)
    for path in models_:
        one(path, out_dir, os.path.basename(path).split("-")[0])
    borrowed(os.path.join(peer_dir, "ggml-vocab-gpt-2.gguf"), out_dir)


main()
