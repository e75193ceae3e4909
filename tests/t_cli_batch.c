/* ferry batch as its users meet it: requests in, records out, and the same command again after whatever ended the run. The model
 * is tests/data/cli/tiny.gguf, which says nonsense. */
#include "tests/profile_maker.h"
#include "tests/run_suite.h"

#include <check.h>
#include <jansson.h>
#include <math.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_OUT = 1 << 20, N_LINES = 120 };

static char folder[] = TEST_BUILD_DIR "/t_cli_batch-XXXXXX";
static char out[MAX_OUT], errors[MAX_OUT];

static void write_input(void)
{
    char path[512];
    snprintf(path, sizeof path, "%s/in", folder);
    FILE *f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    for (int i = 0; i < N_LINES; i++) {
        if (i % 10 == 3)
            fprintf(f,
                    "{\"custom_id\":\"c%d\",\"method\":\"POST\",\"url\":\"/v1/"
                    "completions\",\"body\":{\"prompt\":\"word %d\","
                    "\"max_tokens\":%d,\"n\":2}}\n",
                    i, i, 5 + i % 30);
        else if (i % 10 == 7)
            fprintf(f, "{\"id\":%d,\"messages\":[{\"role\":\"user\",\"content\":\"say %d\"}],\"n\":3,\"seed\":%d}\n", i,
                    i, i);
        else if (i == 50)
            fprintf(f, "no json\n\n");
        else
            fprintf(f, "{\"id\":\"l%d\",\"prompt\":\"a tale of %d\",\"max_tokens\":%d,\"ignore_eos\":true}\n", i, i,
                    10 + i);
    }
    fclose(f);
}

static void setup(void)
{
    ck_assert_ptr_nonnull(mkdtemp(folder));
    setenv("XDG_CACHE_HOME", folder, 1);
    setenv("T", folder, 1);
    setenv("M", TEST_DATA_DIR "/cli/tiny.gguf", 1);
    write_input();
}

static void teardown(void)
{
    char line[512];
    snprintf(line, sizeof line, "rm -rf '%s'", folder);
    ck_assert_int_eq(system(line), 0);
}

static void read_all(const char *name, char *into)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "rb");
    ck_assert_msg(f != NULL, "no %s", path);
    size_t n = fread(into, 1, MAX_OUT - 1, f);
    into[n] = '\0';
    fclose(f);
}

/* For the shell: $B runs the program on the input. */
#define PROGRAM "F='" TEST_BUILD_DIR "/ferry'; B=\"$F batch $M -i $T/in --ctx 256 -n 60 --threads 1 --no-pin\"; "

/* A shell line with $B in it; the exit status. */
static int run(const char *line)
{
    char full[2048];
    snprintf(full, sizeof full, PROGRAM "{ %s ; } >'%s/out' 2>'%s/err'", line, folder, folder);
    int status = system(full);
    read_all("out", out);
    read_all("err", errors);
    ck_assert_msg(status != -1 && WIFEXITED(status), "%s: %s", line, errors);
    return WEXITSTATUS(status);
}

static void must_run(const char *line)
{
    int status = run(line);
    ck_assert_msg(status == 0, "%s: exit %d: %s", line, status, errors);
}

static bool says(const char *text, const char *words)
{
    if (strstr(text, words))
        return true;
    fprintf(stderr, "no \"%s\" in: %.2000s\n", words, text);
    return false;
}

/* What two runs must have in common: records without "stats", in the order of the file or sorted. */
static void must_equal(const char *a, const char *b, bool sorted)
{
    char line[512];
    for (int i = 0; i < 2; i++) {
        snprintf(line, sizeof line, "sed 's/,\"stats\":.*//' $T/%s %s >$T/bare%d", i ? b : a, sorted ? "| sort" : "",
                 i);
        must_run(line);
    }
    ck_assert_msg(run("cmp $T/bare0 $T/bare1 && wc -l <$T/bare0") == 0, "%s and %s differ: %s%s", a, b, out, errors);
    ck_assert_int_eq(atoi(out), 12 + 12 * 3 + (N_LINES - 24)); /* an OpenAI line is one record, "n" 3 are three */
}

/* ---- forms ---- */

static json_t *record(const char *name, int n)
{
    static char text[MAX_OUT];
    read_all(name, text);
    char *p = text;
    for (; n > 0; n--)
        p += strcspn(p, "\n") + 1;
    p[strcspn(p, "\n")] = '\0';
    json_t *o = json_loads(p, 0, NULL);
    ck_assert_msg(o != NULL, "record is not JSON: %s", p);
    return o;
}

static const char *text_at(const json_t *o, const char *path)
{
    char part[64];
    while (*path) {
        size_t n = strcspn(path, ".");
        snprintf(part, sizeof part, "%.*s", (int)n, path);
        o = json_is_array(o) ? json_array_get(o, (size_t)atoi(part)) : json_object_get(o, part);
        path += n + (path[n] == '.');
    }
    ck_assert_msg(json_is_string(o), "no text at %s", path);
    return json_string_value(o);
}

/* Every line by itself, in short and in OpenAI's form, is what ferry run says. */
START_TEST(answer_is_not_that_of_run)
{
    must_run(
        "printf '%s\\n' '{\"id\":1,\"prompt\":\"hello\",\"seed\":3}' '{\"id\":2,\"messages\":[{\"role\":\"system\","
        "\"content\":\"be\"},{\"role\":\"user\",\"content\":\"hi\"}],\"seed\":9,\"temperature\":1.5}' "
        "'{\"custom_id\":\"x\",\"body\":{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":"
        "\"hi\"}]}],\"temperature\":0}}' >$T/in; $B -o $T/o --order input");
    static const char *const alone[] = {"$F run $M --ctx 256 -n 60 -q --raw -p hello --seed 3",
                                        "$F run $M --ctx 256 -n 60 -q --system be -p hi --seed 9 --temp 1.5",
                                        "$F run $M --ctx 256 -n 60 -q -p hi --temp 0"};
    static const char *const where[] = {"text", "text", "response.body.choices.0.message.content"};
    for (int i = 0; i < 3; i++) {
        must_run(alone[i]);
        out[strlen(out) - 1] = '\0'; /* the line end that run adds */
        json_t *o = record("o", i);
        ck_assert_str_eq(text_at(o, where[i]), out);
        json_decref(o);
    }
}
END_TEST

