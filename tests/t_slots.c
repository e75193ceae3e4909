/* Experts that are read when they are wanted: which of them stay, and that whatever is given out is what the file says. */
#include "src/run/store.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/layout.h"
#include "src/model/slot_shape.h"
#include "src/run/adapt.h"
#include "src/run/ahead.h"
#include "src/run/evict.h"
#include "tests/memfile.h"
#include "tests/live_bytes.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- who goes ---- */

/* Silberschatz, Galvin, Gagne, Operating System Concepts, the chapter on virtual memory: 12 faults of LRU with 3 frames. */
START_TEST(recency_is_not_that_of_the_textbook)
{
    static const int wanted[] = {7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1};
    enum { N = sizeof wanted / sizeof *wanted, N_SLOTS = 3 };
    struct evict_slot slots[N_SLOTS] = {{.state = EVICT_FREE}};
    int in_slot[N_SLOTS] = {-1, -1, -1}, n_faults = 0;

    for (int t = 0; t < N; t++) {
        int at = 0;
        while (at < N_SLOTS && in_slot[at] != wanted[t])
            at++;
        if (at == N_SLOTS) {
            n_faults++;
            at = evict_choose(slots, N_SLOTS);
            in_slot[at] = wanted[t];
        }
        slots[at] = (struct evict_slot){EVICT_KEPT, 1, 0, (uint64_t)t};
    }
    ck_assert_int_eq(n_faults, 12);
}
END_TEST

/* 10 wanted in a circle, 4 slots: recency would never hit. One slot serves those that pass, so 3 of 10 hit in each round. */
START_TEST(circle_larger_than_the_slots_never_hits)
{
    enum { N = 10, N_SLOTS = 4, N_ROUNDS = 5 };
    struct evict_slot slots[N_SLOTS] = {{.state = EVICT_FREE}};
    int in_slot[N_SLOTS] = {-1, -1, -1, -1};
    uint32_t n_uses[N] = {0};

    for (int round = 0; round < N_ROUNDS; round++) {
        int n_hits = 0;
        for (int want = 0; want < N; want++) {
            int at = 0;
            n_uses[want]++;
            while (at < N_SLOTS && in_slot[at] != want)
                at++;
            if (at < N_SLOTS) {
                n_hits++;
                slots[at].n_uses = n_uses[want];
                continue;
            }
            at = evict_choose(slots, N_SLOTS);
            in_slot[at] = want;
            slots[at] = (struct evict_slot){EVICT_PASSING, n_uses[want], 0, (uint64_t)(round * N + want)};
        }
        ck_assert_int_eq(n_hits, round ? N_SLOTS - 1 : 0);
    }
}
END_TEST

START_TEST(held_slot_goes_or_free_one_does_not)
{
    struct evict_slot slots[] = {{EVICT_HELD, 0, 0, 0},  {EVICT_KEPT, 5, 2, 9},     {EVICT_KEPT, 4, 2, 9},
                                 {EVICT_KEPT, 1, 2, 10}, {EVICT_PASSING, 7, 9, 99}, {EVICT_FREE, 0, 0, 0},
                                 {EVICT_KEPT, 9, 1, 11}};

    ck_assert_int_eq(evict_choose(slots, 6), 5);
    slots[4].state = slots[5].state = EVICT_HELD;
    ck_assert_int_eq(evict_choose(slots, 7), 6); /* the colder one, though it is the newest */
    slots[4].state = EVICT_PASSING;
    ck_assert_int_eq(evict_choose(slots, 5), 4); /* what passes, before what is kept */
    ck_assert_int_eq(evict_choose(slots, 4), 2); /* equally old: the rarer one */
    ck_assert_int_eq(evict_choose(slots, 1), -1);
    ck_assert_int_eq(evict_choose(slots, 0), -1);
}
END_TEST

