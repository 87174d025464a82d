// Token shift with several mixes, the square of a ReLU, and the cross entropy of rows of logits, one pass over memory each
// (rwkv_peft/ops/block_ops.py is the definition). Rows are tokens of all sequences behind one another, T [tokens, C]; parameters and
// their gradients are float32. span: [sequences, 3] first token, behind the last one.
#include "device.h"

namespace {

constexpr int MOST = 6;    // mixes of one input
constexpr int TOKENS = 32;  // of a part, which a thread goes through for its channel
constexpr int ENTROPY_THREADS = 512;  // of a block that has a row of logits

template <typename T> struct Tensors {
    T *of[MOST];
};

__device__ inline int sequence_of(const int *span, int sequences, int t) {
    int low = 0, high = sequences - 1;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (span[3 * middle + 1] <= t)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

// out[m] = x + (before - x) mu[m], where before stood one token earlier, or was carried in: shift [sequences, C].
// grid (C / THREADS, parts)
template <typename T>
__device__ inline void token_shift_forward(
    const T *x, const T *shift, const float *mu, Tensors<T> out, const int *span, int sequences, int tokens, int C, int mixes
) {
    const int c = blockIdx.x * THREADS + threadIdx.x, begin = blockIdx.y * TOKENS;
    const int end = begin + TOKENS < tokens ? begin + TOKENS : tokens;
    if (c >= C) return;
    float share[MOST];
#pragma unroll
    for (int m = 0; m < MOST; m++) share[m] = m < mixes ? mu[(long)m * C + c] : 0.0f;
    int s = sequence_of(span, sequences, begin);
    float before = begin ? from(x[(long)(begin - 1) * C + c]) : 0.0f;
    for (int t = begin; t < end; t++) {
        if (t >= span[3 * s + 1]) s++;
        if (t == span[3 * s]) before = from(shift[(long)s * C + c]);
        const float now = from(x[(long)t * C + c]), change = before - now;
#pragma unroll
        for (int m = 0; m < MOST; m++)
            if (m < mixes) put(out.of[m] + (long)t * C + c, now + change * share[m]);
        before = now;
    }
}

// dmu: [parts, mixes, C], or null. grid (C / THREADS, parts)
template <typename T>
__device__ inline void token_shift_backward(
    const T *x, const T *shift, const float *mu, Tensors<const T> dout, T *dx, T *dshift, float *dmu, const int *span, int sequences,
    int tokens, int C, int mixes
) {
    const int c = blockIdx.x * THREADS + threadIdx.x, begin = blockIdx.y * TOKENS;
    const int end = begin + TOKENS < tokens ? begin + TOKENS : tokens;
    if (c >= C) return;
    float share[MOST], sums[MOST] = {}, later = 0.0f;  // later: what a row gets as the one before the next
#pragma unroll
    for (int m = 0; m < MOST; m++) {
        share[m] = m < mixes ? mu[(long)m * C + c] : 0.0f;
        if (m < mixes && end < tokens) later += from(dout.of[m][(long)end * C + c]) * share[m];
    }
    int s = sequence_of(span, sequences, end - 1);
    for (int t = end - 1; t >= begin; t--) {
        if (t < span[3 * s]) s--;
        const bool first = t == span[3 * s], last = t + 1 == span[3 * s + 1];
        const float before = first ? from(shift[(long)s * C + c]) : from(x[(long)(t - 1) * C + c]);
        const float change = before - from(x[(long)t * C + c]);
        float own = 0.0f, earlier = 0.0f;
#pragma unroll
        for (int m = 0; m < MOST; m++) {
            if (m >= mixes) continue;
            const float d = from(dout.of[m][(long)t * C + c]);
            own += d - d * share[m], earlier += d * share[m], sums[m] += d * change;
        }
        put(dx + (long)t * C + c, last ? own : own + later);
        if (first) put(dshift + (long)s * C + c, earlier);
        later = earlier;
    }
    if (!dmu) return;
#pragma unroll
    for (int m = 0; m < MOST; m++)
        if (m < mixes) dmu[((long)blockIdx.y * mixes + m) * C + c] = sums[m];
}

// grid (blocks)
template <typename T> __device__ inline void square_relu(const T *x, T *y, long numbers) {
    for (long i = (long)blockIdx.x * THREADS + threadIdx.x; i < numbers; i += (long)gridDim.x * THREADS) {
        const float h = from(x[i]);
        put(y + i, h > 0.0f || h != h ? h * h : 0.0f);
    }
}

template <typename T> __device__ inline void square_relu_backward(const T *x, const T *dy, T *dx, long numbers) {
    for (long i = (long)blockIdx.x * THREADS + threadIdx.x; i < numbers; i += (long)gridDim.x * THREADS) {
        const float h = from(x[i]);
        put(dx + i, h > 0.0f || h != h ? 2.0f * h * from(dy[i]) : 0.0f);
    }
}

// The largest of some numbers, and the sum of e to what they are more than it.
struct LogSum {
    float most, sum;
    __device__ inline void add(float other, float its) {
        const float larger = fmaxf(most, other);
        sum = sum * expf(most - larger) + its * expf(other - larger);
        most = larger;
    }
};

// losses: log of the sum of e^logit less the target's logit; slopes: logits [rows, V] become their slopes, softmax - one-hot.
// grid (rows)
template <typename T>
__device__ inline void cross_entropy(T *logits, const long long *targets, float *losses, int V, int slopes) {
    __shared__ LogSum of_warp[ENTROPY_THREADS / 32];
    T *row = logits + (long)blockIdx.x * V;
    const int target = (int)targets[blockIdx.x];
    LogSum all = {-3e38f, 0.0f};
    for (int j = threadIdx.x; j < V; j += ENTROPY_THREADS) all.add(from(row[j]), 1.0f);
#pragma unroll
    for (int mask = 16; mask; mask /= 2) {
        const float most = of_lane(all.most, mask), sum = of_lane(all.sum, mask);
        all.add(most, sum);
    }
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = all;
    __syncthreads();
    all = of_warp[0];
    for (int warp = 1; warp < ENTROPY_THREADS / 32; warp++) all.add(of_warp[warp].most, of_warp[warp].sum);
    const float log_sum = all.most + logf(all.sum);
    if (threadIdx.x == 0) losses[blockIdx.x] = log_sum - from(row[target]);
    if (!slopes) return;
    __syncthreads();  // the target's logit is read
    for (int j = threadIdx.x; j < V; j += ENTROPY_THREADS) put(row + j, expf(from(row[j]) - log_sum) - (j == target ? 1.0f : 0.0f));
}

}  // namespace

#define BOUNDS __launch_bounds__(THREADS)
#define FOR_TYPE(T, name)                                                                                                          \
    extern "C" __global__ void BOUNDS token_shift_forward_##name(                                                                         \
        const T *x, const T *shift, const float *mu, T *o0, T *o1, T *o2, T *o3, T *o4, T *o5, const int *span, int sequences,     \
        int tokens, int C, int mixes                                                                                               \
    ) {                                                                                                                            \
        token_shift_forward(x, shift, mu, Tensors<T>{{o0, o1, o2, o3, o4, o5}}, span, sequences, tokens, C, mixes);                        \
    }                                                                                                                              \
    extern "C" __global__ void BOUNDS token_shift_backward_##name(                                                                        \
        const T *x, const T *shift, const float *mu, const T *d0, const T *d1, const T *d2, const T *d3, const T *d4,              \
        const T *d5, T *dx, T *dshift, float *dmu, const int *span, int sequences, int tokens, int C, int mixes                    \
    ) {                                                                                                                            \
        token_shift_backward(                                                                                                              \
            x, shift, mu, Tensors<const T>{{d0, d1, d2, d3, d4, d5}}, dx, dshift, dmu, span, sequences, tokens, C, mixes           \
        );                                                                                                                         \
    }                                                                                                                              \
    extern "C" __global__ void BOUNDS token_shift_relu_##name(const T *x, T *y, int rows, int C) { square_relu(x, y, (long)rows * C); }       \
    extern "C" __global__ void BOUNDS token_shift_reluback_##name(const T *x, const T *dy, T *dx, int rows, int C) {                      \
        square_relu_backward(x, dy, dx, (long)rows * C);                                                                                 \
    }                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(ENTROPY_THREADS) token_shift_entropy_##name(                                             \
        T *logits, const long long *targets, float *losses, int V, int slopes                                                      \
    ) {                                                                                                                            \
        cross_entropy(logits, targets, losses, V, slopes);                                                                         \
    }
FOR_TYPE(float, float32)
FOR_TYPE(bf16, bfloat16)
