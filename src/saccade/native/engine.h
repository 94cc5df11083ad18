// The C interface of the engine, and what its parts share. Python mirrors the structs (saccade/native/call.py).
#pragma once

#include <stddef.h>
#include <stdint.h>

extern "C" {

// Numbers of (batch, head, row, dim): strides in numbers, the last dimension contiguous.
struct saccade_array {
    void *data;
    int64_t batch, head, row;
};

// Which keys the rows of some slots read. Slots are rows, or entries of row_order; key slots are keys, or entries of key_order.
//  - intervals: the row of slot s reads key slots [lo, hi) of every interval; lo and hi are (1 or batch, intervals, slots);
//  - tiles (tiles > 0): (first row slot, rows, first key slot, keys that all rows read, other keys, first mask) each,
//    with one 64-bit mask for each of the other keys: bit r is set where row r of the tile reads it.
struct saccade_part {
    const int32_t *row_order, *key_order;
    int64_t slots;
    const int32_t *lo, *hi;
    int64_t intervals, per_batch;
    const int64_t *tile;
    int64_t tiles;
    const uint64_t *bits;
};

struct saccade_call {
    int64_t bf16, batch, heads, kv_heads, rows, keys, dim, value_dim;
    struct saccade_array q, k, v, out, grad, dq, dk, dv;
    float *lse;         // (batch, heads, rows)
    float *delta;       // (batch, heads, rows): rowsum(out grad) minus the gradient of lse; backward fills it
    const float *dlse;  // (batch, heads, rows) or null
    float scale;
    int32_t isa, threads;
    const struct saccade_part *part;
    int64_t parts;
    // A choice of key blocks: index and valid (batch, heads, groups of `choice_rows` rows, choices), null where there is none.
    // A chosen pair exists inside the limit interval of its row, and where part 0 does not hold it already.
    const int64_t *index;
    const uint8_t *valid;
    int64_t choices, block, choice_rows;
    const int32_t *limit_lo, *limit_hi;  // (1 or batch, rows)
    int64_t limit_per_batch;
    // What pairs add to their products before the scale: the sum over the columns of slot (keys, slots) of
    // terms[row][slot of the key], float32 (batch, heads, rows, term_dim). Only where one part meets every row once.
    struct saccade_array terms, dterms;
    const int32_t *slot;
    int64_t slots, term_dim;
    void *pool;        // GOMP_parallel of the OpenMP that PyTorch has loaded, or null
    int64_t computed;  // answered: pairs computed, padding of tiles included
};

// A choice to make: for each row, the `choices` best of the blocks below its bound. Only the sizes and q of a call are read.
struct saccade_choice {
    const float *vectors;  // (batch, kv_heads, blocks, dim)
    int64_t blocks, choices;
    const int32_t *bound;  // (1 or batch, rows)
    int64_t per_batch;
    int64_t *index;   // (batch, heads, rows, choices)
    uint8_t *valid;
};

// A causal pass over a state: S_t = exp(log_t) S_{t-1} + write_t, out_t = phi(q_t) S_t, divided by its sum of weights where
// `total` asks. A token writes gain phi(k) v, or with `overwrites` gain phi(k) (v - what the state answers to phi(k)).
// All but q, k, v, out, grad and the gradients of q, k and v is float32; what is null is not there.
struct saccade_linear {
    int64_t bf16, batch, heads, kv_heads, rows, dim, value_dim;
    struct saccade_array q, k, v, out, grad, dq, dk, dv;
    struct saccade_array log, dlog;    // (batch, kv_heads, rows, 1, or dim where `channels`), at most 0; any stride may be 0
    struct saccade_array gain, dgain;  // (batch, kv_heads, rows, 1)
    const float *s, *z;                // the state before, (batch, kv_heads, dim, value_dim), and the sum of features, (.., dim)
    float *s_after, *z_after;
    const float *ds_after, *dz_after;
    float *ds, *dz;
    float *total;          // (batch, heads, rows): sums of weights
    const float *dtotal;
    const int64_t *lengths;  // (batch): later rows are padding, never read, and answered with zeros
    float least;           // a smaller sum of weights divides as this one
    int32_t elu, channels, overwrites, isa, threads;
    // log holds 0 the logarithm, 1 x of logsigmoid(x) / temperature (forward, by channel or a token alone), 2 x of
    // -softplus(x) exp(rate) (a token alone).
    int32_t decay_rule;
    // A token alone may come as it is, and go out finished: what its decay and its gain are made of, carried by one head, by
    // the state heads or by the query heads, which share their mean; lengths of q and k made 1; the output over its root mean
    // square times `norm` (heads, value_dim).
    int32_t gain_rule;      // gain holds 0 the gain, 1 x of softplus(x), 2 x of most / (1 + exp(-x))
    int32_t log_heads, gain_heads;
    float temperature, most, unit_eps, norm_eps;  // an eps of 0: not asked for
    const float *rate, *norm;                     // rate: (kv_heads)
    void *pool;        // as in saccade_call
    int64_t computed;  // answered: multiply-adds of matrix products, padding included
};

#define SACCADE_PUBLIC __attribute__((visibility("default")))
SACCADE_PUBLIC int saccade_forward(struct saccade_call *call);
SACCADE_PUBLIC int saccade_backward(struct saccade_call *call);
SACCADE_PUBLIC int saccade_choose(struct saccade_call *call, const struct saccade_choice *choice);
SACCADE_PUBLIC int saccade_linear_forward(struct saccade_linear *call);
SACCADE_PUBLIC int saccade_linear_backward(struct saccade_linear *call);
SACCADE_PUBLIC int saccade_isa(void);  // the best of this machine: 0 portable, 1 AVX2, 2 AVX-512, 3 AVX-512 with BF16
}

