// Backward: logits and weights again from q, k and lse, then five products a chunk of keys; sums of keys and values in float32.
#pragma once

#include "forward.h"

namespace {

// Buffers of a backward pass over one tile of rows.
template <class Mode>
struct Backward {
    typedef typename Mode::T T;
    const saccade_call &call;
    int64_t dim, value_dim, wide, value_wide;  // wide: padded
    float scale;
    float *q_turned, *g_turned, *q_rows, *g_rows;  // queries and output gradients, transposed and by row
    float *s, *dp, *pairs, *keys, *values, *own, *level, *delta, *terms, *dterms;
    uint16_t *p_half, *ds_half;
    const float *q_line[LANES], *g_line[LANES];
    float *dq[LANES];  // of the rows of the tile

    Backward(const saccade_call &c, Cutter &cut)
        : call(c), dim(c.dim), value_dim(c.value_dim), wide(padded(c.dim)), value_wide(padded(c.value_dim)), scale(c.scale * LOG2E) {
        q_turned = cut.take(wide * LANES);
        g_turned = cut.take(value_wide * LANES);
        q_rows = cut.take(LANES * wide);
        g_rows = cut.take(LANES * value_wide);
        s = cut.take(KEYS * LANES);
        dp = cut.take(KEYS * LANES);
        pairs = cut.take(Mode::pairs ? KEYS / 2 * LANES : 0);
        p_half = (uint16_t *)cut.take(Mode::pairs ? KEYS / 2 * LANES : 0);
        ds_half = (uint16_t *)cut.take(Mode::pairs ? KEYS / 2 * LANES : 0);
        keys = cut.take(KEYS * wide);
        values = cut.take(Mode::half && !Mode::pairs ? KEYS * value_wide : 0);
        own = cut.take(LANES * wide);
        level = cut.take(LANES);
        delta = cut.take(LANES);
        terms = cut.take(c.term_dim * LANES);
        dterms = cut.take(c.term_dim * LANES);
    }

    // Rows of one input of the tile: transposed for products over its dimension, and as lines for products over rows.
    void load(const saccade_array &x, const Item &item, const Tile &t, int64_t n, float *turned, float *copies, const float **lines) {
        const int64_t width = padded(n);
        const void *rows[LANES] = {};
        for (int r = 0; r < t.rows; ++r) {
            const T *from = at<T>(x, item.batch, t.head[r], t.row[r]);
            rows[r] = from;
            if constexpr (!Mode::pairs) {
                lines[r] = (const float *)(const void *)from;
                if (Mode::half || n % VL) {
                    row_to_float(from, copies + r * width, n);
                    rows[r] = lines[r] = copies + r * width;
                }
            } else if (r % 2 == 0) {
                const T *next = r + 1 < t.rows ? at<T>(x, item.batch, t.head[r + 1], t.row[r + 1]) : nullptr;
                interleave(from, next, copies + r / 2 * width, n);
                lines[r / 2] = copies + r / 2 * width;
            }
        }
        turn(rows, t.lanes, Mode::pairs ? n / 2 : n, turned);
    }

    void load_rows(const Item &item, const Tile &t) {
        load(call.q, item, t, dim, q_turned, q_rows, q_line);
        load(call.grad, item, t, value_dim, g_turned, g_rows, g_line);
        if (call.slots) load_terms(call, item, t, terms);
        for (int r = 0; r < t.lanes; ++r) {
            const bool there = r < t.rows;
            const int64_t at = there ? (item.batch * call.heads + t.head[r]) * call.rows + t.row[r] : 0;
            level[r] = there && call.lse[at] != NONE ? call.lse[at] * LOG2E : -NONE;
            delta[r] = there ? call.delta[at] : 0;
        }
    }

    void reset(const Tile &t) {
        for (int r = 0; r < t.rows; ++r) dq[r] = own + r * wide;
        memset(own, 0, (size_t)t.rows * wide * 4);
        memset(dterms, 0, (size_t)call.term_dim * LANES * 4);
    }

