// Drives the engine for sanitizers: tails of every size, strides, few and many threads, both passes, chosen blocks; checks
// each output against a double loop. Prints how many calls it made; any difference or report of a sanitizer is a failure.
#include "linear.h"

namespace {

void run(bool bf16, int isa, int threads, int64_t b, int64_t h, int64_t g, int64_t rows, int64_t keys, int64_t d, int64_t e, int window,
         int choices) {
    Numbers q(b, h, rows, d, bf16), k(b, g, keys, d, bf16), v(b, g, keys, e, bf16), out(b, h, rows, e, bf16), grad(b, h, rows, e, bf16);
    Numbers dq(b, h, rows, d, bf16), dk(b, g, keys, d, bf16), dv(b, g, keys, e, bf16);
    std::vector<float> lse(b * h * rows), delta(b * h * rows), dlse = normal(b * h * rows);
    std::vector<int32_t> lo(rows), hi(rows), all_lo(rows, 0), all_hi(rows);
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = i + keys - rows;
        hi[i] = static_cast<int32_t>(std::max<int64_t>(0, at + 1));
        lo[i] = window ? std::max<int32_t>(0, hi[i] - window) : 0;
        all_hi[i] = hi[i];
    }
    const int64_t block = 7, blocks = (keys + block - 1) / block;
    std::vector<int64_t> index(b * h * rows * choices);
    std::vector<uint8_t> valid(b * h * rows * choices);
    std::vector<float> vectors = normal(b * g * blocks * d);
    std::vector<int32_t> bound(rows);
    for (int64_t i = 0; i < rows; ++i) bound[i] = static_cast<int32_t>(std::max<int64_t>(0, i + keys - rows) / block);
    saccade_part part{};
    part.slots = rows;
    part.lo = lo.data();
    part.hi = hi.data();
    part.intervals = 1;
    saccade_call c{};
    c.bf16 = bf16;
    c.batch = b, c.heads = h, c.kv_heads = g, c.rows = rows, c.keys = keys, c.dim = d, c.value_dim = e;
    c.q = q.array(), c.k = k.array(), c.v = v.array(), c.out = out.array(), c.grad = grad.array();
    c.dq = dq.array(), c.dk = dk.array(), c.dv = dv.array();
    c.lse = lse.data(), c.delta = delta.data(), c.dlse = dlse.data();
    c.scale = 1 / std::sqrt(static_cast<float>(d));
    c.isa = isa, c.threads = threads;
    c.part = &part, c.parts = 1;
    const int64_t term_dim = 11;
    Numbers terms(b, h, rows, term_dim, false), dterms(b, h, rows, term_dim, false);
    std::vector<int32_t> slot;
    for (int64_t j = 0; j < keys; ++j) slot.push_back(static_cast<int32_t>(j % 4)), slot.push_back(static_cast<int32_t>(4 + j % 7));
    if (!choices && d % 2) {
        c.terms = terms.array(), c.dterms = dterms.array();
        c.slot = slot.data(), c.slots = 2, c.term_dim = term_dim;
    }
    if (choices) {
        const saccade_choice choice{vectors.data(), blocks, choices, bound.data(), 0, index.data(), valid.data()};
        if (saccade_choose(&c, &choice)) std::exit(2);
        c.index = index.data(), c.valid = valid.data();
        c.choices = choices, c.block = block, c.choice_rows = 1;
        c.limit_lo = all_lo.data(), c.limit_hi = all_hi.data();
    }
    if (saccade_forward(&c) || saccade_backward(&c)) std::exit(2);
    const double rough = bf16 ? 4e-2 : 1e-4;
    std::vector<double> want_k(b * g * keys * d), want_v(b * g * keys * e);
    for (int64_t n = 0; n < b; ++n)
        for (int64_t m = 0; m < h; ++m)
            for (int64_t i = 0; i < rows; ++i) {
                const int64_t o = m * g / h, line = (n * h + m) * rows + i;
                std::vector<double> s(keys, -INFINITY);
                double top = -INFINITY, total = 0;
                for (int64_t j = 0; j < keys; ++j) {
                    bool there = lo[i] <= j && j < hi[i];
                    for (int t = 0; t < choices; ++t)
                        there |= valid[line * choices + t] && index[line * choices + t] == j / block && j < all_hi[i];
                    if (!there) continue;
                    s[j] = 0;
                    for (int64_t x = 0; x < d; ++x) s[j] += static_cast<double>(q.at(n, m, i, x)) * k.at(n, o, j, x);
                    for (int64_t a = 0; a < c.slots; ++a) s[j] += terms.at(n, m, i, slot[2 * j + a]);
                    s[j] *= c.scale;
                    top = std::max(top, s[j]);
                }
                for (double x : s) total += x == -INFINITY ? 0 : std::exp(x - top);
                std::vector<double> y(e), step(d), term_step(term_dim);
                double less = -dlse[line];
                for (int64_t j = 0; j < keys; ++j)
                    for (int64_t x = 0; x < e && s[j] != -INFINITY; ++x) y[x] += std::exp(s[j] - top) / total * v.at(n, o, j, x);
                for (int64_t x = 0; x < e; ++x) {
                    expect("out", out.at(n, m, i, x), y[x], rough);
                    less += static_cast<double>(grad.at(n, m, i, x)) * out.at(n, m, i, x);
                }
                if (total) expect("lse", lse[line], top + std::log(total), 1e-4);
                for (int64_t j = 0; j < keys; ++j) {
                    if (s[j] == -INFINITY) continue;
                    const double p = std::exp(s[j] - top) / total;
                    double dp = 0;
                    for (int64_t x = 0; x < e; ++x) {
                        dp += static_cast<double>(grad.at(n, m, i, x)) * v.at(n, o, j, x);
                        want_v[((n * g + o) * keys + j) * e + x] += p * grad.at(n, m, i, x);
                    }
                    const double ds = p * (dp - less) * c.scale;
                    for (int64_t a = 0; a < c.slots; ++a) term_step[slot[2 * j + a]] += ds;
                    for (int64_t x = 0; x < d; ++x) {
                        step[x] += ds * k.at(n, o, j, x);
                        want_k[((n * g + o) * keys + j) * d + x] += ds * q.at(n, m, i, x);
                    }
                }
                for (int64_t x = 0; x < d; ++x) expect("gradient of q", dq.at(n, m, i, x), step[x], 2 * rough);
                for (int64_t x = 0; c.slots && x < term_dim; ++x)
                    expect("gradient of terms", dterms.at(n, m, i, x), term_step[x], 2 * rough);
            }
    for (int64_t n = 0; n < b * g * keys; ++n) {
        for (int64_t x = 0; x < d; ++x) expect("gradient of k", dk.at(0, 0, n, x), want_k[n * d + x], 3 * rough);
        for (int64_t x = 0; x < e; ++x) expect("gradient of v", dv.at(0, 0, n, x), want_v[n * e + x], 3 * rough);
    }
}

}  // namespace

