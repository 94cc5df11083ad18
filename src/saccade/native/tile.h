// Rows that run together, the keys that they meet, and the buffers of one thread.
#pragma once

#include "engine.h"
#include "vec.h"

namespace {

using saccade::Item;
using saccade::KEYS;
using saccade::LANES;
using saccade::padded;

// How numbers are stored and multiplied.
struct Single {
    typedef float T;
    static constexpr bool half = false, pairs = false;
};
struct Half {  // bfloat16, computed in float32
    typedef uint16_t T;
    static constexpr bool half = true, pairs = false;
};
struct HalfPairs {  // bfloat16, multiplied in pairs
    typedef uint16_t T;
    static constexpr bool half = true, pairs = true;
};

// Cuts scratch into buffers; without memory it only measures.
struct Cutter {
    float *base;
    int64_t used = 0;
    float *take(int64_t count) {
        float *found = base ? base + used : nullptr;
        used += padded(count);
        return found;
    }
};

template <class T>
INLINE const T *at(const saccade_array &x, int64_t batch, int64_t head, int64_t row) {
    return (const T *)x.data + batch * x.batch + head * x.head + row * x.row;
}

template <class T>
INLINE T *at_mutable(const saccade_array &x, int64_t batch, int64_t head, int64_t row) {
    return (T *)x.data + batch * x.batch + head * x.head + row * x.row;
}

INLINE void row_to_float(const float *from, float *to, int64_t n) {
    memcpy(to, from, n * 4);
    for (int64_t i = n; i < padded(n); ++i) to[i] = 0;
}

INLINE void row_to_float(const uint16_t *from, float *to, int64_t n) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) store_bits(to + i, widen_bits(from + i) << 16);
    for (; i < n; ++i) to[i] = widen(from[i]);
    for (; i < padded(n); ++i) to[i] = 0;
}

INLINE void row_from_float(const float *from, float scale, float *to, int64_t n) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) store(to + i, load(from + i) * scale);
    for (; i < n; ++i) to[i] = from[i] * scale;
}

INLINE void row_from_float(const float *from, float scale, uint16_t *to, int64_t n) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) store_half(to + i, narrow_bits(load(from + i) * scale));
    for (; i < n; ++i) to[i] = narrow(from[i] * scale);
}

// to[d][lane] = rows[lane][d] for numbers of 4 bytes; lanes beyond the rows, and null rows, are zero.
inline void turn(const void *const *rows, int lanes, int64_t dim, float *to) {
    int64_t d = 0;
#if defined(__AVX512F__)
    for (; d + 16 <= dim; d += 16)
        for (int r = 0; r < lanes; r += 16) transpose(rows + r, d * 4, to + d * LANES + r, LANES);
#endif
    for (; d < dim; ++d)
        for (int r = 0; r < lanes; ++r) {
            float x = 0;
            if (rows[r]) memcpy(&x, (const char *)rows[r] + d * 4, 4);
            to[d * LANES + r] = x;
        }
}

// Two rows of bfloat16 as one of pairs; a null second row counts as zeros.
INLINE void interleave(const uint16_t *a, const uint16_t *b, float *to, int64_t n) {
    int64_t i = 0;
    if (b)
        for (; i + VL <= n; i += VL) store_bits(to + i, widen_bits(a + i) | widen_bits(b + i) << 16);
    for (; i < padded(n); ++i) {
        const uint32_t pair = i < n ? a[i] | (b ? (uint32_t)b[i] << 16 : 0) : 0;
        memcpy(to + i, &pair, 4);
    }
}

// Rows of a tile. Lanes are rows, rounded up to 16.
struct Tile {
    int rows, lanes;
    int32_t head[LANES], row[LANES];  // of the rows
    int32_t slot[LANES];
};

inline void set_rows(Tile &t, const saccade_part &p, int64_t first, int64_t count, int64_t head, int64_t fold) {
    t.rows = (int)count;
    t.lanes = (int)padded(count);
    for (int r = 0; r < count; ++r) {
        const int64_t slot = first + r;
        t.head[r] = (int32_t)(head + (fold > 1 ? slot / p.slots : 0));
        t.slot[r] = (int32_t)(fold > 1 ? slot % p.slots : slot);
        t.row[r] = p.row_order ? p.row_order[t.slot[r]] : t.slot[r];
    }
}

// Keys that a tile meets at once; `bits` says which rows read each, null where all do.
struct Chunk {
    int n;
    const uint64_t *bits;
    int32_t key[KEYS];
};

