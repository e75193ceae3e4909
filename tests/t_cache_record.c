/* Records of recurrent layers: where layers' parts lie, and whose a record is. */
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/model.h"
#include "src/run/cache.h"
#include "tests/run_suite.h"

#include <check.h>
#include <string.h>

/* 2 key heads and 4 value heads of 8 x 16, a convolution of 4: 3 * (2*16 + 64) floats, 1152 bytes, and 4*8*16, 2048. */
enum { CONV_BYTES = 1152, RECORD_BYTES = CONV_BYTES + 2048, PAGE_BYTES = 256 };

static struct model record_model(struct model_layer *layers, int n_layer)
{
    struct model m = {.layers = layers};

    m.hp.n_layer = n_layer;
    m.hp.head_dim_k = m.hp.head_dim_v = 32;
    m.hp.delta = (struct model_delta){2, 4, 8, 16, 4};
    return m;
}

START_TEST(records_of_layers_overlap)
{
    struct model_layer layers[6] = {
        {.n_head_kv = 1, .is_recurrent = true}, {.n_head_kv = 1}, {.n_head_kv = 1, .is_recurrent = true},
        {.n_head_kv = 1, .is_recurrent = true}, {.n_head_kv = 1}, {.n_head_kv = 1, .is_recurrent = true}};
    struct model m = record_model(layers, 6);
    struct kv_shape s, plain;

    ck_assert_uint_eq(model_kv_conv_bytes(&m), CONV_BYTES);
    ck_assert_uint_eq(model_kv_record_bytes(&m), RECORD_BYTES);
    ck_assert_int_eq(model_kv_shape(&m, QUANT_F16, 0, &s, NULL), 0);
    ck_assert_uint_eq(s.record_bytes, 4 * RECORD_BYTES);
    ck_assert_uint_eq(s.host_record_bytes, 0);
    ck_assert_uint_eq(model_kv_record_off(&m, 0, 0), 0);
    ck_assert_uint_eq(model_kv_record_off(&m, 3, 0), 2 * RECORD_BYTES);
    ck_assert_uint_eq(model_kv_record_off(&m, 5, 0), 3 * RECORD_BYTES);
    /* pages are of the other two alone */
    plain = s;
    layers[0] = layers[2] = layers[3] = layers[5] = layers[1];
    ck_assert_int_eq(model_kv_shape(&m, QUANT_F16, 0, &s, NULL), 0);
    ck_assert_uint_eq(s.page_bytes[0], 3 * plain.page_bytes[0]);
    layers[0].is_recurrent = layers[2].is_recurrent = layers[3].is_recurrent = layers[5].is_recurrent = true;
    ck_assert_int_eq(model_kv_shape(&m, QUANT_F16, 3, &s, NULL), 0); /* three layers are the host's */
    ck_assert_uint_eq(s.record_bytes, 2 * RECORD_BYTES);
    ck_assert_uint_eq(s.host_record_bytes, 2 * RECORD_BYTES);
    ck_assert_uint_eq(model_kv_record_off(&m, 2, 3), RECORD_BYTES);
    ck_assert_uint_eq(model_kv_record_off(&m, 3, 3), 0);
    ck_assert_uint_eq(model_kv_record_off(&m, 5, 3), RECORD_BYTES);
}
END_TEST

static struct kv_shape record_shape(void)
{
    return (struct kv_shape){
        .type = QUANT_F16, .n_groups = 1, .page_bytes = {PAGE_BYTES}, .record_bytes = RECORD_BYTES};
}

/* A step of n_tok positions that leaves `what` in the record. */
static void step(struct cache_seq *s, int64_t n_tok, int what)
{
    struct kv_seq view;

    ck_assert_msg(cache_reserve(s, n_tok) == 0, "%s", err_text());
    cache_view(s, &view);
    ck_assert_ptr_nonnull(view.next_record);
    ck_assert_ptr_ne(view.next_record, view.record);
    ck_assert_int_eq(view.record != NULL, cache_len(s) > 0);
    memset(view.next_record, what, RECORD_BYTES);
    cache_commit(s, n_tok);
}

