#!/usr/bin/env python3
"""Writes quant/iq_grid.c: the code-books of the IQ types, taken as data from the `gguf` Python package (0.19 or newer).

Usage: quant/iq_grid.py > quant/iq_grid.c
Also checks that the table of sign bytes is what iq_grid.h computes (seven bits and their parity)."""
import sys
import numpy as np
from gguf import quants

BOOKS = ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"]

signs = np.frombuffer(quants.IQ2_XXS.ksigns, dtype=np.uint8)
for i in range(128):
    assert signs[i] == i | (bin(i).count("1") & 1) << 7

out = sys.stdout
out.write("/* Code-books of the IQ types: element i of a row is byte i of the word, from the low end.\n"
          " * Made by quant/iq_grid.py from the tables of the `gguf` package; do not edit. */\n"
          "#include \"quant/iq_grid.h\"\n")
for name in BOOKS:
    cls = getattr(quants, name)
    cls.init_grid()
    n_rows, n_cols = cls.grid_shape
    rows = cls.grid.reshape(n_rows, n_cols).astype(np.int8).view(np.uint8)
    width = 8 * n_cols
    per_line = 5 if n_cols == 8 else 9
    out.write(f"\nconst uint{width}_t iq_grid_{name.lower()}[{n_rows}] = {{\n")
    words = [f"0x{int.from_bytes(bytes(row), 'little'):0{2 * n_cols}x}" for row in rows]
    for i in range(0, n_rows, per_line):
        out.write("    " + ", ".join(words[i:i + per_line]) + ",\n")
    out.write("};\n")

levels = ", ".join(str(v) for v in quants.IQ4_NL.kvalues)
out.write(f"\nconst int8_t iq_grid_iq4_levels[16] = {{{levels}}};\n")
