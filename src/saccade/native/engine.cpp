// Which instruction set runs, how work is cut into items, and the threads that take them.
#include "engine.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace saccade {

extern const Kernels portable;
#if defined(__x86_64__)
extern const Kernels avx2, avx512, avx512bf16;
#endif

namespace {

int best() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

const Kernels &kernels(int isa) {
#if defined(__x86_64__)
    static const int most = best();
    const Kernels *all[] = {&portable, &avx2, &avx512, &avx512bf16};
    return *all[isa < 0 || isa > most ? most : isa];
#else
    (void)isa;
    return portable;
#endif
}

struct Free {
    void operator()(float *p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], Free>;

Floats floats(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * 4 + 63) / 64 * 64;
    float *found = static_cast<float *>(std::aligned_alloc(64, bytes + 64));
    if (!found) throw std::bad_alloc();
    return Floats(found);
}

struct Team {
    std::atomic<int64_t> next{0};
    std::atomic<int> number{0};
    int64_t count = 0;
    void (*work)(void *, int64_t, int) = nullptr;
    void *what = nullptr;
};

void take(void *p) {
    Team &team = *static_cast<Team *>(p);
    const int me = team.number++;
    for (int64_t i; (i = team.next++) < team.count;) team.work(team.what, i, me);
}

// f(item, thread) for all items, on PyTorch's own pool where its OpenMP was found.
template <class Call, class F>
void parallel(const Call &call, int64_t count, F f) {
    Team team;
    team.count = count;
    team.what = &f;
    team.work = [](void *what, int64_t i, int me) { (*static_cast<F *>(what))(i, me); };
    const int threads = static_cast<int>(std::min<int64_t>(count, std::max(1, call.threads)));
    if (threads <= 1) return take(&team);
    if (call.pool) {
        using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
        return reinterpret_cast<Parallel>(call.pool)(take, &team, static_cast<unsigned>(threads), 0);
    }
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(take, &team);
    take(&team);
    for (std::thread &t : others) t.join();
}

}  // namespace

