/* Conversations as a model's template lays them out, and answers taken apart again. */
#include "src/ferry.h"
#include "tests/run_suite.h"

#include <check.h>
#include <stdio.h>
#include <string.h>

static struct ferry_engine *open_file(const char *path)
{
    struct ferry_engine *e = NULL;
    ck_assert_msg(ferry_engine_open(path, NULL, &e) == 0, "%s: %s", path, ferry_error());
    return e;
}

static struct ferry_engine *open_model(const char *name)
{
    char path[512];
    snprintf(path, sizeof path, "%s/models/%s.gguf", TEST_DATA_DIR, name);
    return open_file(path);
}

/* What the template gets of answers in channels; another family's text may contain such names as it likes. */
START_TEST(answer_in_channels_goes_back_whole)
{
    static const struct {
        const char *model, *answer, *want;
    } cases[] = {
        {"gpt-oss", "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes", "yes"},
        {"gpt-oss", "<|channel|>final<|message|>no<|start|>assistant<|channel|>final<|message|>yes", "yes"},
        {"gpt-oss", "<|channel|>analysis<|message|>hm, that was cut", ""},
        {"gpt-oss", "plain", "plain"},
        {"qwen3moe", "<|channel|>final<|message|>yes", "<|channel|>final<|message|>yes"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct ferry_engine *e = open_model(cases[i].model);
        const struct ferry_message messages[] = {
            {"user", "<|channel|>final<|message|>q"}, {"assistant", cases[i].answer}, {"user", "and?"}};
        char *text, want[256];
        ck_assert_msg(ferry_chat_prompt(e, messages, 3, NULL, &text) == 0, "%s", ferry_error());
        snprintf(want, sizeof want,
                 "<|begin|>user\n<|channel|>final<|message|>q<|end|>\n<|begin|>assistant\n%s<|end|>\n"
                 "<|begin|>user\nand?<|end|>\n<|begin|>assistant\n",
                 cases[i].want);
        ck_assert_str_eq(text, want);
        ferry_free(text);
        ferry_engine_close(e);
    }
}
END_TEST

/* A model whose template begins an answer amid a thought unless it is told not to. */
static struct ferry_engine *open_thinker(void)
{
    return open_file(TEST_DATA_DIR "/cli/thinks.gguf");
}

START_TEST(answer_is_not_told_from_thoughts)
{
    static const struct {
        bool in_channels, begins_amid;
        const char *answer, *thought, *said;
    } cases[] = {
        {false, false, "<think>\nhm\n</think>\n\nyes \n", "hm", "yes \n"},
        {false, true, "hm\n</think>\n\nyes</think>", "hm", "yes</think>"},
        {false, true, "<think>hm</think>yes", "hm", "yes"}, /* it began anew */
        {false, false, "<think>\n\n</think>\n\nyes", "", "yes"},
        {false, false, "<think>hm, that was cut", "hm, that was cut", ""},
        {false, true, "hm, that was cut", "hm, that was cut", ""},
        {false, false, "yes</think>", "", "yes</think>"},
        {false, false, "say <think>hm</think>", "", "say <think>hm</think>"},
        {false, false, "", "", ""},
        {false, true, "", "", ""},
        {false, false, "<|channel|>final<|message|>yes", "", "<|channel|>final<|message|>yes"}, /* no token of it */
        {true, false, "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes", "hm",
         "yes"},
        {true, false, "<|channel|>analysis<|message|>hm, that was cut", "hm, that was cut", ""},
        {true, false, "<|channel|>final<|message|>yes", "", "yes"},
        {true, false,
         "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>{}",
         "hm", "{}"},
        {true, false, "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final",
         "hm<|end|><|start|>assistant<|channel|>final", ""},
        {true, false,
         "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>b<|end|><|start|>"
         "assistant"
         "<|channel|>final<|message|>yes",
         "a<|end|><|start|>assistant<|channel|>commentary<|message|>b", "yes"},
        {true, true, "<think>plain</think>", "", "<think>plain</think>"},
    };
    struct ferry_engine *engines[] = {open_thinker(), open_model("gpt-oss")};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct ferry_reply r;
        size_t n = strlen(cases[i].answer);
        ferry_reply_split(engines[cases[i].in_channels], cases[i].begins_amid, cases[i].answer, n, &r);
        ck_assert_msg(r.n_thought == strlen(cases[i].thought) && !memcmp(r.thought, cases[i].thought, r.n_thought),
                      "%s: thought %.*s", cases[i].answer, (int)r.n_thought, r.thought);
        ck_assert_msg(r.n_said == strlen(cases[i].said) && !memcmp(r.said, cases[i].said, r.n_said), "%s: said %.*s",
                      cases[i].answer, (int)r.n_said, r.said);
    }
    for (int i = 0; i < 2; i++)
        ferry_engine_close(engines[i]);
}
END_TEST