/* What the record holds; -1: there is none. */
static int held(const struct cache_seq *s)
{
    struct kv_seq view;

    cache_view(s, &view);
    for (int i = 0; view.record && i < RECORD_BYTES; i++)
        ck_assert_int_eq(view.record[i], view.record[0]);
    return view.record ? view.record[0] : -1;
}

START_TEST(record_is_another_than_the_length_s)
{
    struct kv_shape shape = record_shape();
    struct cache_args args = {.shape = &shape, .n_seq = 2, .n_ctx = 500, .chunk_tok = 100};
    uint64_t before = mem_live_bytes(MEM_KV);
    struct cache *c;
    struct cache_seq *s, *copy;
    struct kv_seq view;

    ck_assert_int_eq(cache_open(&args, &c), 0);
    ck_assert_uint_eq(mem_live_bytes(MEM_KV) - before, cache_bytes(&args) + cache_record_bytes(&args));
    ck_assert_uint_eq(cache_record_bytes(&args), (6 * RECORD_BYTES + 4095) / 4096 * 4096);
    ck_assert(!cache_can_shorten(c));
    ck_assert_int_eq(cache_seq_make(c, &s), 0);
    ck_assert_int_eq(held(s), -1);
    step(s, 10, 1);
    ck_assert_int_eq(held(s), 1);
    ck_assert_int_eq(cache_reserve(s, 10), 0); /* a step that fails */
    cache_view(s, &view);
    memset(view.next_record, 9, RECORD_BYTES);
    cache_commit(s, 0);
    ck_assert_int_eq(held(s), 1);
    cache_mark(s);
    ck_assert_int_eq(cache_fork(s, &copy), 0);
    step(s, 10, 2);
    step(copy, 7, 3);
    step(s, 10, 4);
    ck_assert(held(s) == 4 && held(copy) == 3);
    ck_assert_int_eq(cache_whole(s, 40), 30);
    ck_assert_int_eq(cache_whole(s, 29), 10);
    ck_assert_int_eq(cache_whole(s, 9), 0);
    ck_assert_int_eq(cache_truncate(s, 30), 30);
    ck_assert_int_eq(held(s), 4);
    ck_assert_int_eq(cache_truncate(s, 29), 10);
    ck_assert_int_eq(held(s), 1);
    step(s, 5, 5);
    ck_assert_int_eq(cache_truncate(s, 12), 10); /* the mark is still there */
    ck_assert_int_eq(held(s), 1);
    ck_assert_int_eq(cache_truncate(s, 9), 0);
    ck_assert_int_eq(held(s), -1);
    step(s, 20, 6);
    ck_assert_int_eq(cache_truncate(s, 15), 0); /* and gone with what is below it */
    ck_assert_int_eq(held(copy), 3);
    ck_assert_int_eq(cache_truncate(copy, 16), 0); /* a fork has none */
    cache_seq_free(s);
    cache_seq_free(copy);
    cache_close(c);
    ck_assert_uint_eq(mem_live_bytes(MEM_KV), before);
}
END_TEST

