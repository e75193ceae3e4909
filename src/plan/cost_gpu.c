/* A GPU in front of the plan for the CPU: bytes over rates. Layers' dense weights and the KV cache first, then slots for experts;
 * what is not there is computed on the CPU or goes over PCIe, both at once. */
#include "src/plan/cost.h"

#include "src/base/size.h"

#include <math.h>

/* The driver's context, and room for a step: what a small one leaves on an 8 GiB card. */
#define OTHER_BYTES (512 * MIB)

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* Of the experts' bytes of a token: what is neither in the GPU nor in memory has to come from disk first. */
static double token_s(const struct cost_gpu *gpu, const struct plan_in *in, const struct plan *p,
                      const struct cost_gpu_plan *g, double dense_bytes, double expert_bytes, double missed)
{
    const struct machine *m = in->machine;
    double held = p->dense_bytes ? (double)g->dense_bytes / (double)p->dense_bytes : 1;
    double rest_bytes = expert_bytes * (1 - g->hits);
    double disk_bytes = expert_bytes * missed;

    if (m->mem_bytes_per_s <= 0 || gpu->bytes_per_s <= 0 || (disk_bytes > 0 && m->disk_bytes_per_s <= 0))
        return 0;
    double gpu_s = (dense_bytes * held + expert_bytes * g->hits) / gpu->bytes_per_s;
    double cpu_s = dense_bytes * (1 - held) / m->mem_bytes_per_s;
    double rest_s = rest_bytes / (m->mem_bytes_per_s + gpu->pcie_bytes_per_s);
    return gpu_s + cpu_s + fmax(rest_s, disk_bytes > 0 ? disk_bytes / m->disk_bytes_per_s : 0);
}

int cost_gpu_plan(const struct cost_gpu *gpu, const struct plan_in *in, const struct plan *p, struct cost_gpu_plan *out)
{
    const struct hparams *hp = &in->model->hp;
    uint64_t left_bytes = gpu->vram_bytes > OTHER_BYTES ? gpu->vram_bytes - OTHER_BYTES : 0;
    uint64_t all_expert_bytes = in->model->expert_bytes;
    double expert_bytes = 0, missed = 0; /* a token's; the share of it in no tier */

    *out = (struct cost_gpu_plan){.hits = 0};
    out->dense_bytes = least(p->dense_bytes, left_bytes);
    left_bytes -= out->dense_bytes;
    out->kv_bytes = least(p->kv_bytes, left_bytes);
    left_bytes -= out->kv_bytes;
    out->expert_bytes = least(all_expert_bytes, left_bytes);
    if (all_expert_bytes) {
        struct cost_router router;
        int rc = cost_router_init(hp->n_expert, hp->n_expert_used, p->skew, &router);
        if (rc)
            return rc;
        double share = (double)out->expert_bytes / (double)all_expert_bytes;
        out->hits = cost_router_hits(&router, share);
        if (p->slot_ram_bytes)
            missed = 1 - cost_router_hits(&router, share + (double)p->n_slots / p->n_slot_experts);
        cost_router_done(&router);
        for (int layer = 0; layer < hp->n_layer; layer++)
            expert_bytes += hp->n_expert_used * (double)model_expert_bytes(in->model, layer);
    }
    double s = token_s(gpu, in, p, out, (double)p->decode_bytes_per_tok - expert_bytes, expert_bytes, missed);
    out->decode_tok_per_s = s > 0 ? 1 / s : 0;
    return 0;
}
