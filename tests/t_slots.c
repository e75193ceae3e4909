/* Experts that are read when they are wanted: that whatever is given out is what the file says, sooner where it was guessed. */
#include "src/run/store.h"

#include "cpu/cpu.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/layout.h"
#include "src/model/slot_shape.h"
#include "src/run/ahead.h"
#include "tests/memfile.h"
#include "tests/live_bytes.h"
#include "tests/run_suite.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- a model by hand ---- */

/* Four layers in one file of noise, the first without experts. Matrices of layers 1 and 3 take 1152 bytes each (Q4_0, 32
 * rows of 36), of layer 2 2176 (Q8_0, 32 rows of 68). Room for each, wherever it begins: 1152 + 4095 rounded up is 8192,
 * as is 2176 + 4095; so all slots are of 24576 bytes, until layer 2's down is made larger. */
enum { N_LAYER = 4, N_EXPERT = 8, N_USED = 2, N_WEIGHTS = 1 + 3 * 3, FILE_BYTES = 300000 };

/* A test may have more of them. */
enum { MOST_LAYERS = 25 };

static struct {
    struct model m;
    struct model_layer layers[MOST_LAYERS];
    struct weight weights[1 + 3 * (MOST_LAYERS - 1)]; /* those behind N_WEIGHTS: a test's own */
    struct plan plan;
    unsigned char data[FILE_BYTES];
    char path[sizeof TEST_BUILD_DIR + 32];
} by_hand;

static void put_stack(int i, int layer, enum role role, uint64_t *off, enum quant_type type, int64_t n_out)
{
    struct weight *w = &by_hand.weights[i];

    snprintf(w->name, sizeof w->name, "stack %d", i);
    w->t = tensor_make(type, 64, n_out, N_EXPERT, NULL);
    w->off = *off;
    w->is_expert = true;
    w->layer = layer;
    by_hand.layers[layer].w[role] = i;
    *off += layout_weight_bytes(w) + 32;
}

static const enum role roles[3] = {ROLE_EXPERT_GATE, ROLE_EXPERT_UP, ROLE_EXPERT_DOWN};

/* The matrices of a layer from this place of the file on; returns where they end. */
static uint64_t put_layer(int layer, uint64_t off)
{
    for (int k = 0; k < 3; k++)
        put_stack(1 + (layer - 1) * 3 + k, layer, roles[k], &off, layer == 2 ? QUANT_Q8_0 : QUANT_Q4_0,
                  layer == 2 && k == 2 ? 96 : 32);
    by_hand.m.n_weights = 1 + layer * 3;
    return off;
}

static void make_model(enum plan_io io)
{
    uint64_t x = 20261123, off = 4096 * 2 + 96;

    memset(&by_hand, 0, sizeof by_hand);
    by_hand.m.layers = by_hand.layers;
    by_hand.m.weights = by_hand.weights;
    by_hand.m.hp.n_layer = N_LAYER;
    by_hand.m.hp.n_expert = N_EXPERT;
    by_hand.m.hp.n_expert_used = N_USED;
    by_hand.m.path = by_hand.path;
    memset(by_hand.layers, -1, sizeof by_hand.layers);
    by_hand.weights[0].t = tensor_make(QUANT_F32, 100, 3, 1, NULL);
    by_hand.weights[0].off = 4128;
    for (int layer = 1; layer < N_LAYER; layer++)
        off = put_layer(layer, off);
    ck_assert_uint_lt(off, FILE_BYTES);
    by_hand.plan.io = io;
    for (size_t i = 0; i < FILE_BYTES; i++) {
        x = x * UINT64_C(6364136223846793005) + 1442695040888963407u;
        by_hand.data[i] = (unsigned char)(x >> 56);
    }
    snprintf(by_hand.path, sizeof by_hand.path, "in memory");
}

static void write_file(void)
{
    snprintf(by_hand.path, sizeof by_hand.path, "%s/t_slots-XXXXXX", TEST_BUILD_DIR);
    int fd = mkstemp(by_hand.path);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(write(fd, by_hand.data, FILE_BYTES), FILE_BYTES);
    close(fd);
}

/* 3 * 8192 of layers 1 and 3; layer 2's down takes 96 * 68 = 6528 bytes, so 12288 with its room. */
enum {
    SMALL = 3 * 8192,
    LARGE = 2 * 8192 + 12288,
    LEAST = N_USED * (SMALL + LARGE),
    ALL = N_EXPERT * (2 * SMALL + LARGE)
};

