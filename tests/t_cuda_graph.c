/* Short steps as graphs, on the emulated GPU: no bit may differ from launches one by one, whatever changes between two steps, a token
 * takes as few launches as there are decisions of the host, and a runtime that makes no graph is no error. */
#include "tests/cuda_engine.h"
#include "tests/run_suite.h"

#include "cuda/graph.h"
#include "src/run/batch.h"

/* ---- ops by hand ---- */

/* N_ROWS: one more than a short step has. */
enum { WIDTH = 64, N_ROWS = 9, N_OPS = 5, F_OP = 2 };

/* y = ((x + x) * f) + x, of which each result can be told. Ops of single rows share a launch, so that between two of them stands one that
 * does not: 1 * y. F_OP has the factor. */
static struct {
    struct device *dev;
    char *memory;
    void *scratch;
    struct tensor x, y, ones;
    struct op ops[N_OPS];
} hand;

#define TENSOR_BYTES ((uint64_t)WIDTH * N_ROWS * sizeof(float))

/* Both tensors in piece number `piece` of the memory. */
static void hand_place(int piece)
{
    hand.x = tensor_make(QUANT_F32, WIDTH, N_ROWS, 1, hand.memory + (uint64_t)piece * 2 * TENSOR_BYTES);
    hand.y = tensor_make(QUANT_F32, WIDTH, N_ROWS, 1, hand.memory + ((uint64_t)piece * 2 + 1) * TENSOR_BYTES);
}

static void hand_open(bool no_graphs)
{
    struct cuda_opts o = {.most = {.n_rows = 16, .n_seqs = 1, .n_ctx = 64}, .no_graphs = no_graphs};
    float x[2 * 2 * WIDTH * N_ROWS + N_ROWS];

    ck_assert_msg(cuda_open(&o, &hand.dev) == 0, "%s", err_text());
    ck_assert_int_eq(hand.dev->ops->alloc(hand.dev, sizeof x, (void **)&hand.memory), 0);
    ck_assert_int_eq(hand.dev->ops->alloc(hand.dev, 256, &hand.scratch), 0);
    ck_assert_int_eq(hand.dev->ops->set_scratch(hand.dev, hand.scratch, 256), 0);
    for (int i = 0; i < 2 * 2 * WIDTH * N_ROWS; i++)
        x[i] = (float)(i % 101);
    for (int i = 0; i < N_ROWS; i++)
        x[2 * 2 * WIDTH * N_ROWS + i] = 1.0f;
    ck_assert_int_eq(hand.dev->ops->upload(hand.dev, hand.memory, x, sizeof x), 0);
    hand_place(0);
    hand.ones = tensor_make(QUANT_F32, 1, N_ROWS, 1, hand.memory + 4 * TENSOR_BYTES);
    hand.ops[0] = (struct op){.kind = OP_ADD, .dst = {&hand.y}, .src = {&hand.x, &hand.x}};
    hand.ops[1] = hand.ops[3] = (struct op){.kind = OP_COMBINE, .dst = {&hand.y}, .src = {&hand.y, &hand.ones}};
    hand.ops[F_OP] = (struct op){.kind = OP_SCALE, .dst = {&hand.y}, .src = {&hand.y}, .p.scale.f = 3};
    hand.ops[4] = (struct op){.kind = OP_ADD, .dst = {&hand.y}, .src = {&hand.y, &hand.x}};
}

static void hand_close(void)
{
    hand.dev->ops->release(hand.dev, hand.scratch);
    hand.dev->ops->release(hand.dev, hand.memory);
    hand.dev->ops->close(hand.dev);
    ck_assert_int_eq(emu_n_live(), 0);
}

/* n rows of it; the launches that it took. */
static int hand_run(int n, uint64_t *n_launches)
{
    uint64_t before = hand.dev->ops->n_launches(hand.dev);

    emu_in_step(true);
    int rc = hand.dev->ops->run(hand.dev, hand.ops, N_OPS, &(struct rows){.n = n});
    emu_in_step(false);
    *n_launches = hand.dev->ops->n_launches(hand.dev) - before;
    return rc;
}

