/* Options, as a user types them; a small table of subcommands stands for main.c's. */
#include "src/cli/conf.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "tests/run_suite.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

static const struct conf_command commands[] = {
    {"run", "answer", "MODEL", "About.", "ferry run m", 1, 1, NULL},
    {"chat", "talk", "MODEL", "About.", "ferry chat m", 1, 1, NULL},
    {"batch", "many", "MODEL", "About.", "ferry batch m", 1, 1, NULL},
    {"bench", "speed", "MODEL", "About.", "ferry bench m", 1, 1, NULL},
    {"eval", "logits", "MODEL", "About.", "ferry eval m", 1, 1, NULL},
    {"plan", "plan", "MODEL", "About.", "ferry plan m", 1, 1, NULL},
    {"probe", "measure", "[PATH]", "About.", "ferry probe", 0, 1, NULL},
    {"info", "facts", "MODEL", "About.", "ferry info m", 1, 1, NULL},
    {"tokenize", "ids", "MODEL", "About.", "ferry tokenize m", 1, 1, NULL},
    {"quantize", "smaller", "IN OUT TYPE", "About.", "ferry quantize m n Q8_0", 1, 3, NULL},
    {NULL, NULL, NULL, NULL, NULL, 0, 0, NULL},
};

static struct conf conf;
static enum conf_found found;
static const struct conf_command *command;

static int parse(const char *line)
{
    static char words[512];
    char *argv[32] = {"ferry"};
    int argc = 1;

    conf_done(&conf);
    snprintf(words, sizeof words, "%s", line);
    for (char *word = strtok(words, " "); word; word = strtok(NULL, " "))
        argv[argc++] = word;
    return conf_parse(commands, argc, argv, &conf, &found, &command);
}

START_TEST(values_reach_their_fields)
{
    ck_assert_int_eq(
        parse("run m.gguf -p hello --ram 1.5GiB --ctx=4096 -n7 --temp 0 --seed 18446744073709551615 --raw"), 0);
    ck_assert_int_eq(found, CONF_FOUND_COMMAND);
    ck_assert_str_eq(command->name, "run");
    ck_assert_str_eq(conf.model, "m.gguf");
    ck_assert_str_eq(conf.prompt, "hello");
    ck_assert_uint_eq(conf.ram_bytes, 1610612736u);
    ck_assert_uint_eq(conf.n_ctx, 4096);
    ck_assert_uint_eq(conf.n_tokens, 7);
    ck_assert_double_eq(conf.temperature, 0);
    ck_assert(conf.has_seed && conf.seed == UINT64_MAX);
    ck_assert(conf.raw && !conf.json);
}
END_TEST

START_TEST(defaults_stand_where_nothing_was_said)
{
    ck_assert_int_eq(parse("chat m"), 0);
    ck_assert_double_eq(conf.temperature, 0.8);
    ck_assert_int_eq(conf.top_k, 40);
    ck_assert_int_eq(conf.penalty_window, 64);
    ck_assert(!conf.has_seed);
    ck_assert_ptr_null(conf.kv_type);
    ck_assert_int_eq(parse("bench m"), 0);
    ck_assert_uint_eq(conf.bench_prompt, 512);
    ck_assert_uint_eq(conf.n_reps, 5);
    ck_assert_uint_eq(conf.bench_depth, 0);
    ck_assert_int_eq(parse("bench m -d 8192"), 0);
    ck_assert_uint_eq(conf.bench_depth, 8192);
}
END_TEST

START_TEST(one_letter_means_what_its_subcommand_says)
{
    ck_assert_int_eq(parse("bench m -p 16 -n 0"), 0);
    ck_assert_uint_eq(conf.bench_prompt, 16);
    ck_assert_uint_eq(conf.bench_generate, 0);
    ck_assert_ptr_null(conf.prompt);
    ck_assert_int_eq(parse("eval m --tokens 1,2 --prefill 1"), 0);
    ck_assert(conf.has_n_prefill && conf.n_prefill == 1);
    ck_assert_int_eq(parse("run m --prefill blas"), 0);
    ck_assert_str_eq(conf.prefill, "blas");
}
END_TEST

