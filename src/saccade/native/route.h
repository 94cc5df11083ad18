// Which rows chose a block: a counting sort of the choices of some rows of one head, and the masks of rows against a block.
#pragma once

#include "tile.h"

namespace {

struct Route {
    const saccade_call &call;
    int64_t blocks;
    int32_t *start, *last, *rows;  // rows[start[b]] ... rows[start[b + 1] - 1] chose block b

    static int64_t block_count(const saccade_call &c) { return c.block ? (c.keys + c.block - 1) / c.block : 0; }

    // For at most `most` rows.
    Route(const saccade_call &c, Cutter &cut, int64_t most) : call(c), blocks(block_count(c)) {
        start = (int32_t *)cut.take(c.index ? blocks + 2 : 0);
        last = (int32_t *)cut.take(c.index ? blocks + 1 : 0);
        rows = (int32_t *)cut.take(c.index ? most * c.choices : 0);
    }

    // Calls f(row, block) for all choices of rows [first, end), those made twice once.
    template <class F>
    void each(int64_t batch, int64_t head, int64_t first, int64_t end, F f) {
        const int64_t groups = (call.rows + call.choice_rows - 1) / call.choice_rows;
        for (int64_t b = 0; b < blocks; ++b) last[b] = -1;
        for (int64_t row = first; row < end; ++row) {
            const int64_t line = ((batch * call.heads + head) * groups + row / call.choice_rows) * call.choices;
            for (int64_t n = line; n < line + call.choices; ++n) {
                const int64_t b = call.index[n];
                if (!call.valid[n] || b < 0 || b >= blocks || last[b] == row) continue;
                last[b] = (int32_t)row;
                f(row, b);
            }
        }
    }

    void sort(int64_t batch, int64_t head, int64_t first, int64_t end) {
        for (int64_t b = 0; b < blocks + 2; ++b) start[b] = 0;
        each(batch, head, first, end, [&](int64_t, int64_t b) { ++start[b + 2]; });
        for (int64_t b = 2; b < blocks + 2; ++b) start[b] += start[b - 1];
        each(batch, head, first, end, [&](int64_t row, int64_t b) { rows[start[b + 1]++] = (int32_t)row; });
    }
};

// Calls f(chunk) for the keys of a block that the limit leaves to the rows of a tile and part 0 does not hold already.
template <class F>
void each_block_chunk(const saccade_call &call, int64_t batch, const Tile &t, int64_t block, F f) {
    Chunk c;
    uint64_t bits[KEYS], taken[KEYS];
    Reach limit, held;
    const int64_t line = (call.limit_per_batch ? batch : 0) * call.rows;
    reach(limit, t, call.limit_lo + line, call.limit_hi + line);
    int64_t j = block * call.block, end = j + call.block;
    if (j < limit.first) j = limit.first;
    if (end > limit.last) end = limit.last;
    for (; j < end; j += c.n) {
        c.n = (int)(end - j < KEYS ? end - j : KEYS);
        c.bits = nullptr;
        for (int n = 0; n < c.n; ++n) c.key[n] = (int32_t)(j + n);
        if (j < limit.inner_first || j + c.n > limit.inner_last) {
            interval_bits(limit.lo, limit.hi, t.lanes, (int32_t)j, c.n, bits);
            c.bits = bits;
        }
        for (int64_t i = 0; call.parts && i < call.part[0].intervals; ++i) {
            const saccade_part &p = call.part[0];
            const int64_t at = ((p.per_batch ? batch : 0) * p.intervals + i) * p.slots;
            reach(held, t, p.lo + at, p.hi + at);
            if (held.first >= j + c.n || held.last <= j) continue;
            if (!c.bits)
                for (int n = 0; n < c.n; ++n) bits[n] = ~(uint64_t)0;
            interval_bits(held.lo, held.hi, t.lanes, (int32_t)j, c.n, taken);
            for (int n = 0; n < c.n; ++n) bits[n] &= ~taken[n];
            c.bits = bits;
        }
        f(c);
    }
}

// Calls f(tile, each) for all tiles of rows [first, last) of a head: those of the parts, then those of chosen blocks;
// each(g) calls g(chunk) for the keys of the tile.
template <class F>
void each_tile(const saccade_call &call, const Item &item, Route &route, F f) {
    Tile t;
    for (int64_t i = 0; i < call.parts; ++i) {
        const saccade_part &p = call.part[i];
        const bool all = p.tiles || p.row_order;
        const int64_t end = p.tiles ? p.tiles : all ? p.slots : item.last;
        for (int64_t n = all ? 0 : item.first; n < end; n += p.tiles ? 1 : LANES) {
            const int64_t first = p.tiles ? p.tile[6 * n] : n;
            set_rows(t, p, first, p.tiles ? p.tile[6 * n + 1] : end - n < LANES ? end - n : LANES, item.head, 1);
            f(t, [&](auto g) { each_chunk(p, item, t, n, g); });
        }
    }
    if (!call.index) return;
    route.sort(item.batch, item.head, item.first, item.last);
    const saccade_part chosen = {route.rows, nullptr, 0, nullptr, nullptr, 0, 0, nullptr, 0, nullptr};
    for (int64_t b = 0; b < route.blocks; ++b)
        for (int64_t n = route.start[b]; n < route.start[b + 1]; n += LANES) {
            const int64_t left = route.start[b + 1] - n;
            set_rows(t, chosen, n, left < LANES ? left : LANES, item.head, 1);
            for (int r = 0; r < t.rows; ++r) t.slot[r] = t.row[r];
            f(t, [&](auto g) { each_block_chunk(call, item.batch, t, b, g); });
        }
}

}  // namespace
