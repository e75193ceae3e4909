/* The program as its users meet it: built, run, its output and exit status looked at. The model is tests/data/cli/tiny.gguf, which says
 * nonsense. */
#include "src/cli/conf.h"
#include "tests/run_suite.h"

#include <check.h>
#include <math.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define TINY TEST_DATA_DIR "/cli/tiny.gguf"
enum { TINY_VOCAB = 260, MAX_OUT = 1 << 20 };

static const char *const commands[] = {"chat",  "run",  "batch", "plan",     "probe",
                                       "bench", "eval", "info",  "tokenize", "quantize"};
enum { N_COMMANDS = sizeof commands / sizeof *commands };

static char folder[] = TEST_BUILD_DIR "/t_cli-XXXXXX";
static char out[MAX_OUT], errors[MAX_OUT];

static void setup(void)
{
    ck_assert_ptr_nonnull(mkdtemp(folder));
    setenv("XDG_CACHE_HOME", folder, 1);
    setenv("XDG_STATE_HOME", folder, 1);
    setenv("T", folder, 1);
    setenv("M", TINY, 1);
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
    ck_assert_ptr_nonnull(f);
    size_t n = fread(into, 1, MAX_OUT - 1, f);
    into[n] = '\0';
    fclose(f);
}

/* A shell line in which F is the program, M the model, T a folder; the exit status. */
static int run(const char *line)
{
    char full[2048];

    snprintf(full, sizeof full, "F='%s/ferry'; { %s ; } >'%s/out' 2>'%s/err'", TEST_BUILD_DIR, line, folder, folder);
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

/* ---- help and wrong usage ---- */

START_TEST(help_of_the_program_fits_a_screen)
{
    size_t n_lines = 0;

    must_run("$F --help");
    for (const char *p = out; *p; p += strcspn(p, "\n"), p += *p == '\n', n_lines++)
        ck_assert_uint_le(strcspn(p, "\n"), 80);
    ck_assert_uint_le(n_lines, 23);
    for (int i = 0; i < N_COMMANDS; i++)
        ck_assert(says(out, commands[i]));
    ck_assert_str_eq(errors, "");
}
END_TEST

START_TEST(every_subcommand_helps_with_an_example)
{
    char line[128], example[64];

    snprintf(line, sizeof line, "$F %s --help", commands[_i]);
    must_run(line);
    snprintf(example, sizeof example, "ferry %s", commands[_i]);
    ck_assert(says(out, example));
    ck_assert(says(out, "Example:"));
    for (const struct conf_option *o = conf_options; o->name; o++) {
        if (conf_takes(o, commands[_i]))
            ck_assert(says(out, o->name));
    }
}
END_TEST

START_TEST(page_and_completion_know_every_option)
{
    must_run("$F --man-page");
    ck_assert(says(out, ".TH FERRY 1"));
    for (int i = 0; i < N_COMMANDS; i++)
        ck_assert(says(out, commands[i]));
    ck_assert(says(out, "\\-\\-kv\\-type"));
    must_run("$F --bash-completion");
    for (const struct conf_option *o = conf_options; o->name; o++)
        ck_assert(says(out, o->name));
    must_run("$F --version");
    ck_assert_int_eq(strncmp(out, "ferry ", 6), 0);
}
END_TEST

START_TEST(completion_is_bash_and_completes)
{
    if (system("command -v bash >/dev/null 2>&1"))
        return;
    must_run(
        "$F --bash-completion >$T/c.bash; bash -c '. $T/c.bash; COMP_WORDS=(ferry run m --kv-type \"\"); COMP_CWORD=4; "
        "_ferry; echo ${COMPREPLY[@]}; COMP_WORDS=(ferry pl); COMP_CWORD=1; _ferry; echo ${COMPREPLY[@]}; "
        "COMP_WORDS=(ferry plan --mem); COMP_CWORD=2; _ferry; echo ${COMPREPLY[@]}'");
    ck_assert_str_eq(out, "f16 q8_0\nplan\n--mem-rate\n");
}
END_TEST

static const struct {
    const char *line, *says;
} wrong[] = {
    {"$F", "which subcommand"},
    {"$F rnu m", "did you mean \"run\""},
    {"$F run", "wants a model"},
    {"$F run $M", "one of -p TEXT and -f FILE"},
    {"$F run $M -p a -f b", "one of -p TEXT and -f FILE"},
    {"$F run $M -p a --ctxx 5", "did you mean --ctx"},
    {"$F run $M -p a --draft x", "no option --draft"},
    {"$F run $M -p a --raw --template-var a=b", "there is no template"},
    {"$F batch $M -i a -o b --embed mean --template-var a=b", "no template is wrapped"},
    {"$F eval $M", "one of --tokens IDS and --text FILE"},
    {"$F eval $M --tokens 1", "together"},
    {"$F bench $M -p 0 -n 0", "nothing to measure"},
    {"$F bench $M -s 2 -d 5", "--depth is of a session"},
    {"$F plan $M --ram lots", "not a size"},
    {"$F chat $M --kv-type q9", "f16|q8_0"},
    {"$F tokenize", "wants a model"},
    {"$F quantize", "wants a model"},
    {"$F quantize $M $T/q.gguf", "IN OUT TYPE"},
    {"$F quantize $M $T/q.gguf Q9", "knows no type \"Q9\""},
    {"$F quantize $M $T/q.gguf Q8_0 2", "one word too many"},
};

START_TEST(wrong_usage_is_2_and_says_what)
{
    ck_assert_int_eq(run(wrong[_i].line), 2);
    ck_assert(says(errors, wrong[_i].says));
    ck_assert(says(errors, "--help"));
    ck_assert_str_eq(out, "");
}
END_TEST

START_TEST(missing_file_is_1_and_named)
{
    static const char *const lines[] = {
        "$F chat $T/no.gguf",
        "$F run $T/no.gguf -p x",
        "$F plan $T/no.gguf",
        "$F probe $T/no.gguf --quiet",
        "$F bench $T/no.gguf -q",
        "$F eval $T/no.gguf --tokens 1 --logits $T/l",
        "$F info $T/no.gguf",
        "$F tokenize $T/no.gguf </dev/null",
        "$F quantize $T/no.gguf $T/q.gguf Q8_0",
        "$F quantize $M $T/q.gguf Q8_0 --imatrix $T/no.gguf",
    };

    ck_assert_int_eq(run(lines[_i]), 1);
    ck_assert(says(errors, "no.gguf"));
    ck_assert(says(errors, "No such file"));
    ck_assert_str_eq(out, "");
}
END_TEST

/* Each option with a value of its kind in front of --help: that the parser takes it is all that is asked. */
START_TEST(every_option_of_the_table_is_taken)
{
    static const char *const values[] = {
        [CONF_COUNT] = "64",    [CONF_INT] = "1",  [CONF_SEED] = "7",    [CONF_REAL] = "0.5", [CONF_SIZE] = "2G",
        [CONF_RATE] = "3.5G/s", [CONF_TEXT] = "x", [CONF_FILE] = "file", [CONF_VAR] = "a=b"};
    char line[256], value[32];

    for (const struct conf_option *o = conf_options; o->name; o++) {
        if (!conf_takes(o, commands[_i]))
            continue;
        snprintf(value, sizeof value, "%s", o->kind == CONF_FLAG || o->kind == CONF_CHOICE ? "" : values[o->kind]);
        if (o->kind == CONF_CHOICE)
            snprintf(value, sizeof value, "%.*s", (int)strcspn(o->choices, "|"), o->choices);
        snprintf(line, sizeof line, "$F %s $M --%s %s --help", commands[_i], o->name, value);
        must_run(line);
        if (!o->letter)
            continue;
        snprintf(line, sizeof line, "$F %s $M -%c%s --help", commands[_i], o->letter, value);
        must_run(line);
    }
}
END_TEST

/* ---- what each does ---- */

START_TEST(tokenize_goes_there_and_back)
{
    must_run("printf 'the \\303\\274' | $F tokenize $M");
    /* Bytes are their own ids, "he" is 256. */
    ck_assert_str_eq(out, "[116, 256, 32, 195, 188]\n");
    must_run("echo '[116, 256, 32, 195, 188]' | $F tokenize $M --decode");
    ck_assert_str_eq(out, "the \303\274");
    must_run("printf '<|end|>' | $F tokenize $M --special --bos");
    ck_assert_str_eq(out, "[257, 258]\n");
    must_run("printf '' | $F tokenize $M");
    ck_assert_str_eq(out, "[]\n");
    ck_assert_int_eq(run("echo '[1, -1]' | $F tokenize $M --decode"), 1);
    ck_assert(says(errors, "element 1"));
    ck_assert_int_eq(run("echo '{' | $F tokenize $M --decode"), 1);
    ck_assert_int_eq(run("echo '[99999]' | $F tokenize $M --decode"), 1);
}
END_TEST

START_TEST(info_tells_sizes)
{
    must_run("$F info $M --tensors");
    ck_assert(says(out, "llama.block_count"));
    ck_assert(says(out, "ffn_down.weight"));
    ck_assert(says(out, "blk.0.attn_q.weight"));
    must_run("$F info $M --json");
    ck_assert(says(out, "\"n_tensors\": 11"));
}
END_TEST

START_TEST(info_hides_escapes_of_a_file_from_the_terminal)
{
    must_run("sed 's/tiny/t\\x1b[y/' $M >$T/esc.gguf && $F info $T/esc.gguf");
    ck_assert_ptr_null(strchr(out, '\033'));
    ck_assert(says(out, "t?[y"));
}
END_TEST

START_TEST(plan_describes_and_saves)
{
    must_run("$F plan $M --ram 2G --mem-rate 60G/s --disk 3.5G/s --cores 8 --save $T/p.json");
    ck_assert(says(out, "as described: 8 cores"));
    ck_assert(says(out, "budget"));
    ck_assert(says(out, "memory gives 60 GB/s"));
    must_run("$F plan $M --json --ctx 128 --kv-type q8_0 --threads 3 --io pread");
    ck_assert(says(out, "\"threads\": 3"));
    ck_assert(says(out, "\"io\": \"pread\""));
    ck_assert_int_eq(run("$F plan $M --ram 1M"), 1);
    ck_assert(says(errors, "1 MiB allowed"));
    ck_assert_int_eq(run("$F plan $M --save $T/none/p.json"), 1);
    ck_assert(says(errors, "none/p.json"));
}
END_TEST

START_TEST(plan_of_a_shape_and_of_a_beginning)
{
    must_run("$F plan qwen3-30b-a3b --ram 8G --mem-rate 60G/s --disk 3.5G/s --cores 8 --vram 8G --gpu-rate 256G/s "
             "--pcie 12G/s "
             "--explain");
    ck_assert(says(out, "8 of 128 experts"));
    ck_assert(says(out, "expert slots"));
    ck_assert(says(out, "at most")); /* nothing has been measured */
    ck_assert(says(out, "--io mmap"));
    ck_assert(says(out, "with --device cuda:0 a plan for it"));
    ck_assert_int_eq(run("$F plan $M --device gpu"), 1);
    ck_assert(says(errors, "expected auto, cpu or cuda:N"));
    must_run("$F plan $M --device auto"); /* with or without a GPU */
    ck_assert_int_eq(run("$F run $M --vram 1G -p x"), 1);
    ck_assert(says(errors, "of which GPU?"));
    ck_assert_int_eq(run("$F plan qwen4-30b"), 1);
    ck_assert(says(errors, "qwen4-30b"));
    /* enough of a file for its header, and less */
    must_run("$F plan $M >$T/whole && head -c 20000 $M >$T/cut.gguf && $F plan $T/cut.gguf");
    ck_assert(says(out, "dense weights"));
    must_run("$F info $T/cut.gguf");
    ck_assert(says(out, "only a beginning is here"));
    must_run("$F info $T/cut.gguf --json");
    ck_assert(says(out, "\"missing_bytes\""));
    ck_assert_int_eq(run("head -c 300 $M >$T/cut.gguf && $F plan $T/cut.gguf"), 1);
    ck_assert(says(errors, "300 bytes are here, at least"));
    ck_assert_int_eq(run("$F run $T/cut.gguf -p x"), 1);
}
END_TEST

/* One probe, and everybody uses it. On one core: the threads of two would wait for each other on a machine that is busy. */
START_TEST(probed_rates_are_used_by_all)
{
    cpu_set_t all, one;
    int cpu = 0;

    ck_assert_int_eq(sched_getaffinity(0, sizeof all, &all), 0);
    while (!CPU_ISSET(cpu, &all))
        cpu++;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    ck_assert_int_eq(sched_setaffinity(0, sizeof one, &one), 0);
    must_run("head -c 2M /dev/zero >$T/disk; $F probe $T/disk --quiet --gpu-rate 256G/s --pcie 12G/s");
    ck_assert(says(out, "memory 256.0 GB/s (as described)"));
    ck_assert(says(out, "PCIe       12.0 GB/s"));
    ck_assert(says(out, "matmul by weight type"));
    ck_assert(says(out, "in flight:"));
    ck_assert(says(out, "while it reads, matmuls have "));
    must_run("grep -q many_share $T/ferry/machine.json; $F plan $M");
    ck_assert(says(out, "decode      about"));
    ck_assert(says(out, "prefill     about"));
    must_run("$F run $M --raw -p hello -n 16 --temp 0 --stats");
    ck_assert(says(errors, "predicted "));
    must_run("$F bench $M -p 512 -n 8 -r 1 --ctx 520 --json -q");
    ck_assert(says(out, "\"predicted_tokens_per_s\""));
    ck_assert_ptr_null(strstr(out, "\"predicted_tokens_per_s\": null"));
    must_run("$F plan $M --cores 64 --mem-rate 100G/s");
    ck_assert(says(out, "decode      about"));
    ck_assert_int_eq(run("echo '{' >$T/ferry/machine.json; $F run $M --raw -p hello -n 2"), 1);
    ck_assert(says(errors, "machine.json"));
    ck_assert(says(errors, "ferry probe writes it anew"));
    must_run("rm $T/ferry/machine.json; $F run $M --raw -p hello -n 16 --temp 0 --stats");
    ck_assert_ptr_null(strstr(errors, "predicted"));
}
END_TEST

START_TEST(saved_plan_is_run)
{
    must_run("$F plan $M --ctx 96 --save $T/p.json && $F run $M -p hi -n 2 --plan $T/p.json --temp 0");
    ck_assert(says(errors, "of 96]"));
    ck_assert_int_eq(run("echo '{}' >$T/p.json; $F run $M -p hi --plan $T/p.json"), 1);
    ck_assert(says(errors, "no plan of ferry"));
}
END_TEST

START_TEST(run_is_the_same_for_the_same_seed)
{
    static char first[MAX_OUT];

    must_run("$F run $M -p hello -n 24 --seed 5 -q");
    snprintf(first, sizeof first, "%s", out);
    ck_assert_str_eq(errors, "");
    must_run("printf hello | $F run $M -f - -n 24 --seed 5 -q --threads 1 --io mmap --chunk 3");
    ck_assert_str_eq(out, first);
    must_run("$F run $M --raw -p hello -n 4 --temp 0 --json");
    ck_assert(says(out, "\"prompt_tokens\": 4"));
    ck_assert(says(out, "\"tokens\": 4"));
    ck_assert(says(out, "\"end\": \"length\""));
    must_run("$F run $M -p hello -n 4 --system short --stats");
    ck_assert(says(errors, "weights read"));
    ck_assert(says(errors, "[disk: loaded"));
}
END_TEST

/* The prompt of 4 tokens is one step; of 3 answer tokens the last is not run. */
START_TEST(traces_are_not_those_of_the_steps)
{
    must_run("$F run $M --raw -p hello --temp 0 -n 3 -q --trace $T/t.json --trace-experts $T/e; cat $T/e");
    ck_assert(says(out, "step 4\nstep 1\nstep 1\n"));
    must_run("cat $T/t.json");
    ck_assert(says(out, "\"traceEvents\""));
    ck_assert(says(out, "\"name\":\"step\""));
    ck_assert(says(out, "\"name\":\"dense\""));
    ck_assert_int_eq(run("$F run $M --raw -p hello --temp 0 -n 1 --trace $T/no/such/folder"), 1);
    ck_assert(says(errors, "no/such/folder"));
}
END_TEST

START_TEST(full_context_is_told_with_numbers)
{
    must_run("$F run $M --raw -p hello --ctx 16 --temp 0");
    ck_assert(says(errors, "context of 16 tokens is full"));
    ck_assert_int_eq(run("$F run $M --raw -p 'a prompt of many letters' --ctx 16"), 1);
    ck_assert(says(errors, "takes 24 tokens, the context holds 16"));
    ck_assert_int_eq(run("printf '' | $F run $M --raw -f -"), 1);
    ck_assert(says(errors, "empty"));
}
END_TEST

START_TEST(closed_pipe_and_full_disk_are_failures)
{
    ck_assert_int_eq(run("$F info $M >/dev/full"), 1);
    ck_assert(says(errors, "stdout"));
    ck_assert_int_eq(run("$F run $M -p x -n 3 -q >/dev/full"), 1);
    ck_assert(says(errors, "stdout"));
    ck_assert_int_eq(run("$F eval $M --tokens 1,2,3 --logits /dev/full"), 1);
    ck_assert(says(errors, "/dev/full"));
    ck_assert_int_eq(run("(ulimit -f 1; exec $F eval $M --tokens 1,2,3,4,5,6,7,8 --logits $T/l.f32)"), 1);
    ck_assert(says(errors, "l.f32"));
    ck_assert_int_eq(run("{ sleep 0.3; $F run $M -p x -n 40 -q; echo $? >$T/status; } | true; exit $(cat $T/status)"),
                     1);
    ck_assert(says(errors, "stdout"));
}
END_TEST

static void read_logits(const char *name, float *rows, size_t n)
{
    char path[512];

    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "rb");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fread(rows, sizeof *rows, n, f), n);
    ck_assert_int_eq(fgetc(f), EOF);
    fclose(f);
}