START_TEST(words_after_two_hyphens_are_no_options)
{
    ck_assert_int_eq(parse("run -- -n"), 0);
    ck_assert_str_eq(conf.model, "-n");
    ck_assert_int_eq(parse("run m -f -"), 0);
    ck_assert_str_eq(conf.file, "-");
    ck_assert_int_eq(parse("run m -p --raw"), 0);
    ck_assert_str_eq(conf.prompt, "--raw");
}
END_TEST

static const struct {
    const char *line, *says;
} wrong[] = {
    {"", "which subcommand"},
    {"rnu m", "did you mean \"run\""},
    {"wibble m", "no subcommand \"wibble\""},
    {"--ram 3G", "no option --ram"},
    {"run", "wants a model"},
    {"run a b", "\"b\" is one word too many"},
    {"run m --rma 3G", "did you mean --ram?"},
    {"run m --gpu-rate 3G", "no option --gpu-rate"},
    {"run m --tensors", "no option --tensors"},
    {"run m -x", "no option -x"},
    {"run m --ram", "--ram wants a value: SIZE"},
    {"run m --ram=", "is not a size"},
    {"run m --ram 3Q", "--ram"},
    {"run m --ctx 0", "0 is outside 1 to"},
    {"run m --ctx 1e3", "not a whole number"},
    {"run m --ctx 99999999999999999999", "not a whole number"},
    {"run m --temp hot", "not a number"},
    {"run m --temp nan", "not a number"},
    {"run m --top-p 1.5", "outside 0 to 1"},
    {"run m --kv-type f32", "none of f16|q8_0"},
    {"run m --seed -1", "whole number from 0"},
    {"run m --raw=yes", "takes no value"},
    {"run m --template-var thinking", "--template-var: \"thinking\" is not NAME=VALUE"},
    {"run m --template-var 5x=1", "is not NAME=VALUE"},
    {"run m --template-var a-b=1", "is not NAME=VALUE"},
    {"run m --template-var =1", "is not NAME=VALUE"},
    {"plan m --mem-rate fast", "is not a rate"},
    {"plan m --mem-rate 3G/h", "ends in"},
    {"help wibble", "no subcommand"},
};

START_TEST(wrong_usage_names_the_word)
{
    ck_assert_int_eq(parse(wrong[_i].line), ERR_ARG);
    ck_assert_msg(strstr(err_text(), wrong[_i].says) != NULL, "\"%s\" says \"%s\"", wrong[_i].line, err_text());
}
END_TEST

START_TEST(rates_are_powers_of_1000)
{
    double rate = 0;

    ck_assert_int_eq(conf_rate("60G/s", &rate), 0);
    ck_assert_double_eq(rate, 60e9);
    ck_assert_int_eq(conf_rate("3.5GB/s", &rate), 0);
    ck_assert_double_eq(rate, 3.5e9);
    ck_assert_int_eq(conf_rate("900M", &rate), 0);
    ck_assert_double_eq(rate, 900e6);
    ck_assert_int_eq(conf_rate("2GiB/s", &rate), 0);
    ck_assert_double_eq(rate, 2147483648.0);
    ck_assert_int_eq(conf_rate("0", &rate), ERR_ARG);
    ck_assert_int_eq(conf_rate("-1G", &rate), ERR_ARG);
    ck_assert_int_eq(conf_rate("1e999G", &rate), ERR_ARG);
    ck_assert_double_eq(rate, 2147483648.0);
}
END_TEST

