// WKV-6 and WKV-5, one token at a time:  y_t = S_{t-1} r_t + (sum_n r u k) v_t,  S_t = S_{t-1} diag(e^{w_t}) + v_t k_t^T
//
// As wkv7.cpp: a state is kept as [K][V], worked on in blocks of values; every `every` tokens one is kept, and the states in
// between are computed again. Decays of 0 (w = -inf) are decays like others: nothing is divided.
//
// r k v y [T, H, N]; w [T, H, N], or [H, N] for every token (WKV-5: decay_step is 0); u [H, N]; s0 sT [S, H, N, N], rows are
// values; kept [chunks, H, N, N], rows are keys; dw [T, H, N] in either case; du [S, H, N].
#include "blocks.h"
#include "vec.h"

namespace {

struct Inputs {
    const float *r, *w, *k, *v, *u;
    int64_t decay_step;  // from one token's decays to the next one's
};

struct Gradients {
    float *r, *w, *k, *v, *u;
};

// [N] of what a head's decays make of a state at token t
template <int N> inline void decays(float *out, const Inputs &x, int64_t token, int64_t head) {
    exponentials<N>(out, x.w + token * x.decay_step + head * N);
}

// S diag(decay) + v k^T
template <int N, int NV> inline void pass(const float *from, float *to, const float *decay, const float *k, const float *v) {
    constexpr int V = NV * W;
    vf value[NV];
    for (int j = 0; j < NV; j++) value[j] = load(v + j * W);
    for (int n = 0; n < N; n++)
        for (int j = 0; j < NV; j++)
            store(to + n * V + j * W, load(from + n * V + j * W) * decay[n] + value[j] * k[n]);
}

template <int N> inline float bonus(const float *r, const float *u, const float *k) {
    vf total = {};
    for (int n = 0; n < N; n += W) total += load(r + n) * load(u + n) * load(k + n);
    return sum(total);
}

template <int N> struct Wkv6 {
    static constexpr int NV = block_vectors(N), V = NV * W;

    static void forward(const Inputs &x, const float *s0, float *y, float *sT, float *kept, const Sequences &q, Item item) {
        alignas(64) float state[N * V], decay[N];
        const int64_t begin = q.borders[item.sequence], end = q.borders[item.sequence + 1];
        const int64_t matrix = (item.sequence * q.heads + item.head) * N * N;
        load_state<N, V>(state, s0 ? s0 + matrix : nullptr, item.column);
        for (int64_t t = begin; t < end; t++) {
            const int64_t place = q.place(t, item.head, N);
            const float *r = x.r + place, *k = x.k + place;
            if (kept && (t - begin) % q.every == 0)
                keep<N, V>(state, kept + (q.chunk(item.sequence, t) * q.heads + item.head) * N * N, item.column);
            decays<N>(decay, x, t, item.head);
            const float c = bonus<N>(r, x.u + item.head * N, k);
            vf value[NV], out[NV];
            for (int j = 0; j < NV; j++) {
                value[j] = load(x.v + place + item.column + j * W);
                out[j] = value[j] * c;
            }
            for (int n = 0; n < N; n++) {
                for (int j = 0; j < NV; j++) {
                    vf s = load(state + n * V + j * W);
                    out[j] += s * r[n];
                    store(state + n * V + j * W, s * decay[n] + value[j] * k[n]);
                }
            }
            for (int j = 0; j < NV; j++) store(y + place + item.column + j * W, out[j]);
        }
        store_state<N, V>(state, sT + matrix, item.column);
    }

    // dr dw dk du are summed over the blocks of values: `first` sets them, others add
    static void backward(const Inputs &x, const float *kept, const float *dy, const float *dsT, const Gradients &d,
                         float *ds0, const Sequences &q, Item item, bool first, float *states) {
        alignas(64) float G[N * V], decay[N], du[N] = {};
        const int64_t begin = q.borders[item.sequence], end = q.borders[item.sequence + 1];
        const int64_t matrix = (item.sequence * q.heads + item.head) * N * N;
        const int length = q.every;
        const float *u = x.u + item.head * N;
        load_state<N, V>(G, dsT ? dsT + matrix : nullptr, item.column);
        for (int64_t chunk = begin + (end - begin - 1) / length * length; chunk >= begin; chunk -= length) {
            const int64_t last = chunk + length < end ? chunk + length : end;
            take<N, V>(states, kept + (q.chunk(item.sequence, chunk) * q.heads + item.head) * N * N, item.column);
            for (int64_t t = chunk; t + 1 < last; t++) {
                const int64_t place = q.place(t, item.head, N);
                float *from = states + (t - chunk) * N * V;
                decays<N>(decay, x, t, item.head);
                pass<N, NV>(from, from + N * V, decay, x.k + place, x.v + place + item.column);
            }
            for (int64_t t = last - 1; t >= chunk; t--) {
                const int64_t place = q.place(t, item.head, N);
                const float *before = states + (t - chunk) * N * V, *r = x.r + place, *k = x.k + place;
                decays<N>(decay, x, t, item.head);
                const float c = bonus<N>(r, u, k);
                vf dout[NV], value[NV], dv[NV], along = {};
                for (int j = 0; j < NV; j++) {
                    dout[j] = load(dy + place + item.column + j * W);
                    value[j] = load(x.v + place + item.column + j * W);
                    dv[j] = dout[j] * c;
                    along += dout[j] * value[j];
                }
                const float dc = sum(along);
                for (int group = 0; group < N; group += W) {
                    vf pr[W], pk[W], pw[W];
                    for (int i = 0; i < W; i++) {
                        const int n = group + i;
                        vf tr = {}, tk = {}, tw = {};
                        for (int j = 0; j < NV; j++) {
                            const vf s = load(before + n * V + j * W), g = load(G + n * V + j * W);
                            tr += s * dout[j];
                            tk += g * value[j];
                            tw += g * s;
                            dv[j] += g * k[n];
                            store(G + n * V + j * W, g * decay[n] + dout[j] * r[n]);
                        }
                        pr[i] = tr, pk[i] = tk, pw[i] = tw;
                    }
                    const vf rn = load(r + group), kn = load(k + group), un = load(u + group);
                    give(d.r + place + group, sums(pr) + un * kn * dc, first);
                    give(d.k + place + group, sums(pk) + un * rn * dc, first);
                    give(d.w + place + group, sums(pw) * load(decay + group), first);
                    store(du + group, load(du + group) + rn * kn * dc);
                }
                for (int j = 0; j < NV; j++) store(d.v + place + item.column + j * W, dv[j]);
            }
        }
        float *to = d.u + (item.sequence * q.heads + item.head) * N;
        for (int n = 0; n < N; n += W) give(to + n, load(du + n), first);
        store_state<N, V>(G, ds0 + matrix, item.column);
    }
};

template <int N>
void forward(const Inputs &x, const float *s0, float *y, float *sT, float *kept, const Sequences &q, int threads) {
    constexpr int blocks = N / Wkv6<N>::V;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < q.count * q.heads * blocks; i++)
        Wkv6<N>::forward(x, s0, y, sT, kept, q, q.item(i, blocks, Wkv6<N>::V));
}

