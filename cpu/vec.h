// Vectors of floats as wide as the instruction set that this is compiled for: AVX-512, AVX2, or what every processor has.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif

constexpr int W = WIDTH;
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef float vf_any __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * W), aligned(2), may_alias));

struct bf16 {
    uint16_t bits;
};

static inline vf load(const float *p) { return *(const vf_any *)p; }
static inline void store(float *p, vf x) { *(vf_any *)p = x; }
static inline vf load(const bf16 *p) { return (vf)(__builtin_convertvector(*(const vh_any *)p, vu) << 16); }
static inline void store(bf16 *p, vf x) {
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest, halves to even
    vi number = x == x;                                      // what is none stays none
    *(vh_any *)p = __builtin_convertvector((rounded & (vu)number) | (0x7fc0 & ~(vu)number), vh);
}

// one number at a time
static inline float one(const float *p) { return *p; }
static inline float one(const bf16 *p) {
    uint32_t bits = uint32_t(p->bits) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
static inline void set(float *p, float x) { *p = x; }
static inline void set(bf16 *p, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    p->bits = x == x ? uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : 0x7fc0;
}

static inline vf splat(float x) { return x - (vf){}; }
static inline vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
static inline vf larger(vf a, vf b) { return choose(a > b, a, b); }
static inline vf positive(vf x) { return choose(x < 0, splat(0.0f), x); }  // what is no number stays none

// e^x to 2 roundings: 2^n times a polynomial on |r| <= ln(2)/2 (Cephes, expf). 0 below -87.3, where floats end; inf and NaN
// as they come.
static inline vf exp(vf x) {
    vf inside = choose(x < -87.336544f, splat(-87.336544f), choose(x > 88.72f, splat(88.72f), x));
    vf n = inside * 1.44269504088896341f;
    vf round = n + 12582912.0f;  // 1.5 * 2^23: what is left in the last bits is n, rounded
    n = round - 12582912.0f;
    vf r = inside - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vi power = __builtin_convertvector(n, vi);
    vi half = power >> 1;  // 2^128 is no float, but 2^64 * 2^64 may be
    vf scaled = p * (vf)((half + 127) << 23) * (vf)((power - half + 127) << 23);
    scaled = choose(x < -87.336544f, splat(0.0f), scaled);
    return choose(x > 88.72f, x * 3.0e38f, choose(x != x, x, scaled));
}

static inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

static inline float sum(vf x) {
    float s = 0;
    for (int i = 0; i < W; i++) s += x[i];
    return s;
}

// two vectors -> one of the named lanes; those of y are counted on from W
#if defined(__clang__)
#define PICK(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define PICK(x, y, ...) __builtin_shuffle(x, y, (vi){__VA_ARGS__})
#endif

// Sums of W vectors, each over its own lanes: [i] is the sum of x[i]. A tree: every step adds neighbours up and halves the
// number of vectors.
#if WIDTH == 16
static inline vf pair1(vf x, vf y) {
    return PICK(x, y, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           PICK(x, y, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}
static inline vf pair2(vf x, vf y) {
    return PICK(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           PICK(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
static inline vf pair3(vf x, vf y) {
    return PICK(x, y, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           PICK(x, y, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
}
static inline vf pair4(vf x, vf y) {
    return PICK(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           PICK(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
#elif WIDTH == 8
static inline vf pair1(vf x, vf y) { return PICK(x, y, 0, 8, 2, 10, 4, 12, 6, 14) + PICK(x, y, 1, 9, 3, 11, 5, 13, 7, 15); }
static inline vf pair2(vf x, vf y) { return PICK(x, y, 0, 1, 8, 9, 4, 5, 12, 13) + PICK(x, y, 2, 3, 10, 11, 6, 7, 14, 15); }
static inline vf pair3(vf x, vf y) { return PICK(x, y, 0, 1, 2, 3, 8, 9, 10, 11) + PICK(x, y, 4, 5, 6, 7, 12, 13, 14, 15); }
#else
static inline vf pair1(vf x, vf y) { return PICK(x, y, 0, 4, 2, 6) + PICK(x, y, 1, 5, 3, 7); }
static inline vf pair2(vf x, vf y) { return PICK(x, y, 0, 1, 4, 5) + PICK(x, y, 2, 3, 6, 7); }
#endif

static inline vf sums(const vf *x) {
    vf a[W / 2], b[W / 4];
    for (int i = 0; i < W / 2; i++) a[i] = pair1(x[2 * i], x[2 * i + 1]);
    for (int i = 0; i < W / 4; i++) b[i] = pair2(a[2 * i], a[2 * i + 1]);
#if WIDTH == 16
    return pair4(pair3(b[0], b[1]), pair3(b[2], b[3]));
#elif WIDTH == 8
    return pair3(b[0], b[1]);
#else
    return b[0];
#endif
}
