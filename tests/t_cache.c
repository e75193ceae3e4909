/* The shape of KV pages, and the cache that hands them to sequences. */
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/model.h"
#include "src/run/cache.h"
#include "tests/run_suite.h"

#include <check.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { PAGE = DEVICE_PAGE_TOK, SEGMENT_PAGES = DEVICE_SEGMENT_PAGES };

/* Every passing ck_assert() writes to a file: too slow where one is passed a million times. */
#define MUST(cond, ...)                \
    do {                               \
        if (!(cond))                   \
            ck_abort_msg(__VA_ARGS__); \
    } while (0)

/* ---- the shape ---- */

static struct model shape_model(struct model_layer *layers, int n_layer, int head_dim_k, int head_dim_v)
{
    struct model m = {.layers = layers};
    m.hp.n_layer = n_layer;
    m.hp.head_dim_k = head_dim_k;
    m.hp.head_dim_v = head_dim_v;
    return m;
}

START_TEST(layers_of_a_page_do_not_overlap)
{
    /* K and V rows of one head of 64 positions: f16 64*64*2 = 8192 and 64*128*2 = 16384 bytes,
     * q8_0 64*2*34 = 4352 and 64*4*34 = 8704. */
    static const struct {
        enum quant_type type;
        uint64_t k, v;
    } want[] = {{QUANT_F16, 8192, 16384}, {QUANT_Q8_0, 4352, 8704}};
    struct model_layer layers[3] = {{.n_head_kv = 2}, {.n_head_kv = 1}, {.n_head_kv = 3}};
    struct model m = shape_model(layers, 3, 64, 128);
    struct op_attn p[3];
    struct kv_shape s;
    uint64_t k = want[_i].k, v = want[_i].v;

    memset(p, 0, sizeof p);
    ck_assert_int_eq(model_kv_shape(&m, want[_i].type, 0, &s, p), 0);
    ck_assert_int_eq(s.n_groups, 1);
    ck_assert_int_eq(s.type, want[_i].type);
    ck_assert_int_eq(s.window[0], 0);
    ck_assert_uint_eq(s.page_bytes[0], 6 * (k + v));
    ck_assert_uint_eq(p[0].k_off, 0);
    ck_assert_uint_eq(p[0].v_off, 2 * k);
    ck_assert_uint_eq(p[1].k_off, 2 * k + 2 * v);
    ck_assert_uint_eq(p[1].v_off, 3 * k + 2 * v);
    ck_assert_uint_eq(p[2].k_off, 3 * k + 3 * v);
    ck_assert_uint_eq(p[2].v_off, 6 * k + 3 * v);
    for (int layer = 0; layer < 3; layer++) {
        ck_assert_int_eq(p[layer].group, 0);
        ck_assert_uint_eq(p[layer].k_off % 64 + p[layer].v_off % 64, 0);
    }
    ck_assert_int_eq(model_kv_shape(&m, want[_i].type, 0, &s, NULL), 0);
}
END_TEST

START_TEST(window_layers_get_a_group_of_their_own)
{
    struct model_layer layers[4] = {{.n_head_kv = 1, .window = 512},
                                    {.n_head_kv = 1, .window = 1024},
                                    {.n_head_kv = 1},
                                    {.n_head_kv = 1, .window = 512}};
    struct model m = shape_model(layers, 4, 32, 32);
    struct op_attn p[4];
    struct kv_shape s;

    memset(p, 0, sizeof p);
    ck_assert_int_eq(model_kv_shape(&m, QUANT_F16, 0, &s, p), 0);
    ck_assert_int_eq(s.n_groups, 2);
    ck_assert_int_eq(s.window[0], 0);
    ck_assert_int_eq(s.window[1], 1024);
    ck_assert_uint_eq(s.page_bytes[0], 8192); /* 2 * 64 * 32 * 2 */
    ck_assert_uint_eq(s.page_bytes[1], 3 * 8192);
    ck_assert_int_eq(p[0].group, 1);
    ck_assert_int_eq(p[2].group, 0);
    ck_assert_uint_eq(p[2].k_off, 0);
    ck_assert_uint_eq(p[3].k_off, 2 * 8192);
    ck_assert_uint_eq(p[3].v_off, 2 * 8192 + 4096);
}
END_TEST

START_TEST(model_of_window_layers_only_has_an_empty_full_group)
{
    struct model_layer layers[1] = {{.n_head_kv = 1, .window = 128}};
    struct model m = shape_model(layers, 1, 32, 32);
    struct kv_shape s;

    ck_assert_int_eq(model_kv_shape(&m, QUANT_F16, 0, &s, NULL), 0);
    ck_assert_int_eq(s.n_groups, 2);
    ck_assert_uint_eq(s.page_bytes[0], 0);
    ck_assert_int_eq(model_kv_pages(&s, 0, 10000, 64), 0);
    ck_assert_int_gt(model_kv_pages(&s, 1, 10000, 64), 0);
}
END_TEST

