// A state that tokens write and read, in chunks of LANES tokens: dense inside a chunk, the state in float32 between chunks.
#pragma once

#include "paths.h"

namespace {

// The sum of the lanes.
INLINE float across(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float sum = 0;
    for (int i = 0; i < VL; ++i) sum += x[i];
    return sum;
#endif
}

// elu(x) + 1, and its derivative as a function of it.
INLINE vf elu1(vf x) { return choose(x > vf{}, x + 1.0f, exp2(choose(x > vf{}, vf{}, x) * LOG2E)); }
INLINE vf elu1_slope(vf phi) { return choose(phi > splat(1.0f), splat(1.0f), phi); }

// One state and the heads that read it.
template <class Mode>
struct Linear {
    typedef typename Mode::T T;
    const saccade_linear &call;
    const int64_t dim, wide, value_dim, value_wide, stride;  // wide: padded; stride: of a reader's row, [phi(q) | weights]
    int64_t batch = 0, owner = 0, first = 0, work = 0;
    int n = 0;  // tokens of the chunk
    Paths paths;
    float *fk, *fk_turned, *u, *s, *z, *reader, *out, *strength, *shift;
    const float *lines[MOST + LANES];
    float *to[MOST];

    // `one`: room for a token alone.
    Linear(const saccade_linear &c, Cutter &cut, bool one)
        : call(c), dim(c.dim), wide(padded(c.dim)), value_dim(c.value_dim), value_wide(padded(c.value_dim)), stride(wide + LANES), paths(c, cut, one) {
        const int64_t most = one ? 1 : LANES;
        fk = cut.take(most * wide);
        fk_turned = cut.take(one ? 0 : LANES * wide);
        u = cut.take(most * value_wide);
        s = cut.take(wide * value_wide);
        z = cut.take(wide);
        reader = cut.take(most * stride);
        out = cut.take(most * value_wide);
        strength = cut.take(most);
        shift = cut.take((one ? 1 : EDGE) * wide);
    }

    int64_t rows() const { return call.lengths ? call.lengths[batch] : call.rows; }

    const float **every(const float *from, int64_t step, int64_t count, int64_t at = 0) {
        for (int64_t i = 0; i < count; ++i) lines[at + i] = from + i * step;
        return lines;
    }

    // to[i] (+)= sum over j < count of a[i][j STEP] lines[j], `width` numbers each; a and to lie a_step and to_step apart.
    template <bool ADD, int STEP>
    void multiply(int m, int64_t width, int count, const float *a, int64_t a_step, float *into, int64_t to_step, const float *const *b) {
        const float *from[MOST];
        for (int i = 0; i < m; ++i) {
            from[i] = a + i * a_step;
            to[i] = into + i * to_step;
        }
        product<false, ADD, STEP>(m, (int)(width / VL), count, from, b, to);
        work += m * width * count;
    }

    // The chunk's rows of an input; mapped by the feature where asked.
    void fetch(const saccade_array &x, int64_t head, int64_t width, bool feature, float *into, int64_t step) {
        for (int r = 0; r < n; ++r) {
            float *line = into + r * step;
            row_to_float(at<T>(x, batch, head, first + r), line, width);
            if (feature && call.elu) map(line, width);
        }
    }

    void map(float *line, int64_t width) const {
        for (int64_t d = 0; d < width; d += VL) store(line + d, elu1(load(line + d)));
        for (int64_t d = width; d < padded(width); ++d) line[d] = 0;
    }

    void transpose_rows(const float *from, int64_t step, int64_t width, float *into) const {
        const void *line[LANES] = {};
        for (int r = 0; r < n; ++r) line[r] = from + r * step;
        turn(line, (int)padded(n), width, into);
    }

    void scale_row(float *row, int64_t width, float by) const {
        for (int64_t d = 0; d < width; d += VL) store(row + d, load(row + d) * by);
    }

    void begin(bool copy = true) {
        const int64_t line = batch * call.kv_heads + owner;
        if (copy) memset(s, 0, (size_t)wide * value_wide * 4);
        memset(z, 0, (size_t)wide * 4);
        if (copy && call.s)
            for (int64_t d = 0; d < dim; ++d) memcpy(s + d * value_wide, call.s + (line * dim + d) * value_dim, (size_t)value_dim * 4);
        if (call.z) memcpy(z, call.z + line * dim, (size_t)dim * 4);
        paths.ready = 0;
    }

