/* A list of names and values, each in memory of its own. Whether a template reads them is the library's to say. */
#include "src/cli/vars.h"

#include "src/base/err.h"
#include "src/base/mem.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static char *copy_of(const char *text, size_t n)
{
    char *s = mem_alloc(n + 1, MEM_OTHER);

    if (s) {
        memcpy(s, text, n);
        s[n] = '\0';
    }
    return s;
}

static void done_one(struct ferry_var *v)
{
    mem_free((char *)v->name);
    mem_free((char *)v->text);
    *v = (struct ferry_var){0};
}

/* (n_name) bytes of name. */
static int put(struct vars *vars, const char *name, size_t n_name, const struct ferry_var *var)
{
    size_t i = 0;

    while (i < vars->n && (strlen(vars->v[i].name) != n_name || memcmp(vars->v[i].name, name, n_name)))
        i++;
    if (i == VARS_MAX)
        return err(ERR_LIMIT, "more than %d variables of the chat template", VARS_MAX);
    struct ferry_var v = {.name = copy_of(name, n_name), .kind = var->kind, .number = var->number};
    if (var->kind == FERRY_VAR_TEXT)
        v.text = copy_of(var->text, strlen(var->text));
    if (!v.name || (var->kind == FERRY_VAR_TEXT && !v.text)) {
        done_one(&v);
        return err(ERR_NOMEM, "a variable of the chat template");
    }
    if (i < vars->n)
        done_one(&vars->v[i]);
    else
        vars->n++;
    vars->v[i] = v;
    return 0;
}

int vars_put(struct vars *vars, const struct ferry_var *var)
{
    return put(vars, var->name, strlen(var->name), var);
}

static bool is_whole(const char *text, int64_t *out)
{
    char *end;

    errno = 0;
    long long x = strtoll(text, &end, 10);
    *out = x;
    return (*text == '-' || (*text >= '0' && *text <= '9')) && !*end && !errno;
}

int vars_read(struct vars *vars, const char *text)
{
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789";
    size_t n = strspn(text, letters);

    if (!n || text[n] != '=' || (*text >= '0' && *text <= '9'))
        return err(ERR_ARG, "\"%.60s\" is not NAME=VALUE, as in enable_thinking=false", text);
    struct ferry_var v = {.kind = FERRY_VAR_TEXT, .text = text + n + 1};
    if (!strcmp(v.text, "true") || !strcmp(v.text, "false")) {
        v.kind = FERRY_VAR_BOOL;
        v.number = *v.text == 't';
    } else if (is_whole(v.text, &v.number)) {
        v.kind = FERRY_VAR_INT;
    }
    return put(vars, text, n, &v);
}

int vars_add(struct vars *vars, const struct vars *from)
{
    int rc = 0;

    for (size_t i = 0; i < from->n && !rc; i++)
        rc = vars_put(vars, &from->v[i]);
    return rc;
}

void vars_done(struct vars *vars)
{
    for (size_t i = 0; i < vars->n; i++)
        done_one(&vars->v[i]);
    vars->n = 0;
}

struct ferry_chat_opts vars_opts(const struct vars *vars)
{
    struct ferry_chat_opts o;

    ferry_chat_opts_init(&o);
    o.vars = vars->v;
    o.n_vars = vars->n;
    return o;
}
