// Forward: S^T = K Q^T with queries in lanes, an online softmax down the lanes, O += P V.
#pragma once

#include "product.h"
#include "route.h"

namespace {

constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.69314718055994531f;
constexpr float SLACK = 8.0f;  // a level is kept until logits pass it by so many powers of two
constexpr float NONE = -__builtin_inff();

// Buffers of a forward pass over one tile of rows.
template <class Mode>
struct Forward {
    typedef typename Mode::T T;
    const saccade_call &call;
    int64_t dim, value_dim, wide;  // wide: the value dimension, padded
    float scale;
    float *q_turned, *s, *pairs, *keys, *values, *own, *lines;
    float *level, *sum, *shrink, *terms;
    float *o[LANES];  // output rows of the tile, not divided yet

    Forward(const saccade_call &c, Cutter &cut)
        : call(c), dim(c.dim), value_dim(c.value_dim), wide(padded(c.value_dim)), scale(c.scale * LOG2E) {
        q_turned = cut.take(padded(dim) * LANES);
        s = cut.take(KEYS * LANES);
        pairs = cut.take(Mode::pairs ? KEYS / 2 * LANES : 0);
        keys = cut.take(copies(dim) ? KEYS * padded(dim) : 0);
        values = cut.take(Mode::pairs ? KEYS / 2 * wide : copies(value_dim) ? KEYS * wide : 0);
        lines = cut.take(Mode::half && !Mode::pairs ? LANES * padded(dim) : 0);
        own = cut.take(LANES * wide);
        level = cut.take(LANES);
        sum = cut.take(LANES);
        shrink = cut.take(LANES);
        terms = cut.take(c.term_dim * LANES);
    }

    // Whether rows must be copied before a product can read whole vectors of them.
    static bool copies(int64_t n) { return Mode::half ? !Mode::pairs : n % VL != 0; }

    void load_queries(const Item &item, const Tile &t) {
        const void *rows[LANES] = {};
        for (int r = 0; r < t.rows; ++r) {
            const T *from = at<T>(call.q, item.batch, t.head[r], t.row[r]);
            rows[r] = from;
            if constexpr (Mode::half && !Mode::pairs) {
                row_to_float(from, lines + r * padded(dim), dim);
                rows[r] = lines + r * padded(dim);
            }
        }
        turn(rows, t.lanes, Mode::pairs ? dim / 2 : dim, q_turned);
        if (call.slots) load_terms(call, item, t, terms);
    }

    void clear() {
        for (int r = 0; r < LANES; ++r) {
            level[r] = NONE;
            sum[r] = 0;
        }
    }

    void reset(const Tile &t) {
        clear();
        for (int r = 0; r < t.rows; ++r) o[r] = own + r * wide;
        memset(own, 0, (size_t)t.rows * wide * 4);
    }

    // The softmax of one chunk of logits in s, against the running level of each row; true where outputs must shrink.
    bool soften(const Chunk &c, int lanes) {
        bool moved = false;
        for (int v = 0; v < lanes; v += VL) {
            float *column = s + v;
            vf top = splat(NONE);
            if (c.bits) {
                for (int n = 0; n < c.n; ++n) {
                    const vf x = by_bits(c.bits[n] >> v, load(column + n * LANES), splat(NONE));
                    store(column + n * LANES, x);
                    top = larger(x, top);
                }
            } else {
                vf other = top;
                int n = 0;
                for (; n + 1 < c.n; n += 2) {
                    top = larger(load(column + n * LANES), top);
                    other = larger(load(column + (n + 1) * LANES), other);
                }
                if (n < c.n) top = larger(load(column + n * LANES), top);
                top = larger(other, top);
            }
            top *= scale;
            const vf before = load(level + v);
            const vi up = top > before + SLACK;
            const vf after = choose(up, top, before);
            const vf base = choose(after == splat(NONE), vf{}, after);
            const vf less = exp2(choose(up, before - base, vf{}));
            moved |= any(up & (before != splat(NONE)));
            store(level + v, after);
            store(shrink + v, less);
            vf total = vf{};
            if constexpr (Mode::pairs) {
                int n = 0;
                for (; n + 1 < c.n; n += 2) {
                    const vf a = exp2(load(column + n * LANES) * scale - base);
                    const vf b = exp2(load(column + (n + 1) * LANES) * scale - base);
                    total += a + b;
                    store_bits(pairs + n / 2 * LANES + v, pair_bits(a, b));
                }
                if (n < c.n) {
                    const vf a = exp2(load(column + n * LANES) * scale - base);
                    total += a;
                    store_bits(pairs + n / 2 * LANES + v, narrow_bits(a));
                }
            } else {
                for (int n = 0; n < c.n; ++n) {
                    const vf p = exp2(load(column + n * LANES) * scale - base);
                    total += p;
                    store(column + n * LANES, p);
                }
            }
            store(sum + v, load(sum + v) * less + total);
        }
        return moved;
    }

