#!/usr/bin/env python3
"""Make tests/data/models: one tiny model for each family, and what outside programs say about it.

  mkmodel.py OUT [--reference tests/reference/reference.py] [--peer PYTHON PEER_SCRIPT]

Weights are F32 multiples of 1/64, so that the files pack well; `mixed` and `gpt-oss-mxfp4` have quantized weights instead and no
expected logits; `qwen3moe-fused` is qwen3moe with gate and up in one stack. --reference keeps in NAME.reference what the float reference computes (numpy, keys and values rounded to f16).
With --peer, PYTHON PEER_SCRIPT logits MODEL OUT.f32 IDS --prefill N asks llama.cpp, into NAME.peer. Both are float32, the rows
in ROWS of (n_tok, n_vocab); ids.txt holds the ids. Needs numpy and gguf.
"""
import argparse
import os
import subprocess
import sys
import tempfile

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

N_TOK, PREFILL, ROWS = 150, 130, [0, 1, 63, 64, 127, 129, 130, 149]
N_VOCAB = 288
NO_REFERENCE = ["granite.gguf", "qwen2moe.gguf"]  # families that the float reference does not know


def byte_tokens(names):
    """GPT-2's printable stand-ins for the 256 bytes, then these names, fillers and two control tokens."""
    keep = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    chars, n = {}, 0
    for b in range(256):
        chars[b] = chr(b) if b in keep else chr(256 + n)
        n += b not in keep
    tokens = [chars[b] for b in range(256)]
    merged = ["th", "he", "in", "er", "an", "Ġt", "Ġa", "on", "re", "Ġthe"]
    merges = ["t h", "h e", "i n", "e r", "a n", "Ġ t", "Ġ a", "o n", "r e", "Ġt he"]
    fill = [*names, *("<unused%d>" % i for i in range(len(names), N_VOCAB - 256 - len(merged) - 2))]
    types = [1] * (256 + len(merged)) + [5] * len(fill) + [3, 3]
    return tokens + merged + fill + ["<|end|>", "<|begin|>"], merges, types


