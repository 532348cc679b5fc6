// SPDX-License-Identifier: Apache-2.0
// Bodies of the Kernels table. KernelSet<kLanes, kVectors, kTileRows>: kLanes floats per vector,
// kVectors vectors per chunk, kTileRows rows of the register tile of the two products. The
// kTileRows * kVectors accumulators hide the latency of the multiply-adds and, with kVectors
// operands and a broadcast, must fit in the register file.
#pragma once

#include <cstdint>
#include <limits>

#include "common/cpu_dtype.h"
#include "common/cpu_kernels.h"
#include "common/cpu_simd.h"

namespace seer::cpu {

template <int kLanes, int kVectors, int kTileRows>
struct KernelSet {
  using Float = typename Lanes<kLanes>::Float;
  using Int = typename Lanes<kLanes>::Int;
  static constexpr int kChunk = kLanes * kVectors;
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  [[gnu::always_inline]] static void load_tile(DType dtype, const void* src, int64_t row_stride,
                                               int64_t rows, int64_t cols, float* dst) {
    const auto* narrow = static_cast<const uint16_t*>(src);
    const auto* wide = static_cast<const float*>(src);
    for (int64_t r = 0; r < rows; ++r, dst += cols) {
      switch (dtype) {
        case DType::kFloat32:
          for (int64_t c = 0; c < cols; ++c) dst[c] = wide[r * row_stride + c];
          break;
        case DType::kBFloat16:
          for (int64_t c = 0; c < cols; ++c) dst[c] = bfloat16_to_float(narrow[r * row_stride + c]);
          break;
        case DType::kFloat16:
          for (int64_t c = 0; c < cols; ++c) dst[c] = float16_to_float(narrow[r * row_stride + c]);
          break;
      }
    }
  }

  [[gnu::always_inline]] static void store_tile(DType dtype, const float* src, int64_t rows,
                                                int64_t cols, void* dst, int64_t row_stride) {
    auto* narrow = static_cast<uint16_t*>(dst);
    auto* wide = static_cast<float*>(dst);
    for (int64_t r = 0; r < rows; ++r, src += cols) {
      switch (dtype) {
        case DType::kFloat32:
          for (int64_t c = 0; c < cols; ++c) wide[r * row_stride + c] = src[c];
          break;
        case DType::kBFloat16:
          for (int64_t c = 0; c < cols; ++c) narrow[r * row_stride + c] = float_to_bfloat16(src[c]);
          break;
        case DType::kFloat16:
          for (int64_t c = 0; c < cols; ++c) narrow[r * row_stride + c] = float_to_float16(src[c]);
          break;
      }
    }
  }

  // One register tile: c [kRows][kChunk] = (carry ? c * carry : 0) + A x b, where element (i, k)
  // of A lies at a + i * row_step + k * depth_step.
  template <int kRows>
  [[gnu::always_inline]] static void register_tile(const float* a, int64_t row_step,
                                                   int64_t depth_step, int64_t depth,
                                                   const float* b, const float* carry, float* c) {
    const auto* bv = reinterpret_cast<const Float*>(b);
    auto* cv = reinterpret_cast<Float*>(c);
    Float acc[kRows][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        acc[i][v] = carry == nullptr
                        ? Float{}
                        : cv[i * kVectors + v] * reinterpret_cast<const Float*>(carry)[v];
    }
    for (int64_t k = 0; k < depth; ++k) {
      Float operand[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) operand[v] = bv[k * kVectors + v];
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const float element = a[i * row_step + k * depth_step];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[i][v] += operand[v] * element;
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) cv[i * kVectors + v] = acc[i][v];
    }
  }

