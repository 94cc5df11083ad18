// The blocks of keys that each query scores highest, by the products of queries and one vector a block: nothing of rows x blocks is kept.
#pragma once

#include "forward.h"

namespace {

// The best so far of the rows of a tile: values and numbers of blocks, (choices, LANES) each, best first; ties go to the lower number.
INLINE void insert(float *best, int32_t *number, int64_t choices, int v, vf score, int32_t block) {
    float *last = best + (choices - 1) * LANES + v;
    if (!any(score > load(last))) return;
    vi which = block - (vi){};
    for (int64_t n = 0; n < choices; ++n) {
        const int64_t at = n * LANES + v;
        const vf held = load(best + at);
        const vi held_number = (vi)load_bits(number + at), up = score > held;
        store(best + at, choose(up, score, held));
        store_bits(number + at, (vu)((up & which) | (~up & held_number)));
        score = choose(up, held, score);
        which = (up & held_number) | (~up & which);
    }
}

// Rows [first, last) of a head.
template <class Mode>
void choose_rows(const saccade_call &call, const saccade_choice &choice, const Item &item, float *scratch) {
    Cutter cut{scratch};
    Forward<Mode> f(call, cut);
    float *best = cut.take(choice.choices * LANES);
    int32_t *number = (int32_t *)cut.take(choice.choices * LANES), bound[LANES];
    const int64_t owner = item.head * call.kv_heads / call.heads;
    const float *vectors = choice.vectors + (item.batch * call.kv_heads + owner) * choice.blocks * call.dim;
    const float *a[KEYS], *b[256];
    float *to[KEYS];
    for (int64_t d = 0; d < call.dim; ++d) b[d] = f.q_turned + d * LANES;
    for (int64_t first = item.first; first < item.last; first += LANES) {
        Tile t;
        const saccade_part rows = {nullptr, nullptr, call.rows, nullptr, nullptr, 0, 0, nullptr, 0, nullptr};
        set_rows(t, rows, first, item.last - first < LANES ? item.last - first : LANES, item.head, 1);
        f.load_queries(item, t);
        int32_t end = 0;
        for (int r = 0; r < LANES; ++r) {
            const int64_t line = (choice.per_batch ? item.batch : 0) * call.rows;
            bound[r] = r < t.rows ? choice.bound[line + t.row[r]] : 0;
            if (bound[r] > end) end = bound[r];
            for (int64_t n = 0; n < choice.choices; ++n) {
                best[n * LANES + r] = NONE;
                number[n * LANES + r] = 0;
            }
        }
        for (int32_t j = 0; j < end; j += KEYS) {
            const int n = end - j < KEYS ? end - j : KEYS;
            for (int i = 0; i < n; ++i) {
                a[i] = vectors + (j + i) * call.dim;
                to[i] = f.s + i * LANES;
            }
            product<false, false, 1>(n, t.lanes / VL, (int)call.dim, a, b, to);
            for (int v = 0; v < t.lanes; v += VL)
                for (int i = 0; i < n; ++i) {
                    const vi open = (vi)load_bits(bound + v) > j + i;
                    insert(best, number, choice.choices, v, ::choose(open, load(f.s + i * LANES + v), splat(NONE)), j + i);
                }
        }
        for (int r = 0; r < t.rows; ++r) {
            const int64_t line = ((item.batch * call.heads + item.head) * call.rows + t.row[r]) * choice.choices;
            for (int64_t n = 0; n < choice.choices; ++n) {
                choice.index[line + n] = number[n * LANES + r];
                choice.valid[line + n] = best[n * LANES + r] > NONE;
            }
        }
    }
}

}  // namespace
