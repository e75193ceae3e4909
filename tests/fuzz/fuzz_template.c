/* Any bytes as a chat template: it parses or is refused, rendering ends in a text or an error, within the bounds, and nothing
 * stays behind. */
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/template.h"
#include "tests/fuzz/fuzz.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static const struct template_message messages[] = {
        {"system", " Be \xc3\xa9kind. "}, {"user", "Hi\n'x' \"y\""}, {"assistant", ""}};
    static const struct template_var vars[] = {{"enable_thinking", TEMPLATE_BOOL, 1, NULL}};
    static const struct template_args args = {.messages = messages,
                                              .n_messages = 3,
                                              .add_generation_prompt = true,
                                              .bos = "<s>",
                                              .eos = "</s>",
                                              .vars = vars,
                                              .n_vars = 1,
                                              .now_s = 1763856000};
    struct template_code *t = NULL;
    char *text = NULL;
    size_t n_bytes = 0;
    uint64_t live = mem_live_bytes(MEM_OTHER);

    err_clear();
    int rc = template_make((const char *)data, n, &t);
    if (rc == 0)
        rc = template_render(t, &args, &text, &n_bytes);
    if (rc == 0 && strlen(text) > n_bytes)
        abort();
    if (rc && (text || !*err_text()))
        abort();
    mem_free(text);
    template_free(t);
    if (mem_live_bytes(MEM_OTHER) != live)
        abort();
    return 0;
}