/* y of n rows is right, and no row behind them was touched: they have what they were given. */
static void hand_check(int n, int piece)
{
    float got[WIDTH * N_ROWS];

    ck_assert_int_eq(hand.dev->ops->download(hand.dev, got, hand.y.data, sizeof got), 0);
    for (int i = 0; i < WIDTH * N_ROWS; i++) {
        float x = (float)((piece * 2 * WIDTH * N_ROWS + i) % 101);
        float before = (float)(((piece * 2 + 1) * WIDTH * N_ROWS + i) % 101);
        float want = i < n * WIDTH ? (x + x) * hand.ops[F_OP].p.scale.f + x : before;
        ck_assert_msg(got[i] == want, "element %d of %d rows: %g instead of %g", i, n, (double)got[i], (double)want);
    }
    for (int i = 0; i < WIDTH * N_ROWS; i++)
        got[i] = (float)(((piece * 2 + 1) * WIDTH * N_ROWS + i) % 101);
    ck_assert_int_eq(hand.dev->ops->upload(hand.dev, hand.y.data, got, sizeof got), 0);
}

/* Rows, addresses behind the same tensors, a parameter of the same op: each is another graph. Launches: all plain, all captured, all
 * replayed. */
START_TEST(graph_is_replayed_for_other_launches)
{
    static const int n_rows[] = {1, 3, N_ROWS - 1};

    hand_open(false);
    for (int round = 0; round < 4; round++)
        for (int i = 0; i < 3; i++)
            for (int piece = 0; piece < 2; piece++)
                for (int f = 3; f < 6; f++) {
                    uint64_t n_launches;
                    hand_place(piece);
                    hand.ops[F_OP].p.scale.f = (float)f;
                    ck_assert_int_eq(hand_run(n_rows[i], &n_launches), 0);
                    ck_assert_uint_eq(n_launches, round ? 1 : N_OPS);
                    hand_check(n_rows[i], piece);
                }
    hand_close();
}
END_TEST

/* Who wants no graphs; a prompt; a launch alone, which is none the cheaper for it; long steps. */
START_TEST(graph_is_made_for_nothing)
{
    static const struct {
        bool no_graphs;
        int n_prompt, n_ops, n;
    } cases[] = {{true, 0, N_OPS, 1}, {false, 1, N_OPS, 1}, {false, 0, 1, 1}, {false, 0, N_OPS, N_ROWS}};
    const struct rows rows = {.n = cases[_i].n, .n_prompt = cases[_i].n_prompt};
    const uint64_t n_ops = (uint64_t)cases[_i].n_ops;

    hand_open(cases[_i].no_graphs);
    int n_live = emu_n_live();
    for (int round = 0; round < 3; round++) {
        uint64_t before = hand.dev->ops->n_launches(hand.dev);
        ck_assert_int_eq(hand.dev->ops->run(hand.dev, hand.ops, (int)n_ops, &rows), 0);
        ck_assert_uint_eq(hand.dev->ops->n_launches(hand.dev) - before, n_ops);
        ck_assert_int_eq(emu_n_live(), n_live);
    }
    hand_close();
}
END_TEST

/* What is captured, instantiated or launched fails, each call in turn: told, or gone round; in either case the next run is right. A
 * graph that was refused is not asked for again. */
