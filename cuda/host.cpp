// The kernels as a library for the tests: a block's threads are fibers on the host (emulate.h).
//   g++ -DEMULATE -DN=16 -O1 -std=c++17 -shared -fPIC cuda/host.cpp
#include "device.h"
#include "tensor.h"

// (each file as if it were alone)
namespace of_wkv7 {
#include "wkv7.cu"
}
#undef FOR_TYPE
namespace of_wkv6 {
#include "wkv6.cu"
}
#undef FOR_TYPE
#undef BOUNDS
namespace of_wkv7_block {
#include "wkv7_block.cu"
}
#undef FOR_TYPE
#undef BOUNDS
namespace of_token_shift {
#include "token_shift.cu"
}
#if N <= 64
#undef FOR_TYPE
#undef BOUNDS
namespace of_wkv7_chunked {
#include "wkv7_chunked.cu"
}
#undef FOR_TYPE
#undef BOUNDS
namespace of_wkv7_onepass {
#include "wkv7_onepass.cu"
}
using namespace of_wkv7_chunked;
using namespace of_wkv7_onepass;
#endif
using namespace of_wkv7;
using namespace of_wkv6;
using namespace of_wkv7_block;
using namespace of_token_shift;

#define KERNEL(name)                                                                                                               \
    if (!strcmp(which, #name)) return emulate::grid(name, {x, y, 1}, {threads, 1, 1}, shared, args, backwards) ? 0 : 2
#define FOR_BOTH(name)     \
    KERNEL(name##_float32); \
    KERNEL(name##_bfloat16)

// args: pointers to the arguments, as cuLaunchKernel takes them. backwards: threads in the opposite order. 1: no such kernel; 2: see
// emulate::block.
extern "C" int emulated(const char *which, int x, int y, int threads, int shared, void **args, int backwards) {
    FOR_BOTH(wkv7_forward);
    FOR_BOTH(wkv7_again);
    FOR_BOTH(wkv7_rows);
    FOR_BOTH(wkv7_columns);
    FOR_BOTH(wkv6_forward);
    FOR_BOTH(wkv6_rows);
    FOR_BOTH(wkv6_columns);
    FOR_BOTH(wkv7_block_before);
    FOR_BOTH(wkv7_block_behind);
    FOR_BOTH(wkv7_block_behindback);
    FOR_BOTH(wkv7_block_beforeback);
    FOR_BOTH(token_shift_forward);
    FOR_BOTH(token_shift_backward);
    FOR_BOTH(token_shift_relu);
    FOR_BOTH(token_shift_reluback);
    FOR_BOTH(token_shift_entropy);
#if N <= 64
    FOR_BOTH(wkv7_chunked_prepare);
    FOR_BOTH(wkv7_chunked_prepareback);
    FOR_BOTH(wkv7_chunked_pass);
    FOR_BOTH(wkv7_chunked_passback);
    FOR_BOTH(wkv7_chunked_gradients);
    FOR_BOTH(wkv7_onepass_forward);
    FOR_BOTH(wkv7_onepass_backward);
#endif
    return 1;
}