START_TEST(slots_take_other_bytes_than_reckoned)
{
    struct slot_shape s;

    make_model(PLAN_IO_PREAD);
    ck_assert_uint_eq(slot_shape_matrix_bytes(1), 4096);
    ck_assert_uint_eq(slot_shape_matrix_bytes(2), 8192);
    ck_assert_int_eq(slot_shape_init(&by_hand.m, NULL, 0, &s), 0);
    ck_assert_int_eq(s.n_classes, 2);
    ck_assert_int_eq(s.class_of[0], -1);
    ck_assert_int_eq(s.class_of[1], s.class_of[3]);
    ck_assert_int_ne(s.class_of[1], s.class_of[2]);
    ck_assert_uint_eq(s.classes[0].slot_bytes, SMALL);
    ck_assert_uint_eq(s.classes[1].slot_bytes, LARGE);
    ck_assert_int_eq(s.classes[0].n_experts, 2 * N_EXPERT);
    ck_assert_uint_eq(s.bytes, LEAST);
    slot_shape_done(&s);
    ck_assert_int_eq(slot_shape_init(&by_hand.m, NULL, LEAST - 1, &s), ERR_LIMIT);
    for (uint64_t ram = LEAST; ram < ALL + SMALL; ram += 5000) {
        ck_assert_int_eq(slot_shape_init(&by_hand.m, NULL, ram, &s), 0);
        ck_assert_uint_le(s.bytes, ram);
        ck_assert(ram - s.bytes < LARGE || s.n_slots == 3 * N_EXPERT);
        ck_assert_uint_eq(s.bytes, (uint64_t)s.classes[0].n_slots * SMALL + (uint64_t)s.classes[1].n_slots * LARGE);
        ck_assert_int_ge(s.classes[0].n_slots, N_USED);
        ck_assert_int_ge(s.classes[1].n_slots, N_USED);
        slot_shape_done(&s);
    }
    ck_assert_int_eq(slot_shape_init(&by_hand.m, NULL, ALL, &s), 0);
    ck_assert_int_eq(s.n_slots, 3 * N_EXPERT);
    slot_shape_done(&s);
    for (uint64_t n = 1; n <= 2; n++) {
        mem_fail_nth(n);
        ck_assert_int_eq(slot_shape_init(&by_hand.m, NULL, 0, &s), ERR_NOMEM);
    }
    mem_fail_nth(0);
}
END_TEST

/* Experts held elsewhere have slots where there is room for all, but not those of a layer that is held elsewhere whole; else only the
 * others. */
START_TEST(slots_are_kept_for_others_than_may_come)
{
    const int n_away[] = {0, 1, 1, N_EXPERT};
    const uint64_t all = N_EXPERT * (SMALL + LARGE);
    struct slot_shape s;

    make_model(PLAN_IO_PREAD);
    ck_assert_int_eq(slot_shape_init(&by_hand.m, n_away, all, &s), 0);
    ck_assert_int_eq(s.class_of[3], -1);
    ck_assert_int_eq(s.n_slots, 2 * N_EXPERT);
    ck_assert_int_eq(s.n_experts, 2 * N_EXPERT);
    ck_assert_uint_eq(s.bytes, all);
    slot_shape_done(&s);
    ck_assert_int_eq(slot_shape_init(&by_hand.m, n_away, all - 1, &s), 0);
    ck_assert_int_eq(s.n_slots, 2 * (N_EXPERT - 1));
    ck_assert_int_eq(s.n_experts, 2 * (N_EXPERT - 1));
    ck_assert_uint_eq(s.bytes, all - SMALL - LARGE);
    slot_shape_done(&s);
}
END_TEST

/* ---- loans ---- */

static const enum plan_io ios[] = {PLAN_IO_PREAD, PLAN_IO_URING};

/* The nth result is a failure (0: none), and so is what the same read gives when it is repeated; others may come short. */
struct fault {
    uint64_t n_calls, fail_at;
    bool is_short, is_passing; /* is_passing: the repeated read is well */
    bool fails_again;
    uint64_t off;
};

static int fault(void *arg, uint64_t off, int res)
{
    struct fault *f = arg;

    f->n_calls++;
    if (f->n_calls == f->fail_at) {
        f->fails_again = !f->is_passing;
        f->off = off;
        return -EIO;
    }
    if (f->fails_again && off == f->off) {
        f->fails_again = false;
        return -EIO;
    }
    return f->is_short && f->n_calls % 2 && res > 4096 ? 4096 : res;
}

static int open_store(const struct file_ops *ops, struct fault *f, struct store **out)
{
    struct store_args args = {
        .model = &by_hand.m, .plan = &by_hand.plan, .ops = ops, .read_fault = f ? fault : NULL, .read_fault_arg = f};
    return store_open(&args, out);
}

static bool is_refused(int rc)
{
    return by_hand.plan.io == PLAN_IO_URING && rc == ERR_UNSUPPORTED;
}

