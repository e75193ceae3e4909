/* Runs a fuzz entry over the files, and all files of the folders, that are its arguments: for `make check`, and to look
 * at one input that a fuzzer found. */
#include "tests/fuzz/fuzz.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static int n_run;

static int run_file(const char *path)
{
    FILE *f = fopen(path, "rb");
    long n;

    if (!f || fseek(f, 0, SEEK_END) || (n = ftell(f)) < 0 || fseek(f, 0, SEEK_SET)) {
        perror(path);
        if (f)
            fclose(f);
        return 1;
    }
    /* Exactly as large as the input, so that a sanitizer sees the first byte beyond. */
    uint8_t *data = malloc((size_t)n + !n);
    size_t got = data ? fread(data, 1, (size_t)n, f) : 0;
    fclose(f);
    if (got == (size_t)n) {
        fprintf(stderr, "%s: %ld bytes\n", path, n); /* the last line is the one that broke */
        LLVMFuzzerTestOneInput(data, got);
        n_run++;
    }
    free(data);
    return got != (size_t)n;
}

static int run_folder(const char *path)
{
    struct dirent *entry;
    DIR *dir = opendir(path);
    int failed = 0;

    if (!dir) {
        perror(path);
        return 1;
    }
    while ((entry = readdir(dir))) {
        char name[4096];
        if (entry->d_name[0] == '.')
            continue;
        snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
        failed |= run_file(name);
    }
    closedir(dir);
    return failed;
}

int main(int argc, char **argv)
{
    int failed = 0;

    for (int i = 1; i < argc; i++) {
        struct stat st;
        failed |= !stat(argv[i], &st) && S_ISDIR(st.st_mode) ? run_folder(argv[i]) : run_file(argv[i]);
    }
    printf("%d inputs\n", n_run);
    return failed || !n_run;
}
