#!/usr/bin/env python3
"""Logits of a GGUF model in plain float32, with nothing in common with the engine: the truth that ferry is held against.

  reference.py MODEL OUT.f32 IDS [--kv f32|f16] [--verbose]

IDS is 1,2,3 or @FILE with ids apart by commas or spaces. Weights are dequantized by the `gguf` package; everything is
float32 (sums of squares in norms float64). No cache and no tiles: all positions of a layer at once. OUT holds
float32 (n_tok, n_vocab), row-major. --kv f16 rounds keys and values to half precision, as engines with such a cache do.

Families: llama (dense and Mixtral's experts), qwen2, qwen3, qwen3moe, olmoe, gemma2, gemma3, gpt-oss, dots1, glm4moe, deepseek2, bailingmoe2. What they are
follows their papers and model cards; which optional tensors a family's files may carry follows llama.cpp.
"""
import argparse
import sys

import numpy as np
import gguf
from gguf.quants import dequantize

# rope: which components turn together; "norm": neighbours (2i, 2i+1), "neox": halves (i, i + n_rot/2).
# gates_sum_to_1: the chosen experts' weights are divided by their sum; not said: where the file's expert_weights_norm says so.
# rope_first: q and k are normed after they were rotated.
# unrotated_period: the last of so many layers leaves q and k as they are.
# delta: all layers but each fourth, or those that the file says, are gated delta nets (arXiv 2412.06464), and queries are gated; how value
# heads share key heads: neighbours have the same ("grouped"), or each n-th ("tiled").
# router: what makes weights of the router's logits; not said: softmax.
# ffn_scale, expert_scale: blk.N.ffn_*.scale tensors count (files made by NVFP4 converters carry them).
FAMILIES = {
    "llama": dict(rope="norm", act="silu", gates_sum_to_1=True, ffn_scale=True, expert_scale=True, rope_freqs=True),
    "qwen2": dict(rope="neox", act="silu"),
    "qwen3": dict(rope="neox", act="silu", ffn_scale=True),
    "qwen3moe": dict(rope="neox", act="silu", gates_sum_to_1=True, expert_scale=True),
    "olmoe": dict(rope="neox", act="silu", gates_sum_to_1=False),
    "gemma2": dict(rope="neox", act="gelu", embd_scale=True, window_period=2, window=4096, layers_27b=46, soft_cap=(50.0, 30.0)),
    "gpt-oss": dict(rope="neox", act="oai", gates_sum_to_1=True, window_period=2, ffn_norm="post_attention_norm"),
    "dots1": dict(rope="neox", act="silu", router="sigmoid"),
    "glm4moe": dict(rope="neox", act="silu", router="sigmoid", ffn_norm="post_attention_norm"),
    "minimax-m2": dict(rope="neox", act="silu", router="sigmoid", gates_sum_to_1=True),
    "ernie4_5": dict(rope="norm", act="silu"),
    "ernie4_5-moe": dict(rope="norm", act="silu", gates_sum_to_1=True),
    "hunyuan-dense": dict(rope="neox", act="silu", rope_first=True),
    "hunyuan-moe": dict(rope="neox", act="silu", rope_first=True, gates_sum_to_1=True),
    "seed_oss": dict(rope="neox", act="silu", ffn_norm="post_attention_norm"),
    "smollm3": dict(rope="norm", act="silu", unrotated_period=4),
    "bailingmoe2": dict(rope="neox", act="silu", router="sigmoid"),
    "deepseek2": dict(rope="norm", act="silu"),
    "qwen2vl": dict(rope="neox", act="silu"),
    "qwen3vl": dict(rope="neox", act="silu"),
    "qwen3next": dict(rope="neox", act="silu", gates_sum_to_1=True, ffn_norm="post_attention_norm", expert_scale=True, delta="grouped"),
    "qwen35": dict(rope="neox", act="silu", ffn_norm="post_attention_norm", ffn_scale=True, delta="tiled"),
    "qwen35moe": dict(rope="neox", act="silu", gates_sum_to_1=True, ffn_norm="post_attention_norm", expert_scale=True, delta="tiled"),
    "qwen3vlmoe": dict(rope="neox", act="silu", gates_sum_to_1=True),
    "gemma3": dict(rope="neox", act="gelu", embd_scale=True, window_period=6, window_freq_base=10000.0, layers_27b=62, soft_cap=(0.0, 0.0)),
}
F32 = np.float32


