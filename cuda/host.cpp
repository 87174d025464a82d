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
namespace of_around7 {
#include "around7.cu"
}
#undef FOR_TYPE
#undef BOUNDS
namespace of_mix {
#include "mix.cu"
}
#if N <= 64
#undef FOR_TYPE
#undef BOUNDS
namespace of_chunk7 {
#include "chunk7.cu"
}
#undef FOR_TYPE
#undef BOUNDS
namespace of_single7 {
#include "single7.cu"
}
using namespace of_chunk7;
using namespace of_single7;
#endif
using namespace of_wkv7;
using namespace of_wkv6;
using namespace of_around7;
using namespace of_mix;

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
    FOR_BOTH(around7_before);
    FOR_BOTH(around7_behind);
    FOR_BOTH(around7_behindback);
    FOR_BOTH(around7_beforeback);
    FOR_BOTH(mix_forward);
    FOR_BOTH(mix_backward);
    FOR_BOTH(mix_relu);
    FOR_BOTH(mix_reluback);
    FOR_BOTH(mix_entropy);
#if N <= 64
    FOR_BOTH(chunk7_prepare);
    FOR_BOTH(chunk7_prepareback);
    FOR_BOTH(chunk7_pass);
    FOR_BOTH(chunk7_passback);
    FOR_BOTH(chunk7_gradients);
    FOR_BOTH(single7_forward);
    FOR_BOTH(single7_backward);
#endif
    return 1;
}
