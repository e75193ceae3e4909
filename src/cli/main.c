/* The table of subcommands, and nothing that one of them does. */
#include "src/cli/cmd.h"
#include "src/cli/conf.h"
#include "src/model/json_room.h"
#include "src/ferry.h"

#include "src/base/err.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

static const struct conf_command commands[] = {
    {"chat", "talk with a model", "MODEL [options]",
     "Talk with a model, word by word as it answers. Ctrl-C stops an answer and keeps the conversation; at the "
     "prompt it clears the line, and twice in a row on an empty one it ends the chat, as does the end of input. "
     "A line that ends in a backslash goes on in the next one; \"\"\" begins and ends a message of several "
     "lines. /help lists the commands.\n"
     "Without a terminal every line of stdin is a message and stdout carries the answers.",
     "ferry chat model.gguf --ram 8G", 1, 1, cmd_chat},
    {"run", "answer one prompt", "MODEL (-p TEXT | -f FILE) [options]",
     "Answer one prompt: the answer goes to stdout, statistics go to stderr. Ctrl-C stops; what was said so far stays.",
     "ferry run model.gguf -p 'Why is the sky blue?' --temp 0 -n 200", 1, 1, cmd_run},
    {"batch", "answer many prompts, resumable", "MODEL -i IN.jsonl -o OUT.jsonl [options]",
     "Answer many prompts together, at the best total speed. A request is an object of JSON on a line of its own: "
     "{\"id\", \"prompt\" or \"messages\", and options}, or OpenAI's batch form. prompt is continued as it is, "
     "messages "
     "go through the model's template. Options: max_tokens, n, temperature, top_p, top_k, min_p, seed, stop, "
     "ignore_eos, logprobs, penalties, chat_template_kwargs, reasoning_effort, response_format (or grammar, "
     "json_schema); what a request leaves out is taken from "
     "the command line. A line that cannot be read becomes a record with an \"error\". What a model thought before it "
     "answered messages is kept apart, in \"reasoning_content\".\n"
     "With --embed a request is {\"id\", \"input\"}, a text, token ids or a list of such (at most 64), or OpenAI's "
     "form for "
     "/v1/embeddings; its record holds the pooled final hidden state of the input, which no chat template wraps.\n"
     "After a crash or Ctrl-C the same command goes on where it stopped. Ctrl-C finishes the answers in flight; a "
     "second one stops at once.\n"
     "Under mpirun or srun, where ferry was built --with-mpi, rank 0 reads the input and writes the output, and all "
     "ranks "
     "answer. When one is lost, an MPI with fault tolerance goes on without it (Open MPI 5: --with-ft ulfm; not "
     "without rank 0); "
     "any other ends the job, and the same command goes on.\n"
     "Each answer is bit for bit what ferry run says alone, whatever runs beside it. Without a seed of its own, answer "
     "i (from 0) of line l has the seed --seed + 64 (l - 1) + i.",
     "ferry batch model.gguf -i prompts.jsonl -o answers.jsonl --temp 0 -n 200\n"
     "ferry batch model.gguf -i texts.jsonl -o vectors.jsonl --embed mean",
     1, 1, cmd_batch},
    {"plan", "what would go where, how fast, and why", "MODEL [options]",
     "Say what would be held where, how many bytes each purpose takes and how fast it should run. Reads only "
     "the model's header: the beginning of a download is enough, and MODEL may also be the name of a shape: "
     "qwen3-30b-a3b, olmoe-1b-7b, mixtral-8x7b, gpt-oss-20b, gpt-oss-120b, glm-4.5-air, glm-4.5, minimax-m2, "
     "deepseek-v2-lite, deepseek-v3, kimi-k2, glm-4.7-flash, small-qwen3moe. The machine is this one, with the rates "
     "that "
     "ferry probe saved, unless options describe another.",
     "ferry plan model.gguf --ram 8G --explain\nferry plan qwen3-30b-a3b --ram 32G --mem-rate 60G/s --cores 8", 1, 1,
     cmd_plan},
    {"probe", "measure this machine", "[PATH] [options]",
     "Measure memory, kernels, a GPU if there is one and, if a path is given, the disk that it lies on (a file is read "
     "past the page "
     "cache; in a folder files of 512 MiB are made and deleted). Takes half a minute, and wants a machine that does "
     "nothing else. The result is saved: plans of ferry plan, run, chat and bench predict with it.",
     "ferry probe model.gguf", 0, 1, cmd_probe},
    {"bench", "speed of prefill and decode", "MODEL [options]",
     "Measure the speed of a prompt (ppN) and of generated tokens (tgN), the bytes that moved, and the share of "
     "what memory could give, measured in the same run. Tokens are drawn uniformly from the vocabulary by "
     "--seed; one repetition warms up and does not count.\n"
     "With -s the same of S sequences together (sSppN, sStgN): all prompts; then steps in which each goes on by a "
     "token, "
     "drawn almost evenly from the likeliest 40.",
     "ferry bench model.gguf -p 512 -n 64 -r 3\nferry bench model.gguf -n 64 -s 16", 1, 1, cmd_bench},
    {"eval", "logits of given tokens, or perplexity of a text",
     "MODEL (--tokens IDS --logits FILE | --text FILE) [options]",
     "Write the logits of exactly these token ids, or say the perplexity of a text, which is cut into windows "
     "of --ctx tokens (default 512), of which the second half counts.",
     "ferry eval model.gguf --tokens 1,2,3 --logits out.f32\nferry eval model.gguf --text book.txt --ctx 512", 1, 1,
     cmd_eval},
    {"info", "metadata, tensors and sizes", "MODEL [options]",
     "Say what a GGUF file holds: metadata, sizes by type and by role. Reads only the header; the file may be "
     "of a family that ferry cannot run.",
     "ferry info model.gguf --tensors", 1, 1, cmd_info},
    {"tokenize", "text to token ids, and back", "MODEL [options]",
     "Text on stdin becomes one JSON array of token ids on stdout. Works on files that hold a vocabulary only.",
     "echo -n 'Hello world' | ferry tokenize model.gguf\necho '[1,2,3]' | ferry tokenize model.gguf --decode", 1, 1,
     cmd_tokenize},
    {"quantize", "make a model file smaller", "IN OUT TYPE [options]",
     "Write IN again as OUT, a GGUF file of another TYPE: Q2_K, Q2_K_S, Q3_K_S, Q3_K_M, Q3_K_L, IQ4_XS, IQ4_NL, Q4_0, "
     "Q4_1, "
     "Q4_K_S, Q4_K_M, Q5_0, Q5_1, Q5_K_S, Q5_K_M, Q6_K, Q8_0, MXFP4, MXFP4_MOE, F16, BF16, F32. The names and mixtures "
     "are "
     "llama.cpp's. Norms, biases and routers stay as they are. OUT appears when it is whole; whatever "
     "happens before leaves what was there.\n"
     "IN may be of any family, in one file or in parts, and larger than memory. It should hold 16 or 32 bits a "
     "weight: what is quantized already can be made smaller still, but loses more than its original would.",
     "ferry quantize model-f16.gguf model-q4_k_m.gguf Q4_K_M --imatrix model.imatrix\n"
     "ferry quantize model-f16.gguf --dry-run",
     1, 3, cmd_quantize},
    {NULL, NULL, NULL, NULL, NULL, 0, 0, NULL},
};

