// What stands around WKV-7 in a time mix, one pass over the activations each:
//
//   before:  a = sigmoid(a')   v = v' + (v_first - v') sigmoid(mix)   w = -e^{-1/2} sigmoid(w')
//            kk = k' k_k / |k' k_k|   k = k' (1 + (a - 1) k_a)        the recurrence gets r, w, k, v, -kk, kk a
//   behind:  out = (norm(y) weight + bias + (sum_n r k r_k) v) g      norm: to mean 0 and variance 1 in each head
//
// Activations [T, H * N] are float32 or bfloat16 (T below); what goes into the recurrence and comes out of it is float32, like
// parameters [H * N] and their gradients, which are sums over each thread's rows: [threads, H * N], zero before.
#include "wkv7_block.h"
#include "rows.h"

namespace {

template <typename T>
void before(const Before<T> &x, float *r, float *w, float *k, float *v, float *a, float *b, int64_t rows, int64_t heads,
            int N, int threads) {
    share(rows * heads, threads, [=](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; i++) {
            before_one(x, r, w, k, v, a, b, i * N, i % heads * N, N);
        }
    });
}

// d: gradients of r w k v a b as the recurrence got them. dk_k, dk_a may be null
template <typename T>
void before_backward(const Before<T> &x, const float *dr, const float *dw, const float *dk, const float *dv, const float *da,
                     const float *db, T *tr, T *tw, T *tk, T *tv, T *ta, T *tmix, T *tfirst, float *dk_k, float *dk_a,
                     int64_t rows, int64_t heads, int N, int threads) {
    share(rows * heads, threads, [=](int64_t begin, int64_t end, int thread) {
        for (int64_t i = begin; i < end; i++) {
            const int64_t at = i * N, c = i % heads * N, sums = thread * heads * N + c;
            vf square = {}, along = {};
            for (int n = 0; n < N; n += W) {
                const vf key = load(x.k + at + n) * load(x.k_k + c + n);
                const vf dkk = load(db + at + n) * sigmoid(load(x.a + at + n)) - load(da + at + n);
                square += key * key;
                along += key * dkk;
            }
            const float length = std::sqrt(sum(square)), scale = 1.0f / std::max(length, LEAST);
            const float back = length > LEAST ? sum(along) * scale * scale : 0;  // a clamped length has no slope
            for (int n = 0; n < N; n += W) {
                const vf gate = sigmoid(load(x.a + at + n)), key = load(x.k + at + n);
                const vf k_k = load(x.k_k + c + n), k_a = load(x.k_a + c + n);
                const vf raw = key * k_k, dkk = load(db + at + n) * gate - load(da + at + n);
                const vf draw = (dkk - raw * back) * scale, dkey = load(dk + at + n);
                const vf s = sigmoid(load(x.w + at + n)), dvalue = load(dv + at + n);
                store(tr + at + n, load(dr + at + n));
                store(tw + at + n, load(dw + at + n) * SCALE * s * (1.0f - s));
                store(tk + at + n, dkey + dkey * (gate - 1.0f) * k_a + draw * k_k);
                store(ta + at + n, (load(db + at + n) * raw * scale + dkey * key * k_a) * gate * (1.0f - gate));
                if (x.mix) {
                    const vf m = sigmoid(load(x.mix + at + n));
                    const vf change = load(x.v_first + at + n) - load(x.v + at + n);
                    store(tv + at + n, dvalue - dvalue * m);
                    store(tfirst + at + n, dvalue * m);
                    store(tmix + at + n, dvalue * change * m * (1.0f - m));
                } else {
                    store(tv + at + n, dvalue);
                }
                if (dk_k) add(dk_k + sums + n, draw * key);
                if (dk_a) add(dk_a + sums + n, dkey * key * (gate - 1.0f));
            }
        }
    });
}

template <typename T>
void behind(const Behind &x, const T *g, T *out, int64_t rows, int64_t heads, int N, int threads) {
    share(rows * heads, threads, [=](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; i++) {
            behind_one(x, g, out, i * N, i % heads * N, N);
        }
    });
}