  // Register tiles down the rows: as many of kRows as fit, the rest in halves.
  template <int kRows = kTileRows>
  [[gnu::always_inline]] static void product(const float* a, int64_t row_step, int64_t depth_step,
                                             int64_t rows, int64_t depth, const float* b,
                                             const float* carry, float* c) {
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows)
      register_tile<kRows>(a + i * row_step, row_step, depth_step, depth, b, carry, c + i * kChunk);
    if constexpr (kRows > 1)
      product<kRows / 2>(a + i * row_step, row_step, depth_step, rows - i, depth, b, carry,
                         c + i * kChunk);
  }

  [[gnu::always_inline]] static void multiply(const float* a, int64_t rows, int64_t depth,
                                              const float* b, float* c) {
    product(a, depth, 1, rows, depth, b, nullptr, c);
  }

  [[gnu::always_inline]] static void accumulate(const float* a, int64_t depth, int64_t rows,
                                                const float* b, const float* carry, float* c) {
    product(a, 1, rows, rows, depth, b, carry, c);
  }

  [[gnu::always_inline]] static void softmax_step(float* scores, int64_t cols,
                                                  const int32_t* visible, float* row_max,
                                                  float* row_sum, float* carry, float* tile_max,
                                                  float* tile_sum) {
    for (int v = 0; v < kVectors; ++v) {
      auto* column = reinterpret_cast<Float*>(scores) + v;
      auto& old_max = reinterpret_cast<Float*>(row_max)[v];
      Float maximum = Float{} - kInfinity;
      if (visible != nullptr) {
        const Int limit = reinterpret_cast<const Int*>(visible)[v];
        for (int64_t c = 0; c < cols; ++c) {
          Float& score = column[c * kVectors];
          score = limit > static_cast<int32_t>(c) ? score : Float{} - kInfinity;
        }
      }
      for (int64_t c = 0; c < cols; ++c) {
        const Float score = column[c * kVectors];
        maximum = score > maximum ? score : maximum;
      }
      if (tile_max != nullptr) reinterpret_cast<Float*>(tile_max)[v] = maximum;
      maximum = old_max > maximum ? old_max : maximum;
      // A row that has seen nothing but -inf subtracts 0: -inf - (-inf) would be NaN.
      const Float base = maximum == -kInfinity ? Float{} : maximum;
      Float factor = old_max - base;
      exp2_in_place<kLanes>(factor);
      reinterpret_cast<Float*>(carry)[v] = factor;
      old_max = maximum;
      Float sum{};
      for (int64_t c = 0; c < cols; ++c) {
        Float score = column[c * kVectors] - base;
        exp2_in_place<kLanes>(score);
        column[c * kVectors] = score;
        sum += score;
      }
      auto& total = reinterpret_cast<Float*>(row_sum)[v];
      total = total * factor + sum;
      if (tile_sum != nullptr) reinterpret_cast<Float*>(tile_sum)[v] = sum;
    }
  }

  [[gnu::always_inline]] static void probabilities(float* maxima, int64_t tiles,
                                                   const float* row_max, const float* inverse_sum) {
    for (int v = 0; v < kVectors; ++v) {
      const Float maximum = reinterpret_cast<const Float*>(row_max)[v];
      const Float base = maximum == -kInfinity ? Float{} : maximum;
      const Float inverse = reinterpret_cast<const Float*>(inverse_sum)[v];
      for (int64_t t = 0; t < tiles; ++t) {
        Float& value = reinterpret_cast<Float*>(maxima)[t * kVectors + v];
        Float power = value - base;
        exp2_in_place<kLanes>(power);
        value = power * inverse;
      }
    }
  }

  [[gnu::always_inline]] static void pool(const float* tile, int64_t rows, int64_t cols, float* max,
                                          float* min, float* mean) {
    for (int64_t r = 0; r < rows; ++r, tile += cols) {
      if (r == 0) {
        for (float* out : {max, min, mean})
          for (int64_t c = 0; out != nullptr && c < cols; ++c) out[c] = tile[c];
        continue;
      }
      // `!(a <= b)` also takes a new NaN; an old one stays because every comparison with it and
      // the extra test are false.
      for (int64_t c = 0; max != nullptr && c < cols; ++c)
        max[c] = max[c] == max[c] && !(tile[c] <= max[c]) ? tile[c] : max[c];
      for (int64_t c = 0; min != nullptr && c < cols; ++c)
        min[c] = min[c] == min[c] && !(tile[c] >= min[c]) ? tile[c] : min[c];
      for (int64_t c = 0; mean != nullptr && c < cols; ++c) mean[c] += tile[c];
    }
    for (int64_t c = 0; mean != nullptr && c < cols; ++c) mean[c] /= static_cast<float>(rows);
  }
};

}  // namespace seer::cpu
