/* Memory and cpu limits as the kernel's files tell them: /proc/meminfo, cgroup v1 and v2, at every level of the path, of
 * which the tightest counts. */
#include "src/plan/machine.h"

#include "src/base/err.h"
#include "src/base/size.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NO_LIMIT UINT64_MAX
/* cgroup v1 writes "none" as the largest multiple of a page below 2^63. */
#define V1_NO_LIMIT ((uint64_t)1 << 62)

enum { PATH_BYTES = 2048, LINE_BYTES = 4096 };

/* One cgroup hierarchy: where it is mounted, and where this process is in it. */
struct hierarchy {
    char mount[PATH_BYTES]; /* with root in front */
    char path[PATH_BYTES];  /* below mount; "" for mount itself */
};

static FILE *open_file(const char *dir, const char *name)
{
    char path[2 * PATH_BYTES];

    snprintf(path, sizeof path, "%s/%s", dir, name);
    return fopen(path, "re");
}

/* The number in a file of one; "max" is no limit. false, and *out untouched, where there is none. */
static bool read_number(const char *dir, const char *name, uint64_t *out)
{
    char line[64], *end;
    FILE *f = open_file(dir, name);

    if (!f)
        return false;
    bool ok = fgets(line, sizeof line, f) != NULL;
    fclose(f);
    if (!ok)
        return false;
    if (!strncmp(line, "max", 3)) {
        *out = NO_LIMIT;
        return true;
    }
    errno = 0;
    unsigned long long x = strtoull(line, &end, 10);
    if (end == line || errno || line[0] == '-')
        return false;
    *out = x;
    return true;
}

/* Sum of the named lines ("key number") of a file; separator ' ' or ':'. */
static uint64_t read_keys(const char *dir, const char *name, const char *const *keys)
{
    char line[LINE_BYTES];
    uint64_t sum = 0;
    FILE *f = open_file(dir, name);

    if (!f)
        return 0;
    while (fgets(line, sizeof line, f)) {
        size_t n = strcspn(line, " :\t");
        for (int i = 0; keys[i]; i++) {
            if (strlen(keys[i]) == n && !memcmp(keys[i], line, n))
                sum += strtoull(line + n + strspn(line + n, " :\t"), NULL, 10);
        }
    }
    fclose(f);
    return sum;
}

/* Is `word` one of the words of a list with commas between them? */
static bool has_word(const char *list, const char *word)
{
    size_t n = strlen(word);

    for (; *list; list += strcspn(list, ","), list += *list == ',') {
        if (strcspn(list, ",\n") == n && !memcmp(list, word, n))
            return true;
    }
    return false;
}

/* The process's path in a hierarchy (controller NULL: v2's) from /proc/self/cgroup: "4:memory:/a/b". */
static bool find_path(const char *root, const char *controller, char *out)
{
    char dir[PATH_BYTES], line[LINE_BYTES];
    bool found = false;

    snprintf(dir, sizeof dir, "%s/proc/self", root);
    FILE *f = open_file(dir, "cgroup");
    if (!f)
        return false;
    while (!found && fgets(line, sizeof line, f)) {
        char *names = strchr(line, ':');
        char *path = names ? strchr(names + 1, ':') : NULL;
        if (!path)
            continue;
        *path++ = '\0';
        names++;
        path[strcspn(path, "\n")] = '\0';
        found = controller ? has_word(names, controller) : !*names;
        if (found)
            snprintf(out, PATH_BYTES, "%.*s", PATH_BYTES - 1, path);
    }
    fclose(f);
    return found;
}

/* "ID PARENT DEV ROOT MOUNT OPTIONS ... - TYPE SOURCE SUPEROPTIONS" of /proc/self/mountinfo. */
static bool is_mount_of(char *line, const char *controller, char **mount_root, char **mount)
{
    char *rest = strstr(line, " - "), *save, *type, *options;

    if (!rest)
        return false;
    *rest = '\0';
    type = strtok_r(rest + 3, " \n", &save);
    strtok_r(NULL, " \n", &save);
    options = strtok_r(NULL, " \n", &save);
    if (!type || strcmp(type, controller ? "cgroup" : "cgroup2"))
        return false;
    if (controller && (!options || !has_word(options, controller)))
        return false;
    for (int i = 0; i < 3; i++) {
        if (!strtok_r(i ? NULL : line, " ", &save))
            return false;
    }
    *mount_root = strtok_r(NULL, " ", &save);
    *mount = strtok_r(NULL, " ", &save);
    return *mount_root && *mount;
}

/* Where the hierarchy is mounted and what part of it shows there (in a container, often not the root). */
static void find_mount(const char *root, const char *controller, struct hierarchy *h, char *shown)
{
    char dir[PATH_BYTES], line[LINE_BYTES], *mount_root, *mount;

    snprintf(h->mount, sizeof h->mount, "%s/sys/fs/cgroup%s%s", root, controller ? "/" : "",
             controller ? controller : "");
    snprintf(shown, PATH_BYTES, "/");
    snprintf(dir, sizeof dir, "%s/proc/self", root);
    FILE *f = open_file(dir, "mountinfo");
    if (!f)
        return;
    while (fgets(line, sizeof line, f)) {
        if (!is_mount_of(line, controller, &mount_root, &mount))
            continue;
        snprintf(h->mount, sizeof h->mount, "%s%.*s", root, PATH_BYTES / 2, mount);
        snprintf(shown, PATH_BYTES, "%.*s", PATH_BYTES - 1, mount_root);
        break;
    }
    fclose(f);
}

