// Backward through a state: states again from the start, chunk by chunk, then the chunks from the last to the first.
#pragma once

#include "linear.h"

namespace {

template <class Mode>
struct LinearBack : Linear<Mode> {
    typedef Linear<Mode> Base;
    typedef typename Mode::T T;
    using Base::batch, Base::call, Base::dim, Base::first, Base::fk, Base::fk_turned, Base::n, Base::out, Base::owner, Base::paths;
    using Base::s, Base::shift, Base::strength, Base::u, Base::value_dim, Base::value_wide, Base::wide, Base::work, Base::z;

    const int64_t state, width;                      // numbers of a state and its sum of features; those of a token's decay
    float *states, *residual, *u_turned, *s_turned;  // states before each chunk; differences of all tokens
    float *ds, *ds_turned, *dz;                      // of the state after the chunk, later of the one before
    float *du, *dq, *dk, *direct;                    // of keys: by decayed weights of the chunk, and by all else
    float *dc, *before, *written;                    // of decays: what later, earlier and no tokens of the chunk bring
    float *fq, *enters, *turned, *g, *dt, *a, *da;

    LinearBack(const saccade_linear &c, Cutter &cut)
        : Base(c, cut, false), state(this->wide * (this->value_wide + 1)), width(c.channels ? this->wide : 1) {
        states = cut.take((c.rows + LANES - 1) / LANES * state);
        residual = cut.take(c.overwrites ? c.rows * value_wide : 0);
        u_turned = cut.take(LANES * value_wide);
        s_turned = cut.take(padded_to_lanes(wide) * value_wide);
        ds = cut.take(wide * value_wide);
        ds_turned = cut.take(padded_to_lanes(wide) * value_wide);
        dz = cut.take(wide);
        du = cut.take(LANES * value_wide);
        dk = cut.take(LANES * wide);
        direct = cut.take(LANES * wide);
        dq = cut.take(LANES * wide);
        dc = cut.take((LANES + 1) * width);
        written = cut.take(LANES * width);
        before = cut.take(width);
        fq = cut.take(LANES * wide);
        enters = cut.take(LANES * wide);
        turned = cut.take(LANES * wide);
        g = cut.take(LANES * value_wide);
        dt = cut.take(LANES);
        a = cut.take(LANES * LANES);
        da = cut.take(LANES * LANES);
    }

