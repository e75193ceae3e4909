/* Any bytes as a line of ferry batch's input, for answers, --score and --embed: it is read, or refused with a text; its error record is a
 * line that is recognized again; nothing stays behind. */
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/cli/batch_line.h"
#include "src/cli/batch_record.h"
#include "tests/fuzz/fuzz.h"

#include <stdlib.h>
#include <string.h>

static void read_one(const struct conf *conf, const char *data, size_t n)
{
    struct batch_line line;
    struct batch_key key = {0, 0};
    char *text = NULL;
    size_t n_bytes;

    err_clear();
    int rc = batch_line_read(conf, data, n, 7, &line);
    if (rc && !*err_text())
        abort();
    if (!rc && (line.n < 1 || line.n > BATCH_MAX_N))
        abort();
    json_t *record = batch_record_error(&line, 0, rc ? rc : ERR_FORMAT, err_text());
    if (batch_record_text(record, &text, &n_bytes) || memchr(text, '\n', n_bytes))
        abort();
    if (batch_record_key(text, n_bytes, &key) || key.line != 7 || key.index != 0)
        abort();
    batch_record_key(data, n, &key);
    json_decref(record);
    mem_free(text);
    batch_line_done(&line);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    uint64_t live = mem_live_bytes(MEM_OTHER);

    for (int what = 0; what < 3; what++)
        read_one(
            &(struct conf){
                .temperature = 0.8, .repeat_penalty = 1, .score = what == 1, .embed = what == 2 ? "mean" : NULL},
            (const char *)data, n);
    if (mem_live_bytes(MEM_OTHER) != live)
        abort();
    return 0;
}
