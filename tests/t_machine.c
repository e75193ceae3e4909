/* Limits as trees of files tell them, and the machine that runs the test. */
#include "src/plan/machine.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "tests/live_bytes.h"
#include "tests/run_suite.h"

#include <check.h>
#include <dirent.h>
#include <fcntl.h>
#include <ftw.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char root[256];

static void setup(void)
{
    snprintf(root, sizeof root, "%s/t_machine-XXXXXX", TEST_BUILD_DIR);
    ck_assert_ptr_nonnull(mkdtemp(root));
}

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *where)
{
    (void)st;
    (void)kind;
    (void)where;
    return remove(path);
}

static void teardown(void)
{
    nftw(root, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

static void put(const char *name, const char *text)
{
    char path[1024];

    snprintf(path, sizeof path, "%s/%s", root, name);
    for (char *p = path + strlen(root) + 1; (p = strchr(p, '/')); p++) {
        *p = '\0';
        mkdir(path, 0700);
        *p = '/';
    }
    FILE *f = fopen(path, "w");
    ck_assert_msg(f != NULL, "%s", path);
    fputs(text, f);
    fclose(f);
}

static void put_ram(void)
{
    put("proc/meminfo",
        "MemTotal:       33554432 kB\nMemFree:         1000000 kB\nMemAvailable:   16777216 kB\nBuffers: 1 kB\n");
}

static struct machine find(void)
{
    struct machine m = {.n_cores = 16};

    ck_assert_msg(machine_find_limits(root, &m) == 0, "%s", err_text());
    return m;
}

START_TEST(no_cgroup_is_no_limit)
{
    put_ram();
    struct machine m = find();
    ck_assert_uint_eq(m.ram_total_bytes, 32 * GIB);
    ck_assert_uint_eq(m.ram_free_bytes, 16 * GIB);
    ck_assert_uint_eq(m.ram_limit_bytes, UINT64_MAX);
    ck_assert_int_eq(m.n_cores, 16);
}
END_TEST

START_TEST(no_meminfo_is_an_error)
{
    struct machine m = {.n_cores = 1};

    ck_assert_int_eq(machine_find_limits(root, &m), ERR_IO);
    ck_assert_ptr_nonnull(strstr(err_text(), "meminfo"));
}
END_TEST

START_TEST(v2_limit_of_a_parent_counts)
{
    put_ram();
    put("proc/self/cgroup", "0::/user.slice/app\n");
    put("sys/fs/cgroup/user.slice/app/memory.max", "max\n");
    put("sys/fs/cgroup/user.slice/app/memory.current", "1000\n");
    put("sys/fs/cgroup/user.slice/app/cpu.max", "max 100000\n");
    put("sys/fs/cgroup/user.slice/memory.max", "8589934592\n");
    put("sys/fs/cgroup/user.slice/memory.current", "3221225472\n");
    put("sys/fs/cgroup/user.slice/memory.stat", "anon 1073741824\nfile 2147483648\nactive_file 1073741824\n"
                                                "inactive_file 1073741824\nfile_mapped 5\n");
    put("sys/fs/cgroup/user.slice/cpu.max", "250000 100000\n");
    struct machine m = find();
    ck_assert_uint_eq(m.ram_limit_bytes, 8 * GIB);
    /* Of 3 GiB used, 2 are cache that can go. */
    ck_assert_uint_eq(m.ram_free_bytes, 7 * GIB);
    ck_assert_int_eq(m.n_cores, 3);
}
END_TEST

START_TEST(v2_tightest_of_the_path_counts_and_high_is_a_limit)
{
    put_ram();
    put("proc/self/cgroup", "0::/a/b\n");
    put("sys/fs/cgroup/a/memory.max", "4294967296\n");
    put("sys/fs/cgroup/a/memory.current", "3221225472\n");
    put("sys/fs/cgroup/a/b/memory.max", "3221225472\n");
    put("sys/fs/cgroup/a/b/memory.high", "2147483648\n");
    put("sys/fs/cgroup/a/b/memory.current", "0\n");
    struct machine m = find();
    ck_assert_uint_eq(m.ram_limit_bytes, 2 * GIB);
    /* The parent has only 1 GiB left, whatever the child may use. */
    ck_assert_uint_eq(m.ram_free_bytes, GIB);
}
END_TEST

START_TEST(v1_nested_limit_and_quota)
{
    put_ram();
    put("proc/self/cgroup", "4:memory:/box/job\n3:cpu,cpuacct:/box/job\n0::/\n");
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
    put("sys/fs/cgroup/memory/memory.usage_in_bytes", "30000000000\n");
    put("sys/fs/cgroup/memory/box/memory.limit_in_bytes", "6442450944\n");
    put("sys/fs/cgroup/memory/box/memory.usage_in_bytes", "2147483648\n");
    put("sys/fs/cgroup/memory/box/memory.stat",
        "cache 5\nactive_file 7\ntotal_active_file 536870912\ntotal_inactive_file 536870912\n");
    put("sys/fs/cgroup/memory/box/job/memory.limit_in_bytes", "9223372036854771712\n");
    put("sys/fs/cgroup/memory/box/job/memory.usage_in_bytes", "0\n");
    put("sys/fs/cgroup/cpu/box/cpu.cfs_quota_us", "400000\n");
    put("sys/fs/cgroup/cpu/box/cpu.cfs_period_us", "100000\n");
    put("sys/fs/cgroup/cpu/box/job/cpu.cfs_quota_us", "-1\n");
    put("sys/fs/cgroup/cpu/box/job/cpu.cfs_period_us", "100000\n");
    struct machine m = find();
    ck_assert_uint_eq(m.ram_limit_bytes, 6 * GIB);
    ck_assert_uint_eq(m.ram_free_bytes, 5 * GIB);
    ck_assert_int_eq(m.n_cores, 4);
}
END_TEST

START_TEST(container_sees_its_own_group_at_the_mount_point)
{
    put_ram();
    /* The path is the host's; what is mounted begins at the container's own group. */
    put("proc/self/cgroup", "4:memory:/docker/abc/inner\n0::/docker/abc\n");
    put("proc/self/mountinfo", "30 25 0:26 / /proc rw,nosuid - proc proc rw\n"
                               "31 25 0:27 /docker/abc /cg/mem ro,nosuid shared:9 - cgroup cgroup rw,memory\n"
                               "32 25 0:28 /elsewhere /cg/two ro - cgroup2 cgroup2 rw\n");
    put("cg/mem/memory.limit_in_bytes", "4294967296\n");
    put("cg/mem/memory.usage_in_bytes", "0\n");
    put("cg/mem/inner/memory.limit_in_bytes", "2147483648\n");
    put("cg/mem/inner/memory.usage_in_bytes", "1073741824\n");
    put("cg/two/memory.max", "1610612736\n");
    put("cg/two/memory.current", "0\n");
    struct machine m = find();
    ck_assert_uint_eq(m.ram_limit_bytes, 1536 * MIB);
    ck_assert_uint_eq(m.ram_free_bytes, GIB);
}
END_TEST

START_TEST(nonsense_in_limits_is_no_limit)
{
    put_ram();
    put("proc/self/cgroup", "garbage\n7:memory\n0::/x\n");
    put("proc/self/mountinfo", "short\n - cgroup2\n");
    put("sys/fs/cgroup/x/memory.max", "-5\n");
    put("sys/fs/cgroup/x/memory.current", "\n");
    put("sys/fs/cgroup/x/cpu.max", "0 0\n");
    struct machine m = find();
    ck_assert_uint_eq(m.ram_limit_bytes, UINT64_MAX);
    ck_assert_int_eq(m.n_cores, 16);
}
END_TEST

START_TEST(quota_below_one_core_leaves_one)
{
    put_ram();
    put("proc/self/cgroup", "0::/\n");
    put("sys/fs/cgroup/cpu.max", "5000 100000\n");
    ck_assert_int_eq(find().n_cores, 1);
}
END_TEST

/* ---- this machine ---- */

START_TEST(this_machine_is_found)
{
    struct machine m;

    ck_assert_msg(machine_find(&m) == 0, "%s", err_text());
    ck_assert_int_ge(m.n_cores, 1);
    ck_assert_uint_gt(m.ram_total_bytes, 0);
    ck_assert_uint_le(m.ram_free_bytes, m.ram_total_bytes);
    ck_assert(m.cpu_name[0] != '\0');
    ck_assert_uint_ne(m.identity, 0);
}
END_TEST

START_TEST(bound_process_has_the_cores_it_is_bound_to)
{
    cpu_set_t all, one;
    struct machine m;
    int cpu = 0;

    ck_assert_int_eq(sched_getaffinity(0, sizeof all, &all), 0);
    while (!CPU_ISSET(cpu, &all))
        cpu++;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    ck_assert_int_eq(sched_setaffinity(0, sizeof one, &one), 0);
    ck_assert_int_eq(machine_find(&m), 0);
    ck_assert_int_eq(m.n_cores, 1);
}
END_TEST

/* A file of 3 MiB. */
static void put_big(char path[512])
{
    char *big = calloc(1, 3 * MIB);

    snprintf(path, 512, "%s/file", root);
    FILE *f = fopen(path, "wb");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fwrite(big, 1, 3 * MIB, f), 3 * MIB);
    fclose(f);
    free(big);
}

START_TEST(disk_rate_is_measured_on_file_and_folder)
{
    char path[512];
    struct machine_disk disk;
    int n_left = 0;

    put_big(path);
    ck_assert_msg(machine_disk_measure(path, &disk) == 0, "%s", err_text());
    ck_assert_int_gt(disk.n_rates, 4);
    for (int i = 0; i < disk.n_rates; i++)
        ck_assert_double_gt(disk.rates[i].bytes_per_s, 1e6);
    char id[40];
    ck_assert_int_eq(machine_disk_id(root, id), 0);
    ck_assert_str_eq(disk.id, id);
    ck_assert_int_eq(truncate(path, 1000), 0);
    ck_assert_int_eq(machine_disk_measure(path, &disk), ERR_ARG);
    ck_assert_ptr_nonnull(strstr(err_text(), "1000 bytes"));
    mem_fail_nth(1);
    ck_assert_int_eq(truncate(path, (off_t)(2 * MIB)), 0);
    ck_assert_int_eq(machine_disk_measure(path, &disk), ERR_NOMEM);
    mem_fail_nth(0);
    unlink(path);
    ck_assert_int_eq(machine_disk_measure(path, &disk), ERR_IO);
    ck_assert_int_eq(machine_disk_measure("/dev/null", &disk), ERR_ARG);
    DIR *d = opendir(root);
    for (struct dirent *e; (e = readdir(d));)
        n_left += e->d_name[0] != '.' || strlen(e->d_name) > 2;
    closedir(d);
    ck_assert_int_eq(n_left, 0);
}
END_TEST

/* Goes and rests as often as one likes; what cannot be read any more is said when it rests. */
START_TEST(reader_goes_and_rests)
{
    struct machine_reader *r;
    char path[512];
    uint64_t before_bytes = live_bytes();
    int rc = ERR_NOMEM;

    put_big(path);
    for (uint64_t n = 1; rc; n++) {
        ck_assert_uint_lt(n, 10);
        mem_fail_nth(n);
        rc = machine_reader_open(path, 100 * MIB, &r);
        ck_assert(rc == 0 || (rc == ERR_NOMEM && !r && live_bytes() == before_bytes));
    }
    mem_fail_nth(0);
    ck_assert_int_eq(machine_reader_rest(r), 0);
    for (int i = 0; i < 3; i++) {
        ck_assert_int_eq(machine_reader_go(r), 0);
        ck_assert_int_eq(machine_reader_rest(r), 0);
    }
    ck_assert_int_eq(truncate(path, 0), 0);
    ck_assert_int_eq(machine_reader_go(r), 0);
    usleep(100000);
    ck_assert_int_eq(machine_reader_rest(r), ERR_IO);
    ck_assert_ptr_nonnull(strstr(err_text(), path));
    ck_assert_int_eq(truncate(path, (off_t)(3 * MIB)), 0); /* it is there again */
    ck_assert_int_eq(machine_reader_go(r), 0);
    ck_assert_int_eq(machine_reader_rest(r), 0);
    ck_assert_int_eq(machine_reader_go(r), 0);
    machine_reader_close(r); /* while it reads */
    machine_reader_close(NULL);
    ck_assert_uint_eq(live_bytes(), before_bytes);
    ck_assert_int_eq(truncate(path, 0), 0);
    ck_assert_int_eq(machine_reader_open(path, 0, &r), ERR_ARG);
    unlink(path);
    ck_assert_int_eq(machine_reader_open(path, 0, &r), ERR_IO);
    ck_assert_ptr_null(r);
}
END_TEST

/* ---- nodes ---- */

/* Machines as hwloc invents them; memory counts only where cores of this process are. */
START_TEST(nodes_of_a_machine_are_miscounted)
{
    static const struct {
        const char *form;
        int n_cores, n_numa;
        uint64_t nodes;
    } rows[] = {
        {"core:4 pu:2", 4, 1, 1},
        {"pack:2 [numa(memory=8GB)] core:3 pu:1", 6, 2, 3},
        {"pack:4 [numa(memory=8GB)] core:1 pu:2", 4, 4, 15},
    };
    struct machine m = {.n_numa = 0};

    ck_assert_msg(machine_find_topology(rows[_i].form, &m) == 0, "%s", err_text());
    ck_assert_int_eq(m.n_cores, rows[_i].n_cores);
    ck_assert_int_eq(m.n_numa, rows[_i].n_numa);
    ck_assert_uint_eq(m.numa_nodes, rows[_i].nodes);
    ck_assert_int_eq(machine_find_topology("no machine", &m), ERR_ARG);
}
END_TEST

/* ---- JSON ---- */

static struct machine invented(void)
{
    struct machine m = {.cpu_name = "A \"B\" \\ C",
                        .isa = "avx2",
                        .n_cores = 8,
                        .n_numa = 2,
                        .numa_nodes = 3,
                        .l2_bytes = MIB,
                        .ram_total_bytes = 64 * GIB,
                        .ram_limit_bytes = UINT64_MAX,
                        .ram_free_bytes = 60 * GIB,
                        .memlock_bytes = 8 * MIB,
                        .has_uring = true,
                        .mem_bytes_per_s = 61234567890.125,
                        .disk_bytes_per_s = 3.5e9,
                        .n_mem = 2,
                        .mem = {{1, 20e9}, {8, 61234567890.125}},
                        .run_s = 5e-6,
                        .draw_s = 3e-9,
                        .disk = -1};
    m.kernels[QUANT_Q4_K] = (struct machine_kernel){40e9, 600e9, 900e9, 300e9};
    m.kernels[QUANT_NVFP4] = (struct machine_kernel){1, 2, 3, 0};
    m.ops[OP_ATTENTION] = (struct machine_op){1e-6, 2.5e-11};
    const struct machine_disk disk = {.id = "ef53-1",
                                      .is_direct = true,
                                      .token_share = 0.75,
                                      .many_share = 0.9375,
                                      .n_rates = 3,
                                      .rates = {{MIB, 1, 1e9}, {MIB, 9, 3e9}, {128 * KIB, 4, 5e8}}};
    machine_disk_put(&m, &disk);
    machine_identify(&m);
    return m;
}

START_TEST(profile_comes_back_whole)
{
    struct machine m = invented(), back;
    char *text;

    ck_assert_int_eq(machine_to_json(&m, &text), 0);
    ck_assert_msg(machine_from_json(text, &back) == 0, "%s", err_text());
    ck_assert_str_eq(back.cpu_name, m.cpu_name);
    ck_assert_str_eq(back.isa, "avx2");
    ck_assert_uint_eq(back.ram_limit_bytes, UINT64_MAX);
    ck_assert_uint_eq(back.ram_free_bytes, 60 * GIB);
    ck_assert(back.has_uring);
    ck_assert_double_eq(back.mem_bytes_per_s, m.mem_bytes_per_s);
    ck_assert_uint_eq(back.identity, m.identity);
    ck_assert_uint_eq(back.numa_nodes, 3);
    ck_assert_int_eq(back.n_mem, 2);
    ck_assert_int_eq(memcmp(back.kernels, m.kernels, sizeof m.kernels), 0);
    ck_assert_int_eq(memcmp(back.ops, m.ops, sizeof m.ops), 0);
    ck_assert_double_eq(back.run_s, 5e-6);
    ck_assert_double_eq(back.draw_s, 3e-9);
    ck_assert_int_eq(back.n_disks, 1);
    ck_assert_str_eq(back.disks[0].id, "ef53-1");
    ck_assert(back.disks[0].is_direct);
    ck_assert_double_eq(back.disks[0].token_share, 0.75);
    ck_assert_double_eq(back.disks[0].many_share, 0.9375);
    ck_assert_int_eq(back.disks[0].n_rates, 3);
    ck_assert_double_eq(back.disks[0].rates[1].bytes_per_s, 3e9);
    ck_assert_double_eq(back.gpu_bytes_per_s, 0); /* nobody described a GPU */
    mem_free(text);
}
END_TEST

/* What was said of a GPU is kept, and taken by the machine whose it is. */
START_TEST(described_gpu_is_forgotten)
{
    struct machine m = invented(), back = invented();
    char *text;

    m.gpu_bytes_per_s = 256e9;
    m.pcie_bytes_per_s = 12.5e9;
    ck_assert_int_eq(machine_to_json(&m, &text), 0);
    ck_assert_int_eq(machine_take_rates(text, "/proc", &back), 0);
    ck_assert_double_eq(back.gpu_bytes_per_s, 256e9);
    ck_assert_double_eq(back.pcie_bytes_per_s, 12.5e9);
    static const char *const fields[] = {"\"gpu_bytes_per_s\": ", "\"pcie_bytes_per_s\": "};
    for (int i = 0; i < 2; i++) {
        char *at = strstr(text, fields[i]);
        ck_assert_ptr_nonnull(at);
        char *sign = at + strlen(fields[i]), was = *sign;
        *sign = '-';
        ck_assert_int_eq(machine_from_json(text, &back), ERR_FORMAT);
        ck_assert_ptr_nonnull(strstr(err_text(), i ? "pcie_bytes_per_s" : "gpu_bytes_per_s"));
        *sign = was;
    }
    mem_free(text);
}
END_TEST

/* What a prompt costs a GPU. An older profile does not speak of it, a newer one of all of it. */
START_TEST(old_profile_has_prompts_of_a_gpu)
{
    static const char *const fields[] = {"int_few_ops_per_s", "int_many_ops_per_s", "float_few_ops_per_s",
                                         "float_many_ops_per_s", "attention_unit_s"};
    struct machine m = invented(), back = invented();
    char *text, *at;

    m.gpu_bytes_per_s = 256e9;
    ck_assert_int_eq(machine_to_json(&m, &text), 0);
    ck_assert_ptr_null(strstr(text, "gpu_prompt"));
    ck_assert_int_eq(machine_take_rates(text, "/proc", &back), 0);
    ck_assert_int_eq(memcmp(&back.gpu_prompt, &m.gpu_prompt, sizeof m.gpu_prompt), 0);
    mem_free(text);
    m.gpu_prompt = (struct machine_gpu_prompt){{1e12, 2e13}, {3e11, 4e11}, 5e-12};
    ck_assert_int_eq(machine_to_json(&m, &text), 0);
    ck_assert_int_eq(machine_take_rates(text, "/proc", &back), 0);
    ck_assert_int_eq(memcmp(&back.gpu_prompt, &m.gpu_prompt, sizeof m.gpu_prompt), 0);
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        at = strstr(text, fields[i]);
        ck_assert_ptr_nonnull(at);
        *at = '?';
        ck_assert_int_eq(machine_from_json(text, &back), ERR_FORMAT);
        ck_assert_ptr_nonnull(strstr(err_text(), fields[i]));
        *at = fields[i][0];
    }
    mem_free(text);
}
END_TEST