START_TEST(variables_are_what_they_look_like)
{
    static const struct ferry_var want[] = {
        {"a", FERRY_VAR_BOOL, NULL, 0},    {"b", FERRY_VAR_INT, NULL, -3},
        {"c_1", FERRY_VAR_TEXT, "x=y", 0}, {"D", FERRY_VAR_TEXT, "", 0},
        {"e", FERRY_VAR_TEXT, "3.5", 0},   {"f", FERRY_VAR_TEXT, "99999999999999999999", 0}};
    ck_assert_int_eq(parse("batch m --template-var a=true --template-var b=-3 --template-var=c_1=x=y --template-var D= "
                           "--template-var e=3.5 --template-var f=99999999999999999999 --template-var a=false"),
                     0);
    ck_assert_uint_eq(conf.vars.n, sizeof want / sizeof *want);
    for (size_t i = 0; i < conf.vars.n; i++) {
        ck_assert_str_eq(conf.vars.v[i].name, want[i].name);
        ck_assert_int_eq(conf.vars.v[i].kind, want[i].kind);
        if (want[i].kind == FERRY_VAR_TEXT)
            ck_assert_str_eq(conf.vars.v[i].text, want[i].text);
        else
            ck_assert_int_eq(conf.vars.v[i].number, want[i].number);
    }
}
END_TEST

START_TEST(too_many_variables_are_refused)
{
    struct vars vars = {0};
    char name[] = "a";

    for (int i = 0; i < VARS_MAX; i++, name[0]++)
        ck_assert_int_eq(vars_put(&vars, &(struct ferry_var){.name = name, .kind = FERRY_VAR_INT}), 0);
    ck_assert_int_eq(vars_put(&vars, &(struct ferry_var){.name = name, .kind = FERRY_VAR_INT}), ERR_LIMIT);
    ck_assert_int_eq(vars_read(&vars, "a=again"), 0); /* in place of the first */
    ck_assert_uint_eq(vars.n, VARS_MAX);
    ck_assert_str_eq(vars.v[0].text, "again");
    vars_done(&vars);
}
END_TEST

START_TEST(help_is_found_wherever_it_stands)
{
    ck_assert_int_eq(parse("--help"), 0);
    ck_assert_int_eq(found, CONF_FOUND_HELP);
    ck_assert_ptr_null(command);
    ck_assert_int_eq(parse("run --ctx 5 --help"), 0);
    ck_assert_int_eq(found, CONF_FOUND_HELP);
    ck_assert_str_eq(command->name, "run");
    ck_assert_int_eq(parse("help plan"), 0);
    ck_assert_str_eq(command->name, "plan");
}
END_TEST

START_TEST(folders_follow_the_environment)
{
    setenv("HOME", "/home/u", 1);
    setenv("XDG_CACHE_HOME", "/c", 1);
    unsetenv("XDG_STATE_HOME");
    ck_assert_int_eq(parse("run m"), 0);
    ck_assert_str_eq(conf.cache_dir, "/c/ferry");
    ck_assert_str_eq(conf.state_dir, "/home/u/.local/state/ferry");
    setenv("XDG_CACHE_HOME", "relative", 1);
    ck_assert_int_eq(parse("run m"), 0);
    ck_assert_str_eq(conf.cache_dir, "/home/u/.cache/ferry");
    unsetenv("HOME");
    ck_assert_int_eq(parse("run m"), 0);
    ck_assert_ptr_null(conf.cache_dir);
    ck_assert_ptr_null(conf.state_dir);
}
END_TEST

START_TEST(no_memory_leaks_nothing)
{
    setenv("HOME", "/home/u", 1);
    conf_done(&conf);
    uint64_t live_bytes = mem_live_bytes(MEM_OTHER);
    for (uint64_t n = 1; n <= 4; n++) { /* two folders, a name, a value */
        mem_fail_nth(n);
        ck_assert_int_eq(parse("run m --template-var a=b"), ERR_NOMEM);
        conf_done(&conf);
        ck_assert_uint_eq(mem_live_bytes(MEM_OTHER), live_bytes);
    }
    mem_fail_nth(0);
    ck_assert_int_eq(parse("run m --template-var a=b"), 0);
}
END_TEST