static const struct {
    const char *line, *says;
} bad[] = {
    {"nonsense", "not JSON"},
    {"[1]", "not a JSON object"},
    {"{\"id\":1}", "one of \\\"prompt\\\" and \\\"messages\\\""},
    {"{\"id\":1,\"prompt\":\"a\",\"messages\":[]}", "one of"},
    {"{\"id\":[],\"prompt\":\"a\"}", "\\\"id\\\" has to be"},
    {"{\"prompt\":\"a\",\"temprature\":1}", "\\\"temprature\\\" is not supported"},
    {"{\"prompt\":\"a\",\"temperature\":-1}", "from 0 to 100"},
    {"{\"prompt\":\"a\",\"n\":65}", "whole number from 1 to 64"},
    {"{\"prompt\":\"a\",\"max_tokens\":0}", "from 1"},
    {"{\"prompt\":\"a\",\"stop\":[\"\"]}", "none empty"},
    {"{\"prompt\":\"\"}", "the prompt is empty"},
    {"{\"prompt\":[1,2,999]}", "vocabulary of 260"},
    {"{\"prompt\":[1,\"a\"]}", "list of token ids"},
    {"{\"prompt\":\"a\",\"completion\":\"b\"}", "--score"},
    {"{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\"}]}]}", "no text"},
    {"{\"messages\":[{\"content\":\"x\"}]}", "no \\\"role\\\""},
    {"{\"custom_id\":\"a\",\"body\":{\"prompt\":\"x\",\"tools\":[]}}", "\\\"tools\\\" is not supported"},
    {"{\"custom_id\":\"a\",\"url\":\"/v1/embeddings\",\"body\":{\"prompt\":\"x\"}}", "/v1/completions"},
    {"{\"custom_id\":7,\"body\":{\"prompt\":\"x\"}}", "custom_id"},
};

START_TEST(bad_line_stops_the_run_or_is_passed_over)
{
    char line[1024];
    snprintf(line, sizeof line, "printf '%%s\\n' '' '%s' '{\"prompt\":\"b\"}' >$T/in; $B -o $T/o", bad[_i].line);
    must_run(line);
    read_all("o", out);
    ck_assert(says(out, bad[_i].says));
    ck_assert(says(out, "\"line\":2"));
    ck_assert(says(out, "{\"id\":3,\"index\":0,\"text\":"));
    ck_assert(says(errors, "1 failed"));
}
END_TEST