def silu(x):
    with np.errstate(over="ignore"):
        return x / (F32(1) + np.exp(-x))


def sigmoid(x):
    with np.errstate(over="ignore"):
        return F32(1) / (F32(1) + np.exp(-x))


def gelu(x):  # the tanh form (Hendrycks and Gimpel 2016), which gemma was trained with
    return F32(0.5) * x * (F32(1) + np.tanh(F32(0.7978845608028654) * x * (F32(1) + F32(0.044715) * x * x)))


def glu(act, gate, up):
    if act != "oai":
        return (silu(gate) if act == "silu" else gelu(gate)) * up
    gate, up = np.minimum(gate, F32(7)), np.clip(up, F32(-7), F32(7))  # gpt-oss' model card
    with np.errstate(over="ignore"):
        return gate / (F32(1) + np.exp(F32(-1.702) * gate)) * (up + F32(1))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True, dtype=F32)


class Model:
    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.keys = reader.fields
        self.tensors = {t.name: t for t in reader.tensors}
        self.arch = self.keys["general.architecture"].contents()
        if self.arch not in FAMILIES:
            sys.exit("%s: no reference for architecture %s" % (path, self.arch))
        self.family = FAMILIES[self.arch]
        self.n_layer = self.key("block_count") - self.key("nextn_predict_layers", 0)  # those behind guess tokens further ahead
        self.n_embd = self.key("embedding_length")
        self.n_vocab = int(self.tensors["token_embd.weight"].shape[1])
        self.eps = self.key("attention.layer_norm_rms_epsilon")

    def key(self, name, default=None, layer=None):
        field = self.keys.get(self.arch + "." + name)
        if field is None:
            return default
        value = field.contents()
        return value[layer] if isinstance(value, list) and layer is not None else value

    def has(self, name):
        return name in self.tensors

    def weight(self, name, part=None):
        """Dequantized, numpy order: (rows, columns). part: one expert's slice, or a slice of rows."""
        t = self.tensors[name]
        data = t.data if part is None else t.data[part]
        return np.ascontiguousarray(dequantize(data, t.tensor_type), dtype=F32)

    def linear(self, x, name, extras=("scale", "bias")):
        """x times the weight, then its scale and bias in that order, where the file has them."""
        y = x @ self.weight(name + ".weight").T
        for extra in extras:
            if self.has(name + "." + extra):
                w = self.weight(name + "." + extra)
                y = y * w if extra == "scale" else y + w
        return y

    def norm(self, x, name):
        ms = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
        return (x / np.sqrt(ms + self.eps)).astype(F32) * self.weight(name)

    # ---- positions ----
    def is_windowed(self, layer):
        if not self.family.get("window_period") or not self.key("attention.sliding_window", self.family.get("window", 0)):
            return False
        pattern = self.key("attention.sliding_window_pattern", self.family["window_period"])
        if isinstance(pattern, list):
            return bool(pattern[layer])
        return pattern == 0 or layer % pattern < pattern - 1

    def rope_table(self, layer, n_tok, n_rot):
        """cos and sin, (n_tok, n_rot/2)."""
        base = self.key("rope.freq_base", 10000.0)
        kind = self.key("rope.scaling.type", "none" if self.key("rope.scale_linear") is None else "linear")
        factor = self.key("rope.scaling.factor", self.key("rope.scale_linear", 1.0)) or 1.0
        shrink = 1.0 if kind == "none" else 1.0 / factor
        if self.is_windowed(layer):
            base = self.key("rope.freq_base_swa", self.family.get("window_freq_base", base))
            shrink = 1.0 if "window_freq_base" in self.family else shrink
        i = np.arange(n_rot // 2, dtype=np.float64)
        freq = base ** (-2.0 * i / n_rot)
        if self.family.get("rope_freqs") and self.has("rope_freqs.weight"):
            freq = freq / self.weight("rope_freqs.weight").astype(np.float64)
        scale = self.key("rope.scaling.attn_factor", 1.0)
        theta = np.arange(n_tok)[:, None] * freq[None, :]
        if kind == "yarn":  # arXiv 2309.00071: fast components stay, slow ones shrink, a ramp between
            n_ctx = self.key("rope.scaling.original_context_length", self.key("context_length"))

            def turns_at(beta):
                return n_rot * np.log(n_ctx / (beta * 2 * np.pi)) / (2 * np.log(base))
            low = max(0.0, np.floor(turns_at(self.key("rope.scaling.yarn_beta_fast", 32.0))))
            high = min(n_rot - 1.0, np.ceil(turns_at(self.key("rope.scaling.yarn_beta_slow", 1.0))))
            keep = 1 - np.clip((i - low) / max(0.001, high - low), 0, 1)
            theta = theta * (shrink * (1 - keep) + keep)
            if not self.key("rope.scaling.yarn_log_multiplier", 0.0):
                scale = scale * (1.0 + 0.1 * np.log(1.0 / shrink))
        else:
            theta = theta * shrink
        return (np.cos(theta) * scale).astype(F32), (np.sin(theta) * scale).astype(F32)

    def rope(self, x, table):
        if table is None:
            return x
        cos, sin = (t[:, None, :] for t in table)  # x: (n_tok, n_head, head_dim)
        half = cos.shape[-1]
        y = x.copy()
        a, b = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if self.family["rope"] == "norm" else (slice(0, half), slice(half, 2 * half))
        y[..., a] = x[..., a] * cos - x[..., b] * sin
        y[..., b] = x[..., a] * sin + x[..., b] * cos
        return y

    # ---- blocks ----
    def latent_attention(self, x, layer, kv_type):
        """arXiv 2405.04434, section 2.1, head by head. What a cache would hold is rounded: the latent, or what heads make of it."""
        blk = "blk.%d.attn_" % layer
        n_tok, n_head = x.shape[0], self.key("attention.head_count", layer=layer)
        rank, n_rot = self.key("attention.kv_lora_rank"), self.key("rope.dimension_count")
        is_latent = bool(self.key("attention.key_length_mla", 0))
        table = self.rope_table(layer, n_tok, n_rot)
        kept = (lambda y: y.astype(np.float16).astype(F32)) if kv_type == "f16" else lambda y: y
        if self.has(blk + "q_a.weight"):
            q = self.linear(self.norm(self.linear(x, blk + "q_a"), blk + "q_a_norm.weight"), blk + "q_b")
        else:
            q = self.linear(x, blk + "q")
        q = q.reshape(n_tok, n_head, -1)
        nope = q.shape[2] - n_rot
        q[..., nope:] = self.rope(q[..., nope:], table)
        both = self.linear(x, blk + "kv_a_mqa")
        latent = self.norm(both[:, :rank], blk + "kv_a_norm.weight")
        k_rot = kept(self.rope(both[:, None, rank:], table)[:, 0])
        if is_latent:
            latent = kept(latent)
            k_b, v_b = self.weight(blk + "k_b.weight"), self.weight(blk + "v_b.weight")  # (head, rank, nope), (head, o, rank)
            k = np.stack([latent @ k_b[h] for h in range(n_head)], axis=1)
            v = np.stack([latent @ v_b[h].T for h in range(n_head)], axis=1)
        else:
            kv = self.linear(latent, blk + "kv_b").reshape(n_tok, n_head, -1)
            k, v = kept(kv[..., :nope]), kept(kv[..., nope:])
        # YaRN: arXiv 2309.00071 scales cos and sin; here q.k alone is scaled, or both, as llama.cpp does
        shrink_log = np.log(self.key("rope.scaling.factor", 1.0) or 1.0)
        log_mul = self.key("rope.scaling.yarn_log_multiplier", 0.0) * 10
        mscale = (1 + 0.1 * log_mul * shrink_log) * (1 if log_mul else 1 + 0.1 * shrink_log)
        scale = F32(mscale * mscale / np.sqrt(nope + n_rot))
        hidden = np.arange(n_tok)[None, :] > np.arange(n_tok)[:, None]
        out = np.empty((n_tok, n_head, v.shape[2]), F32)
        for head in range(n_head):
            s = (q[:, head, :nope] @ k[:, head].T + q[:, head, nope:] @ k_rot.T) * scale
            s[hidden] = -np.inf
            out[:, head] = softmax(s) @ v[:, head]
        return self.linear(out.reshape(n_tok, -1), blk + "output")

    def attention(self, x, layer, kv_type):
        if self.key("attention.kv_lora_rank"):
            return self.latent_attention(x, layer, kv_type)
        blk = "blk.%d." % layer
        n_tok = x.shape[0]
        n_head = self.key("attention.head_count", layer=layer)
        n_kv = self.key("attention.head_count_kv", n_head, layer=layer)
        dim = self.key("attention.key_length", self.n_embd // n_head)
        if self.has(blk + "attn_qkv.weight"):
            qkv = self.linear(x, blk + "attn_qkv")
            q, k, v = np.split(qkv, (n_head * dim, (n_head + n_kv) * dim), axis=1)
        else:
            q, k, v = (self.linear(x, blk + "attn_" + c) for c in "qkv")
        if "delta" in self.family:
            q, opened = (y.reshape(n_tok, -1) for y in np.split(q.reshape(n_tok, n_head, 2 * dim), 2, axis=2))

        def headed(y, n, norm_name):
            name = blk + norm_name + ".weight"
            if norm_name and self.has(name):
                if int(self.tensors[name].shape[0]) == y.shape[1] and n > 1:  # one norm over all heads (olmoe)
                    return self.norm(y, name).reshape(n_tok, n, dim)
                return self.norm(y.reshape(n_tok, n, dim), name)
            return y.reshape(n_tok, n, dim)

        is_rotated = (layer + 1) % self.family.get("unrotated_period", self.n_layer + 1) != 0
        table = self.rope_table(layer, n_tok, self.key("rope.dimension_count", dim)) if is_rotated else None
        if self.family.get("rope_first"):
            q, k = (self.rope(y.reshape(n_tok, n, dim), table).reshape(n_tok, -1) for y, n in ((q, n_head), (k, n_kv)))
        q, k = headed(q, n_head, "attn_q_norm"), headed(k, n_kv, "attn_k_norm")
        if not self.family.get("rope_first"):
            q, k = self.rope(q, table), self.rope(k, table)
        v = v.reshape(n_tok, n_kv, -1)
        if kv_type == "f16":
            k, v = k.astype(np.float16).astype(F32), v.astype(np.float16).astype(F32)
        scale = self.key("attention.scale", 0.0) if self.arch == "llama" else 0.0
        scale = scale or 1.0 / np.sqrt(dim)
        if self.n_layer == self.family.get("layers_27b"):
            scale = 1.0 / np.sqrt(self.n_embd // n_head)
        cap = self.key("attn_logit_softcapping", 50.0) if self.arch == "gemma2" else 0.0
        pos = np.arange(n_tok)
        hidden = pos[None, :] > pos[:, None]
        if self.is_windowed(layer):
            hidden |= pos[:, None] - pos[None, :] >= self.key("attention.sliding_window", self.family.get("window"))
        out = np.empty((n_tok, n_head, v.shape[2]), F32)
        for head in range(n_head):
            kv = head // (n_head // n_kv)
            s = (q[:, head] * F32(scale)) @ k[:, kv].T
            if cap:
                s = F32(cap) * np.tanh(s / F32(cap))
            s[hidden] = -np.inf
            if self.has(blk + "attn_sinks.weight"):  # one more key, which has no value
                sink = np.full((n_tok, 1), self.weight(blk + "attn_sinks.weight")[head])
                out[:, head] = softmax(np.concatenate((s, sink), axis=1))[:, :-1] @ v[:, kv]
            else:
                out[:, head] = softmax(s) @ v[:, kv]
        out = out.reshape(n_tok, -1)
        if "delta" in self.family:
            out = out * sigmoid(opened)
        return self.linear(out, blk + "attn_output")

    def is_recurrent(self, layer):
        if "delta" not in self.family:
            return False
        said = self.key("attention.recurrent_layers")
        return bool(said[layer]) if said is not None else (layer + 1) % self.key("full_attention_interval", 4) != 0

    def delta_net(self, x, layer):
        """One position after another, in float64."""
        blk = "blk.%d." % layer
        n_tok = x.shape[0]
        n_k, n_v, dim = (self.key("ssm." + name) for name in ("group_count", "time_step_rank", "state_size"))
        dim_v = self.key("ssm.inner_size") // n_v
        per_k = n_v // n_k
        if self.has(blk + "ssm_in.weight"):  # for each key head its q, k, values, gates
            y = self.linear(x, blk + "ssm_in").reshape(n_tok, n_k, -1)
            parts = np.split(y, np.cumsum([dim, dim, per_k * dim_v]), axis=2)
            q, k, v, z = (p.reshape(n_tok, -1) for p in parts)
            mixed = np.concatenate((q, k, v), axis=1)
        else:
            mixed, z = self.linear(x, blk + "attn_qkv"), self.linear(x, blk + "attn_gate")
        if self.has(blk + "ssm_ba.weight"):
            ba = self.linear(x, blk + "ssm_ba").reshape(n_tok, n_k, 2, per_k)
            beta, alpha = ba[:, :, 0].reshape(n_tok, n_v), ba[:, :, 1].reshape(n_tok, n_v)
        else:
            beta, alpha = self.linear(x, blk + "ssm_beta"), self.linear(x, blk + "ssm_alpha")
        w = self.weight(blk + "ssm_conv1d.weight").astype(np.float64)
        padded = np.concatenate((np.zeros((w.shape[1] - 1, mixed.shape[1])), mixed))
        mixed = sum(padded[j:j + n_tok] * w[:, j] for j in range(w.shape[1]))
        mixed = mixed / (1 + np.exp(-mixed))
        q, k, v = np.split(mixed, [n_k * dim, 2 * n_k * dim], axis=1)
        q, k = (y.reshape(n_tok, n_k, dim) for y in (q, k))
        q, k = (y / np.sqrt((y * y).sum(axis=2, keepdims=True) + self.eps) for y in (q, k))
        v = v.reshape(n_tok, n_v, dim_v)
        decay = np.exp(self.weight(blk + "ssm_a") * np.logaddexp(0, alpha.astype(np.float64) + self.weight(blk + "ssm_dt.bias")))
        learn = 1 / (1 + np.exp(-beta.astype(np.float64)))
        out = np.empty((n_tok, n_v, dim_v))
        for head in range(n_v):
            of = head // per_k if self.family["delta"] == "grouped" else head % n_k
            s = np.zeros((dim, dim_v))
            for t in range(n_tok):
                s = s * decay[t, head]
                s = s + np.outer(k[t, of], learn[t, head] * (v[t, head] - k[t, of] @ s))
                out[t, head] = q[t, of] @ s / np.sqrt(dim)
        out = self.norm(out.astype(F32), blk + "ssm_norm.weight") * silu(z.reshape(n_tok, n_v, dim_v))
        return self.linear(out.reshape(n_tok, -1).astype(F32), blk + "ssm_out")

    def feed_forward(self, x, layer):
        blk = "blk.%d.ffn_" % layer
        extras = ("bias", "scale") if self.family.get("ffn_scale") else ("bias",)  # here the scale takes the bias with it
        y = glu(self.family["act"], self.linear(x, blk + "gate", extras), self.linear(x, blk + "up", extras))
        return self.linear(y, blk + "down", extras)

    def experts(self, x, layer):
        blk = "blk.%d.ffn_" % layer
        n_used = self.key("expert_used_count")
        logit = self.linear(x, blk + "gate_inp", ("bias",))
        is_sigmoid = self.key("expert_gating_func", 2 if self.family.get("router") == "sigmoid" else 1) == 2
        prob = F32(1) / (F32(1) + np.exp(-logit)) if is_sigmoid else softmax(logit)
        select = "blk.%d.exp_probs_b.bias" % layer
        score = prob + self.weight(select) if self.has(select) else prob
        n_group = self.key("expert_group_count", 0)
        if n_group > 1:  # arXiv 2412.19437: the groups whose two best experts sum to most
            by_group = np.sort(score.reshape(len(score), n_group, -1), axis=2)
            away = np.argsort(-by_group[:, :, -2:].sum(axis=2), axis=1, kind="stable")[:, self.key("expert_group_used_count"):]
            score = score.reshape(by_group.shape).copy()
            np.put_along_axis(score, away[:, :, None], -np.inf, axis=1)
            score = score.reshape(prob.shape)
        chosen = np.argsort(-score, axis=1, kind="stable")[:, :n_used]
        gate = np.take_along_axis(prob, chosen, 1)
        if self.family.get("gates_sum_to_1", self.key("expert_weights_norm", False)):
            gate = gate / np.maximum(gate.sum(axis=1, keepdims=True), F32(6.103515625e-5))
        factor = self.key("expert_weights_scale", 0.0)
        if factor not in (0.0, 1.0):
            gate = gate * F32(factor)

        def times(y, name, expert):
            y = y @ self.weight(blk + name + ".weight", expert).T
            if self.family.get("expert_scale") and self.has(blk + name + ".scale"):
                y = y * self.weight(blk + name + ".scale")[expert]
            return y + self.weight(blk + name + ".bias")[expert] if self.has(blk + name + ".bias") else y

        out = np.zeros_like(x)
        for expert in np.unique(chosen):
            row, rank = np.nonzero(chosen == expert)
            y = glu(self.family["act"], times(x[row], "gate_exps", expert), times(x[row], "up_exps", expert))
            y = times(y, "down_exps", expert)
            out[row] += gate[row, rank][:, None] * y
        if self.has(blk + "gate_shexp.weight"):
            y = glu(self.family["act"], self.linear(x, blk + "gate_shexp"), self.linear(x, blk + "up_shexp"))
            y = self.linear(y, blk + "down_shexp")
            if self.has(blk + "gate_inp_shexp.weight"):
                y = y * sigmoid(x @ self.weight(blk + "gate_inp_shexp.weight").reshape(-1, 1))
            out += y
        return out

    def hidden(self, ids, kv_type="f32", verbose=False):
        """What the head reads: all positions after the final norm, (n_tok, n_embd)."""
        x = self.weight("token_embd.weight", np.asarray(ids))
        if self.family.get("embd_scale"):
            x = x * np.sqrt(F32(self.n_embd))
        for layer in range(self.n_layer):
            blk = "blk.%d." % layer
            y = self.norm(x, blk + "attn_norm.weight")
            y = self.delta_net(y, layer) if self.is_recurrent(layer) else self.attention(y, layer, kv_type)
            ffn_norm = self.family.get("ffn_norm", "ffn_norm")
            if ffn_norm == "ffn_norm" and self.has(blk + "post_attention_norm.weight"):
                y = self.norm(y, blk + "post_attention_norm.weight")
            x = x + y
            y = self.norm(x, blk + ffn_norm + ".weight")
            y = self.experts(y, layer) if self.has(blk + "ffn_gate_inp.weight") else self.feed_forward(y, layer)
            if self.has(blk + "post_ffw_norm.weight"):
                y = self.norm(y, blk + "post_ffw_norm.weight")
            x = x + y
            if verbose:
                print("layer %d of %d, rms %.4g" % (layer + 1, self.n_layer, np.sqrt(np.mean(x * x))), file=sys.stderr)
        return self.norm(x, "output_norm.weight")

    def logits(self, ids, kv_type="f32", verbose=False):
        x = self.hidden(ids, kv_type, verbose)
        head = "output" if self.has("output.weight") else "token_embd"
        out = np.empty((len(ids), self.n_vocab), F32)
        for row in range(0, self.n_vocab, 8192):  # the head of a small model is its largest matrix: not all of it at once
            rows = slice(row, min(row + 8192, self.n_vocab))
            out[:, rows] = x @ self.weight(head + ".weight", rows).T
        if self.has("output.scale"):
            out *= self.weight("output.scale")
        if self.has("output.bias"):
            out += self.weight("output.bias")
        cap = self.key("final_logit_softcapping", self.family["soft_cap"][1]) if "soft_cap" in self.family else 0.0
        return F32(cap) * np.tanh(out / F32(cap)) if cap else out


def read_ids(text):
    if text.startswith("@"):
        with open(text[1:]) as f:
            text = f.read()
    return [int(t) for t in text.replace(",", " ").replace("[", " ").replace("]", " ").split()]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model")
    ap.add_argument("out")
    ap.add_argument("ids")
    ap.add_argument("--kv", choices=("f32", "f16"), default="f32")
    ap.add_argument("--verbose", action="store_true")
    a = ap.parse_args()
    ids = read_ids(a.ids)
    out = Model(a.model).logits(ids, a.kv, a.verbose)
    out.tofile(a.out)
    print("%s: %d tokens, %d logits each" % (a.out, out.shape[0], out.shape[1]))


if __name__ == "__main__":
    main()