/* Rates that were measured are those of one GPU; what was said of a GPU is said of any. */
START_TEST(rates_of_another_gpu_are_believed)
{
    struct machine m = invented(), back = invented();
    char *text;

    m.gpu_bytes_per_s = 256e9;
    m.pcie_bytes_per_s = 12.5e9;
    m.gpu_prompt.ints.many_ops_per_s = 2e13;
    for (int is_measured = 0; is_measured < 2; is_measured++) {
        snprintf(m.gpu_id, sizeof m.gpu_id, "%s", is_measured ? "one GPU" : "");
        ck_assert_int_eq(machine_to_json(&m, &text), 0);
        ck_assert_int_eq(machine_take_rates(text, "/proc", &back), 0);
        ck_assert_str_eq(back.gpu_id, m.gpu_id);
        machine_use_gpu(&back, "one GPU");
        ck_assert_double_eq(back.gpu_bytes_per_s, 256e9);
        machine_use_gpu(&back, "another");
        ck_assert_double_eq(back.gpu_bytes_per_s, is_measured ? 0 : 256e9);
        ck_assert_double_eq(back.pcie_bytes_per_s, is_measured ? 0 : 12.5e9);
        ck_assert_double_eq(back.gpu_prompt.ints.many_ops_per_s, is_measured ? 0 : 2e13);
        if (is_measured) {
            char *at = strstr(text, "\"one GPU\"");
            memcpy(at, "99999999 ", 9);
            ck_assert_int_eq(machine_from_json(text, &back), ERR_FORMAT);
            ck_assert_ptr_nonnull(strstr(err_text(), "\"gpu\""));
        }
        mem_free(text);
    }
}
END_TEST

