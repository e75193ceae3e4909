#!/usr/bin/env python3
"""What llama.cpp's grammars let come next: what ours are held against.

  grammar_vectors.py OUT_DIR     (tests/data/grammar; needs llama-cpp-python 0.3.36)

vocab.gguf: 256 bytes and some hundred longer tokens that fall across the borders of what grammars name, and amid characters. gbnf.json: for each
grammar walks of random allowed tokens; at each step all allowed ids, as ranges, and whether the text may end. Of llama.cpp's allowed tokens
those are left out whose bytes cannot be part of a UTF-8 text, and ends amid a character: a grammar is one of characters.
"""
import ctypes
import json
import os
import random
import struct
import sys

import llama_cpp as peer
from gguf_bytes import byte_letters, string, value

GRAMMARS = [
    'root ::= "yes" | "no"',
    'root ::= "a"* "b"+ "c"?',
    'root ::= ("ab" | "cd"){2,3} [x-z]{2} "."{0,2}',
    'root ::= [^"\\\\]{3,} "\\""',
    'root ::= [a-zA-Z_] [a-zA-Z0-9_]* (" = " [0-9]+ "\\n")?',
    'root ::= "é" | "日本" [ぁ-ゟ]+ | [^a-z]',
    'root ::= "\\x41\\u00e9\\U0001F600" .+',
    '# lists\nroot ::= item+\nitem ::= "- " [^\\n]+ "\\n"',
    'root ::= expr\nexpr ::= term ([-+*/] term)*\nterm ::= num | "(" ws expr ws ")"\nnum ::= [0-9]+ ("." [0-9]+)?\nws ::= [ \\t]*',
    'root ::= "(" root ")" | "[" root "]" | ""',
    'root ::= a b\na ::= "x" a | "x"\nb ::= "x" b "y" | "y"',
    'root ::= opt opt opt "!"\nopt ::= ("he" | "n" | "na" | "name")?',
    'root ::= ("a" | "b" # a comment\n  | "c") ("d" |\n "e")?',
    'root ::= nul+ "z"\nnul ::= "a"? "b"? "c"',
    'root ::= [\\t\\r\\n\\\\\\]\\[a-]+',
    'root ::= ([\\x00-\\x1f] | [\\U00010000-\\U0010ffff])+',
    'root ::= "{" ws (pair ("," ws pair)*)? "}"\npair ::= str ":" ws val\nval ::= str | "true" | "null" | "[" ws (val ("," ws val)*)? "]" | root\n'
    'str ::= "\\"" ([^"\\\\\\x00-\\x1f] | "\\\\" ["\\\\/bfnrt])* "\\""\nws ::= | " " | "\\n" [ \\t]{0,8}',
    'root ::= x{3} | y{2,} | z{,2}'.replace("z{,2}", "z{0,2}") + '\nx ::= [a-c]\ny ::= "n" x\nz ::= y y',
    'root ::= ((("a"+ "b")* "c")? "d")+ "e"',
]

WORDS = ['{"', '":', ' "', '", "', '": ', '"}', '},', '[{', ']}', '[]', '{}', '":"', 'true', 'null', 'name', 'na', 'ame', 'he', 'hel', 'yes', 'no', 'nope', 'ye',
         'ab', 'abab', 'abcd', 'cd', 'cdab', 'bc', 'bcc', 'aab', 'aa', 'bb', 'xy', 'xyz', 'zz', 'xx', 'yy', 'xxy', '..', '.x', '12', '3.14', '1+', '+1', '(1',
         '1)', '((', '))', '()', '[]', '(]', ' = ', '= 1', '\n', '\n\n', ' \n', '\n  ', '\n- ', '- a', '- ', ' - ', '\t', '\t\t', '\r\n', '\\n', '\\"', '\\\\',
         'Aé', 'é', 'éa', '日', '日本', '本', 'ぁ', 'ぁぃ', 'ゟ', '😀', '😀😀', 'A', 'Z_', '_9', 'a1', ' a', ' the', 'd!', '!', 'de', 'dd', 'abc', 'ac', 'cz', 'caz', 'na na']