template <int N>
void backward(const Inputs &x, const float *kept, const float *dy, const float *dsT, const Gradients &d, float *ds0,
              const Sequences &q, int threads) {
    constexpr int V = Wkv6<N>::V;
#pragma omp parallel num_threads(threads)
    {
        Scratch states(q.every * N * V);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < q.count * q.heads; i++)
            for (int column = 0; column < N; column += V)
                Wkv6<N>::backward(x, kept, dy, dsT, d, ds0, q, {i / q.heads, i % q.heads, column}, column == 0, states.data);
    }
}

}  // namespace

extern "C" {

int wkv6_forward(const float *r, const float *w, const float *k, const float *v, const float *u, const float *s0, float *y,
                 float *sT, float *kept, const int64_t *borders, const int64_t *chunks, int64_t count, int64_t heads,
                 int64_t size, int64_t every, int64_t decay_step, int threads) {
    const Sequences q{borders, chunks, count, heads, every};
    const Inputs x{r, w, k, v, u, decay_step};
    FOR_SIZE(size, forward, x, s0, y, sT, kept, q, threads)
}

int wkv6_backward(const float *r, const float *w, const float *k, const float *v, const float *u, const float *kept,
                  const float *dy, const float *dsT, float *dr, float *dw, float *dk, float *dv, float *du, float *ds0,
                  const int64_t *borders, const int64_t *chunks, int64_t count, int64_t heads, int64_t size, int64_t every,
                  int64_t decay_step, int threads) {
    const Sequences q{borders, chunks, count, heads, every};
    const Inputs x{r, w, k, v, u, decay_step};
    const Gradients d{dr, dw, dk, dv, du};
    FOR_SIZE(size, backward, x, kept, dy, dsT, d, ds0, q, threads)
}
}
