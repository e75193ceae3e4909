/* The table of block types, sizes, and the 16-bit floats. The conversions of the block types are in q_*.c. */
#include "quant/quant.h"
#include "quant/q_impl.h"

#include <assert.h>
#include <stddef.h>
#include <strings.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "blocks are read as little-endian structs");

/* Types without a reference quantizer: choosing their code-book entries well needs activation statistics. */
#define quant_from_float_iq2_xxs NULL
#define quant_from_float_iq2_xs NULL
#define quant_from_float_iq3_xxs NULL
#define quant_from_float_iq1_s NULL
#define quant_from_float_iq3_s NULL
#define quant_from_float_iq2_s NULL
#define quant_from_float_iq1_m NULL

/* Types whose blocks leave nothing to weigh, or have no quantizer at all. */
#define quant_fit_f32 NULL
#define quant_fit_f16 NULL
#define quant_fit_bf16 NULL
#define quant_fit_q8_0 NULL
#define quant_fit_iq2_xxs NULL
#define quant_fit_iq2_xs NULL
#define quant_fit_iq3_xxs NULL
#define quant_fit_iq1_s NULL
#define quant_fit_iq3_s NULL
#define quant_fit_iq2_s NULL
#define quant_fit_iq1_m NULL
#define quant_fit_tq1_0 NULL
#define quant_fit_tq2_0 NULL
#define quant_fit_nvfp4 NULL

/* Indexed by GGUF id; rows of ids without a type have no name. */
static const struct quant_info table[QUANT_ID_END] = {
#define T(NAME, text, id, len, bytes, act, fn) \
    [QUANT_##NAME] = {                         \
        text, QUANT_##NAME, len, bytes, QUANT_ACT_##act, quant_to_float_##fn, quant_from_float_##fn, quant_fit_##fn},
#include "quant/types.def"
#undef T
    [QUANT_I8] = {"I8", QUANT_I8, 1, 1, QUANT_ACT_NONE, NULL, NULL, NULL},
    [QUANT_I16] = {"I16", QUANT_I16, 1, 2, QUANT_ACT_NONE, NULL, NULL, NULL},
    [QUANT_I32] = {"I32", QUANT_I32, 1, 4, QUANT_ACT_NONE, NULL, NULL, NULL},
    [QUANT_I64] = {"I64", QUANT_I64, 1, 8, QUANT_ACT_NONE, NULL, NULL, NULL},
    [QUANT_F64] = {"F64", QUANT_F64, 1, 8, QUANT_ACT_NONE, NULL, NULL, NULL},
};

const struct quant_info *quant_info(int gguf_id)
{
    return gguf_id >= 0 && gguf_id < QUANT_ID_END && table[gguf_id].name ? &table[gguf_id] : NULL;
}

const struct quant_info *quant_find(const char *name)
{
    for (int id = 0; id < QUANT_ID_END; id++)
        if (table[id].name && !strcasecmp(table[id].name, name))
            return &table[id];
    return NULL;
}

uint64_t quant_row_bytes(enum quant_type type, int64_t n)
{
    const struct quant_info *info = quant_info((int)type);
    assert(info && n >= 0 && n % info->block_len == 0);
    return (uint64_t)(n / info->block_len) * (uint64_t)info->block_bytes;
}

float quant_f16_to_f32(uint16_t h)
{
    return q_half(h);
}

uint16_t quant_f32_to_f16(float x)
{
    uint32_t bits = q_bits_of_f32(x);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) /* the quiet bit keeps a NaN whose payload is cut off from becoming an infinity */
        return (uint16_t)(sign | 0x7e00 | (bits >> 13 & 0x1ff));
    if (bits >= 0x47800000) /* 2^16 and above */
        return (uint16_t)(sign | 0x7c00);
    if (bits < 0x38800000) /* below 2^-14: the unit of 0.5f is that of the subnormal halves, so the sum rounds there */
        return (uint16_t)(sign | (q_bits_of_f32(q_f32_of_bits(bits) + 0.5f) - 0x3f000000));
    bits += 0xfff + (bits >> 13 & 1); /* a carry into the exponent is right, up to infinity */
    return (uint16_t)(sign | ((bits - 0x38000000) >> 13));
}

float quant_bf16_to_f32(uint16_t h)
{
    return q_f32_of_bits((uint32_t)h << 16);
}

uint16_t quant_f32_to_bf16(float x)
{
    uint32_t bits = q_bits_of_f32(x);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