START_TEST(logits_do_not_depend_on_the_cut)
{
    static float all[5 * TINY_VOCAB], cut[5 * TINY_VOCAB];

    must_run("$F eval $M --tokens 1,2,3,4,5 --logits $T/a");
    read_logits("a", all, 5 * TINY_VOCAB);
    must_run(
        "echo '[1, 2, 3, 4, 5]' >$T/ids; $F eval $M --tokens @$T/ids --prefill 2 --logits $T/b --threads 2 --json");
    read_logits("b", cut, 5 * TINY_VOCAB);
    ck_assert_int_eq(memcmp(all, cut, sizeof all), 0);
    ck_assert(says(out, "\"n_prefill\": 2"));
    ck_assert_int_eq(run("$F eval $M --tokens 1,260 --logits $T/c"), 1);
    ck_assert(says(errors, "token 1 is 260; the vocabulary has 260"));
    ck_assert_int_eq(run("$F eval $M --tokens 1,x --logits $T/c"), 1);
    ck_assert(says(errors, "\"x\" is no token id (after 1 of them)"));
}
END_TEST

/* The same perplexity from the logits of the same tokens. */
START_TEST(perplexity_is_that_of_the_logits)
{
    static float rows[32 * TINY_VOCAB];
    const char text[] = "abcdefgabcdefgabcdefgabcdefgabcd";
    double sum = 0, told;
    int n = 0;

    must_run("printf abcdefgabcdefgabcdefgabcdefgabcd >$T/text; $F tokenize $M <$T/text | tr -d '[]' >$T/ids; "
             "$F eval $M --tokens @$T/ids --logits $T/a");
    read_logits("a", rows, 32 * TINY_VOCAB);
    for (int i = 16; i + 1 < 32; i++, n++) {
        double z = 0;
        for (int k = 0; k < TINY_VOCAB; k++)
            z += exp(rows[i * TINY_VOCAB + k]);
        sum += log(z) - rows[i * TINY_VOCAB + text[i + 1]];
    }
    must_run("$F eval $M --text $T/text --ctx 32");
    ck_assert_int_eq(sscanf(out, "perplexity %lf", &told), 1);
    /* Told with four digits behind the point. */
    ck_assert_double_eq_tol(told, exp(sum / n), 1e-3);
    ck_assert_int_eq(run("printf ab | $F eval $M --text -"), 1);
    ck_assert(says(errors, "too few"));
}
END_TEST