    void end(bool copy = true) {
        const int64_t line = batch * call.kv_heads + owner;
        if (copy && call.s_after)
            for (int64_t d = 0; d < dim; ++d) memcpy(call.s_after + (line * dim + d) * value_dim, s + d * value_wide, (size_t)value_dim * 4);
        if (call.z_after) memcpy(call.z_after + line * dim, z, (size_t)dim * 4);
    }

    // The chunk of tokens start .. : features of keys, what they would write, and how they decay.
    void open(int64_t start) {
        first = start;
        n = (int)(rows() - start < LANES ? rows() - start : LANES);
        fetch(call.k, owner, dim, true, fk, wide);
        fetch(call.v, owner, value_dim, false, u, value_wide);
        for (int r = 0; call.gain.data && r < n; ++r) {
            strength[r] = *at<float>(call.gain, batch, owner, first + r);
            if (!call.overwrites) scale_row(fk + r * wide, wide, strength[r]);
        }
        transpose_rows(fk, wide, wide, fk_turned);
        paths.measure(batch, owner, first, n);
        if (call.channels) paths.decay_keys(fk, n, shift);
    }

    // Weights of rows (features `step` apart) on the tokens of the chunk, zero on later ones; `strict`: and on their own.
    void square(const float *rows, int64_t step, float *a, int64_t a_step, bool strict) {
        if (call.channels)
            square_by_channel(rows, step, a, a_step);
        else
            square_by_token(rows, step, a, a_step);
        for (int i = 0; strict && i < n; ++i) a[i * a_step + i] = 0;
    }

    void square_by_token(const float *rows, int64_t step, float *a, int64_t a_step) {
        for (int i = 0; i < n; i += MR) {
            const int m = n - i < MR ? n - i : MR;
            const int64_t columns = padded(i + m);
            multiply<false, 1>(m, columns, (int)wide, rows + i * step, step, a + i * a_step, a_step, every(fk_turned, LANES, wide));
            for (int r = i; r < i + m; ++r)
                for (int64_t j = 0; j < columns; j += VL) {
                    const vf d = load(paths.d + r * LANES + j);
                    float *x = a + r * a_step + j;
                    store(x, choose(d > vf{}, load(x) * d, vf{}));
                }
        }
    }

    // Pairs of a block of EDGE tokens meet one by one, those with earlier blocks where the block begins.
    void square_by_channel(const float *rows, int64_t step, float *a, int64_t a_step) {
        for (int start = 0; start < n; start += EDGE) {
            const int stop = n < start + EDGE ? n : start + EDGE;
            for (int i = start; i < stop; ++i) memset(a + i * a_step + start, 0, (size_t)(LANES - start) * 4);
            if (start) {
                for (int i = start; i < stop; ++i)
                    for (int64_t d = 0; d < wide; d += VL)
                        store(shift + (i - start) * wide + d, load(rows + i * step + d) * load(paths.inner + i * wide + d));
                multiply<false, 1>(stop - start, start, (int)wide, shift, wide, a + start * a_step, a_step,
                                   every(paths.turned[start / EDGE - 1], LANES, wide));
            }
            for (int j = start; j < stop; ++j) {
                vf sum[EDGE] = {};
                for (int64_t d = 0; d < wide; d += VL) {
                    vf key = load(fk + j * wide + d);
                    sum[j - start] += load(rows + j * step + d) * key;
                    for (int i = j + 1; i < stop; ++i) {
                        key *= load(paths.a + i * wide + d);
                        sum[i - start] += load(rows + i * step + d) * key;
                    }
                }
                for (int i = j; i < stop; ++i) a[i * a_step + j] = across(sum[i - start]);
            }
        }
    }

    // Features of rows as they meet the state before the chunk.
    void enter(const float *rows, int64_t step, float *into, int64_t into_step) const {
        for (int i = 0; i < n; ++i)
            for (int64_t d = 0; d < wide; d += VL) {
                const vf by = call.channels ? load(paths.reach + i * wide + d) : splat(paths.reach[i]);
                store(into + i * into_step + d, load(rows + i * step + d) * by);
            }
    }