static void check_expert(int layer, const struct store_expert *e)
{
    for (int k = 0; k < 3; k++) {
        const struct weight *w = &by_hand.weights[1 + (layer - 1) * 3 + k];
        size_t bytes = (size_t)w->t.stride[2];
        ck_assert_msg(memcmp(e->w[k], by_hand.data + w->off + (size_t)e->expert * bytes, bytes) == 0,
                      "layer %d, expert %d, matrix %d is not the file's", layer, e->expert, k);
    }
}

/* Walk a loan to its end, up to max experts at once; whatever is given has to be right, and none twice. */
static int walk(struct store *s, int layer, const int32_t *ids, int n, int max, int *n_given)
{
    struct store_lease lease = {0};
    struct store_expert e[N_EXPERT];
    bool seen[N_EXPERT] = {false};
    int n_now = 1;

    *n_given = 0;
    int rc = store_lease(s, layer, ids, n, &lease);
    while (!rc && n_now) {
        rc = store_next(s, &lease, true, e, max, &n_now);
        for (int i = 0; !rc && i < n_now; i++) {
            ck_assert(!seen[e[i].expert]);
            seen[e[i].expert] = true;
            check_expert(layer, &e[i]);
            ++*n_given;
        }
    }
    store_release(s, &lease);
    return rc;
}

/* A loan of some experts; random, of a seed. */
static int pick(uint64_t *x, int32_t *ids, int *layer)
{
    int n = 0;

    *x = *x * UINT64_C(6364136223846793005) + 1442695040888963407u;
    *layer = 1 + (int)(*x >> 33) % 3;
    for (int i = 0; i < N_EXPERT; i++) {
        if ((*x >> (40 + i)) & 1)
            ids[n++] = i;
    }
    return n;
}

static uint64_t rams[] = {LEAST, LEAST + SMALL, 2 * LEAST, ALL};

START_TEST(loans_give_other_bytes_than_the_files)
{
    struct store *s;
    struct store_stats stats;
    struct fault f = {.is_short = _i >= 8};
    uint64_t x = 7, wanted_bytes = 0, n_wanted = 0;

    make_model(ios[_i % 2]);
    write_file();
    uint64_t before = live_bytes();
    by_hand.plan.slot_ram_bytes = rams[_i / 2 % 4];
    int rc = open_store(NULL, &f, &s);
    if (!is_refused(rc)) {
        ck_assert_int_eq(rc, 0);
        ck_assert_mem_eq(store_weight(s, 0), by_hand.data + 4128, 1200);
        for (int i = 0; i < 300; i++) {
            int32_t ids[N_EXPERT];
            int layer, n_given, n = pick(&x, ids, &layer);
            ck_assert_int_eq(walk(s, layer, ids, n, 1 + i % N_EXPERT, &n_given), 0);
            ck_assert_int_eq(n_given, n);
            n_wanted += (uint64_t)n;
        }
        store_stats(s, &stats);
        wanted_bytes = stats.n_expert_misses;
        ck_assert_uint_eq(stats.n_expert_hits + stats.n_expert_misses, n_wanted);
        ck_assert_uint_gt(stats.n_expert_hits, 0);
        ck_assert_uint_ge(stats.disk_bytes, wanted_bytes * 3 * 1152);
        ck_assert_uint_le(stats.disk_bytes, wanted_bytes * (2 * 2176 + 6528));
        if (ios[_i % 2] == PLAN_IO_PREAD) /* through io_uring the bytes may be there before anybody waits */
            ck_assert_uint_gt(stats.disk_wait_ns, 0);
        ck_assert_uint_eq(stats.resident_bytes, mem_live_bytes(MEM_WEIGHTS));
        if (rams[_i / 2 % 4] == ALL)
            ck_assert_uint_le(stats.n_expert_misses, 3 * N_EXPERT);
    }
    store_close(s);
    ck_assert_uint_eq(live_bytes(), before);
    unlink(by_hand.path);
}
END_TEST

START_TEST(second_loan_takes_the_slots_of_the_first)
{
    static const int32_t ids[] = {0, 1};
    struct store_lease a = {0}, b = {0};
    struct store_expert e[2];
    struct store *s;
    int n;

    make_model(ios[_i]);
    write_file();
    by_hand.plan.slot_ram_bytes = LEAST;
    int rc = open_store(NULL, NULL, &s);
    if (!is_refused(rc)) {
        ck_assert_int_eq(rc, 0);
        ck_assert_int_eq(store_lease(s, 1, ids, 2, &a), 0);
        ck_assert_int_eq(store_lease(s, 2, ids, 2, &b), ERR_STATE);
        store_release(s, &b);
        ck_assert_int_eq(store_next(s, &a, true, e, 1, &n), 0);
        ck_assert_int_eq(n, 1);
        check_expert(1, &e[0]);
        store_release(s, &a); /* what is in flight stays so, and the next loan finds it */
        ck_assert_int_eq(walk(s, 1, ids, 2, 2, &n), 0);
        ck_assert_int_eq(n, 2);
        ck_assert_int_eq(walk(s, 3, ids, 2, 2, &n), 0);
        ck_assert_int_eq(n, 2);
    }
    store_close(s);
    unlink(by_hand.path);
}
END_TEST

