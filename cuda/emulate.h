// Blocks of threads on the host, for tests without a GPU: the threads of a block are fibers that run one after another from
// barrier to barrier, so what a kernel computes is what a GPU would compute, and a race between barriers shows as a wrong result.
#pragma once
#include <ucontext.h>

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
#define __launch_bounds__(n)
#define __restrict__

struct dim3 {
    int x, y, z;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

constexpr size_t STACK = 1 << 18;
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    bool done = false;
};
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline int current;
inline std::function<void()> body;

inline void enter() {
    body();
    fibers[current].done = true;
    swapcontext(&fibers[current].context, &scheduler);
}

// One round runs every thread to its next barrier. backwards: in the opposite order, so that a missing barrier cannot hide.
inline void block(int threads, bool backwards) {
    if ((int)fibers.size() != threads) fibers = std::vector<Fiber>(threads);
    for (auto &fiber : fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        fiber.done = false;
        makecontext(&fiber.context, enter, 0);
    }
    for (bool alive = true; alive;) {
        alive = false;
        for (int i = 0; i < threads; i++) {
            current = backwards ? threads - 1 - i : i;
            if (fibers[current].done) continue;
            threadIdx = {current, 0, 0};
            swapcontext(&scheduler, &fibers[current].context);
            alive = alive || !fibers[current].done;
        }
    }
}

template <typename... A, size_t... I> void call(void (*kernel)(A...), void **args, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<A> *)args[I]...);
}

template <typename... A> void grid(void (*kernel)(A...), dim3 size, dim3 threads, void **args, bool backwards) {
    gridDim = size, blockDim = threads;
    body = [=] { call(kernel, args, std::index_sequence_for<A...>{}); };
    for (int y = 0; y < size.y; y++)
        for (int x = 0; x < size.x; x++) {
            blockIdx = {x, y, 0};
            block(threads.x, backwards);
        }
}

}  // namespace emulate

inline void __syncthreads() {
    int mine = emulate::current;
    swapcontext(&emulate::fibers[mine].context, &emulate::scheduler);
}
