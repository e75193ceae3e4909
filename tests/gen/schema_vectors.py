#!/usr/bin/env python3
"""Documents and whether a JSON Schema holds of them, by the jsonschema package: what our grammars of schemas are held against.

  schema_vectors.py OUT_DIR                     schema.json: documents, of which "must" are to be accepted, "may" may be, others may not
  schema_vectors.py --draw FERRY MODEL [N]      let ferry batch answer N times by each schema, at a high temperature, from a model that says
                                                nonsense; each answer that has ended has to be JSON that the schema holds of

Needs jsonschema[format]. Documents are drawn in the form that a grammar has to take: properties in their order, no white space but
what json.dumps puts; then spoilt at random.
"""
import json
import os
import random
import re
import string
import subprocess
import sys
import tempfile

import jsonschema

CHECKER = jsonschema.Draft202012Validator.FORMAT_CHECKER

SCHEMAS = [
    {},
    True,
    {"type": "object"},
    {"type": ["string", "null"]},
    {"type": "integer"},
    {"type": "number"},
    {"type": "integer", "minimum": 0, "maximum": 150},
    {"type": "integer", "minimum": -17, "maximum": 1234},
    {"type": "integer", "exclusiveMinimum": 9, "exclusiveMaximum": 1000},
    {"type": "integer", "maximum": -100},
    {"type": "integer", "minimum": 995},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 100},
    {"type": "number", "minimum": -3, "exclusiveMaximum": 0},
    {"type": "number", "minimum": 20},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "string", "maxLength": 3},
    {"type": "string", "pattern": "^[A-Z]{2}-\\d{2,3}$"},
    {"type": "string", "pattern": "a.c|^\\w+@(?:x|yy)\\.org$"},
    {"type": "string", "pattern": "^[^\\s\"]+\\\\\\S\\t?$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"enum": ["red", "gr\"een", 3, 0.5, None, ["a", 1], {"k": True}]},
    {"const": "é\n"},
    {"type": "string", "enum": ["a", 1, "b"]},
    {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 6}, "minItems": 2, "maxItems": 4},
    {"type": "array", "items": {"type": "boolean"}},
    {"type": "array", "prefixItems": [{"type": "string", "maxLength": 2}, {"type": "integer"}], "items": False, "minItems": 1},
    {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": {"const": 3}, "maxItems": 5},
    {"type": "array", "maxItems": 0},
    {"type": "object", "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99},
                                      "ok": {"type": "boolean"}}, "required": ["name", "age"], "additionalProperties": False},
    {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}, "additionalProperties": False},
    {"type": "object", "properties": {"a": {"const": 1}, "ab": {"const": 2}, "é": {"const": 3}, "q\"": {"const": 4}}, "required": ["ab"],
     "additionalProperties": {"type": "integer"}},
    {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "null"}, "maxItems": 2}},
    {"type": "object", "required": ["x"], "properties": {"y": {"type": "null"}}, "additionalProperties": {"enum": [7]}},
    {"anyOf": [{"type": "integer", "minimum": 100, "maximum": 200}, {"type": "string", "maxLength": 1}, {"type": "null"}]},
    {"oneOf": [{"type": "object", "properties": {"kind": {"const": "circle"}, "r": {"type": "integer", "minimum": 0, "maximum": 9}},
                "required": ["kind", "r"], "additionalProperties": False},
               {"type": "object", "properties": {"kind": {"enum": ["square", "box"]}, "w": {"type": "integer", "minimum": 0, "maximum": 9}},
                "required": ["kind"], "additionalProperties": False}]},
    {"allOf": [{"$ref": "#/$defs/n"}], "description": "x", "$defs": {"n": {"type": "integer", "minimum": 1, "maximum": 3}}},
    {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {"v": {"enum": [0, 1]},
                                                                                  "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}},
                                                "required": ["v"], "additionalProperties": False}}},
    {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"], "additionalProperties": False},
    {"definitions": {"a/b": {"type": "boolean"}}, "type": "array", "items": {"$ref": "#/definitions/a~1b"}, "maxItems": 2},
    {"minimum": 3, "maximum": 5, "maxLength": 1},
]

