/* Any bytes as the header of a model, with made-up weights behind it: opening, planning and running a few tokens end in tokens
 * or in an error with a text, and nothing stays behind. Three bytes come first: how weights are made (zeros, small numbers, any
 * bits, NaN and infinity between small ones), with the top bit set the tokenizer too; rows of a step and kernels; context, cache
 * and prefill. The header follows. */
#include "cpu/cpu.h"
#include "src/base/err.h"
#include "src/base/log.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/model/model.h"
#include "src/model/program.h"
#include "src/model/tok.h"
#include "src/plan/plan.h"
#include "src/run/cache.h"
#include "src/run/exec.h"
#include "src/run/session.h"
#include "src/run/store.h"
#include "tests/fuzz/fuzz.h"
#include "tests/memfile.h"

#include <stdlib.h>
#include <string.h>

/* A model that needs more than this is planned and not run. */
#define RUN_BYTES (8 * MIB)
#define FILE_BYTES (4 * MIB)
#define HEADER_BYTES (64 * KIB) /* at most */

enum weights { ZEROS, SMALL, ANY_BITS, BROKEN, N_WEIGHTS };

struct input {
    const uint8_t *header;
    size_t n;
    unsigned weights, step, options;
};

/* One file for each way of making weights, made once; the header is laid over its beginning. */
static unsigned char file_bytes[N_WEIGHTS][FILE_BYTES];

/* 4 bytes of weights, whatever their type is. */
static uint32_t word_of(unsigned weights, uint32_t random)
{
    static const uint32_t odd[] = {0x7fc00000, 0x7f800000, 0xff800000, 0x7f7fffff,
                                   0x00000001, 0x7e00fe00, 0xfc007c00, 0xffffffff};
    uint32_t small =
        0x3c000000 | (random & 0x80ff3fff); /* floats of +-[2^-7, 2^-5), halves of about 1, codes of all sorts */

    if (weights == ZEROS)
        return 0;
    if (weights == ANY_BITS)
        return random;
    return weights == BROKEN && random % 61 == 0 ? odd[random / 61 % 8] : small;
}

static void make_weights(unsigned char *out, uint64_t n_bytes, unsigned weights)
{
    uint32_t x = 1;

    for (uint64_t i = 0; i + 4 <= n_bytes; i += 4) {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5; /* xorshift32 */
        uint32_t word = word_of(weights, x);
        memcpy(out + i, &word, 4);
    }
}

static unsigned char *make_file(const struct input *in)
{
    static bool made[N_WEIGHTS];
    unsigned char *file = file_bytes[in->weights];

    make_weights(file, made[in->weights] ? HEADER_BYTES : FILE_BYTES, in->weights);
    made[in->weights] = true;
    memcpy(file, in->header, in->n);
    return file;
}

static int failed(int rc)
{
    if (rc && !err_text()[0])
        abort();
    return rc;
}

static void run_session(struct exec *exec, struct cache *cache, const struct plan *plan, int n_vocab)
{
    static const int32_t prompt[3] = {0, 1, 2};
    struct session *s = NULL;
    int32_t token;

    int rc = session_make(&(struct session_args){.exec = exec, .cache = cache, .plan = plan, .n_vocab = n_vocab}, &s);
    if (failed(rc))
        return;
    if (!failed(session_append(s, prompt, n_vocab < 3 ? 1 : 3, NULL, NULL)) && !failed(session_step(s, &token))) {
        if (token < 0 || token >= n_vocab)
            abort();
        failed(session_step(s, &token));
    }
    session_free(s);
}