/* ---- hints ---- */

START_TEST(hints_harm_loans_or_help_none)
{
    static const int32_t some[] = {1, 4, 6}, hinted[] = {1, -1, 4, N_EXPERT, 6, 7}, none[] = {0};
    struct fault f = {.n_calls = 0};
    struct store_lease lease = {0};
    struct store_expert e[N_EXPERT];
    struct store_stats stats;
    struct store *s;
    int n;

    make_model(PLAN_IO_URING);
    write_file();
    by_hand.plan.slot_ram_bytes = ALL;
    int rc = open_store(NULL, &f, &s);
    if (is_refused(rc))
        goto out;
    ck_assert_int_eq(rc, 0);
    ck_assert_int_eq(store_lease(s, 1, some, 1, &lease), 0);
    store_hint(s, 0, some, 3); /* a layer without experts, and none */
    store_hint(s, 9, some, 3);
    store_hint(s, 2, hinted, 6);
    while (!store_next(s, &lease, true, e, 1, &n) && n)
        check_expert(1, &e[0]);
    store_release(s, &lease);
    ck_assert_int_eq(walk(s, 2, some, 3, 3, &n), 0);
    ck_assert_int_eq(n, 3);
    store_stats(s, &stats);
    ck_assert_uint_eq(stats.n_hint_reads, 4);
    ck_assert_uint_eq(stats.n_hint_hits, 3);
    ck_assert_uint_eq(stats.n_expert_misses, 1);
    ck_assert_uint_eq(stats.n_expert_hits, 3);

    /* a hint whose reads fail is nobody's error */
    ck_assert_int_eq(store_lease(s, 2, none, 0, &lease), 0);
    store_hint(s, 3, some, 3);
    ck_assert_int_eq(store_next(s, &lease, true, e, 1, &n), 0);
    store_release(s, &lease);
    ck_assert_int_eq(store_lease(s, 1, none, 1, &lease), 0);
    f.fail_at = f.n_calls + 1;
    while (!(rc = store_next(s, &lease, true, e, 1, &n)) && n)
        check_expert(1, &e[0]);
    store_release(s, &lease);
    ck_assert(rc == 0 || rc == ERR_IO); /* ERR_IO: this loan's own read came first */
    rc = walk(s, 3, some, 3, 3, &n);
    ck_assert(rc == 0 || rc == ERR_IO); /* ERR_IO: the hint's read was being repeated, and is wanted by now */
    ck_assert_int_eq(walk(s, 3, some, 3, 3, &n), 0);
    ck_assert_int_eq(n, 3);
    store_close(s);
out:
    unlink(by_hand.path);
}
END_TEST

/* How many experts of layer 2 are being read after a hint of n of them, with no more than an expert's reads in flight. */
static uint64_t n_begun_of(int n)
{
    static const int32_t all[N_EXPERT] = {0, 1, 2, 3, 4, 5, 6, 7};
    struct store_lease lease = {0};
    struct store_expert e[N_EXPERT];
    struct store_stats stats;
    struct store *s;
    int n_given;

    ck_assert_int_eq(open_store(NULL, NULL, &s), 0);
    store_set_reads(s, PLAN_LEAST_READS);
    ck_assert_int_eq(store_lease(s, 1, all, 0, &lease), 0);
    store_hint(s, 2, all, n);
    ck_assert_int_eq(store_next(s, &lease, true, e, N_EXPERT, &n_given), 0);
    store_release(s, &lease);
    store_stats(s, &stats);
    ck_assert_int_eq(walk(s, 2, all, N_EXPERT, N_EXPERT, &n_given), 0);
    ck_assert_int_eq(n_given, N_EXPERT);
    store_close(s);
    return stats.n_hint_reads;
}

START_TEST(whole_layer_is_read_ahead_at_once)
{
    struct store *s;

    make_model(PLAN_IO_URING);
    write_file();
    by_hand.plan.slot_ram_bytes = ALL;
    int rc = open_store(NULL, NULL, &s);
    store_close(s);
    if (!is_refused(rc)) {
        ck_assert_int_eq(rc, 0);
        ck_assert_uint_eq(n_begun_of(N_EXPERT / 2), 1);
        ck_assert_uint_eq(n_begun_of(N_EXPERT / 2 + 1),
                          N_EXPERT / 2); /* as many as may be held ahead: half of the slots */
        ck_assert_uint_eq(n_begun_of(N_EXPERT), N_EXPERT / 2);
    }
    unlink(by_hand.path);
}
END_TEST