START_TEST(options_of_a_line_are_lost)
{
    must_run("$F run $M --ctx 256 -n 60 -q --raw -p hello --temp 0");
    const char *at = out; /* two letters that JSON and the shell take as they are */
    while (!(strspn(at, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789") >= 2))
        ck_assert_msg(*at++ != '\0', "no two letters in %s", out);
    char piece[3] = {at[0], at[1], '\0'};
    setenv("PIECE", piece, 1);
    must_run(
        "printf '%s\\n' '{\"prompt\":\"hello\",\"temperature\":0,\"stop\":\"'\"$PIECE\"'\"}' "
        "'{\"prompt\":\"hello\",\"temperature\":0,\"max_tokens\":4,\"logprobs\":2}' >$T/in; $B -o $T/o --order input");
    json_t *o = record("o", 0);
    ck_assert_ptr_null(strstr(text_at(o, "text"), piece));
    ck_assert_str_eq(text_at(o, "finish_reason"), "stop");
    json_decref(o);
    o = record("o", 1);
    ck_assert_str_eq(text_at(o, "finish_reason"), "length");
    const json_t *content = json_object_get(json_object_get(o, "logprobs"), "content");
    ck_assert_uint_eq(json_array_size(content), 4);
    for (size_t i = 0; i < 4; i++) { /* greedy: the token is the best one, and says so */
        const json_t *one = json_array_get(content, i), *top = json_object_get(one, "top_logprobs");
        ck_assert_uint_eq(json_array_size(top), 2);
        ck_assert(json_equal(json_object_get(one, "id"), json_object_get(json_array_get(top, 0), "id")));
        ck_assert(json_number_value(json_object_get(one, "logprob")) >=
                  json_number_value(json_object_get(json_array_get(top, 1), "logprob")));
        ck_assert(json_number_value(json_object_get(one, "logprob")) < 0);
    }
    json_decref(o);
}
END_TEST

/* Member of an object in an object, as a text; NULL: none. */
static const char *text_in(const json_t *o, const char *member, const char *name)
{
    return json_string_value(json_object_get(json_object_get(o, member), name));
}

START_TEST(thoughts_are_part_of_the_answer)
{
    static const char *const said[] = {"response.body.choices.0.message.content", "text"};
    must_run("printf '%s\\n' "
             "'{\"custom_id\":\"a\",\"body\":{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}}' "
             "'{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}' "
             "'{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"chat_template_kwargs\":{\"enable_thinking\":"
             "false}}' "
             "'{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"chat_template_kwargs\":{\"effort\":[]}}' "
             "'{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"chat_template_kwargs\":[]}' "
             "'{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"reasoning_effort\":\"low\"}' "
             "'{\"prompt\":\"hi\",\"chat_template_kwargs\":{\"effort\":1}}' >$T/in; "
             "$F batch " TEST_DATA_DIR "/cli/thinks.gguf -i $T/in -o $T/o --order input -n 4 --temp 0 -q");
    for (int i = 0; i < 2; i++) { /* cut while it thought */
        json_t *o = record("o", i);
        const json_t *at =
            i ? o
              : json_object_get(
                    json_array_get(json_object_get(json_object_get(json_object_get(o, "response"), "body"), "choices"),
                                   0),
                    "message");
        ck_assert_str_eq(text_at(o, said[i]), "");
        ck_assert_uint_gt(json_string_length(json_object_get(at, "reasoning_content")), 0);
        json_decref(o);
    }
    json_t *o = record("o", 2);
    ck_assert_uint_gt(strlen(text_at(o, "text")), 0);
    ck_assert_ptr_null(json_object_get(o, "reasoning_content"));
    json_decref(o);
    static const char *const errors_of[] = {"\"effort\" of the chat template has to be", "has to be an object",
                                            "reads no variable \"reasoning_effort\"",
                                            "\"effort\" is for the chat template"};
    for (int i = 0; i < 4; i++) {
        o = record("o", 3 + i);
        const char *text = text_in(o, "error", "message");
        ck_assert_msg(text && strstr(text, errors_of[i]), "%s", text ? text : "no error");
        json_decref(o);
    }
    /* An option is for all, and part of what a run is known by. */
    must_run("printf '%s\\n' '{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}' >$T/in; "
             "$F batch " TEST_DATA_DIR
             "/cli/thinks.gguf -i $T/in -o $T/p --template-var enable_thinking=false -n 4 --temp 0 -q");
    json_t *all = record("p", 0), *one = record("o", 2);
    ck_assert_str_eq(text_at(all, "text"), text_at(one, "text"));
    json_decref(all);
    json_decref(one);
    ck_assert_int_eq(run("$F batch " TEST_DATA_DIR "/cli/thinks.gguf -i $T/in -o $T/p -n 4 --temp 0 -q"), 1);
    ck_assert(says(errors, "template-var was {\"enable_thinking\":false}, is {}"));
    ck_assert_int_eq(run("$F batch " TEST_DATA_DIR "/cli/thinks.gguf -i $T/in -o $T/q --template-var nothing=1"), 1);
    ck_assert(says(errors, "reads no variable \"nothing\""));
}
END_TEST

/* ---- ends and beginnings ---- */

static off_t output_bytes(void)
{
    char path[512];
    struct stat st;
    snprintf(path, sizeof path, "%s/o", folder);
    return stat(path, &st) == 0 ? st.st_size : 0;
}

/* Run the program again and again until it ends by itself: the nth run is killed as soon as it has written n hundred bytes, which is more
 * than a record before long, and each fourth at some time from its beginning on. By bytes, because a slow machine would never come as far
 * as a time wants. How many were killed. */
static int killed_runs(const char *options)
{
    char line[512];
    int n = 0, status = 0;
    snprintf(line, sizeof line, PROGRAM "exec $B -o $T/o %s 2>'%s/err'", options, folder);
    for (;; n++) {
        off_t enough_bytes = output_bytes() + 100 * n;
        pid_t pid = fork();
        ck_assert_int_ge(pid, 0);
        if (pid == 0) {
            execl("/bin/sh", "sh", "-c", line, (char *)NULL);
            _exit(127);
        }
        siginfo_t end = {.si_pid = 0};
        if (n % 4 == 0)
            usleep((useconds_t)n * 1000);
        else
            while (end.si_pid == 0 && output_bytes() < enough_bytes)
                waitid(P_PID, (id_t)pid, &end, WEXITED | WNOHANG | WNOWAIT);
        kill(pid, SIGKILL);
        ck_assert_int_eq(waitpid(pid, &status, 0), pid); /* only then its lock on the output is surely gone */
        if (WIFEXITED(status))
            break;
    }
    read_all("err", errors);
    ck_assert_msg(WEXITSTATUS(status) == 0, "after %d killed ones: %s", n, errors);
    return n;
}

START_TEST(killed_run_loses_or_doubles_answers)
{
    const char *order = _i ? "input" : "finished";
    char line[512];
    snprintf(line, sizeof line, "$B -o $T/whole --order %s -s 7", order);
    must_run(line);
    snprintf(line, sizeof line, "--order %s -s 5", order);
    ck_assert_int_gt(killed_runs(line), 0);
    must_equal("whole", "o", _i == 0);
    must_run("$B -o $T/o -s 5 --order input || $B -o $T/o -s 5");
    must_equal("whole", "o", _i == 0);
}
END_TEST

START_TEST(torn_end_or_rubbish_is_kept)
{
    must_run(
        "$B -o $T/whole; $B -o $T/o; head -c -40 $T/o >$T/o2; printf '\\0\\0\\0' >>$T/o2; cp $T/o.ferry $T/o2.ferry; "
        "$B -o $T/o2");
    ck_assert(says(errors, "torn end"));
    must_equal("whole", "o2", true);
}
END_TEST

START_TEST(full_disk_loses_answers)
{
    const char *order = _i ? "input" : "finished";
    char line[512];
    must_run("$B -o $T/whole --order input");
    snprintf(line, sizeof line, "trap '' XFSZ; ulimit -f 12; $B -o $T/o --order %s", order);
    ck_assert_int_eq(run(line), 1);
    ck_assert(says(errors, "File too large"));
    snprintf(line, sizeof line, "$B -o $T/o --order %s", order);
    must_run(line);
    must_equal("whole", "o", _i == 0);
}
END_TEST

START_TEST(another_run_is_taken_for_this_one)
{
    must_run("$B -o $T/o; cp $T/o $T/first");
    ck_assert_int_eq(run("$B -o $T/o --temp 0.1"), 1);
    ck_assert(says(errors, "temp was 0.8"));
    ck_assert_int_eq(run("$B -o $T/o -n 61"), 1);
    ck_assert(says(errors, "max-tokens was 60, is 61"));
    ck_assert_int_eq(run("cp $M $T/m.gguf; $F batch $T/m.gguf -i $T/in -o $T/o --ctx 256 -n 60"), 1);
    ck_assert(says(errors, "another model"));
    ck_assert_int_eq(run("echo '{\"prompt\":\"more\"}' >>$T/in; $B -o $T/o"), 1);
    ck_assert(says(errors, "another input"));
    must_run("cmp $T/o $T/first");
    must_run("$B -o $T/o --accept-changes"); /* the new line only */
    must_run("head -c $(wc -c <$T/first) $T/o | cmp - $T/first; tail -n 1 $T/o");
    ck_assert(says(out, "\"line\":122"));
    must_run("$B -o $T/o");
    must_run("$B -o $T/o --temp 0.1 --restart; wc -l <$T/o");
    ck_assert_int_eq(atoi(out), 145);
    ck_assert_int_eq(run("echo mine >$T/p; $B -o $T/p"), 1);
    ck_assert(says(errors, "--restart"));
    must_run("cat $T/p");
    ck_assert_str_eq(out, "mine\n");
    for (int i = 0; i < 2; i++) /* every digit of an option comes back */
        must_run("$B -o $T/q --temp 0.12345678912345678 --top-p 0.98765432198765432");
    /* What a saved plan says differs, too. */
    must_run("$F plan $M --ctx 256 --threads 1 --no-pin --save $T/p.json; sed -i 's/\"kv_type\": "
             "*\"f16\"/\"kv_type\":\"q8_0\"/;"
             "s/\"sessions\"/\"kv_tok\":512,&/' $T/p.json");
    ck_assert_int_eq(run("$B -o $T/q --temp 0.12345678912345678 --top-p 0.98765432198765432 --plan $T/p.json"), 1);
    ck_assert(says(errors, "kv-type was \"f16\", is \"q8_0\""));
}
END_TEST

/* What an answer of a record says; the place of a member of the short or the OpenAI form. */
static void must_say(int i, const char *at, const char *want)
{
    json_t *o = record("o", i);
    const char *text = text_at(o, at);
    ck_assert_msg(text && !strcmp(text, want), "record %d: %s", i, text ? text : "no such text");
    json_decref(o);
}

START_TEST(grammar_of_a_request_is_lost_or_taken_for_another)
{
    static const char content[] = "response.body.choices.0.message.content";
    static const char *const errors_of[] = {"\"response_format\" has to have a \"type\"",
                                            "has no \"json_schema\"",
                                            "only one can be there",
                                            "\"multipleOf\" is not supported",
                                            "line 1, column 1: a rule's name",
                                            "\"grammar\" has to be a text"};
    must_run(
        "printf '%s\\n' "
        "'{\"prompt\":\"x\",\"grammar\":\"root ::= \\\"ab\\\" | \\\"abc\\\" [d]{3}\"}' "
        "'{\"prompt\":\"x\",\"json_schema\":{\"const\":[1,\"é\"]}}' "
        "'{\"custom_id\":\"c\",\"body\":{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"response_format\":"
        "{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"n\",\"strict\":true,\"schema\":{\"enum\":[true]}}}}}' "
        "'{\"prompt\":\"x\",\"response_format\":{\"type\":\"json_object\"},\"max_tokens\":1}' "
        "'{\"prompt\":\"x\",\"response_format\":{\"type\":\"text\"},\"max_tokens\":3,\"temperature\":0}' "
        "'{\"prompt\":\"x\",\"max_tokens\":3,\"temperature\":0}' "
        "'{\"prompt\":\"x\",\"response_format\":{}}' "
        "'{\"prompt\":\"x\",\"response_format\":{\"type\":\"json_schema\"}}' "
        "'{\"prompt\":\"x\",\"json_schema\":{},\"response_format\":{\"type\":\"text\"}}' "
        "'{\"prompt\":\"x\",\"json_schema\":{\"multipleOf\":2}}' "
        "'{\"prompt\":\"x\",\"grammar\":\"::=\"}' "
        "'{\"prompt\":\"x\",\"grammar\":1}' >$T/in; "
        "printf 'root ::= \"no\"' >$T/no.gbnf; "
        "$B -o $T/o --order input -q --ctx 64 && $B -o $T/p --order input -q --ctx 64 --grammar $T/no.gbnf");
    json_t *o = record("o", 0);
    ck_assert(!strcmp(text_at(o, "text"), "ab") || !strcmp(text_at(o, "text"), "abcddd"));
    ck_assert_str_eq(text_at(o, "finish_reason"), "stop");
    json_decref(o);
    o = record("o", 1);
    json_t *said = json_loads(text_at(o, "text"), 0, NULL), *want = json_loads("[1,\"é\"]", 0, NULL);
    ck_assert(said && json_equal(said, want));
    json_decref(want);
    json_decref(said);
    json_decref(o);
    must_say(2, content, "true");
    must_say(3, "text", "{");
    must_say(3, "finish_reason", "length");
    json_t *free_one = record("o", 4), *other = record("o", 5);
    ck_assert_str_eq(text_at(free_one, "text"), text_at(other, "text"));
    json_decref(other);
    /* With a grammar for all, only requests without a wish of their own follow it. */
    other = record("p", 4);
    ck_assert_str_eq(text_at(free_one, "text"), text_at(other, "text"));
    json_decref(other);
    other = record("p", 5);
    ck_assert_str_eq(text_at(other, "text"), "no");
    json_decref(other);
    json_decref(free_one);
    for (int i = 0; i < 6; i++) {
        o = record("o", 6 + i);
        const char *text = text_in(o, "error", "message");
        ck_assert_msg(text && strstr(text, errors_of[i]), "%s", text ? text : "no error");
        json_decref(o);
    }
    /* What the grammar says is part of what a run is known by. */
    must_run("$B -o $T/p --order input -q --ctx 64 --grammar $T/no.gbnf");
    ck_assert_int_eq(
        run("printf 'root ::= \"yes\"' >$T/no.gbnf; $B -o $T/p --order input -q --ctx 64 --grammar $T/no.gbnf"), 1);
    ck_assert(says(errors, "grammar was \"root ::= \\\"no\\\"\", is \"root ::= \\\"yes\\\"\""));
    ck_assert_int_eq(run("$B -o $T/p --order input -q --ctx 64"), 1);
    ck_assert(says(errors, "is null"));
    ck_assert_int_eq(run("echo '{\"minimum\":true}' >$T/s; $B -o $T/r -q --ctx 64 --json-schema $T/s"), 1);
    ck_assert(says(errors, "\"minimum\" has to be a number"));
    ck_assert_int_eq(run("$B -o $T/r -q --json-schema $T/s --grammar $T/no.gbnf"), 2);
    ck_assert_int_eq(run("$B -o $T/r -q --score --grammar $T/no.gbnf"), 2);
    ck_assert_int_eq(run("$B -o $T/r -q --grammar $T/nowhere"), 1);
    ck_assert(says(errors, "nowhere"));
}
END_TEST

/* A schema where it does not belong is no wish for any object. */
START_TEST(schema_beside_json_object_is_passed_over)
{
    must_run(
        "echo '{\"prompt\":\"x\",\"response_format\":{\"type\":\"json_object\",\"schema\":{\"const\":1}}}' >$T/in; "
        "$B -o $T/o -q --ctx 64");
    json_t *o = record("o", 0);
    ck_assert_str_eq(text_at(o, "error.message"), "\"schema\" in \"response_format\" is not supported");
    json_decref(o);
}
END_TEST

/* Cut amid a character it is no UTF-8, which JSON is. */
START_TEST(name_in_a_message_takes_the_message_along)
{
    must_run("k=$(printf 'x'; for i in $(seq 40); do printf 'é'; done); "
             "printf '%s\n' '{\"prompt\":\"x\",\"'$k'\":1}' '{\"prompt\":\"x\",\"json_schema\":{\"'$k'\":1}}' >$T/in; "
             "$B -o $T/o --order input -q --ctx 64");
    for (int i = 0; i < 2; i++) {
        json_t *o = record("o", i);
        ck_assert_msg(says(text_at(o, "error.message"), "\"x????"), "record %d", i);
        ck_assert_msg(says(text_at(o, "error.message"), "\" is not supported"), "record %d", i);
        json_decref(o);
    }
}
END_TEST

/* A thought before it is free, and kept apart; what follows is by the schema. */
START_TEST(thought_is_held_against_the_schema)
{
    must_run("printf '%s\\n' "
             "'{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"max_tokens\":40}' "
             "'{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"chat_template_kwargs\":{\"enable_thinking\":"
             "false}}' "
             "'{\"prompt\":\"hi\"}' >$T/in; echo '{\"const\":\"{}\"}' >$T/s; "
             "$F batch " TEST_DATA_DIR "/cli/thinks.gguf -i $T/in -o $T/o --order input --temp 5 --top-k 0 --top-p 1 "
             "--min-p 0 -q --json-schema $T/s -n 300");
    json_t *o = record("o", 0);
    ck_assert_uint_gt(strlen(text_at(o, "reasoning_content")), 0);
    ck_assert(!strcmp(text_at(o, "finish_reason"), "length") ? !*text_at(o, "text")
                                                             : !strcmp(text_at(o, "text"), "\"{}\""));
    json_decref(o);
    must_say(1, "text", "\"{}\"");
    must_say(2, "text", "\"{}\"");
    must_say(2, "finish_reason", "stop");
    /* Many short thoughts: those that ended are followed by what the schema says. */
    must_run("rm $T/in; for i in $(seq 1 60); do echo '{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}' "
             ">>$T/in; done; "
             "$F batch " TEST_DATA_DIR
             "/cli/thinks.gguf -i $T/in -o $T/q --temp 5 --top-k 0 --top-p 1 --min-p 0 -q --json-schema $T/s -n 400; "
             "grep -c '\"finish_reason\":\"stop\"' $T/q; grep '\"finish_reason\":\"stop\"' $T/q | grep -vc "
             "'\"text\":\"..{}..\"'; true");
    int n_stopped = 0, n_wrong = 0;
    ck_assert_int_eq(sscanf(out, "%d %d", &n_stopped, &n_wrong), 2);
    ck_assert_int_gt(n_stopped, 10);
    ck_assert_int_eq(n_wrong, 0);
}
END_TEST

/* Ctrl-C: what runs is finished; again: not even that. */
START_TEST(interrupt_loses_answers)
{
    must_run("$B -o $T/whole");
    ck_assert_int_eq(run("sed 's/\"max_tokens\":[0-9]*/\"max_tokens\":200/' $T/in >$T/in2; mv $T/in2 $T/in; "
                         "$B -o $T/o -s 4 & until [ -s $T/o ] || ! kill -0 $!; do sleep 0.01; done; "
                         "kill -INT $!; wait $!"),
                     130);
    ck_assert(says(errors, "interrupted"));
    write_input();
    must_run("$B -o $T/o --accept-changes; wc -l <$T/o");
    ck_assert_int_eq(atoi(out), 144);
}
END_TEST

/* Sequences that were expected to be short give way to each other. */
START_TEST(spilled_run_differs)
{
    must_run("for i in $(seq 40); do echo '{\"id\":'$i',\"prompt\":\"a tale of '$i'\",\"max_tokens\":'$((100 + "
             "i))',\"ignore_eos\":true}'; done >$T/in; "
             "$F batch $M -i $T/in -o $T/whole --ctx 256 --threads 1 -s 2; "
             "$F batch $M -i $T/in -o $T/o --ctx 256 --threads 1 -n 8 -s 12 --spill $T; ls $T >$T/names");
    ck_assert(says(errors, "pages kept on disk"));
    must_run("for f in whole o; do sed 's/,\"stats\":.*//' $T/$f | sort >$T/$f.bare; done; cmp $T/whole.bare "
             "$T/o.bare; wc -l <$T/o; "
             "grep -vE '^(in|o|whole|out|err|names)|^ferry$' $T/names || true");
    ck_assert_str_eq(out, "40\n"); /* and no file is left */
    ck_assert_int_eq(run("$B -o $T/p --spill /no/such/folder"), 1);
    ck_assert(says(errors, "/no/such/folder: No such file"));
}
END_TEST

START_TEST(stdin_differs_from_a_file)
{
    must_run("$B -o $T/whole; $F batch $M -i - --ctx 256 -n 60 -o $T/o <$T/in");
    must_equal("whole", "o", true);
    ck_assert_int_eq(run("$F batch $M -i $T/none -o $T/p"), 1);
    ck_assert(says(errors, "No such file"));
    ck_assert_int_eq(run("$B -o $T/no/folder"), 1);
    ck_assert(says(errors, "no/folder"));
    ck_assert_int_eq(run("$F batch $M -i $T/in"), 2);
}
END_TEST

START_TEST(progress_is_no_json)
{
    must_run("$B -o $T/o --json -q; tail -n 1 $T/err");
    json_t *o = json_loads(out, 0, NULL);
    ck_assert_ptr_nonnull(o);
    ck_assert_int_eq(json_integer_value(json_object_get(o, "done")), 144);
    ck_assert_int_eq(json_integer_value(json_object_get(o, "total")), 144);
    ck_assert(json_is_true(json_object_get(o, "end")));
    json_decref(o);
}
END_TEST

/* Of a saved plan nothing is predicted. */
static const struct {
    const char *with;
    bool has_profile, is_predicted;
} runs[] = {{"", false, false}, {"", true, true}, {"--plan $T/p.json", true, false}};

/* Answers that are equally long, so that all steps but the first are full; the other witness is what --explain says. */
START_TEST(prediction_is_not_reported)
{
    char path[512], line[512];
    double explained = 0;
    must_run(
        "for i in 1 2; do echo '{\"prompt\":\"tale '$i'\",\"max_tokens\":30,\"ignore_eos\":true}'; done >$T/in; "
        "mkdir $T/ferry; $F plan $M --ctx 256 --threads 1 --no-pin --save $T/p.json; "
        "sed -i 's/\"sessions\": *1/\"kv_tok\":512,\"sessions\":2/; s/\"logit_rows\": *1/\"logit_rows\":2/' $T/p.json");
    snprintf(path, sizeof path, "%s/ferry/machine.json", folder);
    if (runs[_i].has_profile)
        write_profile(path, TEST_DATA_DIR "/cli/tiny.gguf");
    must_run("$B -o $T/o -s 2 --explain | sed -n 's/^>.* //p'");
    ck_assert_int_eq(sscanf(out, "%lf", &explained), runs[_i].has_profile);
    snprintf(line, sizeof line, "$B -o $T/o -s 2 --json -q %s; tail -n 1 $T/err", runs[_i].with);
    must_run(line);
    json_t *o = json_loads(out, 0, NULL), *full = json_object_get(o, "full_steps");
    const json_t *predicted = json_object_get(full, "predicted_tokens_per_s");
    ck_assert_int_eq(json_integer_value(json_object_get(full, "answers")), 2);
    ck_assert(json_number_value(json_object_get(full, "tokens_per_s")) > 0);
    if (runs[_i].is_predicted) /* in six digits */
        ck_assert_msg(fabs(json_number_value(predicted) / explained - 1) < 1e-5, "not %g: %s", explained, out);
    else
        ck_assert_msg(json_is_null(predicted), "%s", out);
    json_decref(o);
}
END_TEST

/* 64 prompts of 960 equal tokens and three of their own, as the run's last line of progress counts them. */
START_TEST(shared_beginning_is_run_for_each)
{
    must_run("for i in $(seq 64); do printf '{\"prompt\":[%s%d,7,%d],\"max_tokens\":2,\"temperature\":0}\\n' "
             "\"$(seq 960 | awk '{ printf \"%d,\", $1 % 250 + 1 }')\" $((i + 2)) $((i * 3)); done >$T/in; "
             "$F batch $M -i $T/in -o $T/o --ctx 1024 --threads 1 --no-pin --json -q -s 16; tail -n 1 $T/err");
    json_t *o = json_loads(out, 0, NULL);
    ck_assert_ptr_nonnull(o);
    ck_assert_int_eq(json_integer_value(json_object_get(o, "done")), 64);
    ck_assert_int_eq(json_integer_value(json_object_get(o, "failed")), 0);
    ck_assert_int_eq(json_integer_value(json_object_get(o, "prompt_tokens")), 960 + 64 * 3);
    ck_assert_int_eq(json_integer_value(json_object_get(o, "shared_tokens")), 63 * 960);
    json_decref(o);
}
END_TEST

/* The score of a greedy answer: each of its tokens was the likeliest, and the sum is that of its log-probabilities. */
START_TEST(score_differs_from_the_answers_logprobs)
{
    must_run("echo '{\"prompt\":\"hello\",\"temperature\":0,\"max_tokens\":6,\"logprobs\":true}' >$T/in; $B -o $T/o");
    json_t *o = record("o", 0);
    const json_t *content = json_object_get(json_object_get(o, "logprobs"), "content");
    double sum = 0;
    for (size_t i = 0; i < json_array_size(content); i++)
        sum += json_number_value(json_object_get(json_array_get(content, i), "logprob"));
    json_t *request = json_pack("{s:s, s:s}", "prompt", "hello", "completion", text_at(o, "text"));
    char path[512];
    snprintf(path, sizeof path, "%s/in", folder);
    ck_assert_int_eq(json_dump_file(request, path, JSON_COMPACT), 0);
    must_run("$B -o $T/s --score");
    json_t *s = record("s", 0);
    const json_t *score = json_object_get(s, "score");
    ck_assert_ptr_nonnull(score);
    if (json_integer_value(json_object_get(score, "tokens")) == 6) { /* the text may be cut into other tokens */
        ck_assert(json_is_true(json_object_get(score, "is_greedy")));
        ck_assert(json_number_value(json_object_get(score, "logprob")) - sum < 1e-5);
        ck_assert(json_number_value(json_object_get(score, "logprob")) - sum > -1e-5);
    }
    json_decref(s);
    json_decref(request);
    json_decref(o);
}
END_TEST

/* ---- embeddings ---- */

/* The vectors of these lines, as JSON arrays in the order of lines and inputs; how many. */
static size_t vectors_of(const char *name, json_t **into, size_t most)
{
    char command[128];
    size_t n = 0;
    snprintf(command, sizeof command, "wc -l <$T/%s", name);
    must_run(command);
    int n_lines = atoi(out);
    for (int i = 0; i < n_lines; i++) {
        json_t *o = record(name, i), *data = json_object_get(o, "embedding"), *part;
        size_t k;
        if (data) {
            ck_assert_uint_lt(n, most);
            into[n++] = json_incref(data);
        }
        json_array_foreach(json_object_get(json_object_get(json_object_get(o, "response"), "body"), "data"), k, part)
        {
            ck_assert_uint_lt(n, most);
            ck_assert_int_eq(json_integer_value(json_object_get(part, "index")), (json_int_t)k);
            ck_assert_str_eq(text_at(part, "object"), "embedding");
            into[n++] = json_incref(json_object_get(part, "embedding"));
        }
        json_decref(o);
    }
    return n;
}

static double length_of(const json_t *v)
{
    double square = 0;
    for (size_t i = 0; i < json_array_size(v); i++)
        square += json_number_value(json_array_get(v, i)) * json_number_value(json_array_get(v, i));
    return sqrt(square);
}

/* The same text in every form that it may be asked in: the tiny model wants neither BOS nor EOS. */
START_TEST(vector_depends_on_the_form)
{
    json_t *v[8], *raw[8];
    must_run("printf %s hello | $F tokenize $M");
    out[strcspn(out, "\n")] = '\0';
    setenv("IDS", out, 1);
    int n_tokens = 1;
    for (const char *c = out; *c; c++)
        n_tokens += *c == ',';
    must_run(
        "printf '%s\n' '{\"id\":1,\"input\":\"hello\"}' '{\"id\":2,\"input\":['\"$IDS\"',\"hello\"]}' "
        "'{\"id\":3,\"input\":'\"$IDS\"'}' "
        "'{\"custom_id\":\"x\",\"url\":\"/v1/embeddings\",\"body\":{\"model\":\"m\",\"input\":[\"hello\",\"hello\"],"
        "\"encoding_format\":\"float\"}}' >$T/in; $B -o $T/l2 --order input --embed mean; "
        "$B -o $T/raw --order input --embed mean --normalize none");
    size_t n = vectors_of("l2", v, 8);
    ck_assert_uint_eq(n, 6);
    ck_assert_uint_eq(vectors_of("raw", raw, 8), n);
    double length = length_of(raw[0]);
    ck_assert(fabs(length_of(v[0]) - 1) < 1e-6 && fabs(length - 1) > 0.01);
    for (size_t i = 0; i < n; i++) {
        ck_assert(json_equal(v[i], v[0]) && json_equal(raw[i], raw[0]));
        for (size_t k = 0; k < json_array_size(v[i]); k++) /* each has been rounded to float */
            ck_assert(fabs(json_number_value(json_array_get(v[i], k)) * length -
                           json_number_value(json_array_get(raw[i], k))) <= 0x1p-22 * length);
    }
    json_t *o = record("l2", 4),
           *usage = json_object_get(json_object_get(json_object_get(o, "response"), "body"), "usage");
    ck_assert_str_eq(text_at(o, "response.body.object"), "list");
    ck_assert_int_eq(json_integer_value(json_object_get(usage, "total_tokens")), 2 * n_tokens);
    ck_assert_ptr_null(json_object_get(usage, "completion_tokens"));
    json_decref(o);
    for (size_t i = 0; i < n; i++) {
        json_decref(v[i]);
        json_decref(raw[i]);
    }
}
END_TEST

/* $T/eos.gguf: the tiny model as a file that wants EOS behind its texts. The key of another wish is as long. */
static void make_eos_model(void)
{
    static const char was[] = "tokenizer.ggml.add_bos_token\7\0\0\0\0", is[] = "tokenizer.ggml.add_eos_token\7\0\0\0\1";
    static char bytes[MAX_OUT];
    char path[512];
    FILE *f = fopen(TEST_DATA_DIR "/cli/tiny.gguf", "rb");
    ck_assert_ptr_nonnull(f);
    size_t n = fread(bytes, 1, MAX_OUT, f);
    fclose(f);
    char *at = memmem(bytes, n, was, sizeof was - 1);
    ck_assert_ptr_nonnull(at);
    memcpy(at, is, sizeof is - 1);
    snprintf(path, sizeof path, "%s/eos.gguf", folder);
    f = fopen(path, "wb");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fwrite(bytes, 1, n, f), n);
    fclose(f);
}

START_TEST(end_of_text_is_left_out)
{
    json_t *v[2], *want[2];
    make_eos_model();
    must_run("printf %s hello | $F tokenize $M | tr -d ']\\n'");
    setenv("IDS", out, 1);
    must_run("echo '{\"input\":\"hello\"}' >$T/in; $F batch $T/eos.gguf -i $T/in -o $T/eos --ctx 256 --embed last; "
             "echo '{\"input\":'\"$IDS\"',258]}' >$T/in; $B -o $T/given --embed last");
    ck_assert_uint_eq(vectors_of("eos", v, 2), 1);
    ck_assert_uint_eq(vectors_of("given", want, 2), 1);
    ck_assert(json_equal(v[0], want[0]));
    json_decref(v[0]);
    json_decref(want[0]);
}
END_TEST

static const struct {
    const char *line, *says;
} bad_inputs[] = {
    {"{\"id\":1}", "\\\"input\\\" has to be"},
    {"{\"input\":[]}", "1 to 64"},
    {"{\"input\":7}", "has to be a text"},
    {"{\"input\":[\"a\",7]}", "\\\"input\\\" 1 has to be"},
    {"{\"input\":[[1,\"a\"]]}", "list of token ids"},
    {"{\"input\":\"\"}", "the prompt is empty"},
    {"{\"input\":\"a\",\"prompt\":\"b\"}", "nothing else to read"},
    {"{\"input\":\"a\",\"max_tokens\":3}", "\\\"max_tokens\\\" is not supported"},
    {"{\"custom_id\":\"a\",\"body\":{\"input\":\"x\",\"dimensions\":8}}", "\\\"dimensions\\\" is not supported"},
    {"{\"custom_id\":\"a\",\"body\":{\"input\":\"x\",\"encoding_format\":\"base64\"}}", "has to be \\\"float\\\""},
    {"{\"custom_id\":\"a\",\"url\":\"/v1/completions\",\"body\":{\"input\":\"x\"}}", "/v1/embeddings"},
};

START_TEST(bad_input_stops_the_run_or_is_passed_over)
{
    char line[1024];
    snprintf(line, sizeof line, "printf '%%s\\n' '%s' '{\"input\":\"b\"}' >$T/in; $B -o $T/o --embed last",
             bad_inputs[_i].line);
    must_run(line);
    read_all("o", out);
    ck_assert(says(out, bad_inputs[_i].says));
    ck_assert(says(out, "{\"id\":2,\"index\":0,\"embedding\":["));
    must_run("echo '{\"input\":\"b\"}' >$T/in; $B -o $T/p");
    read_all("p", out);
    ck_assert(says(out, "is for --embed"));
    ck_assert_int_eq(run("$B -o $T/q --embed last --score"), 2);
    ck_assert_int_eq(run("$B -o $T/o --embed mean"), 1);
    ck_assert(says(errors, "another input"));
}
END_TEST

/* 200 lines of three inputs. */
START_TEST(killed_run_loses_or_doubles_vectors)
{
    must_run("for i in $(seq 200); do echo '{\"input\":[\"the words of number '$i'\",\"more '$i'\",\"and more\"]}'; "
             "done >$T/in; $B -o $T/whole --embed mean -s 7");
    ck_assert_int_gt(killed_runs("--embed mean -s 3"), 0);
    must_run("for f in whole o; do sed 's/,\"stats\":.*//' $T/$f | sort >$T/$f.bare; done; cmp $T/whole.bare "
             "$T/o.bare; wc -l <$T/o");
    ck_assert_int_eq(atoi(out), 600);
    ck_assert_int_eq(run("$B -o $T/o --embed last"), 1);
    ck_assert(says(errors, "embed was \"mean\", is \"last\""));
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("cli_batch");
    TCase *t = tcase_create("cli_batch");
    tcase_set_timeout(t, 300);
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, answer_is_not_that_of_run);
    tcase_add_loop_test(t, bad_line_stops_the_run_or_is_passed_over, 0, (int)(sizeof bad / sizeof *bad));
    tcase_add_test(t, options_of_a_line_are_lost);
    tcase_add_test(t, thoughts_are_part_of_the_answer);
    tcase_add_loop_test(t, killed_run_loses_or_doubles_answers, 0, 2);
    tcase_add_test(t, torn_end_or_rubbish_is_kept);
    tcase_add_loop_test(t, full_disk_loses_answers, 0, 2);
    tcase_add_test(t, another_run_is_taken_for_this_one);
    tcase_add_test(t, grammar_of_a_request_is_lost_or_taken_for_another);
    tcase_add_test(t, schema_beside_json_object_is_passed_over);
    tcase_add_test(t, name_in_a_message_takes_the_message_along);
    tcase_add_test(t, thought_is_held_against_the_schema);
    tcase_add_test(t, interrupt_loses_answers);
    tcase_add_test(t, spilled_run_differs);
    tcase_add_test(t, stdin_differs_from_a_file);
    tcase_add_test(t, progress_is_no_json);
    tcase_add_loop_test(t, prediction_is_not_reported, 0, (int)(sizeof runs / sizeof *runs));
    tcase_add_test(t, shared_beginning_is_run_for_each);
    tcase_add_test(t, score_differs_from_the_answers_logprobs);
    tcase_add_test(t, vector_depends_on_the_form);
    tcase_add_loop_test(t, bad_input_stops_the_run_or_is_passed_over, 0, (int)(sizeof bad_inputs / sizeof *bad_inputs));
    tcase_add_test(t, end_of_text_is_left_out);
    tcase_add_test(t, killed_run_loses_or_doubles_vectors);
    suite_add_tcase(suite, t);
    return run_suite(suite);
}
