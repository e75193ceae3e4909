/* Plans for machines that do not exist, of models without weights: what the suites of plans ask with. What they must say comes from
 * arithmetic in tests/gen/plan_heads.py. Each suite that includes it is a program of its own. lint: C, as Check's suites are */
#ifndef FERRY_TESTS_PLAN_ASK_H
#define FERRY_TESTS_PLAN_ASK_H

#include "tests/plan_machine.h"

#include "src/base/mem.h"

#include <check.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static const char *const names[] = {"dense", "moe", "window"};
enum { DENSE, MOE, WINDOW, N_MODELS };

static struct model *models[N_MODELS];

static uint64_t fact(const char *name, const char *key)
{
    char path[512], line[128], word[64];
    uint64_t value;

    snprintf(path, sizeof path, "%s/plan/%s.txt", TEST_DATA_DIR, name);
    FILE *f = fopen(path, "r");
    ck_assert_ptr_nonnull(f);
    while (fgets(line, sizeof line, f)) {
        if (sscanf(line, "%63s %" SCNu64, word, &value) == 2 && !strcmp(word, key)) {
            fclose(f);
            return value;
        }
    }
    ck_abort_msg("%s has no %s", path, key);
}

static void setup(void)
{
    for (int i = 0; i < N_MODELS; i++)
        models[i] = open_head(names[i], fact(names[i], "file_bytes"));
}

static void teardown(void)
{
    for (int i = 0; i < N_MODELS; i++)
        model_close(models[i]);
}

static struct machine machine;
static struct plan_opts opts;
static struct plan_in in;

static struct plan_in *ask(int model, uint64_t ram_bytes)
{
    machine = machine_of(ram_bytes);
    opts = (struct plan_opts){0};
    in = (struct plan_in){&machine, models[model], &opts, &device, NULL};
    return &in;
}

static inline uint64_t sum(const struct plan *p)
{
    return p->dense_bytes + p->expert_bytes + p->kv_bytes + p->scratch_bytes + p->stage_bytes + p->meta_bytes +
           p->trace_bytes;
}

static bool explains(const struct plan *p, const char *words)
{
    char *text;

    ck_assert_int_eq(plan_explain(p, &in, &text), 0);
    bool found = strstr(text, words) != NULL;
    if (!found)
        fprintf(stderr, "no \"%s\" in:\n%s", words, text);
    mem_free(text);
    return found;
}

/* The saved plan with the text after "key": replaced up to the end of its line. */
static char *edited(const char *text, const char *key, const char *value)
{
    static char out[8192];
    char word[64];

    snprintf(word, sizeof word, "\"%s\": ", key);
    const char *at = strstr(text, word);
    ck_assert_msg(at != NULL, "no %s", word);
    size_t n = (size_t)(at - text) + strlen(word);
    const char *rest = text + n + strcspn(text + n, ",\n");
    snprintf(out, sizeof out, "%.*s%s%s", (int)n, text, value, rest);
    return out;
}

#endif
