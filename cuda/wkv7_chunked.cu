// WKV-7 in parts of L tokens, on tensor cores: what of a part does not depend on the state is computed for all parts at once, and one
// small step a part is left to do in turn. For few heads and sequences, where wkv7.cu would leave most of a GPU idle. The algebra is
// that of rwkv_peft/ops/torch_wkv7.py, with its letters: [Q; A] and [K; B] are scaled to the start of the part,
//
//   X = tril([Q; A] [K; B]^T)     (rows of A see earlier tokens only)          I = (1 - X_AB)^-1
//   Z = I (A S^T + X_AK V)        y = Q S^T + X_QK V + X_QB Z                  S' = (S + [V; Z]^T [K; B]) diag(E)
//
// and backwards it is the same with X^T for X, [K; B] for [Q; A], dy for V and G diag(E) for S: `prepare` and `pass` do both ways.
//
// r k v a b y and their gradients: T [tokens, H, N]; w, the logarithm of the decay, and its gradient: float32. States: float32
// [.., H, N, N]. part: [parts, 3] first token, behind the last one, and which of the kept states is the one before it, or -1; span:
// [spans, 2] first part, behind the last one. What is handed on between kernels (asks, adds, keys): float32 [parts, H, 2 L, N].
#include "tensor.h"

constexpr int L = 32;
#include "wkv7_parts.h"