/* The host's layers have groups of their own, whose pages are all its. */
START_TEST(layers_of_the_host_share_pages_with_a_devices)
{
    struct model_layer layers[5] = {{.n_head_kv = 1},
                                    {.n_head_kv = 1, .window = 512},
                                    {.n_head_kv = 1},
                                    {.n_head_kv = 1},
                                    {.n_head_kv = 1, .window = 1024}};
    const struct kv_pool pool = {.n_seq = 2, .n_ctx = 2048, .chunk_tok = 64, .dev_tok = 512};
    struct model m = shape_model(layers, 5, 32, 32);
    struct op_attn p[5];
    struct kv_shape s;

    memset(p, 0, sizeof p);
    ck_assert_int_eq(model_kv_shape(&m, QUANT_F16, 3, &s, p), 0);
    ck_assert_int_eq(s.n_groups, 4);
    for (int group = 0; group < 4; group++) {
        ck_assert_uint_eq(s.page_bytes[group], group == 2 ? 2 * 8192 : 8192);
        ck_assert_int_eq(s.on_host[group], group >= 2);
        ck_assert_int_eq(s.window[group], group == 1 ? 1024 : group == 3 ? 512 : 0);
    }
    ck_assert_int_eq(p[0].group, 2);
    ck_assert_int_eq(p[1].group, 3);
    ck_assert_uint_eq(p[2].k_off, 8192);
    ck_assert_int_eq(p[3].group, 0);
    ck_assert_int_eq(p[4].group, 1);
    ck_assert_int_eq(model_kv_dev_pages(&s, 2, &pool), 0);
    ck_assert_int_eq(model_kv_host_pages(&s, 2, &pool), 2 * 32);
    ck_assert_int_eq(model_kv_dev_pages(&s, 3, &pool), 0);
    ck_assert_int_eq(model_kv_host_pages(&s, 3, &pool), model_kv_pool_pages(&s, 3, &pool));
    ck_assert_int_eq(model_kv_dev_pages(&s, 0, &pool), 8);
    ck_assert_int_eq(model_kv_host_pages(&s, 0, &pool), 2 * 32 - 8 + 16);
    ck_assert_int_eq(model_kv_shape(&m, QUANT_F16, 1, &s, NULL), 0);
    ck_assert_int_eq(s.n_groups, 3);
}
END_TEST

START_TEST(head_that_the_type_cannot_hold_is_refused)
{
    struct model_layer layers[1] = {{.n_head_kv = 1}};
    struct model m = shape_model(layers, 1, 80, 96);
    struct kv_shape s;

    ck_assert_int_eq(model_kv_shape(&m, QUANT_F16, 0, &s, NULL), 0);
    ck_assert_int_eq(model_kv_shape(&m, QUANT_Q8_0, 0, &s, NULL), ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(err_text(), "80"));
    m.hp.head_dim_k = 64;
    m.hp.head_dim_v = 72;
    ck_assert_int_eq(model_kv_shape(&m, QUANT_Q8_0, 0, &s, NULL), ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(err_text(), "72"));
    ck_assert_int_eq(model_kv_shape(&m, QUANT_Q4_0, 0, &s, NULL), ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(err_text(), "Q4_0"));
}
END_TEST

/* ---- the cache ---- */

/* Pages of one 32-bit mark per position and group. */
static struct kv_shape mark_shape(int window0, int window1)
{
    struct kv_shape s = {.type = QUANT_F16, .n_groups = 2};
    s.page_bytes[0] = s.page_bytes[1] = PAGE * sizeof(uint32_t);
    s.window[0] = window0;
    s.window[1] = window1;
    return s;
}

/* A device with memory of its own, which is the host's after all, so that tests can look into it. */
static struct {
    struct device device;
    int fail_in; /* the call of copy, fetch or fetched that fails; 0: none */
    int n_failed, n_moved, n_live;
    uint64_t bytes, host_bytes;
} fake;

static int fake_fails(void)
{
    return fake.fail_in && --fake.fail_in == 0 ? err(ERR_DEVICE, "as the test said") : 0;
}

static int fake_alloc(struct device *dev, uint64_t bytes, void **out)
{
    (void)dev;
    fake.n_live++;
    fake.bytes += bytes;
    *out = aligned_alloc(64, bytes);
    return *out ? 0 : ERR_NOMEM;
}

static int fake_alloc_host(struct device *dev, uint64_t bytes, void **out)
{
    int rc = fake_alloc(dev, bytes, out);
    fake.bytes -= bytes;
    fake.host_bytes += bytes;
    return rc;
}

static void fake_release(struct device *dev, void *ptr)
{
    (void)dev;
    fake.n_live -= ptr != NULL;
    free(ptr);
}

static int fake_copy(struct device *dev, void *dst, const void *src, uint64_t bytes)
{
    (void)dev;
    if (fake_fails())
        return ERR_DEVICE;
    memcpy(dst, src, bytes);
    return 0;
}

static int fake_fetched(struct device *dev)
{
    (void)dev;
    fake.n_moved++;
    return fake_fails();
}

static const struct device_ops fake_ops = {.name = "fake",
                                           .alloc = fake_alloc,
                                           .release = fake_release,
                                           .alloc_host = fake_alloc_host,
                                           .release_host = fake_release,
                                           .upload = fake_copy,
                                           .download = fake_copy,
                                           .copy = fake_copy,
                                           .fetch = fake_copy,
                                           .fetched = fake_fetched};

/* The page of a slot on either side. */
static void *page_at(const struct cache_seq *s, int group, int64_t slot)
{
    struct kv_seq near, far;

    cache_view(s, &near);
    cache_view_host(s, &far);
    void *here = near.page[group] ? near.page[group][slot] : NULL;
    void *there = far.page[group] ? far.page[group][slot] : NULL;
    MUST(!here || !there, "group %d: page %" PRId64 " lies in both memories", group, slot);
    return here ? here : there;
}

