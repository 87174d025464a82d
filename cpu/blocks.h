// What the recurrent kernels share: where tokens, sequences and kept states lie, and how a state goes into and out of blocks.
#pragma once
#include <cstdlib>

#include "vec.h"

// Vectors of values in a block. Four keep the multipliers busy, even where (AVX2) the registers do not hold all that belongs to
// them: with two, the backward pass of WKV-7 takes 1.3 times as long, on AVX-512 1.9 times.
constexpr int block_vectors(int size) { return size / W < 4 ? size / W : 4; }

struct Item {
    int64_t sequence, head;
    int column;  // first value of the block
};

struct Sequences {
    const int64_t *borders;  // [count + 1] tokens
    const int64_t *chunks;   // [count] number of a sequence's first kept state
    int64_t count, heads, every;

    int64_t place(int64_t token, int64_t head, int size) const { return (token * heads + head) * size; }
    int64_t chunk(int64_t sequence, int64_t token) const { return chunks[sequence] + (token - borders[sequence]) / every; }
    Item item(int64_t i, int blocks, int width) const {
        return {i / blocks / heads, i / blocks % heads, int(i % blocks) * width};
    }
};

// memory of a thread's own, for the states of a chunk
struct Scratch {
    float *data;
    explicit Scratch(int64_t floats) : data((float *)std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)) {}
    ~Scratch() { std::free(data); }
    Scratch(const Scratch &) = delete;
};

alignas(64) static const float nothing[256] = {};

// [R][C] -> [C][R], a few rows at a time: they stay in the cache
template <int R, int C> inline void turn(const float *from, float *to) {
    constexpr int some = 8;
    for (int r = 0; r < R; r += some)
        for (int c = 0; c < C; c++)
            for (int i = 0; i < some; i++) to[c * R + r + i] = from[(r + i) * C + c];
}

// outside, rows are values; inside, keys. from may be null, for zero
template <int N, int V> inline void load_state(float *state, const float *from, int column) {
    if (from)
        turn<V, N>(from + column * N, state);
    else
        std::memset(state, 0, N * V * sizeof(float));
}

template <int N, int V> inline void store_state(const float *state, float *to, int column) {
    turn<N, V>(state, to + column * N);
}

template <int N, int V> inline void keep(const float *state, float *kept, int column) {
    for (int n = 0; n < N; n++) std::memcpy(kept + n * N + column, state + n * V, V * sizeof(float));
}

template <int N, int V> inline void take(float *state, const float *kept, int column) {
    for (int n = 0; n < N; n++) std::memcpy(state + n * V, kept + n * N + column, V * sizeof(float));
}

template <int N> inline void exponentials(float *out, const float *x) {
    for (int n = 0; n < N; n += W) store(out + n, exp(load(x + n)));
}

inline void give(float *to, vf x, bool first) { store(to, first ? x : load(to) + x); }

// head sizes that there is a kernel for; returns 1 for others
#define FOR_SIZE(size, function, ...)                          \
    switch (size) {                                            \
        case 16: function<16>(__VA_ARGS__); return 0;          \
        case 32: function<32>(__VA_ARGS__); return 0;          \
        case 64: function<64>(__VA_ARGS__); return 0;          \
        case 128: function<128>(__VA_ARGS__); return 0;        \
        default: return 1;                                     \
    }
