// What the drivers share: numbers drawn with nothing to spare behind the last one, and what they should be.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "engine.h"

namespace {

std::mt19937 generator(0);

std::vector<float> normal(size_t n) {
    std::normal_distribution<float> draw;
    std::vector<float> x(n);
    for (float &v : x) v = draw(generator);
    return x;
}

uint16_t narrowed(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float widened(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float found;
    __builtin_memcpy(&found, &bits, 4);
    return found;
}

// Numbers (batch, head, row, dim) with nothing to spare behind the last one.
struct Numbers {
    int64_t heads, rows, dim;
    std::vector<float> single;
    std::vector<uint16_t> half;
    Numbers(int64_t b, int64_t h, int64_t n, int64_t d, bool bf16) : heads(h), rows(n), dim(d), single(normal(b * h * n * d)) {
        if (!bf16) return;
        for (float &x : single) {
            half.push_back(narrowed(x));
            x = widened(half.back());
        }
    }
    saccade_array array() { return {half.empty() ? static_cast<void *>(single.data()) : half.data(), heads * rows * dim, rows * dim, dim}; }
    float at(int64_t b, int64_t h, int64_t n, int64_t d) const {
        const size_t i = ((b * heads + h) * rows + n) * dim + d;
        return half.empty() ? single[i] : widened(half[i]);
    }
};

int failures = 0;

void expect(const char *what, double got, double want, double scale) {
    if (std::fabs(got - want) <= scale * (1 + std::fabs(want))) return;
    if (failures++ < 10) std::printf("%s: got %g, want %g\n", what, got, want);
}

}  // namespace