    // Take in a chunk of keys of one key-value head.
    void absorb(const Item &item, const Tile &t, const Chunk &c) {
        const int64_t owner = t.head[0] * call.kv_heads / call.heads;
        const float *a[KEYS], *b[256], *v[KEYS];
        float *to[KEYS];
        for (int n = 0; n < c.n; ++n) {
            const T *k = at<T>(call.k, item.batch, owner, c.key[n]);
            a[n] = (const float *)(const void *)k;
            to[n] = s + n * LANES;
            if (copies(dim)) {
                row_to_float(k, keys + n * padded(dim), dim);
                a[n] = keys + n * padded(dim);
            }
        }
        const int steps = (int)(Mode::pairs ? dim / 2 : dim);
        for (int d = 0; d < steps; ++d) b[d] = q_turned + d * LANES;
        product<Mode::pairs, false, 1>(c.n, t.lanes / VL, steps, a, b, to);
        if (call.slots) add_terms(call, c, t.lanes, terms, s);
        if (soften(c, t.lanes))
            for (int r = 0; r < t.rows; ++r)
                if (shrink[r] != 1.0f)
                    for (int64_t e = 0; e < wide; e += VL) store(o[r] + e, load(o[r] + e) * shrink[r]);
        const float *weights = Mode::pairs ? pairs : s, *p[LANES];
        for (int r = 0; r < t.rows; ++r) p[r] = weights + r;
        const int count = Mode::pairs ? (c.n + 1) / 2 : c.n;
        for (int n = 0; n < count; ++n) {
            if constexpr (Mode::pairs) {
                const T *x = at<T>(call.v, item.batch, owner, c.key[2 * n]);
                const T *y = 2 * n + 1 < c.n ? at<T>(call.v, item.batch, owner, c.key[2 * n + 1]) : nullptr;
                interleave(x, y, values + n * wide, value_dim);
                v[n] = values + n * wide;
            } else {
                const T *x = at<T>(call.v, item.batch, owner, c.key[n]);
                v[n] = (const float *)(const void *)x;
                if (copies(value_dim)) {
                    row_to_float(x, values + n * wide, value_dim);
                    v[n] = values + n * wide;
                }
            }
        }
        product<Mode::pairs, true, LANES>(t.rows, (int)(wide / VL), count, p, v, o);
    }