static uint32_t *mark_at(const struct cache_seq *s, int group, int64_t pos)
{
    uint32_t *page = page_at(s, group, pos / PAGE);
    return page ? page + pos % PAGE : NULL;
}

static void write_marks(struct cache_seq *s, int64_t n_tok, uint32_t mark)
{
    for (int group = 0; group < 2; group++)
        for (int64_t i = 0; i < n_tok; i++) {
            uint32_t *at = mark_at(s, group, cache_len(s) + i);
            MUST(at, "group %d: position %" PRId64 " is not writable", group, cache_len(s) + i);
            *at = mark + (uint32_t)i;
        }
}

static void grow(struct cache_seq *s, int64_t n_tok, uint32_t mark)
{
    ck_assert_int_eq(cache_reserve(s, n_tok), 0);
    write_marks(s, n_tok, mark);
    cache_commit(s, n_tok);
}

START_TEST(pool_takes_exactly_the_planned_bytes)
{
    struct kv_shape shape = mark_shape(0, 100);
    struct cache_args args = {.shape = &shape, .n_seq = 3, .n_ctx = 1000, .chunk_tok = 50};
    uint64_t before = mem_live_bytes(MEM_KV), meta = mem_live_bytes(MEM_META);
    struct cache *c;

    /* 1000 positions: 16 pages; 99 + 50 positions touch at most 4 pages; 3 * (16 + 4) * 256 bytes, in 4 KiB. */
    ck_assert_uint_eq(cache_bytes(&args), 16384);
    ck_assert_int_eq(cache_open(&args, &c), 0);
    ck_assert_uint_eq(mem_live_bytes(MEM_KV) - before, cache_bytes(&args));
    ck_assert_int_eq(cache_pages(c, 0), 48);
    ck_assert_int_eq(cache_pages(c, 1), 12);
    cache_close(c);
    cache_close(NULL);
    ck_assert_uint_eq(mem_live_bytes(MEM_KV), before);
    ck_assert_uint_eq(mem_live_bytes(MEM_META), meta);
}
END_TEST

START_TEST(impossible_sizes_are_refused)
{
    struct kv_shape shape = mark_shape(0, 100);
    struct cache_args args = {.shape = &shape, .n_seq = 0, .n_ctx = 1000, .chunk_tok = 50};
    struct cache *c;

    ck_assert_int_eq(cache_open(&args, &c), ERR_ARG);
    args.n_seq = 1;
    args.n_ctx = INT64_C(1) << 40;
    ck_assert_int_eq(cache_open(&args, &c), ERR_LIMIT);
    args.n_ctx = INT32_MAX;
    args.n_seq = 10;
    shape.page_bytes[0] = UINT64_C(1) << 62;
    ck_assert_uint_eq(cache_bytes(&args), UINT64_MAX);
    ck_assert_int_eq(cache_open(&args, &c), ERR_NOMEM);
    ck_assert_ptr_null(c);
}
END_TEST

START_TEST(open_survives_every_failing_allocation)
{
    struct kv_shape shape = mark_shape(0, 100);
    struct cache_args args = {.shape = &shape, .n_seq = 2, .n_ctx = 300, .chunk_tok = 50};
    uint64_t kv = mem_live_bytes(MEM_KV), meta = mem_live_bytes(MEM_META);
    struct cache *c;
    uint64_t n = 1;

    for (;; n++) {
        mem_fail_nth(n);
        int rc = cache_open(&args, &c);
        bool reached = mem_n_calls() >= n;
        mem_fail_nth(0);
        if (!reached) {
            ck_assert_int_eq(rc, 0);
            break;
        }
        ck_assert_int_eq(rc, ERR_NOMEM);
        ck_assert_ptr_null(c);
        ck_assert_uint_eq(mem_live_bytes(MEM_KV), kv);
        ck_assert_uint_eq(mem_live_bytes(MEM_META), meta);
    }
    ck_assert_uint_ge(n, 5);
    mem_fail_nth(0);
    struct cache_seq *s, *copy;
    ck_assert_int_eq(cache_seq_make(c, &s), 0);
    grow(s, 50, 0);
    ck_assert_int_eq(cache_fork(s, &copy), 0);
    grow(copy, 50, 0);
    ck_assert_uint_eq(mem_n_calls(), 0); /* nothing is taken after open */
    cache_seq_free(copy);
    cache_seq_free(s);
    cache_close(c);
}
END_TEST