/* Sequences at their most, each with a mark, find their records; those that share a pool are told that there are none. */
START_TEST(records_run_dry_unseen)
{
    enum { N = 4 };
    struct kv_shape shape = record_shape();
    struct cache_args args = {.shape = &shape, .n_seq = N, .n_ctx = 200, .chunk_tok = 100};
    struct cache *c;
    struct cache_seq *s[3 * N];

    ck_assert_int_eq(cache_open(&args, &c), 0);
    for (int i = 0; i < N; i++) {
        ck_assert_int_eq(cache_seq_make(c, &s[i]), 0);
        step(s[i], 5, i);
        cache_mark(s[i]);
        step(s[i], 5, i);
    }
    for (int i = 0; i < N; i++)
        ck_assert_int_eq(cache_reserve(s[i], 100), 0);
    for (int i = 0; i < N; i++)
        cache_seq_free(s[i]);
    cache_close(c);

    args.pool_tok = 100000;
    args.n_tables = 3 * N;
    ck_assert_int_eq(cache_open(&args, &c), 0); /* 2 of each, and 2 more */
    for (int i = 0; i < 2 * N + 2; i++) {
        ck_assert_int_eq(cache_seq_make(c, &s[i]), 0);
        step(s[i], 5, i);
    }
    ck_assert(!cache_has_room(s[0], 1) && cache_has_room(s[0], 0));
    ck_assert_int_eq(cache_reserve(s[0], 1), ERR_LIMIT);
    ck_assert_int_eq(cache_fork(s[1], &s[2 * N + 2]), 0); /* shares */
    cache_seq_free(s[1]);
    ck_assert(!cache_has_room(s[0], 1));
    cache_seq_free(s[2 * N + 2]);
    ck_assert(cache_has_room(s[0], 1));
    step(s[0], 1, 7);
    for (int i = 0; i < 2 * N + 2; i++)
        if (i != 1) {
            ck_assert_int_eq(held(s[i]), i ? i : 7);
            cache_seq_free(s[i]);
        }
    cache_close(c);
}
END_TEST

/* Where a pool has no record left, the sequence's own mark gives way, and only then is it told. */
START_TEST(mark_keeps_its_sequence_from_going_on)
{
    struct kv_shape shape = record_shape();
    struct cache_args args = {
        .shape = &shape, .n_seq = 1, .n_ctx = 200, .chunk_tok = 100, .pool_tok = 100000, .n_tables = 3};
    struct cache *c;
    struct cache_seq *s, *other;

    ck_assert_int_eq(cache_open(&args, &c), 0);
    ck_assert_int_eq(cache_seq_make(c, &s), 0);
    ck_assert_int_eq(cache_seq_make(c, &other), 0);
    step(s, 5, 1);
    cache_mark(s);
    step(s, 5, 2);
    step(other, 5, 3); /* the last of three */
    ck_assert_int_eq(cache_reserve(other, 1), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), "no free record"));
    step(s, 1, 4);
    ck_assert(held(s) == 4 && held(other) == 3);
    ck_assert_int_eq(cache_whole(s, 7), 0);
    cache_seq_free(s);
    cache_seq_free(other);
    cache_close(c);
}
END_TEST

START_TEST(open_survives_every_failing_allocation)
{
    struct kv_shape shape = record_shape();
    struct cache_args args = {.shape = &shape, .n_seq = 2, .n_ctx = 300, .chunk_tok = 50};
    uint64_t kv = mem_live_bytes(MEM_KV), meta = mem_live_bytes(MEM_META);
    struct cache *c;
    uint64_t n = 1;
    int rc = -1;

    for (; rc < 0; n++) {
        mem_fail_nth(n);
        rc = cache_open(&args, &c);
        mem_fail_nth(0);
        ck_assert(rc == 0 || rc == ERR_NOMEM);
        cache_close(c);
        ck_assert_uint_eq(mem_live_bytes(MEM_KV), kv);
        ck_assert_uint_eq(mem_live_bytes(MEM_META), meta);
    }
    ck_assert_uint_ge(n, 6);
    shape.record_bytes = UINT64_MAX / 4; /* more than can be counted */
    ck_assert_int_eq(cache_open(&args, &c), ERR_NOMEM);
    ck_assert_ptr_null(c);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("cache_record");
    TCase *tc = tcase_create("cache_record");

    tcase_add_test(tc, records_of_layers_overlap);
    tcase_add_test(tc, record_is_another_than_the_length_s);
    tcase_add_test(tc, records_run_dry_unseen);
    tcase_add_test(tc, mark_keeps_its_sequence_from_going_on);
    tcase_add_test(tc, open_survives_every_failing_allocation);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