/* Used in steps 0, 4 and 8: 1 + 2 + 4 halves as the exponent says. Once in step 11 is less than that, in step 12 more. */
START_TEST(heat_is_not_the_sum_of_faded_uses)
{
    double often = evict_heat_of(evict_heat_of(evict_heat_of(-INFINITY, 0, 4), 4, 4), 8, 4);

    ck_assert_double_eq_tol(often, log2(1 + 2 + 4), 4 * DBL_EPSILON * 3);
    ck_assert_double_eq(evict_heat_of(-INFINITY, 12, 4), 3);
    ck_assert_double_lt(evict_heat_of(-INFINITY, 11, 4), often);
    ck_assert_double_gt(evict_heat_of(-INFINITY, 12, 4), often);
    ck_assert_double_eq(evict_heat_of(evict_heat_of(-INFINITY, 12, 4), 12, 4), 4);
}
END_TEST

/* Ten uses against none are more than chance, nine are not: (10 - 0)^2 > 9 * 10, 9^2 = 9 * 9. A hundred do not beat eighty, but half
 * of that: 50^2 > 9 * 150. */
START_TEST(accident_is_taken_for_a_favourite)
{
    enum { HALF = 64 };
    double n[101];

    n[0] = -INFINITY;
    for (int i = 1; i <= 100; i++)
        n[i] = evict_heat_of(n[i - 1], 5 * HALF, HALF);
    ck_assert(evict_is_warmer(n[10], n[0], 5 * HALF, HALF));
    ck_assert(!evict_is_warmer(n[9] - 1e-9, n[0], 5 * HALF, HALF));
    ck_assert(!evict_is_warmer(n[100], n[80], 5 * HALF, HALF));
    ck_assert(evict_is_warmer(n[100], n[50], 5 * HALF, HALF));
    ck_assert(!evict_is_warmer(n[50], n[100], 5 * HALF, HALF));
    ck_assert(!evict_is_warmer(n[0], n[0], 5 * HALF, HALF));
    ck_assert(!evict_is_warmer(n[18], n[0], 6 * HALF, HALF)); /* half of them have faded */
}
END_TEST

static uint64_t draw(uint64_t *x)
{
    *x ^= *x << 13, *x ^= *x >> 7, *x ^= *x << 17;
    return *x >> 11;
}

/* Three of twelve favourites and three of the others: with 16 slots only counting over many steps keeps the favourites. */
static void want_favourites(uint64_t *x, int32_t *ids)
{
    for (int i = 0; i < 3; i++) {
        ids[i] = 4 * i + (int32_t)(draw(x) % 4);
        ids[3 + i] = 12 + 50 * i + (int32_t)(draw(x) % 50);
    }
}

/* Two sixes in turn for twelve steps, then two others: whoever counts over many steps keeps what is gone. */
static void want_new_ones(uint64_t step, int32_t *ids)
{
    for (int i = 0; i < 6; i++)
        ids[i] = 12 + (int32_t)(step / 12 * 12 + step % 2 * 6 + (uint64_t)i) % 150;
}

/* Layer 1 of 8 is not among those that are simulated; of one layer, layer 0 is. */
START_TEST(half_life_does_not_follow_what_is_wanted)
{
    struct adapt *one, *many;
    uint64_t x = 88172645463325252u, step = 0;
    int32_t ids[6];
    int half = -1;

    ck_assert_int_eq(adapt_open(16, 1, 162, &one), 0);
    ck_assert_int_eq(adapt_open(8 * 16, 8, 162, &many), 0);
    for (; step < 300; step++) {
        want_favourites(&x, ids);
        half = adapt_loan(one, step, 0, ids, 6);
        ck_assert_int_eq(adapt_loan(many, step, 1, ids, 6), 1);
    }
    ck_assert_int_ge(half, 2);
    for (; step < 330; step++) {
        want_new_ones(step, ids);
        half = adapt_loan(one, step, 0, ids, 6);
    }
    ck_assert_int_lt(half, 2);
    for (; step < 600; step++) {
        want_favourites(&x, ids);
        half = adapt_loan(one, step, 0, ids, 6);
    }
    ck_assert_int_ge(half, 2);
    adapt_close(many);
    adapt_close(one);
}
END_TEST

