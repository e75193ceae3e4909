#!/usr/bin/env python3
"""Write tests/data/gguf with the `gguf` package: every value type, one split model. Expected values are in tests/t_gguf.c.

    python3 tests/gen/gguf.py [FOLDER]        needs: pip install gguf numpy
"""
import os
import sys

import numpy as np
from gguf import GGUFWriter, GGUFValueType, quants, GGMLQuantizationType as Q

folder = sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(__file__), "..", "data", "gguf")
os.makedirs(folder, exist_ok=True)


def keys(w):
    w.add_uint8("t.u8", 200)
    w.add_int8("t.i8", -100)
    w.add_uint16("t.u16", 60000)
    w.add_int16("t.i16", -30000)
    w.add_uint32("t.u32", 4000000000)
    w.add_int32("t.i32", -2000000000)
    w.add_uint64("t.u64", 2**63 + 5)
    w.add_int64("t.i64", -(2**62))
    w.add_float32("t.f32", 0.1)
    w.add_float64("t.f64", 0.1)
    w.add_bool("t.yes", True)
    w.add_bool("t.no", False)
    w.add_string("t.str", "grüße")
    w.add_array("t.ints", [1, -2, 3])
    w.add_array("t.floats", [0.5, -1.5])
    w.add_array("t.bools", [True, False, True])
    w.add_key_value("t.u64s", [1, 2**40], GGUFValueType.ARRAY, GGUFValueType.UINT64)
    w.add_array("tokenizer.ggml.tokens", ["<s>", "", "ab\u00e9", "d"])
    w.add_array("tokenizer.ggml.scores", [0.0, -1.0, -2.0, -3.0])
    w.add_array("tokenizer.ggml.token_type", [3, 1, 1, 1])


def tensors(w):
    x = np.arange(64 * 3, dtype=np.float32).reshape(3, 64)
    w.add_tensor("a.weight", x)
    w.add_tensor("b.weight", quants.quantize(x, Q.Q8_0), raw_dtype=Q.Q8_0)
    w.add_tensor("c.bias", np.arange(5, dtype=np.float32))
    w.add_tensor("d.weight", x.astype(np.float16).reshape(2, 3, 32))


w = GGUFWriter(os.path.join(folder, "types.gguf"), "llama")
w.add_custom_alignment(64)
keys(w)
tensors(w)
w.write_header_to_file()
w.write_kv_data_to_file()
w.write_tensors_to_file()
w.close()

w = GGUFWriter(os.path.join(folder, "split.gguf"), "llama", split_max_tensors=2)
w.add_string("general.name", "split")
tensors(w)
w.write_header_to_file()
w.write_kv_data_to_file()
w.write_tensors_to_file()
w.close()