    // Logits in s and weight gradients in dp to weights and logit gradients, in the forms that the products take.
    void weigh(const Chunk &c, int lanes) {
        for (int v = 0; v < lanes; v += VL) {
            const vf base = ::load(level + v), less = ::load(delta + v);
            vf before = vf{};
            for (int n = 0; n < c.n; ++n) {
                const int at = n * LANES + v;
                vf x = ::load(s + at) * scale - base;
                if (c.bits) x = by_bits(c.bits[n] >> v, x, splat(NONE));
                const vf p = exp2(x), ds = p * (::load(dp + at) - less);
                for (int64_t a = 0; a < call.slots; ++a) {
                    float *to = dterms + call.slot[c.key[n] * call.slots + a] * LANES + v;
                    store(to, ::load(to) + ds);
                }
                if constexpr (Mode::pairs) {
                    store_half(p_half + at, narrow_bits(p));
                    store_half(ds_half + at, narrow_bits(ds));
                    if (n % 2)
                        store_bits(pairs + n / 2 * LANES + v, pair_bits(before, ds));
                    else if (n + 1 == c.n)
                        store_bits(pairs + n / 2 * LANES + v, pair_bits(ds, vf{}));
                    before = ds;
                } else {
                    store(s + at, p);
                    store(dp + at, ds);
                }
            }
        }
    }

    void absorb(const Item &item, const Tile &t, const Chunk &c) {
        const int64_t owner = t.head[0] * call.kv_heads / call.heads;
        const float *a[KEYS], *b[256], *k_line[KEYS];
        float *to[KEYS];
        const auto turned = [&](float *from, int64_t n) {
            for (int64_t d = 0; d < n; ++d) b[d] = from + d * LANES;
            return (int)n;
        };
        for (int n = 0; n < c.n; ++n) {
            const T *k = at<T>(call.k, item.batch, owner, c.key[n]);
            a[n] = k_line[n] = (const float *)(const void *)k;
            to[n] = s + n * LANES;
            if constexpr (Mode::pairs) {
                if (n % 2 == 0) {
                    const T *next = n + 1 < c.n ? at<T>(call.k, item.batch, owner, c.key[n + 1]) : nullptr;
                    interleave(k, next, keys + n / 2 * wide, dim);
                }
            } else if (Mode::half || dim % VL) {
                row_to_float(k, keys + n * wide, dim);
                a[n] = k_line[n] = keys + n * wide;
            }
        }
        product<Mode::pairs, false, 1>(c.n, t.lanes / VL, turned(q_turned, Mode::pairs ? dim / 2 : dim), a, b, to);
        if (call.slots) add_terms(call, c, t.lanes, terms, s);
        for (int n = 0; n < c.n; ++n) {
            const T *v = at<T>(call.v, item.batch, owner, c.key[n]);
            a[n] = (const float *)(const void *)v;
            to[n] = dp + n * LANES;
            if constexpr (Mode::half && !Mode::pairs) {
                row_to_float(v, values + n * value_wide, value_dim);
                a[n] = values + n * value_wide;
            }
        }
        product<Mode::pairs, false, 1>(c.n, t.lanes / VL, turned(g_turned, Mode::pairs ? value_dim / 2 : value_dim), a, b, to);
        weigh(c, t.lanes);
        const int rows = Mode::pairs ? (t.rows + 1) / 2 : t.rows;
        for (int n = 0; n < c.n; ++n) {
            a[n] = Mode::pairs ? (const float *)(const void *)(p_half + n * LANES) : s + n * LANES;
            to[n] = item.dv + (int64_t)c.key[n] * value_wide;
        }
        product<Mode::pairs, true, 1>(c.n, (int)(value_wide / VL), rows, a, g_line, to);
        for (int n = 0; n < c.n; ++n) {
            a[n] = Mode::pairs ? (const float *)(const void *)(ds_half + n * LANES) : dp + n * LANES;
            to[n] = item.dk + (int64_t)c.key[n] * wide;
        }
        product<Mode::pairs, true, 1>(c.n, (int)(wide / VL), rows, a, q_line, to);
        const float *each[LANES];
        for (int r = 0; r < t.rows; ++r) each[r] = (Mode::pairs ? pairs : dp) + r;
        const int count = Mode::pairs ? (c.n + 1) / 2 : c.n;
        if (Mode::pairs)
            for (int n = 0; n < count; ++n) k_line[n] = keys + n * wide;
        product<Mode::pairs, true, LANES>(t.rows, (int)(wide / VL), count, each, k_line, dq);
    }

    void finish(const Item &item, int64_t head, int64_t row, const float *from) {
        row_from_float(from, call.scale, at_mutable<T>(call.dq, item.batch, head, row), dim);
    }