START_TEST(failed_graph_is_an_error_or_leaves_something)
{
    int n_gone_round = 0, n_told = 0;
    bool failed = true;

    for (int n = 1; failed; n++) {
        uint64_t n_launches;
        hand_open(false);
        ck_assert_int_eq(hand_run(1, &n_launches), 0);
        hand_check(1, 0);
        emu_fail_nth(n);
        int rc = hand_run(1, &n_launches);
        failed = emu_n_calls() >= n;
        emu_fail_nth(0);
        ck_assert(rc == 0 || rc == ERR_DEVICE);
        n_told += rc < 0;
        if (rc == 0)
            hand_check(1, 0);
        if (rc == 0 && failed) {
            n_gone_round++;
            ck_assert_uint_eq(n_launches, N_OPS);
        }
        uint64_t most = rc == 0 && failed ? N_OPS : 1;
        ck_assert_int_eq(hand_run(1, &n_launches), 0);
        ck_assert_uint_eq(n_launches, most);
        hand_check(1, 0);
        hand_close();
    }
    ck_assert_int_eq(n_gone_round, 3 + N_OPS); /* begin, each launch, end, instantiate */
    ck_assert_int_ge(n_told, 3); /* choosing the GPU, waiting for the slot, launching the graph, recording */
}
END_TEST

/* Run it with that factor: the launches. */
static uint64_t hand_run_by(int f)
{
    uint64_t n_launches;

    hand.ops[F_OP].p.scale.f = (float)f;
    ck_assert_int_eq(hand_run(1, &n_launches), 0);
    return n_launches;
}

/* More runs in turn than there are places: those that have one keep it, the others are launched plainly. When the first are asked for no
 * more, others get their places. */
START_TEST(more_runs_than_places_drive_each_other_out)
{
    enum { MORE = 20, IDLE = 16 * GRAPH_MOST };

    hand_open(false);
    int n_live = emu_n_live();
    for (int round = 0; round < 4; round++)
        for (int f = 0; f < GRAPH_MOST + MORE; f++) {
            ck_assert_uint_eq(hand_run_by(f), round && f < GRAPH_MOST ? 1 : N_OPS);
            if (f % 16 == 0 || f >= GRAPH_MOST)
                hand_check(1, 0);
        }
    ck_assert_int_eq(emu_n_live(), n_live + GRAPH_MOST);
    for (int i = 0; i < IDLE; i++)
        ck_assert_uint_eq(hand_run_by(5), 1);
    for (int round = 0; round < 3; round++)
        for (int f = GRAPH_MOST; f < GRAPH_MOST + MORE; f++) {
            ck_assert_uint_eq(hand_run_by(f), round ? 1 : N_OPS);
            hand_check(1, 0);
        }
    ck_assert_uint_eq(hand_run_by(5), 1);
    ck_assert_int_eq(emu_n_live(), n_live + GRAPH_MOST);
    hand_close();
}
END_TEST

/* ---- engines ---- */

/* How many calls of run the GPU gets, and how often the host waits for it. */
static struct device_ops counting_ops;
static uint64_t n_runs, n_waits;

static int count_run(struct device *dev, const struct op *ops, int n_ops, const struct rows *rows)
{
    n_runs++;
    return cuda_device_ops.run(dev, ops, n_ops, rows);
}

static int count_sync(struct device *dev)
{
    n_waits++;
    return cuda_device_ops.sync(dev);
}

static int count_fetched(struct device *dev)
{
    n_waits++;
    return cuda_device_ops.fetched(dev);
}

static void make_counting_rooms(const struct rooms_args *a)
{
    make_rooms(a);
    counting_ops = cuda_device_ops;
    counting_ops.run = count_run;
    counting_ops.sync = count_sync;
    counting_ops.fetched = count_fetched;
    rooms.gpu->ops = &counting_ops;
}

static uint64_t launches_now(void)
{
    struct exec_stats stats;
    exec_stats(rooms.exec, &stats);
    return stats.n_launches;
}

/* Logits of words (n) one by one. */
static void decode(const int32_t *words, int n, float *out)
{
    ck_assert_msg(session_logits(rooms.session, words, (size_t)n, false, out) == 0, "%s", err_text());
}

enum { SEGMENT_TOK = DEVICE_ATTN_SEGMENT_TOK, GROWN = 24, AGAIN = 12, STEPS = 24 };

