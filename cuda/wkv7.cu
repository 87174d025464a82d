// WKV-7 on a GPU, one simple kernel for each pass: a block for a head of a sequence (or of a chunk of EVERY tokens), a thread for a
// row or a column of its state, which stays in registers. cuda/README.md has the formulas.
//
//   S_t = S_{t-1} diag(exp(w_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T,   y_t = S_t r_t      S [values, keys]
//
// r k v a b y and their gradients: T [tokens, H, N]; w, the logarithm of the decay, and its gradient: float32. States: float32
// [.., H, N, N]. chunk: [chunks, 3] first token, behind the last one, sequence; span: [sequences, 3] first token, behind the last
// one, first chunk.
#include "device.h"

namespace {

// Row i of the state through tokens begin..end. Keep: write the state before every chunk; Sums: write S_{t-1} a_t.
template <typename T, bool Keep, bool Sums, bool Out>
__device__ inline void rows_forward(
    float *s, const T *r, const float *w, const T *k, const T *v, const T *a, const T *b, T *y, float *sums, float *kept, int begin,
    int end, int first, int every, int H, int h
) {
    __shared__ Shared R, D, K, A, B;
    const int i = threadIdx.x;
    long p = at(begin, H, h, i);
    float r1 = Out ? from(r[p]) : 0.0f, w1 = w[p], k1 = from(k[p]), v1 = from(v[p]), a1 = from(a[p]), b1 = from(b[p]);
    for (int t = begin; t < end; t++) {
        const int now = t & 1;
        const float value = v1;
        if (Out) R.of[now][i] = r1;
        D.of[now][i] = expf(w1), K.of[now][i] = k1, A.of[now][i] = a1, B.of[now][i] = b1;
        if (t + 1 < end) {  // on its way while this token is computed
            p = at(t + 1, H, h, i);
            if (Out) r1 = from(r[p]);
            w1 = w[p], k1 = from(k[p]), v1 = from(v[p]), a1 = from(a[p]), b1 = from(b[p]);
        }
        __syncthreads();
        if (Keep && (t - begin) % every == 0) {
            float *to = kept + ((long)(first + (t - begin) / every) * H + h) * N * N + i * N;
#pragma unroll
            for (int j = 0; j < N; j++) to[j] = s[j];
        }
        Sum asked, out;
#pragma unroll
        for (int j = 0; j < N; j++) asked.add(j, s[j] * A.of[now][j]);
        const float sa = asked.total();
#pragma unroll
        for (int j = 0; j < N; j++) {
            s[j] = s[j] * D.of[now][j] + sa * B.of[now][j] + value * K.of[now][j];
            if (Out) out.add(j, s[j] * R.of[now][j]);
        }
        if (Sums) sums[at(t, H, h, i)] = sa;
        if (Out) put(y + at(t, H, h, i), out.total());
    }
    __syncthreads();  // nobody reads any more what the next call writes
}

// grid (H, sequences)
template <typename T>
__device__ inline void forward(
    const T *r, const float *w, const T *k, const T *v, const T *a, const T *b, const float *s0, T *y, float *last, float *kept,
    const int *span, int keep, int every, int H
) {
    const int h = blockIdx.x, q = blockIdx.y, i = threadIdx.x;
    const long mine = (((long)q * H + h) * N + i) * N;
    float s[N];
#pragma unroll
    for (int j = 0; j < N; j++) s[j] = s0[mine + j];
    const int begin = span[3 * q], end = span[3 * q + 1], first = span[3 * q + 2];
    if (keep)
        rows_forward<T, true, false, true>(s, r, w, k, v, a, b, y, nullptr, kept, begin, end, first, every, H, h);
    else
        rows_forward<T, false, false, true>(s, r, w, k, v, a, b, y, nullptr, nullptr, begin, end, first, every, H, h);
#pragma unroll
    for (int j = 0; j < N; j++) last[mine + j] = s[j];
}

// S_{t-1} a_t of every token, again. grid (H, chunks)
template <typename T>
__device__ inline void again(
    const float *w, const T *k, const T *v, const T *a, const T *b, const float *kept, float *sums, const int *chunk, int H
) {
    const int h = blockIdx.x, c = blockIdx.y, i = threadIdx.x;
    const float *from_here = kept + (((long)c * H + h) * N + i) * N;
    float s[N];
#pragma unroll
    for (int j = 0; j < N; j++) s[j] = from_here[j];
    rows_forward<T, false, true, false>(
        s, nullptr, w, k, v, a, b, (T *)nullptr, sums, nullptr, chunk[3 * c], chunk[3 * c + 1], 0, 1, H, h
    );
}

// Row i of G, the gradient of the state, from the last token to the first: dv, the gradient of S_{t-1} a_t (to dsums), and G behind
// every chunk. grid (H, sequences)
template <typename T>
__device__ inline void rows_backward(
    const T *r, const float *w, const T *k, const T *a, const T *b, const T *dy, const float *dlast, T *dv, float *dsums, float *ds0,
    float *behind, const int *span, int every, int H
) {
    __shared__ Shared R, D, K, A, B;
    const int h = blockIdx.x, q = blockIdx.y, i = threadIdx.x;
    const int begin = span[3 * q], end = span[3 * q + 1], first = span[3 * q + 2];
    const long mine = (((long)q * H + h) * N + i) * N;
    float g[N];
#pragma unroll
    for (int j = 0; j < N; j++) g[j] = dlast[mine + j];
    long p = at(end - 1, H, h, i);
    float r1 = from(r[p]), w1 = w[p], k1 = from(k[p]), a1 = from(a[p]), b1 = from(b[p]), dy1 = from(dy[p]);
    for (int t = end - 1; t >= begin; t--) {
        const int now = t & 1;
        const float slope = dy1;
        R.of[now][i] = r1, D.of[now][i] = expf(w1), K.of[now][i] = k1, A.of[now][i] = a1, B.of[now][i] = b1;
        if (t > begin) {
            p = at(t - 1, H, h, i);
            r1 = from(r[p]), w1 = w[p], k1 = from(k[p]), a1 = from(a[p]), b1 = from(b[p]), dy1 = from(dy[p]);
        }
        __syncthreads();
        if (t == end - 1 || (t + 1 - begin) % every == 0) {
            float *to = behind + ((long)(first + (t - begin) / every) * H + h) * N * N + i * N;
#pragma unroll
            for (int j = 0; j < N; j++) to[j] = g[j];
        }
        Sum of_v, of_sums;
#pragma unroll
        for (int j = 0; j < N; j++) {
            g[j] += slope * R.of[now][j];
            of_v.add(j, g[j] * K.of[now][j]);
            of_sums.add(j, g[j] * B.of[now][j]);
        }
        const float of_sa = of_sums.total();
#pragma unroll
        for (int j = 0; j < N; j++) g[j] = g[j] * D.of[now][j] + of_sa * A.of[now][j];
        put(dv + at(t, H, h, i), of_v.total());
        dsums[at(t, H, h, i)] = of_sa;
    }
#pragma unroll
    for (int j = 0; j < N; j++) ds0[mine + j] = g[j];
}

// Column j of S forward through a chunk (dr, da), then column j of G back through it (dk, db, dw). grid (H, chunks)
//
// dw needs S and G of one token at once, and only one of them is at hand. But of S_t = S_{t-1} diag(d) + sa b^T + v k^T the products
// of a column with G_t add up: with total_t = sum_i G_t S_t,  dw = total - b db - k dk,  and for the token before it
// total = dw + a da + r dr. Nothing is divided, and sums begin anew with every chunk.
template <typename T>
__device__ inline void columns(
    const T *r, const float *w, const T *k, const T *v, const T *a, const T *b, const T *dy, const float *sums, const float *dsums,
    const float *kept, const float *behind, T *dr, float *dw, T *dk, T *da, T *db, const int *chunk, int H
) {
    __shared__ Shared V, SA, DY, DSA;
    const int h = blockIdx.x, c = blockIdx.y, j = threadIdx.x;
    const int begin = chunk[3 * c], end = chunk[3 * c + 1];
    const long corner = ((long)c * H + h) * N * N;
    float x[N], of_a[EVERY], of_r[EVERY];
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = kept[corner + i * N + j];
    for (int t = begin; t < end; t++) {
        const int now = t & 1;
        const long p = at(t, H, h, j);
        V.of[now][j] = from(v[p]), SA.of[now][j] = sums[p], DY.of[now][j] = from(dy[p]), DSA.of[now][j] = dsums[p];
        const float decay = expf(w[p]), key = from(k[p]), add = from(b[p]);
        __syncthreads();
        Sum asked, read;
#pragma unroll
        for (int i = 0; i < N; i++) {
            asked.add(i, x[i] * DSA.of[now][i]);
            x[i] = x[i] * decay + SA.of[now][i] * add + V.of[now][i] * key;
            read.add(i, x[i] * DY.of[now][i]);
        }
        const float sum_a = asked.total(), sum_r = read.total();
        put(da + p, sum_a), put(dr + p, sum_r);
        of_a[t - begin] = sum_a * from(a[p]), of_r[t - begin] = sum_r * from(r[p]);
    }
    Sum products;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float g = behind[corner + i * N + j];
        products.add(i, x[i] * g);
        x[i] = g;
    }
    float total = products.total();
    __syncthreads();
    for (int t = end - 1; t >= begin; t--) {
        const int now = t & 1;
        const long p = at(t, H, h, j);
        V.of[now][j] = from(v[p]), SA.of[now][j] = sums[p], DY.of[now][j] = from(dy[p]), DSA.of[now][j] = dsums[p];
        const float decay = expf(w[p]), key = from(k[p]), add = from(b[p]), read = from(r[p]), ask = from(a[p]);
        __syncthreads();
        Sum keys, adds;
#pragma unroll
        for (int i = 0; i < N; i++) {
            x[i] += DY.of[now][i] * read;
            keys.add(i, x[i] * V.of[now][i]);
            adds.add(i, x[i] * SA.of[now][i]);
            x[i] = x[i] * decay + DSA.of[now][i] * ask;
        }
        const float sum_k = keys.total(), sum_b = adds.total();
        put(dk + p, sum_k), put(db + p, sum_b);
        const float of_w = total + of_r[t - begin] - add * sum_b - key * sum_k;
        dw[p] = of_w;
        total = of_w + of_a[t - begin];
    }
}

}  // namespace