START_TEST(bad_profile_names_its_field)
{
    struct machine m = invented(), back;
    char *text;

    ck_assert_int_eq(machine_to_json(&m, &text), 0);
    char *at = strstr(text, "\"cores\": 8");
    memcpy(at, "\"cores\": 0", 10);
    ck_assert_int_eq(machine_from_json(text, &back), ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(err_text(), "\"cores\""));
    memcpy(at, "\"coras\": 8", 10);
    ck_assert_int_eq(machine_from_json(text, &back), ERR_FORMAT);
    for (size_t n = strlen(text); n-- > 0;) {
        text[n] = '\0';
        ck_assert_int_eq(machine_from_json(text, &back), ERR_FORMAT);
    }
    mem_free(text);
    mem_fail_nth(1);
    ck_assert_int_eq(machine_to_json(&m, &text), ERR_NOMEM);
    ck_assert_ptr_null(text);
    mem_fail_nth(0);
}
END_TEST

START_TEST(rates_lie_between_what_was_measured)
{
    struct machine m = invented();

    ck_assert_double_eq(machine_mem_at(&m, 1), 20e9);
    ck_assert_double_eq_tol(machine_mem_at(&m, 2), 20e9 + (61234567890.125 - 20e9) / 7, 1);
    ck_assert_double_eq(machine_mem_at(&m, 64), 61234567890.125);
    m.n_mem = 0;
    ck_assert_double_eq(machine_mem_at(&m, 1), 61234567890.125);
    ck_assert_double_eq(m.disk_bytes_per_s, 3e9); /* the best there is */
    ck_assert_double_eq(machine_disk_at(&m, 2 * MIB, 1), 1e9);
    ck_assert_double_eq(machine_disk_at(&m, 900000, 5), 2e9);
    ck_assert_double_eq(machine_disk_at(&m, 900000, 100), 3e9);
    ck_assert_double_eq(machine_disk_at(&m, 4096, 1), 5e8);
    ck_assert_int_eq(machine_disk_depth(&m, 900000, 0.3), 1);
    ck_assert_int_eq(machine_disk_depth(&m, 900000, 1), 9); /* the fewest of those that bring all */
    machine_disk_use(&m, "another");
    ck_assert_double_eq(machine_disk_at(&m, MIB, 1), 0);
    ck_assert_int_eq(machine_disk_depth(&m, MIB, 0.5), 0);
    m.disk_bytes_per_s = 7e8; /* as described */
    ck_assert_double_eq(machine_disk_at(&m, MIB, 32), 7e8);
}
END_TEST