START_TEST(limits_leave_the_sequence_as_it_was)
{
    struct kv_shape shape = mark_shape(0, 70);
    struct cache_args args = {.shape = &shape, .n_seq = 1, .n_ctx = 130, .chunk_tok = 100};
    struct cache *c;
    struct cache_seq *s, *other;

    ck_assert_int_eq(cache_open(&args, &c), 0);
    ck_assert_int_eq(cache_seq_make(c, &s), 0);
    ck_assert_int_eq(cache_seq_make(c, &other), ERR_LIMIT);
    ck_assert_ptr_null(other);
    ck_assert_int_eq(cache_fork(s, &other), ERR_LIMIT);
    grow(s, 60, 7);
    ck_assert_int_eq(cache_reserve(s, 71), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), "130"));
    ck_assert_int_eq(cache_reserve(s, 101), ERR_LIMIT);
    ck_assert_int_eq(cache_len(s), 60);
    ck_assert_int_eq(cache_pages_used(c, 0), 1);
    ck_assert_int_eq(cache_pages_used(c, 1), 1);
    ck_assert_uint_eq(*mark_at(s, 0, 59), 66);
    grow(s, 70, 100);
    ck_assert_int_eq(cache_len(s), 130);
    ck_assert_int_eq(cache_reserve(s, 1), ERR_LIMIT);
    ck_assert_int_eq(cache_reserve(s, 0), 0);
    cache_seq_free(s);
    ck_assert_int_eq(cache_pages_used(c, 0), 0);
    ck_assert_int_eq(cache_pages_used(c, 1), 0);
    ck_assert_int_eq(cache_seq_make(c, &s), 0);
    ck_assert_int_eq(cache_len(s), 0);
    cache_seq_free(NULL);
    cache_seq_free(s);
    cache_close(c);
}
END_TEST

static void check_most_pages(int window, int chunk, int64_t n_ctx)
{
    struct kv_shape shape = mark_shape(0, window);
    struct cache_args args = {.shape = &shape, .n_seq = 1, .n_ctx = n_ctx, .chunk_tok = chunk};
    struct cache *c;
    struct cache_seq *s;
    int64_t most[2] = {0, 0};

    ck_assert_int_eq(cache_open(&args, &c), 0);
    ck_assert_int_eq(cache_seq_make(c, &s), 0);
    for (int64_t len = 0; len < n_ctx; len++) {
        int64_t n = n_ctx - len < chunk ? n_ctx - len : chunk;
        MUST(!cache_reserve(s, n), "%s", err_text());
        for (int group = 0; group < 2; group++)
            if (cache_pages_used(c, group) > most[group])
                most[group] = cache_pages_used(c, group);
        cache_commit(s, 1);
    }
    for (int group = 0; group < 2; group++)
        ck_assert_msg(most[group] == cache_pages(c, group) &&
                          most[group] == model_kv_pages(&shape, group, n_ctx, chunk),
                      "window %d, chunk %d, n_ctx %" PRId64 ", group %d: held %" PRId64 ", planned %" PRId64, window,
                      chunk, n_ctx, group, most[group], cache_pages(c, group));
    cache_seq_free(s);
    cache_close(c);
}

/* The number of pages that are planned is reached, and not passed. */
START_TEST(sequence_comes_to_hold_exactly_the_planned_pages)
{
    static const int windows[] = {1, 2, 3, 63, 64, 65, 66, 67, 127, 128, 129, 130, 500};
    static const int chunks[] = {1, 2, 63, 64, 65, 66, 100, 128, 129, 700};

    for (int i = 0; i < 130; i++)
        for (int64_t n_ctx = 1; n_ctx <= 460; n_ctx += n_ctx % PAGE < 3 ? 1 : PAGE - 3)
            check_most_pages(windows[i / 10], chunks[i % 10], n_ctx);
}
END_TEST

START_TEST(empty_group_takes_no_pages)
{
    struct kv_shape shape = mark_shape(0, 70);
    struct cache_args args = {.shape = &shape, .n_seq = 2, .n_ctx = 300, .chunk_tok = 100};
    struct cache *c;
    struct cache_seq *s, *copy;

    shape.page_bytes[0] = 0;
    ck_assert_int_eq(cache_open(&args, &c), 0);
    ck_assert_int_eq(cache_pages(c, 0), 0);
    ck_assert_int_eq(cache_seq_make(c, &s), 0);
    for (int i = 0; i < 3; i++) {
        ck_assert_int_eq(cache_reserve(s, 70), 0);
        cache_commit(s, 70);
    }
    ck_assert_int_eq(cache_fork(s, &copy), 0);
    ck_assert_int_eq(cache_truncate(copy, 209), 209);
    ck_assert_int_eq(cache_truncate(copy, 100), 0);
    cache_seq_free(s);
    cache_seq_free(copy);
    ck_assert_int_eq(cache_pages_used(c, 1), 0);
    cache_close(c);
}
END_TEST

START_TEST(writing_after_a_fork_leaves_the_other_alone)
{
    struct kv_shape shape = mark_shape(0, 1000);
    struct cache_args args = {.shape = &shape, .n_seq = 2, .n_ctx = 300, .chunk_tok = 100};
    struct cache *c;
    struct cache_seq *a, *b;

    ck_assert_int_eq(cache_open(&args, &c), 0);
    ck_assert_int_eq(cache_seq_make(c, &a), 0);
    grow(a, 100, 1000);
    ck_assert_int_eq(cache_reserve(a, 1), 0); /* a may go on writing into what it has reserved before the fork */
    ck_assert_int_eq(cache_fork(a, &b), 0);
    ck_assert_int_eq(cache_pages_used(c, 0), 2);
    grow(b, 30, 2000);
    ck_assert_int_eq(cache_pages_used(c, 0), 4); /* b: its copy of the second page and a third; a: the second page */
    write_marks(a, 1, 3000);
    cache_commit(a, 1);
    for (int group = 0; group < 2; group++) {
        ck_assert_ptr_eq(mark_at(a, group, 0), mark_at(b, group, 0));
        ck_assert_uint_eq(*mark_at(a, group, 99), 1099);
        ck_assert_uint_eq(*mark_at(b, group, 99), 1099);
        ck_assert_uint_eq(*mark_at(a, group, 100), 3000);
        ck_assert_uint_eq(*mark_at(b, group, 100), 2000);
        ck_assert_uint_eq(*mark_at(b, group, 129), 2029);
    }
    ck_assert_int_eq(cache_truncate(b, 50), 50);
    grow(b, 1, 4000);
    ck_assert_uint_eq(*mark_at(a, 0, 50), 1050);
    ck_assert_uint_eq(*mark_at(b, 0, 50), 4000);
    ck_assert_uint_eq(*mark_at(b, 0, 49), 1049);
    cache_seq_free(a);
    ck_assert_uint_eq(*mark_at(b, 0, 49), 1049);
    ck_assert_int_eq(cache_pages_used(c, 0), 1);
    cache_seq_free(b);
    ck_assert_int_eq(cache_pages_used(c, 0), 0);
    cache_close(c);
}
END_TEST

