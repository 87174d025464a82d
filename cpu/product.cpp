// y = x W^T for a few rows of x, as in generating text: all the time goes into reading W once, so it is read as it is stored, and
// well ahead. W [outputs, inputs] is float32 or bfloat16, x and y float32; inputs a multiple of 16.
#include "product.h"
#include "rows.h"

namespace {

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