namespace {

// shared memory of a block, in floats
constexpr int PREPARE_ROOM = 5 * L * LINE + 2 * L * SQUARE + L * HALVES;
constexpr int PASS_ROOM = 4 * L * LINE + 16 * LINE + 2 * L * 20;
constexpr int GRADIENTS_ROOM = 8 * L * LINE + 2 * L * SQUARE + SUMS;

__device__ inline Part part_of(const int *part, int p) { return {part[3 * p], part[3 * p + 1] - part[3 * p]}; }

// What `pass` needs of every part, which does not depend on the state. Forwards:
//   asks = [I A; Q + X_QB I A]   adds = [I X_AK V; X_QK V + X_QB I X_AK V]   keys = [K; B]
// backwards the same with X^T, I^T, [K; B] for [Q; A] and back, and dy for V. grid (H, parts)
template <typename T, bool Back>
__device__ inline void prepare(
    const T *r, const float *w, const T *k, const T *v, const T *a, const T *b, float *asks, float *adds, float *keys, float *end,
    const int *part, int H
) {
    ROOM(room, PREPARE_ROOM);
    float *qa = room, *kb = qa + 2 * L * LINE, *values = kb + 2 * L * LINE, *x = values + L * LINE, *inv = x + 2 * L * SQUARE;
    const int h = blockIdx.x, p = blockIdx.y;
    const Part here = part_of(part, p);
    const long corner = ((long)p * H + h) * 2 * L * N;
    {
        Inputs<T> in;
        Share<T> value;
        in.fetch(r, w, k, a, b, here, H, h), value.fetch(v, here, H, h);
        scaled<T>(qa, kb, Back ? nullptr : end + ((long)p * H + h) * N, x, in);
        value.lay(values);
    }
    __syncthreads();
    float *own = Back ? kb : qa, *other = Back ? qa : kb;
    scores(x, qa, kb);
    for (int n = threadIdx.x; n < 2 * L * N; n += THREADS) keys[corner + n] = other[n / N * LINE + n % N];
    __syncthreads();
    inverse(inv, View<>{x, SQUARE, 1}.from(L, L));
    const View<> straight = {x, SQUARE, 1}, seen = Back ? straight.transposed() : straight;
    const View<false> solving = {inv, HALVES, 1}, solved = Back ? solving.transposed() : solving;
    {
        Product<2 * L, N> of_values;  // of the queries', then of those that are solved for; where the others were
        of_values.template add<L>(seen, in_shared(values));
        of_values.each([=](int i, int j, float value) { other[i * LINE + j] = i < L ? value : tf32(value); });
    }
    __syncthreads();
    float *first = own, *second = own + L * LINE, *out = other, *asked = other + L * LINE;
    Product<L, N> z, u;
    z.template add<L>(solved, in_shared(second));
    u.template add<L>(solved, in_shared(asked));
    __syncthreads();
    u.store(adds + corner, N);
    z.round(), u.round();
    z.store(asks + corner, N), z.store(second, LINE), u.store(asked, LINE);
    __syncthreads();
    Product<L, N> more, plus;
    more.template add<L>(seen.from(0, L), in_shared(second));
    plus.template add<L>(seen.from(0, L), in_shared(asked));
    more.each([=](int i, int j, float value) { asks[corner + (L + i) * N + j] = tf32(first[i * LINE + j] + value); });
    plus.each([=](int i, int j, float value) { adds[corner + (L + i) * N + j] = out[i * LINE + j] + value; });
}

// Rows of the state through the parts of a span, one after another. Forwards: y, the last state, and the states before the parts that
// have a place. Backwards, with dy for v: dv for y, the gradient of the first state, and that of the state behind every part times its
// decay. What is not wanted is a null pointer. again: for the backward pass; the states of all parts, in their order, and what was
// solved for, which takes its place in adds. grid (H N / 16, spans)
template <typename T, bool Back>
__device__ inline void pass(
    const T *v, const float *asks, float *adds, const float *keys, const float *end, const float *s0, T *y, float *last, float *states,
    const int *part, const int *span, int again, int H
) {
    ROOM(room, PASS_ROOM);
    float *ask = room, *key = ask + 2 * L * LINE, *state = key + 2 * L * LINE, *value = state + 16 * LINE;
    constexpr int SPLIT = N / 16, EACH = 2 * L * N / THREADS;
    const int h = blockIdx.x / SPLIT, row = blockIdx.x % SPLIT * 16, q = blockIdx.y, i16 = threadIdx.x % 16, line = threadIdx.x / 16;
    const int from_part = span[2 * q], to_part = span[2 * q + 1], step = Back ? -1 : 1;
    const long mine = ((long)q * H + h) * N * N + row * N;
    Product<16, N> s;
    s.each([=](int i, int j, float &x) { x = s0[mine + i * N + j]; });
    float next_ask[EACH], next_key[EACH];  // on their way while a part is computed
    const auto fetch = [&](int p) {
        const long corner = ((long)p * H + h) * 2 * L * N + threadIdx.x;
#pragma unroll
        for (int n = 0; n < EACH; n++) next_ask[n] = asks[corner + n * THREADS], next_key[n] = keys[corner + n * THREADS];
    };
    int p = Back ? to_part - 1 : from_part;
    if (from_part < to_part) fetch(p);
    for (; p >= from_part && p < to_part; p += step) {
        const Part here = part_of(part, p);
        const float *decay = end + ((long)p * H + h) * N;
        const long corner = ((long)p * H + h) * 2 * L * N;
#pragma unroll
        for (int n = 0; n < EACH; n++) {
            const int at_n = threadIdx.x + n * THREADS, place = at_n / N * LINE + at_n % N;
            ask[place] = next_ask[n], key[place] = next_key[n];
        }
        for (int t = line; t < L; t += THREADS / 16)
            value[t * 20 + i16] = t < here.count ? tf32(from(v[at(here.begin + t, H, h, row + i16)])) : 0.0f;
        const int place = again ? p : part[3 * p + 2];
        float *keep = place < 0 || !states ? nullptr : states + ((long)place * H + h) * N * N + row * N;
        // all that memory has to give is asked for at once: behind a store, each number would wait for the one before
        Product<2 * L, 16> found;
        found.each([=](int t, int i, float &x) { x = adds[corner + t * N + row + i]; });
        Product<16, N> decays;
        decays.each([=](int, int j, float &x) { x = decay[j]; });
        if (Back) s.scale(decays);
        s.each([=](int i, int j, float &x) {
            state[i * LINE + j] = tf32(x);
            if (keep) keep[i * N + j] = x;
        });
        __syncthreads();
        if (p + step >= from_part && p + step < to_part) fetch(p + step);
        found.template add<N>(in_shared(ask), in_shared(state).transposed());
        found.each([=](int t, int i, float x) {
            if (t < L) {
                value[(L + t) * 20 + i] = tf32(x);
                if (again) adds[corner + t * N + row + i] = x;
            } else if (y && t - L < here.count)
                put(y + at(here.begin + t - L, H, h, row + i), x);
        });
        __syncthreads();
        s.template add<2 * L>(View<>{value, 20, 1}.transposed(), in_shared(key));
        if (!Back) s.scale(decays);
        __syncthreads();
    }
    if (last) s.each([=](int i, int j, float x) { last[mine + i * N + j] = x; });
}

// Every other gradient of a part's inputs, from the states before it (states), the gradient of the one behind it times its decay
// (slopes_behind), and what was solved for both ways (solved, dsolved: the adds of both passes). grid (H, parts)
template <typename T>
__device__ inline void gradients(
    const T *r, const float *w, const T *k, const T *v, const T *a, const T *b, const T *dy, const float *solved,
    const float *dsolved, const float *states, const float *slopes_behind, T *dr, float *dw, T *dk, T *da, T *db, const int *part, int H
) {
    ROOM(room, GRADIENTS_ROOM);
    float *qa = room, *kb = qa + 2 * L * LINE, *values = kb + 2 * L * LINE, *dvalues = values + 2 * L * LINE;
    float *x = dvalues + 2 * L * LINE, *sums = x + 2 * L * SQUARE;
    const int h = blockIdx.x, p = blockIdx.y;
    const Part here = part_of(part, p);
    const long corner = ((long)p * H + h) * 2 * L * N, square = ((long)p * H + h) * N * N;
    float before;
    {
        Inputs<T> in;
        Share<T> value, dvalue;
        in.fetch(r, w, k, a, b, here, H, h), value.fetch(v, here, H, h), dvalue.fetch(dy, here, H, h);
        before = scaled<T>(qa, kb, nullptr, sums, in);
        value.lay(values), dvalue.lay(dvalues);
    }
    for (int n = threadIdx.x; n < L * N; n += THREADS) {
        const int place = (L + n / N) * LINE + n % N;
        values[place] = tf32(solved[corner + n]), dvalues[place] = tf32(dsolved[corner + n]);
    }
    __syncthreads();
    const View<false> state = {states + square, N, 1}, slope = {slopes_behind + square, N, 1};
    slopes<T>(qa, kb, values, dvalues, x, sums, state, slope, before, r, w, k, a, b, dr, dw, dk, da, db, here, H, h, [] {});
}

}  // namespace