// to[slot][lane]: the terms of the rows of a tile.
inline void load_terms(const saccade_call &call, const Item &item, const Tile &t, float *to) {
    const void *rows[LANES] = {};
    for (int r = 0; r < t.rows; ++r) rows[r] = at<float>(call.terms, item.batch, t.head[r], t.row[r]);
    turn(rows, t.lanes, call.term_dim, to);
}

// Adds to the products in s what the rows hold in the slots of each key.
inline void add_terms(const saccade_call &call, const Chunk &c, int lanes, const float *terms, float *s) {
    for (int n = 0; n < c.n; ++n) {
        const int32_t *slot = call.slot + c.key[n] * call.slots;
        for (int v = n * LANES; v < n * LANES + lanes; v += VL) {
            vf x = load(s + v);
            for (int64_t a = 0; a < call.slots; ++a) x += load(terms + (slot[a] - n) * LANES + v);
            store(s + v, x);
        }
    }
}

// The rows of lanes that hold lo <= j < hi, for keys j0, j0 + 1, ...
INLINE void interval_bits(const int32_t *lo, const int32_t *hi, int lanes, int32_t j0, int n, uint64_t *bits) {
    for (int i = 0; i < n; ++i) {
        uint64_t found = 0;
        const int32_t j = j0 + i;
#if defined(__AVX512F__)
        const __m512i key = _mm512_set1_epi32(j);
        for (int r = 0; r < lanes; r += 16) {
            const __mmask16 in = _mm512_cmple_epi32_mask(_mm512_loadu_si512(lo + r), key);
            found |= (uint64_t)_mm512_mask_cmpgt_epi32_mask(in, _mm512_loadu_si512(hi + r), key) << r;
        }
#else
        for (int r = 0; r < lanes; ++r) found |= (uint64_t)(lo[r] <= j && j < hi[r]) << r;
#endif
        bits[i] = found;
    }
}

// The lanes of a tile in one interval; rows that have no key are left empty, and `inner` is then empty too.
struct Reach {
    int32_t lo[LANES], hi[LANES];
    int32_t first, last, inner_first, inner_last;
};

inline void reach(Reach &x, const Tile &t, const int32_t *lo, const int32_t *hi) {
    x.first = INT32_MAX;
    x.last = 0;
    x.inner_first = 0;
    x.inner_last = INT32_MAX;
    for (int r = 0; r < LANES; ++r) x.lo[r] = x.hi[r] = 0;
    for (int r = 0; r < t.rows; ++r) {
        const int32_t a = lo[t.slot[r]], b = hi[t.slot[r]];
        if (a >= b) {
            x.inner_last = 0;
            continue;
        }
        x.lo[r] = a;
        x.hi[r] = b;
        if (a < x.first) x.first = a;
        if (b > x.last) x.last = b;
        if (a > x.inner_first) x.inner_first = a;
        if (b < x.inner_last) x.inner_last = b;
    }
}

// Calls f(chunk) for all keys that the rows of a tile reach in a part; tile_number is used where tiles are listed.
template <class F>
void each_chunk(const saccade_part &p, const Item &item, const Tile &t, int64_t tile_number, F f) {
    Chunk c;
    uint64_t bits[KEYS];
    if (p.tiles) {
        const int64_t *d = p.tile + 6 * tile_number;
        for (int64_t start = 0; start < d[3] + d[4];) {
            const bool whole = start < d[3];
            const int64_t end = whole ? d[3] : d[3] + d[4];
            c.n = (int)(end - start < KEYS ? end - start : KEYS);
            memcpy(c.key, p.key_order + d[2] + start, c.n * 4);
            c.bits = whole ? nullptr : p.bits + d[5] + (start - d[3]);
            f(c);
            start += c.n;
        }
        return;
    }
    Reach x;
    for (int64_t i = 0; i < p.intervals; ++i) {
        const int64_t line = ((p.per_batch ? item.batch : 0) * p.intervals + i) * p.slots;
        reach(x, t, p.lo + line, p.hi + line);
        const int64_t first = x.first > item.key_lo ? x.first : item.key_lo;
        const int64_t last = x.last < item.key_hi ? x.last : item.key_hi;
        for (int64_t j = first; j < last; j += c.n) {
            c.n = (int)(last - j < KEYS ? last - j : KEYS);
            const bool whole = j >= x.inner_first && j + c.n <= x.inner_last;
            if (!whole) interval_bits(x.lo, x.hi, t.lanes, (int32_t)j, c.n, bits);
            c.bits = whole ? nullptr : bits;
            for (int n = 0; n < c.n; ++n) c.key[n] = p.key_order ? p.key_order[j + n] : (int32_t)(j + n);
            f(c);
        }
    }
}

}  // namespace
