/* ferry tokenize: text to ids and back; needs a vocabulary and nothing else. */
#include "src/cli/cmd.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/cli/term.h"
#include "src/cli/text.h"
#include "src/model/gguf.h"
#include "src/model/tok.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>

static int encode(const struct tok *tok, const struct text *in, const struct conf *conf)
{
    unsigned flags = (conf->special ? TOK_SPECIAL : 0) | (conf->bos ? TOK_BOS : 0);
    int32_t *ids = NULL;
    int64_t n = 0;
    int rc = tok_encode(tok, text_str(in), in->n_bytes, flags, &ids, &n);

    if (rc)
        return rc;
    putchar('[');
    for (int64_t i = 0; i < n; i++)
        printf("%s%" PRId32, i ? ", " : "", ids[i]);
    puts("]");
    mem_free(ids);
    return 0;
}

/* The ids of a JSON array; *ids is the caller's. */
static int read_ids(const struct text *in, int32_t **ids, int64_t *n)
{
    json_error_t e;
    json_t *a = json_loadb(text_str(in), in->n_bytes, 0, &e);
    int rc = 0;

    *ids = NULL;
    *n = 0;
    if (!a)
        return err(ERR_FORMAT, "stdin: line %d: %s; --decode wants a JSON array of token ids", e.line, e.text);
    size_t n_ids = json_array_size(a);
    if (!json_is_array(a))
        rc = err(ERR_FORMAT, "stdin: --decode wants a JSON array of token ids");
    else if (!(*ids = mem_zalloc(n_ids, sizeof **ids, MEM_TOK)))
        rc = err(ERR_NOMEM, "%zu token ids", n_ids);
    for (size_t i = 0; i < n_ids && !rc; i++) {
        json_int_t id = json_integer_value(json_array_get(a, i));
        if (!json_is_integer(json_array_get(a, i)) || id < 0 || id > INT32_MAX)
            rc = err(ERR_FORMAT, "stdin: element %zu of the array is no token id", i);
        else
            (*ids)[i] = (int32_t)id;
    }
    *n = (int64_t)n_ids;
    json_decref(a);
    return rc;
}

static int decode(const struct tok *tok, const struct text *in, const struct conf *conf)
{
    int32_t *ids;
    int64_t n, n_bytes;
    char *text = NULL;
    int rc = read_ids(in, &ids, &n);

    if (!rc)
        rc = tok_decode(tok, ids, n, TOK_TRIM | (conf->special ? TOK_SPECIAL : 0), &text, &n_bytes);
    if (!rc)
        fwrite(text, 1, (size_t)n_bytes, stdout);
    mem_free(text);
    mem_free(ids);
    return rc;
}

int cmd_tokenize(const struct conf *conf)
{
    struct text in = {0};
    struct gguf *gguf = NULL;
    struct tok *tok = NULL;
    int rc = gguf_open(conf->model, NULL, &gguf);

    if (!rc)
        rc = tok_from_gguf(gguf, &tok);
    gguf_close(gguf);
    if (!rc)
        rc = text_read(&in, "-", GIB);
    if (!rc)
        rc = conf->decode ? decode(tok, &in, conf) : encode(tok, &in, conf);
    tok_free(tok);
    text_done(&in);
    return rc ? term_fail(rc) : CONF_EXIT_DONE;
}