namespace saccade {

constexpr int LANES = 64;  // rows of a tile
constexpr int KEYS = 96;   // keys that are met at a time
constexpr int64_t RANGE = 2048;  // rows of a head whose state is kept at a time
constexpr int64_t SMALL = 1 << 18;  // numbers of states that one thread takes a token further sooner than many begin

// A piece of work of a (batch, head): rows, tiles or heads first, first + step, ... below last, and the key slots
// [key_lo, key_hi) that it may read.
struct Item {
    int64_t batch, head, first, last, step, key_lo, key_hi;
    float *partial;    // where a split over keys leaves its (m, l, out), or null
    float *dk, *dv;    // gradients of keys and values, (keys, padded dim) each
};

// What an instruction set compiles: floats of scratch, one item, the merge of a tile whose keys were shared out, and what a
// backward pass does before and after its items: the sums of rows, and of shares of the gradients of keys.
struct Kernels {
    int64_t (*forward_scratch)(const saccade_call *, int64_t rows);
    int64_t (*forward)(const saccade_call *, const Item *, float *scratch);
    void (*merge)(const saccade_call *, const Item *, const float *shares, int64_t count, int64_t size, float *scratch);
    int64_t (*backward_scratch)(const saccade_call *);
    int64_t (*backward)(const saccade_call *, const Item *, float *scratch);
    void (*delta)(const saccade_call *, int64_t batch, int64_t head, float *scratch);
    void (*store)(const saccade_call *, const saccade_array *, const float *const *shares, int64_t count, int64_t batch, int64_t head,
                  int64_t dim, float scale);
    void (*choose)(const saccade_call *, const saccade_choice *, const Item *, float *scratch);
    int64_t (*linear_scratch)(const saccade_linear *, bool backward);
    int64_t (*linear)(const saccade_linear *, int64_t batch, int64_t state, int64_t first, int64_t last, bool backward, float *scratch);
};

constexpr int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// A short sequence folds: the query heads of a group share tiles, so that keys are read once.
inline int64_t fold(const saccade_call &c) {
    const int64_t group = c.heads / c.kv_heads;
    const bool plain = c.parts == 1 && !c.index && !c.part[0].tiles && !c.part[0].row_order;
    return plain && c.rows <= LANES / 2 ? group : 1;
}

// A state of its own for every row of a head, where more than one part meets the same row.
inline bool stateful(const saccade_call &c) { return c.index || c.parts != 1; }

inline int64_t tile_count(const saccade_part &p, int64_t fold) { return p.tiles ? p.tiles : (fold * p.slots + LANES - 1) / LANES; }

}  // namespace saccade
