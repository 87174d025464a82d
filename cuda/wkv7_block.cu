// What stands around WKV-7 in a time mix, one pass over the activations each (rwkv_peft/ops/block_ops.py is the definition):
//
//   before:  a = sigmoid(a')   v = v' + (v_first - v') sigmoid(mix)   w = -e^{-1/2} sigmoid(w')
//            kk = k' k_k / |k' k_k|   k = k' (1 + (a - 1) k_a)        the recurrence gets r, w, k, v, -kk, kk a
//   behind:  out = (norm(y) weight + bias + (sum_n r k r_k) v) g      norm: to mean 0 and variance 1 in each head
//
// A warp for a head of a token. Activations T [tokens, H * N]; w as the recurrence gets it, and its gradient: float32; parameters
// [H * N] float32, and their gradients [parts of TOKENS tokens, H * N], if they are wanted. mix and v_first may be null.
#include "device.h"

namespace {

constexpr float SCALE = -0.6065306597126334f;  // -e^{-1/2}
constexpr float LEAST = 1e-12f;                // of the length that kk is divided by
constexpr float EPS = 64e-5f;                  // of ln_x, in every released model
constexpr int EACH = (N + 31) / 32;            // channels of a thread
constexpr int TOKENS = 32;                     // of a part

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The channel that a thread has, the n-th of its own; whether there is one.
__device__ inline int channel(int n) { return threadIdx.x % 32 + 32 * n; }
__device__ inline bool there(int n) { return N % 32 == 0 || channel(n) < N; }

template <typename T> struct Gates {
    const T *r, *w, *k, *v, *a, *mix, *v_first;
    const float *k_k, *k_a;
};

// What a thread has of a head of a token: as given, and as the recurrence gets it.
struct Made {
    float raw[EACH], key[EACH], gate[EACH], k[EACH], v[EACH], mixed[EACH], change[EACH], length, scale;

    template <typename T> __device__ inline Made(const Gates<T> &x, long place, int c) {
        float square = 0.0f;
#pragma unroll
        for (int n = 0; n < EACH; n++) {
            raw[n] = key[n] = gate[n] = k[n] = v[n] = mixed[n] = change[n] = 0.0f;
            if (!there(n)) continue;
            const long p = place + channel(n);
            key[n] = from(x.k[p]), gate[n] = sigmoid(from(x.a[p])), v[n] = from(x.v[p]);
            raw[n] = key[n] * x.k_k[c + channel(n)];
            k[n] = key[n] + key[n] * (gate[n] - 1.0f) * x.k_a[c + channel(n)];
            if (x.mix) {
                mixed[n] = sigmoid(from(x.mix[p])), change[n] = from(x.v_first[p]) - v[n];
                v[n] += change[n] * mixed[n];
            }
            square += raw[n] * raw[n];
        }
        length = sqrtf(warp_sum(square));
        scale = 1.0f / fmaxf(length, LEAST);
    }
};

// grid (tokens / WARPS, H)
template <typename T>
__device__ inline void before(Gates<T> x, float *to_w, T *to_k, T *to_v, T *to_a, T *to_b, int tokens, int H) {
    const int t = blockIdx.x * WARPS + threadIdx.x / 32, h = blockIdx.y;
    if (t >= tokens) return;
    const long place = at(t, H, h, 0);
    const Made made(x, place, h * N);
#pragma unroll
    for (int n = 0; n < EACH; n++) {
        if (!there(n)) continue;
        const long p = place + channel(n);
        const float kk = made.raw[n] * made.scale;
        to_w[p] = sigmoid(from(x.w[p])) * SCALE;
        put(to_k + p, made.k[n]), put(to_v + p, made.v[n]), put(to_a + p, -kk), put(to_b + p, kk * made.gate[n]);
    }
}

// Add up what the warps have of a part's tokens, always in the same order. sums: of this head; or null
__device__ inline void together(const float *own, float *sums, float (*shared)[N]) {
    __syncthreads();
#pragma unroll
    for (int n = 0; n < EACH; n++)
        if (there(n)) shared[threadIdx.x / 32][channel(n)] = own[n];
    __syncthreads();
    if (!sums || threadIdx.x >= N) return;
    float sum = 0.0f;
    for (int warp = 0; warp < WARPS; warp++) sum += shared[warp][threadIdx.x];
    sums[threadIdx.x] = sum;
}

// What comes out of the recurrence for a head of a token, normal, and what v is added with.
struct Came {
    float normal[EACH], scale, more = 0.0f;

