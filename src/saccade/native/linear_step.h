// One token on a state, from the state where it lies to the one after.
#pragma once

#include "linear.h"

namespace {

// 1 / (1 + e^-x).
INLINE vf sigmoid(vf x) {
    const vf u = survives(choose(x > vf{}, -x, x));
    return choose(x > vf{}, splat(1.0f), u) / (u + 1.0f);
}

template <class Mode>
struct LinearStep : Linear<Mode> {
    typedef Linear<Mode> Base;
    using Base::batch, Base::call, Base::dim, Base::fk, Base::owner, Base::out, Base::reader, Base::s, Base::shift, Base::stride;
    using Base::u, Base::value_dim, Base::value_wide, Base::wide, Base::work, Base::z;

    LinearStep(const saccade_linear &c, Cutter &cut) : Base(c, cut, true) {}

    // What a stream carries for the state: its head's, or the mean of the heads that share the state.
    float carried(const saccade_array &x, int64_t heads, int64_t d) const {
        const bool shared = heads && heads != 1 && heads != call.kv_heads;
        const int64_t count = shared ? heads / call.kv_heads : 1, from = heads == 1 ? 0 : owner * count;
        float sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += at<float>(x, batch, from + i, 0)[d];
        return sum / (float)count;
    }

    // How much of each channel survives, in shift.
    void decay() {
        const bool there = call.log.data;
        for (int64_t d = 0; d < wide; ++d) shift[d] = there && d < dim ? carried(call.log, call.log_heads, call.channels ? d : 0) : 0;
        for (int64_t d = 0; there && d < wide; d += VL) {
            vf x = load(shift + d);
            if (call.decay_rule == 1) x = softplus(-x) * (-1 / call.temperature);
            if (call.decay_rule == 2) x = softplus(x) * -__builtin_expf(call.rate[owner]);
            store(shift + d, survives(x));
        }
        for (int64_t d = 0; !there && d < wide; ++d) shift[d] = 1;
    }

    float gain() const {
        if (!call.gain.data) return 1;
        const float x = carried(call.gain, call.gain_heads, 0);
        if (call.gain_rule == 1) return softplus(splat(x))[0];
        return call.gain_rule == 2 ? call.most * sigmoid(splat(x))[0] : x;
    }

    void features(const saccade_array &x, int64_t head, float *into) {
        this->fetch(x, head, dim, !call.unit_eps, into, wide);
        if (!call.unit_eps) return;
        vf sum = vf{};
        for (int64_t d = 0; d < wide; d += VL) sum += load(into + d) * load(into + d);
        const float length = __builtin_sqrtf(across(sum));
        this->scale_row(into, wide, 1 / (length > call.unit_eps ? length : call.unit_eps));
        if (call.elu) this->map(into, dim);
    }

    void answer(int64_t head) {
        float by = this->divisor(head, 0, reader, 0);
        if (call.norm_eps) {
            vf sum = vf{};
            for (int64_t e = 0; e < value_wide; e += VL) sum += load(out + e) * load(out + e);
            const float mean = across(sum) / ((float)value_dim * by * by);
            by *= __builtin_sqrtf(mean + call.norm_eps);
            for (int64_t e = 0; e < value_dim; ++e) out[e] *= call.norm[head * value_dim + e];
        }
        this->finish(head, 0, out, by);
    }

    // Rows of the state that no vector fills go by way of a copy.
    int64_t run(int64_t, int64_t) {
        const int64_t line = batch * call.kv_heads + owner, group = call.heads / call.kv_heads;
        const bool direct = value_dim == value_wide && call.s && call.s_after;
        this->begin(!direct);
        this->n = 1;
        features(call.k, owner, fk);
        this->fetch(call.v, owner, value_dim, false, u, value_wide);
        decay();
        const float strong = gain();
        const float *old = direct ? call.s + line * dim * value_dim : s;
        float *now = direct ? call.s_after + line * dim * value_dim : s;
        if (call.overwrites) {
            for (int64_t d = 0; d < dim; ++d) reader[d] = fk[d] * shift[d];
            this->template multiply<false, 1>(1, value_wide, (int)dim, reader, stride, out, value_wide, this->every(old, value_wide, dim));
            for (int64_t e = 0; e < value_wide; e += VL) store(u + e, (load(u + e) - load(out + e)) * strong);
        } else {
            this->scale_row(fk, wide, strong);
        }
        for (int64_t d = 0; d < dim; ++d)
            for (int64_t i = 0; i < value_wide; i += VL)
                store(now + d * value_wide + i, load(old + d * value_wide + i) * shift[d] + load(u + i) * fk[d]);
        work += dim * value_wide;
        for (int64_t d = 0; call.total && d < wide; d += VL) store(z + d, load(z + d) * load(shift + d) + load(fk + d));
        for (int64_t head = owner * group; head < (owner + 1) * group; ++head) {
            features(call.q, head, reader);
            this->template multiply<false, 1>(1, value_wide, (int)dim, reader, stride, out, value_wide, this->every(now, value_wide, dim));
            answer(head);
        }
        this->end(!direct);
        return work;
    }
};

}  // namespace