/* Say what was asked about the program itself. */
static void print_found(enum conf_found found, const struct conf_command *command)
{
    switch (found) {
    case CONF_FOUND_COMMAND:
        break;
    case CONF_FOUND_HELP:
        if (command)
            conf_help_command(stdout, command);
        else
            conf_help(stdout, commands);
        break;
    case CONF_FOUND_VERSION:
        printf("ferry %s\n", ferry_version());
        break;
    case CONF_FOUND_MAN_PAGE:
        conf_help_man_page(stdout, commands, ferry_version());
        break;
    case CONF_FOUND_COMPLETION:
        conf_help_completion(stdout, commands);
        break;
    }
}

/* What was written may still be in the buffer, where a full disk or a closed pipe has not been met yet. */
static int close_stdout(int status)
{
    bool failed = ferror(stdout) != 0;

    errno = 0;
    failed = fclose(stdout) != 0 || failed;
    if (!failed)
        return status;
    fprintf(stderr, "ferry: writing to stdout failed%s%s\n", errno ? ": " : "", errno ? strerror(errno) : "");
    return status == CONF_EXIT_DONE ? CONF_EXIT_FAILED : status;
}

/* A mapped file that is cut short, or whose disk fails, is noticed only when its bytes are touched. Nothing can be resumed
 * then, but the user can be told. */
static void say_bus_error(int number, siginfo_t *info, void *context)
{
    static const char text[] =
        "\nferry: the mapped model file cannot be read any more: it was cut short, or its disk failed\n"
        "Other ways than --io mmap read it once, and need it no longer.\n";

    (void)context;
    if (info->si_code == BUS_ADRERR) {
        ssize_t n = write(STDERR_FILENO, text, sizeof text - 1);
        (void)n; /* there is nobody else to tell */
        _exit(CONF_EXIT_FAILED);
    }
    signal(number, SIG_DFL);
    raise(number);
}

/* Where address space is limited (ulimit -v), leave without the exit handlers of libraries: OpenBLAS waits in its own for a
 * thread that asks for memory in vain, for ever. */
static int leave(int status)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
        _exit(status);
    return status;
}

int main(int argc, char **argv)
{
    const struct conf_command *command = NULL;
    enum conf_found found = CONF_FOUND_HELP;
    struct conf conf;
    int status = CONF_EXIT_DONE;

    /* A closed pipe and a limit on sizes are then failed writes, which are told like any other. */
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    sigaction(SIGBUS, &(struct sigaction){.sa_sigaction = say_bus_error, .sa_flags = SA_SIGINFO}, NULL);
    json_room_begin();
    int rc = conf_parse(commands, argc, argv, &conf, &found, &command);
    if (rc) {
        fprintf(stderr, "ferry: %s\nTry: ferry %s%s--help\n", err_text(), command ? command->name : "",
                command ? " " : "");
        status = rc == ERR_ARG ? CONF_EXIT_USAGE : CONF_EXIT_FAILED;
    } else if (found == CONF_FOUND_COMMAND) {
        status = command->run(&conf);
    } else {
        print_found(found, command);
    }
    conf_done(&conf);
    return leave(close_stdout(status));
}