START_TEST(truncating_behind_the_window_drops_everything)
{
    struct kv_shape shape = mark_shape(0, 64);
    struct cache_args args = {.shape = &shape, .n_seq = 1, .n_ctx = 1000, .chunk_tok = 100};
    struct cache *c;
    struct cache_seq *s;

    ck_assert_int_eq(cache_open(&args, &c), 0);
    ck_assert_int_eq(cache_seq_make(c, &s), 0);
    grow(s, 100, 0);
    grow(s, 100, 100);
    /* Position 200 looks at 137 and later: pages 0 and 1 (positions 0 to 127) have gone from the window group. */
    ck_assert_ptr_null(mark_at(s, 1, 127));
    ck_assert_ptr_nonnull(mark_at(s, 1, 128));
    ck_assert_ptr_nonnull(mark_at(s, 0, 0));
    ck_assert_int_eq(cache_truncate(s, 500), 200);
    ck_assert_int_eq(cache_truncate(s, 191), 191); /* looks at 128 */
    ck_assert_int_eq(cache_truncate(s, 190), 0);   /* looks at 127 */
    ck_assert_int_eq(cache_len(s), 0);
    ck_assert_int_eq(cache_pages_used(c, 0), 0);
    ck_assert_int_eq(cache_pages_used(c, 1), 0);
    cache_seq_free(s);
    cache_close(c);
}
END_TEST

/* A prompt, an answer that is longer than the window, and the next turn begins where the prompt ended. */
START_TEST(answer_that_is_taken_back_takes_the_prompt_along)
{
    struct kv_shape shape = mark_shape(0, 64);
    struct cache_args args = {.shape = &shape, .n_seq = 1, .n_ctx = 2000, .chunk_tok = 256};
    struct cache *c;
    struct cache_seq *s;

    ck_assert_int_eq(cache_open(&args, &c), 0);
    ck_assert_int_eq(cache_seq_make(c, &s), 0);
    grow(s, 256, 0);
    grow(s, 44, 256);
    cache_mark(s); /* position 300 looks at 237: pages 3 and 4 */
    for (int i = 0; i < 600; i++)
        grow(s, 1, 300 + (uint32_t)i);
    ck_assert_int_eq(cache_pages_used(c, 1), 2 + 2); /* 837 to 899, and the mark's */
    ck_assert_int_eq(cache_whole(s, 310), 300);
    ck_assert_int_eq(cache_truncate(s, 310), 300);
    for (int64_t pos = 237; pos < 300; pos++)
        ck_assert_uint_eq(*mark_at(s, 1, pos), (uint32_t)pos);
    ck_assert_uint_eq(*mark_at(s, 0, 0), 0);
    ck_assert_int_eq(cache_pages_used(c, 1), 2);
    ck_assert_int_eq(cache_truncate(s, 299), 299); /* below the mark, which is gone then */
    cache_mark(s);
    for (int i = 0; i < 600; i++)
        grow(s, 1, 299 + (uint32_t)i);
    ck_assert_int_eq(cache_whole(s, 254), 0);
    ck_assert_int_eq(cache_truncate(s, 255), 255); /* looks at 192, where the mark's first page begins */
    for (int64_t pos = 192; pos < 255; pos++)
        ck_assert_uint_eq(*mark_at(s, 1, pos), (uint32_t)pos);
    ck_assert_int_eq(cache_pages_used(c, 1), 1);
    grow(s, 200, 5000);
    ck_assert_int_eq(cache_truncate(s, 310), 0);
    grow(s, 100, 0);
    cache_mark(s);
    grow(s, 256, 100); /* six pages: the most there are */
    grow(s, 256, 356);
    ck_assert_int_eq(cache_truncate(s, 150), 0);
    cache_mark(s);
    cache_seq_free(s);
    ck_assert_int_eq(cache_pages_used(c, 1), 0);
    cache_close(c);
}
END_TEST

/* ---- a random walk beside a naive model ---- */

enum { N_SEQ = 4, N_CTX = 600, N_STEP = 4000 };

struct naive {
    struct cache_seq *s; /* NULL: free */
    int64_t len, reserved;
    int64_t kept_from[2]; /* what lies before has been let go of */
    int64_t back;         /* the length that was marked; 0: none */
    uint32_t mark[N_CTX];
};

struct walk {
    uint64_t rng;
    struct kv_shape shape;
    int chunk;
    struct cache *c;
    struct naive n[N_SEQ];
    uint32_t next_mark;
    int step;
    int64_t n_far; /* pages seen in the host's memory beside the device's, over all steps */
    int n_back;    /* times that a sequence came back to a mark */
};