int main() {
    int calls = 0;
    const int sizes[][2] = {{1, 1}, {7, 5}, {16, 16}, {34, 48}, {64, 64}};
    for (int isa = 0; isa <= saccade_isa(); ++isa)
        for (bool bf16 : {false, true})
            for (int64_t rows : {1, 3, 17, 64, 70, 130})
                for (const auto &size : sizes)
                    for (int choices : {0, 3}) {
                        const int64_t keys = rows == 3 ? 500 : rows + (rows == 70 ? 31 : 0);
                        const int threads = 1 + calls % 4, window = calls % 3 ? 9 : 0;
                        run(bf16, isa, threads, 1 + calls % 2, 4, calls % 2 ? 1 : 2, rows, keys, size[0], size[1], choices ? 9 : window, choices);
                        ++calls;
                    }
    for (int isa = 0; isa <= saccade_isa(); ++isa)
        for (bool bf16 : {false, true})
            for (int64_t rows : {1, 2, 17, 64, 70, 130})
                for (const auto &size : sizes)
                    for (int kind = 0; kind < 6; ++kind) {
                        run_linear(bf16, isa, 1 + calls % 4, calls % 2 ? 1 : 2, rows, size[0], size[1], kind);
                        ++calls;
                    }
    std::printf("%d calls, %d differences\n", calls, failures);
    return failures != 0;
}