LETTERS = "abcxyz AZ09_-@.\\\"é日😀/\n\t"


def text(rng, least=0, most=6):
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(least, most)))


def any_value(rng, depth=0):
    k = rng.randrange(7 if depth < 3 else 5)
    if k == 0:
        return text(rng)
    if k == 1:
        return rng.choice([0, 1, -1, 7, 12345, -99999])
    if k == 2:
        return rng.choice([0.5, -2.25, 1e10, 3.0])
    if k in (3, 4):
        return rng.choice([None, True, False])
    if k == 5:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    return {text(rng, 1): any_value(rng, depth + 1) for _ in range(rng.randrange(3))}


def matching(rng, pattern):
    known = {"^[A-Z]{2}-\\d{2,3}$": ["AB-12", "ZZ-999"], "a.c|^\\w+@(?:x|yy)\\.org$": ["a\"c", "xxabcx", "me@x.org", "A_9@yy.org"],
             "^[^\\s\"]+\\\\\\S\\t?$": ["ab\\c", "é\\日\t"]}
    return rng.choice(known[pattern])


FORMATS = {"date": ["2024-01-31", "1999-02-28", "2023-11-30"], "time": ["23:59:59Z", "00:00:00.25+05:30"],
           "date-time": ["2024-12-31T01:02:03Z", "1970-01-01T00:00:00.5-11:45"], "uuid": ["01234567-89ab-cdef-0123-456789ABCDEF"]}


def number(rng, s, whole):
    lo = s.get("minimum", s.get("exclusiveMinimum", max(-10**6, s.get("maximum", s.get("exclusiveMaximum", 0)) - 10**6)))
    hi = s.get("maximum", s.get("exclusiveMaximum", lo + 10**6))
    while True:
        x = rng.choice([lo, hi, rng.randint(lo, hi), rng.randint(lo, min(hi, lo + 20))])
        if not whole and rng.random() < 0.6:
            x = round(rng.uniform(lo, hi), rng.randint(1, 4))
            if "e" in repr(x) or x == 0:
                continue
        if jsonschema.Draft202012Validator(s).is_valid(x):
            return x


def document(rng, s, root, depth=0):
    """A value that s holds of, in the form that a grammar takes; None of those is found: LookupError."""
    if s is True or s == {}:
        return any_value(rng)
    if "$ref" in s:
        at = root
        for name in s["$ref"].split("/")[1:]:
            at = at[name.replace("~1", "/").replace("~0", "~")]
        return document(rng, at, root, depth + 1)
    if "const" in s:
        return s["const"]
    if "enum" in s:
        return rng.choice([v for v in s["enum"] if jsonschema.Draft202012Validator(s).is_valid(v)])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in s:
            branches = s[key]
            return document(rng, branches[-1] if depth > 4 else rng.choice(branches), root, depth + 1)
    kind = s.get("type", ["number", "string"] if "minimum" in s else None)
    kind = rng.choice(kind) if isinstance(kind, list) else kind
    if kind == "null":
        return None
    if kind == "boolean":
        return rng.random() < 0.5
    if kind in ("integer", "number"):
        return number(rng, {**s, "type": kind}, kind == "integer")
    if kind == "string":
        if "pattern" in s:
            return matching(rng, s["pattern"])
        if "format" in s:
            return rng.choice(FORMATS[s["format"]])
        return text(rng, s.get("minLength", 0), s.get("maxLength", 8))
    if kind == "array":
        prefix, items = s.get("prefixItems", []), s.get("items", True)
        most = min(s.get("maxItems", 5), len(prefix) if items is False else 10 ** 6)
        n = rng.randint(s.get("minItems", 0), 0 if depth > 4 else most)
        return [document(rng, prefix[i] if i < len(prefix) else items, root, depth + 1) for i in range(n)]
    properties, more = s.get("properties", {}), s.get("additionalProperties", not s.get("properties"))
    out = {}
    for name, sub in properties.items():
        if name in s.get("required", []) or (depth < 4 and rng.random() < 0.5):
            out[name] = document(rng, sub, root, depth + 1)
    for name in s.get("required", []):
        if name not in out:
            out[name] = document(rng, more, root, depth + 1)
    while more is not False and rng.random() < 0.4:
        name = rng.choice(["zz", "a", "ac", "abc", "", "日本", "né"])
        if name not in out and name not in properties:
            out[name] = document(rng, more, root, depth + 1)
    return out


