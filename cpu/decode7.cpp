// One token of one text through all blocks of an RWKV-7: what a model says token by token. The formulas are those of
// rwkv_peft/model/rwkv7.py. Everything is read once, by all threads at the same time, and nothing is called in between: with a
// 0.1B model, calling each operation for itself takes as long as reading the weights.
//
// Matrices are [outputs, inputs], float32 or bfloat16 as they are stored (T); all else is float32. Channels and ranks are
// multiples of 16.
#include <vector>

#include "wkv7_block.h"
#include "blocks.h"
#include "product.h"
#include "rows.h"

namespace {

// The table of a block's tensors, in this order: rwkv_peft/ops/cpu/decode7.py makes it. v0, v1, v2 are null in the first block.
template <typename T> struct Block {
    const float *ln1_weight, *ln1_bias, *x_r, *x_w, *x_k, *x_v, *x_a, *x_g;
    const T *receptance, *key, *value, *w1, *a1, *v1, *g1, *w2, *a2, *v2, *g2;
    const float *w0, *a0, *v0, *k_k, *k_a, *r_k, *ln_x_weight, *ln_x_bias;
    const T *output;
    const float *ln2_weight, *ln2_bias, *ffn_x_k;
    const T *ffn_key, *ffn_value;
};

struct State {
    const float *att_x, *wkv, *ffn_x;           // before the token
    float *att_x_after, *wkv_after, *ffn_x_after;
};

struct Sizes {
    int64_t blocks, heads, size, w, a, v, g, hidden;
};

enum Shape { LINEAR, TANH, SIGMOID };

inline float shaped(float x, Shape shape) {
    return shape == TANH ? std::tanh(x) : shape == SIGMOID ? 1.0f / (1.0f + std::exp(-x)) : x;
}

template <typename T> struct Product {
    const T *w;
    const float *x;
    float *y;
    int64_t outputs;
    Shape shape;
};

inline void layer_norm(const float *x, const float *weight, const float *bias, float *out, int64_t channels) {
    const Norm of = norm(x, int(channels), 1e-5f);
    for (int64_t c = 0; c < channels; c += W)
        store(out + c, (load(x + c) - of.mean) * of.scale * load(weight + c) + load(bias + c));
}

inline void mixed(const float *x, const float *before, const float *share, float *out, int64_t channels) {
    for (int64_t c = 0; c < channels; c += W)
        store(out + c, load(x + c) + (load(before + c) - load(x + c)) * load(share + c));
}

// One step of the recurrence in one head: s [N values][N keys] -> after, and y. W values at a time.
template <int N>
void step(const float *s, float *after, const float *r, const float *w, const float *k, const float *v, const float *a,
          const float *b, float *y) {
    float decay[N];
    for (int n = 0; n < N; n += W) store(decay + n, exp(load(w + n)));
    for (int first = 0; first < N; first += W) {
        vf along[W], out[W];
        for (int i = 0; i < W; i++) {
            along[i] = vf{};
            for (int n = 0; n < N; n += W) along[i] += load(s + (first + i) * N + n) * load(a + n);
        }
        const vf sa = sums(along);
        for (int i = 0; i < W; i++) {
            out[i] = vf{};
            for (int n = 0; n < N; n += W) {
                const int64_t at = (first + i) * N + n;
                const vf now = load(s + at) * load(decay + n) + sa[i] * load(b + n) + v[first + i] * load(k + n);
                store(after + at, now);
                out[i] += now * load(r + n);
            }
        }
        store(y + first, sums(out));
    }
}

template <int N, typename T>
void token(const Block<T> *blocks, const State *states, float *x, const Sizes &of, int threads) {
    const int64_t C = of.heads * N, low = of.w + of.a + of.v + of.g;
    std::vector<float> memory(15 * C + low + of.hidden);
    float *place = memory.data();
    const auto some = [&](int64_t floats) { return (place += floats) - floats; };
    float *r = some(C), *k = some(C), *v = some(C), *v_first = some(C), *y = some(C), *hidden = some(of.hidden);
    float *w = some(C), *a = some(C), *mix = some(C), *g = some(C);                            // before their sigmoids
    float *w1 = some(of.w), *a1 = some(of.a), *v1 = some(of.v), *g1 = some(of.g);             // of low rank
    float *to_r = some(C), *to_w = some(C), *to_k = some(C), *to_v = some(C), *to_a = some(C), *to_b = some(C);
#pragma omp parallel num_threads(threads)
    {
        const int me = this_thread(), all = all_threads();
        const auto share_of = [=](int64_t rows, auto work) {
            for (int64_t i = rows * me / all; i < rows * (me + 1) / all; i++) work(i);
        };
        std::vector<float> own(7 * C);  // each thread makes the same norms and mixes: quicker than waiting for another
        float *normed = own.data(), *xr = normed + C, *xw = xr + C, *xk = xw + C, *xv = xk + C, *xa = xv + C, *xg = xa + C;
        for (int64_t block = 0; block < of.blocks; block++) {
            const Block<T> &p = blocks[block];
            const State &state = states[block];
            layer_norm(x, p.ln1_weight, p.ln1_bias, normed, C);
            const float *shares[] = {p.x_r, p.x_w, p.x_k, p.x_v, p.x_a, p.x_g};
            for (int m = 0; m < 6; m++) mixed(normed, state.att_x, shares[m], xr + m * C, C);
            float *values = block ? v : v_first;
            const Product<T> products[] = {
                {p.receptance, xr, r, C, LINEAR}, {p.key, xk, k, C, LINEAR}, {p.value, xv, values, C, LINEAR},
                {p.w1, xw, w1, of.w, TANH},       {p.a1, xa, a1, of.a, LINEAR}, {p.v1, xv, v1, block ? of.v : 0, LINEAR},
                {p.g1, xg, g1, of.g, SIGMOID},
            };
            int64_t rows = 0, before = 0;
            for (const auto &one : products) rows += one.outputs;
            const int64_t begin = rows * me / all, end = rows * (me + 1) / all;
            for (const auto &one : products) {
                const int64_t last = std::min(end - before, one.outputs);
                for (int64_t o = std::max<int64_t>(begin - before, 0); o < last; o++) {
                    one_output<1>(one.w + o * C, one.x, one.y + o, C, 1);
                    one.y[o] = shaped(one.y[o], one.shape);
                }
                before += one.outputs;
            }
#pragma omp barrier
            const Before<float> given{r, w, k, values, a, block ? mix : nullptr, v_first, p.k_k, p.k_a};
            const Behind behind{y, to_r, to_k, to_v, p.r_k, p.ln_x_weight, p.ln_x_bias, EPS};
            share_of(of.heads, [&](int64_t head) {
                const int64_t at = head * N;
                for (int64_t o = at; o < at + N; o++) {
                    one_output<1>(p.w2 + o * of.w, w1, w + o, of.w, 1);
                    one_output<1>(p.a2 + o * of.a, a1, a + o, of.a, 1);
                    one_output<1>(p.g2 + o * of.g, g1, g + o, of.g, 1);
                    w[o] += p.w0[o];
                    a[o] += p.a0[o];
                    if (!block) continue;
                    one_output<1>(p.v2 + o * of.v, v1, mix + o, of.v, 1);
                    mix[o] += p.v0[o];
                }
                before_one(given, to_r, to_w, to_k, to_v, to_a, to_b, at, at, N);
                step<N>(state.wkv + at * N, state.wkv_after + at * N, to_r + at, to_w + at, to_k + at, to_v + at, to_a + at,
                        to_b + at, y + at);
                behind_one(behind, g, y, at, at, N);
            });
            if (!me) std::copy(normed, normed + C, state.att_x_after);
#pragma omp barrier
            share_of(C, [&](int64_t o) {
                float out;
                one_output<1>(p.output + o * C, y, &out, C, 1);
                x[o] += out;
            });
#pragma omp barrier
            layer_norm(x, p.ln2_weight, p.ln2_bias, normed, C);
            mixed(normed, state.ffn_x, p.ffn_x_k, xk, C);
            share_of(of.hidden, [&](int64_t o) {
                float out;
                one_output<1>(p.ffn_key + o * C, xk, &out, C, 1);
                hidden[o] = out > 0 ? out * out : out != out ? out : 0;
            });
            if (!me) std::copy(normed, normed + C, state.ffn_x_after);
#pragma omp barrier
            share_of(C, [&](int64_t o) {
                float out;
                one_output<1>(p.ffn_value + o * of.hidden, hidden, &out, of.hidden, 1);
                x[o] += out;
            });
#pragma omp barrier
        }
    }
}

}  // namespace

// x [C] is what comes out of the embedding (and its norm), and becomes what goes into the last norm. sizes: those of Sizes.
#define FOR_TYPE(T, name)                                                                                                   \
    extern "C" int decode7_##name(const void *blocks, const void *states, float *x, const int64_t *sizes, int threads) {     \
        const Sizes of{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7]};                     \
        FOR_SIZE(of.size, token, (const Block<T> *)blocks, (const State *)states, x, of, threads)                           \
    }
FOR_TYPE(float, float32)
FOR_TYPE(bf16, bfloat16)
