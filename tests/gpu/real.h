/* What tests turn on the emulated runtime (tests/emu/emu.h), for tests on another runtime: a test that is compiled with this header
 * in front (-include) calls these in their place. Calls of the runtime are counted, limited and made to fail on their way (real.c);
 * orders and forgotten waits are the hardware's own affair, and are not turned. A virtual clock there is not: asking for it ends the
 * process. */
#ifndef FERRY_TESTS_GPU_REAL_H
#define FERRY_TESTS_GPU_REAL_H

#define emu_reset real_reset
#define emu_seed real_seed
#define emu_set_vram real_set_vram
#define emu_set_pinned real_set_pinned
#define emu_set_gpus real_set_gpus
#define emu_set_card real_set_card
#define emu_set_code real_set_code
#define emu_set_driver real_set_driver
#define emu_fail_nth real_fail_nth
#define emu_n_calls real_n_calls
#define emu_in_step real_in_step
#define emu_starve real_starve
#define emu_drop_wait real_drop_wait
#define emu_drops_wait real_drops_wait
#define emu_device_bytes real_device_bytes
#define emu_n_live real_n_live
#define emu_n_launches real_n_launches
#define emu_is_real real_is_real
#define emu_clock real_clock
#define emu_now_ns real_now_ns
#define emu_host_works real_host_works

#include "tests/emu/emu.h"

#endif