namespace {

// Where the rows of a call begin to read, and end.
void span(const saccade_call &c, int64_t &first, int64_t &last) {
    const saccade_part &p = c.part[0];
    first = INT64_MAX, last = 0;
    for (int64_t n = 0; n < (p.per_batch ? c.batch : 1) * p.intervals * p.slots; ++n)
        if (p.lo[n] < p.hi[n]) {
            first = std::min<int64_t>(first, p.lo[n]);
            last = std::max<int64_t>(last, p.hi[n]);
        }
}

// Tiles of all heads; too few of them share out their keys, and their shares are merged.
int64_t forward_tiles(const saccade_call &call, const Kernels &run) {
    const int64_t folded = fold(call), group = call.heads / call.kv_heads / folded, threads = std::max(1, call.threads);
    const int64_t tiles = tile_count(call.part[0], folded), items = call.batch * call.kv_heads * tiles * group;
    const int64_t scratch = run.forward_scratch(&call, 0), size = LANES * (2 + padded(call.value_dim));
    int64_t shares = 1, first = 0, last = INT64_MAX;
    if (items < 2 * threads && threads > 1 && !call.part[0].tiles) {
        span(call, first, last);
        shares = std::max<int64_t>(1, std::min(2 * threads / items, (last - first) / (4 * KEYS)));
    }
    const int64_t step = shares == 1 ? last - first : (last - first + shares - 1) / shares;
    const Floats space = floats(scratch * threads), partial = floats(shares == 1 ? 0 : items * shares * size);
    std::atomic<int64_t> computed{0};
    const auto item_of = [&](int64_t i) {
        const int64_t owner = i / (tiles * group);
        Item item{};
        item.batch = owner / call.kv_heads;
        item.head = owner % call.kv_heads * group * folded + i % group;
        item.first = tiles - 1 - i % (tiles * group) / group;
        item.last = item.first + 1;
        return item;
    };
    parallel(call, items * shares, [&](int64_t i, int me) {
        Item item = item_of(i / shares);
        item.key_lo = first + i % shares * step;
        item.key_hi = shares == 1 ? last : std::min(last, item.key_lo + step);
        if (shares > 1) item.partial = partial.get() + i * size;
        computed += run.forward(&call, &item, space.get() + me * scratch);
    });
    if (shares > 1)
        parallel(call, items, [&](int64_t i, int me) {
            const Item item = item_of(i);
            run.merge(&call, &item, partial.get() + i * shares * size, shares, size, space.get() + me * scratch);
        });
    return computed;
}

// Rows of all heads that keep a state, in ranges where no part reorders them.
int64_t forward_rows(const saccade_call &call, const Kernels &run) {
    bool ordered = true;
    for (int64_t i = 0; i < call.parts; ++i) ordered &= !call.part[i].tiles && !call.part[i].row_order;
    const int64_t rows = ordered ? std::min<int64_t>(call.rows, RANGE) : call.rows, ranges = (call.rows + rows - 1) / rows;
    const int64_t scratch = run.forward_scratch(&call, rows), threads = std::max(1, call.threads);
    const Floats space = floats(scratch * threads);
    std::atomic<int64_t> computed{0};
    parallel(call, call.batch * call.heads * ranges, [&](int64_t i, int me) {
        Item item{};
        item.batch = i / ranges / call.heads;
        item.head = i / ranges % call.heads;
        item.first = (ranges - 1 - i % ranges) * rows;
        item.last = std::min(call.rows, item.first + rows);
        item.key_hi = INT64_MAX;
        computed += run.forward(&call, &item, space.get() + me * scratch);
    });
    return computed;
}

float *at(const saccade_array &x, int64_t batch, int64_t head) {
    return static_cast<float *>(x.data) + batch * x.batch + head * x.head;
}

// Rows of all heads, in ranges; scratch is what either form of bfloat16 takes, and the best so far.
void choose_all(const saccade_call &call, const saccade_choice &choice, const Kernels &run) {
    const int64_t ranges = (call.rows + RANGE - 1) / RANGE, threads = std::max(1, call.threads);
    const int64_t d = padded(call.dim), e = padded(call.value_dim);
    const int64_t scratch = 2 * d * LANES + KEYS * (LANES + d + e) + LANES * (e + 4) + 2 * choice.choices * LANES;
    const Floats space = floats(scratch * threads);
    parallel(call, call.batch * call.heads * ranges, [&](int64_t i, int me) {
        Item item{};
        item.batch = i / ranges / call.heads;
        item.head = i / ranges % call.heads;
        item.first = (ranges - 1 - i % ranges) * RANGE;
        item.last = std::min(call.rows, item.first + RANGE);
        run.choose(&call, &choice, &item, space.get() + me * scratch);
    });
}

// States side by side; where they are fewer than the threads, the heads that read one are shared out in a forward pass.
int64_t linear_all(const saccade_linear &call, const Kernels &run, bool backward) {
    const int64_t owners = call.batch * call.kv_heads, group = call.heads / call.kv_heads;
    const bool one = call.rows == 1 && !call.lengths, small = one && owners * call.dim * call.value_dim < SMALL;
    const int64_t threads = small ? 1 : std::max(1, call.threads);
    const int64_t shares = backward || one ? 1 : std::max<int64_t>(1, std::min(group, threads / std::max<int64_t>(1, owners)));
    const int64_t scratch = run.linear_scratch(&call, backward), count = owners * shares;
    const Floats space = floats(scratch * std::min(threads, count));
    std::atomic<int64_t> computed{0};
    const auto work = [&](int64_t i, int me) {
        const int64_t owner = i / shares, share = i % shares;
        computed += run.linear(&call, owner / call.kv_heads, owner % call.kv_heads, group * share / shares, group * (share + 1) / shares,
                               backward, space.get() + me * scratch);
    };
    if (threads == 1)
        for (int64_t i = 0; i < count; ++i) work(i, 0);
    else
        parallel(call, count, work);
    return computed;
}

int linear_pass(saccade_linear *call, bool backward) {
    try {
        call->computed = linear_all(*call, kernels(call->isa), backward);
        return 0;
    } catch (...) {
        return 1;
    }
}

// Key-value heads side by side; where they are fewer than the threads, their tiles or heads are shared out among sums of their own.
int64_t backward_all(const saccade_call &call, const Kernels &run) {
    const int64_t threads = std::max(1, call.threads), owners = call.batch * call.kv_heads, group = call.heads / call.kv_heads;
    const bool rows = stateful(call);
    const int64_t pieces = rows ? group : tile_count(call.part[0], fold(call));
    const int64_t shares = owners % threads == 0 || owners >= 4 * threads ? 1 : std::min(pieces, (2 * threads + owners - 1) / owners);
    const int64_t dk = call.keys * padded(call.dim), dv = call.keys * padded(call.value_dim);
    const bool direct = shares == 1 && !call.bf16 && call.dim % 16 == 0 && call.value_dim % 16 == 0;
    const int64_t scratch = std::max(run.backward_scratch(&call), 2 * padded(call.value_dim));
    const Floats space = floats(scratch * threads);
    const Floats sums = floats(direct ? 0 : (shares > 1 ? owners * shares : std::min(threads, owners)) * (dk + dv));
    const auto store = [&](int64_t owner, const float *first) {
        std::vector<const float *> k(shares), v(shares);
        for (int64_t n = 0; n < shares; ++n) k[n] = first + n * (dk + dv), v[n] = k[n] + dk;
        run.store(&call, &call.dk, k.data(), shares, owner / call.kv_heads, owner % call.kv_heads, call.dim, call.scale);
        run.store(&call, &call.dv, v.data(), shares, owner / call.kv_heads, owner % call.kv_heads, call.value_dim, 1);
    };
    std::atomic<int64_t> computed{0};
    parallel(call, call.batch * call.heads, [&](int64_t i, int me) {
        run.delta(&call, i / call.heads, i % call.heads, space.get() + me * scratch);
    });
    parallel(call, owners * shares, [&](int64_t i, int me) {
        const int64_t owner = i / shares;
        Item item{};
        item.batch = owner / call.kv_heads;
        item.head = owner % call.kv_heads * group;
        item.first = i % shares;
        item.last = pieces;
        item.step = shares;
        item.key_hi = INT64_MAX;
        float *own = direct ? nullptr : sums.get() + (shares > 1 ? i : me) * (dk + dv);
        item.dk = direct ? at(call.dk, item.batch, owner % call.kv_heads) : own;
        item.dv = direct ? at(call.dv, item.batch, owner % call.kv_heads) : own + dk;
        std::fill(item.dk, item.dk + dk, 0.0f);
        std::fill(item.dv, item.dv + dv, 0.0f);
        computed += run.backward(&call, &item, space.get() + me * scratch);
        if (direct) {
            const float *const to[] = {item.dk};
            run.store(&call, &call.dk, to, 1, item.batch, owner % call.kv_heads, call.dim, call.scale);
        } else if (shares == 1) {
            store(owner, own);
        }
    });
    if (shares > 1) parallel(call, owners, [&](int64_t owner, int) { store(owner, sums.get() + owner * shares * (dk + dv)); });
    return computed;
}

}  // namespace

}  // namespace saccade

extern "C" int saccade_forward(saccade_call *call) {
    try {
        const saccade::Kernels &run = saccade::kernels(call->isa);
        call->computed = saccade::stateful(*call) ? saccade::forward_rows(*call, run) : saccade::forward_tiles(*call, run);
        return 0;
    } catch (...) {
        return 1;
    }
}

extern "C" int saccade_backward(saccade_call *call) {
    try {
        call->computed = saccade::backward_all(*call, saccade::kernels(call->isa));
        return 0;
    } catch (...) {
        return 1;
    }
}

extern "C" int saccade_choose(saccade_call *call, const saccade_choice *choice) {
    try {
        saccade::choose_all(*call, *choice, saccade::kernels(call->isa));
        return 0;
    } catch (...) {
        return 1;
    }
}

extern "C" int saccade_linear_forward(saccade_linear *call) { return saccade::linear_pass(call, false); }

extern "C" int saccade_linear_backward(saccade_linear *call) { return saccade::linear_pass(call, true); }

extern "C" int saccade_isa(void) { return saccade::best(); }