START_TEST(oldest_disk_makes_room_for_a_new_one)
{
    struct machine m = invented();
    struct machine_disk disk = {.n_rates = 1, .rates = {{MIB, 1, 1e9}}};

    for (int i = 0; i < MACHINE_MAX_DISK; i++) {
        snprintf(disk.id, sizeof disk.id, "new-%d", i);
        disk.rates[0].bytes_per_s = 1e9 * (i + 1);
        machine_disk_put(&m, &disk);
        machine_disk_put(&m, &disk); /* the same again takes no room */
        ck_assert_double_eq(m.disk_bytes_per_s, 1e9 * (i + 1));
    }
    ck_assert_int_eq(m.n_disks, MACHINE_MAX_DISK);
    ck_assert_str_eq(m.disks[0].id, "new-0");
    ck_assert_str_eq(m.disks[m.disk].id, "new-3");
}
END_TEST

START_TEST(profile_of_another_machine_is_not_taken)
{
    struct machine m = invented(), other = {.cpu_name = "another", .n_cores = 8, .ram_total_bytes = GIB, .disk = -1};
    struct machine_disk here = {.n_rates = 1, .rates = {{MIB, 1, 9e8}}};
    char *text;

    ck_assert_int_eq(machine_disk_id(root, here.id), 0);
    machine_disk_put(&m, &here);
    ck_assert_int_eq(machine_to_json(&m, &text), 0);
    machine_identify(&other);
    ck_assert_int_eq(machine_take_rates(text, root, &other), 0);
    ck_assert_double_eq(other.mem_bytes_per_s, 0);
    /* the same machine takes all, and the disk that the file is on; other kernels than those measured have other rates */
    struct machine same = {.n_cores = 8, .ram_total_bytes = 64 * GIB, .isa = "avx2", .disk = -1};
    memcpy(same.cpu_name, m.cpu_name, sizeof same.cpu_name);
    machine_identify(&same);
    struct machine masked = same;
    snprintf(masked.isa, sizeof masked.isa, "ref");
    ck_assert_int_eq(machine_take_rates(text, root, &same), 0);
    ck_assert(machine_has_kernels(&same));
    ck_assert_double_eq(same.mem_bytes_per_s, m.mem_bytes_per_s);
    ck_assert_double_eq(same.disk_bytes_per_s, 9e8);
    ck_assert_int_eq(machine_take_rates(text, "/proc", &masked), 0);
    ck_assert(!machine_has_kernels(&masked));
    ck_assert_double_eq(masked.disk_bytes_per_s, 0);
    ck_assert_int_eq(machine_take_rates("{", root, &same), ERR_FORMAT);
    mem_free(text);
}
END_TEST

