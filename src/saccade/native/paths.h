// What of a token survives to another inside a chunk: exponentials of sums of logarithms, never a quotient or a power above one.
#pragma once

#include "forward.h"

namespace {

constexpr int64_t MOST = 512;  // numbers of a feature
constexpr int EDGE = 16;       // tokens of a block inside which channels decay pair by pair

// e^x for x of at most 0, exactly 1 at 0, 0 far below.
INLINE vf survives(vf x) {
    const float round = 12582912.0f;
    x = larger(splat(-88.0f), x);
    const vf t = x * LOG2E + round, whole = t - round, r = (x - whole * 0x1.62e4p-1f) - whole * 0x1.7f7d1cp-20f;
    vf p = r * (1.0f / 5040) + (1.0f / 720);
    p = p * r + (1.0f / 120);
    p = p * r + (1.0f / 24);
    p = p * r + (1.0f / 6);
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (vf)(((vu)t << 23) + (127u << 23));
}

// log(1 + e^x).
INLINE vf softplus(vf x) {
    const vf u = survives(choose(x > vf{}, -x, x)), s = u / (u + 2.0f), t = s * s;
    vf p = t * (1.0f / 13) + (1.0f / 11);
    p = p * t + (1.0f / 9);
    p = p * t + (1.0f / 7);
    p = p * t + (1.0f / 5);
    p = p * t + (1.0f / 3);
    p = p * t + 1.0f;
    return choose(x > vf{}, x, vf{}) + s * p * 2.0f;
}

// The decays of a chunk. Those of a token or a head are single numbers, those by channel rows of `wide`.
struct Paths {
    const saccade_linear &call;
    const int64_t wide;
    int ready = 0;     // tokens of a head's decays that are measured once for all chunks
    float *reach;      // from the start of the chunk through a token
    float *left;       // from after a token to the end of the chunk
    float *keep;       // of the whole chunk
    float *d;          // by token: from column to row, (LANES, LANES), 0 for later columns
    float *a, *inner;  // by channel: of a token, and from the start of its block
    float *far[3];     // by channel: from after a token to the edge where a later block begins
    float *turned[3];  // keys that are decayed so far, transposed

    Paths(const saccade_linear &c, Cutter &cut, bool one) : call(c), wide(padded(c.dim)) {
        const int64_t rows = c.channels && !one ? LANES * wide : 0;
        reach = cut.take(c.channels ? rows : LANES);
        left = cut.take(rows);
        keep = cut.take(wide);
        d = cut.take(c.channels || one ? 0 : LANES * LANES);
        a = cut.take(rows);
        inner = cut.take(rows);
        for (int i = 0; i < 3; ++i) {
            far[i] = cut.take(rows);
            turned[i] = cut.take(rows);
        }
    }

    void measure(int64_t batch, int64_t owner, int64_t first, int n) {
        if (call.channels)
            by_channel(batch, owner, first, n);
        else
            by_token(batch, owner, first, n);
    }

    void by_token(int64_t batch, int64_t owner, int64_t first, int n) {
        const bool fixed = !call.log.data || !call.log.row;
        const int count = fixed ? LANES : n;
        if (!ready) {
            float path[LANES], sums[LANES] = {}, sum = 0;  // path: sums from after each earlier token
            for (int j = 0; j < LANES; ++j) path[j] = NONE;
            for (int i = 0; i < count; ++i) {
                const float x = call.log.data ? *at<float>(call.log, batch, owner, first + (fixed ? 0 : i)) : 0;
                sums[i] = sum += x;
                for (int j = 0; j < LANES; j += VL) store(path + j, load(path + j) + x);
                path[i] = 0;
                for (int j = 0; j < LANES; j += VL) store(d + i * LANES + j, survives(load(path + j)));
            }
            for (int i = 0; i < LANES; i += VL) store(reach + i, survives(load(sums + i)));
            if (fixed) ready = LANES;
        }
        left = d + (n - 1) * LANES;
        keep[0] = reach[n - 1];
    }

    void by_channel(int64_t batch, int64_t owner, int64_t first, int n) {
        for (int64_t c = 0; c < wide; c += VL) {
            vf block[4] = {splat(1.0f), splat(1.0f), splat(1.0f), splat(1.0f)}, before = splat(1.0f), total = vf{};
            for (int start = 0, b = 0; start < n; start += EDGE, ++b) {
                const int stop = n < start + EDGE ? n : start + EDGE;
                vf sum = vf{}, product = splat(1.0f);
                for (int i = start; i < stop; ++i) {
                    const vf x = log_of(batch, owner, first + i, c), one = survives(x);
                    sum += x;
                    product *= one;
                    store(a + i * wide + c, one);
                    store(inner + i * wide + c, product);
                    store(reach + i * wide + c, product * before);
                }
                total += sum;
                block[b] = survives(sum);
                before = survives(total);
            }
            store(keep + c, before);
            for (int start = 0, b = 0; start < n; start += EDGE, ++b) {
                const int stop = n < start + EDGE ? n : start + EDGE;
                vf product = splat(1.0f);
                for (int i = stop - 1; i >= start; --i) {
                    vf x = product;
                    for (int edge = b; edge < 3; ++edge) {
                        if (EDGE * (edge + 1) < n) store(far[edge] + i * wide + c, x);
                        x *= block[edge + 1];
                    }
                    store(left + i * wide + c, x);
                    product *= load(a + i * wide + c);
                }
            }
        }
    }

    vf log_of(int64_t batch, int64_t owner, int64_t row, int64_t c) const {
        const float *from = at<float>(call.log, batch, owner, row) + c;
        float some[VL] = {};
        for (int64_t i = 0; c + VL > call.dim && c + i < call.dim; ++i) some[i] = from[i];
        const vf x = load(c + VL > call.dim ? some : from);
        return call.decay_rule == 1 ? softplus(-x) * (-1 / call.temperature) : x;
    }

    // Keys as they arrive at the edge of each later block; `held` has room for the rows of a block.
    void decay_keys(const float *fk, int n, float *held) {
        const void *line[EDGE];
        for (int edge = 0; edge < 3 && EDGE * (edge + 1) < n; ++edge)
            for (int start = 0; start < EDGE * (edge + 1); start += EDGE) {
                for (int i = 0; i < EDGE; ++i) {
                    for (int64_t c = 0; c < wide; c += VL)
                        store(held + i * wide + c, load(fk + (start + i) * wide + c) * load(far[edge] + (start + i) * wide + c));
                    line[i] = held + i * wide;
                }
                turn(line, EDGE, wide, turned[edge] + start);
            }
    }
};

}  // namespace