def spoil(rng, raw):
    raw = list(raw)
    for _ in range(rng.randint(1, 2)):
        i = rng.randrange(len(raw) + 1)
        how = rng.randrange(4)
        if how == 0 and i < len(raw):
            del raw[i]
        elif how == 1:
            raw.insert(i, rng.choice(string.digits + '"{}[],:- .eEtrue\\\n'))
        elif how == 2 and i < len(raw):
            raw[i] = rng.choice(string.printable)
        else:
            raw[i:i] = raw[max(0, i - 3):i]
    return "".join(raw)


def strict(text):
    def no_constant(x):
        raise ValueError(x)
    return json.loads(text, parse_constant=no_constant)


def holds(schema, text):
    try:
        value = strict(text)
    except ValueError:
        return False
    return jsonschema.Draft202012Validator(schema, format_checker=CHECKER).is_valid(value)


def vectors():
    rng = random.Random(11)
    out = []
    for schema in SCHEMAS:
        must, may, never = set(), set(), set()
        for _ in range(24):
            value = document(rng, schema, schema)
            raw = json.dumps(value, ensure_ascii=False)
            assert holds(schema, raw), (schema, raw)
            must.add(raw)
            must.add(json.dumps(value, ensure_ascii=False, indent=2))
            for _ in range(4):
                bad = spoil(rng, raw)
                (may if holds(schema, bad) else never).add(bad)
            other = json.dumps(any_value(rng), ensure_ascii=False)
            (may if holds(schema, other) else never).add(other)
        out.append({"schema": schema, "must": sorted(must - {None})[:28], "may": sorted(may - must)[:12], "never": sorted(never)[:40]})
    return out


def draw(ferry, model, n):
    n_ended = 0
    with tempfile.TemporaryDirectory() as folder:
        path, to = os.path.join(folder, "in"), os.path.join(folder, "out")
        with open(path, "w") as f:
            for i, schema in enumerate(SCHEMAS):
                f.write(json.dumps({"id": i, "prompt": "x", "n": min(n, 64), "json_schema": schema}) + "\n")
        subprocess.run([ferry, "batch", model, "-i", path, "-o", to, "--temp", "3", "--top-k", "0", "--top-p", "1", "--min-p", "0", "--ctx", "512", "-q"], check=True)
        ended = [0] * len(SCHEMAS)
        for line in open(to):
            record = json.loads(line)
            schema = SCHEMAS[record["id"]]
            assert "text" in record, record
            if record["finish_reason"] == "stop":
                assert holds(schema, record["text"]), (schema, record["text"])
                ended[record["id"]] += 1
    print("ended and valid:", sum(ended), "of", n * len(SCHEMAS), "- by schema:", ended)
    assert sum(ended) > n * len(SCHEMAS) / 2


if sys.argv[1] == "--draw":
    draw(sys.argv[2], sys.argv[3], int(sys.argv[4]) if len(sys.argv) > 4 else 64)
else:
    os.makedirs(sys.argv[1], exist_ok=True)
    with open(os.path.join(sys.argv[1], "schema.json"), "w") as f:
        f.write("[\n" + ",\n".join(json.dumps(c, ensure_ascii=False) for c in vectors()) + "\n]\n")