class Maker:
    def __init__(self, path, arch, seed, **p):
        self.w = gguf.GGUFWriter(path, arch)
        self.arch, self.p = arch, p
        self.rng = np.random.default_rng(seed)
        self.held = []
        w = self.w
        w.add_name("tiny " + os.path.basename(path)[:-5])
        w.add_block_count(p["layers"] + p.get("nextn", 0))
        w.add_context_length(512)
        w.add_embedding_length(p["d"])
        w.add_feed_forward_length(p["ff"])
        w.add_head_count(p["heads"])
        w.add_head_count_kv(p["kv"])
        w.add_key_length(p.get("k_len", p["hd"]))
        w.add_value_length(p.get("v_len", p["hd"]))
        w.add_rope_dimension_count(p.get("rot", p["hd"]))
        w.add_rope_freq_base(p.get("base", 10000.0))
        w.add_layer_norm_rms_eps(1e-5)
        w.add_vocab_size(N_VOCAB)
        tokens, merges, types = byte_tokens(p.get("names", ()))
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre("gpt-2")
        w.add_token_list(tokens)
        w.add_token_types(types)
        w.add_token_merges(merges)
        w.add_bos_token_id(N_VOCAB - 1)
        w.add_eos_token_id(N_VOCAB - 2)
        w.add_add_bos_token(False)
        w.add_chat_template("{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
                            "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}")

    def mat(self, name, *shape, gain=1.0, typ=T.F32, hold=False):
        """Rows outermost; std about gain / sqrt(n_in). hold: gate waits for up, and both become one stack, gate's rows first."""
        x = self.rng.standard_normal(shape) * gain / np.sqrt(shape[-1])
        if hold:
            self.held.append((np.round(x * 64 * 4) / 256).astype(np.float32))
            if len(self.held) == 2:
                self.w.add_tensor(name.replace("ffn_up_exps", "ffn_gate_up_exps"), np.concatenate(self.held, axis=1))
                self.held = []
        elif typ == T.F32:
            self.w.add_tensor(name, (np.round(x * 64 * 4) / 256).astype(np.float32))
        else:
            few = x.astype(np.float32).reshape(-1, shape[-1])  # few different rows: they repeat, and the file packs well
            x = few[np.arange(len(few)) * 5 % 8 + np.arange(len(few)) // 64 % 4].reshape(shape)
            self.w.add_tensor(name, gguf.quants.quantize(x, typ) if typ != T.Q4_K and typ != T.Q6_K else self.random_k(x, typ),
                              raw_dtype=typ)

    def random_k(self, x, typ):
        """Random K-quant blocks with a scale that fits x: the package has no quantizer for them."""
        n, size = gguf.GGML_QUANT_SIZES[typ]
        b = np.frombuffer(self.rng.bytes(7 * size), np.uint8).reshape(-1, size)
        b = b[np.arange(x.size // n) * 3 % 7].copy()
        unit = float(x.std()) / (250.0 if typ == T.Q4_K else 1100.0)
        half = lambda v: np.frombuffer(np.float16(v).tobytes(), np.uint8)
        if typ == T.Q4_K:
            b[:, 0:2], b[:, 2:4] = half(unit), half(7.5 * unit)
        else:
            b[:, 208:210] = half(unit)
        return b.reshape(x.shape[:-1] + (x.shape[-1] // n * size,))

    def vec(self, name, n, around=1.0):
        x = around + self.rng.standard_normal(n) * 0.1
        self.w.add_tensor(name, (np.round(x * 64) / 64).astype(np.float32))

    def scale(self, stem, n=1):
        """A factor of the product, as 4-bit float files have it."""
        if self.p.get("scale"):
            self.vec(stem + ".scale", n)

    def latent_attention(self, b, t):
        p = self.p
        d, heads, rank, nope = p["d"], p["heads"], p["latent"], p["q_len"] - p["rot"]
        if p["q_rank"]:
            self.mat(b + "attn_q_a.weight", p["q_rank"], d, gain=1.5, typ=next(t))
            self.vec(b + "attn_q_a_norm.weight", p["q_rank"])
            self.mat(b + "attn_q_b.weight", heads * p["q_len"], p["q_rank"], gain=1.5, typ=next(t))
        else:
            self.mat(b + "attn_q.weight", heads * p["q_len"], d, gain=1.5, typ=next(t))
        self.mat(b + "attn_kv_a_mqa.weight", rank + p["rot"], d, gain=1.5, typ=next(t))
        self.vec(b + "attn_kv_a_norm.weight", rank)
        if p.get("kv_in_one"):
            self.mat(b + "attn_kv_b.weight", heads * (nope + p["o_len"]), rank, gain=1.5, typ=next(t))
        else:
            self.mat(b + "attn_k_b.weight", heads, rank, nope, gain=1.0, typ=next(t))
            self.mat(b + "attn_v_b.weight", heads, p["o_len"], rank, gain=1.5, typ=next(t))
        self.mat(b + "attn_output.weight", d, heads * p["o_len"], typ=next(t))

    def plain_attention(self, b, t):
        p = self.p
        d, q, kv = p["d"], p["heads"] * p["hd"], p["kv"] * p["hd"]
        if p.get("qkv_in_one"):
            self.mat(b + "attn_qkv.weight", q + 2 * kv, d, gain=1.5, typ=next(t))
        for name, n_out in (("q", 2 * q if p.get("delta") else q), ("k", kv), ("v", kv)) if not p.get("qkv_in_one") else ():
            self.mat(b + "attn_%s.weight" % name, n_out, d, gain=1.5, typ=next(t))
            if p.get("bias"):
                self.vec(b + "attn_%s.bias" % name, n_out, 0.0)
            self.scale(b + "attn_%s" % name)
        self.mat(b + "attn_output.weight", d, q, typ=next(t))
        self.scale(b + "attn_output")
        if p.get("out_bias"):
            self.vec(b + "attn_output.bias", d, 0.0)
        if p.get("sinks"):
            self.vec(b + "attn_sinks.weight", p["heads"], p["sinks"])
        if p.get("qk_norm"):
            n = {"head": p["hd"], "row": None}[p["qk_norm"]]
            self.vec(b + "attn_q_norm.weight", n or q)
            self.vec(b + "attn_k_norm.weight", n or kv)

    def delta(self, b, t):
        """A gated delta net; delta: how a file has its projections."""
        p, d = self.p, self.p["d"]
        heads_k, heads_v, hd = DELTA["heads_k"], DELTA["heads_v"], DELTA["hd"]
        keys, values = heads_k * hd, heads_v * hd
        if p["delta"] == "in":
            self.mat(b + "ssm_in.weight", 2 * (keys + values), d, gain=1.5, typ=next(t))
        else:
            self.mat(b + "attn_qkv.weight", 2 * keys + values, d, gain=1.5, typ=next(t))
            self.scale(b + "attn_qkv")
            self.mat(b + "attn_gate.weight", values, d, gain=1.5, typ=next(t))
            self.scale(b + "attn_gate")
        if p["delta"] == "apart":
            for name in ("alpha", "beta"):
                self.mat(b + "ssm_%s.weight" % name, heads_v, d, gain=2.0)
                self.scale(b + "ssm_" + name)
        else:
            self.mat(b + "ssm_ba.weight", 2 * heads_v, d, gain=2.0)
        self.mat(b + "ssm_conv1d.weight", 2 * keys + values, DELTA["conv"])
        self.vec(b + "ssm_dt.bias", heads_v, 0.25)
        self.vec(b + "ssm_a", heads_v, -0.375)
        self.vec(b + "ssm_norm.weight", hd)
        self.mat(b + "ssm_out.weight", d, values, typ=next(t))
        self.scale(b + "ssm_out")

    def layer(self, i, types):
        p, b = self.p, "blk.%d." % i
        d = p["d"]
        t = iter(types * 20) if types else iter([T.F32] * 40)
        self.vec(b + "attn_norm.weight", d)
        if p.get("latent"):
            self.latent_attention(b, t)
        elif p.get("delta") and i < 3:
            self.delta(b, t)
        else:
            self.plain_attention(b, t)
        if p.get("post_norm"):
            self.vec(b + "post_attention_norm.weight", d)
            self.vec(b + "post_ffw_norm.weight", d)
        self.vec(b + p.get("ffn_norm", "ffn_norm") + ".weight", d)
        self.feed_forward(i, t)

    def feed_forward(self, i, t):
        p, b, d = self.p, "blk.%d." % i, self.p["d"]
        if p.get("experts") and i >= p.get("lead", 0):
            e, ff = p["experts"], p["ffx"]
            self.mat(b + "ffn_gate_inp.weight", e, d, gain=3.0)
            for name, shape in (("gate", (e, ff, d)), ("up", (e, ff, d)), ("down", (e, d, ff))):
                self.mat(b + "ffn_%s_exps.weight" % name, *shape, gain=2.0, typ=next(t), hold=p.get("fused") and name != "down")
                self.scale(b + "ffn_%s_exps" % name, e)
                if p.get("expert_bias"):
                    self.mat(b + "ffn_%s_exps.bias" % name, e, shape[1], gain=p["expert_bias"])
            if p.get("expert_bias"):
                self.vec(b + "ffn_gate_inp.bias", e, 0.0)
            if p.get("select_bias"):
                self.vec(b + "exp_probs_b.bias", e, 0.0)
            if p.get("shared"):
                s = p["shared"]
                for name, shape in (("gate", (s, d)), ("up", (s, d)), ("down", (d, s))):
                    self.mat(b + "ffn_%s_shexp.weight" % name, *shape, gain=2.0, typ=next(t))
                    if p.get("delta"):
                        self.scale(b + "ffn_%s_shexp" % name)
                if p.get("shared_gate"):
                    self.vec(b + "ffn_gate_inp_shexp.weight", d, 0.0)
        else:
            for name, shape in (("gate", (p["ff"], d)), ("up", (p["ff"], d)), ("down", (d, p["ff"]))):
                self.mat(b + "ffn_%s.weight" % name, *shape, gain=2.0, typ=next(t))
                self.scale(b + "ffn_%s" % name)

    def finish(self, types=None, embd=T.F32):
        p, w = self.p, self.w
        if p.get("experts"):
            w.add_expert_count(p["experts"])
            w.add_expert_used_count(p["used"])
            w.add_expert_feed_forward_length(p["ffx"])
        self.mat("token_embd.weight", N_VOCAB, p["d"], gain=np.sqrt(p["d"]) * p.get("embd", 1.0), typ=embd)
        for i in range(p["layers"]):
            self.layer(i, types)
        if p.get("nextn"):  # a layer that guesses the token after the next, and what it has beside others
            self.p = dict(p, scale=False)
            self.layer(p["layers"], types)
            b = "blk.%d.nextn." % p["layers"]
            self.mat(b + "eh_proj.weight", p["d"], 2 * p["d"])
            for name in ("enorm", "hnorm", "shared_head_norm"):
                self.vec(b + name + ".weight", p["d"])
            if p.get("nextn_norm"):
                self.vec("blk.%d.layer_output_norm.weight" % p["layers"], p["d"])
        self.vec("output_norm.weight", p["d"])
        if p.get("rope_freqs"):
            self.w.add_tensor("rope_freqs.weight", np.linspace(1.0, 4.0, p["hd"] // 2).astype(np.float32))
        if not p.get("tied"):
            self.mat("output.weight", N_VOCAB, p["d"], gain=2.0, typ=embd)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()


DELTA = dict(heads_k=2, heads_v=4, hd=16, conv=4)
SMALL = dict(layers=2, d=32, ff=64, heads=2, kv=1, hd=32)


def make(out):
    def path(name):
        return os.path.join(out, name + ".gguf")

    Maker(path("llama"), "llama", 1, rope_freqs=True, **SMALL).finish()
    m = Maker(path("llama-linear"), "llama", 14, tied=True, bias=True, out_bias=True, **SMALL)
    m.w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    m.w.add_rope_scaling_factor(4.0)
    m.finish()
    Maker(path("llama-scaled"), "llama", 15, scale=True, **SMALL).finish()
    m = Maker(path("llama-yarn"), "llama", 2, tied=True, **SMALL)
    m.w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    m.w.add_rope_scaling_factor(4.0)
    m.w.add_rope_scaling_orig_ctx_len(128)
    m.finish()
    Maker(path("mixtral"), "llama", 3, experts=4, used=2, ffx=64, **SMALL).finish()
    Maker(path("qwen2"), "qwen2", 4, bias=True, tied=True, base=1e6, **dict(SMALL, hd=16)).finish()
    m = Maker(path("qwen2moe"), "qwen2moe", 5, bias=True, experts=4, used=2, ffx=32, shared=32, shared_gate=True, **dict(SMALL, hd=16))
    m.w.add_expert_shared_feed_forward_length(32)
    m.finish()
    Maker(path("qwen3"), "qwen3", 6, qk_norm="head", **SMALL).finish()
    Maker(path("qwen3moe"), "qwen3moe", 7, qk_norm="head", scale=True, experts=8, used=3, ffx=32, **SMALL).finish()
    Maker(path("qwen3moe-fused"), "qwen3moe", 7, qk_norm="head", scale=True, experts=8, used=3, ffx=32, fused=True, **SMALL).finish()
    Maker(path("olmoe"), "olmoe", 8, qk_norm="row", experts=4, used=2, ffx=64, **dict(SMALL, kv=2, hd=16)).finish()
    m = Maker(path("gemma2"), "gemma2", 9, post_norm=True, tied=True, embd=0.25, **SMALL)
    m.w.add_sliding_window(24)
    m.w.add_attn_logit_softcapping(50.0)
    m.w.add_final_logit_softcapping(30.0)
    m.finish()
    m = Maker(path("gemma3"), "gemma3", 10, post_norm=True, qk_norm="head", tied=True, embd=0.25, base=1e6, **dict(SMALL, layers=7))
    m.w.add_sliding_window(24)
    m.w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    m.w.add_rope_scaling_factor(8.0)
    m.finish()
    m = Maker(path("dots1"), "dots1", 11, qk_norm="head", experts=8, used=3, ffx=32, shared=32, select_bias=True, lead=1,
              **dict(SMALL, kv=2))
    m.w.add_leading_dense_block_count(1)
    m.w.add_expert_shared_count(1)
    m.w.add_expert_weights_norm(True)
    m.w.add_expert_weights_scale(2.5)
    m.w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    m.finish()
    m = Maker(path("granite"), "granite", 12, **SMALL)
    m.w.add_logit_scale(4.0)
    m.w.add_residual_scale(0.5)
    m.w.add_embedding_scale(3.0)
    m.w.add_attention_scale(0.125)
    m.finish()
    for name, ffx, types in (("gpt-oss", 32, None), ("gpt-oss-mxfp4", 256, [T.Q8_0] * 4 + [T.MXFP4] * 3)):
        m = Maker(path(name), "gpt-oss", 16, bias=True, out_bias=True, sinks=2.0, ffn_norm="post_attention_norm", expert_bias=2.0,
                  experts=8, used=3, ffx=ffx, base=150000.0, names=("<|start|>", "<|channel|>", "<|message|>"),
                  **dict(SMALL, layers=3, heads=4, kv=2))
        m.w.add_sliding_window(24)
        m.w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        m.w.add_rope_scaling_factor(4.0)
        m.w.add_rope_scaling_orig_ctx_len(128)
        m.finish(types)
    m = Maker(path("glm4moe"), "glm4moe", 17, bias=True, qk_norm="head", ffn_norm="post_attention_norm", rot=16, nextn=1, experts=8, used=3,
              ffx=16, shared=32, select_bias=True, lead=1, **SMALL)
    m.w.add_nextn_predict_layers(1)
    m.w.add_leading_dense_block_count(1)
    m.w.add_expert_shared_count(2)
    m.w.add_expert_weights_norm(True)
    m.w.add_expert_weights_scale(1.5)
    m.finish()
    m = Maker(path("minimax-m2"), "minimax-m2", 18, qk_norm="row", rot=8, experts=8, used=3, ffx=32, select_bias=True,
              **dict(SMALL, ff=32, heads=4, kv=2, hd=16))
    m.w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    m.finish()
    Maker(path("ernie4_5"), "ernie4_5", 19, tied=True, base=500000.0, **SMALL).finish()
    m = Maker(path("ernie4_5-moe"), "ernie4_5-moe", 20, base=500000.0, experts=8, used=3, ffx=32, shared=64, select_bias=True, lead=1, **SMALL)
    m.w.add_interleave_moe_layer_step(1)
    m.w.add_leading_dense_block_count(1)
    m.w.add_expert_shared_count(2)
    m.w.add_expert_shared_feed_forward_length(64)
    m.finish()
    Maker(path("hunyuan-dense"), "hunyuan-dense", 21, qk_norm="head", tied=True, base=11158840.0, **SMALL).finish()
    m = Maker(path("hunyuan-moe"), "hunyuan-moe", 22, qk_norm="head", base=11158840.0, experts=8, used=3, ffx=32, shared=32,
              **dict(SMALL, ff=32, hd=16))
    m.w.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    m.w.add_rope_scaling_factor(1.0)
    m.w.add_expert_shared_count(1)
    m.w.add_expert_shared_feed_forward_length(32)
    m.finish()
    Maker(path("seed_oss"), "seed_oss", 23, bias=True, ffn_norm="post_attention_norm", base=1e7, **SMALL).finish()
    Maker(path("smollm3"), "smollm3", 24, tied=True, base=5e6, **dict(SMALL, layers=5)).finish()
    m = Maker(path("qwen2vl"), "qwen2vl", 25, bias=True, tied=True, base=1e6, **dict(SMALL, hd=16))
    m.w.add_rope_dimension_sections([2, 3, 3, 0])
    m.finish()
    for name, p in (("qwen3vl", {}), ("qwen3vlmoe", dict(experts=8, used=3, ffx=32))):
        m = Maker(path(name), name, 26, qk_norm="head", tied=True, base=5e6, **p, **SMALL)
        m.w.add_rope_dimension_sections([6, 5, 5, 0])
        m.w.add_num_deepstack_layers(1)
        m.finish()
    # latent attention: compressed queries, groups, YaRN; neither; in the older form; both forms without experts
    mla = dict(layers=3, d=32, ff=48, heads=4, kv=1, hd=64, latent=64, rot=32, q_len=64, o_len=32, experts=8, used=3, ffx=16, shared=32, lead=1)
    for name, seed, p in (("deepseek2", 27, dict(q_rank=24, select_bias=True, nextn=1)), ("deepseek2-lite", 28, dict(q_rank=0)),
                          ("deepseek2-old", 29, dict(q_rank=0, kv_in_one=True)),
                          ("deepseek2-old-dense", 30, dict(q_rank=24, kv_in_one=True, experts=0, lead=3)),
                          ("deepseek2-dense", 31, dict(q_rank=0, experts=0, lead=3))):
        is_old = "kv_in_one" in p
        m = Maker(path(name), "deepseek2", seed, **dict(mla, k_len=64 if is_old else 96, v_len=32 if is_old else 64, kv=4 if is_old else 1, **p))
        m.w.add_kv_lora_rank(64)
        m.w.add_q_lora_rank(p["q_rank"])
        m.w.add_leading_dense_block_count(m.p["lead"])
        m.w.add_expert_shared_count(2 if m.p["experts"] else 0)
        if not m.p["experts"]:
            m.w.add_expert_feed_forward_length(m.p["ff"])
        if not is_old:
            m.w.add_key_length_mla(64)
            m.w.add_value_length_mla(32)
        if "nextn" in p:
            m.w.add_nextn_predict_layers(1)
            m.w.add_expert_group_count(4)
            m.w.add_expert_group_used_count(2)
            m.w.add_expert_weights_norm(True)
            m.w.add_expert_weights_scale(2.5)
            m.w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        if name in ("deepseek2", "deepseek2-lite", "deepseek2-old-dense"):
            m.w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            m.w.add_rope_scaling_factor(4.0)
            m.w.add_rope_scaling_orig_ctx_len(128)
        if name in ("deepseek2", "deepseek2-lite"):
            m.w.add_rope_scaling_yarn_log_mul(0.1 if name == "deepseek2" else 0.0707)
        m.finish()
    m = Maker(path("bailingmoe2"), "bailingmoe2", 32, qkv_in_one=True, qk_norm="head", rot=16, nextn=1, nextn_norm=True, experts=12, used=3, ffx=16, shared=32,
              select_bias=True, lead=1, **dict(SMALL, d=64))
    m.w.add_nextn_predict_layers(1)
    m.w.add_leading_dense_block_count(1)
    m.w.add_expert_shared_count(1)
    m.w.add_expert_shared_feed_forward_length(32)
    m.w.add_expert_weights_norm(True)
    m.w.add_expert_weights_scale(2.5)
    m.w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    m.w.add_expert_group_count(3)
    m.w.add_expert_group_used_count(2)
    m.finish()
    moe = dict(experts=8, used=3, ffx=32, shared=32, shared_gate=True)
    for name, arch, delta, p in (("qwen3next", "qwen3next", "parts", moe), ("qwen3next-in", "qwen3next", "in", moe),
                                 ("qwen35", "qwen35", "apart", dict(scale=True)),
                                 ("qwen35moe", "qwen35moe", "apart", dict(moe, scale=True, nextn=1))):
        m = Maker(path(name), arch, 27, qk_norm="head", ffn_norm="post_attention_norm", rot=8, base=1e7, delta=delta, **p,
                  **dict(SMALL, layers=4))
        m.w.add_ssm_conv_kernel(DELTA["conv"])
        m.w.add_ssm_inner_size(DELTA["heads_v"] * DELTA["hd"])
        m.w.add_ssm_state_size(DELTA["hd"])
        m.w.add_ssm_time_step_rank(DELTA["heads_v"])
        m.w.add_ssm_group_count(DELTA["heads_k"])
        m.w.add_full_attention_interval(4)
        if "nextn" in p:
            m.w.add_nextn_predict_layers(1)
            m.w.add_array("qwen35moe.attention.recurrent_layers", [True, True, True, False, False])
        if "shared" in p:
            m.w.add_expert_shared_feed_forward_length(32)
        if arch != "qwen3next":
            m.w.add_rope_dimension_sections([1, 2, 1, 0])
        m.finish()
    Maker(path("mixed"), "qwen3moe", 13, qk_norm="head", experts=4, used=2, ffx=256,
          **dict(SMALL, d=256, hd=64, ff=256)).finish(
              types=[T.Q4_K, T.Q8_0, T.Q6_K, T.Q5_1, T.Q4_0, T.Q4_1, T.BF16, T.Q5_0, T.Q4_K, T.F16, T.Q6_K], embd=T.Q8_0)


def ask(out, suffix, command):
    """command(model, out_file, ids) is a list of words that runs a program which writes all logits to out_file."""
    ids = np.random.default_rng(99).integers(0, N_VOCAB, N_TOK)
    with open(os.path.join(out, "ids.txt"), "w") as f:
        f.write("\n".join(map(str, ids)) + "\n")
    skip = ["mixed.gguf", "qwen3moe-fused.gguf", "gpt-oss-mxfp4.gguf"] + (NO_REFERENCE if suffix == ".reference" else [])
    for name in sorted(n for n in os.listdir(out) if n.endswith(".gguf") and n not in skip):
        with tempfile.NamedTemporaryFile() as tmp:
            subprocess.run(command(os.path.join(out, name), tmp.name, ",".join(map(str, ids))), check=True)
            x = np.fromfile(tmp.name, np.float32).reshape(N_TOK, N_VOCAB)
        x[ROWS].tofile(os.path.join(out, name[:-5] + suffix))
        print(name, "logits std %.3f" % x.std())


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out")
    ap.add_argument("--reference")
    ap.add_argument("--peer", nargs=2)
    a = ap.parse_args()
    os.makedirs(a.out, exist_ok=True)
    make(a.out)
    if a.reference:
        ask(a.out, ".reference", lambda model, out, ids: [sys.executable, a.reference, model, out, ids, "--kv", "f16"])
    if a.peer:
        ask(a.out, ".peer", lambda model, out, ids: [*a.peer, "logits", model, out, ids, "--prefill", str(PREFILL)])