/* A device that can ask a router of the model, and its scratch. */
struct asker {
    struct device *dev;
    void *scratch;
};

static struct asker open_asker(int n_embd)
{
    const struct tensor w = tensor_make(QUANT_F32, n_embd, N_EXPERT, 1, NULL),
                        x = tensor_make(QUANT_F32, n_embd, 1, 1, NULL);
    const struct op op = {.kind = OP_MATMUL, .n_w = 1, .src = {&x}, .w = {&w}};
    struct asker asker;

    uint64_t bytes = cpu_device_ops.scratch_bytes(&op, 1, AHEAD_MAX_ROWS, 2);
    ck_assert_int_eq(cpu_open(&(struct cpu_opts){.n_threads = 2}, &asker.dev), 0);
    ck_assert_ptr_nonnull(asker.scratch = mem_alloc(bytes, MEM_SCRATCH));
    ck_assert_int_eq(asker.dev->ops->set_scratch(asker.dev, asker.scratch, bytes), 0);
    return asker;
}

static void close_asker(struct asker *asker)
{
    asker->dev->ops->close(asker->dev);
    mem_free(asker->scratch);
}

/* Behind a prompt's layer that did not want nearly all experts, those that loans of the next layer have wanted most often. */
START_TEST(prompt_is_not_led_by_what_was_wanted_before)
{
    static const int32_t three[] = {1, 4, 6}, two[] = {4, 6}, last[] = {7};
    static float x[AHEAD_PROMPT_ROWS][16];
    const struct tensor rows = tensor_make(QUANT_F32, 16, AHEAD_PROMPT_ROWS, 1, x);
    const int32_t *guessed;
    int32_t ids[N_EXPERT];
    struct ahead a;
    struct store *s;
    int n;

    make_model(PLAN_IO_PREAD);
    write_file();
    by_hand.plan.slot_ram_bytes = ALL;
    ck_assert_int_eq(open_store(NULL, NULL, &s), 0);
    ck_assert_int_eq(ahead_init(&by_hand.m, model_all(&by_hand.m), s, NULL, 2, &a), 0);
    ck_assert_int_eq(store_favourites(s, 2, N_EXPERT, ids), 0);
    ck_assert_int_eq(walk(s, 2, last, 1, 1, &n), 0);
    ck_assert_int_eq(walk(s, 2, three, 3, 3, &n), 0);
    ck_assert_int_eq(walk(s, 2, two, 2, 2, &n), 0);
    ck_assert_int_eq(walk(s, 2, two + 1, 1, 1, &n), 0);
    ck_assert_int_eq(store_favourites(s, 2, N_EXPERT, ids), 4);
    ck_assert_int_eq(ids[0], 6);
    ck_assert_int_eq(ids[1], 4);
    ck_assert_int_eq(ids[2], 1); /* as often as the 7 */
    ck_assert_int_eq(ids[3], 7);
    ck_assert_int_eq(store_favourites(s, 3, N_EXPERT, ids), 0);
    ck_assert_int_eq(ahead_guess(&a, &(struct ahead_from){1, &rows, AHEAD_PROMPT_ROWS, 2}, &guessed), 2);
    ck_assert_int_eq(guessed[0], 6);
    ck_assert_int_eq(guessed[1], 4);
    ck_assert_int_eq(ahead_guess(&a, &(struct ahead_from){1, &rows, AHEAD_PROMPT_ROWS - 1, 2}, &guessed), 0);
    ahead_done(&a);
    store_close(s);
    unlink(by_hand.path);
}
END_TEST