START_TEST(bench_reports_its_tests)
{
    must_run("$F bench $M -p 16 -n 8 -r 2 --threads 1 --json -q");
    ck_assert(says(out, "\"pp16\""));
    ck_assert(says(out, "\"tg8\""));
    ck_assert(says(out, "\"fraction\""));
    ck_assert(says(out, "\"plan\""));
    ck_assert_str_eq(errors, "");
    must_run("$F bench $M -p 16 -n 8 -d 40 -r 2 --threads 1 -q");
    ck_assert(says(out, "pp16@40") && says(out, "tg8@40"));
    ck_assert_int_eq(run("$F bench $M -p 16 -n 0 -d 20 --ctx 35 -q"), 1);
    ck_assert(says(errors, "depth of 20"));
    ck_assert_int_eq(run("$F bench $M -p 64 --ctx 32 -q"), 1);
    ck_assert(says(errors, "do not fit a context of 32"));
    must_run("$F bench $M -p 16 -n 8 -s 3 -r 2 --threads 1 --json -q");
    ck_assert(says(out, "\"s3pp16\"") && says(out, "\"s3tg8\"") && says(out, "\"fraction\""));
    ck_assert_str_eq(errors, "");
    ck_assert_int_eq(run("$F bench $M -p 64 -s 2 --ctx 32 -q"), 1);
    ck_assert(says(errors, "do not fit a context of 32"));
}
END_TEST

