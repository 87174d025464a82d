// WKV-7 in parts of L tokens, on tensor cores: what of a part does not depend on the state is computed for all parts at once, and one
// small step a part is left to do in turn. For few heads and sequences, where wkv7.cu would leave most of a GPU idle. The algebra is
// that of rwkv_peft/ops/chunked.py, with its letters: [Q; A] and [K; B] are scaled to the start of the part,
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

namespace {

constexpr int L = 32;
constexpr int LINE = N + 4, SQUARE = 2 * L + 4, HALVES = L + 4;  // from row to row in shared memory: few conflicts in products
constexpr int SLICES = THREADS / N, SLICE = L / SLICES;         // a column's tokens are divided among so many threads

// shared memory of a block, in floats
constexpr int PREPARE_ROOM = 5 * L * LINE + 2 * L * SQUARE + L * HALVES;
constexpr int PASS_ROOM = 4 * L * LINE + 16 * LINE + 2 * L * 20;
constexpr int GRADIENTS_ROOM = 8 * L * LINE + 2 * L * SQUARE + SLICES * N;

// Matrices that stay in shared memory for products are rounded when they are written; what is added to a sum is not.
__device__ inline View<> in_shared(const float *p) { return {p, LINE, 1}; }

struct Part {
    int begin, count;
    __device__ inline Part(const int *part, int p) : begin(part[3 * p]), count(part[3 * p + 1] - part[3 * p]) {}
};

// The running sum of the logarithms of a column's decays before the thread's own tokens.
__device__ inline float before_slice(const float *w, Part part, int H, int h) {
    const int j = threadIdx.x % N, own = threadIdx.x / N * SLICE;
    float sum = 0.0f;
    for (int i = 0; i < own && i < part.count; i++) sum += w[at(part.begin + i, H, h, j)];
    return sum;
}

// [Q; A] and [K; B] of a part, in rows of LINE; behind its last token there is nothing. end: E, if it is wanted.
template <typename T>
__device__ inline void scaled(
    float *qa, float *kb, float *end, const T *r, const float *w, const T *k, const T *a, const T *b, Part part, int H, int h
) {
    const int j = threadIdx.x % N, own = threadIdx.x / N * SLICE;
    float sum = before_slice(w, part, H, h);
    for (int i = own; i < own + SLICE; i++) {
        const bool there = i < part.count;
        const long p = at(part.begin + i, H, h, j);
        const float before = expf(sum);
        if (there) sum += w[p];
        const float up = expf(sum), down = expf(-sum);
        qa[i * LINE + j] = there ? tf32(from(r[p]) * up) : 0.0f;
        qa[(L + i) * LINE + j] = there ? tf32(from(a[p]) * before) : 0.0f;
        kb[i * LINE + j] = there ? tf32(from(k[p]) * down) : 0.0f;
        kb[(L + i) * LINE + j] = there ? tf32(from(b[p]) * down) : 0.0f;
    }
    if (end && own + SLICE == L) end[j] = expf(sum);
}

template <typename T> __device__ inline void loaded(float *to, const T *x, Part part, int H, int h) {
    for (int n = threadIdx.x; n < L * N; n += THREADS) {
        const int i = n / N, j = n % N;
        to[i * LINE + j] = i < part.count ? tf32(from(x[at(part.begin + i, H, h, j)])) : 0.0f;
    }
}

// Whether token i of [Q; A] sees token j of [K; B].
__device__ inline bool sees(int i, int j) { return i < L ? i >= j % L : i - L > j % L; }

// (1 - m)^-1 [L, L] of a matrix m below its diagonal, by substitution in the halves on the diagonal and their product with what is
// between them. Powers of m are never formed: with repeated keys they grow like binomials and cancel to noise.
__device__ inline void inverse(float *out, View<> m) {
    constexpr int HALF = L / 2;
    if (threadIdx.x < L) {
        const int half = threadIdx.x / HALF * HALF, column = threadIdx.x % HALF;
        float x[HALF];
#pragma unroll
        for (int i = 0; i < HALF; i++) {
            float sum = i == column ? 1.0f : 0.0f;
#pragma unroll
            for (int j = 0; j < i; j++) sum += m(half + i, half + j) * x[j];
            x[i] = sum;
            out[(half + i) * HALVES + half + column] = sum;
        }
    }
    __syncthreads();
    const View<> found = {out, HALVES, 1};
    // beside the diagonal, above it: the product so far, until the one below it is there
    for (int n = threadIdx.x; n < HALF * HALF; n += THREADS) {
        const int i = n / HALF, j = n % HALF;
        float sum = 0.0f;
#pragma unroll
        for (int x = 0; x < HALF; x++) sum += m(HALF + i, x) * found(x, j);
        out[i * HALVES + HALF + j] = sum;
    }
    __syncthreads();
    for (int n = threadIdx.x; n < HALF * HALF; n += THREADS) {
        const int i = n / HALF, j = n % HALF;
        float sum = 0.0f;
#pragma unroll
        for (int x = 0; x < HALF; x++) sum += found(HALF + i, HALF + x) * found(x, HALF + j);
        out[(HALF + i) * HALVES + j] = sum;
    }
    __syncthreads();
    for (int n = threadIdx.x; n < HALF * HALF; n += THREADS) out[n / HALF * HALVES + HALF + n % HALF] = 0.0f;
}

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
    const Part here(part, p);
    const long corner = ((long)p * H + h) * 2 * L * N;
    scaled<T>(qa, kb, Back ? nullptr : end + ((long)p * H + h) * N, r, w, k, a, b, here, H, h);
    loaded<T>(values, v, here, H, h);
    __syncthreads();
    float *own = Back ? kb : qa, *other = Back ? qa : kb;
    {
        Product<2 * L, 2 * L> scores;
        scores.template add<N>(in_shared(qa), in_shared(kb).transposed());
        // (of A and B only the inverse is wanted, and that of what they are)
        scores.each([=](int i, int j, float value) {
            x[i * SQUARE + j] = !sees(i, j) ? 0.0f : i < L || j < L ? tf32(value) : value;
        });
    }
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
        const Part here(part, p);
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
// (slopes), and what was solved for both ways (solved, dsolved: the adds of both passes). grid (H, parts)
template <typename T>
__device__ inline void gradients(
    const T *r, const float *w, const T *k, const T *v, const T *a, const T *b, const T *dy, const float *solved,
    const float *dsolved, const float *states, const float *slopes, T *dr, float *dw, T *dk, T *da, T *db, const int *part, int H
) {
    ROOM(room, GRADIENTS_ROOM);
    float *qa = room, *kb = qa + 2 * L * LINE, *values = kb + 2 * L * LINE, *dvalues = values + 2 * L * LINE;
    float *x = dvalues + 2 * L * LINE, *sums = x + 2 * L * SQUARE;
    const int h = blockIdx.x, p = blockIdx.y;
    const Part here(part, p);
    const long corner = ((long)p * H + h) * 2 * L * N;
    const View<false> state = {states + ((long)p * H + h) * N * N, N, 1}, slope = {slopes + ((long)p * H + h) * N * N, N, 1};
    scaled<T>(qa, kb, nullptr, r, w, k, a, b, here, H, h);
    loaded<T>(values, v, here, H, h), loaded<T>(dvalues, dy, here, H, h);
    for (int n = threadIdx.x; n < L * N; n += THREADS) {
        const int place = (L + n / N) * LINE + n % N;
        values[place] = tf32(solved[corner + n]), dvalues[place] = tf32(dsolved[corner + n]);
    }
    __syncthreads();
    {
        Product<2 * L, 2 * L> scores;
        scores.template add<N>(in_shared(dvalues), in_shared(values).transposed());
        scores.each([=](int i, int j, float value) { x[i * SQUARE + j] = sees(i, j) ? tf32(value) : 0.0f; });
    }
    Product<2 * L, N> dqa, dkb;
    dqa.template add<N>(in_shared(dvalues), state);
    dkb.template add<N>(in_shared(values), slope);
    __syncthreads();
    dkb.store(values, LINE);  // what the state behind the part has of the keys
    const View<> seen = {x, SQUARE, 1};
    dqa.template add<2 * L>(seen, in_shared(kb));
    dkb.template add<2 * L>(seen.transposed(), in_shared(qa));
    __syncthreads();
    dqa.store(qa, LINE), dkb.store(kb, LINE);
    __syncthreads();
    // back through the scaling: e^x passes on gradient * value, and x is a running sum of w
    const int j = threadIdx.x % N, slice = threadIdx.x / N, own = slice * SLICE;
    float sum = before_slice(w, here, H, h), total = 0.0f;
    for (int i = slice * (N / SLICES); i < (slice + 1) * (N / SLICES); i++) total += state(i, j) * slope(i, j);
    for (int i = own; i < own + SLICE; i++) {
        float *q = qa + i * LINE + j, *ask = q + L * LINE, *key = kb + i * LINE + j, *add = key + L * LINE;
        if (i >= here.count) {
            *q = *ask = 0.0f;
            continue;
        }
        const long place = at(here.begin + i, H, h, j);
        const float before = expf(sum);
        sum += w[place];
        const float up = expf(sum), down = expf(-sum), key_now = from(k[place]) * down, add_now = from(b[place]) * down;
        const float of_r = *q * up, of_a = *ask * before;
        put(dr + place, of_r), put(da + place, of_a), put(dk + place, *key * down), put(db + place, *add * down);
        total += key_now * values[i * LINE + j] + add_now * values[(L + i) * LINE + j];
        *ask = of_a * from(a[place]);
        *q = of_r * from(r[place]) + *ask - key_now * *key - add_now * *add;
    }
    sums[slice * N + j] = total;
    __syncthreads();
    float behind = 0.0f;
    for (int n = 0; n < SLICES; n++) behind += sums[n * N + j];
    for (int i = own + SLICE; i < L; i++) behind += qa[i * LINE + j];
    for (int i = own + SLICE - 1; i >= own; i--) {
        behind += qa[i * LINE + j];
        if (i < here.count) dw[at(here.begin + i, H, h, j)] = behind - qa[(L + i) * LINE + j];
    }
}

}  // namespace