static bool find_hierarchy(const char *root, const char *controller, struct hierarchy *out)
{
    char shown[PATH_BYTES];

    if (!find_path(root, controller, out->path))
        return false;
    find_mount(root, controller, out, shown);
    size_t n = strcmp(shown, "/") ? strlen(shown) : 0;
    bool below = !strncmp(out->path, shown, n) && (!out->path[n] || out->path[n] == '/') && !strstr(out->path, "/..");
    /* A path that does not lie below what is mounted names nothing here: the mount point is the nearest that is known. */
    memmove(out->path, below ? out->path + n : "", below ? strlen(out->path + n) + 1 : 1);
    return true;
}

static void tighten(struct machine *m, uint64_t limit_bytes, uint64_t used_bytes, uint64_t cache_bytes)
{
    if (limit_bytes == NO_LIMIT)
        return;
    uint64_t kept_bytes = used_bytes > cache_bytes ? used_bytes - cache_bytes : 0;
    uint64_t free_bytes = limit_bytes > kept_bytes ? limit_bytes - kept_bytes : 0;
    if (limit_bytes < m->ram_limit_bytes)
        m->ram_limit_bytes = limit_bytes;
    if (free_bytes < m->ram_free_bytes)
        m->ram_free_bytes = free_bytes;
}

static void limit_cores(struct machine *m, uint64_t quota_us, uint64_t period_us)
{
    if (!quota_us || !period_us || quota_us == NO_LIMIT)
        return;
    uint64_t n = quota_us / period_us + (quota_us % period_us != 0);
    if (n < (uint64_t)m->n_cores)
        m->n_cores = (int)n;
}

static void read_v2(const char *dir, struct machine *m)
{
    static const char *const cache[] = {"active_file", "inactive_file", NULL};
    uint64_t max_bytes = NO_LIMIT, high_bytes = NO_LIMIT, used_bytes = 0;

    read_number(dir, "memory.max", &max_bytes);
    /* Above memory.high the kernel slows a process down until it is below: as good as a limit. */
    read_number(dir, "memory.high", &high_bytes);
    if (read_number(dir, "memory.current", &used_bytes))
        tighten(m, high_bytes < max_bytes ? high_bytes : max_bytes, used_bytes, read_keys(dir, "memory.stat", cache));

    char line[64];
    FILE *f = open_file(dir, "cpu.max");
    if (!f)
        return;
    uint64_t quota_us, period_us;
    if (fgets(line, sizeof line, f) && sscanf(line, "%" SCNu64 " %" SCNu64, &quota_us, &period_us) == 2)
        limit_cores(m, quota_us, period_us);
    fclose(f);
}

static void read_v1_memory(const char *dir, struct machine *m)
{
    static const char *const cache[] = {"total_active_file", "total_inactive_file", NULL};
    uint64_t limit_bytes, used_bytes;

    if (read_number(dir, "memory.limit_in_bytes", &limit_bytes) &&
        read_number(dir, "memory.usage_in_bytes", &used_bytes))
        tighten(m, limit_bytes >= V1_NO_LIMIT ? NO_LIMIT : limit_bytes, used_bytes,
                read_keys(dir, "memory.stat", cache));
}

static void read_v1_cpu(const char *dir, struct machine *m)
{
    uint64_t quota_us, period_us;

    /* -1, for no quota, is no number here. */
    if (read_number(dir, "cpu.cfs_quota_us", &quota_us) && read_number(dir, "cpu.cfs_period_us", &period_us))
        limit_cores(m, quota_us, period_us);
}

/* Every level from the process's own up to the mount point. */
static void walk_up(const char *root, const char *controller, void (*read)(const char *dir, struct machine *m),
                    struct machine *m)
{
    struct hierarchy h;
    char dir[2 * PATH_BYTES];

    if (!find_hierarchy(root, controller, &h))
        return;
    for (;;) {
        snprintf(dir, sizeof dir, "%s%s", h.mount, h.path);
        read(dir, m);
        char *slash = strrchr(h.path, '/');
        if (!slash)
            break;
        *slash = '\0';
    }
}

int machine_find_limits(const char *root, struct machine *m)
{
    static const char *const total[] = {"MemTotal", NULL}, *const available[] = {"MemAvailable", NULL};
    char dir[PATH_BYTES];

    snprintf(dir, sizeof dir, "%s/proc", root);
    m->ram_total_bytes = read_keys(dir, "meminfo", total) * KIB;
    m->ram_free_bytes = read_keys(dir, "meminfo", available) * KIB;
    m->ram_limit_bytes = NO_LIMIT;
    if (!m->ram_total_bytes)
        return err(ERR_IO, "%s/meminfo names no MemTotal", dir);
    walk_up(root, NULL, read_v2, m);
    walk_up(root, "memory", read_v1_memory, m);
    walk_up(root, "cpu", read_v1_cpu, m);
    return 0;
}