/* ---- chat ---- */

START_TEST(chat_reads_messages_from_a_pipe)
{
    must_run("printf 'hello\\n/stats\\n/undo\\n/undo\\n/regen\\n/bogus\\none "
             "\\\\\\ntwo\\n\"\"\"\\nthree\\n\\nfour\\n\"\"\"\\n/regen\\n"
             "/system terse\\n/reset\\n/help\\n/quit\\nnever\\n' | $F chat $M --temp 0 -n 4 --stats");
    ck_assert(says(errors, "[prompt "));
    ck_assert(says(errors, "are gone; 0 left"));
    ck_assert(says(errors, "nothing to take back"));
    ck_assert(says(errors, "there is no answer yet"));
    ck_assert(says(errors, "no command /bogus"));
    ck_assert(says(errors, "a new conversation, the system message stays"));
    ck_assert(says(errors, "/system"));
}
END_TEST

START_TEST(chat_forgets_a_variable_of_the_template)
{
    must_run("printf '/set\n/set enable_thinking=false\n/set effort=high\n/set enable_thinkin=true\n/set 1\n/set "
             "effort=3\nhi\n/set\n' "
             "| $F chat " TEST_DATA_DIR "/cli/thinks.gguf --temp 0 -n 4 -q 2>&1 >/dev/null");
    ck_assert_str_eq(out, "[no variable of the chat template is set; /set enable_thinking=false sets one]\n"
                          "[enable_thinking=false]\n"
                          "[enable_thinking=false]\n[effort=high]\n"
                          "ferry: the model's chat template reads no variable \"enable_thinkin\"\n"
                          "ferry: \"1\" is not NAME=VALUE, as in enable_thinking=false\n"
                          "[enable_thinking=false]\n[effort=3]\n"
                          "[cut after 4 tokens (-n)]\n"
                          "[enable_thinking=false]\n[effort=3]\n");
    /* The same words as when it is said before. */
    must_run("printf '/set enable_thinking=false\nhi\n' | $F chat " TEST_DATA_DIR
             "/cli/thinks.gguf --temp 0 -n 4 -q >$T/a && "
             "$F run " TEST_DATA_DIR
             "/cli/thinks.gguf --template-var enable_thinking=false -p hi --temp 0 -n 4 -q | cmp - $T/a");
    ck_assert_int_eq(run("$F run " TEST_DATA_DIR "/cli/thinks.gguf -p hi --template-var enable_thinkin=false"), 1);
    ck_assert(says(errors, "reads no variable"));
    ck_assert_str_eq(out, "");
}
END_TEST