/* A sequence of 500 words that grows past 512, which is a page's and a segment's end; goes back before it, and on with other words. */
static float *grow_and_go_back(float *out)
{
    for (int n = 0; n < SEGMENT_TOK - 12; n += 50)
        ck_assert_int_eq(session_append(rooms.session, ids, 50, NULL, NULL), 0);
    decode(ids + 50, GROWN, out);
    out += GROWN * N_VOCAB;
    ck_assert_int_eq(session_truncate(rooms.session, SEGMENT_TOK - 5), 0);
    decode(ids + 100, AGAIN, out);
    return out + AGAIN * N_VOCAB;
}

/* n rows more of a sequence into the batch. */
static void add_rows(struct batch *b, struct cache_seq *seq, const int32_t *words, int n, bool prompt)
{
    ck_assert_int_eq(cache_reserve(seq, n), 0);
    batch_add(b, seq, words, n, (int32_t)cache_len(seq), 1, prompt);
}

static void run_batch(struct batch *b, const float **logits)
{
    ck_assert_msg(exec_run(rooms.exec, b, NULL, logits) == 0, "%s", err_text());
}

/* Steps of one row each of two sequences, which grow past a page's end at different times; every third step has but one of them. */
static float *step_together(float *out)
{
    struct cache_seq *seqs[2];
    struct batch b;
    const float *logits;

    ck_assert_int_eq(batch_init(&b, 64, 2), 0);
    for (int i = 0; i < 2; i++) {
        int n = 45 + 7 * i;
        ck_assert_int_eq(cache_seq_make(rooms.cache, &seqs[i]), 0);
        batch_clear(&b);
        add_rows(&b, seqs[i], ids + 2 * i, n, true);
        run_batch(&b, &logits);
        cache_commit(seqs[i], n);
    }
    for (int step = 0; step < STEPS; step++) {
        int first = step % 3 == 1;
        batch_clear(&b);
        for (int i = first; i < 2; i++)
            add_rows(&b, seqs[i], ids + 2 * i + cache_len(seqs[i]), 1, false);
        run_batch(&b, &logits);
        for (int i = first; i < 2; i++)
            cache_commit(seqs[i], 1);
        memcpy(out, logits, sizeof *out * N_VOCAB * (size_t)(2 - first));
        out += N_VOCAB * (2 - first);
    }
    for (int i = 0; i < 2; i++)
        cache_seq_free(seqs[i]);
    batch_done(&b);
    return out;
}

static float want[N_TOK * N_VOCAB], got[N_TOK * N_VOCAB];

/* All of it; how many rows of logits came. launches: of all. */
static int play(const struct rooms_args *a, float *out, uint64_t *launches)
{
    make_rooms(a);
    float *end = step_together(grow_and_go_back(out));
    *launches = launches_now();
    leave_rooms();
    ck_assert_int_le((int)(end - out), N_TOK * N_VOCAB);
    return (int)(end - out) / N_VOCAB;
}

START_TEST(graphs_change_bits)
{
    static const struct {
        const char *name;
        int quarters;
    } cases[] = {{"llama", 4},     {"gemma2", 4},        {"qwen3moe", 2},  {"mixtral", 4},
                 {"deepseek2", 4}, {"deepseek2-old", 2}, {"qwen3next", 4}, {"qwen35moe", 2}};
    struct rooms_args a = {.name = cases[_i].name, .quarters = cases[_i].quarters, .io = PLAN_IO_PREAD};
    uint64_t plain, graphs;

    a.n_ctx = SEGMENT_TOK + 128;
    a.n_seq = 3;
    a.no_graphs = true;
    int n = play(&a, want, &plain);
    a.no_graphs = false;
    ck_assert_int_eq(play(&a, got, &graphs), n);
    ck_assert_int_gt(n, GROWN + AGAIN + STEPS);
    for (int i = 0; i < n * N_VOCAB; i++)
        ck_assert_msg(memcmp(&want[i], &got[i], sizeof *want) == 0, "row %d, logit %d: %.9g instead of %.9g",
                      i / N_VOCAB, i % N_VOCAB, (double)got[i], (double)want[i]);
    ck_assert_uint_lt(graphs, plain / 2);
}
END_TEST