    template <typename T> __device__ inline Came(const T *y, const T *r, const T *k, const float *r_k, long place, int c) {
        float sum = 0.0f, square = 0.0f;
#pragma unroll
        for (int n = 0; n < EACH; n++) {
            const long p = place + channel(n);
            normal[n] = there(n) ? from(y[p]) : 0.0f;
            more += there(n) ? from(r[p]) * from(k[p]) * r_k[c + channel(n)] : 0.0f;
            sum += normal[n];
        }
        const float mean = warp_sum(sum) / N;
#pragma unroll
        for (int n = 0; n < EACH; n++) {
            normal[n] = there(n) ? normal[n] - mean : 0.0f;
            square += normal[n] * normal[n];
        }
        scale = 1.0f / sqrtf(warp_sum(square) / N + EPS);
        more = warp_sum(more);
#pragma unroll
        for (int n = 0; n < EACH; n++) normal[n] *= scale;
    }
};

// grid (tokens / WARPS, H)
template <typename T>
__device__ inline void behind(
    const T *y, const T *r, const T *k, const T *v, const float *r_k, const float *weight, const float *bias, const T *g, T *out,
    int tokens, int H
) {
    const int t = blockIdx.x * WARPS + threadIdx.x / 32, h = blockIdx.y;
    if (t >= tokens) return;
    const long place = at(t, H, h, 0);
    const Came came(y, r, k, r_k, place, h * N);
#pragma unroll
    for (int n = 0; n < EACH; n++) {
        if (!there(n)) continue;
        const long p = place + channel(n);
        const int c = h * N + channel(n);
        put(out + p, (came.normal[n] * weight[c] + bias[c] + came.more * from(v[p])) * from(g[p]));
    }
}

// The gradients of y and g, and of weight and bias. grid (parts, H)
template <typename T>
__device__ inline void behind_backward(
    const T *y, const T *r, const T *k, const T *v, const float *r_k, const float *weight, const float *bias, const T *g,
    const T *dout, T *dy, T *dg, float *dweight, float *dbias, int tokens, int H
) {
    __shared__ float shared[WARPS][N];
    const int h = blockIdx.y, begin = blockIdx.x * TOKENS, end = begin + TOKENS < tokens ? begin + TOKENS : tokens;
    float of_weight[EACH] = {}, of_bias[EACH] = {};
    for (int t = begin + threadIdx.x / 32; t < end; t += WARPS) {
        const long place = at(t, H, h, 0);
        const Came came(y, r, k, r_k, place, h * N);
        float slope[EACH], sum = 0.0f, along = 0.0f;
#pragma unroll
        for (int n = 0; n < EACH; n++) {
            slope[n] = 0.0f;
            if (!there(n)) continue;
            const long p = place + channel(n);
            const int c = h * N + channel(n);
            const float d = from(dout[p]), dz = d * from(g[p]);
            put(dg + p, d * (came.normal[n] * weight[c] + bias[c] + came.more * from(v[p])));
            slope[n] = dz * weight[c];
            sum += slope[n], along += slope[n] * came.normal[n];
            of_weight[n] += dz * came.normal[n], of_bias[n] += dz;
        }
        sum = warp_sum(sum) / N, along = warp_sum(along) / N;
#pragma unroll
        for (int n = 0; n < EACH; n++)
            if (there(n)) put(dy + place + channel(n), (slope[n] - sum - came.normal[n] * along) * came.scale);
    }
    const long part = ((long)blockIdx.x * H + h) * N;
    together(of_weight, dweight ? dweight + part : nullptr, shared);
    together(of_bias, dbias ? dbias + part : nullptr, shared);
}

// From the gradients of what the recurrence got, and from dout for what goes past it, to those of the gates, and of k_k, k_a, r_k.
// grid (parts, H)
template <typename T>
__device__ inline void before_backward(
    Gates<T> x, const float *r_k, const T *dr, const float *dw, const T *dk, const T *dv, const T *da, const T *db, const T *g,
    const T *dout, T *tr, T *tw, T *tk, T *tv, T *ta, T *tmix, T *tfirst, float *dk_k, float *dk_a, float *dr_k, int tokens, int H
) {
    __shared__ float shared[WARPS][N];
    const int h = blockIdx.y, begin = blockIdx.x * TOKENS, end = begin + TOKENS < tokens ? begin + TOKENS : tokens;
    float of_k_k[EACH] = {}, of_k_a[EACH] = {}, of_r_k[EACH] = {};
    for (int t = begin + threadIdx.x / 32; t < end; t += WARPS) {
        const long place = at(t, H, h, 0);
        const Made made(x, place, h * N);
        float read[EACH], dz[EACH], dkk[EACH], more = 0.0f, dmore = 0.0f, along = 0.0f;
#pragma unroll
        for (int n = 0; n < EACH; n++) {
            read[n] = dz[n] = dkk[n] = 0.0f;
            if (!there(n)) continue;
            const long p = place + channel(n);
            read[n] = from(x.r[p]), dz[n] = from(dout[p]) * from(g[p]);
            dkk[n] = from(db[p]) * made.gate[n] - from(da[p]);
            more += read[n] * made.k[n] * r_k[h * N + channel(n)];
            dmore += dz[n] * made.v[n];
            along += made.raw[n] * dkk[n];
        }
        more = warp_sum(more), dmore = warp_sum(dmore), along = warp_sum(along);
        const float back = made.length > LEAST ? along * made.scale * made.scale : 0.0f;  // a clamped length has no slope
#pragma unroll
        for (int n = 0; n < EACH; n++) {
            if (!there(n)) continue;
            const long p = place + channel(n);
            const int c = h * N + channel(n);
            const float gate = made.gate[n], key = made.key[n], add = from(db[p]);
            const float dkey = from(dk[p]) + read[n] * r_k[c] * dmore, dvalue = from(dv[p]) + dz[n] * more;
            const float draw = (dkk[n] - made.raw[n] * back) * made.scale, s = sigmoid(from(x.w[p]));
            put(tr + p, from(dr[p]) + made.k[n] * r_k[c] * dmore);
            put(tw + p, dw[p] * SCALE * s * (1.0f - s));
            put(tk + p, dkey + dkey * (gate - 1.0f) * x.k_a[c] + draw * x.k_k[c]);
            put(ta + p, (add * made.raw[n] * made.scale + dkey * key * x.k_a[c]) * gate * (1.0f - gate));
            put(tv + p, dvalue - dvalue * made.mixed[n]);
            if (x.mix) {
                put(tfirst + p, dvalue * made.mixed[n]);
                put(tmix + p, dvalue * made.change[n] * made.mixed[n] * (1.0f - made.mixed[n]));
            }
            of_k_k[n] += draw * key, of_k_a[n] += dkey * key * (gate - 1.0f), of_r_k[n] += read[n] * made.k[n] * dmore;
        }
    }
    const long part = ((long)blockIdx.x * H + h) * N;
    together(of_k_k, dk_k ? dk_k + part : nullptr, shared);
    together(of_k_a, dk_a ? dk_a + part : nullptr, shared);
    together(of_r_k, dr_k ? dr_k + part : nullptr, shared);
}

}  // namespace