/* What the session holds already is not run again: the second prompt is only what is new. */
/* One answer and a talk by a schema; a grammar that is wrong is told before anything is answered. */
START_TEST(answer_is_not_what_the_grammar_says)
{
    must_run("echo '{\"type\":\"array\",\"items\":{\"enum\":[\"a\",7]},\"minItems\":2,\"maxItems\":2}' >$T/s; "
             "$F run $M -p hi --json-schema $T/s --temp 2 --seed 1 -q | tr -d ' \\n'");
    ck_assert_msg(strlen(out) >= 5 && out[0] == '[', "%s", out);
    ck_assert(!strcmp(out, "[7,7]") || !strcmp(out, "[7,\"a\"]") || !strcmp(out, "[\"a\",7]") ||
              !strcmp(out, "[\"a\",\"a\"]"));
    must_run("printf 'root ::= \"yes\" | \"no\"' >$T/g; printf 'one\\ntwo\\n' | $F chat $M --grammar $T/g -q");
    for (const char *line = out; *line; line = strchr(line, '\n') + 1)
        ck_assert_msg(!strncmp(line, "yes\n", 4) || !strncmp(line, "no\n", 3), "%s", out);
    must_run("$F run $M -p hi --raw --grammar $T/g --json -q -n 9");
    ck_assert(strstr(out, "\"end\": \"end\""));
    must_run("$F run " TEST_DATA_DIR "/cli/thinks.gguf -p hi --template-var enable_thinking=false --grammar $T/g -q");
    ck_assert(!strcmp(out, "yes\n") || !strcmp(out, "no\n"));
    ck_assert_int_eq(run("printf 'root ::= (' >$T/g; $F run $M -p hi --grammar $T/g"), 1);
    ck_assert(strstr(errors, "grammar, line 1, column 11"));
    ck_assert_int_eq(run(": >$T/e; $F run $M -p hi --json-schema $T/e"), 1);
    ck_assert(strstr(errors, "not JSON"));
    ck_assert_int_eq(run("$F run $M -p hi --grammar $T/g --json-schema $T/s"), 2);
    ck_assert_int_eq(run("$F chat $M --grammar $T/g --json-schema $T/s"), 2);
}
END_TEST

