/* The subcommands, one file each: cmd_NAME.c. Each does its work and returns an exit status (conf.h). */
#ifndef FERRY_CLI_CMD_H
#define FERRY_CLI_CMD_H

#include "src/cli/conf.h"

#ifdef __cplusplus
extern "C" {
#endif

int cmd_chat(const struct conf *conf);
int cmd_run(const struct conf *conf);
int cmd_batch(const struct conf *conf);
int cmd_tokenize(const struct conf *conf);
int cmd_info(const struct conf *conf);
int cmd_eval(const struct conf *conf);
int cmd_bench(const struct conf *conf);
int cmd_plan(const struct conf *conf);
int cmd_probe(const struct conf *conf);
int cmd_quantize(const struct conf *conf);

#ifdef __cplusplus
}
#endif
#endif