#define BOUNDS __launch_bounds__(THREADS)
#define FOR_TYPE(T, name)                                                                                                          \
    extern "C" __global__ void BOUNDS chunk7_prepare_##name(                                                                      \
        const T *r, const float *w, const T *k, const T *v, const T *a, const T *b, float *asks, float *adds, float *keys,         \
        float *end, const int *part, int H                                                                                         \
    ) {                                                                                                                            \
        prepare<T, false>(r, w, k, v, a, b, asks, adds, keys, end, part, H);                                                       \
    }                                                                                                                              \
    extern "C" __global__ void BOUNDS chunk7_prepareback_##name(                                                                  \
        const T *r, const float *w, const T *k, const T *dy, const T *a, const T *b, float *asks, float *adds, float *keys,        \
        const int *part, int H                                                                                                     \
    ) {                                                                                                                            \
        prepare<T, true>(r, w, k, dy, a, b, asks, adds, keys, nullptr, part, H);                                                   \
    }                                                                                                                              \
    extern "C" __global__ void BOUNDS chunk7_pass_##name(                                                                         \
        const T *v, const float *asks, float *adds, const float *keys, const float *end, const float *s0, T *y, float *last,       \
        float *states, const int *part, const int *span, int again, int H                                                          \
    ) {                                                                                                                            \
        pass<T, false>(v, asks, adds, keys, end, s0, y, last, states, part, span, again, H);                                       \
    }                                                                                                                              \
    extern "C" __global__ void BOUNDS chunk7_passback_##name(                                                                     \
        const T *dy, const float *asks, float *adds, const float *keys, const float *end, const float *dlast, T *dv, float *ds0,   \
        float *slopes, const int *part, const int *span, int H                                                                     \
    ) {                                                                                                                            \
        pass<T, true>(dy, asks, adds, keys, end, dlast, dv, ds0, slopes, part, span, 1, H);                                        \
    }                                                                                                                              \
    extern "C" __global__ void BOUNDS chunk7_gradients_##name(                                                                    \
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