#define FOR_TYPE(T, name)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(N) wkv7_forward_##name(                                                          \
        const T *r, const float *w, const T *k, const T *v, const T *a, const T *b, const float *s0, T *y, float *last,            \
        float *kept, const int *span, int keep, int H                                                                              \
    ) {                                                                                                                            \
        forward<T>(r, w, k, v, a, b, s0, y, last, kept, span, keep, EVERY, H);                                                     \
    }                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(N) wkv7_again_##name(                                                            \
        const float *w, const T *k, const T *v, const T *a, const T *b, const float *kept, float *sums, const int *chunk, int H    \
    ) {                                                                                                                            \
        again<T>(w, k, v, a, b, kept, sums, chunk, H);                                                                             \
    }                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(N) wkv7_rows_##name(                                                             \
        const T *r, const float *w, const T *k, const T *a, const T *b, const T *dy, const float *dlast, T *dv, float *dsums,      \
        float *ds0, float *behind, const int *span, int H                                                                          \
    ) {                                                                                                                            \
        rows_backward<T>(r, w, k, a, b, dy, dlast, dv, dsums, ds0, behind, span, EVERY, H);                                        \
    }                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(N) wkv7_columns_##name(                                                          \
        const T *r, const float *w, const T *k, const T *v, const T *a, const T *b, const T *dy, const float *sums,                \
        const float *dsums, const float *kept, const float *behind, T *dr, float *dw, T *dk, T *da, T *db, const int *chunk, int H \
    ) {                                                                                                                            \
        columns<T>(r, w, k, v, a, b, dy, sums, dsums, kept, behind, dr, dw, dk, da, db, chunk, H);                                 \
    }
FOR_TYPE(float, float32)
FOR_TYPE(bf16, bfloat16)
