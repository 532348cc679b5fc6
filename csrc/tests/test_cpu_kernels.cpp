// SPDX-License-Identifier: Apache-2.0
// Each micro-kernel on each instruction set of this machine, against plain double loops.
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "common/cpu_buffer.h"
#include "common/cpu_kernels.h"
#include "common/cpu_simd.h"

namespace {

using seer::DType;
using seer::cpu::Kernels;
using seer::cpu::Scratch;
using seer::test::Buffer;
using seer::test::Random;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

float exp2_of(float x) {
  seer::cpu::Lanes<4>::Float lanes = {x, x, x, x};
  seer::cpu::exp2_in_place<4>(lanes);
  return lanes[3];
}

// Every 61st float of [-126, 127], which the reduction maps onto all of its polynomial's domain.
void test_exp2() {
  double worst = 0.0;
  for (uint32_t sign : {0u, 0x80000000u}) {
    for (uint32_t bits = 0x2f000000u; bits <= 0x42fe0000u; bits += 61) {
      const float x = std::bit_cast<float>(bits | sign);
      if (x < -126.0f || x > 127.0f) continue;
      const double exact = std::exp2(double{x});
      const double ulp = std::ldexp(1.0, std::ilogb(exact) - 23);
      worst = std::max(worst, std::abs(exp2_of(x) - exact) / ulp);
    }
  }
  std::printf("exp2: largest error %.3f ulp\n", worst);
  SEER_CHECK(worst < 1.5, "largest error %.3f ulp", worst);
  SEER_CHECK(exp2_of(0.0f) == 1.0f, "exp2(0) = %a", exp2_of(0.0f));
  for (int n = -126; n <= 127; ++n)
    SEER_CHECK(exp2_of(float(n)) == std::ldexp(1.0f, n), "exp2(%d)", n);
  for (float x : {-126.5f, -150.0f, -1e30f, -kInfinity})
    SEER_CHECK(exp2_of(x) == 0.0f, "exp2(%g) = %g", x, exp2_of(x));
  SEER_CHECK(std::isnan(exp2_of(kNaN)), "exp2(NaN) = %g", exp2_of(kNaN));
  SEER_CHECK(std::isnan(exp2_of(-kNaN)), "exp2(-NaN) = %g", exp2_of(-kNaN));
}

void fill(Random& random, float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(random.normal());
}

void test_products(const Kernels& kernels, int64_t rows, int64_t depth) {
  Random random(rows * 1000 + depth);
  const int64_t lanes = kernels.lanes;
  Scratch scratch(2 * Scratch::padded(rows * depth) + Scratch::padded(depth * lanes) +
                  3 * Scratch::padded((rows + 1) * lanes));
  float* a = scratch.take(rows * depth);
  float* b = scratch.take(depth * lanes);
  float* c = scratch.take((rows + 1) * lanes);  // one guard row
  float* carry = scratch.take(lanes);
  fill(random, a, rows * depth);
  fill(random, b, depth * lanes);
  fill(random, c, (rows + 1) * lanes);
  fill(random, carry, lanes);
  const std::vector<float> before(c, c + (rows + 1) * lanes);
  const auto check = [&](const char* name, auto element, bool carried) {
    for (int64_t i = 0; i < (rows + 1) * lanes; ++i) {
      const int64_t row = i / lanes, lane = i % lanes;
      double expected = row == rows ? before[i] : carried ? double{before[i]} * carry[lane] : 0.0;
      double bound = std::abs(expected);
      for (int64_t k = 0; row < rows && k < depth; ++k) {
        expected += double{element(row, k)} * b[k * lanes + lane];
        bound += std::abs(double{element(row, k)} * b[k * lanes + lane]);
      }
      SEER_CHECK(std::abs(c[i] - expected) <= bound * double(depth + 2) * 0x1p-24,
                 "%s lanes %d rows %d depth %d: %g, expected %g", name, int(lanes), int(rows),
                 int(depth), c[i], expected);
    }
  };
  kernels.multiply(a, rows, depth, b, c);
  check("multiply", [&](int64_t i, int64_t k) { return a[i * depth + k]; }, false);
  std::copy(before.begin(), before.end(), c);
  kernels.accumulate(a, depth, rows, b, carry, c);
  check("accumulate", [&](int64_t i, int64_t k) { return a[k * rows + i]; }, true);
}

// Three tiles, the second masked; row 0 sees nothing, row 1 only -inf, row 2 a NaN.
void test_softmax(const Kernels& kernels) {
  const int64_t lanes = kernels.lanes, cols = 19, tiles = 3;
  Random random(5);
  Scratch scratch(Scratch::padded(cols * lanes) + 6 * Scratch::padded(lanes));
  float* scores = scratch.take(cols * lanes);
  float* tile_sum = scratch.take(lanes);
  float* row_max = scratch.take(lanes);
  float* row_sum = scratch.take(lanes);
  float* carry = scratch.take(lanes);
  float* tile_max = scratch.take(lanes);
  auto* visible = reinterpret_cast<int32_t*>(scratch.take(lanes));
  std::fill_n(row_max, lanes, -kInfinity);
  std::fill_n(row_sum, lanes, 0.0f);
  std::vector<std::vector<double>> seen(lanes);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    fill(random, scores, cols * lanes);
    for (int64_t c = 0; c < cols; ++c) {
      scores[c * lanes] = scores[c * lanes + 1] = -kInfinity;
      if (tile == 1 && c == 3) scores[c * lanes + 2] = kNaN;
    }
    for (int64_t lane = 0; lane < lanes; ++lane)
      visible[lane] = tile == 1 ? static_cast<int32_t>((lane * 7) % (cols + 1)) : cols;
    visible[2] = cols;
    std::vector<double> largest(lanes, -INFINITY);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      for (int64_t c = 0; c < visible[lane]; ++c) {
        const double score = scores[c * lanes + lane];
        seen[lane].push_back(score);
        largest[lane] = std::fmax(largest[lane], score);
      }
    }
    kernels.softmax_step(scores, cols, tile == 1 ? visible : nullptr, row_max, row_sum, carry,
                         tile == 2 ? nullptr : tile_max, tile == 2 ? nullptr : tile_sum);
    for (int64_t lane = 0; lane < lanes && tile < 2; ++lane)
      SEER_CHECK(tile_max[lane] == largest[lane], "lane %d: %g, expected %g", int(lane),
                 tile_max[lane], largest[lane]);
    for (int64_t lane = 0; lane < lanes && tile < 2; ++lane) {
      float weights = 0.0f;
      for (int64_t c = 0; c < cols; ++c) weights += scores[c * lanes + lane];
      const bool same = std::isnan(weights) ? std::isnan(tile_sum[lane])
                                            : std::abs(tile_sum[lane] - weights) <= 1e-5f * weights;
      SEER_CHECK(same, "lane %d: sum %g, expected %g", int(lane), tile_sum[lane], weights);
    }
    for (int64_t lane = 0; lane < lanes; ++lane)
      for (int64_t c = visible[lane]; c < cols; ++c)
        SEER_CHECK(scores[c * lanes + lane] == 0.0f, "lane %d column %d", int(lane), int(c));
  }
  for (int64_t lane = 0; lane < lanes; ++lane) {
    double largest = -INFINITY, sum = 0.0;
    for (double score : seen[lane]) largest = std::fmax(largest, score);
    for (double score : seen[lane])
      if (largest > -INFINITY) sum += std::exp2(score - largest);
    const bool close =
        std::isnan(sum) ? std::isnan(row_sum[lane]) : std::abs(row_sum[lane] - sum) <= 1e-5 * sum;
    SEER_CHECK(close, "lane %d: sum %g, expected %g", int(lane), row_sum[lane], sum);
    SEER_CHECK(row_max[lane] == largest, "lane %d: maximum %g", int(lane), row_max[lane]);
  }
}

