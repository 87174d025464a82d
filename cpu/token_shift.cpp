// Token shift with several mixes, and the square of a ReLU. Rows are tokens of all sequences behind one another, [T, C] with C a
// multiple of 16; activations are float32 or bfloat16, parameters and their gradients float32.
#include "rows.h"
#include "vec.h"

namespace {

constexpr int MOST = 6;  // mixes of one input

// the row that stood one token earlier: of the carried state at a sequence's first token. sequence: of the row before
template <typename T>
inline const T *row_before(const T *x, const T *shift, const int64_t *borders, int64_t &sequence, int64_t t, int64_t C) {
    while (borders[sequence + 1] <= t) sequence++;
    return borders[sequence] == t ? shift + sequence * C : x + (t - 1) * C;
}

inline int64_t sequence_of(const int64_t *borders, int64_t t) {
    int64_t s = 0;
    while (borders[s + 1] <= t) s++;
    return s;
}

// out[m] = x + (before - x) mu[m]
template <typename T>
void token_shift_forward(const T *x, const T *shift, const float *mu, T *const *out, const int64_t *borders, int64_t rows, int64_t C,
                 int64_t mixes, int threads) {
    share(rows, threads, [=](int64_t begin, int64_t end, int) {
        int64_t s = begin < end ? sequence_of(borders, begin) : 0;
        for (int64_t t = begin; t < end; t++) {
            const T *before = row_before(x, shift, borders, s, t, C);
            for (int64_t c = 0; c < C; c += W) {
                const vf now = load(x + t * C + c), change = load(before + c) - now;
                for (int64_t m = 0; m < mixes; m++) store(out[m] + t * C + c, now + change * load(mu + m * C + c));
            }
        }
    });
}

// dmu, if it is not null: [threads, mixes, C], zero
template <typename T>
void token_shift_backward(const T *x, const T *shift, const float *mu, const T *const *dout, T *dx, T *dshift, float *dmu,
                  const int64_t *borders, int64_t rows, int64_t C, int64_t mixes, int threads) {
    share(rows, threads, [=](int64_t begin, int64_t end, int thread) {
        if (begin == end) return;
        int64_t s = sequence_of(borders, begin);
        for (int64_t t = begin; t < end; t++) {
            const T *before = row_before(x, shift, borders, s, t, C);
            const bool first = borders[s] == t, last = borders[s + 1] == t + 1;
            for (int64_t c = 0; c < C; c += W) {
                vf own = {}, earlier = {};  // what x_t gets as itself, and what the row before it gets
                vf later = {};              // what x_t gets as the row before t + 1
                const vf change = load(before + c) - load(x + t * C + c);
                for (int64_t m = 0; m < mixes; m++) {
                    const vf d = load(dout[m] + t * C + c), mix = load(mu + m * C + c);
                    own += d - d * mix;
                    if (first) earlier += d * mix;
                    if (!last) later += load(dout[m] + (t + 1) * C + c) * mix;
                    if (dmu) add(dmu + (thread * mixes + m) * C + c, d * change);
                }
                store(dx + t * C + c, own + later);
                if (first) store(dshift + s * C + c, earlier);
            }
        }
    });
}

template <typename T> void square_relu(const T *x, T *y, int64_t numbers, int threads) {
    share(numbers / 16, threads, [=](int64_t begin, int64_t end, int) {
        for (int64_t i = begin * 16; i < end * 16; i += W) {
            const vf h = positive(load(x + i));
            store(y + i, h * h);
        }
    });
}

template <typename T> void square_relu_backward(const T *x, const T *dy, T *dx, int64_t numbers, int threads) {
    share(numbers / 16, threads, [=](int64_t begin, int64_t end, int) {
        for (int64_t i = begin * 16; i < end * 16; i += W)
            store(dx + i, positive(load(x + i)) * 2.0f * load(dy + i));
    });
}

}  // namespace

#define FOR_TYPE(T, name)                                                                                                   \
    extern "C" int token_shift_forward_##name(const T *x, const T *shift, const float *mu, const int64_t *borders, T *o0, T *o1,    \
                                      T *o2, T *o3, T *o4, T *o5, int64_t rows, int64_t C, int64_t mixes, int threads) {    \
        T *const out[MOST] = {o0, o1, o2, o3, o4, o5};                                                                      \
        token_shift_forward(x, shift, mu, out, borders, rows, C, mixes, threads);                                                   \
        return 0;                                                                                                           \
    }                                                                                                                       \
    extern "C" int token_shift_backward_##name(const T *x, const T *shift, const float *mu, const int64_t *borders, const T *d0,    \
                                       const T *d1, const T *d2, const T *d3, const T *d4, const T *d5, T *dx, T *dshift,   \
                                       float *dmu, int64_t rows, int64_t C, int64_t mixes, int threads) {                   \
        const T *const dout[MOST] = {d0, d1, d2, d3, d4, d5};                                                               \
        token_shift_backward(x, shift, mu, dout, dx, dshift, dmu, borders, rows, C, mixes, threads);                                \
        return 0;                                                                                                           \
    }                                                                                                                       \
    extern "C" int square_relu_##name(const T *x, T *y, int64_t numbers, int threads) {                                     \
        square_relu(x, y, numbers, threads);                                                                                \
        return 0;                                                                                                           \
    }                                                                                                                       \
    extern "C" int square_relu_backward_##name(const T *x, const T *dy, T *dx, int64_t numbers, int threads) {              \
        square_relu_backward(x, dy, dx, numbers, threads);                                                                  \
        return 0;                                                                                                           \
    }
FOR_TYPE(float, float32)
FOR_TYPE(bf16, bfloat16)