static bool is_command(const char *name, size_t n)
{
    for (const struct conf_command *c = commands; c->name; c++) {
        if (strlen(c->name) == n && !memcmp(c->name, name, n))
            return true;
    }
    return false;
}

START_TEST(words_reach_their_fields)
{
    ck_assert_int_eq(parse("quantize a --threads 2 b Q8_0"), 0);
    ck_assert_str_eq(conf.model, "a");
    ck_assert_str_eq(conf.words[0], "b");
    ck_assert_str_eq(conf.words[1], "Q8_0");
    ck_assert_int_eq(parse("quantize a"), 0);
    ck_assert_ptr_null(conf.words[0]);
    ck_assert_int_eq(parse("quantize a b c d"), ERR_ARG);
}
END_TEST

START_TEST(every_row_of_the_table_is_whole_and_known_once)
{
    for (const struct conf_option *o = conf_options; o->name; o++) {
        ck_assert(o->help && o->help[0]);
        ck_assert_msg(!o->value == (o->kind == CONF_FLAG), "--%s: value name", o->name);
        ck_assert_msg(!o->choices == (o->kind != CONF_CHOICE), "--%s: choices", o->name);
        ck_assert_msg(o->preset == NULL || o->shown != NULL, "--%s: a default that help hides", o->name);
        for (const char *p = o->commands; *p; p += strcspn(p, " "), p += strspn(p, " "))
            ck_assert_msg(is_command(p, strcspn(p, " ")), "--%s names \"%s\"", o->name, p);
        for (const struct conf_option *q = o + 1; q->name; q++) {
            for (const struct conf_command *c = commands; c->name; c++) {
                if (!conf_takes(o, c->name) || !conf_takes(q, c->name))
                    continue;
                ck_assert_msg(strcmp(o->name, q->name), "ferry %s has --%s twice", c->name, o->name);
                ck_assert_msg(!o->letter || o->letter != q->letter, "ferry %s has -%c twice", c->name, o->letter);
            }
        }
    }
}
END_TEST

START_TEST(help_fits_the_screen)
{
    char *text = NULL;
    size_t n_bytes = 0, n_lines = 0;

    FILE *out = open_memstream(&text, &n_bytes);
    conf_help(out, commands);
    fflush(out);
    for (const char *p = text; *p; p += strcspn(p, "\n"), p += *p == '\n', n_lines++)
        ck_assert_uint_le(strcspn(p, "\n"), 80);
    ck_assert_uint_le(n_lines, 23);
    rewind(out);
    for (const struct conf_command *c = commands; c->name; c++)
        conf_help_command(out, c);
    fclose(out);
    for (const char *p = text; *p; p += strcspn(p, "\n"), p += *p == '\n')
        ck_assert_msg(strcspn(p, "\n") <= 80, "%.100s", p);
    for (const struct conf_option *o = conf_options; o->name; o++)
        ck_assert_msg(strstr(text, o->name) != NULL, "help hides --%s", o->name);
    free(text);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("conf");
    TCase *t = tcase_create("conf");

    tcase_add_test(t, values_reach_their_fields);
    tcase_add_test(t, defaults_stand_where_nothing_was_said);
    tcase_add_test(t, one_letter_means_what_its_subcommand_says);
    tcase_add_test(t, words_after_two_hyphens_are_no_options);
    tcase_add_loop_test(t, wrong_usage_names_the_word, 0, (int)(sizeof wrong / sizeof *wrong));
    tcase_add_test(t, rates_are_powers_of_1000);
    tcase_add_test(t, variables_are_what_they_look_like);
    tcase_add_test(t, too_many_variables_are_refused);
    tcase_add_test(t, help_is_found_wherever_it_stands);
    tcase_add_test(t, folders_follow_the_environment);
    tcase_add_test(t, no_memory_leaks_nothing);
    tcase_add_test(t, words_reach_their_fields);
    tcase_add_test(t, every_row_of_the_table_is_whole_and_known_once);
    tcase_add_test(t, help_fits_the_screen);
    suite_add_tcase(s, t);
    return run_suite(s);
}
