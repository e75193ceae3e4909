"""Writing GGUF files piece by piece: what make-upcycled and make-synthetic share.

The header comes from the gguf package; tensor data is written by us in pieces as they are made, so that a file can be
much larger than memory.
"""
import fcntl
import mmap
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import gguf
from gguf import GGMLQuantizationType as Type

ALIGN = gguf.GGUF_DEFAULT_ALIGNMENT


def row_bytes(type_, n):
    block_len, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    if n % block_len:
        sys.exit("%s comes in blocks of %d; a row of %d does not divide" % (type_.name, block_len, n))
    return n // block_len * block_bytes


def tensor_bytes(type_, shape):
    """shape in numpy's order: columns last."""
    return int(np.prod(shape[:-1], dtype=np.int64)) * row_bytes(type_, shape[-1])


class Sink:
    """Bytes to a file, past the page cache where the file system lets us: on a machine with a fast disk and two slow
    cores that was six times as fast (1.2 GB/s against 0.18). Two buffers: one fills while the other is written."""

    SIZE = 16 << 20

    def __init__(self, path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self.fd = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError:
            self.fd = os.open(path, flags, 0o666)
        self.buffers = [mmap.mmap(-1, self.SIZE), mmap.mmap(-1, self.SIZE)]  # page-aligned, as O_DIRECT wants
        self.fill = self.n_bytes = 0
        self.pool = ThreadPoolExecutor(1)
        self.pending = None

    def wait(self):
        if self.pending:
            self.pending.result()
        self.pending = None

    def flush(self):
        def write(view):
            while len(view):
                view = view[os.write(self.fd, view):]
        self.wait()
        if self.fill < self.SIZE:  # the end: its length is no multiple of a disk block
            fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        self.pending = self.pool.submit(write, memoryview(self.buffers[0])[:self.fill])
        self.buffers.reverse()
        self.fill = 0

    def put(self, view):
        self.n_bytes += len(view)
        while len(view):
            n = min(len(view), self.SIZE - self.fill)
            self.buffers[0][self.fill:self.fill + n] = view[:n]
            self.fill += n
            view = view[n:]
            if self.fill == self.SIZE:
                self.flush()

    def close(self):
        if self.fill:
            self.flush()
        self.wait()
        self.pool.shutdown()
        os.close(self.fd)


class Out:
    """Keys through .writer, tensors through add(), then write() makes the file. Each tensor's pieces are made by a
    function only when their turn comes: it yields arrays or bytes that add up to the tensor."""

    def __init__(self, path, arch):
        self.path = path
        self.writer = gguf.GGUFWriter(path, arch)
        self.plan = []

    def copy_keys(self, reader, skip=()):
        for name, field in reader.fields.items():
            if name.startswith("GGUF.") or name == "general.architecture" or name in skip:
                continue
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            self.writer.add_key_value(name, field.contents(), kind, sub_type=sub)

    def add(self, name, type_, shape, pieces):
        n_bytes = tensor_bytes(type_, shape)
        float_types = {Type.F32: np.float32, Type.F16: np.float16}
        if type_ in float_types:
            self.writer.add_tensor_info(name, shape, np.dtype(float_types[type_]), n_bytes)
        else:
            stored = tuple(shape[:-1]) + (row_bytes(type_, shape[-1]),)
            self.writer.add_tensor_info(name, stored, np.dtype(np.uint8), n_bytes, raw_dtype=type_)
        self.plan.append((name, n_bytes, pieces))

    def add_array(self, name, array):
        array = np.ascontiguousarray(array, dtype=np.float32)
        self.add(name, Type.F32, array.shape, lambda: [array])

    def write(self, quiet=False):
        """A half-written file never stands under the wanted name."""
        part, head = self.path + ".part", self.path + ".head"
        self.writer.write_header_to_file(path=head)
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        self.writer.close()
        total = sum(n for _, n, _ in self.plan)
        done, start, told = 0, time.monotonic(), 0.0
        sink = Sink(part)
        with open(head, "rb") as f:
            sink.put(f.read())
        os.remove(head)
        for name, n_bytes, pieces in self.plan:
            sink.put(b"\0" * (-sink.n_bytes % ALIGN))
            end = sink.n_bytes + n_bytes
            for piece in pieces():
                sink.put(memoryview(np.ascontiguousarray(piece)).cast("B") if isinstance(piece, np.ndarray) else memoryview(piece))
            if sink.n_bytes != end:
                sys.exit("%s: %d bytes off what its shape says" % (name, sink.n_bytes - end))
            done += n_bytes
            now = time.monotonic()
            if sys.stderr.isatty() and now - told > 0.5:
                told = now
                print("\r%5.1f %%  %.2f GB/s " % (100 * done / total, done / 1e9 / (now - start)), end="", file=sys.stderr)
        sink.put(b"\0" * (-sink.n_bytes % ALIGN))
        sink.close()
        os.replace(part, self.path)
        took = time.monotonic() - start
        if quiet:
            return
        if sys.stderr.isatty():
            print("\r", end="", file=sys.stderr)
        print("%s: %.2f GB in %.1f s (%.2f GB/s)" % (self.path, total / 1e9, took, total / 1e9 / max(took, 1e-9)), file=sys.stderr)


def router(rng, n_expert, n_embd, scale, skew):
    """A router's weights (n_expert, n_embd). Logits have a spread of `scale` for inputs of unit mean square; row e is
    larger by exp(skew * z_e): 0 uses all experts alike, 0.35 and 0.7 leave some hot and some cold."""
    heat = np.exp(skew * rng.standard_normal((n_expert, 1)))
    return (rng.standard_normal((n_expert, n_embd)) * heat * scale / np.sqrt(n_embd)).astype(np.float32)


def add_made_vocabulary(out, n_vocab):
    """Byte-level BPE without merges worth the name: a text is its bytes; the rest of the ids are fillers."""
    if n_vocab < 260:
        sys.exit("a vocabulary has at least 260 tokens: bytes and specials")
    shown = [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174 else None for b in range(256)]
    spare = iter(range(256, 512))  # GPT-2's way to write bytes that do not print
    tokens = [c if c else chr(next(spare)) for c in shown] + ["\u0120t", "<|end|>"]
    types = [gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL]
    tokens += ["<|unused %d|>" % i for i in range(len(tokens), n_vocab)]
    types += [gguf.TokenType.UNUSED] * (n_vocab - len(types))
    w = out.writer
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types(types)
    w.add_token_merges(["\u0120 t"])
    w.add_bos_token_id(257)
    w.add_eos_token_id(257)
    w.add_add_bos_token(False)