/* The same word 40 times, then another: its experts move to the GPU, over others. */
START_TEST(graphs_change_bits_when_experts_move)
{
    struct rooms_args a = {.name = "qwen3moe", .quarters = 1, .io = PLAN_IO_PREAD, .slot_bytes = 16 * 24 * KIB};
    struct store_stats stats;
    int32_t words[N_TOK];

    for (int i = 0; i < N_TOK; i++)
        words[i] = ids[i / 40];
    for (int graphs = 0; graphs < 2; graphs++) {
        a.no_graphs = !graphs;
        make_rooms(&a);
        decode(words, N_TOK, graphs ? got : want);
        store_stats(rooms.store, &stats);
        ck_assert_uint_ge(stats.n_moves, 3);
        leave_rooms();
    }
    must_equal(want, got, "qwen3moe");
}
END_TEST

/* What a token takes: for each call of run what it says and a graph. With all of a model on the GPU, experts among it, that is one call.
 * Where the host has experts each layer is two (before its experts, and they), or one where none are the GPU's; and what follows. */
START_TEST(token_takes_more_launches_than_the_host_has_decisions)
{
    enum { WARM = 50, TOKENS = 20 }; /* the last 10 go past a page's end, which changes no launch */
    static const struct {
        const char *name;
        int quarters;
    } cases[] = {{"llama", 4}, {"qwen3moe", 4}, {"qwen3moe", 2}, {"qwen3next", 4}};
    struct rooms_args a = {.name = cases[_i].name, .quarters = cases[_i].quarters, .io = PLAN_IO_PREAD};
    float *out = malloc(sizeof *out * WARM * N_VOCAB);

    a.slot_bytes = 16 * 24 * KIB;
    make_counting_rooms(&a);
    const uint64_t n_layer = (uint64_t)rooms.model->hp.n_layer;
    decode(ids, WARM, out);
    for (int i = 0; i < TOKENS; i++) {
        uint64_t launches = launches_now();
        n_runs = 0;
        decode(ids + i % 4, 1, out);
        launches = launches_now() - launches;
        ck_assert_uint_ge(n_runs, cases[_i].quarters == 4 ? 1 : n_layer + 1);
        ck_assert_uint_le(n_runs, cases[_i].quarters == 4 ? 1 : 2 * n_layer + 1);
        if (i >= TOKENS / 2) /* what the last tokens' choices were new to has been seen twice */
            ck_assert_uint_eq(launches, 2 * n_runs);
    }
    leave_rooms();
    free(out);
}
END_TEST

/* The same of one row of each of n sequences, of a mixture that is all on the GPU: two launches, and no wait for what routers chose. Nor
 * does a prompt wait. Where the host has experts each layer does. */
