// Vectors of one instruction set, in the extensions that GCC and Clang share; included once by each copy of the kernels.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int VL = 16, NV = 4;
#elif defined(__AVX2__)
constexpr int VL = 8, NV = 2;
#elif defined(__aarch64__)
constexpr int VL = 4, NV = 4;
#else
constexpr int VL = 4, NV = 2;
#endif
constexpr int MR = 6;  // rows of a register tile: MR x NV accumulators

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef float vf_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));
typedef uint16_t vh_any __attribute__((vector_size(VL * 2), aligned(2), may_alias));

#define INLINE inline __attribute__((always_inline))

INLINE vf load(const void *p) { return (vf)(*(const vf_any *)p); }
INLINE void store(void *p, vf x) { *(vf_any *)p = (vf_any)x; }
INLINE vu load_bits(const void *p) { return (vu)(*(const vu_any *)p); }
INLINE void store_bits(void *p, vu x) { *(vu_any *)p = (vu_any)x; }
INLINE vf splat(float x) { return x - (vf){}; }
INLINE vu splat_bits(uint32_t x) { return x - (vu){}; }
INLINE vf choose(vi where, vf a, vf b) { return (vf)((where & (vi)a) | (~where & (vi)b)); }

// The larger; b where a is not a number, or where both are.
INLINE vf larger(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return choose(a > b, a, b);
#endif
}

// Lanes of x whose bit is set, those of y elsewhere.
INLINE vf by_bits(uint64_t bits, vf x, vf y) {
#if defined(__AVX512F__)
    return (vf)_mm512_mask_mov_ps((__m512)y, (__mmask16)bits, (__m512)x);
#else
    vi lane;
    for (int i = 0; i < VL; ++i) lane[i] = 1 << i;
    const vi all = (int32_t)(bits & ((1u << VL) - 1)) - (vi){};
    return choose((all & lane) != 0, x, y);
#endif
}

INLINE bool any(vi where) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)where, (__m512i)where);
#else
    int32_t found = 0;
    for (int i = 0; i < VL; ++i) found |= where[i];
    return found;
#endif
}

// 2^x within 1.2e-7, 0 from -126.5 down, NaN of NaN; x at most 127.
INLINE vf exp2(vf x) {
    const float round = 12582912.0f;  // 1.5 2^23: adding it leaves the nearest whole number in the low bits
    x = larger(splat(-127.0f), x);
    const vf t = x + round, f = x - (t - round);
    vf p = f * 0x1.5c08e4p-10f + 0x1.3d0c52p-7f;
    p = p * f + 0x1.c6b6e4p-5f;
    p = p * f + 0x1.ebf918p-3f;
    p = p * f + 0x1.62e428p-1f;
    p = p * f + 0x1.000002p+0f;
    return p * (vf)(((vu)t << 23) + (127u << 23));
}

INLINE float widen(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

// To bfloat16, to nearest even; NaN stays NaN.
INLINE uint16_t narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return (uint16_t)((bits >> 16) | 64);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE vu widen_bits(const uint16_t *p) { return __builtin_convertvector((vh)(*(const vh_any *)p), vu); }

INLINE vu narrow_bits(vf x) {
#if defined(__AVX512BF16__)
    return (vu)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    const vu bits = (vu)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const vi nan = x != x;
    return ((vu)nan & ((bits >> 16) | 64u)) | (~(vu)nan & rounded);
#endif
}

// a and b as pairs of bfloat16.
INLINE vu pair_bits(vf a, vf b) {
#if defined(__AVX512BF16__)
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                           19, 3, 18, 2, 17, 1, 16, 0);
    return (vu)_mm512_permutexvar_epi16(order, both);
#else
    return narrow_bits(a) | narrow_bits(b) << 16;
#endif
}

INLINE void store_half(uint16_t *p, vu x) { *(vh_any *)p = (vh_any)__builtin_convertvector(x, vh); }

#if defined(__AVX512F__)
// 16 x 16 numbers of 4 bytes, transposed.
INLINE void transpose(const void *const *rows, size_t at, float *to, int stride) {
    __m512 a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = rows[i] ? _mm512_loadu_ps((const char *)rows[i] + at) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = (__m512)_mm512_unpacklo_pd((__m512d)b[i], (__m512d)b[i + 2]);
        a[i + 1] = (__m512)_mm512_unpackhi_pd((__m512d)b[i], (__m512d)b[i + 2]);
        a[i + 2] = (__m512)_mm512_unpacklo_pd((__m512d)b[i + 1], (__m512d)b[i + 3]);
        a[i + 3] = (__m512)_mm512_unpackhi_pd((__m512d)b[i + 1], (__m512d)b[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        _mm512_storeu_ps(to + i * stride, _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_ps(to + (i + 8) * stride, _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd));
        _mm512_storeu_ps(to + (i + 4) * stride, _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_storeu_ps(to + (i + 12) * stride, _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xdd));
    }
}
#endif

}  // namespace
