// A pass over states against the recurrence, token by token in double, and its adjoint.
#pragma once

#include "numbers.h"

namespace {

// Kinds: 0 nothing decays, 1 by token with a ratio, 2 by token with gains, 3 by channel with a ratio, 4 overwrites, 5 by channel and overwrites.
void run_linear(bool bf16, int isa, int threads, int64_t g, int64_t n, int64_t d, int64_t e, int kind) {
    const int64_t b = 2, h = 2 * g;
    const bool channels = kind == 3 || kind == 5, ratio = kind == 1 || kind == 3, overwrites = kind >= 4, decays = kind && kind != 4;
    const bool gains = kind == 2 || overwrites;
    const int64_t width = channels ? d : 1;
    Numbers q(b, h, n, d, bf16), k(b, g, n, d, bf16), v(b, g, n, e, bf16), out(b, h, n, e, bf16), grad(b, h, n, e, bf16);
    Numbers dq(b, h, n, d, bf16), dk(b, g, n, d, bf16), dv(b, g, n, e, bf16), log(b, g, n, width, false), gain(b, g, n, 1, false);
    Numbers dlog(b, g, n, width, false), dgain(b, g, n, 1, false);
    if (!bf16)
        for (float &x : k.single) x /= std::sqrt(static_cast<float>(d));
    else
        for (size_t i = 0; i < k.half.size(); ++i) k.half[i] = narrowed(widened(k.half[i]) / std::sqrt(static_cast<float>(d)));
    for (float &x : log.single) x = -0.3f * x * x;
    for (float &x : gain.single) x = 1 / (1 + x * x);
    if (ratio)
        for (Numbers *x : {&q, &k}) {
            for (float &y : x->single) y = std::fabs(y) + 0.1f;
            for (size_t i = 0; i < x->half.size(); ++i) x->half[i] = narrowed(x->single[i]);
        }
    std::vector<float> s = normal(b * g * d * e), z(b * g * d, 1.0f), s_after(s.size()), z_after(z.size());
    std::vector<float> ds_after = normal(s.size()), dz_after(z.size(), 0.0f), ds(s.size()), dz(z.size()), total(b * h * n);
    saccade_linear c{};
    c.bf16 = bf16;
    c.batch = b, c.heads = h, c.kv_heads = g, c.rows = n, c.dim = d, c.value_dim = e;
    c.q = q.array(), c.k = k.array(), c.v = v.array(), c.out = out.array(), c.grad = grad.array();
    c.dq = dq.array(), c.dk = dk.array(), c.dv = dv.array();
    if (decays) c.log = log.array(), c.dlog = dlog.array();
    if (gains) c.gain = gain.array(), c.dgain = dgain.array();
    c.s = s.data(), c.z = z.data(), c.s_after = s_after.data(), c.z_after = z_after.data();
    c.ds_after = ds_after.data(), c.dz_after = dz_after.data(), c.ds = ds.data(), c.dz = dz.data();
    c.total = ratio ? total.data() : nullptr;
    c.least = 1e-30f;
    c.channels = channels, c.overwrites = overwrites, c.isa = isa, c.threads = threads;
    if (saccade_linear_forward(&c) || saccade_linear_backward(&c)) std::exit(2);
    const double rough = bf16 ? 6e-2 : 5e-4;
    for (int64_t i = 0; i < b; ++i)
        for (int64_t o = 0; o < g; ++o) {
            std::vector<std::vector<double>> states(n + 1), sums(n + 1), written(n), fresh(n);
            states[0].assign(s.begin() + (i * g + o) * d * e, s.begin() + (i * g + o + 1) * d * e);
            sums[0].assign(d, 1.0);
            const auto keep = [&](int64_t t, int64_t x) { return decays ? std::exp(double(log.at(i, o, t, channels ? x : 0))) : 1.0; };
            const auto strong = [&](int64_t t) { return gains ? double(gain.at(i, o, t, 0)) : 1.0; };
            for (int64_t t = 0; t < n; ++t) {
                std::vector<double> held = states[t], sum = sums[t], w(e);
                for (int64_t x = 0; x < d; ++x) {
                    for (int64_t y = 0; y < e; ++y) held[x * e + y] *= keep(t, x);
                    sum[x] = sum[x] * keep(t, x) + strong(t) * k.at(i, o, t, x);
                }
                fresh[t].resize(e);
                for (int64_t y = 0; y < e; ++y) {
                    fresh[t][y] = v.at(i, o, t, y);
                    for (int64_t x = 0; overwrites && x < d; ++x) fresh[t][y] -= k.at(i, o, t, x) * held[x * e + y];
                    w[y] = strong(t) * fresh[t][y];
                    for (int64_t x = 0; x < d; ++x) held[x * e + y] += k.at(i, o, t, x) * w[y];
                }
                written[t] = w;
                states[t + 1] = held;
                sums[t + 1] = sum;
            }
            for (int64_t x = 0; x < d * e; ++x) expect("state", s_after[(i * g + o) * d * e + x], states[n][x], rough);
            std::vector<double> back(ds_after.begin() + (i * g + o) * d * e, ds_after.begin() + (i * g + o + 1) * d * e), sum_back(d, 0.0);
            for (int64_t t = n - 1; t >= 0; --t) {
                for (int64_t m = 2 * o; m < 2 * o + 2; ++m) {
                    double below = 1, less = 0;
                    if (ratio) {
                        below = 0;
                        for (int64_t x = 0; x < d; ++x) below += q.at(i, m, t, x) * sums[t + 1][x];
                    }
                    for (int64_t y = 0; y < e; ++y) {
                        double found = 0;
                        for (int64_t x = 0; x < d; ++x) found += q.at(i, m, t, x) * states[t + 1][x * e + y];
                        expect("out", out.at(i, m, t, y), found / below, rough);
                        if (ratio) less -= grad.at(i, m, t, y) * found / below / below;
                    }
                    for (int64_t x = 0; x < d; ++x) {
                        double step = less * sums[t + 1][x];
                        for (int64_t y = 0; y < e; ++y) {
                            step += states[t + 1][x * e + y] * grad.at(i, m, t, y) / below;
                            back[x * e + y] += q.at(i, m, t, x) * grad.at(i, m, t, y) / below;
                        }
                        sum_back[x] += q.at(i, m, t, x) * less;
                        expect("gradient of q", dq.at(i, m, t, x), step, 4 * rough);
                    }
                }
                std::vector<double> dw(e, 0.0), dkey(d, 0.0);
                double dstrong = 0, all = 0;
                for (int64_t x = 0; x < d; ++x)
                    for (int64_t y = 0; y < e; ++y) {
                        dkey[x] += back[x * e + y] * written[t][y];
                        dw[y] += back[x * e + y] * k.at(i, o, t, x);
                    }
                for (int64_t y = 0; y < e; ++y) {
                    dstrong += fresh[t][y] * dw[y];
                    expect("gradient of v", dv.at(i, o, t, y), strong(t) * dw[y], 4 * rough);
                }
                for (int64_t x = 0; x < d; ++x) {
                    if (ratio) dkey[x] += strong(t) * sum_back[x];
                    for (int64_t y = 0; overwrites && y < e; ++y) {
                        dkey[x] -= keep(t, x) * states[t][x * e + y] * strong(t) * dw[y];
                        back[x * e + y] -= k.at(i, o, t, x) * strong(t) * dw[y];
                    }
                    double dpath = ratio ? sum_back[x] * sums[t][x] : 0;
                    for (int64_t y = 0; y < e; ++y) {
                        dpath += back[x * e + y] * states[t][x * e + y];
                        back[x * e + y] *= keep(t, x);
                    }
                    dpath *= keep(t, x);
                    all += dpath;
                    sum_back[x] *= keep(t, x);
                    expect("gradient of k", dk.at(i, o, t, x), dkey[x], 4 * rough);
                    if (channels) expect("gradient of a decay", dlog.at(i, o, t, x), dpath, 4 * rough);
                }
                if (decays && !channels) expect("gradient of a decay", dlog.at(i, o, t, 0), all, 16 * rough);
                if (gains) expect("gradient of a gain", dgain.at(i, o, t, 0), dstrong, 8 * rough);
            }
            for (int64_t x = 0; x < d * e; ++x) expect("gradient of the state", ds[(i * g + o) * d * e + x], back[x], 4 * rough);
        }
}

}  // namespace
