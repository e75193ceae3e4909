"""Pieces of GGUF headers as bytes, for models so small that every byte is chosen here."""
import struct


def string(s):
    raw = s.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(v):
    if isinstance(v, bool):
        return struct.pack("<I?", 7, v)
    if isinstance(v, int):
        return struct.pack("<II", 4, v)
    if isinstance(v, float):
        return struct.pack("<If", 6, v)
    if isinstance(v, str):
        return struct.pack("<I", 8) + string(v)
    if isinstance(v[0], str):
        return struct.pack("<IIQ", 9, 8, len(v)) + b"".join(string(s) for s in v)
    return struct.pack("<IIQ%di" % len(v), 9, 5, len(v), *v)


def byte_letters():
    """GPT-2's printable stand-ins for bytes."""
    keep = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    letters, n = {}, 0
    for b in range(256):
        letters[b] = chr(b) if b in keep else chr(256 + n)
        n += b not in keep
    return [letters[b] for b in range(256)]