static int64_t pick(struct walk *w, int64_t below)
{
    w->rng = w->rng * 6364136223846793005u + 1442695040888963407u;
    return (int64_t)((w->rng >> 33) % (uint64_t)below);
}

static int64_t naive_seen(const struct walk *w, int group, int64_t pos)
{
    int window = w->shape.window[group];
    return window && pos - window + 1 > 0 ? pos - window + 1 : 0;
}

static void naive_let_go(const struct walk *w, struct naive *n)
{
    n->reserved = 0;
    for (int group = 0; group < 2; group++) {
        int64_t from = naive_seen(w, group, n->len) / PAGE * PAGE;
        if (n->kept_from[group] < from)
            n->kept_from[group] = from;
        if (n->len == 0)
            n->kept_from[group] = 0;
    }
}

/* Is the slot held for the length that was marked? */
static bool naive_is_back(const struct walk *w, const struct naive *n, int group, int64_t slot)
{
    int64_t from = naive_seen(w, group, n->back);
    return w->shape.window[group] && from < n->back && slot >= from / PAGE && slot * PAGE < n->back;
}

/* A mark goes when its pages and those of n_tok positions more are more than a sequence's share. */
static void naive_make_way(const struct walk *w, struct naive *n, int64_t n_tok)
{
    bool fits = true;

    for (int group = 0; group < 2; group++) {
        int64_t first = naive_seen(w, group, n->len) / PAGE, n_slots = 0;
        for (int64_t slot = 0; slot <= N_CTX / PAGE; slot++)
            n_slots += naive_is_back(w, n, group, slot) || (slot >= first && slot * PAGE < n->len + n_tok);
        fits = fits && n_slots <= model_kv_pages(&w->shape, group, N_CTX, w->chunk);
    }
    n->back = fits ? n->back : 0;
}

static void walk_reserve(struct walk *w, struct naive *n)
{
    int64_t n_tok = pick(w, w->chunk + 3);
    if (n_tok <= w->chunk && n->len + n_tok <= N_CTX)
        naive_make_way(w, n, n_tok);
    fake.fail_in = w->n_far && pick(w, 2) ? 1 + (int)pick(w, 4) : 0;
    int rc = cache_reserve(n->s, n_tok);

    MUST(rc == 0 || (n_tok <= w->chunk && n->len + n_tok <= N_CTX) == (rc == ERR_DEVICE), "step %d: %s", w->step,
         err_text());
    fake.fail_in = 0;
    fake.n_failed += rc == ERR_DEVICE;
    if (rc == ERR_DEVICE)
        rc = cache_reserve(n->s, n_tok);
    ck_assert_int_eq(rc, n_tok > w->chunk || n->len + n_tok > N_CTX ? ERR_LIMIT : 0);
    if (!rc && n_tok > n->reserved)
        n->reserved = n_tok;
}

static void walk_commit(struct walk *w, struct naive *n)
{
    int64_t n_tok = pick(w, 3) ? n->reserved : pick(w, n->reserved + 1);

    write_marks(n->s, n->reserved, w->next_mark);
    for (int64_t i = 0; i < n_tok; i++)
        n->mark[n->len + i] = w->next_mark + (uint32_t)i;
    w->next_mark += (uint32_t)n->reserved;
    cache_commit(n->s, n_tok);
    n->len += n_tok;
    naive_let_go(w, n);
}

static void walk_truncate(struct walk *w, struct naive *n)
{
    int64_t to = pick(w, 2) ? n->len - pick(w, 80) : pick(w, N_CTX + 10);
    int64_t want = to < 0 ? 0 : to > n->len ? n->len : to;
    bool is_whole = true, is_back = n->back > 0;

    for (int group = 0; group < 2; group++)
        is_whole =
            is_whole && (naive_seen(w, group, want) == want || naive_seen(w, group, want) >= n->kept_from[group]);
    if (!is_whole) {
        want = n->back <= want ? n->back : want;
        for (int group = 0; group < 2; group++)
            is_back = is_back && (naive_seen(w, group, want) == want || !w->shape.window[group] ||
                                  naive_is_back(w, n, group, naive_seen(w, group, want) / PAGE));
        want = is_back ? want : 0;
        for (int group = 0; group < 2; group++)
            n->kept_from[group] = naive_seen(w, group, want) / PAGE * PAGE;
        w->n_back += want > 0;
    }
    n->back = n->back <= want ? n->back : 0;
    ck_assert_int_eq(cache_truncate(n->s, to), want);
    n->len = want;
    naive_let_go(w, n);
}

static void walk_mark(struct naive *n)
{
    cache_mark(n->s);
    n->back = n->len;
}

static void walk_fork(struct walk *w, struct naive *n)
{
    struct cache_seq *s;
    struct naive *to = NULL;

    for (int i = 0; i < N_SEQ; i++)
        if (!w->n[i].s)
            to = &w->n[i];
    ck_assert_int_eq(cache_fork(n->s, &s), to ? 0 : ERR_LIMIT);
    if (to) {
        *to = *n;
        to->s = s;
        to->reserved = to->back = 0;
    }
}

