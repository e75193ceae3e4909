/* minimax-m2 (MiniMax M2's model card): every layer has experts chosen by a sigmoid router with a selection bias; q and k are normed over
 * the whole row; half of each head is rotated. */
#include "src/model/arch.h"
#include "src/model/hparams.h"

static const struct arch_op layer[] = {
    ARCH_ATTENTION_NORMED(ARCH_NORM, ROLE_FFN_NORM),
    ARCH_MOE_SELECTED,
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
};

static const enum role moe_selected[] = {ROLE_ROUTER,    ROLE_ROUTER_SELECT_BIAS, ROLE_EXPERT_GATE,
                                         ROLE_EXPERT_UP, ROLE_EXPERT_DOWN,        ROLE_NONE};

static int hparams(const struct gguf *g, struct model *m)
{
    m->hp.route_normalize = true; /* the files do not say so */
    return hparams_router_sigmoid(g, m);
}

const struct arch arch_minimax_m2 = {
    .name = "minimax-m2",
    .rope_neox = true,
    .act = OP_ACT_SILU,
    .layer = layer,
    .n_layer_ops = sizeof layer / sizeof *layer,
    .required = arch_normed,
    .ffn_moe = moe_selected,
    .hparams = hparams,
};