    // One finished row: divided and in its place.
    void finish(const Item &item, int64_t head, int64_t row, const float *from, float top, float total) {
        T *to = at_mutable<T>(call.out, item.batch, head, row);
        row_from_float(from, total == 0 ? 0.0f : 1.0f / total, to, value_dim);
        if (call.lse)
            call.lse[(item.batch * call.heads + head) * call.rows + row] =
                total == 0 ? NONE : top * LN2 + __builtin_logf(total);
    }
};

// One tile of rows against all its keys, or a share of them; the state ends with the tile.
template <class Mode>
int64_t forward_tile(const saccade_call &call, const Item &item, float *scratch) {
    Cutter cut{scratch};
    Forward<Mode> f(call, cut);
    const saccade_part &part = call.part[0];
    const int64_t fold = saccade::fold(call);
    int64_t computed = 0;
    for (int64_t i = item.first; i < item.last; ++i) {
        Tile t;
        const int64_t most = fold * part.slots;
        const int64_t first = part.tiles ? part.tile[6 * i] : i * LANES;
        set_rows(t, part, first, part.tiles ? part.tile[6 * i + 1] : most - first < LANES ? most - first : LANES, item.head, fold);
        f.load_queries(item, t);
        f.reset(t);
        each_chunk(part, item, t, i, [&](const Chunk &c) {
            computed += (int64_t)t.lanes * c.n;
            f.absorb(item, t, c);
        });
        if (item.partial) {
            memcpy(item.partial, f.level, LANES * 4);
            memcpy(item.partial + LANES, f.sum, LANES * 4);
            memcpy(item.partial + 2 * LANES, f.own, (size_t)t.rows * f.wide * 4);
            continue;
        }
        for (int r = 0; r < t.rows; ++r) f.finish(item, t.head[r], t.row[r], f.o[r], f.level[r], f.sum[r]);
    }
    return computed;
}

// The sum of what a tile left in its shares of the keys.
template <class Mode>
void merge_shares(const saccade_call &call, const Item &item, const float *shares, int64_t count, int64_t size, float *scratch) {
    Cutter cut{scratch};
    Forward<Mode> f(call, cut);
    const int64_t fold = saccade::fold(call), first = item.first * LANES, most = fold * call.part[0].slots;
    Tile t;
    set_rows(t, call.part[0], first, most - first < LANES ? most - first : LANES, item.head, fold);
    for (int r = 0; r < t.rows; ++r) {
        float top = NONE, total = 0;
        for (int64_t n = 0; n < count; ++n)
            if (shares[n * size + r] > top) top = shares[n * size + r];
        memset(f.own, 0, f.wide * 4);
        for (int64_t n = 0; n < count; ++n) {
            const float *share = shares + n * size, *from = share + 2 * LANES + r * f.wide;
            if (share[LANES + r] == 0) continue;
            const vf weight = exp2(splat(share[r] - (top == NONE ? 0 : top)));
            total += share[LANES + r] * weight[0];
            for (int64_t e = 0; e < f.wide; e += VL) store(f.own + e, load(f.own + e) + load(from + e) * weight);
        }
        f.finish(item, t.head[r], t.row[r], f.own, top, total);
    }
}

// Rows [first, last) of a head, whose state outlives the tiles: several parts, and chosen blocks.
template <class Mode>
struct Rows {
    Forward<Mode> f;
    Route route;
    float *out, *level, *sum;

    Rows(const saccade_call &c, Cutter &cut, int64_t most) : f(c, cut), route(c, cut, most) {
        out = cut.take(most * f.wide);
        level = cut.take(most);
        sum = cut.take(most);
    }

    template <class Each>
    int64_t meet(const Item &item, const Tile &t, Each each) {
        int64_t computed = 0;
        f.clear();
        for (int r = 0; r < t.rows; ++r) {
            const int64_t row = t.row[r] - item.first;
            f.o[r] = out + row * f.wide;
            f.level[r] = level[row];
            f.sum[r] = sum[row];
        }
        f.load_queries(item, t);
        each([&](const Chunk &c) {
            computed += (int64_t)t.lanes * c.n;
            f.absorb(item, t, c);
        });
        for (int r = 0; r < t.rows; ++r) {
            const int64_t row = t.row[r] - item.first;
            level[row] = f.level[r];
            sum[row] = f.sum[r];
        }
        return computed;
    }

    int64_t run(const Item &item) {
        const saccade_call &call = f.call;
        const int64_t rows = item.last - item.first;
        int64_t computed = 0;
        memset(out, 0, (size_t)rows * f.wide * 4);
        for (int64_t r = 0; r < rows; ++r) {
            level[r] = NONE;
            sum[r] = 0;
        }
        each_tile(call, item, route, [&](const Tile &t, auto each) { computed += meet(item, t, each); });
        for (int64_t r = 0; r < rows; ++r)
            f.finish(item, item.head, item.first + r, out + r * f.wide, level[r], sum[r]);
        return computed;
    }
};

template <class Mode>
int64_t forward_rows(const saccade_call &call, const Item &item, float *scratch) {
    Cutter cut{scratch};
    Rows<Mode> rows(call, cut, item.last - item.first);
    return rows.run(item);
}

}  // namespace
