// The kernels as a library for the tests: a block's threads are fibers on the host (emulate.h).
//   g++ -DEMULATE -DN=16 -O1 -std=c++17 -shared -fPIC cuda/host.cpp
#include "wkv7.cu"
#undef FOR_TYPE
#include "wkv6.cu"

#define KERNEL(name)                                                                                                               \
    if (!strcmp(which, #name)) return emulate::grid(name, {x, y, 1}, {N, 1, 1}, args, backwards), 0

// args: pointers to the arguments, as cuLaunchKernel takes them. backwards: threads in the opposite order. 1: no such kernel.
extern "C" int emulated(const char *which, int x, int y, void **args, int backwards) {
    KERNEL(wkv7_forward_float32);
    KERNEL(wkv7_forward_bfloat16);
    KERNEL(wkv7_again_float32);
    KERNEL(wkv7_again_bfloat16);
    KERNEL(wkv7_rows_float32);
    KERNEL(wkv7_rows_bfloat16);
    KERNEL(wkv7_columns_float32);
    KERNEL(wkv7_columns_bfloat16);
    KERNEL(wkv6_forward_float32);
    KERNEL(wkv6_forward_bfloat16);
    KERNEL(wkv6_rows_float32);
    KERNEL(wkv6_rows_bfloat16);
    KERNEL(wkv6_columns_float32);
    KERNEL(wkv6_columns_bfloat16);
    return 1;
}