/* The router of layer 2 is a row of a unit matrix for each expert, so an expert's score is that value of x. */
START_TEST(guess_is_not_the_routers_likelier_half)
{
    static float x[2][16] = {{0, 5, 1, 2, 9, 3, 4, 1}, {0, 1, 0, 7, 9, 3, 4, 1}}, unit[N_EXPERT][16];
    const struct tensor rows = tensor_make(QUANT_F32, 16, 2, 1, x);
    struct weight *router = &by_hand.weights[N_WEIGHTS];
    const int32_t *ids;
    struct asker asker = open_asker(16);
    struct ahead a;
    struct store *s;

    make_model(PLAN_IO_MMAP);
    by_hand.m.n_weights++;
    by_hand.m.hp.n_embd = 16;
    by_hand.m.hp.n_expert_used = 4;
    for (int e = 0; e < N_EXPERT; e++)
        unit[e][e] = 1;
    router->t = tensor_make(QUANT_F32, 16, N_EXPERT, 1, NULL);
    router->off = 299008;
    memcpy(by_hand.data + router->off, unit, sizeof unit);
    by_hand.layers[2].w[ROLE_ROUTER] = N_WEIGHTS;
    write_file();
    ck_assert_int_eq(open_store(NULL, NULL, &s), 0);
    ck_assert_int_eq(ahead_init(&by_hand.m, model_all(&by_hand.m), s, asker.dev, 2, &a), 0);
    ck_assert_int_eq(ahead_guess(&a, &(struct ahead_from){1, &rows, 1, 4}, &ids), 2);
    ck_assert_int_eq(ids[0], 4);
    ck_assert_int_eq(ids[1], 1);
    ck_assert_int_eq(ahead_guess(&a, &(struct ahead_from){1, &rows, 2, 6}, &ids), 3);
    ck_assert_int_eq(ids[2], 3);
    ck_assert_int_eq(ahead_guess(&a, &(struct ahead_from){1, &rows, AHEAD_MAX_ROWS + 1, 5}, &ids), 0);
    ck_assert_int_eq(ahead_guess(&a, &(struct ahead_from){1, &rows, AHEAD_MAX_ROWS + 1, 6}, &ids), N_EXPERT);
    for (int e = 0; e < N_EXPERT; e++)
        ck_assert_int_eq(ids[e], e);
    struct ahead_from later = {1, &rows, 2, 6};
    struct tensor kept;
    ck_assert(ahead_asks_router(&later));
    ahead_keep(&a, &later, &kept);
    memset(x, 0, sizeof x); /* what it was asked with is gone when there is time */
    ck_assert_int_eq(ahead_guess(&a, &later, &ids), 3);
    ck_assert_int_eq(ids[0], 4);
    ck_assert_int_eq(ids[2], 3);
    ck_assert_int_eq(ahead_guess(&a, &(struct ahead_from){2, &rows, 1, 4}, &ids), 0); /* no router there */
    ck_assert_int_eq(ahead_guess(&a, &(struct ahead_from){N_LAYER - 1, &rows, 1, 4}, &ids), 0);
    asker.dev->ops->set_scratch(asker.dev, asker.scratch, 0);
    ck_assert_int_eq(ahead_guess(&a, &(struct ahead_from){1, &rows, 1, 4}, &ids), ERR_LIMIT); /* the device's word */
    ahead_done(&a);
    close_asker(&asker);
    store_close(s);
    unlink(by_hand.path);
}
END_TEST

/* ---- faults ---- */

/* Some loans that turn all slots over; the first error. What is given out is checked by walk. */
static int some_loans(struct store *s)
{
    static const int32_t all[N_EXPERT] = {0, 1, 2, 3, 4, 5, 6, 7};
    int first_rc = 0, n;

    for (int round = 0; round < 2; round++) {
        for (int layer = 1; layer < N_LAYER; layer++) {
            int rc = walk(s, layer, all, N_EXPERT, N_EXPERT, &n);
            if (!rc)
                ck_assert_int_eq(n, N_EXPERT);
            first_rc = first_rc ? first_rc : rc;
        }
    }
    return first_rc;
}

/* _i / 2: the fault passes, so that nobody is told but who asks for the number of reads that were repeated. */
START_TEST(failed_read_gives_a_wrong_expert_or_stops_the_store)
{
    struct memfiles files = {.is_passing = _i / 2};
    struct file_ops ops = memfile_ops(&files);
    struct fault f = {.n_calls = 0};
    bool is_ring = ios[_i % 2] == PLAN_IO_URING;
    struct store_stats stats;
    struct store *s;
    uint64_t n_opening = 0, n_all, n_told = 0;

    make_model(ios[_i % 2]);
    if (is_ring)
        write_file();
    else
        memfile_add(&files, by_hand.path, by_hand.data, FILE_BYTES);
    by_hand.plan.slot_ram_bytes = LEAST + SMALL;
    int rc = open_store(is_ring ? NULL : &ops, &f, &s);
    if (is_refused(rc))
        goto out;
    ck_assert_int_eq(rc, 0);
    n_opening = is_ring ? f.n_calls : files.n_calls;
    ck_assert_int_eq(some_loans(s), 0);
    n_all = is_ring ? f.n_calls : files.n_calls;
    store_close(s);
    ck_assert_uint_gt(n_all - n_opening, 40);
    for (uint64_t n = n_opening + 1; n <= n_all; n++) {
        f = (struct fault){.fail_at = n, .is_passing = _i / 2};
        files.n_calls = 0;
        files.fail_at = n;
        ck_assert_int_eq(open_store(is_ring ? NULL : &ops, &f, &s), 0);
        rc = some_loans(s);
        ck_assert(rc == ERR_IO || (rc == 0 && _i / 2));
        if (rc)
            ck_assert_ptr_nonnull(strstr(err_text(), by_hand.path));
        store_stats(s, &stats);
        n_told += rc ? 1 : stats.n_repeats;
        ck_assert_int_eq(some_loans(s), 0); /* all is well again */
        store_close(s);
    }
    ck_assert_uint_eq(n_told, n_all - n_opening);
    ck_assert_int_eq(files.n_open, 0);
out:
    if (is_ring)
        unlink(by_hand.path);
}
END_TEST