#define BOUNDS __launch_bounds__(THREADS)
#define FOR_TYPE(T, name)                                                                                                          \
    extern "C" __global__ void BOUNDS wkv7_chunked_prepare_##name(                                                                      \
        const T *r, const float *w, const T *k, const T *v, const T *a, const T *b, float *asks, float *adds, float *keys,         \
        float *end, const int *part, int H                                                                                         \
    ) {                                                                                                                            \
        prepare<T, false>(r, w, k, v, a, b, asks, adds, keys, end, part, H);                                                       \
    }                                                                                                                              \
    extern "C" __global__ void BOUNDS wkv7_chunked_prepareback_##name(                                                                  \
        const T *r, const float *w, const T *k, const T *dy, const T *a, const T *b, float *asks, float *adds, float *keys,        \
        const int *part, int H                                                                                                     \
    ) {                                                                                                                            \
        prepare<T, true>(r, w, k, dy, a, b, asks, adds, keys, nullptr, part, H);                                                   \
    }                                                                                                                              \
    extern "C" __global__ void BOUNDS wkv7_chunked_pass_##name(                                                                         \
        const T *v, const float *asks, float *adds, const float *keys, const float *end, const float *s0, T *y, float *last,       \
        float *states, const int *part, const int *span, int again, int H                                                          \
    ) {                                                                                                                            \
        pass<T, false>(v, asks, adds, keys, end, s0, y, last, states, part, span, again, H);                                       \
    }                                                                                                                              \
    extern "C" __global__ void BOUNDS wkv7_chunked_passback_##name(                                                                     \
        const T *dy, const float *asks, float *adds, const float *keys, const float *end, const float *dlast, T *dv, float *ds0,   \
        float *slopes, const int *part, const int *span, int H                                                                     \
    ) {                                                                                                                            \
        pass<T, true>(dy, asks, adds, keys, end, dlast, dv, ds0, slopes, part, span, 1, H);                                        \
    }                                                                                                                              \
    extern "C" __global__ void BOUNDS wkv7_chunked_gradients_##name(                                                                    \
        const T *r, const float *w, const T *k, const T *v, const T *a, const T *b, const T *dy, const float *solved,              \
        const float *dsolved, const float *states, const float *slopes, T *dr, float *dw, T *dk, T *da, T *db, const int *part,    \
        int H                                                                                                                      \
    ) {                                                                                                                            \
        gradients<T>(r, w, k, v, a, b, dy, solved, dsolved, states, slopes, dr, dw, dk, da, db, part, H);                          \
    }
FOR_TYPE(bf16, bfloat16)
#ifdef EMULATE
FOR_TYPE(float, float32)
#endif