/* The prompt of one message, by one variable, and whether it leaves the model amid a thought. */
static void must_lay_out(const struct ferry_engine *e, const struct ferry_var *var, const char *want, bool amid)
{
    const enum ferry_thought thought = amid ? FERRY_THOUGHT_AMID : FERRY_THOUGHT_NONE;
    struct ferry_message msg = {"user", "hi"};
    struct ferry_chat_opts o;
    char *text;
    ferry_chat_opts_init(&o);
    o.vars = var;
    o.n_vars = var != NULL;
    ck_assert_msg(ferry_chat_prompt(e, &msg, 1, &o, &text) == 0, "%s", ferry_error());
    ck_assert_str_eq(text, want);
    ck_assert(ferry_reply_begins_amid(e, text) == amid);
    ck_assert_int_eq(ferry_thought_of(e, text), thought); /* templates that say which leave no choice */
    ferry_free(text);
}

START_TEST(variable_of_the_template_is_lost)
{
    struct ferry_engine *e = open_thinker();
    must_lay_out(e, NULL, "<|start|>user\nhi<|end|>\n<|start|>assistant\n<think>\n", true);
    must_lay_out(e, &(struct ferry_var){"enable_thinking", FERRY_VAR_BOOL, NULL, 0},
                 "<|start|>user\nhi<|end|>\n<|start|>assistant\n<think>\n\n</think>\n\n", false);
    must_lay_out(e, &(struct ferry_var){"effort", FERRY_VAR_TEXT, "low", 0},
                 "effort low\n<|start|>user\nhi<|end|>\n<|start|>assistant\n<think>\n", true);
    must_lay_out(e, &(struct ferry_var){"effort", FERRY_VAR_INT, NULL, 9},
                 "effort 9\n<|start|>user\nhi<|end|>\n<|start|>assistant\n<think>\n", true);
    ferry_engine_close(e);
}
END_TEST

START_TEST(variable_that_changes_nothing_is_taken)
{
    static const struct {
        const char *name, *says;
    } bad[] = {{"enable_thinkin", "reads no variable \"enable_thinkin\""},
               {"", "reads no"},
               {"messages", "the conversation's own"},
               {"bos_token", "own"}};
    struct ferry_engine *e = open_thinker();
    struct ferry_message msg = {"user", "hi"};
    struct ferry_chat_opts o;
    char *text;
    ferry_chat_opts_init(&o);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct ferry_var var = {bad[i].name, FERRY_VAR_BOOL, NULL, 1};
        o.vars = &var;
        o.n_vars = 1;
        ck_assert_int_eq(ferry_chat_check(e, &o), FERRY_ERR_ARG);
        ck_assert_int_eq(ferry_chat_prompt(e, &msg, 1, &o, &text), FERRY_ERR_ARG);
        ck_assert_msg(strstr(ferry_error(), bad[i].says) != NULL, "%s", ferry_error());
        ck_assert_ptr_null(text);
    }
    o.struct_bytes++;
    ck_assert_int_eq(ferry_chat_check(e, &o), FERRY_ERR_ARG);
    ferry_engine_close(e);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("chat");
    TCase *t = tcase_create("chat");
    tcase_add_test(t, answer_in_channels_goes_back_whole);
    tcase_add_test(t, answer_is_not_told_from_thoughts);
    tcase_add_test(t, variable_of_the_template_is_lost);
    tcase_add_test(t, variable_that_changes_nothing_is_taken);
    suite_add_tcase(suite, t);
    return run_suite(suite);
}