static void run_model(struct model *m, const struct plan *plan, const struct file_ops *ops)
{
    struct store *store = NULL;
    struct device *dev = NULL;
    struct cache *cache = NULL;
    struct exec *exec = NULL;
    struct kv_shape shape;

    int rc = store_open(&(struct store_args){.model = m, .plan = plan, .ops = ops}, &store);
    if (!rc && m->w[ROLE_ROPE_FREQS] >= 0)
        model_rope_factors(m, store_weight(store, m->w[ROLE_ROPE_FREQS]));
    if (!rc)
        rc = cpu_open(&(struct cpu_opts){.n_threads = 1, .isa = plan->isa, .prefill = plan->prefill}, &dev);
    if (!rc)
        rc = model_kv_shape(m, plan->kv_type, 0, &shape, NULL);
    if (!rc)
        rc = cache_open(
            &(struct cache_args){
                .shape = &shape, .n_seq = (int)plan->n_seq, .n_ctx = plan->n_ctx, .chunk_tok = plan->chunk_tok},
            &cache);
    if (!rc)
        rc = exec_open(&(struct exec_args){.model = m, .plan = plan, .device = dev, .store = store}, &exec);
    if (!failed(rc)) {
        uint64_t taken_bytes = mem_live_bytes(MEM_WEIGHTS) + mem_live_bytes(MEM_KV) + mem_live_bytes(MEM_SCRATCH);
        if (taken_bytes !=
            plan->dense_bytes + plan->expert_bytes + plan->kv_bytes + plan->record_bytes + plan->scratch_bytes)
            abort();
        run_session(exec, cache, plan, m->hp.n_vocab);
    }
    exec_close(exec);
    cache_close(cache);
    if (dev)
        dev->ops->close(dev);
    store_close(store);
}

static void plan_model(struct model *m, const struct input *in, const struct file_ops *ops)
{
    struct machine machine = {
        .n_cores = 1, .ram_total_bytes = GIB, .ram_limit_bytes = UINT64_MAX, .ram_free_bytes = GIB, .isa = "ref"};
    struct plan_opts opts = {.n_ctx = 8 + in->options / 4 * 4,
                             .chunk_tok = 1 + in->step % 8,
                             .kv_type = in->options & 1 ? QUANT_Q8_0 : QUANT_F16,
                             .io = PLAN_IO_PREAD,
                             .prefill = in->options & 2 ? DEVICE_PREFILL_BLAS : DEVICE_PREFILL_INT};
    struct plan_in plan_in = {.machine = &machine, .model = m, .opts = &opts, .cpu = &cpu_device_ops};
    struct plan plan, again;
    char *text = NULL;

    if (in->step & 8 && cpu_isa_has("avx2"))
        strcpy(machine.isa, "avx2");
    if (failed(plan_make(&plan_in, &plan)))
        return;
    if (failed(plan_explain(&plan, &plan_in, &text)))
        abort();
    mem_free(text);
    if (failed(plan_to_json(&plan, &text)) || failed(plan_from_json(text, &plan_in, &again)) ||
        again.total_bytes != plan.total_bytes)
        abort();
    mem_free(text);
    if (plan.total_bytes - plan.meta_bytes <= RUN_BYTES)
        run_model(m, &plan, ops);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct memfiles files = {0};
    struct file_ops ops = memfile_ops(&files);
    struct model *m = NULL;
    struct tok *tok = NULL;

    if (n < 3 || n - 3 > HEADER_BYTES)
        return 0;
    struct input in = {data + 3, n - 3, data[0] % N_WEIGHTS, data[1], data[2]};
    log_to(NULL, NULL, LOG_WARN);
    err_clear();
    memfile_add(&files, "m.gguf", make_file(&in), FILE_BYTES);
    if (!failed(model_open("m.gguf", &ops, &m))) {
        if (data[0] & 128 && !failed(tok_from_gguf(m->gguf, &tok)))
            tok_free(tok);
        plan_model(m, &in, &ops);
        model_close(m);
    }
    if (files.n_open)
        abort();
    for (int tag = 0; tag < MEM_N_TAG; tag++)
        if (mem_live_bytes((enum mem_tag)tag))
            abort();
    return 0;
}