    void finish_terms(const Item &item, const Tile &t) {
        for (int r = 0; call.slots && r < t.rows; ++r) {
            float *to = at_mutable<float>(call.dterms, item.batch, t.head[r], t.row[r]);
            for (int64_t n = 0; n < call.term_dim; ++n) to[n] = dterms[n * LANES + r] * call.scale;
        }
    }
};

// Tiles first, first + step, ... of the heads of a key-value head; what they add to its keys and values goes to the item's sums.
template <class Mode>
int64_t backward_tiles(const saccade_call &call, const Item &item, float *scratch) {
    Cutter cut{scratch};
    Backward<Mode> f(call, cut);
    const saccade_part &part = call.part[0];
    const int64_t fold = saccade::fold(call), group = call.heads / call.kv_heads / fold, most = fold * part.slots;
    int64_t computed = 0;
    for (int64_t i = item.first; i < item.last; i += item.step)
        for (int64_t h = 0; h < group; ++h) {
            Tile t;
            const int64_t first = part.tiles ? part.tile[6 * i] : i * LANES;
            set_rows(t, part, first, part.tiles ? part.tile[6 * i + 1] : most - first < LANES ? most - first : LANES, item.head + h, fold);
            f.load_rows(item, t);
            f.reset(t);
            each_chunk(part, item, t, i, [&](const Chunk &c) {
                computed += (int64_t)t.lanes * c.n;
                f.absorb(item, t, c);
            });
            for (int r = 0; r < t.rows; ++r) f.finish(item, t.head[r], t.row[r], f.dq[r]);
            f.finish_terms(item, t);
        }
    return computed;
}

// Heads first, first + step, ... below last, where gradients of queries gather over parts and chosen blocks.
template <class Mode>
struct RowsBack {
    Backward<Mode> f;
    Route route;
    float *dq;

    RowsBack(const saccade_call &c, Cutter &cut) : f(c, cut), route(c, cut, c.rows) { dq = cut.take(c.rows * f.wide); }

    int64_t run(const Item &given) {
        const saccade_call &call = f.call;
        int64_t computed = 0;
        for (int64_t h = given.first; h < given.last; h += given.step) {
            Item item = given;
            item.head = given.head + h;
            item.first = 0;
            item.last = call.rows;
            memset(dq, 0, (size_t)call.rows * f.wide * 4);
            each_tile(call, item, route, [&](const Tile &t, auto each) {
                for (int r = 0; r < t.rows; ++r) f.dq[r] = dq + t.row[r] * f.wide;
                f.load_rows(item, t);
                each([&](const Chunk &c) {
                    computed += (int64_t)t.lanes * c.n;
                    f.absorb(item, t, c);
                });
            });
            for (int64_t r = 0; r < call.rows; ++r) f.finish(item, item.head, r, dq + r * f.wide);
        }
        return computed;
    }
};

// rowsum(out grad) minus the gradient of lse, for the rows of one head.
template <class Mode>
void find_delta(const saccade_call &call, int64_t batch, int64_t head, float *scratch) {
    typedef typename Mode::T T;
    const int64_t n = call.value_dim, wide = padded(n);
    float *a = scratch, *b = scratch + wide;
    for (int64_t r = 0; r < call.rows; ++r) {
        const int64_t line = (batch * call.heads + head) * call.rows + r;
        row_to_float(at<T>(call.out, batch, head, r), a, n);
        row_to_float(at<T>(call.grad, batch, head, r), b, n);
        vf sum = vf{};
        for (int64_t e = 0; e < wide; e += VL) sum += load(a + e) * load(b + e);
        float total = call.dlse ? -call.dlse[line] : 0;
        for (int i = 0; i < VL; ++i) total += sum[i];
        call.delta[line] = total;
    }
}

// The sums of some shares (rows, padded dim), scaled and in their place; shares may be the place itself.
template <class Mode>
void store_sums(const saccade_array &to, const float *const *shares, int64_t count, int64_t batch, int64_t head, int64_t rows,
                int64_t dim, float scale) {
    typedef typename Mode::T T;
    const int64_t wide = padded(dim);
    float line[256];
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t d = 0; d < wide; d += VL) {
            vf sum = load(shares[0] + r * wide + d);
            for (int64_t n = 1; n < count; ++n) sum += load(shares[n] + r * wide + d);
            store(line + d, sum);
        }
        row_from_float(line, scale, at_mutable<T>(to, batch, head, r), dim);
    }
}

}  // namespace
