// y = x W^T for a few rows of x, as in generating text: all the time goes into reading W once, so it is read as it is stored, and
// well ahead. W [outputs, inputs] is float32 or bfloat16, x and y float32; inputs a multiple of 16.
#include "rows.h"
#include "vec.h"

namespace {

constexpr int AHEAD = 4096;  // bytes: without it, two cores read 17 GB/s instead of 28

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

template <int R, typename T>
void product(const T *w, const float *x, float *y, int64_t inputs, int64_t outputs, int threads) {
    share(outputs, threads, [=](int64_t begin, int64_t end, int) {
        for (int64_t o = begin; o < end; o++) one_output<R>(w + o * inputs, x, y + o, inputs, outputs);
    });
}

}  // namespace

#define FOR_TYPE(T, name)                                                                                                   \
    extern "C" int product_##name(const T *w, const float *x, float *y, int64_t rows, int64_t inputs, int64_t outputs,      \
                                  int threads) {                                                                            \
        switch (rows) {                                                                                                     \
            case 1: product<1>(w, x, y, inputs, outputs, threads); return 0;                                                \
            case 2: product<2>(w, x, y, inputs, outputs, threads); return 0;                                                \
            case 3: product<3>(w, x, y, inputs, outputs, threads); return 0;                                                \
            case 4: product<4>(w, x, y, inputs, outputs, threads); return 0;                                                \
            default: return 1;                                                                                              \
        }                                                                                                                   \
    }
FOR_TYPE(float, float32)
FOR_TYPE(bf16, bfloat16)
