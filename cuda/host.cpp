// The kernels as a library for the tests: a block's threads are fibers on the host (emulate.h).
//   g++ -DEMULATE -DN=16 -O1 -std=c++17 -shared -fPIC cuda/host.cpp
#include "wkv7.cu"
#undef FOR_TYPE
#include "wkv6.cu"
#if N <= 64
#undef FOR_TYPE
#include "chunk7.cu"
#define CHUNKED(type)                                                                                                              \
    KERNEL(chunk7_prepare_##type);                                                                                                 \
    KERNEL(chunk7_prepareback_##type);                                                                                             \
    KERNEL(chunk7_pass_##type);                                                                                                    \
    KERNEL(chunk7_passback_##type);                                                                                                \
    KERNEL(chunk7_gradients_##type)
#endif

#define KERNEL(name)                                                                                                               \
    if (!strcmp(which, #name)) return emulate::grid(name, {x, y, 1}, {threads, 1, 1}, shared, args, backwards) ? 0 : 2

// args: pointers to the arguments, as cuLaunchKernel takes them. backwards: threads in the opposite order. 1: no such kernel; 2: its
// threads wait for each other for ever, or use more shared memory than was asked for.
extern "C" int emulated(const char *which, int x, int y, int threads, int shared, void **args, int backwards) {
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
#ifdef CHUNKED
    CHUNKED(float32);
    CHUNKED(bfloat16);
#endif
    return 1;
}