START_TEST(chat_keeps_its_cache_between_turns)
{
    int n_first = 0, n_second = 0;

    must_run("printf 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\\nb\\n' | $F chat $M --temp 0 -n 1 --stats");
    const char *p = strstr(errors, "[prompt ");
    ck_assert_ptr_nonnull(p);
    ck_assert_int_eq(sscanf(p, "[prompt %d", &n_first), 1);
    p = strstr(p + 1, "[prompt ");
    ck_assert_ptr_nonnull(p);
    ck_assert_int_eq(sscanf(p, "[prompt %d", &n_second), 1);
    /* "<|start|>user\n" + 40 + "<|end|>\n<|start|>assistant\n" = 6 + 40 + 2 + 11. */
    ck_assert_int_eq(n_first, 59);
    /* At most the answer's token, its end, and the new message with its frame. */
    ck_assert_int_le(n_second, 1 + 2 + 6 + 1 + 2 + 11);
}
END_TEST

START_TEST(chat_with_a_full_context_drops_nothing_silently)
{
    must_run("printf 'hello\\nthis is far too long for so small a context, is it not\\n/undo\\n' | $F chat $M --temp 0 "
             "-n 2 --ctx 48");
    ck_assert(says(errors, "the context holds 48"));
    ck_assert(says(errors, "the message was not taken"));
    ck_assert(says(errors, "are gone; 0 left"));
}
END_TEST

