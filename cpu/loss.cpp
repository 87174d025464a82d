// Cross entropy of rows of logits [R, V], in place: each row becomes its slope, softmax - one-hot.
#include <cmath>

#include "rows.h"
#include "vec.h"

namespace {

// losses: [R], log of the sum of e^logit less the target's logit. slopes: whether rows are to become their slopes
template <typename T>
void cross_entropy(T *logits, const int64_t *targets, float *losses, int64_t rows, int64_t V, bool slopes, int threads) {
    const int64_t whole = V / W * W;
    if (rows < threads * 8) threads = int(std::min<int64_t>(threads, rows));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        T *row = logits + i * V;
        float tail[W] = {};  // what is left of a row behind its whole vectors
        vf most = splat(-INFINITY);
        for (int64_t j = 0; j < whole; j += W) most = larger(load(row + j), most);
        float highest = -INFINITY;
        for (int n = 0; n < W; n++) highest = std::max(highest, most[n]);
        for (int64_t j = whole; j < V; j++) highest = std::max(highest, tail[j - whole] = one(row + j));
        vf total[2] = {};
        int64_t j = 0;
        for (; j + W < whole; j += 2 * W) {
            total[0] += exp(load(row + j) - highest);
            total[1] += exp(load(row + j + W) - highest);
        }
        for (; j < whole; j += W) total[0] += exp(load(row + j) - highest);
        float s = sum(total[0] + total[1]);
        for (j = whole; j < V; j++) s += std::exp(tail[j - whole] - highest);
        const float log_sum = highest + std::log(s);
        losses[i] = log_sum - one(row + targets[i]);
        if (!slopes) continue;
        const float target = std::exp(one(row + targets[i]) - log_sum) - 1.0f;
        for (j = 0; j < whole; j += W) store(row + j, exp(load(row + j) - log_sum));
        for (; j < V; j++) set(row + j, std::exp(tail[j - whole] - log_sum));
        set(row + targets[i], target);
    }
}

}  // namespace

#define FOR_TYPE(T, name)                                                                                                   \
    extern "C" int cross_entropy_##name(T *logits, const int64_t *targets, float *losses, int64_t rows, int64_t V,          \
                                        int64_t slopes, int threads) {                                                      \
        cross_entropy(logits, targets, losses, rows, V, slopes, threads);                                                   \
        return 0;                                                                                                           \
    }
FOR_TYPE(float, float32)
FOR_TYPE(bf16, bfloat16)