    // What overwrites: u_i = strength_i (v_i - what the state answers before token i), and the difference alone in `residual`.
    void solve(float *residual) {
        for (int i = 0; i < n; ++i) memcpy(reader + i * stride, fk + i * wide, (size_t)wide * 4);
        square(fk, wide, reader + wide, stride, true);
        enter(fk, wide, reader, stride);
        for (int start = 0; start < n; start += EDGE) {
            const int stop = n < start + EDGE ? n : start + EDGE;
            every(s, value_wide, wide);
            multiply<false, 1>(stop - start, value_wide, (int)wide + start, reader + start * stride, stride, out + start * value_wide,
                               value_wide, every(u, value_wide, start, wide));
            for (int i = start; i < stop; ++i)
                for (int64_t e = 0; e < value_wide; e += VL) {
                    vf left = load(u + i * value_wide + e) - load(out + i * value_wide + e);
                    for (int j = start; j < i; ++j) left -= load(u + j * value_wide + e) * reader[i * stride + wide + j];
                    if (residual) store(residual + i * value_wide + e, left);
                    store(u + i * value_wide + e, left * strength[i]);
                }
        }
    }

    void read(int64_t head) {
        fetch(call.q, head, dim, true, reader, stride);
        square(reader, stride, reader + wide, stride, false);
        enter(reader, stride, reader, stride);
        every(s, value_wide, wide);
        every(u, value_wide, n, wide);
        for (int i = 0; i < n; i += MR) {
            const int m = n - i < MR ? n - i : MR;
            multiply<false, 1>(m, value_wide, (int)wide + i + m, reader + i * stride, stride, out + i * value_wide, value_wide, lines);
        }
        for (int i = 0; i < n; ++i) finish(head, i, out + i * value_wide, divisor(head, i, reader + i * stride, padded(i + 1)));
    }

    // What row i is divided by: its features on z and its weights on the tokens of the chunk, summed and kept.
    float divisor(int64_t head, int i, const float *row, int64_t weights) const {
        if (!call.total) return 1;
        vf sum = vf{};
        for (int64_t d = 0; d < wide; d += VL) sum += load(row + d) * load(z + d);
        for (int64_t j = 0; j < weights; j += VL) sum += load(row + wide + j);
        const float total = across(sum);
        call.total[(batch * call.heads + head) * call.rows + first + i] = total;
        return total > call.least ? total : call.least;
    }

    void finish(int64_t head, int i, const float *row, float by) const {
        row_from_float(row, 1 / by, at_mutable<T>(call.out, batch, head, first + i), value_dim);
    }

    // The state after the chunk.
    void close() {
        if (call.channels) {
            for (int j = 0; j < n; ++j)
                for (int64_t d = 0; d < wide; d += VL)
                    store(reader + j * wide + d, load(fk + j * wide + d) * load(paths.left + j * wide + d));
            transpose_rows(reader, wide, wide, fk_turned);
        }
        for (int64_t d = 0; d < wide; ++d) {
            const float keep = call.channels ? paths.keep[d] : paths.keep[0];
            scale_row(s + d * value_wide, value_wide, keep);
            vf sum = vf{};
            for (int64_t j = 0; j < padded(n); j += VL) {
                vf x = load(fk_turned + d * LANES + j);
                if (!call.channels) store(fk_turned + d * LANES + j, x *= load(paths.left + j));
                sum += x;
            }
            if (call.total) z[d] = z[d] * keep + across(sum);
        }
        multiply<true, 1>((int)wide, value_wide, n, fk_turned, LANES, s, value_wide, every(u, value_wide, n));
    }

    // Query heads [from, to) of one state; those of the first share also leave the state after the last token.
    int64_t run(int64_t from, int64_t last) {
        begin();
        const int64_t group = call.heads / call.kv_heads;
        for (int64_t start = 0; start < rows(); start += LANES) {
            open(start);
            if (call.overwrites) solve(nullptr);
            for (int64_t h = from; h < last; ++h) read(owner * group + h);
            close();
        }
        for (int64_t h = owner * group + from; h < owner * group + last; ++h)
            for (int64_t r = rows(); r < call.rows; ++r) {
                memset(at_mutable<T>(call.out, batch, h, r), 0, (size_t)value_dim * sizeof(T));
                if (call.total) call.total[(batch * call.heads + h) * call.rows + r] = 0;
            }
        if (!from) end();
        return work;
    }
};

}  // namespace