/* ---- signals ---- */

START_TEST(prompt_is_cut_at_a_zero_byte)
{
    ck_assert_int_eq(run("printf 'ab\\0cd' | $F run $M -f - -n 1 -q"), 1);
    ck_assert(says(errors, "after 2 of 5 bytes"));
    must_run("printf 'ab\\0cd' | $F run $M -f - -n 1 -q --raw");
}
END_TEST

START_TEST(file_cut_short_under_its_mapping_dumps_core)
{
    ck_assert_int_eq(
        run("cp $M $T/m.gguf; { echo hi; for i in $(seq 900); do [ -s $T/first ] && break; sleep 0.1; done; "
            ": >$T/m.gguf; echo again; } | $F chat $T/m.gguf --io mmap -n 3 -q >$T/first"),
        1);
    ck_assert(says(errors, "cut short"));
}
END_TEST

#ifndef HAVE_ASAN /* which reserves terabytes of addresses itself, and does not start under a limit */
START_TEST(no_memory_hangs_at_exit)
{
    /* Enough with some of them, too little for the KV cache or the threads with others. */
    ck_assert_int_eq(
        run("for kib in 200000 150000 120000 100000 80000; do (ulimit -v $kib; timeout 60 $F run $M -p hi -n 1 -q "
            "--ctx 300000 --ram 4G --io pread); [ $? -le 1 ] || exit 7; done"),
        0);
}
END_TEST
#endif

START_TEST(interrupt_keeps_what_was_said)
{
    char path[512], *argv[] = {path, "run", TINY, "--raw", "-f", "-", "--ctx", "30000", "--temp", "0", "-q", NULL};
    int to[2], from[2], status;
    char byte;

    snprintf(path, sizeof path, "%s/ferry", TEST_BUILD_DIR);
    ck_assert_int_eq(pipe(to) | pipe(from), 0);
    pid_t pid = fork();
    ck_assert_int_ge(pid, 0);
    if (!pid) {
        dup2(to[0], STDIN_FILENO);
        dup2(from[1], STDOUT_FILENO);
        close(to[1]);
        close(from[0]);
        execv(path, argv);
        _exit(127);
    }
    close(to[0]);
    close(from[1]);
    ck_assert_int_eq(write(to[1], "hello", 5), 5);
    close(to[1]);
    /* The first word is there: it is talking. */
    ck_assert_int_eq(read(from[0], &byte, 1), 1);
    ck_assert_int_eq(kill(pid, SIGINT), 0);
    while (read(from[0], &byte, 1) > 0)
        ;
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    close(from[0]);
    ck_assert(WIFEXITED(status));
    ck_assert_int_eq(WEXITSTATUS(status), 130);
}
END_TEST

/* ---- quantize ---- */

START_TEST(quantized_file_does_not_run)
{
    must_run("$F quantize $M $T/f.gguf F16 2>&1");
    ck_assert(says(out, "already quantized (Q8_0)"));
    ck_assert(says(out, "1 file in"));
    must_run("$F quantize $T/f.gguf $T/q.gguf q5_0 --quiet");
    ck_assert_str_eq(out, "");
    ck_assert_str_eq(errors, "");
    must_run("$F info $T/q.gguf --json");
    ck_assert(says(out, "\"Q5_0\""));
    must_run("$F run $T/q.gguf -p hello --temp 0 -n 4 --raw");
    must_run("$F quantize $T/f.gguf $T/s.gguf Q8_0 --split 12K --json");
    ck_assert(says(out, "\"type\": \"Q8_0\""));
    must_run("for f in $T/s-00001-of-0000*.gguf; do $F run $f -p hello --temp 0 -n 4 --raw; done");
    must_run("$F run $M -p hello --temp 0 -n 4 --raw >$T/want; for f in $T/s-00001-of-0000*.gguf; do "
             "$F run $f -p hello --temp 0 -n 4 --raw; done | cmp - $T/want"); /* Q8_0 to F16 and back loses nothing */
}
END_TEST