START_TEST(step_of_several_rows_waits_for_routers)
{
    enum { PROMPT = 40, STEPS_EACH = 4 };
    static const struct {
        const char *name;
        int quarters;
    } cases[] = {{"qwen3moe", 4}, {"gpt-oss", 4}, {"mixtral", 4}, {"qwen3moe", 2}};
    const bool is_resident = cases[_i].quarters == 4;
    struct rooms_args a = {.name = cases[_i].name, .quarters = cases[_i].quarters, .io = PLAN_IO_PREAD, .n_ctx = 128};
    struct cache_seq *seqs[8];
    const float *logits;
    struct batch b;

    a.n_seq = 9;
    a.n_beside = 8;
    a.slot_bytes = 16 * 24 * KIB;
    make_counting_rooms(&a);
    const uint64_t n_layer = (uint64_t)rooms.model->hp.n_layer;
    ck_assert_int_eq(batch_init(&b, 64, 8), 0);
    for (int i = 0; i < 8; i++) {
        ck_assert_int_eq(cache_seq_make(rooms.cache, &seqs[i]), 0);
        batch_clear(&b);
        add_rows(&b, seqs[i], ids + i, PROMPT, true);
        n_waits = 0;
        run_batch(&b, &logits);
        cache_commit(seqs[i], PROMPT);
        ck_assert_uint_eq(n_waits, is_resident ? 1 : n_layer + 1); /* the last at its end */
    }
    for (int n = 2; n <= 8; n++)
        for (int step = 0; step < STEPS_EACH; step++) {
            uint64_t launches = launches_now();
            n_runs = n_waits = 0;
            batch_clear(&b);
            for (int i = 0; i < n; i++)
                add_rows(&b, seqs[i], ids + step, 1, false);
            run_batch(&b, &logits);
            for (int i = 0; i < n; i++)
                cache_commit(seqs[i], 1);
            ck_assert_uint_eq(n_waits, is_resident ? 1 : n_layer + 1); /* the last at its end */
            if (is_resident)
                ck_assert_uint_eq(n_runs, 1);
            if (is_resident && step > 0)
                ck_assert_uint_eq(launches_now() - launches, 2);
        }
    for (int i = 0; i < 8; i++)
        cache_seq_free(seqs[i]);
    batch_done(&b);
    leave_rooms();
}
END_TEST

/* Of two sequences the shorter one gets to its ninth page, for which its table needs more room: the longer one tells how attention is
 * launched, so no launch is another. */
START_TEST(page_of_a_shorter_sequence_changes_launches)
{
    enum { CHUNK = 46 };
    static const int len[2] = {12 * CHUNK, 11 * CHUNK}; /* 552 and 506 */
    struct rooms_args a = {.name = "llama", .quarters = 4, .io = PLAN_IO_PREAD, .n_ctx = 640, .n_seq = 3};
    struct cache_seq *seqs[2];
    const float *logits;
    struct batch b;

    make_rooms(&a);
    ck_assert_int_eq(batch_init(&b, 64, 2), 0);
    for (int i = 0; i < 2; i++) {
        ck_assert_int_eq(cache_seq_make(rooms.cache, &seqs[i]), 0);
        for (int n = 0; n < len[i]; n += CHUNK) {
            batch_clear(&b);
            add_rows(&b, seqs[i], ids + i, CHUNK, true);
            run_batch(&b, &logits);
            cache_commit(seqs[i], CHUNK);
        }
    }
    for (int step = 0; step < 12; step++) {
        uint64_t launches = launches_now();
        batch_clear(&b);
        for (int i = 0; i < 2; i++)
            add_rows(&b, seqs[i], ids + step, 1, false);
        run_batch(&b, &logits);
        for (int i = 0; i < 2; i++)
            cache_commit(seqs[i], 1);
        if (step > 0)
            ck_assert_uint_eq(launches_now() - launches, 2);
    }
    ck_assert_int_gt((int)cache_len(seqs[1]), SEGMENT_TOK);
    for (int i = 0; i < 2; i++)
        cache_seq_free(seqs[i]);
    batch_done(&b);
    leave_rooms();
}
END_TEST

/* Of row i of the last step: all of x (n_vocab), or so many of the best of it, by rising id. */
static void check_row(int i, int n_top, const float *x)
{
    struct sample_row row;
    int n_least = n_top < N_VOCAB ? n_top : N_VOCAB;

    exec_row(rooms.exec, i, &row);
    if (n_top == 0) {
        ck_assert_ptr_null(row.id);
        ck_assert_int_eq(row.n, N_VOCAB);
        ck_assert_mem_eq(row.logit, x, N_VOCAB * sizeof *x);
        return;
    }
    ck_assert_ptr_nonnull(row.id);
    ck_assert_int_ge(row.n, n_least);
    for (int k = 0; k < row.n; k++) {
        int n_better = 0;
        for (int id = 0; id < N_VOCAB; id++)
            n_better += x[id] > row.logit[k] || (x[id] == row.logit[k] && id < row.id[k]);
        ck_assert_int_lt(n_better, row.n);
        ck_assert(row.id[k] >= 0 && row.id[k] < N_VOCAB && (k == 0 || row.id[k] > row.id[k - 1]));
        ck_assert_mem_eq(&row.logit[k], &x[row.id[k]], sizeof *x);
    }
}