START_TEST(loan_that_failed_cannot_be_walked_on)
{
    static const int32_t all[N_EXPERT] = {0, 1, 2, 3, 4, 5, 6, 7};
    struct fault f = {.fail_at = 5};
    struct store_lease lease = {0};
    struct store_expert e[N_EXPERT];
    struct store *s;
    int n, n_failed = 0, n_given = 0;

    make_model(PLAN_IO_URING);
    write_file();
    by_hand.plan.slot_ram_bytes = LEAST;
    int rc = open_store(NULL, &f, &s);
    if (!is_refused(rc)) {
        ck_assert_int_eq(rc, 0);
        ck_assert_int_eq(store_lease(s, 2, all, N_EXPERT, &lease), 0);
        while (n_given < N_EXPERT && n_failed < 3) {
            n_failed += store_next(s, &lease, true, e, N_EXPERT, &n) != 0;
            for (int i = 0; i < n; i++)
                check_expert(2, &e[i]);
            n_given += n;
        }
        ck_assert_int_eq(n_failed, 1);
        store_release(s, &lease);
    }
    store_close(s);
    unlink(by_hand.path);
}
END_TEST

START_TEST(file_changed_while_running_is_not_noticed)
{
    static const int32_t ids[] = {0, 1, 2};
    struct store *s;
    int n, fd;

    make_model(ios[_i % 2]);
    write_file();
    by_hand.plan.slot_ram_bytes = LEAST + SMALL;
    int rc = open_store(NULL, NULL, &s);
    if (!is_refused(rc)) {
        ck_assert_int_eq(rc, 0);
        ck_assert_int_eq(walk(s, 1, ids, 3, 3, &n), 0);
        fd = open(by_hand.path, O_WRONLY);
        ck_assert_int_ge(fd, 0);
        if (_i / 2 == 0) { /* written over, as long as before */
            const struct timespec later[2] = {{.tv_sec = 1000}, {.tv_sec = 1000}};
            ck_assert_int_eq(pwrite(fd, "other", 5, 9000), 5);
            ck_assert_int_eq(futimens(fd, later), 0);
        } else { /* cut */
            ck_assert_int_eq(ftruncate(fd, 5000), 0);
        }
        close(fd);
        rc = walk(s, 3, ids, 3, 3, &n);
        ck_assert(rc == ERR_STATE || (_i / 2 == 1 && rc == ERR_IO));
        ck_assert_ptr_nonnull(strstr(err_text(), by_hand.path));
        ck_assert_int_eq(n, 0);
        ck_assert_int_ne(walk(s, 2, ids, 3, 3, &n), 0);
    }
    store_close(s);
    unlink(by_hand.path);
}
END_TEST

START_TEST(failed_allocation_leaks)
{
    make_model(ios[_i]);
    write_file();
    by_hand.plan.slot_ram_bytes = LEAST;
    uint64_t before = live_bytes(), n = 1;

    for (;; n++) {
        struct store *s;
        mem_fail_nth(n);
        int rc = open_store(NULL, NULL, &s);
        bool reached = mem_n_calls() >= n;
        mem_fail_nth(0);
        if (is_refused(rc))
            break;
        ck_assert_int_eq(rc, reached ? ERR_NOMEM : 0);
        if (!reached)
            ck_assert_int_eq(some_loans(s), 0);
        store_close(s);
        ck_assert_uint_eq(live_bytes(), before);
        if (!reached) {
            ck_assert_uint_gt(n, 15);
            break;
        }
    }
    unlink(by_hand.path);
}
END_TEST