START_TEST(identity_is_of_the_machine_not_of_its_rates)
{
    struct machine a = invented(), b = invented();

    b.mem_bytes_per_s = 1;
    b.ram_free_bytes = 1;
    machine_identify(&b);
    ck_assert_uint_eq(a.identity, b.identity);
    b.n_cores = 4;
    machine_identify(&b);
    ck_assert_uint_ne(a.identity, b.identity);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("machine");
    TCase *t = tcase_create("machine");

    tcase_add_checked_fixture(t, setup, teardown);
    tcase_set_timeout(t, 60);
    tcase_add_test(t, no_cgroup_is_no_limit);
    tcase_add_test(t, no_meminfo_is_an_error);
    tcase_add_test(t, v2_limit_of_a_parent_counts);
    tcase_add_test(t, v2_tightest_of_the_path_counts_and_high_is_a_limit);
    tcase_add_test(t, v1_nested_limit_and_quota);
    tcase_add_test(t, container_sees_its_own_group_at_the_mount_point);
    tcase_add_test(t, nonsense_in_limits_is_no_limit);
    tcase_add_test(t, quota_below_one_core_leaves_one);
    tcase_add_test(t, this_machine_is_found);
    tcase_add_test(t, bound_process_has_the_cores_it_is_bound_to);
    tcase_add_test(t, disk_rate_is_measured_on_file_and_folder);
    tcase_add_test(t, reader_goes_and_rests);
    tcase_add_loop_test(t, nodes_of_a_machine_are_miscounted, 0, 3);
    tcase_add_test(t, profile_comes_back_whole);
    tcase_add_test(t, described_gpu_is_forgotten);
    tcase_add_test(t, old_profile_has_prompts_of_a_gpu);
    tcase_add_test(t, rates_of_another_gpu_are_believed);
    tcase_add_test(t, bad_profile_names_its_field);
    tcase_add_test(t, rates_lie_between_what_was_measured);
    tcase_add_test(t, oldest_disk_makes_room_for_a_new_one);
    tcase_add_test(t, profile_of_another_machine_is_not_taken);
    tcase_add_test(t, identity_is_of_the_machine_not_of_its_rates);
    suite_add_tcase(s, t);
    return run_suite(s);
}
