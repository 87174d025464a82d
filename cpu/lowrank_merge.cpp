// Rows of a weight W [rows, inputs] with a product of low rank on them, W + B A, rounded to W's format, and what the sum and the
// rounded sum answer to four inputs x: merging a LoRA, and the proof of it, in one pass. The sum never leaves the registers.
// B [rows, rank], A [rank, inputs], x [4, inputs] float32; answers [2, 4, rows], squares [2, rows]: the squared lengths of the rows
// of W and of the sum. inputs: a multiple of 64.
#include <vector>

#include "rows.h"

namespace {

constexpr int V = 4, COLUMNS = V * W, X = 4;
constexpr int TOGETHER = WIDTH == 16 ? 6 : 2;  // rows whose sums fit the registers
constexpr int64_t BLOCK = 1 << 19;              // numbers of W that stay in a core's own cache while column after column is made

struct Sums {
    vf made[X], kept[X], square[2];
};

// N rows, COLUMNS inputs of them. panel: these columns of A, [rank, COLUMNS]
template <int N, typename T>
inline void tile(const T *w, const float *b, const float *panel, const float *x, T *out, Sums *sums, int64_t rank,
                 int64_t inputs) {
    vf made[N][V];
    for (int n = 0; n < N; n++)
        for (int v = 0; v < V; v++) made[n][v] = load(w + n * inputs + v * W);
    for (int64_t k = 0; k < rank; k++) {
        vf a[V];
        for (int v = 0; v < V; v++) a[v] = load(panel + k * COLUMNS + v * W);
        for (int n = 0; n < N; n++) {
            const float f = b[n * rank + k];
            for (int v = 0; v < V; v++) made[n][v] += f * a[v];
        }
    }
    for (int n = 0; n < N; n++) {
        Sums s = sums[n];
        for (int v = 0; v < V; v++) {
            const vf before = load(w + n * inputs + v * W);
            store(out + n * inputs + v * W, made[n][v]);
            const vf kept = load(out + n * inputs + v * W);
            for (int i = 0; i < X; i++) {
                const vf given = load(x + i * inputs + v * W);
                s.made[i] += made[n][v] * given;
                s.kept[i] += kept * given;
            }
            s.square[0] += before * before;
            s.square[1] += made[n][v] * made[n][v];
        }
        sums[n] = s;
    }
}

// Rows begin to end of all.
template <typename T>
void block(const T *w, const float *b, const float *a, const float *x, T *out, float *answers, float *squares, int64_t begin,
           int64_t end, int64_t rows, int64_t rank, int64_t inputs) {
    std::vector<float> panel(rank * COLUMNS);
    std::vector<Sums> sums(end - begin, Sums{});
    for (int64_t j = 0; j < inputs; j += COLUMNS) {
        for (int64_t k = 0; k < rank; k++) std::memcpy(&panel[k * COLUMNS], a + k * inputs + j, COLUMNS * sizeof(float));
        int64_t i = begin;
        for (; i + TOGETHER <= end; i += TOGETHER)
            tile<TOGETHER>(w + i * inputs + j, b + i * rank, panel.data(), x + j, out + i * inputs + j, &sums[i - begin], rank,
                           inputs);
        for (; i < end; i++)
            tile<1>(w + i * inputs + j, b + i * rank, panel.data(), x + j, out + i * inputs + j, &sums[i - begin], rank, inputs);
    }
    for (int64_t i = begin; i < end; i++) {
        const Sums &s = sums[i - begin];
        const vf *of[2] = {s.made, s.kept};
        for (int which = 0; which < 2; which++)
            for (int n = 0; n < X; n++) answers[(which * X + n) * rows + i] = sum(of[which][n]);
        for (int which = 0; which < 2; which++) squares[which * rows + i] = sum(s.square[which]);
    }
}

template <typename T>
void fold(const T *w, const float *b, const float *a, const float *x, T *out, float *answers, float *squares, int64_t rows,
          int64_t rank, int64_t inputs, int threads) {
    const int64_t most = std::max<int64_t>(1, BLOCK / inputs / TOGETHER) * TOGETHER;
    share(rows, threads, [=](int64_t first, int64_t last, int) {
        for (int64_t i = first; i < last; i += most)
            block(w, b, a, x, out, answers, squares, i, std::min(i + most, last), rows, rank, inputs);
    });
}

}  // namespace

extern "C" int fold_bfloat16(const bf16 *w, const float *b, const float *a, const float *x, bf16 *out, float *answers,
                             float *squares, int64_t rows, int64_t rank, int64_t inputs, int threads) {
    fold(w, b, a, x, out, answers, squares, rows, rank, inputs, threads);
    return 0;
}
