// WKV-7 in a single pass on tensor cores: a block takes a head of a sequence from its first token to its last, L at a time, with the
// state in its registers, and hands nothing on through memory. For many heads and sequences, which fill a GPU by themselves; the
// algebra is that of wkv7_chunked.cu.
//
// Backwards the states between two that were kept are made again, once for EVERY tokens, and lie with what was solved for in room of
// the block's own (states, solved: float32 [sequences, H, steps, N, N] and [.., steps, L, N]; steps: parts in EVERY tokens, or in the
// longest sequence), small enough to stay in the GPU's cache.
//
// Inputs, outputs and states as in wkv7.cu; span: [sequences, 3] first token, behind the last one, first chunk.
#include "tensor.h"

constexpr int L = 16;
#include "wkv7_parts.h"

namespace {

// shared memory of a block, in floats
constexpr int COMMON = 4 * L * LINE + 2 * L * SQUARE + L * HALVES + N + SUMS;
constexpr int FORWARD_ROOM = COMMON + 2 * L * LINE + N * LINE;
constexpr int BACKWARD_ROOM = COMMON + 4 * L * LINE + N * LINE;

struct Common {
    float *qa, *kb, *x, *inv, *end, *sums, *more;
    __device__ inline Common(float *room)
        : qa(room), kb(qa + 2 * L * LINE), x(kb + 2 * L * LINE), inv(x + 2 * L * SQUARE), end(inv + L * HALVES), sums(end + N),
          more(room + COMMON) {}
};

__device__ inline Part part_at(int t, int end) { return {t, end - t < L ? end - t : L}; }

// Z = I (A S^T + X_AK V) of a part, rounded, behind V in values; y as well, if it is wanted. own: where Z is wanted beside, or null.
// X and its inverse are made on the way.
template <typename T, bool Out, typename State>
__device__ inline void solve(const Common &in, float *values, State state, T *y, float *own, Part part, int H, int h) {
    Product<L, N> asked, out;
    scores(in.x, in.qa, in.kb);
    asked.template add<N>(in_shared(in.qa + L * LINE), state.transposed());
    if (Out) out.template add<N>(in_shared(in.qa), state.transposed());
    __syncthreads();
    const View<> x = {in.x, SQUARE, 1};
    asked.template add<L>(x.from(L, 0), in_shared(values));
    if (Out) out.template add<L>(x, in_shared(values));
    asked.round();
    asked.store(values + L * LINE, LINE);
    inverse(in.inv, x.from(L, L));
    __syncthreads();
    Product<L, N> z;
    z.template add<L>(View<false>{in.inv, HALVES, 1}, in_shared(values + L * LINE));
    z.round();
    if (own) z.store(own, N);
    z.store(values + L * LINE, LINE);  // (a warp has the same columns of both, all their rows: nobody else has read them)
    __syncthreads();
    if (Out) {
        out.template add<L>(x.from(0, L), in_shared(values + L * LINE));
        out.each([=](int i, int j, float value) {
            if (i < part.count) put(y + at(part.begin + i, H, h, j), value);
        });
    }
}

// S' = (S + [V; Z]^T [K; B]) diag(E)
__device__ inline void step(Product<N, N> &s, const Common &in, const float *values) {
    s.template add<2 * L>(in_shared(values).transposed(), in_shared(in.kb));
    const float *end = in.end;
    s.each([=](int, int j, float &x) { x *= end[j]; });
}

// grid (H, sequences)
template <typename T>
__device__ inline void forward(
    const T *r, const float *w, const T *k, const T *v, const T *a, const T *b, const float *s0, T *y, float *last, float *kept,
    const int *span, int H
) {
    ROOM(room, FORWARD_ROOM);
    const Common in(room);
    float *values = in.more, *state = values + 2 * L * LINE;
    const int h = blockIdx.x, q = blockIdx.y;
    const long mine = ((long)q * H + h) * N * N;
    const int begin = span[3 * q], end = span[3 * q + 1], first = span[3 * q + 2];
    Product<N, N> s;
    s.each([=](int i, int j, float &x) { x = s0[mine + i * N + j]; });
    Inputs<T> next;  // on their way while a part is computed
    next.fetch(r, w, k, a, b, part_at(begin, end), H, h);
    for (int t = begin; t < end; t += L) {
        const Part here = part_at(t, end), then = part_at(t + L, end);  // (of nothing, behind the last one)
        if (kept && (t - begin) % EVERY == 0) s.store(kept + ((long)(first + (t - begin) / EVERY) * H + h) * N * N, N);
        s.each([=](int i, int j, float x) { state[i * LINE + j] = tf32(x); });
        Share<T> value;
        value.fetch(v, here, H, h);
        scaled<T>(in.qa, in.kb, in.end, in.sums, next);
        value.lay(values);
        next.fetch(r, w, k, a, b, then, H, h);
        __syncthreads();
        solve<T, true>(in, values, in_shared(state), y, nullptr, here, H, h);
        step(s, in, values);  // (what the next part writes before a barrier of its own, nobody reads here)
    }
    s.store(last + mine, N);
}

// grid (H, sequences)
template <typename T>
__device__ inline void backward(
    const T *r, const float *w, const T *k, const T *v, const T *a, const T *b, const T *dy, const float *dlast, const float *kept,
    T *dr, float *dw, T *dk, T *dv, T *da, T *db, float *ds0, float *states, float *solved, const int *span, int steps, int H
) {
    ROOM(room, BACKWARD_ROOM);
    const Common in(room);
    float *values = in.more, *dvalues = values + 2 * L * LINE, *slope = dvalues + 2 * L * LINE;  // slope: of the state, not rounded
    const int h = blockIdx.x, q = blockIdx.y;
    const long block = (long)q * H + h, mine = block * N * N;
    const int begin = span[3 * q], end = span[3 * q + 1], first = span[3 * q + 2];
    states += block * steps * N * N, solved += block * steps * L * N;
    for (int n = threadIdx.x; n < N * N; n += THREADS) slope[n / N * LINE + n % N] = dlast[mine + n];
    for (int c = (end - begin + EVERY - 1) / EVERY - 1; c >= 0; c--) {
        const int chunk = begin + c * EVERY, chunk_end = chunk + EVERY < end ? chunk + EVERY : end, parts = (chunk_end - chunk + L - 1) / L;
        {
            const float *before = kept + ((long)(first + c) * H + h) * N * N;
            Product<N, N> s;
            s.each([=](int i, int j, float &x) { x = before[i * N + j]; });
            for (int n = 0; n < parts; n++) {
                const Part here = part_at(chunk + n * L, chunk_end);
                s.store(states + n * N * N, N);
                {
                    Inputs<T> now;
                    Share<T> value;
                    now.fetch(r, w, k, a, b, here, H, h), value.fetch(v, here, H, h);
                    scaled<T>(in.qa, in.kb, in.end, in.sums, now);
                    value.lay(values);
                }
                __syncthreads();
                solve<T, false>(in, values, View<false>{states + n * N * N, N, 1}, (T *)nullptr, solved + n * L * N, here, H, h);
                if (n + 1 < parts) step(s, in, values);
            }
        }
        for (int n = parts - 1; n >= 0; n--) {
            const Part here = part_at(chunk + n * L, chunk_end);
            float before;
            {
                Inputs<T> now;
                Share<T> value, dvalue;
                now.fetch(r, w, k, a, b, here, H, h), value.fetch(v, here, H, h), dvalue.fetch(dy, here, H, h);
                before = scaled<T>(in.qa, in.kb, in.end, in.sums, now);
                value.lay(values), dvalue.lay(dvalues);
            }
            for (int m = threadIdx.x; m < L * N; m += THREADS) values[(L + m / N) * LINE + m % N] = solved[n * L * N + m];
            __syncthreads();
            scores(in.x, in.qa, in.kb);
            const float *decay = in.end;
            for (int m = threadIdx.x; m < N * N; m += THREADS) slope[m / N * LINE + m % N] *= decay[m % N];
            __syncthreads();
            // dZ = I^T (B G^T + X_QB^T dy),  dv = K G^T + X_QK^T dy + X_AK^T dZ
            const View<> x = {in.x, SQUARE, 1};
            const View<false> of_state = {slope, LINE, 1};
            Product<L, N> asked, out;
            asked.template add<N>(in_shared(in.kb + L * LINE), of_state.transposed());
            asked.template add<L>(x.from(0, L).transposed(), in_shared(dvalues));
            asked.round();
            asked.store(dvalues + L * LINE, LINE);
            inverse(in.inv, x.from(L, L));
            __syncthreads();
            Product<L, N> z;
            z.template add<L>(View<false>{in.inv, HALVES, 1}.transposed(), in_shared(dvalues + L * LINE));
            z.round();
            out.template add<N>(in_shared(in.kb), of_state.transposed());
            out.template add<L>(x.transposed(), in_shared(dvalues));
            z.store(dvalues + L * LINE, LINE);
            __syncthreads();
            out.template add<L>(x.from(L, 0).transposed(), in_shared(dvalues + L * LINE));
            out.each([=](int i, int j, float value) {
                if (i < here.count) put(dv + at(here.begin + i, H, h, j), value);
            });
            __syncthreads();
            const View<false> state = {states + n * N * N, N, 1};
            const float *qa = in.qa;
            const auto step_back = [=] {  // G' = G diag(E) + [dy; dZ]^T [Q; A]
                Product<N, N> g;
                g.each([=](int i, int j, float &x) { x = slope[i * LINE + j]; });
                g.template add<2 * L>(in_shared(dvalues).transposed(), in_shared(qa));
                g.store(slope, LINE);
            };
            slopes<T>(
                in.qa, in.kb, values, dvalues, in.x, in.sums, state, of_state, before, r, w, k, a, b, dr, dw, dk, da, db, here, H, h, step_back
            );
            __syncthreads();
        }
    }
    for (int n = threadIdx.x; n < N * N; n += THREADS) ds0[mine + n] = slope[n / N * LINE + n % N];
}

}  // namespace