enum { N_BESIDE = 2 };

/* A step of one row of each sequence, which wants so many of its best logits (NULL: all of all want all); nothing is committed. What
 * it took: bytes down, launches. */
static void step_wanting(struct batch *b, struct cache_seq *const *seqs, const int *n_top, struct exec_stats *took)
{
    struct exec_stats from;
    const float *logits;

    batch_clear(b);
    for (int i = 0; i < N_BESIDE; i++) {
        add_rows(b, seqs[i], ids + i, 1, false);
        batch_set_top(b, n_top ? n_top[i] : 0);
    }
    exec_stats(rooms.exec, &from);
    run_batch(b, &logits);
    exec_stats(rooms.exec, took);
    took->down_bytes -= from.down_bytes;
    took->n_launches -= from.n_launches;
    if (!n_top)
        memcpy(want, logits, sizeof *want * N_BESIDE * N_VOCAB);
}

/* Rows of a step of which one wants all logits, another the best: each gets what it wants, no byte more comes down than whole rows and,
 * for each, the most pairs that one wants, and what is seen twice is one graph. */
START_TEST(row_gets_what_another_wants)
{
    static const struct {
        int n_top[N_BESIDE], n_pairs, n_whole;
    } cases[] = {
        {{0, 0}, 0, 2},    {{1, 1}, 1, 0},     {{0, 40}, 64, 1}, {{2, 1}, 64, 0},
        {{0, 65}, 128, 1}, {{256, 1}, 256, 0}, {{1, 0}, 1, 1},
    };
    struct rooms_args a = {.name = "llama", .quarters = 4, .io = PLAN_IO_PREAD, .n_seq = N_BESIDE + 1};
    struct cache_seq *seqs[N_BESIDE];
    struct exec_stats took;
    struct batch b;

    make_rooms(&a);
    ck_assert_int_eq(batch_init(&b, 64, N_BESIDE), 0);
    for (int i = 0; i < N_BESIDE; i++)
        ck_assert_int_eq(cache_seq_make(rooms.cache, &seqs[i]), 0);
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        step_wanting(&b, seqs, NULL, &took);
        for (int n = 0; n < 3; n++)
            step_wanting(&b, seqs, cases[c].n_top, &took);
        for (int i = 0; i < N_BESIDE; i++)
            check_row(i, cases[c].n_top[i], want + i * N_VOCAB);
        ck_assert_uint_eq(took.down_bytes,
                          (uint64_t)cases[c].n_whole * ROW_BYTES + N_BESIDE * (uint64_t)cases[c].n_pairs * PAIR_BYTES);
        ck_assert_uint_eq(took.n_launches, 2);
    }
    for (int i = 0; i < N_BESIDE; i++)
        cache_seq_free(seqs[i]);
    batch_done(&b);
    leave_rooms();
}
END_TEST

