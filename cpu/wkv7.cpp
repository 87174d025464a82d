// WKV-7, one token at a time:  y_t = S_t r_t,  S_t = S_{t-1} diag(e^{w_t}) + (S_{t-1} a_t) b_t^T + v_t k_t^T
//
// A state is kept as [K][V], so that all sums over keys run along vectors of values and nothing is added up across a vector.
// Columns of values do not meet, so a state is worked on in blocks of as many as the registers hold. Forward, one sweep over
// the block makes the new state, the output, and S a of the next token. A state is kept every `every` tokens; backward, the
// states in between are computed again.
//
// Letters: T tokens of all sequences behind one another, S sequences, H heads, N head size. All arrays are float32:
// r w k v a b y [T, H, N]; s0 sT [S, H, N, N], rows are values; kept [chunks, H, N, N], rows are keys.
#include "blocks.h"
#include "vec.h"

namespace {

struct Inputs {
    const float *r, *w, *k, *v, *a, *b;
};

struct Gradients {
    float *r, *w, *k, *v, *a, *b;
};

// One token: decay [N] is e^w. sa [NV] is S a of this token, and becomes that of the next one, whose a is `next`.
// out may be where the state comes from.
template <int N, int NV>
inline void token(const float *from, float *out, const float *decay, const Inputs &x, const float *next, vf *sa, float *y) {
    constexpr int V = NV * W;
    vf value[NV], sum[NV] = {}, ahead[NV] = {};
    for (int j = 0; j < NV; j++) value[j] = load(x.v + j * W);
    for (int n = 0; n < N; n++) {
        for (int j = 0; j < NV; j++) {
            vf s = load(from + n * V + j * W) * decay[n] + sa[j] * x.b[n] + value[j] * x.k[n];
            store(out + n * V + j * W, s);
            sum[j] += s * x.r[n];
            ahead[j] += s * next[n];
        }
    }
    for (int j = 0; j < NV; j++) {
        if (y) store(y + j * W, sum[j]);
        sa[j] = ahead[j];
    }
}

template <int N, int NV> inline void times(const float *state, const float *a, vf *sa) {
    for (int j = 0; j < NV; j++) sa[j] = splat(0);
    for (int n = 0; n < N; n++)
        for (int j = 0; j < NV; j++) sa[j] += load(state + n * NV * W + j * W) * a[n];
}

inline Inputs at(const Inputs &x, int64_t place, int column) {
    return {x.r + place, x.w + place, x.k + place, x.v + place + column, x.a + place, x.b + place};
}

template <int N> struct Wkv7 {
    static constexpr int NV = block_vectors(N), V = NV * W;

    static void forward(const Inputs &x, const float *s0, float *y, float *sT, float *kept, const Sequences &q, Item item) {
        alignas(64) float state[N * V], decay[N];
        vf sa[NV];
        const int64_t begin = q.borders[item.sequence], end = q.borders[item.sequence + 1];
        const int64_t matrix = (item.sequence * q.heads + item.head) * N * N;
        load_state<N, V>(state, s0 ? s0 + matrix : nullptr, item.column);
        times<N, NV>(state, x.a + q.place(begin, item.head, N), sa);
        for (int64_t t = begin; t < end; t++) {
            const int64_t place = q.place(t, item.head, N);
            if (kept && (t - begin) % q.every == 0)
                keep<N, V>(state, kept + (q.chunk(item.sequence, t) * q.heads + item.head) * N * N, item.column);
            exponentials<N>(decay, x.w + place);
            const float *next = t + 1 < end ? x.a + q.place(t + 1, item.head, N) : nothing;
            token<N, NV>(state, state, decay, at(x, place, item.column), next, sa, y + place + item.column);
        }
        store_state<N, V>(state, sT + matrix, item.column);
    }

    // dr dw dk da db are summed over the blocks of values: `first` sets them, others add. more: to dr dk dv, even the first adds
    static void backward(const Inputs &x, const float *kept, const float *dy, const float *dsT, const Gradients &d, float *ds0,
                         const Sequences &q, Item item, bool first, bool more, float *states) {
        alignas(64) float G[N * V], decay[N], after_decay[N];
        const int64_t begin = q.borders[item.sequence], end = q.borders[item.sequence + 1];
        const int64_t matrix = (item.sequence * q.heads + item.head) * N * N;
        const int length = q.every;
        float *const sas = states + (length + 1) * N * V;
        load_state<N, V>(G, dsT ? dsT + matrix : nullptr, item.column);
        // what the token after this one still has to do to G: G diag(decay) + dsa a^T. Behind the last one that is nothing.
        vf dsa[NV] = {};
        const float *after = nothing;
        float *da = nullptr;
        for (int n = 0; n < N; n++) after_decay[n] = 1;
        for (int64_t chunk = begin + (end - begin - 1) / length * length; chunk >= begin; chunk -= length) {
            const int64_t last = chunk + length < end ? chunk + length : end;
            take<N, V>(states, kept + (q.chunk(item.sequence, chunk) * q.heads + item.head) * N * N, item.column);
            vf sa[NV];
            times<N, NV>(states, x.a + q.place(chunk, item.head, N), sa);
            for (int64_t t = chunk; t < last; t++) {
                const int64_t place = q.place(t, item.head, N);
                float *from = states + (t - chunk) * N * V;
                for (int j = 0; j < NV; j++) store(sas + (t - chunk) * V + j * W, sa[j]);
                exponentials<N>(decay, x.w + place);
                const float *next = t + 1 < last ? x.a + q.place(t + 1, item.head, N) : nothing;
                token<N, NV>(from, from + N * V, decay, at(x, place, item.column), next, sa, nullptr);
            }
            for (int64_t t = last - 1; t >= chunk; t--) {
                const int64_t place = q.place(t, item.head, N);
                const Inputs in = at(x, place, item.column);
                const float *before = states + (t - chunk) * N * V, *now = before + N * V;
                exponentials<N>(decay, in.w);
                vf dout[NV], value[NV], answer[NV], dv[NV] = {}, dnew[NV] = {};
                for (int j = 0; j < NV; j++) {
                    dout[j] = load(dy + place + item.column + j * W);
                    value[j] = load(in.v + j * W);
                    answer[j] = load(sas + (t - chunk) * V + j * W);
                }
                for (int group = 0; group < N; group += W) {
                    vf pa[W], pr[W], pk[W], pb[W], pw[W];
                    for (int i = 0; i < W; i++) {
                        const int n = group + i;
                        vf ta = {}, tr = {}, tk = {}, tb = {}, tw = {};
                        for (int j = 0; j < NV; j++) {
                            const vf s = load(now + n * V + j * W);
                            vf g = load(G + n * V + j * W) * after_decay[n] + dsa[j] * after[n] + dout[j] * in.r[n];
                            store(G + n * V + j * W, g);
                            ta += s * dsa[j];
                            tr += s * dout[j];
                            tk += g * value[j];
                            tb += g * answer[j];
                            tw += g * load(before + n * V + j * W);
                            dv[j] += g * in.k[n];
                            dnew[j] += g * in.b[n];
                        }
                        pa[i] = ta, pr[i] = tr, pk[i] = tk, pb[i] = tb, pw[i] = tw;
                    }
                    if (da) give(da + group, sums(pa), first);
                    give(d.r + place + group, sums(pr), first && !more);
                    give(d.k + place + group, sums(pk), first && !more);
                    give(d.b + place + group, sums(pb), first);
                    give(d.w + place + group, sums(pw) * load(decay + group), first);
                }
                for (int j = 0; j < NV; j++) {
                    give(d.v + place + item.column + j * W, dv[j], !more);
                    dsa[j] = dnew[j];
                }
                after = in.a;
                da = d.a + place;
                std::memcpy(after_decay, decay, sizeof decay);
            }
        }
        for (int group = 0; group < N; group += W) {
            vf pa[W];
            for (int i = 0; i < W; i++) {
                pa[i] = splat(0);
                for (int j = 0; j < NV; j++) {
                    float *g = G + (group + i) * V + j * W;
                    pa[i] += load(states + (group + i) * V + j * W) * dsa[j];
                    store(g, load(g) * after_decay[group + i] + dsa[j] * after[group + i]);
                }
            }
            give(da + group, sums(pa), first);
        }
        store_state<N, V>(G, ds0 + matrix, item.column);
    }
};

template <int N>
void forward(const Inputs &x, const float *s0, float *y, float *sT, float *kept, const Sequences &q, int threads) {
    constexpr int blocks = N / Wkv7<N>::V;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < q.count * q.heads * blocks; i++)
        Wkv7<N>::forward(x, s0, y, sT, kept, q, q.item(i, blocks, Wkv7<N>::V));
}