enum { MOVES_MOST = 128, MOVES_SPAN = 500, MOVES_N_SPANS = 8, MOVES_HALF = 64 };

/* A router's choices: so many a step of all, `favour` of them among n_places favourites. */
struct router {
    int n_experts, n_chosen, n_places;
    double favour;
};

/* What happened in each span of steps. */
struct moves_span {
    int n_moves, n_hits;
};

static int choose(const struct router *r, bool is_other_topic, uint64_t *x)
{
    double u = (double)draw(x) / 9007199254740992.0;

    if (u >= r->favour)
        return (int)((u - r->favour) / (1 - r->favour) * r->n_experts);
    int favourite = (int)(u / r->favour * r->n_places);
    return is_other_topic ? r->n_places / 2 + favourite : r->n_experts - 1 - favourite;
}

/* One move a step at most, from the first of a step's experts that has no place and is wanted clearly more than the least wanted one
 * that has. The favourites, if there are, are not those that are there at first, and become others after half of the spans. */
static void play_moves(const struct router *r, struct moves_span spans[MOVES_N_SPANS])
{
    double heat[MOVES_MOST];
    bool has_place[MOVES_MOST];
    uint64_t x = 88172645463325252u;

    memset(spans, 0, MOVES_N_SPANS * sizeof *spans);
    for (int e = 0; e < r->n_experts; e++) {
        heat[e] = -INFINITY;
        has_place[e] = e < r->n_places;
    }
    for (int step = 0; step < MOVES_N_SPANS * MOVES_SPAN; step++) {
        struct moves_span *span = &spans[step / MOVES_SPAN];
        bool is_wanted[MOVES_MOST] = {false};
        int cold = -1, warm = -1;
        for (int k = 0; k < r->n_chosen;) {
            int e = choose(r, step >= MOVES_N_SPANS / 2 * MOVES_SPAN, &x);
            if (is_wanted[e])
                continue;
            is_wanted[e] = true;
            heat[e] = evict_heat_of(heat[e], (uint64_t)step, MOVES_HALF);
            span->n_hits += has_place[e];
            k++;
        }
        for (int e = 0; e < r->n_experts; e++)
            cold = has_place[e] && !is_wanted[e] && (cold < 0 || heat[e] < heat[cold]) ? e : cold;
        for (int e = 0; e < r->n_experts && warm < 0; e++)
            if (is_wanted[e] && !has_place[e] && evict_is_warmer(heat[e], heat[cold], (uint64_t)step, MOVES_HALF))
                warm = e;
        if (warm < 0)
            continue;
        has_place[warm] = true;
        has_place[cold] = false;
        span->n_moves++;
    }
}

static double share_of_hits(const struct router *r, const struct moves_span *span)
{
    return (double)span->n_hits / (r->n_chosen * MOVES_SPAN);
}

/* Without favourites hardly any expert moves, though every count differs: one in 200 steps of a layer is a fourth of a move for each token
 * of 48 layers. With favourites they end up where the places are, and nearly all of them do so in the first 500 steps, at first and
 * after they have become others; then there is rest again. */
