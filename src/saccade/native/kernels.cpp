// All kernels, compiled once for each instruction set. Nothing here may come from the standard library: an inline function
// compiled for a newer machine could be the one that the linker keeps for all.
#include "backward.h"
#include "choose.h"
#include "linear_back.h"
#include "linear_step.h"

namespace {

// How a call runs: pairs of bfloat16 need even sizes.
template <class F>
INLINE int64_t by_mode(const saccade_call &call, F f) {
    if (!call.bf16) return f(Single());
#if defined(__AVX512BF16__)
    if (call.dim % 2 == 0 && call.value_dim % 2 == 0) return f(HalfPairs());
#endif
    return f(Half());
}

int64_t forward_scratch(const saccade_call *call, int64_t rows) {
    return by_mode(*call, [&](auto mode) {
        Cutter cut{nullptr};
        if (saccade::stateful(*call))
            Rows<decltype(mode)> measured(*call, cut, rows);
        else
            Forward<decltype(mode)> measured(*call, cut);
        return cut.used;
    });
}

int64_t forward(const saccade_call *call, const Item *item, float *space) {
    return by_mode(*call, [&](auto mode) {
        return saccade::stateful(*call) ? forward_rows<decltype(mode)>(*call, *item, space)
                                        : forward_tile<decltype(mode)>(*call, *item, space);
    });
}

void merge(const saccade_call *call, const Item *item, const float *shares, int64_t count, int64_t size, float *space) {
    by_mode(*call, [&](auto mode) {
        merge_shares<decltype(mode)>(*call, *item, shares, count, size, space);
        return (int64_t)0;
    });
}

int64_t backward_scratch(const saccade_call *call) {
    return by_mode(*call, [&](auto mode) {
        Cutter cut{nullptr};
        if (saccade::stateful(*call))
            RowsBack<decltype(mode)> measured(*call, cut);
        else
            Backward<decltype(mode)> measured(*call, cut);
        return cut.used;
    });
}

int64_t backward(const saccade_call *call, const Item *item, float *space) {
    return by_mode(*call, [&](auto mode) {
        if (!saccade::stateful(*call)) return backward_tiles<decltype(mode)>(*call, *item, space);
        Cutter cut{space};
        RowsBack<decltype(mode)> rows(*call, cut);
        return rows.run(*item);
    });
}

void delta(const saccade_call *call, int64_t batch, int64_t head, float *space) {
    by_mode(*call, [&](auto mode) {
        find_delta<decltype(mode)>(*call, batch, head, space);
        return (int64_t)0;
    });
}

void store_all(const saccade_call *call, const saccade_array *to, const float *const *shares, int64_t count, int64_t batch,
               int64_t head, int64_t dim, float scale) {
    by_mode(*call, [&](auto mode) {
        store_sums<decltype(mode)>(*to, shares, count, batch, head, call->keys, dim, scale);
        return (int64_t)0;
    });
}

void choose_best(const saccade_call *call, const saccade_choice *choice, const Item *item, float *space) {
    if (call->bf16)
        choose_rows<Half>(*call, *choice, *item, space);
    else
        choose_rows<Single>(*call, *choice, *item, space);
}

// A recurrent call's forward or backward pass by the type of its inputs.
template <class F>
INLINE int64_t by_type(const saccade_linear &call, bool backward, float *space, F f) {
    Cutter cut{space};
    if (!backward && call.rows == 1 && !call.lengths) {
        if (call.bf16) return f(LinearStep<Half>(call, cut), cut);
        return f(LinearStep<Single>(call, cut), cut);
    }
    if (!backward && call.bf16) return f(Linear<Half>(call, cut, false), cut);
    if (!backward) return f(Linear<Single>(call, cut, false), cut);
    if (call.bf16) return f(LinearBack<Half>(call, cut), cut);
    return f(LinearBack<Single>(call, cut), cut);
}

int64_t linear_scratch(const saccade_linear *call, bool backward) {
    return by_type(*call, backward, nullptr, [](auto, Cutter &cut) { return cut.used; });
}

int64_t linear(const saccade_linear *call, int64_t batch, int64_t state, int64_t first, int64_t last, bool backward, float *space) {
    return by_type(*call, backward, space, [&](auto pass, Cutter &) {
        pass.batch = batch;
        pass.owner = state;
        return pass.run(first, last);
    });
}

}  // namespace

namespace saccade {
extern const Kernels SACCADE_ISA;
const Kernels SACCADE_ISA = {forward_scratch, forward, merge, backward_scratch, backward, delta, store_all, choose_best,
                             linear_scratch, linear};
}  // namespace saccade
