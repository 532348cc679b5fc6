// SPDX-License-Identifier: Apache-2.0
// Launcher of the Hopper block-sparse attention kernel; generated files instantiate it (variant.h).
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "block_sparse_attn/score_scale.h"
#include "block_sparse_attn/sm90_kernel.cuh"
#include "block_sparse_attn/variant.h"
#include "common/shared_memory_limit.cuh"

namespace seer {

// The driver's encoder of tensor maps. Asked for at run time: the library does not link to the
// driver, so that it loads on machines without one.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static std::atomic<PFN_cuTensorMapEncodeTiled_v12000> known{nullptr};
  auto encoder = known.load(std::memory_order_relaxed);
  if (encoder != nullptr) return encoder;
  constexpr const char* kName = "cuTensorMapEncodeTiled";
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(kName, &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(kName, &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) cudaGetLastError();  // told by the caller, not left for others
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  encoder = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  known.store(encoder, std::memory_order_relaxed);
  return encoder;
}

// The tensor that TMA sees, in tiles of 64 rows of one head:
//   batched  [64 columns, rows, heads, batch, head_dim / 64]; rows past the end read as zeros
//   packed   [64 columns, 64, heads, total + 64, head_dim / 64]: dimension 3 is the packed row at
//            which a window of 64 rows begins, plus 64, and dimension 1 the row in that window. A
//            box that starts at row r of a window holds 64 - r rows and then zeros: so a sequence
//            can end although the tensor goes on.
inline cudaError_t encode_rows(CUtensorMap* map, const ConstView& view, DType dtype, int head_dim,
                               int64_t rows, int heads, int64_t batch, bool packed) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  constexpr cuuint32_t kBoxRows = 64, kBoxCols = 64;
  // A dimension of size 1 never uses its stride, which may then be anything.
  const auto bytes = [](int64_t stride, int64_t size) {
    return static_cast<cuuint64_t>(size > 1 ? 2 * stride : 16);
  };
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(std::max<int64_t>(n, 1)); };
  auto address = reinterpret_cast<uintptr_t>(view.data);
  cuuint64_t sizes[5] = {kBoxCols, size(rows), size(heads), size(batch), size(head_dim / kBoxCols)};
  cuuint64_t strides[4] = {bytes(view.row_stride, rows), bytes(view.head_stride, heads),
                           bytes(view.batch_stride, batch), 2 * kBoxCols};
  if (packed) {
    sizes[1] = kBoxRows;
    sizes[3] = size(rows + kBoxRows);
    strides[2] = strides[0];
    address -= kBoxRows * strides[0];
  }
  const cuuint32_t box[5] = {kBoxCols, kBoxRows, 1, 1, static_cast<cuuint32_t>(sizes[4])};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const auto type = dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                              : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto ask = [&] {
    return encode(map, type, 5, reinterpret_cast<void*>(address), sizes, strides, box, steps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = ask();
  if (result != CUDA_SUCCESS) {
    // The driver wants a current context, which a host thread that never called the runtime lacks:
    // memory from a caching allocator takes no call. cudaSetDevice makes it current, in captures too.
    int device = 0;
    if (cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess)
      result = ask();
  }
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// What the launcher asks a device once.
struct Sm90Device {
  int processors = 0;
  int cache_bytes = 0;

  static cudaError_t current(Sm90Device* result) {
    constexpr int kDevices = 64;
    static std::atomic<uint64_t> known[kDevices];  // processors, cache_bytes; 0: not asked yet
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    const uint64_t packed = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
    if (packed != 0) {
      *result = {static_cast<int>(packed >> 32), static_cast<int>(packed & 0xffffffffu)};
      return cudaSuccess;
    }
    error = cudaDeviceGetAttribute(&result->processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&result->cache_bytes, cudaDevAttrL2CacheSize, device);
    }
    if (error == cudaSuccess && device < kDevices) {
      known[device].store(static_cast<uint64_t>(result->processors) << 32 |
                              static_cast<uint32_t>(result->cache_bytes),
                          std::memory_order_relaxed);
    }
    return error;
  }
};

template <class Traits>
cudaError_t to_sm90_params(const BlockSparseAttnParams& params, int cache_bytes,
                           Sm90Params* result) {
  Sm90Params& p = *result;
  const bool packed = params.cu_seqlens_q != nullptr;
  const int64_t rows_q = packed ? params.total_q : params.rows_q;
  const int64_t rows_kv = packed ? params.total_kv : params.rows_kv;
  const auto encode = [&](CUtensorMap* map, const ConstView& view, int64_t rows, int heads) {
    return encode_rows(map, view, params.dtype, params.head_dim, rows, heads, params.batch, packed);
  };
  cudaError_t error = encode(&p.q, params.q, rows_q, params.heads_q);
  if (error == cudaSuccess) error = encode(&p.k, params.k, rows_kv, params.heads_kv);
  if (error == cudaSuccess) error = encode(&p.v, params.v, rows_kv, params.heads_kv);
  if (error != cudaSuccess) return error;

  p.out = params.out.data;
  p.lse = params.lse;
  p.bits = reinterpret_cast<const uint32_t*>(params.block_bits.data);
  p.cu_seqlens_q = params.cu_seqlens_q;
  p.cu_seqlens_kv = params.cu_seqlens_kv;
  p.next_tile = params.workspace;
  p.out_batch_stride = params.out.batch_stride;
  p.out_row_stride = params.out.row_stride;
  p.out_head_stride = params.out.head_stride;
  p.lse_batch_stride = params.lse_batch_stride;
  p.lse_head_stride = params.lse_head_stride;
  p.bits_batch_stride = params.block_bits.batch_stride;
  p.bits_head_stride = params.block_bits.head_stride;
  p.bits_row_stride = params.block_bits.row_stride;
  p.total_q = params.total_q;
  p.total_kv = params.total_kv;
  p.batch = params.batch;
  p.heads_kv = params.heads_kv;
  p.group = params.heads_q / params.heads_kv;
  p.rows_q = static_cast<int>(params.rows_q);
  p.rows_kv = static_cast<int>(params.rows_kv);
  p.heads_per_bits = p.bits == nullptr ? params.heads_q : params.heads_q / params.block_bits.heads;
  // A good half of the cache: the rest sees queries and outputs pass.
  p.rows_in_cache = cache_bytes / 16 * 9 / (2 * 2 * params.head_dim);
  // With fewer row blocks than consumers, rows of one head would leave consumers without work.
  p.share_group = p.bits == nullptr || params.block_bits.heads <= params.heads_kv ||
                  params.rows_q <= (Traits::kConsumers - 1) * Traits::kRows;
  p.wide_q = params.block_q == 128;
  p.wide_kv = params.block_kv == 128;
  p.causal = params.causal;
  const ScoreScale scale = score_scale(params.scale);
  p.scale_log2 = scale.log2;
  p.score_sign = scale.sign;
  return cudaSuccess;
}

// Enqueues the kernel with its parameters.
template <class Traits>
cudaError_t enqueue_sm90(typename Traits::Params& p, int processors, cudaStream_t stream) {
  constexpr auto kKernel = &dev::block_sparse_attn_sm90<Traits>;
  cudaError_t error = allow_shared_memory<kKernel>(Traits::kSmemBytes);
  if (error != cudaSuccess) return error;
  p.by = dev::TileOrder<Traits>::divisors(p);
  const int64_t tiles =
      int64_t{p.batch} * p.heads_kv * dev::TileOrder<Traits>::tiles_of_head(p, p.rows_q);
  const auto grid = static_cast<unsigned>(std::min<int64_t>(tiles, processors));
  if (tiles <= processors) {
    p.next_tile = nullptr;  // every CTA's first tile is its only one
  } else {
    error = cudaMemsetAsync(p.next_tile, 0, sizeof(int), stream);
    if (error != cudaSuccess) return error;
  }
  kKernel<<<grid, Traits::kThreads, Traits::kSmemBytes, stream>>>(p);
  return cudaGetLastError();
}

template <class Traits>
cudaError_t launch_sm90(const BlockSparseAttnParams& params, cudaStream_t stream) {
  Sm90Device device;
  cudaError_t error = Sm90Device::current(&device);
  if (error != cudaSuccess) return error;
  Sm90Params p;
  error = to_sm90_params<Traits>(params, device.cache_bytes, &p);
  if (error != cudaSuccess) return error;
  return enqueue_sm90<Traits>(p, device.processors, stream);
}

template <BlockSparseAttnKey kKey>
int launch_variant(const BlockSparseAttnParams& params, CUstream_st* stream) {
  using Traits = Sm90Traits<kKey>;
  static_assert(kKey.threads == Traits::kThreads, "variants.json: threads is not the kernel's");
  static_assert(kKey.smem_bytes == Traits::kSmemBytes,
                "variants.json: smem_bytes is not the kernel's");
  return static_cast<int>(launch_sm90<Traits>(params, stream));
}

}  // namespace seer