// dy may be y's own memory. dr dk dv are set. dr_k dweight dbias may be null, each for itself
template <typename T>
void behind_backward(const Behind &x, const T *g, const T *dout, float *dy, float *dr, float *dk, float *dv, T *dg,
                     float *dr_k, float *dweight, float *dbias, int64_t rows, int64_t heads, int N, int threads) {
    share(rows * heads, threads, [=](int64_t begin, int64_t end, int thread) {
        for (int64_t i = begin; i < end; i++) {
            const int64_t at = i * N, c = i % heads * N, sums = thread * heads * N + c;
            const Norm of = norm(x.y + at, N, x.eps);
            const float more = bonus(x, at, c, N);
            vf total = {}, along = {}, dmore = {};
            for (int n = 0; n < N; n += W) {
                const vf normal = (load(x.y + at + n) - of.mean) * of.scale, value = load(x.v + at + n);
                const vf weight = load(x.weight + c + n), d = load(dout + at + n);
                store(dg + at + n, d * (normal * weight + load(x.bias + c + n) + value * more));
                const vf dz = d * load(g + at + n), dnormal = dz * weight;
                total += dnormal;
                along += dnormal * normal;
                dmore += dz * value;
                if (dweight) add(dweight + sums + n, dz * normal);
                if (dbias) add(dbias + sums + n, dz);
            }
            const float mean = sum(total) / N, slope = sum(along) / N, dbonus = sum(dmore);
            for (int n = 0; n < N; n += W) {
                const vf normal = (load(x.y + at + n) - of.mean) * of.scale;
                const vf dz = load(dout + at + n) * load(g + at + n);
                const vf r = load(x.r + at + n), k = load(x.k + at + n), r_k = load(x.r_k + c + n);
                store(dy + at + n, (dz * load(x.weight + c + n) - mean - normal * slope) * of.scale);
                store(dr + at + n, k * r_k * dbonus);
                store(dk + at + n, r * r_k * dbonus);
                store(dv + at + n, dz * more);
                if (dr_k) add(dr_k + sums + n, r * k * dbonus);
            }
        }
    });
}

}  // namespace

#define FOR_TYPE(T, name)                                                                                                   \
    extern "C" int before7_##name(const T *r, const T *w, const T *k, const T *v, const T *a, const T *mix,                 \
                                  const T *v_first, const float *k_k, const float *k_a, float *to_r, float *to_w,           \
                                  float *to_k, float *to_v, float *to_a, float *to_b, int64_t rows, int64_t heads,          \
                                  int64_t size, int threads) {                                                              \
        before(Before<T>{r, w, k, v, a, mix, v_first, k_k, k_a}, to_r, to_w, to_k, to_v, to_a, to_b, rows, heads,           \
               int(size), threads);                                                                                         \
        return 0;                                                                                                           \
    }                                                                                                                       \
    extern "C" int before7_backward_##name(                                                                                 \
        const T *r, const T *w, const T *k, const T *v, const T *a, const T *mix, const T *v_first, const float *k_k,       \
        const float *k_a, const float *dr, const float *dw, const float *dk, const float *dv, const float *da,              \
        const float *db, T *tr, T *tw, T *tk, T *tv, T *ta, T *tmix, T *tfirst, float *dk_k, float *dk_a, int64_t rows,     \
        int64_t heads, int64_t size, int threads) {                                                                         \
        before_backward(Before<T>{r, w, k, v, a, mix, v_first, k_k, k_a}, dr, dw, dk, dv, da, db, tr, tw, tk, tv, ta, tmix, \
                        tfirst, dk_k, dk_a, rows, heads, int(size), threads);                                               \
        return 0;                                                                                                           \
    }                                                                                                                       \
    extern "C" int behind7_##name(const float *y, const float *r, const float *k, const float *v, const float *r_k,         \
                                  const float *weight, const float *bias, const T *g, T *out, int64_t rows, int64_t heads,  \
                                  int64_t size, int threads) {                                                              \
        behind(Behind{y, r, k, v, r_k, weight, bias, EPS}, g, out, rows, heads, int(size), threads);                        \
        return 0;                                                                                                           \
    }                                                                                                                       \
    extern "C" int behind7_backward_##name(const float *y, const float *r, const float *k, const float *v,                  \
                                           const float *r_k, const float *weight, const float *bias, const T *g,            \
                                           const T *dout, float *dy, float *dr, float *dk, float *dv, T *dg, float *dr_k,   \
                                           float *dweight, float *dbias, int64_t rows, int64_t heads, int64_t size,         \
                                           int threads) {                                                                   \
        behind_backward(Behind{y, r, k, v, r_k, weight, bias, EPS}, g, dout, dy, dr, dk, dv, dg, dr_k, dweight, dbias,      \
                        rows, heads, int(size), threads);                                                                   \
        return 0;                                                                                                           \
    }
FOR_TYPE(float, float32)
FOR_TYPE(bf16, bfloat16)