PIECES = [w.encode()[i:j] for w in ('é', '日本', 'ぁぃ', '😀', 'A😀') for i in range(len(w.encode())) for j in range(i + 2, len(w.encode()) + 1)]


def make_vocab(path):
    pieces = [bytes([b]) for b in range(256)]
    pieces += sorted(({w.encode() for w in WORDS} | set(PIECES)) - set(pieces))
    letters = byte_letters()
    tokens = ["".join(letters[b] for b in p) for p in pieces] + ["<|start|>", "<|end|>", "<|pad|>"]
    n = len(tokens)
    keys = {"general.architecture": "llama", "general.name": "letters", "llama.block_count": 1, "llama.context_length": 512, "llama.embedding_length": 64,
            "llama.feed_forward_length": 64, "llama.attention.head_count": 1, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * (n - 3) + [3] * 3, "tokenizer.ggml.merges": ["h e"],
            "tokenizer.ggml.bos_token_id": n - 3, "tokenizer.ggml.eos_token_id": n - 2, "tokenizer.ggml.padding_token_id": n - 1}
    with open(path, "wb") as f:
        f.write(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(keys)))
        for k, v in keys.items():
            f.write(string(k) + value(v))
    return pieces + [b""] * 3


def is_prefix(raw):
    """Can bytes follow that make this a UTF-8 text?"""
    for tail in (b"", b"\x80", b"\x80\x80", b"\x80\x80\x80", b"\xbf", b"\xbf\xbf", b"\xbf\xbf\xbf", b"\x90\x80\x80", b"\xa0\x80", b"\x9f\xbf", b"\x8f\xbf\xbf"):
        try:
            (raw + tail).decode()
            return True
        except UnicodeDecodeError:
            pass
    return False


def is_whole(raw):
    try:
        raw.decode()
        return True
    except UnicodeDecodeError:
        return False


def allowed(sampler, n):
    data = (peer.llama_token_data * n)(*[peer.llama_token_data(i, 0.0, 0.0) for i in range(n)])
    array = peer.llama_token_data_array(data, n, -1, False)
    peer.llama_sampler_apply(sampler, ctypes.byref(array))
    return [data[i].id for i in range(array.size) if data[i].logit != float("-inf")]


def ranges(ids):
    out = []
    for i in sorted(ids):
        if out and out[-1][1] == i - 1:
            out[-1][1] = i
        else:
            out.append([i, i])
    return out


def walk(vocab, pieces, grammar, rng):
    sampler = peer.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
    assert sampler, grammar
    text, steps, end = b"", [], len(pieces) - 2
    for _ in range(14):
        ids = allowed(sampler, len(pieces))
        may_end = end in ids and is_whole(text)
        ids = [i for i in ids if pieces[i] and is_prefix(text + pieces[i])]
        steps.append({"allowed": ranges(ids), "end": may_end})
        if not ids:
            break
        long = [i for i in ids if len(pieces[i]) > 1]
        token = rng.choice(long if long and rng.random() < 0.6 else ids)
        steps[-1]["token"] = token
        peer.llama_sampler_accept(sampler, token)
        text += pieces[token]
    peer.llama_sampler_free(sampler)
    return steps


def main():
    out = sys.argv[1]
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, "vocab.gguf")
    pieces = make_vocab(path)
    peer.llama_backend_init()
    params = peer.llama_model_default_params()
    params.vocab_only = True
    model = peer.llama_model_load_from_file(path.encode(), params)
    vocab = peer.llama_model_get_vocab(model)
    rng = random.Random(5)
    cases = []
    for g in GRAMMARS:
        cases.append({"grammar": g, "walks": [walk(vocab, pieces, g, rng) for _ in range(6)]})
    with open(os.path.join(out, "gbnf.json"), "w") as f:
        f.write("[\n" + ",\n".join(json.dumps(c, separators=(",", ":")) for c in cases) + "\n]\n")


main()
