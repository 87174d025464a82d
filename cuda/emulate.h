// Blocks of threads on the host, for tests without a GPU: the threads of a block are fibers that run one after another from
// barrier to barrier, so what a kernel computes is what a GPU would compute, and a race between barriers shows as a wrong result.
// Tensor cores are a barrier of a warp, at which its threads exchange what they have. -DEXACT: without the rounding of operands.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // one block runs at a time
#define __launch_bounds__(...)
#define __restrict__

struct dim3 {
    int x, y, z;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

constexpr size_t STACK = 1 << 18;
enum Wait { READY, FOR_WARP, FOR_BLOCK, DONE };
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    Wait wait = READY;
    bool side = false;  // of the warp's exchange, which it used last
};
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline int current;
inline std::function<void()> body;
inline float room[1 << 16];  // shared memory that a launch asks for, and what lies behind it
inline int room_size;        // in floats

inline float *asked(int floats) {
    if (floats > room_size) room_size = -1;
    return room;
}

// What the threads of a warp give to a product; on two sides in turn, so that nobody overwrites what another still reads.
struct Exchange {
    float a[2][32][4], b[2][32][2];
};
inline Exchange exchange[32];

inline void enter() {
    body();
    fibers[current].wait = DONE;
    swapcontext(&fibers[current].context, &scheduler);
}

inline void wait(Wait what) {
    int mine = current;
    fibers[mine].wait = what;
    swapcontext(&fibers[mine].context, &scheduler);
}

// Let those go on who have all come to the same barrier; whether there were any.
inline bool release(int begin, int end, Wait what) {
    bool some = false;
    for (int i = begin; i < end; i++) {
        if (fibers[i].wait != what && fibers[i].wait != DONE) return false;
        some = some || fibers[i].wait == what;
    }
    for (int i = begin; i < end; i++)
        if (fibers[i].wait == what) fibers[i].wait = READY;
    return some;
}

// One round runs every warp to the next barrier of the block, each as far as it gets before the next one begins: so that a missing
// barrier cannot hide. backwards: in the opposite order.
// False if threads wait at different barriers for ever, use more shared memory than was asked for, or give tensor cores more digits
// than these read.
inline bool block(int threads, bool backwards) {
    std::fill(std::begin(room), std::end(room), NAN);
    if ((int)fibers.size() != threads) fibers = std::vector<Fiber>(threads);
    for (auto &fiber : fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        fiber.wait = READY;
        makecontext(&fiber.context, enter, 0);
    }
    do {
        for (int warp = 0; warp < (threads + 31) / 32; warp++) {
            const int begin = (backwards ? (threads - 1) / 32 - warp : warp) * 32, end = std::min(begin + 32, threads);
            do {
                for (int i = 0; i < end - begin; i++) {
                    current = backwards ? end - 1 - i : begin + i;
                    if (fibers[current].wait != READY) continue;
                    threadIdx = {current, 0, 0};
                    swapcontext(&scheduler, &fibers[current].context);
                }
            } while (release(begin, end, FOR_WARP));
        }
    } while (release(0, threads, FOR_BLOCK));
    for (int i = room_size; i >= 0 && i < (int)std::size(room); i++)
        if (room[i] == room[i]) room_size = -1;
    return room_size >= 0 && std::all_of(fibers.begin(), fibers.end(), [](const Fiber &fiber) { return fiber.wait == DONE; });
}

template <typename... A, size_t... I> void call(void (*kernel)(A...), void **args, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<A> *)args[I]...);
}

template <typename... A> bool grid(void (*kernel)(A...), dim3 size, dim3 threads, int shared, void **args, bool backwards) {
    gridDim = size, blockDim = threads, room_size = shared / 4;
    body = [=] { call(kernel, args, std::index_sequence_for<A...>{}); };
    for (int y = 0; y < size.y; y++)
        for (int x = 0; x < size.x; x++) {
            blockIdx = {x, y, 0};
            if (!block(threads.x, backwards)) return false;
        }
    return true;
}

}  // namespace emulate

inline void __syncthreads() { emulate::wait(emulate::FOR_BLOCK); }

#define ROOM(name, floats) float *name = emulate::asked(floats)

inline float tf32(float x) {
#ifdef EXACT
    return x;
#else
    unsigned int bits;  // 10 bits behind the point; halves away from zero
    memcpy(&bits, &x, 4);
    bits = (bits + 0x1000) & 0xffffe000;
    memcpy(&x, &bits, 4);
    return x;
#endif
}

inline float of_lane(float x, int mask) {
    const int lane = threadIdx.x % 32, mine = emulate::current;
    auto &given = emulate::exchange[threadIdx.x / 32];
    const bool side = emulate::fibers[mine].side = !emulate::fibers[mine].side;
    given.a[side][lane][0] = x;
    emulate::wait(emulate::FOR_WARP);
    return given.a[side][lane ^ mask][0];
}

// See tensor.h.
inline void mma(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
    const int lane = threadIdx.x % 32, mine = emulate::current;
    auto &given = emulate::exchange[threadIdx.x / 32];
    const bool side = emulate::fibers[mine].side = !emulate::fibers[mine].side;
    memcpy(given.a[side][lane], a, sizeof a), memcpy(given.b[side][lane], b, sizeof b);
    for (float x : {a[0], a[1], a[2], a[3], b[0], b[1]})
        if (!(x != x || tf32(x) == x)) emulate::room_size = -1;  // a GPU would cut it off
    emulate::wait(emulate::FOR_WARP);
    for (int n = 0; n < 4; n++) {
        const int i = lane / 4 + n / 2 * 8, j = lane % 4 * 2 + n % 2;
        for (int k = 0; k < 8; k++) c[n] += given.a[side][i % 8 * 4 + k % 4][i / 8 + k / 4 * 2] * given.b[side][j * 4 + k % 4][k / 4];
    }
}