void test_tiles(const Kernels& kernels) {
  for (DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
    const int64_t rows = 5, cols = 43, stride = 61;
    Random random(9);
    Buffer source(dtype, rows * stride, 0.0f), target(dtype, rows * stride, 7.0f);
    for (int64_t i = 0; i < rows * stride; ++i) source.set(i, float(random.normal() * 100));
    source.set(3, kNaN);
    source.set(4, -kInfinity);
    source.set(5, 3e-6f);  // a float16 subnormal
    std::vector<float> tile(rows * cols);
    kernels.load_tile(dtype, source.data(), stride, rows, cols, tile.data());
    kernels.store_tile(dtype, tile.data(), rows, cols, target.data(), stride);
    for (int64_t i = 0; i < rows * stride; ++i) {
      const int64_t row = i / stride, col = i % stride;
      const float expected = col < cols ? source.get(i) : 7.0f;
      SEER_CHECK(std::isnan(expected) ? std::isnan(target.get(i)) : target.get(i) == expected,
                 "%s element %d: %g, expected %g", name_of(dtype), int(i), target.get(i), expected);
      if (col < cols && !std::isnan(expected))
        SEER_CHECK(tile[row * cols + col] == expected, "%s load %d", name_of(dtype), int(i));
    }
  }
}

void test_pool(const Kernels& kernels) {
  const int64_t rows = 6, cols = 21;
  for (int64_t nan_row = -1; nan_row < rows; ++nan_row) {
    Random random(11);
    std::vector<float> tile(rows * cols), max(cols), min(cols), mean(cols);
    fill(random, tile.data(), rows * cols);
    if (nan_row >= 0) tile[nan_row * cols + 4] = kNaN;
    kernels.pool(tile.data(), rows, cols, max.data(), min.data(), mean.data());
    kernels.pool(tile.data(), rows, cols, nullptr, nullptr, nullptr);
    for (int64_t c = 0; c < cols; ++c) {
      float largest = -kInfinity, smallest = kInfinity;
      double sum = 0.0;
      for (int64_t r = 0; r < rows; ++r) {
        largest = std::fmax(largest, tile[r * cols + c]);
        smallest = std::fmin(smallest, tile[r * cols + c]);
        sum += tile[r * cols + c];
      }
      if (nan_row >= 0 && c == 4) {
        SEER_CHECK(std::isnan(max[c]) && std::isnan(min[c]) && std::isnan(mean[c]),
                   "NaN in row %d: %g %g %g", int(nan_row), max[c], min[c], mean[c]);
        continue;
      }
      SEER_CHECK(max[c] == largest && min[c] == smallest, "column %d", int(c));
      SEER_CHECK(std::abs(mean[c] - sum / rows) < 1e-6, "column %d: mean %g", int(c), mean[c]);
    }
  }
}

}  // namespace

int main() {
  test_exp2();
  for (seer::cpu::Isa isa : seer::test::isas()) {
    for (int64_t rows_of_chunk : {16, 64}) {
      const Kernels& kernels = seer::cpu::kernels_for(rows_of_chunk, isa);
      for (int64_t rows = 1; rows <= 17; ++rows)
        for (int64_t depth : {1, 8, 33}) test_products(kernels, rows, depth);
      test_products(kernels, 64, 256);
      test_softmax(kernels);
      test_tiles(kernels);
      test_pool(kernels);
    }
  }
  return seer::test::report("cpu_kernels");
}
