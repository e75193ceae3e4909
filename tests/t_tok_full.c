/* t_tok_full DIR: whole vocabulary files, ggml-vocab-NAME.gguf, with the texts (.inp) and ids (.out) beside them, as llama.cpp has them
 * in models/. t_tok_full FILE.gguf TEXT: the ids of a text, one a line, to hold against another program's. */
#include "src/base/err.h"
#include "src/base/log.h"
#include "src/base/mem.h"
#include "src/model/gguf.h"
#include "src/model/tok.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char *read_file(const char *path, size_t *n)
{
    FILE *f = fopen(path, "rb");
    if (!f)
        return NULL;
    fseek(f, 0, SEEK_END);
    long size = ftell(f);
    rewind(f);
    char *p = calloc((size_t)size + 1, 1);
    *n = p ? fread(p, 1, (size_t)size, f) : 0;
    fclose(f);
    return p;
}

static struct tok *open_tok(const char *path)
{
    struct gguf *g = NULL;
    struct tok *tok = NULL;
    if (gguf_open(path, NULL, &g) || tok_from_gguf(g, &tok))
        fprintf(stderr, "%s: %s\n", path, err_text());
    gguf_close(g);
    return tok;
}

/* Texts end at the mark, each line of out holds the ids of one. The number of texts that differ. */
static int compare(const struct tok *tok, const char *name, char *inp, char *out)
{
    static const char mark[] = "\n__ggml_vocab_test__\n";
    int n_bad = 0;
    while (inp) {
        char *next = strstr(inp, mark), *line = strchr(out, '\n');
        int32_t *ids = NULL;
        int64_t n = 0, at = 0;
        if (tok_encode(tok, inp, next ? (size_t)(next - inp) : strlen(inp), 0, &ids, &n))
            return 1;
        bool same = true;
        for (char *p = out, *end; p < (line ? line : p + strlen(p)); p = end) {
            long id = strtol(p, &end, 10);
            if (end == p)
                break;
            same &= at < n && ids[at] == id;
            at++;
        }
        if (!same || at != n) {
            fprintf(stderr, "%s: '%.*s'\n", name, next ? (int)(next - inp) : (int)strlen(inp), inp);
            n_bad++;
        }
        mem_free(ids);
        inp = next ? next + sizeof mark - 1 : NULL;
        out = line ? line + 1 : out + strlen(out);
    }
    return n_bad;
}

static int check_dir(const char *dir)
{
    DIR *d = opendir(dir);
    struct dirent *e;
    int n_bad = 0, n_files = 0;
    while (d && (e = readdir(d)) != NULL) {
        char path[1200];
        size_t n;
        char *dot = strstr(e->d_name, ".gguf.inp");
        if (!dot)
            continue;
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        char *inp = read_file(path, &n);
        memcpy(strstr(path, ".gguf.inp") + 5, ".out", 5);
        char *out = read_file(path, &n);
        *(strstr(path, ".gguf.out") + 5) = 0;
        struct tok *tok = open_tok(path);
        if (tok && inp && out) {
            int bad = compare(tok, e->d_name, inp, out);
            printf("%s: %s, %d tokens: %d texts differ\n", e->d_name, tok_pre_name(tok), (int)tok_n_vocab(tok), bad);
            n_bad += bad;
            n_files++;
        }
        tok_free(tok);
        free(inp);
        free(out);
    }
    if (d)
        closedir(d);
    return n_bad || !n_files;
}

static int print_ids(const char *model, const char *text_file)
{
    size_t bytes;
    int32_t *ids = NULL;
    int64_t n = 0;
    char *text = read_file(text_file, &bytes);
    struct tok *tok = open_tok(model);
    int rc = tok && text ? tok_encode(tok, text, bytes, 0, &ids, &n) : 1;
    for (int64_t i = 0; i < n; i++)
        printf("%d\n", (int)ids[i]);
    mem_free(ids);
    tok_free(tok);
    free(text);
    return rc != 0;
}

int main(int argc, char **argv)
{
    if (argc == 3)
        return print_ids(argv[1], argv[2]);
    if (argc == 2)
        return check_dir(argv[1]);
    printf("skipped: give the folder of ggml-vocab-*.gguf (models/ of llama.cpp) as argument\n");
    return 77;
}