    static int64_t padded_to_lanes(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

    // A state (wide, value_wide) as (value_wide, wide rounded up to whole strips of LANES).
    const float **turn_state(const float *from, float *into) {
        for (int64_t at = 0; at < wide; at += LANES) {
            const void *line[LANES] = {};
            const int64_t count = wide - at < LANES ? wide - at : LANES;
            for (int64_t d = 0; d < count; ++d) line[d] = from + (at + d) * value_wide;
            turn(line, (int)count, value_wide, into + at * value_wide);
        }
        return nullptr;
    }

    // into (n, wide) = rows (n, value_wide) times a turned state.
    void through(const float *rows, const float *state_turned, float *into) {
        for (int64_t at = 0; at < wide; at += LANES)
            this->template multiply<false, 1>(n, wide - at < LANES ? wide - at : LANES, (int)value_wide, rows, value_wide, into + at, wide,
                                              this->every(state_turned + at * value_wide, LANES, value_wide));
    }

    // into[j] += sum over rows i of weights[i][j] lines[i], where j is at most i.
    void gather(const float *weights, const float *rows, int64_t width_, float *into) {
        for (int j = 0; j < n; j += MR)
            this->template multiply<true, LANES>(n - j < MR ? n - j : MR, width_, n - j, weights + j * LANES + j, 1, into + j * width_, width_,
                                                 this->every(rows + j * width_, width_, n - j));
    }

    // Gradients of weights in da to those of the features of rows and of keys, added to `rows` and `keys`.
    void square_back(const float *f, float *rows, float *keys) {
        if (!call.channels) {
            for (int i = 0; i < n; ++i)
                for (int64_t j = 0; j < padded(i + 1); j += VL) store(da + i * LANES + j, load(da + i * LANES + j) * load(paths.d + i * LANES + j));
            for (int i = 0; i < n; i += MR) {
                const int m = n - i < MR ? n - i : MR;
                this->template multiply<true, 1>(m, wide, i + m, da + i * LANES, LANES, rows + i * wide, wide, this->every(fk, wide, i + m));
            }
            gather(da, f, wide, keys);
            return;
        }
        for (int start = 0; start < n; start += EDGE) {
            const int stop = n < start + EDGE ? n : start + EDGE, count = stop - start;
            if (start) {
                const float *far = paths.far[start / EDGE - 1];
                multiply_rows(fk, far, start, enters);
                this->template multiply<false, 1>(count, wide, start, da + start * LANES, LANES, shift, wide, this->every(enters, wide, start));
                for (int i = 0; i < count; ++i) add_product(rows + (start + i) * wide, shift + i * wide, paths.inner + (start + i) * wide);
                multiply_rows(f + start * wide, paths.inner + start * wide, count, shift);
                this->template multiply<false, LANES>(start, wide, count, da + start * LANES, 1, enters, wide, this->every(shift, wide, count));
                for (int j = 0; j < start; ++j) add_product(keys + j * wide, enters + j * wide, far + j * wide);
            }
            for (int64_t d = 0; d < wide; d += VL)
                for (int j = start; j < stop; ++j) {
                    const vf key = load(fk + j * wide + d);
                    vf path = splat(1.0f), sum = vf{};
                    for (int i = j; i < stop; ++i) {
                        if (i > j) path *= load(paths.a + i * wide + d);
                        const vf reach = path * da[i * LANES + j];
                        sum += load(f + i * wide + d) * reach;
                        store(rows + i * wide + d, load(rows + i * wide + d) + key * reach);
                    }
                    store(keys + j * wide + d, load(keys + j * wide + d) + sum);
                }
        }
    }

    void multiply_rows(const float *x, const float *y, int count, float *into) const {
        for (int64_t i = 0; i < count * wide; i += VL) store(into + i, load(x + i) * load(y + i));
    }

    void add_product(float *into, const float *x, const float *y) const {
        for (int64_t d = 0; d < wide; d += VL) store(into + d, load(into + d) + load(x + d) * load(y + d));
    }

    // Rows (features f, gradients g of what they read, dt of their sums) back to `rows`, the keys, and the state before the chunk.
    void reader_back(const float *f, float *rows, bool sums, bool strict) {
        const float **lines = nullptr;
        for (int i = 0; i < n; i += MR) {
            const int m = n - i < MR ? n - i : MR;
            lines = this->every(u_turned, LANES, value_wide);
            this->template multiply<false, 1>(m, padded(i + m), (int)value_wide, g + i * value_wide, value_wide, da + i * LANES, LANES, lines);
        }
        float own[LANES];  // of a token's weight on itself, which does not decay
        for (int i = 0; i < n; ++i) {
            float *line = da + i * LANES;
            for (int j = 0; sums && j <= i; ++j) line[j] += dt[i];
            own[i] = strict ? 0 : line[i];
            for (int j = i; j < LANES; ++j) line[j] = 0;
        }
        through(g, s_turned, rows);
        for (int i = 0; i < n; ++i)
            for (int64_t d = 0; d < wide; d += VL) {
                const vf by = call.channels ? load(paths.reach + i * wide + d) : splat(paths.reach[i]);
                float *to = rows + i * wide + d;
                store(to, (sums ? load(to) + load(z + d) * dt[i] : load(to)) * by);
            }
        square_back(f, rows, dk);
        for (int i = 0; i < n; ++i) {
            add_paths(i, f + i * wide, rows + i * wide, 1);
            for (int64_t d = 0; !strict && d < wide; d += VL) {
                store(rows + i * wide + d, load(rows + i * wide + d) + load(fk + i * wide + d) * own[i]);
                store(direct + i * wide + d, load(direct + i * wide + d) + load(f + i * wide + d) * own[i]);
            }
        }
        this->enter(f, wide, enters, wide);
        this->transpose_rows(enters, wide, wide, turned);
        this->template multiply<true, 1>((int)wide, value_wide, n, turned, LANES, ds, value_wide, this->every(g, value_wide, n));
        for (int i = 0; sums && i < n; ++i)
            for (int64_t d = 0; d < wide; d += VL) store(dz + d, load(dz + d) + load(enters + i * wide + d) * dt[i]);
    }

    // dc[i] += sign x y, for each channel or summed over them.
    void add_paths(int i, const float *x, const float *y, float sign) {
        vf sum = vf{};
        for (int64_t d = 0; d < wide; d += VL) {
            const vf each = load(x + d) * load(y + d);
            sum += each;
            if (call.channels) store(dc + i * wide + d, load(dc + i * wide + d) + each * sign);
        }
        if (!call.channels) dc[i] += sign * across(sum);
    }

    // What reaches the chunk from the state after it.
    void state_back() {
        turn_state(ds, ds_turned);
        through(u, ds_turned, direct);
        memset(dk, 0, (size_t)n * wide * 4);
        memset(dc, 0, (size_t)(n + 1) * width * 4);
        for (int j = 0; j < n; ++j) {
            vf sum = vf{};
            for (int64_t d = 0; d < wide; d += VL) {
                const vf by = call.channels ? load(paths.left + j * wide + d) : splat(paths.left[j]);
                const vf x = (load(direct + j * wide + d) + load(dz + d)) * by, key = load(fk + j * wide + d);
                store(direct + j * wide + d, x);
                store(enters + j * wide + d, key * by);
                sum += key * x;
                if (call.channels) store(written + j * wide + d, key * x);
            }
            if (!call.channels) written[j] = across(sum);
        }
        this->template multiply<false, 1>(n, value_wide, (int)wide, enters, wide, du, value_wide, this->every(ds, value_wide, wide));
        memset(before, 0, (size_t)width * 4);
        for (int64_t d = 0; d < wide; ++d) {
            const float keep = paths.keep[call.channels ? d : 0];
            vf sum = vf{};
            for (int64_t e = 0; e < value_wide; e += VL) sum += load(s + d * value_wide + e) * load(ds + d * value_wide + e);
            before[call.channels ? d : 0] += (across(sum) + z[d] * dz[d]) * keep;
            this->scale_row(ds + d * value_wide, value_wide, keep);
            dz[d] *= keep;
        }
    }

    void head_back(int64_t head) {
        this->fetch(call.q, head, dim, true, fq, wide);
        this->fetch(call.grad, head, value_dim, false, g, value_wide);
        for (int i = 0; call.total && i < n; ++i) {
            const int64_t line = (batch * call.heads + head) * call.rows + first + i;
            const float total = call.total[line], by = 1 / (total > call.least ? total : call.least);
            row_to_float(at<T>(call.out, batch, head, first + i), out, value_dim);
            vf sum = vf{};
            for (int64_t e = 0; e < value_wide; e += VL) sum += load(g + i * value_wide + e) * load(out + e);
            dt[i] = (total > call.least ? -across(sum) * by : 0) + (call.dtotal ? call.dtotal[line] : 0);
            this->scale_row(g + i * value_wide, value_wide, by);
        }
        this->square(fq, wide, a, LANES, false);
        gather(a, g, value_wide, du);
        reader_back(fq, dq, call.total, false);
        for (int i = 0; i < n; ++i) {
            float *line = dq + i * wide;
            for (int64_t d = 0; call.elu && d < wide; d += VL) store(line + d, load(line + d) * elu1_slope(load(fq + i * wide + d)));
            row_from_float(line, 1, at_mutable<T>(call.dq, batch, head, first + i), dim);
        }
    }

    // Back through what was written in place of old values: the transposed system, then keys as readers of the state.
    void solve_back() {
        this->square(fk, wide, a, LANES, true);
        for (int start = (n - 1) / EDGE * EDGE; start >= 0; start -= EDGE) {
            const int stop = n < start + EDGE ? n : start + EDGE;
            this->template multiply<true, LANES>(stop - start, value_wide, n - stop, a + stop * LANES + start, 1, du + start * value_wide,
                                                 value_wide, this->every(g + stop * value_wide, value_wide, n - stop));
            for (int j = stop - 1; j >= start; --j)
                for (int64_t e = 0; e < value_wide; e += VL) {
                    vf sum = load(du + j * value_wide + e);
                    for (int i = j + 1; i < stop; ++i) sum += load(g + i * value_wide + e) * a[i * LANES + j];
                    store(du + j * value_wide + e, sum);
                    store(g + j * value_wide + e, sum * -strength[j]);
                }
        }
        reader_back(fk, dq, false, true);
        for (int64_t i = 0; i < n * wide; i += VL) store(direct + i, load(direct + i) + load(dq + i));
    }

    // Gradients of the chunk's keys, values, gains and decays, in their places.
    void leave() {
        for (int j = 0; j < n; ++j) {
            float *line = dk + j * wide, gained = 0;
            add_paths(j, fk + j * wide, line, -1);
            for (int64_t d = 0; d < wide; d += VL) store(line + d, load(line + d) + load(direct + j * wide + d));
            if (call.overwrites) {
                vf sum = vf{};
                for (int64_t e = 0; e < value_wide; e += VL)
                    sum += load(residual + (first + j) * value_wide + e) * load(du + j * value_wide + e);
                gained = across(sum);
            }
            if (call.elu || (call.gain.data && !call.overwrites)) {
                const int held = n;
                n = 1, first += j;
                this->fetch(call.k, owner, dim, true, shift, wide);
                n = held, first -= j;
                const bool added = call.gain.data && !call.overwrites;
                vf sum = vf{};
                for (int64_t d = 0; d < wide; d += VL) {
                    const vf phi = load(shift + d), x = load(line + d);
                    sum += phi * x;
                    store(line + d, x * (added ? strength[j] : 1) * (call.elu ? elu1_slope(phi) : splat(1)));
                }
                if (added) gained = across(sum);
            }
            if (call.dgain.data) *at_mutable<float>(call.dgain, batch, owner, first + j) = gained;
            row_from_float(line, 1, at_mutable<T>(call.dk, batch, owner, first + j), dim);
            row_from_float(du + j * value_wide, call.overwrites ? strength[j] : 1, at_mutable<T>(call.dv, batch, owner, first + j), value_dim);
        }
        if (call.dlog.data) decays_back();
    }

    // The logarithm of a token's decay stands in all paths from earlier tokens to it and later ones.
    void decays_back() {
        for (int j = n - 1; j >= 0; --j)
            for (int64_t d = 0; d < width; ++d) dc[j * width + d] += dc[(j + 1) * width + d];
        for (int j = 0; j < n; ++j) {
            float *to = at_mutable<float>(call.dlog, batch, owner, first + j);
            for (int64_t d = 0; d < (call.channels ? dim : 1); ++d) {
                to[d] = dc[j * width + d] + before[d];
                before[d] += written[j * width + d];
            }
        }
    }

    void keep_state(int64_t chunk) {
        memcpy(states + chunk * state, s, (size_t)wide * value_wide * 4);
        memcpy(states + chunk * state + wide * value_wide, z, (size_t)wide * 4);
    }

    void begin_back() {
        const int64_t line = batch * call.kv_heads + owner;
        memset(ds, 0, (size_t)wide * value_wide * 4);
        memset(dz, 0, (size_t)wide * 4);
        for (int64_t d = 0; call.ds_after && d < dim; ++d)
            memcpy(ds + d * value_wide, call.ds_after + (line * dim + d) * value_dim, (size_t)value_dim * 4);
        if (call.dz_after) memcpy(dz, call.dz_after + line * dim, (size_t)dim * 4);
    }

    void end_back() {
        const int64_t line = batch * call.kv_heads + owner;
        for (int64_t d = 0; call.ds && d < dim; ++d)
            memcpy(call.ds + (line * dim + d) * value_dim, ds + d * value_wide, (size_t)value_dim * 4);
        if (call.dz) memcpy(call.dz + line * dim, dz, (size_t)dim * 4);
    }

    int64_t run(int64_t, int64_t) {
        const int64_t group = call.heads / call.kv_heads, chunks = (this->rows() + LANES - 1) / LANES;
        this->begin();
        for (int64_t c = 0; c < chunks; ++c) {
            keep_state(c);
            this->open(c * LANES);
            if (call.overwrites) this->solve(residual + first * value_wide);
            this->close();
        }
        begin_back();
        for (int64_t c = chunks - 1; c >= 0; --c) {
            this->open(c * LANES);
            memcpy(s, states + c * state, (size_t)wide * value_wide * 4);
            memcpy(z, states + c * state + wide * value_wide, (size_t)wide * 4);
            for (int64_t i = 0; call.overwrites && i < n; ++i)
                for (int64_t e = 0; e < value_wide; e += VL)
                    store(u + i * value_wide + e, load(residual + (first + i) * value_wide + e) * strength[i]);
            this->transpose_rows(u, value_wide, value_wide, u_turned);
            turn_state(s, s_turned);
            state_back();
            for (int64_t h = 0; h < group; ++h) head_back(owner * group + h);
            if (call.overwrites) solve_back();
            leave();
        }
        end_back();
        clear_padding(group);
        return work;
    }

    // Zeros where padding is.
    void clear_padding(int64_t group) {
        for (int64_t r = this->rows(); r < call.rows; ++r) {
            for (int64_t h = owner * group; h < (owner + 1) * group; ++h)
                memset(at_mutable<T>(call.dq, batch, h, r), 0, (size_t)dim * sizeof(T));
            memset(at_mutable<T>(call.dk, batch, owner, r), 0, (size_t)dim * sizeof(T));
            memset(at_mutable<T>(call.dv, batch, owner, r), 0, (size_t)value_dim * sizeof(T));
            if (call.dgain.data) *at_mutable<float>(call.dgain, batch, owner, r) = 0;
            if (call.dlog.data) memset(at_mutable<float>(call.dlog, batch, owner, r), 0, (size_t)(call.channels ? dim : 1) * 4);
        }
    }
};

}  // namespace
