/* The table of families. */
#include "src/model/arch.h"

#include <stddef.h>
#include <stdio.h>
#include <string.h>

extern const struct arch arch_llama, arch_qwen2, arch_qwen2moe, arch_qwen3, arch_qwen3moe, arch_olmoe, arch_gemma2,
    arch_gemma3, arch_dots1, arch_granite, arch_granitemoe, arch_gpt_oss, arch_glm4moe, arch_minimax_m2, arch_ernie4_5,
    arch_ernie4_5_moe, arch_hunyuan_dense, arch_hunyuan_moe, arch_seed_oss, arch_smollm3, arch_qwen2vl, arch_qwen3vl,
    arch_qwen3vlmoe, arch_deepseek2, arch_bailingmoe2, arch_qwen3next, arch_qwen35, arch_qwen35moe;

const enum role arch_plain[] = {ROLE_ATTN_NORM, ROLE_ATTN_Q,   ROLE_ATTN_K, ROLE_ATTN_V,
                                ROLE_ATTN_OUT,  ROLE_FFN_NORM, ROLE_NONE};
const enum role arch_normed[] = {ROLE_ATTN_NORM,   ROLE_ATTN_Q,   ROLE_ATTN_K,   ROLE_ATTN_V, ROLE_ATTN_Q_NORM,
                                 ROLE_ATTN_K_NORM, ROLE_ATTN_OUT, ROLE_FFN_NORM, ROLE_NONE};
const enum role arch_post_normed[] = {ROLE_ATTN_NORM, ROLE_ATTN_Q,         ROLE_ATTN_K, ROLE_ATTN_V,
                                      ROLE_ATTN_OUT,  ROLE_ATTN_POST_NORM, ROLE_NONE};
const enum role arch_ffn_dense[] = {ROLE_FFN_GATE, ROLE_FFN_UP, ROLE_FFN_DOWN, ROLE_NONE};
const enum role arch_ffn_moe[] = {ROLE_ROUTER, ROLE_EXPERT_GATE, ROLE_EXPERT_UP, ROLE_EXPERT_DOWN, ROLE_NONE};

const enum role arch_ffn_shared[] = {ROLE_ROUTER,      ROLE_EXPERT_GATE, ROLE_EXPERT_UP,   ROLE_EXPERT_DOWN,
                                     ROLE_SHARED_GATE, ROLE_SHARED_UP,   ROLE_SHARED_DOWN, ROLE_NONE};

const struct arch *const *arch_all(void)
{
    static const struct arch *const all[] = {&arch_llama,
                                             &arch_qwen2,
                                             &arch_qwen2moe,
                                             &arch_qwen3,
                                             &arch_qwen3moe,
                                             &arch_olmoe,
                                             &arch_gemma2,
                                             &arch_gemma3,
                                             &arch_dots1,
                                             &arch_granite,
                                             &arch_granitemoe,
                                             &arch_gpt_oss,
                                             &arch_glm4moe,
                                             &arch_minimax_m2,
                                             &arch_ernie4_5,
                                             &arch_ernie4_5_moe,
                                             &arch_hunyuan_dense,
                                             &arch_hunyuan_moe,
                                             &arch_seed_oss,
                                             &arch_smollm3,
                                             &arch_qwen2vl,
                                             &arch_qwen3vl,
                                             &arch_qwen3vlmoe,
                                             &arch_deepseek2,
                                             &arch_bailingmoe2,
                                             &arch_qwen3next,
                                             &arch_qwen35,
                                             &arch_qwen35moe,
                                             NULL};
    return all;
}

const struct arch *arch_find(const char *name)
{
    for (const struct arch *const *a = arch_all(); *a; a++)
        if (strcmp((*a)->name, name) == 0)
            return *a;
    return NULL;
}

void arch_key(char *key, size_t key_bytes, const char *arch, const char *what)
{
    snprintf(key, key_bytes, "%s.%s", arch, what);
}
