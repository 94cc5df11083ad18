// Products of small matrices whose rows lie anywhere: every operand is a list of row pointers, so gathers cost nothing.
#pragma once

#include "vec.h"

namespace {

// acc + a b: numbers, or pairs of bfloat16 that are multiplied and summed.
template <bool PAIRS>
INLINE vf madd(vf acc, vf a, vf b) {
#if defined(__AVX512BF16__)
    if (PAIRS) return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#endif
    return a * b + acc;
}

// c[i][at ...] (+)= sum over n of a[i][n STEP] b[n][at ...], for M rows and N vectors held in registers.
template <bool PAIRS, bool ADD, int STEP, int M, int N>
void block(int count, const float *const *a, const float *const *b, float *const *c, int at) {
    vf acc[M][N];
    const float *rows[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
        rows[i] = a[i];
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) acc[i][j] = ADD ? load(c[i] + at + j * VL) : vf{};
    }
    for (int n = 0; n < count; ++n) {
        vf line[N];
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) line[j] = load(b[n] + at + j * VL);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
            float x;
            memcpy(&x, (const char *)rows[i] + (size_t)n * STEP * 4, 4);
            const vf each = splat(x);
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) acc[i][j] = madd<PAIRS>(acc[i][j], each, line[j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) store(c[i] + at + j * VL, acc[i][j]);
}

typedef void (*Block)(int, const float *const *, const float *const *, float *const *, int);

template <bool PAIRS, bool ADD, int STEP, int N>
Block by_rows(int m) {
    switch (m) {
        case 1: return block<PAIRS, ADD, STEP, 1, N>;
        case 2: return block<PAIRS, ADD, STEP, 2, N>;
        case 3: return block<PAIRS, ADD, STEP, 3, N>;
        case 4: return block<PAIRS, ADD, STEP, 4, N>;
        case 5: return block<PAIRS, ADD, STEP, 5, N>;
        default: return block<PAIRS, ADD, STEP, MR, N>;
    }
}

template <bool PAIRS, bool ADD, int STEP>
Block pick(int m, int n) {
    switch (n) {
        case 1: return by_rows<PAIRS, ADD, STEP, 1>(m);
        case 2: return by_rows<PAIRS, ADD, STEP, 2>(m);
        case 3: return by_rows<PAIRS, ADD, STEP, NV < 3 ? NV : 3>(m);
        default: return by_rows<PAIRS, ADD, STEP, NV>(m);
    }
}

// c[i] (+)= sum over n < count of a[i][n STEP] b[n], for m rows of `vectors` vectors.
template <bool PAIRS, bool ADD, int STEP>
void product(int m, int vectors, int count, const float *const *a, const float *const *b, float *const *c) {
    for (int j = 0; j < vectors; j += NV) {
        const int n = vectors - j < NV ? vectors - j : NV;
        const Block most = pick<PAIRS, ADD, STEP>(MR, n);
        int i = 0;
        for (; i + MR <= m; i += MR) most(count, a + i, b, c + i, j * VL);
        if (i < m) pick<PAIRS, ADD, STEP>(m - i, n)(count, a + i, b, c + i, j * VL);
    }
}

}  // namespace