static void walk_step(struct walk *w)
{
    struct naive *n = &w->n[pick(w, N_SEQ)];
    int64_t what = pick(w, 21);

    if (!n->s) {
        memset(n, 0, sizeof *n);
        ck_assert_int_eq(cache_seq_make(w->c, &n->s), 0);
    } else if (what < 8) {
        walk_reserve(w, n);
    } else if (what < 16) {
        walk_commit(w, n);
    } else if (what < 17) {
        walk_truncate(w, n);
    } else if (what < 19) {
        walk_fork(w, n);
    } else if (what < 20) {
        walk_mark(n);
    } else {
        cache_seq_free(n->s);
        n->s = NULL;
    }
}

/* All positions that count hold their marks, and no page is held that nobody needs. */
static void walk_check(struct walk *w, uint64_t seed)
{
    for (int group = 0; group < 2; group++) {
        void *seen[N_SEQ * (N_CTX / PAGE + 1)];
        int64_t n_seen = 0;

        for (int i = 0; i < N_SEQ; i++) {
            const struct naive *n = &w->n[i];
            struct kv_seq far;
            if (!n->s)
                continue;
            cache_view_host(n->s, &far);
            MUST(cache_len(n->s) == n->len, "seed %" PRIu64 ", step %d: length %" PRId64 " instead of %" PRId64, seed,
                 w->step, cache_len(n->s), n->len);
            int64_t from = naive_seen(w, group, n->len), end = n->len + n->reserved;
            for (int64_t pos = from; pos < n->len; pos++)
                MUST(mark_at(n->s, group, pos) && *mark_at(n->s, group, pos) == n->mark[pos],
                     "seed %" PRIu64 ", step %d: sequence %d, group %d lost position %" PRId64, seed, w->step, i, group,
                     pos);
            for (int64_t slot = 0; slot <= (N_CTX - 1) / PAGE; slot++) {
                bool wanted =
                    (from < end && slot >= from / PAGE && slot * PAGE < end) || naive_is_back(w, n, group, slot);
                void *page = page_at(n->s, group, slot);
                MUST(!page == !wanted, "seed %" PRIu64 ", step %d: sequence %d, group %d, page %" PRId64 " is %s", seed,
                     w->step, i, group, slot, page ? "held" : "missing");
                void *const *host = far.page[group],
                            *first = page_at(n->s, group, slot / SEGMENT_PAGES * SEGMENT_PAGES);
                MUST(!page || !host || !first || !host[slot] == !host[slot / SEGMENT_PAGES * SEGMENT_PAGES],
                     "seed %" PRIu64 ", step %d: sequence %d, the segment of page %" PRId64 " is torn", seed, w->step,
                     i, slot);
                w->n_far += host && host[slot];
                bool known = !page;
                for (int64_t k = 0; k < n_seen && !known; k++)
                    known = seen[k] == page;
                if (!known)
                    seen[n_seen++] = page;
            }
        }
        MUST(cache_pages_used(w->c, group) == n_seen,
             "seed %" PRIu64 ", step %d: %" PRId64 " pages in use, %" PRId64 " held", seed, w->step,
             cache_pages_used(w->c, group), n_seen);
    }
}

static void walk_all(const struct cache_args *like, uint64_t seed, int64_t *n_far, int *n_back)
{
    struct walk *w = calloc(1, sizeof *w);
    struct cache_args args = *like;

    w->rng = seed;
    w->shape = *like->shape;
    w->chunk = (int)like->chunk_tok;
    w->next_mark = 1;
    args.shape = &w->shape;
    ck_assert_int_eq(cache_open(&args, &w->c), 0);
    for (; w->step < N_STEP; w->step++) {
        walk_step(w);
        walk_check(w, seed);
    }
    for (int i = 0; i < N_SEQ; i++)
        cache_seq_free(w->n[i].s);
    ck_assert_int_eq(cache_pages_used(w->c, 0), 0);
    ck_assert_int_eq(cache_pages_used(w->c, 1), 0);
    cache_close(w->c);
    *n_far = w->n_far;
    *n_back += w->n_back;
    free(w);
}

START_TEST(random_walk_agrees_with_a_naive_cache)
{
    static const int windows[][2] = {{0, 70}, {0, 1}, {0, 2}, {64, 65}, {0, 0}, {0, 300}};
    struct kv_shape shape = mark_shape(windows[_i % 6][0], windows[_i % 6][1]);
    struct cache_args args = {.shape = &shape, .n_seq = N_SEQ, .n_ctx = N_CTX, .chunk_tok = _i % 2 ? 37 : 150};
    int64_t n_far;

    int n_back = 0;
    walk_all(&args, 4711 + (uint64_t)_i, &n_far, &n_back);
    ck_assert_int_eq(n_far, 0);
    ck_assert_int_ge(n_back, windows[_i % 6][1] == 70 ? 3 : 0);
}
END_TEST

/* Of the 40 pages that four sequences can hold the device has 8 or 16, and of another group, in half of the walks, none. No sequence may
 * ever be refused what it could have if there were one memory. */
