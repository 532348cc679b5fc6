// SPDX-License-Identifier: Apache-2.0
// Instantiates the CPU kernels for each instruction set. Only these wrappers carry a target
// attribute: one baseline object file serves every x86-64 machine, and no inline function of the
// standard library is ever compiled for more than the baseline.
#include "common/cpu_kernels.h"
#include "common/cpu_kernels_impl.h"

namespace seer::cpu {

// One namespace of wrappers and their table: the bodies are inlined into functions that carry
// TARGET. A macro because an attribute can be neither a template argument nor inherited.
#define SEER_CPU_KERNELS(NAME, TARGET, ...)                                                     \
  namespace NAME {                                                                              \
  using Set = KernelSet<__VA_ARGS__>;                                                           \
  TARGET void load_tile(DType dtype, const void* src, int64_t row_stride, int64_t rows,         \
                        int64_t cols, float* dst) {                                             \
    Set::load_tile(dtype, src, row_stride, rows, cols, dst);                                    \
  }                                                                                             \
  TARGET void store_tile(DType dtype, const float* src, int64_t rows, int64_t cols, void* dst,  \
                         int64_t row_stride) {                                                  \
    Set::store_tile(dtype, src, rows, cols, dst, row_stride);                                   \
  }                                                                                             \
  TARGET void multiply(const float* a, int64_t rows, int64_t depth, const float* b, float* c) { \
    Set::multiply(a, rows, depth, b, c);                                                        \
  }                                                                                             \
  TARGET void accumulate(const float* a, int64_t depth, int64_t rows, const float* b,           \
                         const float* carry, float* c) {                                        \
    Set::accumulate(a, depth, rows, b, carry, c);                                               \
  }                                                                                             \
  TARGET void softmax_step(float* scores, int64_t cols, const int32_t* visible, float* row_max, \
                           float* row_sum, float* carry, float* tile_max, float* tile_sum) {    \
    Set::softmax_step(scores, cols, visible, row_max, row_sum, carry, tile_max, tile_sum);      \
  }                                                                                             \
  TARGET void probabilities(float* maxima, int64_t tiles, const float* row_max,                 \
                            const float* inverse_sum) {                                         \
    Set::probabilities(maxima, tiles, row_max, inverse_sum);                                    \
  }                                                                                             \
  TARGET void pool(const float* tile, int64_t rows, int64_t cols, float* max, float* min,       \
                   float* mean) {                                                               \
    Set::pool(tile, rows, cols, max, min, mean);                                                \
  }                                                                                             \
  constexpr Kernels kTable{Set::kChunk, load_tile,    store_tile,    multiply,                  \
                           accumulate,  softmax_step, probabilities, pool};                     \
  }

namespace {

#if defined(__x86_64__)
// 32 registers of 16 floats; the narrow set is for query blocks of 16 rows and for decoding.
SEER_CPU_KERNELS(avx512, [[gnu::target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]], 16, 2, 8)
SEER_CPU_KERNELS(avx512_narrow, [[gnu::target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]], 16,
                 1, 8)
// 16 registers of 8 floats.
SEER_CPU_KERNELS(avx2, [[gnu::target("avx2,fma")]], 8, 2, 4)
#endif
#if defined(__aarch64__)
// 32 registers of 4 floats.
SEER_CPU_KERNELS(baseline, , 4, 4, 4)
#else
SEER_CPU_KERNELS(baseline, , 4, 2, 4)
#endif

}  // namespace

#undef SEER_CPU_KERNELS

Isa best_isa() {
#if defined(__x86_64__)
  static const Isa isa = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kBaseline;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? Isa::kAvx512 : Isa::kAvx2;
  }();
  return isa;
#else
  return Isa::kBaseline;
#endif
}

const Kernels& kernels_for([[maybe_unused]] int64_t rows, [[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512)
    return rows <= avx512_narrow::kTable.lanes ? avx512_narrow::kTable : avx512::kTable;
  if (isa == Isa::kAvx2) return avx2::kTable;
#endif
  return baseline::kTable;
}

}  // namespace seer::cpu