#define BOUNDS __launch_bounds__(THREADS)
#define FOR_TYPE(T, name)                                                                                                          \
    extern "C" __global__ void BOUNDS wkv7_block_before_##name(                                                                      \
        const T *r, const T *w, const T *k, const T *v, const T *a, const T *mix, const T *v_first, const float *k_k,              \
        const float *k_a, float *to_w, T *to_k, T *to_v, T *to_a, T *to_b, int tokens, int H                                       \
    ) {                                                                                                                            \
        before(Gates<T>{r, w, k, v, a, mix, v_first, k_k, k_a}, to_w, to_k, to_v, to_a, to_b, tokens, H);                          \
    }                                                                                                                              \
    extern "C" __global__ void BOUNDS wkv7_block_behind_##name(                                                                      \
        const T *y, const T *r, const T *k, const T *v, const float *r_k, const float *weight, const float *bias, const T *g,      \
        T *out, int tokens, int H                                                                                                  \
    ) {                                                                                                                            \
        behind(y, r, k, v, r_k, weight, bias, g, out, tokens, H);                                                                  \
    }                                                                                                                              \
    extern "C" __global__ void BOUNDS wkv7_block_behindback_##name(                                                                  \
        const T *y, const T *r, const T *k, const T *v, const float *r_k, const float *weight, const float *bias, const T *g,      \
        const T *dout, T *dy, T *dg, float *dweight, float *dbias, int tokens, int H                                               \
    ) {                                                                                                                            \
        behind_backward(y, r, k, v, r_k, weight, bias, g, dout, dy, dg, dweight, dbias, tokens, H);                                \
    }                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) wkv7_block_beforeback_##name( /* (else sm_120 spills 4 bytes) */        \
        const T *r, const T *w, const T *k, const T *v, const T *a, const T *mix, const T *v_first, const float *k_k,              \
        const float *k_a, const float *r_k, const T *dr, const float *dw, const T *dk, const T *dv, const T *da, const T *db,      \
        const T *g, const T *dout, T *tr, T *tw, T *tk, T *tv, T *ta, T *tmix, T *tfirst, float *dk_k, float *dk_a, float *dr_k,   \
        int tokens, int H                                                                                                          \
    ) {                                                                                                                            \
        before_backward(                                                                                                           \
            Gates<T>{r, w, k, v, a, mix, v_first, k_k, k_a}, r_k, dr, dw, dk, dv, da, db, g, dout, tr, tw, tk, tv, ta, tmix,       \
            tfirst, dk_k, dk_a, dr_k, tokens, H                                                                                    \
        );                                                                                                                         \
    }
FOR_TYPE(float, float32)
FOR_TYPE(bf16, bfloat16)
