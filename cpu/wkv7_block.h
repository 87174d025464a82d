// What stands around WKV-7, for one head of one token: see wkv7_block.cpp. at: where its N numbers lie among the activations, c: among
// the parameters.
#pragma once
#include <algorithm>
#include <cmath>

#include "vec.h"

constexpr float SCALE = -0.6065306597126334f;  // -e^{-1/2}
constexpr float LEAST = 1e-12f;                // of the length that kk is divided by
constexpr float EPS = 64e-5f;                  // of ln_x, in every released model

template <typename T> struct Before {
    const T *r, *w, *k, *v, *a, *mix, *v_first;  // mix and v_first may be null
    const float *k_k, *k_a;
};

template <typename T>
inline void before_one(const Before<T> &x, float *r, float *w, float *k, float *v, float *a, float *b, int64_t at, int64_t c,
                       int N) {
    vf square = {};
    for (int n = 0; n < N; n += W) {
        const vf key = load(x.k + at + n) * load(x.k_k + c + n);
        square += key * key;
    }
    const float scale = 1.0f / std::max(std::sqrt(sum(square)), LEAST);
    for (int n = 0; n < N; n += W) {
        const vf gate = sigmoid(load(x.a + at + n)), key = load(x.k + at + n);
        const vf kk = key * load(x.k_k + c + n) * scale;
        vf value = load(x.v + at + n);
        if (x.mix) value += (load(x.v_first + at + n) - value) * sigmoid(load(x.mix + at + n));
        store(r + at + n, load(x.r + at + n));
        store(w + at + n, sigmoid(load(x.w + at + n)) * SCALE);
        store(k + at + n, key + key * (gate - 1.0f) * load(x.k_a + c + n));
        store(v + at + n, value);
        store(a + at + n, -kk);
        store(b + at + n, kk * gate);
    }
}

struct Norm {
    float mean, scale;
};

inline Norm norm(const float *y, int N, float eps) {
    vf total = {}, square = {};
    for (int n = 0; n < N; n += W) total += load(y + n);
    const float mean = sum(total) / N;
    for (int n = 0; n < N; n += W) square += (load(y + n) - mean) * (load(y + n) - mean);
    return {mean, 1.0f / std::sqrt(sum(square) / N + eps)};
}

struct Behind {
    const float *y, *r, *k, *v, *r_k, *weight, *bias;
    float eps;
};

inline float bonus(const Behind &x, int64_t at, int64_t c, int N) {
    vf total = {};
    for (int n = 0; n < N; n += W) total += load(x.r + at + n) * load(x.k + at + n) * load(x.r_k + c + n);
    return sum(total);
}

template <typename T> inline void behind_one(const Behind &x, const T *g, T *out, int64_t at, int64_t c, int N) {
    const Norm of = norm(x.y + at, N, x.eps);
    const float more = bonus(x, at, c, N);
    for (int n = 0; n < N; n += W) {
        const vf normal = (load(x.y + at + n) - of.mean) * of.scale;
        const vf z = normal * load(x.weight + c + n) + load(x.bias + c + n) + load(x.v + at + n) * more;
        store(out + at + n, z * load(g + at + n));
    }
}
