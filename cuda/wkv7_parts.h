// A part of L tokens of WKV-7 on tensor cores, with the letters of rwkv_peft/ops/torch_wkv7.py: what wkv7_chunked.cu and wkv7_onepass.cu have in
// common. A file says how many tokens L are, and then includes this.

namespace {

constexpr int LINE = N + 4, SQUARE = 2 * L + 4, HALVES = L + 4;  // from row to row in shared memory: few conflicts in products
constexpr int SLICES = THREADS / N, SLICE = L / SLICES;         // a column's tokens are divided among so many threads
constexpr int SUMS = SLICES * N;

// Matrices that stay in shared memory for products are rounded when they are written; what is added to a sum is not.
__device__ inline View<> in_shared(const float *p) { return {p, LINE, 1}; }

struct Part {
    int begin, count;
};

// What a thread has of an input: its column's tokens, of a slice of the part (or COUNT of them, from one on); nothing behind the last
// token. All of them are on their way from memory at once, and are waited for only where they are used.
template <typename T, int COUNT = SLICE> struct Share {
    T x[COUNT];
    __device__ inline void fetch(const T *p, Part part, int H, int h, int first = 0) {
        const int j = threadIdx.x % N, own = threadIdx.x / N * SLICE + first;
#pragma unroll
        for (int i = 0; i < COUNT; i++) x[i] = own + i < part.count ? p[at(part.begin + own + i, H, h, j)] : T{};
    }
    __device__ inline float operator[](int i) const { return from(x[i]); }
    // Into rows of LINE, rounded for products.
    __device__ inline void lay(float *to) const {
        const int j = threadIdx.x % N, own = threadIdx.x / N * SLICE;
#pragma unroll
        for (int i = 0; i < COUNT; i++) to[(own + i) * LINE + j] = tf32((*this)[i]);
    }
};

template <typename T, int COUNT = SLICE> struct Inputs {
    Share<T, COUNT> r, k, a, b;
    Share<float, COUNT> w;
    __device__ inline void fetch(
        const T *r_, const float *w_, const T *k_, const T *a_, const T *b_, Part part, int H, int h, int first = 0
    ) {
        w.fetch(w_, part, H, h, first);
        r.fetch(r_, part, H, h, first), k.fetch(k_, part, H, h, first);
        a.fetch(a_, part, H, h, first), b.fetch(b_, part, H, h, first);
    }
};

// [Q; A] and [K; B] of a part, in rows of LINE. end: E, if it is wanted. sums: room for SUMS numbers. Returns the sum of the
// logarithms of the column's decays before the thread's own tokens.
template <typename T> __device__ inline float scaled(float *qa, float *kb, float *end, float *sums, const Inputs<T> &x) {
    const int j = threadIdx.x % N, slice = threadIdx.x / N, own = slice * SLICE;
    float mine = 0.0f, before = 0.0f;
#pragma unroll
    for (int i = 0; i < SLICE; i++) mine += x.w[i];
    sums[slice * N + j] = mine;
    __syncthreads();
#pragma unroll
    for (int n = 0; n < SLICES; n++) before += n < slice ? sums[n * N + j] : 0.0f;
    float sum = before;
#pragma unroll
    for (int i = 0; i < SLICE; i++) {
        const int row = (own + i) * LINE + j;
        const float ask = expf(sum);
        sum += x.w[i];
        const float up = expf(sum), down = expf(-sum);
        qa[row] = tf32(x.r[i] * up), qa[L * LINE + row] = tf32(x.a[i] * ask);
        kb[row] = tf32(x.k[i] * down), kb[L * LINE + row] = tf32(x.b[i] * down);
    }
    if (end && slice == SLICES - 1) end[j] = expf(sum);
    return before;
}

// Whether token i of [Q; A] sees token j of [K; B].
__device__ inline bool sees(int i, int j) { return i < L ? i >= j % L : i - L > j % L; }

// X [2 L, 2 L] in rows of SQUARE: what of [Q; A] [K; B]^T a token sees. Of A and B only the inverse is wanted, and that of what they
// are; the rest is rounded for products.
__device__ inline void scores(float *x, const float *qa, const float *kb) {
    Product<2 * L, 2 * L> found;
    found.template add<N>(in_shared(qa), in_shared(kb).transposed());
    found.each([=](int i, int j, float value) {
        x[i * SQUARE + j] = !sees(i, j) ? 0.0f : i < L || j < L ? tf32(value) : value;
    });
}

// (1 - m)^-1 [L, L] of a matrix m below its diagonal, by substitution in the halves on the diagonal and their product with what is
// between them. Powers of m are never formed: with repeated keys they grow like binomials and cancel to noise.
__device__ inline void inverse(float *out, View<> m) {
    constexpr int HALF = L / 2;
    if (threadIdx.x < L) {
        const int half = threadIdx.x / HALF * HALF, column = threadIdx.x % HALF;
        float x[HALF];
#pragma unroll
        for (int i = 0; i < HALF; i++) {
            float sum = i == column ? 1.0f : 0.0f;
#pragma unroll
            for (int j = 0; j < i; j++) sum += m(half + i, half + j) * x[j];
            x[i] = sum;
            out[(half + i) * HALVES + half + column] = sum;
        }
    }
    __syncthreads();
    const View<> found = {out, HALVES, 1};
    // beside the diagonal, above it: the product so far, until the one below it is there
    for (int n = threadIdx.x; n < HALF * HALF; n += THREADS) {
        const int i = n / HALF, j = n % HALF;
        float sum = 0.0f;
#pragma unroll
        for (int x = 0; x < HALF; x++) sum += m(HALF + i, x) * found(x, j);
        out[i * HALVES + HALF + j] = sum;
    }
    __syncthreads();
    for (int n = threadIdx.x; n < HALF * HALF; n += THREADS) {
        const int i = n / HALF, j = n % HALF;
        float sum = 0.0f;
#pragma unroll
        for (int x = 0; x < HALF; x++) sum += found(HALF + i, HALF + x) * found(x, HALF + j);
        out[(HALF + i) * HALVES + j] = sum;
    }
    __syncthreads();
    for (int n = threadIdx.x; n < HALF * HALF; n += THREADS) out[n / HALF * HALVES + HALF + n % HALF] = 0.0f;
}

// dr, dw, dk, da and db of a part. In shared memory, all of which may be overwritten: qa, kb; values: [V; Z]; dvalues: the same of the
// way back, [dy; dZ]; x: room for 2 L rows of SQUARE; sums: for SUMS numbers. state: the one before the part; slope: the gradient of
// the one behind it, times its decay. before: what `scaled` has returned. free: called when nobody reads slope any more, and
// qa and dvalues are still what they were. Ends where threads still read shared memory.
template <typename T, typename F>
__device__ inline void slopes(
    float *qa, float *kb, float *values, const float *dvalues, float *x, float *sums, View<false> state, View<false> slope, float before,
    const T *r, const float *w, const T *k, const T *a, const T *b, T *dr, float *dw, T *dk, T *da, T *db, Part part, int H, int h, F free
) {
    {
        Product<2 * L, 2 * L> of_scores;
        of_scores.template add<N>(in_shared(dvalues), in_shared(values).transposed());
        of_scores.each([=](int i, int j, float value) { x[i * SQUARE + j] = sees(i, j) ? tf32(value) : 0.0f; });
    }
    const int j = threadIdx.x % N, slice = threadIdx.x / N, own = slice * SLICE;
    float total = 0.0f;
#pragma unroll 8
    for (int i = slice * (N / SLICES); i < (slice + 1) * (N / SLICES); i++) total += state(i, j) * slope(i, j);
    Product<2 * L, N> dqa, dkb;
    dqa.template add<N>(in_shared(dvalues), state);
    dkb.template add<N>(in_shared(values), slope);
    __syncthreads();
    free();
    dkb.store(values, LINE);  // what the state behind the part has of the keys
    const View<> seen = {x, SQUARE, 1};
    dqa.template add<2 * L>(seen, in_shared(kb));
    dkb.template add<2 * L>(seen.transposed(), in_shared(qa));
    __syncthreads();
    dqa.store(qa, LINE), dkb.store(kb, LINE);
    // back through the scaling: e^x passes on gradient * value, and x is a running sum of w
    float sum = before;
    __syncthreads();
    constexpr int AT_ONCE = SLICE < 4 ? SLICE : 4;  // more of them spill
#pragma unroll 1
    for (int first = 0; first < SLICE; first += AT_ONCE) {
        Inputs<T, AT_ONCE> in;
        in.fetch(r, w, k, a, b, part, H, h, first);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int t = own + first + i;
            float *q = qa + t * LINE + j, *ask = q + L * LINE, *key = kb + t * LINE + j, *add = key + L * LINE;
            const float of_first = expf(sum);
            sum += in.w[i];
            const float up = expf(sum), down = expf(-sum), key_now = in.k[i] * down, add_now = in.b[i] * down;
            const float of_r = *q * up, of_a = *ask * of_first;
            if (t < part.count) {
                const long place = at(part.begin + t, H, h, j);
                put(dr + place, of_r), put(da + place, of_a), put(dk + place, *key * down), put(db + place, *add * down);
            }
            total += key_now * values[t * LINE + j] + add_now * values[(L + t) * LINE + j];
            *ask = of_a * in.a[i];
            *q = of_r * in.r[i] + *ask - key_now * *key - add_now * *add;
        }
    }
    sums[slice * N + j] = total;
    __syncthreads();
    float behind = 0.0f;
    for (int n = 0; n < SLICES; n++) behind += sums[n * N + j];
    for (int i = own + SLICE; i < L; i++) behind += qa[i * LINE + j];
    for (int i = SLICE - 1; i >= 0; i--) {
        behind += qa[(own + i) * LINE + j];
        if (own + i < part.count) dw[at(part.begin + own + i, H, h, j)] = behind - qa[(L + own + i) * LINE + j];
    }
}

}  // namespace