START_TEST(moves_follow_chance_and_not_favourites)
{
    static const struct router routers[] = {{64, 4, 16, 0}, {64, 4, 16, 0.7}, {128, 8, 50, 0}, {128, 8, 50, 0.7},
                                            {32, 4, 12, 0}, {32, 4, 12, 0.6}, {8, 2, 3, 0},    {8, 2, 3, 0.6}};

    for (size_t i = 0; i < sizeof routers / sizeof *routers; i++) {
        const struct router *r = &routers[i];
        struct moves_span spans[MOVES_N_SPANS];
        double by_chance = (double)r->n_places / r->n_experts;
        play_moves(r, spans);
        for (int k = 0; k < MOVES_N_SPANS; k++) {
            bool is_first = k % (MOVES_N_SPANS / 2) == 0, is_last = k % (MOVES_N_SPANS / 2) == MOVES_N_SPANS / 2 - 1;
            double hits = share_of_hits(r, &spans[k]);
            if (r->favour == 0) {
                ck_assert_int_le(spans[k].n_moves, MOVES_SPAN / 200);
                ck_assert_double_eq_tol(hits, by_chance, 0.06);
            } else {
                ck_assert_msg(is_first || hits > r->favour, "router %zu, span %d: %g hits", i, k, hits);
                ck_assert_msg(!is_last || spans[k].n_moves <= MOVES_SPAN / 100, "router %zu, span %d: %d moves", i, k,
                              spans[k].n_moves);
            }
        }
    }
}
END_TEST

/* ---- a model by hand ---- */

/* Four layers in one file of noise, the first without experts. Matrices of layers 1 and 3 take 1152 bytes each (Q4_0, 32
 * rows of 36), of layer 2 2176 (Q8_0, 32 rows of 68). Room for each, wherever it begins: 1152 + 4095 rounded up is 8192,
 * as is 2176 + 4095; so all slots are of 24576 bytes, until layer 2's down is made larger. */
enum { N_LAYER = 4, N_EXPERT = 8, N_USED = 2, N_WEIGHTS = 1 + 3 * 3, FILE_BYTES = 300000 };

static struct {
    struct model m;
    struct model_layer layers[N_LAYER];
    struct weight weights[N_WEIGHTS + 1]; /* the last: a test's own */
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

static void make_model(enum plan_io io)
{
    static const enum role roles[3] = {ROLE_EXPERT_GATE, ROLE_EXPERT_UP, ROLE_EXPERT_DOWN};
    uint64_t x = 20261123, off = 4096 * 2 + 96;

    memset(&by_hand, 0, sizeof by_hand);
    by_hand.m.layers = by_hand.layers;
    by_hand.m.weights = by_hand.weights;
    by_hand.m.n_weights = N_WEIGHTS;
    by_hand.m.hp.n_layer = N_LAYER;
    by_hand.m.hp.n_expert = N_EXPERT;
    by_hand.m.hp.n_expert_used = N_USED;
    by_hand.m.path = by_hand.path;
    memset(by_hand.layers, -1, sizeof by_hand.layers);
    by_hand.weights[0].t = tensor_make(QUANT_F32, 100, 3, 1, NULL);
    by_hand.weights[0].off = 4128;
    for (int layer = 1; layer < N_LAYER; layer++)
        for (int k = 0; k < 3; k++)
            put_stack(1 + (layer - 1) * 3 + k, layer, roles[k], &off, layer == 2 ? QUANT_Q8_0 : QUANT_Q4_0,
                      layer == 2 && k == 2 ? 96 : 32);
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
    ck_assert_int_eq(ahead_init(&by_hand.m, s, 2, &a), 0);
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
    ck_assert_int_eq(ahead_init(&by_hand.m, s, 2, &a), 0);
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
    ahead_done(&a);
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

int main(void)
{
    Suite *suite = suite_create("slots");
    TCase *tc = tcase_create("slots");

    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, recency_is_not_that_of_the_textbook);
    tcase_add_test(tc, circle_larger_than_the_slots_never_hits);
    tcase_add_test(tc, held_slot_goes_or_free_one_does_not);
    tcase_add_test(tc, heat_is_not_the_sum_of_faded_uses);
    tcase_add_test(tc, accident_is_taken_for_a_favourite);
    tcase_add_test(tc, half_life_does_not_follow_what_is_wanted);
    tcase_add_test(tc, moves_follow_chance_and_not_favourites);
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
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? 1 : 0;
}
