// Products of matrices on tensor cores, by a block of THREADS threads: float32 in memory, operands rounded to tf32, float32 sums.
#pragma once
#include "device.h"

#ifndef EMULATE
__device__ inline float tf32(float x) {
    unsigned int bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return __uint_as_float(bits);
}

// c [16, 8] += a [16, 8] b [8, 8]. A thread of a warp has, with g = lane / 4 and t = lane % 4: of a (g, t), (g + 8, t), (g, t + 4),
// (g + 8, t + 4); of b (t, g), (t + 4, g); of c (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
__device__ inline void mma(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
          "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
#endif

// A matrix in memory, or its transpose. Ready: its numbers are rounded to tf32 already, as those should be that are read often.
template <bool Ready = true> struct View {
    const float *p;
    int row, column;  // how far the next one is
    __device__ inline float operator()(int i, int j) const { return p[i * row + j * column]; }
    __device__ inline float operand(int i, int j) const { return Ready ? (*this)(i, j) : tf32((*this)(i, j)); }
    __device__ inline View transposed() const { return {p, column, row}; }
    __device__ inline View from(int i, int j) const { return {p + i * row + j * column, row, column}; }
};

// A product [ROWS, COLUMNS] in the registers of the block's threads: each warp has tiles of 16 rows and 8 WIDE columns.
template <int ROWS, int COLUMNS> struct Product {
    static constexpr int DOWN = ROWS / 16, ACROSS = COLUMNS / 8;
    static constexpr int WIDE = ACROSS % 4 == 0 && DOWN * ACROSS >= 4 * WARPS ? 4
                                : ACROSS % 2 == 0 && DOWN * ACROSS >= 2 * WARPS ? 2
                                                                                : 1;
    static constexpr int TILES = DOWN * ACROSS / WIDE, TURNS = (TILES + WARPS - 1) / WARPS;
    float c[TURNS][WIDE][4] = {};

    // Add a [ROWS, INNER] b [INNER, COLUMNS].
    template <int INNER, typename A, typename B> __device__ inline void add(A a, B b) {
        const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            const int tile = warp + turn * WARPS;
            if (tile >= TILES) break;
            const int i = tile / (ACROSS / WIDE) * 16 + g, j = tile % (ACROSS / WIDE) * 8 * WIDE + g;
#pragma unroll 4  // (all at once take more registers than there are for three blocks on a multiprocessor)
            for (int step = 0; step < INNER; step += 8) {
                const int k = step + t;
                const float left[4] = {a.operand(i, k), a.operand(i + 8, k), a.operand(i, k + 4), a.operand(i + 8, k + 4)};
#pragma unroll
                for (int part = 0; part < WIDE; part++) {
                    const float right[2] = {b.operand(k, j + 8 * part), b.operand(k + 4, j + 8 * part)};
                    mma(c[turn][part], left, right);
                }
            }
        }
    }

    // Call f(row, column, value) for every number that this thread has; it may change the value.
    template <typename F> __device__ inline void each(F f) { over(c, f); }
    template <typename F> __device__ inline void each(F f) const { over(c, f); }
    template <typename C, typename F> __device__ static inline void over(C &c, F f) {
        const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            const int tile = warp + turn * WARPS;
            if (tile >= TILES) break;
            const int i = tile / (ACROSS / WIDE) * 16 + g, j = tile % (ACROSS / WIDE) * 8 * WIDE + 2 * t;
#pragma unroll
            for (int part = 0; part < WIDE; part++)
#pragma unroll
                for (int n = 0; n < 4; n++) f(i + n / 2 * 8, j + 8 * part + n % 2, c[turn][part][n]);
        }
    }

    __device__ inline void scale(const Product &by) {
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++)
#pragma unroll
            for (int part = 0; part < WIDE; part++)
#pragma unroll
                for (int n = 0; n < 4; n++) c[turn][part][n] *= by.c[turn][part][n];
    }

    __device__ inline void store(float *to, int row) const {
        each([=](int i, int j, float x) { to[i * row + j] = x; });
    }

    // For products.
    __device__ inline void round() {
        each([](int, int, float &x) { x = tf32(x); });
    }
};