START_TEST(random_walk_over_two_memories_agrees_with_a_naive_cache)
{
    int64_t n_far = 0, n_far_all = 0;
    int n_back = 0;

    memset(&fake, 0, sizeof fake);
    fake.device.ops = &fake_ops;
    for (int i = 0; i < 12; i++) {
        struct kv_shape shape = mark_shape(0, i % 2 ? 0 : 70);
        shape.on_host[1] = i >= 6;
        struct cache_args args = {.shape = &shape,
                                  .n_seq = N_SEQ,
                                  .n_ctx = N_CTX,
                                  .chunk_tok = i % 4 < 2 ? 37 : 150,
                                  .dev_tok = (i % 3 ? 1 : 2) * DEVICE_ATTN_SEGMENT_TOK,
                                  .device = &fake.device};
        walk_all(&args, 815 + (uint64_t)i, &n_far, &n_back);
        ck_assert_int_gt(n_far, 0);
        n_far_all += n_far;
    }
    ck_assert_int_gt(n_far_all, 10000);
    ck_assert_int_gt(n_back, 10);
    ck_assert_int_gt(fake.n_moved, 30); /* segments that went to the host */
    ck_assert_int_gt(fake.n_failed, 10);
    ck_assert_int_eq(fake.n_live, 0);
}
END_TEST

START_TEST(two_memories_take_other_bytes_than_planned)
{
    struct kv_shape shape = mark_shape(0, 100);
    struct cache_args args = {
        .shape = &shape, .n_seq = 2, .n_ctx = 1600, .chunk_tok = 50, .dev_tok = 1024, .device = &fake.device};
    struct cache *c;

    memset(&fake, 0, sizeof fake);
    fake.device.ops = &fake_ops;
    /* 1600 positions: 25 pages, two sequences 50. The device has 16 of them, and 2 * 4 of the window; the host 34, and 16 more because
     * there are two sequences. Pages of 256 bytes, in 4 KiB. */
    ck_assert_uint_eq(cache_bytes(&args), 8192);
    ck_assert_uint_eq(cache_host_bytes(&args), 16384);
    ck_assert_int_eq(cache_open(&args, &c), 0);
    ck_assert_uint_eq(fake.bytes, 8192);
    ck_assert_uint_eq(fake.host_bytes, 16384);
    ck_assert_int_eq(cache_pages(c, 0), 66);
    ck_assert_int_eq(cache_pages(c, 1), 8);
    cache_close(c);
    args.n_seq = 1;
    ck_assert_uint_eq(cache_host_bytes(&args), 4096); /* 25 - 16 pages */
    args.dev_tok = 1600;
    ck_assert_int_eq(cache_open(&args, &c), ERR_ARG); /* no whole segments */
    args.dev_tok = 1024;
    args.device = NULL;
    ck_assert_int_eq(cache_open(&args, &c), ERR_ARG);
    ck_assert_int_eq(fake.n_live, 0);
}
END_TEST

/* A page is saved and loaded where it lies. */
START_TEST(page_of_the_host_is_not_saved)
{
    struct kv_shape shape = mark_shape(0, 0);
    struct cache_args args = {
        .shape = &shape, .n_seq = 1, .n_ctx = N_CTX, .chunk_tok = N_CTX, .dev_tok = 512, .device = &fake.device};
    struct cache *c;
    struct cache_seq *s;
    struct kv_seq far;
    uint32_t page[PAGE];

    memset(&fake, 0, sizeof fake);
    fake.device.ops = &fake_ops;
    ck_assert_int_eq(cache_open(&args, &c), 0);
    ck_assert_int_eq(cache_seq_make(c, &s), 0);
    ck_assert(!cache_view_host(s, &far));
    grow(s, N_CTX, 7);
    ck_assert(cache_view_host(s, &far));
    for (int64_t slot = 7; slot < 9; slot++) {
        ck_assert_int_eq(!far.page[0][slot], slot == 7);
        ck_assert_int_eq(cache_save_page(s, 0, slot, page), 0);
        ck_assert_uint_eq(page[3], 7 + slot * PAGE + 3);
        page[3] = 1;
        ck_assert_int_eq(cache_load_page(s, 0, slot, page), 0);
        ck_assert_uint_eq(*mark_at(s, 0, slot * PAGE + 3), 1);
    }
    cache_seq_free(s);
    cache_close(c);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("cache");
    TCase *tc = tcase_create("cache");

    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, layers_of_a_page_do_not_overlap, 0, 2);
    tcase_add_test(tc, window_layers_get_a_group_of_their_own);
    tcase_add_test(tc, model_of_window_layers_only_has_an_empty_full_group);
    tcase_add_test(tc, layers_of_the_host_share_pages_with_a_devices);
    tcase_add_test(tc, head_that_the_type_cannot_hold_is_refused);
    tcase_add_test(tc, pool_takes_exactly_the_planned_bytes);
    tcase_add_test(tc, impossible_sizes_are_refused);
    tcase_add_test(tc, open_survives_every_failing_allocation);
    tcase_add_test(tc, limits_leave_the_sequence_as_it_was);
    tcase_add_test(tc, sequence_comes_to_hold_exactly_the_planned_pages);
    tcase_add_test(tc, empty_group_takes_no_pages);
    tcase_add_test(tc, writing_after_a_fork_leaves_the_other_alone);
    tcase_add_test(tc, truncating_behind_the_window_drops_everything);
    tcase_add_test(tc, answer_that_is_taken_back_takes_the_prompt_along);
    tcase_add_test(tc, random_walk_over_two_memories_agrees_with_a_naive_cache);
    tcase_add_test(tc, two_memories_take_other_bytes_than_planned);
    tcase_add_test(tc, page_of_the_host_is_not_saved);
    tcase_add_loop_test(tc, random_walk_agrees_with_a_naive_cache, 0, 12);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
