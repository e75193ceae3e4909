/* Owns CACHE/ferry/machine.json. */
#include "src/cli/profile.h"

#include "cpu/cpu.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/cli/text.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int profile_find(struct machine *m)
{
    int rc = machine_find(m);

    for (const char *const *name = cpu_isa_names(); !rc && *name; name++) {
        if (cpu_isa_has(*name)) {
            snprintf(m->isa, sizeof m->isa, "%s", *name);
            break;
        }
    }
    return rc;
}

static int make_path(const struct conf *conf, char **out)
{
    size_t n = (conf->cache_dir ? strlen(conf->cache_dir) : 0) + sizeof "/machine.json";

    *out = NULL;
    if (!conf->cache_dir)
        return err(ERR_STATE, "no cache folder: neither XDG_CACHE_HOME nor HOME names an absolute path");
    *out = mem_alloc(n, MEM_OTHER);
    if (!*out)
        return err(ERR_NOMEM, "a path of %zu bytes", n);
    snprintf(*out, n, "%s/machine.json", conf->cache_dir);
    return 0;
}

int profile_path(const struct conf *conf, char **out)
{
    *out = NULL;
    if (!conf->cache_dir)
        return 0;
    int rc = make_path(conf, out);
    if (!rc && access(*out, F_OK)) {
        mem_free(*out);
        *out = NULL;
    }
    return rc;
}

int profile_load(const struct conf *conf, const char *model, struct machine *m)
{
    struct text text = {0};
    char *path = NULL;

    int rc = profile_path(conf, &path);
    if (rc || !path)
        return rc;
    rc = text_read(&text, path, 1 << 20);
    if (!rc) {
        rc = machine_take_rates(text_str(&text), model, m);
        if (rc)
            rc = err(rc, "%s: %s (ferry probe writes it anew)", path, err_text());
    }
    text_done(&text);
    mem_free(path);
    return rc;
}

/* As mkdir -p; the path is put back together on the way. */
static int make_dirs(char *path)
{
    for (char *p = strchr(path + 1, '/'); p; p = strchr(p + 1, '/')) {
        *p = '\0';
        int failed = mkdir(path, 0700) && errno != EEXIST;
        int reason = errno;
        if (failed) {
            int rc = err(ERR_IO, "folder %s: %s", path, strerror(reason));
            *p = '/';
            return rc;
        }
        *p = '/';
    }
    return 0;
}

int profile_write(const char *path, const char *text)
{
    size_t n = strlen(path) + sizeof ".tmp";
    char *name = mem_alloc(n, MEM_OTHER);

    if (!name)
        return err(ERR_NOMEM, "a path of %zu bytes", n);
    snprintf(name, n, "%s.tmp", path);
    FILE *f = fopen(name, "we");
    bool ok = f && fputs(text, f) >= 0;
    ok = ok && !fflush(f) && !fsync(fileno(f));
    int reason = errno;
    if (f && fclose(f) && ok) {
        ok = false;
        reason = errno;
    }
    if (ok && rename(name, path)) {
        ok = false;
        reason = errno;
    }
    if (!ok && f)
        unlink(name);
    mem_free(name);
    return ok ? 0 : err(ERR_IO, "%s: %s", path, strerror(reason));
}

int profile_save(const struct conf *conf, const struct machine *m, char **path)
{
    char *text = NULL;
    int rc = make_path(conf, path);

    if (!rc)
        rc = make_dirs(*path);
    if (!rc)
        rc = machine_to_json(m, &text);
    if (!rc)
        rc = profile_write(*path, text);
    mem_free(text);
    if (rc) {
        mem_free(*path);
        *path = NULL;
    }
    return rc;
}