template <int N>
void backward(const Inputs &x, const float *kept, const float *dy, const float *dsT, const Gradients &d, float *ds0,
              const Sequences &q, bool more, int threads) {
    constexpr int V = Wkv7<N>::V;
#pragma omp parallel num_threads(threads)
    {
        Scratch states((q.every + 1) * N * V + q.every * V);  // the states of a chunk, and S a of its tokens
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < q.count * q.heads; i++)
            for (int column = 0; column < N; column += V)
                Wkv7<N>::backward(x, kept, dy, dsT, d, ds0, q, {i / q.heads, i % q.heads, column}, column == 0,
                                  more, states.data);
    }
}

}  // namespace

extern "C" {

int wkv7_forward(const float *r, const float *w, const float *k, const float *v, const float *a, const float *b,
                 const float *s0, float *y, float *sT, float *kept, const int64_t *borders, const int64_t *chunks,
                 int64_t count, int64_t heads, int64_t size, int64_t every, int threads) {
    const Sequences q{borders, chunks, count, heads, every};
    const Inputs x{r, w, k, v, a, b};
    FOR_SIZE(size, forward, x, s0, y, sT, kept, q, threads)
}

int wkv7_backward(const float *r, const float *w, const float *k, const float *v, const float *a, const float *b,
                  const float *kept, const float *dy, const float *dsT, float *dr, float *dw, float *dk, float *dv,
                  float *da, float *db, float *ds0, const int64_t *borders, const int64_t *chunks, int64_t count,
                  int64_t heads, int64_t size, int64_t every, int64_t more, int threads) {
    const Sequences q{borders, chunks, count, heads, every};
    const Inputs x{r, w, k, v, a, b};
    const Gradients d{dr, dw, dk, dv, da, db};
    FOR_SIZE(size, backward, x, kept, dy, dsT, d, ds0, q, more, threads)
}
}