/* A broken model: nobody is the best of its logits, so all come down, and are told of as a CPU's are. */
START_TEST(logits_without_a_number_are_drawn_from)
{
    struct rooms_args a = {.name = "llama", .quarters = 4, .io = PLAN_IO_PREAD};
    struct exec_stats from, to;
    int32_t word;

    make_rooms(&a);
    int norm = rooms.model->w[ROLE_OUTPUT_NORM];
    uint64_t bytes = tensor_bytes(&rooms.model->weights[norm].t);
    float *broken = malloc(bytes);
    for (uint64_t i = 0; i < bytes / sizeof *broken; i++)
        broken[i] = NAN;
    ck_assert_int_eq(session_append(rooms.session, ids, 3, NULL, NULL), 0);
    ck_assert_int_eq(session_step(rooms.session, &word), 0);
    ck_assert_int_eq(rooms.gpu->ops->upload(rooms.gpu, (void *)store_weight(rooms.store, norm), broken, bytes), 0);
    for (int i = 0; i < 2; i++) {
        exec_stats(rooms.exec, &from);
        ck_assert_int_eq(session_step(rooms.session, &word), ERR_FORMAT);
        exec_stats(rooms.exec, &to);
        ck_assert_ptr_nonnull(strstr(err_text(), "288 logits hold no finite number (288 are NaN)"));
        ck_assert_uint_eq(to.down_bytes - from.down_bytes, PAIR_BYTES + ROW_BYTES);
    }
    free(broken);
    leave_rooms();
}
END_TEST

/* Every call of a token fails once, while its graphs are new and when they are old: it is told or gone round, and the next token is
 * right. */
START_TEST(failed_call_spoils_later_tokens)
{
    struct rooms_args a = {.name = "mixtral", .quarters = 2, .io = PLAN_IO_PREAD};
    int n_told = 0, n_gone_round = 0, n_before = _i ? 11 : 1;
    bool failed = true;

    make_rooms(&a);
    decode(ids, 12, want);
    for (int n = 1; failed; n++) {
        if (_i == 0) { /* graphs are made in the failing token */
            leave_rooms();
            make_rooms(&a);
            decode(ids, n_before, got);
        }
        ck_assert_int_eq(session_truncate(rooms.session, (size_t)n_before), 0);
        emu_fail_nth(n);
        int rc = session_logits(rooms.session, ids + n_before, 1, false, got);
        failed = emu_n_calls() >= n;
        emu_fail_nth(0);
        ck_assert(rc == 0 || rc == ERR_DEVICE);
        n_told += rc < 0;
        n_gone_round += rc == 0 && failed;
        if (rc == 0)
            ck_assert_mem_eq(want + n_before * N_VOCAB, got, sizeof *got * N_VOCAB);
        ck_assert_int_eq(session_truncate(rooms.session, (size_t)n_before), 0);
        decode(ids + n_before, 1, got);
        ck_assert_mem_eq(want + n_before * N_VOCAB, got, sizeof *got * N_VOCAB);
    }
    ck_assert_int_gt(n_told, 20);
    ck_assert(_i ? n_gone_round == 0 : n_gone_round > 10);
    leave_rooms();
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("cuda_graph");
    TCase *tc = tcase_create("ops"), *engines = tcase_create("engines"); /* CK_RUN_CASE chooses one of them */

    tcase_add_checked_fixture(tc, start, NULL);
    tcase_add_checked_fixture(engines, start, NULL);
    tcase_set_timeout(tc, 240);
    tcase_set_timeout(engines, 240);
    tcase_add_test(tc, graph_is_replayed_for_other_launches);
    tcase_add_loop_test(tc, graph_is_made_for_nothing, 0, 4);
    tcase_add_test(tc, failed_graph_is_an_error_or_leaves_something);
    tcase_add_test(tc, more_runs_than_places_drive_each_other_out);
    tcase_add_loop_test(engines, graphs_change_bits, 0, 8);
    tcase_add_test(engines, graphs_change_bits_when_experts_move);
    tcase_add_loop_test(engines, token_takes_more_launches_than_the_host_has_decisions, 0, 4);
    tcase_add_loop_test(engines, step_of_several_rows_waits_for_routers, 0, 4);
    tcase_add_test(engines, row_gets_what_another_wants);
    tcase_add_test(engines, logits_without_a_number_are_drawn_from);
    tcase_add_test(engines, page_of_a_shorter_sequence_changes_launches);
    tcase_add_loop_test(engines, failed_call_spoils_later_tokens, 0, 2);
    suite_add_tcase(suite, tc);
    suite_add_tcase(suite, engines);
    return run_suite(suite);
}
