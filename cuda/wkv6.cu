// WKV-6, and WKV-5, whose decay is the same for every token: a block for a head of a sequence (or of a chunk of EVERY tokens), a
// thread for a row or a column of its state.
//
//   y_t = S_{t-1} r_t + (sum_n r u k) v_t,   S_t = S_{t-1} diag(exp(w_t)) + v_t k_t^T      S [values, keys]
//
// r k v y and their gradients: T [tokens, H, N]; w, the logarithm of the decay: float32, [tokens, H, N], or [H, N] (each = 0); its
// gradient: float32 [tokens, H, N]; u: float32 [H, N]; its gradient: [chunks, H, N]. The rest is as in wkv7.cu. The decay has no
// lower bound, so nothing is divided by it, and no gradient is a difference of sums: a token's state is computed again instead.
#include "device.h"

#define PART 8  // tokens of a chunk's part: what is computed again for one token is at most that many

namespace {

// Row i of the state. grid (H, sequences)
template <typename T>
__device__ inline void forward(
    const T *r, const float *w, const T *k, const T *v, const float *u, const float *s0, T *y, float *last, float *kept,
    const int *span, int keep, int each, int H
) {
    __shared__ Shared R, D, K, RUK;
    const int h = blockIdx.x, q = blockIdx.y, i = threadIdx.x;
    const int begin = span[3 * q], end = span[3 * q + 1], first = span[3 * q + 2];
    const long mine = (((long)q * H + h) * N + i) * N;
    const float bonus = u[h * N + i];
    float s[N];
#pragma unroll
    for (int j = 0; j < N; j++) s[j] = s0[mine + j];
    long p = at(begin, H, h, i);
    float r1 = from(r[p]), w1 = w[each ? p : h * N + i], k1 = from(k[p]), v1 = from(v[p]);
    for (int t = begin; t < end; t++) {
        const int now = t & 1;
        const float value = v1;
        R.of[now][i] = r1, D.of[now][i] = expf(w1), K.of[now][i] = k1, RUK.of[now][i] = r1 * bonus * k1;
        if (t + 1 < end) {  // on its way while this token is computed
            p = at(t + 1, H, h, i);
            r1 = from(r[p]), k1 = from(k[p]), v1 = from(v[p]);
            if (each) w1 = w[p];
        }
        __syncthreads();
        if (keep && (t - begin) % EVERY == 0) {
            float *to = kept + ((long)(first + (t - begin) / EVERY) * H + h) * N * N + i * N;
#pragma unroll
            for (int j = 0; j < N; j++) to[j] = s[j];
        }
        Sum out, own;
#pragma unroll
        for (int j = 0; j < N; j++) {
            out.add(j, s[j] * R.of[now][j]);
            own.add(j, RUK.of[now][j]);
            s[j] = s[j] * D.of[now][j] + value * K.of[now][j];
        }
        put(y + at(t, H, h, i), out.total() + own.total() * value);
    }
#pragma unroll
    for (int j = 0; j < N; j++) last[mine + j] = s[j];
}

// Row i of G, the gradient of the state, from the last token to the first: dv, and G behind every chunk. grid (H, sequences)
template <typename T>
__device__ inline void rows_backward(
    const T *r, const float *w, const T *k, const float *u, const T *dy, const float *dlast, T *dv, float *ds0, float *behind,
    const int *span, int each, int H
) {
    __shared__ Shared R, D, K, RUK;
    const int h = blockIdx.x, q = blockIdx.y, i = threadIdx.x;
    const int begin = span[3 * q], end = span[3 * q + 1], first = span[3 * q + 2];
    const long mine = (((long)q * H + h) * N + i) * N;
    const float bonus = u[h * N + i];
    float g[N];
#pragma unroll
    for (int j = 0; j < N; j++) g[j] = dlast[mine + j];
    long p = at(end - 1, H, h, i);
    float r1 = from(r[p]), w1 = w[each ? p : h * N + i], k1 = from(k[p]), dy1 = from(dy[p]);
    for (int t = end - 1; t >= begin; t--) {
        const int now = t & 1;
        const float slope = dy1;
        R.of[now][i] = r1, D.of[now][i] = expf(w1), K.of[now][i] = k1, RUK.of[now][i] = r1 * bonus * k1;
        if (t > begin) {
            p = at(t - 1, H, h, i);
            r1 = from(r[p]), k1 = from(k[p]), dy1 = from(dy[p]);
            if (each) w1 = w[p];
        }
        __syncthreads();
        if (t == end - 1 || (t + 1 - begin) % EVERY == 0) {
            float *to = behind + ((long)(first + (t - begin) / EVERY) * H + h) * N * N + i * N;
#pragma unroll
            for (int j = 0; j < N; j++) to[j] = g[j];
        }
        Sum of_v, own;
#pragma unroll
        for (int j = 0; j < N; j++) {
            of_v.add(j, g[j] * K.of[now][j]);
            own.add(j, RUK.of[now][j]);
            g[j] = g[j] * D.of[now][j] + slope * R.of[now][j];
        }
        put(dv + at(t, H, h, i), of_v.total() + own.total() * slope);
    }
#pragma unroll
    for (int j = 0; j < N; j++) ds0[mine + j] = g[j];
}

// Column j of S through tokens begin..end of a chunk. values: v of the chunk's tokens, for all threads.
template <typename T>
__device__ inline void advance(
    float *s, const float *w, const T *k, const float *values, int begin, int end, int start, int each, int H, int h, int j
) {
    for (int t = begin; t < end; t++) {
        const long p = at(t, H, h, j);
        const float decay = expf(w[each ? p : h * N + j]), key = from(k[p]);
#pragma unroll
        for (int i = 0; i < N; i++) s[i] = s[i] * decay + values[(t - start) * N + i] * key;
    }
}

// Column j of G back through a chunk, beside column j of S, which is computed again: from the chunk's beginning to that of the
// part, and from there to the token. dr, dk, dw, and the chunk's share of du. grid (H, chunks)
template <typename T>
__device__ inline void columns(
    const T *r, const float *w, const T *k, const T *v, const float *u, const T *dy, const float *kept, const float *behind, T *dr,
    float *dw, T *dk, float *du, const int *chunk, int each, int H
) {
    __shared__ float values[EVERY * N];
    __shared__ Shared DY;
    const int h = blockIdx.x, c = blockIdx.y, j = threadIdx.x;
    const int begin = chunk[3 * c], end = chunk[3 * c + 1];
    const long corner = ((long)c * H + h) * N * N;
    const float bonus = u[h * N + j];
    float g[N], base[N], s[N], of_u = 0.0f;
    for (int t = begin; t < end; t++) values[(t - begin) * N + j] = from(v[at(t, H, h, j)]);
#pragma unroll
    for (int i = 0; i < N; i++) g[i] = behind[corner + i * N + j];
    __syncthreads();
    for (int part = (end - 1 - begin) / PART; part >= 0; part--) {
        const int low = begin + part * PART, high = low + PART < end ? low + PART : end;
#pragma unroll
        for (int i = 0; i < N; i++) base[i] = kept[corner + i * N + j];
        advance(base, w, k, values, begin, low, begin, each, H, h, j);
        for (int t = high - 1; t >= low; t--) {
            const long p = at(t, H, h, j);
            DY.of[t & 1][j] = from(dy[p]);
            const float decay = expf(w[each ? p : h * N + j]), read = from(r[p]), key = from(k[p]);
#pragma unroll
            for (int i = 0; i < N; i++) s[i] = base[i];
            advance(s, w, k, values, low, t, begin, each, H, h, j);
            __syncthreads();
            const float *value = values + (t - begin) * N, *slope = DY.of[t & 1];
            Sum both, of_r, of_k, of_w;
#pragma unroll
            for (int i = 0; i < N; i++) {
                both.add(i, value[i] * slope[i]);
                of_r.add(i, s[i] * slope[i]);
                of_k.add(i, g[i] * value[i]);
                of_w.add(i, g[i] * s[i]);
                g[i] = g[i] * decay + slope[i] * read;
            }
            const float own = both.total();
            put(dr + p, of_r.total() + bonus * key * own);
            put(dk + p, of_k.total() + bonus * read * own);
            dw[p] = of_w.total() * decay;
            of_u += read * key * own;
        }
    }
    du[((long)c * H + h) * N + j] = of_u;
}

}  // namespace

