// Rows of x times one row of W, which is read once and as it is stored, well ahead. inputs: a multiple of 16.
#pragma once
#include "vec.h"

constexpr int AHEAD = 3072;  // bytes: two cores read 31 GB/s; at 4096, where addresses collide, 27, and without it 18

template <int R, typename T>
inline void one_output(const T *w, const float *x, float *y, int64_t inputs, int64_t outputs) {
    vf sums[R][2] = {};
    int64_t i = 0;
    for (; i + 2 * W <= inputs; i += 2 * W) {
        __builtin_prefetch((const char *)(w + i) + AHEAD);
        const vf first = load(w + i), second = load(w + i + W);
        for (int r = 0; r < R; r++) {
            sums[r][0] += first * load(x + r * inputs + i);
            sums[r][1] += second * load(x + r * inputs + i + W);
        }
    }
    for (; i < inputs; i += W)
        for (int r = 0; r < R; r++) sums[r][0] += load(w + i) * load(x + r * inputs + i);
    for (int r = 0; r < R; r++) y[r * outputs] = sum(sums[r][0] + sums[r][1]);
}