/* Small loans keep theirs; a large one, walking through all layers, does not drive them out. */
START_TEST(large_loans_drive_out_what_small_ones_use)
{
    static const int32_t all[N_EXPERT] = {0, 1, 2, 3, 4, 5, 6, 7}, used[] = {2, 5};
    struct store_stats before, after;
    struct store *s;
    int n;

    make_model(PLAN_IO_PREAD);
    write_file();
    by_hand.plan.slot_ram_bytes = 2 * LEAST + 4 * SMALL;
    ck_assert_int_eq(open_store(NULL, NULL, &s), 0);
    for (int i = 0; i < 3; i++)
        ck_assert_int_eq(walk(s, 1, used, 2, 2, &n), 0);
    for (int i = 0; i < 4; i++)
        ck_assert_int_eq(walk(s, 1 + i % 2 * 2, all, N_EXPERT, N_EXPERT, &n), 0);
    store_stats(s, &before);
    ck_assert_int_eq(walk(s, 1, used, 2, 2, &n), 0);
    store_stats(s, &after);
    ck_assert_uint_eq(after.n_expert_hits - before.n_expert_hits, 2);
    ck_assert_uint_eq(after.disk_bytes, before.disk_bytes);
    store_close(s);
    unlink(by_hand.path);
}
END_TEST

/* All of a layer's experts on loan, and all of the next layer's hinted at, as for a prompt. Returns how many of those were read. */
static uint64_t walk_ahead(struct store *s, int layer)
{
    static const int32_t all[N_EXPERT] = {0, 1, 2, 3, 4, 5, 6, 7};
    struct store_lease lease = {0};
    struct store_expert e[N_EXPERT];
    struct store_stats before, after;
    int n = 1;

    store_stats(s, &before);
    ck_assert_int_eq(store_lease(s, layer, all, N_EXPERT, &lease), 0);
    store_hint(s, layer + 1, all, layer + 1 < by_hand.m.hp.n_layer ? N_EXPERT : 0);
    while (n > 0) {
        ck_assert_int_eq(store_next(s, &lease, true, e, N_EXPERT, &n), 0);
        for (int i = 0; i < n; i++)
            check_expert(layer, &e[i]);
    }
    store_release(s, &lease);
    store_stats(s, &after);
    return after.n_hint_reads - before.n_hint_reads;
}

/* Slots for half of the experts: whatever layer came first, 4 of 8 have to be read for each, where the first ones would keep all theirs
 * and all the others' would have to be read, later than they are wanted. */
START_TEST(first_layers_of_a_prompt_take_the_slots_of_the_last)
{
    struct store *s;

    make_model(PLAN_IO_URING);
    for (int layer = N_LAYER; layer < MOST_LAYERS; layer++)
        put_layer(layer, by_hand.weights[1].off);
    for (int layer = 1; layer < MOST_LAYERS; layer++)
        for (int k = 0; k < 3; k++) /* slots of one size */
            by_hand.weights[1 + (layer - 1) * 3 + k].t = tensor_make(QUANT_Q4_0, 64, 32, N_EXPERT, NULL);
    by_hand.m.hp.n_layer = MOST_LAYERS;
    write_file();
    by_hand.plan.slot_ram_bytes = (MOST_LAYERS - 1) * N_EXPERT / 2 * SMALL;
    int rc = open_store(NULL, NULL, &s);
    if (!is_refused(rc)) {
        ck_assert_int_eq(rc, 0);
        for (int round = 0; round < 5; round++)
            for (int layer = 1; layer < MOST_LAYERS; layer++) {
                uint64_t n_read = walk_ahead(s, layer);
                if (round == 4 && layer + 1 < MOST_LAYERS)
                    ck_assert_msg(n_read >= 3 && n_read <= 6, "layer %d: %d read", layer + 1, (int)n_read);
            }
    }
    store_close(s);
    unlink(by_hand.path);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("slots");
    TCase *tc = tcase_create("slots");

    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, slots_take_other_bytes_than_reckoned);
    tcase_add_test(tc, slots_are_kept_for_others_than_may_come);
    tcase_add_loop_test(tc, loans_give_other_bytes_than_the_files, 0, 16);
    tcase_add_loop_test(tc, second_loan_takes_the_slots_of_the_first, 0, 2);
    tcase_add_test(tc, hints_harm_loans_or_help_none);
    tcase_add_test(tc, prompt_is_not_led_by_what_was_wanted_before);
    tcase_add_test(tc, whole_layer_is_read_ahead_at_once);
    tcase_add_test(tc, guess_is_not_the_routers_likelier_half);
    tcase_add_loop_test(tc, failed_read_gives_a_wrong_expert_or_stops_the_store, 0, 4);
    tcase_add_test(tc, loan_that_failed_cannot_be_walked_on);
    tcase_add_loop_test(tc, file_changed_while_running_is_not_noticed, 0, 4);
    tcase_add_loop_test(tc, failed_allocation_leaks, 0, 2);
    tcase_add_test(tc, large_loans_drive_out_what_small_ones_use);
    tcase_add_test(tc, first_layers_of_a_prompt_take_the_slots_of_the_last);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