#define FOR_TYPE(T, name)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(N) wkv6_forward_##name(                                                          \
        const T *r, const float *w, const T *k, const T *v, const float *u, const float *s0, T *y, float *last, float *kept,       \
        const int *span, int keep, int each, int H                                                                                 \
    ) {                                                                                                                            \
        forward<T>(r, w, k, v, u, s0, y, last, kept, span, keep, each, H);                                                         \
    }                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(N) wkv6_rows_##name(                                                             \
        const T *r, const float *w, const T *k, const float *u, const T *dy, const float *dlast, T *dv, float *ds0, float *behind, \
        const int *span, int each, int H                                                                                           \
    ) {                                                                                                                            \
        rows_backward<T>(r, w, k, u, dy, dlast, dv, ds0, behind, span, each, H);                                                   \
    }                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(N) wkv6_columns_##name(                                                          \
        const T *r, const float *w, const T *k, const T *v, const float *u, const T *dy, const float *kept, const float *behind,   \
        T *dr, float *dw, T *dk, float *du, const int *chunk, int each, int H                                                      \
    ) {                                                                                                                            \
        columns<T>(r, w, k, v, u, dy, kept, behind, dr, dw, dk, du, chunk, each, H);                                               \
    }
FOR_TYPE(float, float32)
FOR_TYPE(bf16, bfloat16)
