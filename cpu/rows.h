// Rows of tokens shared out among threads, and what a parameter's gradient needs of it: sums over the rows of each thread.
#pragma once
#include <algorithm>

#include "vec.h"

#ifdef _OPENMP
#include <omp.h>
static inline int this_thread() { return omp_get_thread_num(); }
static inline int all_threads() { return omp_get_num_threads(); }
#else
static inline int this_thread() { return 0; }
static inline int all_threads() { return 1; }
#endif

// Calls work(begin, end, thread) once for each of at most `threads` threads. Neighbours of a thread's rows are its own, too.
template <typename Work> inline void share(int64_t rows, int threads, Work work) {
    threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, rows / 8)));
#pragma omp parallel num_threads(threads)
    {
        const int thread = this_thread(), all = all_threads();
        work(rows * thread / all, rows * (thread + 1) / all, thread);
    }
}

inline void add(float *to, vf x) { store(to, load(to) + x); }