START_TEST(dry_run_writes_or_lies)
{
    char size[32];

    must_run("$F quantize $M --dry-run");
    ck_assert(says(out, "Q4_K_M"));
    ck_assert(says(out, "IQ4_XS"));
    must_run("$F quantize $M $T/dry.gguf Q4_0 --dry-run --verbose 2>&1");
    ck_assert(says(out, "blk.0.attn_q.weight"));
    ck_assert_int_eq(run("test -e $T/dry.gguf"), 1);
    must_run("$F quantize $M Q4_0 --dry-run --json | sed -n 's/.*\"bytes\": \\([0-9]*\\),.*/\\1/p' | head -1");
    snprintf(size, sizeof size, "%.31s", out);
    must_run("$F quantize $M $T/q4.gguf Q4_0 -q; stat -c %s $T/q4.gguf");
    ck_assert_str_eq(out, size);
}
END_TEST

START_TEST(failed_quantization_leaves_or_takes_files)
{
    ck_assert_int_eq(run("cp $M $T/same.gguf; $F quantize $T/same.gguf $T/same.gguf Q4_0"), 1);
    ck_assert(says(errors, "is the input"));
    must_run("cmp $M $T/same.gguf");
    /* A limit on sizes stands in for a full disk: the write past it fails. */
    ck_assert_int_eq(run("mkdir $T/d; echo old >$T/d/o.gguf; (ulimit -f 4; exec $F quantize $M $T/d/o.gguf F16)"), 1);
    ck_assert(says(errors, "o.gguf"));
    ck_assert(says(errors, "File too large"));
    must_run("cat $T/d/o.gguf; ls -A $T/d | wc -l");
    ck_assert_str_eq(out, "old\n1\n");
}
END_TEST

int main(void)
{
    Suite *s = suite_create("cli");
    TCase *t = tcase_create("cli");

    tcase_add_checked_fixture(t, setup, teardown);
    tcase_set_timeout(t, 120);
    tcase_add_test(t, help_of_the_program_fits_a_screen);
    tcase_add_loop_test(t, every_subcommand_helps_with_an_example, 0, N_COMMANDS);
    tcase_add_test(t, page_and_completion_know_every_option);
    tcase_add_test(t, completion_is_bash_and_completes);
    tcase_add_loop_test(t, wrong_usage_is_2_and_says_what, 0, (int)(sizeof wrong / sizeof *wrong));
    tcase_add_loop_test(t, missing_file_is_1_and_named, 0, 10);
    tcase_add_loop_test(t, every_option_of_the_table_is_taken, 0, N_COMMANDS);
    tcase_add_test(t, tokenize_goes_there_and_back);
    tcase_add_test(t, info_tells_sizes);
    tcase_add_test(t, info_hides_escapes_of_a_file_from_the_terminal);
    tcase_add_test(t, plan_describes_and_saves);
    tcase_add_test(t, plan_of_a_shape_and_of_a_beginning);
    tcase_add_test(t, saved_plan_is_run);
    tcase_add_test(t, run_is_the_same_for_the_same_seed);
    tcase_add_test(t, traces_are_not_those_of_the_steps);
    tcase_add_test(t, full_context_is_told_with_numbers);
    tcase_add_test(t, closed_pipe_and_full_disk_are_failures);
    tcase_add_test(t, logits_do_not_depend_on_the_cut);
    tcase_add_test(t, perplexity_is_that_of_the_logits);
    tcase_add_test(t, bench_reports_its_tests);
    tcase_add_test(t, chat_reads_messages_from_a_pipe);
    tcase_add_test(t, chat_forgets_a_variable_of_the_template);
    tcase_add_test(t, answer_is_not_what_the_grammar_says);
    tcase_add_test(t, chat_keeps_its_cache_between_turns);
    tcase_add_test(t, chat_with_a_full_context_drops_nothing_silently);
    tcase_add_test(t, prompt_is_cut_at_a_zero_byte);
    if (!getenv("FERRY_TESTS_VALGRIND")) /* it ends in the handler of a signal, and frees nothing */
        tcase_add_test(t, file_cut_short_under_its_mapping_dumps_core);
    tcase_add_test(t, quantized_file_does_not_run);
    tcase_add_test(t, dry_run_writes_or_lies);
    tcase_add_test(t, failed_quantization_leaves_or_takes_files);
#ifndef HAVE_ASAN
    if (!getenv("FERRY_TESTS_VALGRIND")) /* nor does that */
        tcase_add_test(t, no_memory_hangs_at_exit);
#endif
    tcase_add_test(t, interrupt_keeps_what_was_said);
    suite_add_tcase(s, t);
    t = tcase_create("probe");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_set_timeout(t, 600);
    if (!getenv("FERRY_TESTS_VALGRIND")) /* it measures until it is steady, which it never is there */
        tcase_add_test(t, probed_rates_are_used_by_all);
    suite_add_tcase(s, t);
    return run_suite(s);
}
