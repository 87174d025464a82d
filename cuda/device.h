// What the kernels are written in: float32 or bfloat16 in memory, float32 in registers. No header of CUDA's is needed, so NVRTC,
// nvcc and (with emulate.h, for the tests) a C++ compiler take the same source.
#pragma once
#ifdef EMULATE
#include "emulate.h"
#endif

// Shared memory, so many floats of it; a launch has to ask for it.
#ifndef EMULATE
#define ROOM(name, floats)           \
    static_assert((floats) > 0, ""); \
    extern __shared__ float name[]
#endif

#ifndef N
#define N 64  // head size: a block has so many threads
#endif

#define WARPS 4
#define THREADS (32 * WARPS)  // of a block whose warps have work of their own

#define EVERY 64  // tokens of a chunk: from one kept state to the next

struct bf16 {
    unsigned short bits;
};

__device__ inline float from(float x) { return x; }
__device__ inline float from(bf16 x) {
    union {
        unsigned int bits;
        float number;
    } u;
    u.bits = (unsigned int)x.bits << 16;
    return u.number;
}
__device__ inline void put(float *p, float x) { *p = x; }
__device__ inline void put(bf16 *p, float x) {  // to the nearest, halves to even; what is no number stays none
    union {
        float number;
        unsigned int bits;
    } u;
    u.number = x;
    p->bits = x == x ? (unsigned short)((u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16) : (unsigned short)0x7fc0;
}

// A vector of a head for each of two tokens: while one is read by all threads, the next is written.
struct Shared {
    float of[2][N];
};

// A sum over a head. Four side by side: one would be a chain of N additions, each waiting for the one before it.
struct Sum {
    float part[4] = {};
    __device__ inline void add(int j, float x) { part[j & 3] += x; }
    __device__ inline float total() const { return (part[0] + part[1]) + (part[2] + part[3]); }
};

#ifndef EMULATE
__device__ inline float of_lane(float x, int mask) { return __shfl_xor_sync(0xffffffff, x, mask); }
#endif

// Over the threads of a warp; all of them get it.
__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) x += of_lane(x, mask);
    return x;
}

__device__ inline long at(int t, int H, int h, int i) { return ((long)t * H + h) * N + i; }