#define BOUNDS __launch_bounds__(THREADS, 3)
#define FOR_TYPE(T, name)                                                                                                         \
    extern "C" __global__ void BOUNDS wkv7_onepass_forward_##name(                                                                     \
        const T *r, const float *w, const T *k, const T *v, const T *a, const T *b, const float *s0, T *y, float *last,           \
        float *kept, const int *span, int H                                                                                       \
    ) {                                                                                                                           \
        forward<T>(r, w, k, v, a, b, s0, y, last, kept, span, H);                                                                 \
    }                                                                                                                             \
    extern "C" __global__ void BOUNDS wkv7_onepass_backward_##name(                                                                    \
        const T *r, const float *w, const T *k, const T *v, const T *a, const T *b, const T *dy, const float *dlast,              \
        const float *kept, T *dr, float *dw, T *dk, T *dv, T *da, T *db, float *ds0, float *states, float *solved,                \
        const int *span, int steps, int H                                                                                         \
    ) {                                                                                                                           \
        backward<T>(r, w, k, v, a, b, dy, dlast, kept, dr, dw, dk, dv, da, db, ds0, states, solved, span, steps, H);              \
    }
FOR_TYPE(bf16, bfloat16)
#ifdef EMULATE
FOR_TYPE(float, float32)
#endif
