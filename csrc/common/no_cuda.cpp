// SPDX-License-Identifier: Apache-2.0
// The launch functions of a CPU-only build: they say so, and nothing else.
#include "seer/attn_pool.h"
#include "seer/block_bits.h"
#include "seer/block_sparse_attn.h"
#include "seer/pool_gate.h"

namespace seer {
namespace {

Status no_cuda(const char* argument) {
  return Status::unsupported(std::string(argument) +
                             ": expected a CPU tensor, got a CUDA tensor: this build of seer_cuda "
                             "has no CUDA kernels. Reinstall it on a machine with nvcc (or with "
                             "the nvidia-cuda-nvcc wheels), or move the tensors to the CPU.");
}

}  // namespace

Status launch_block_sparse_attn(const BlockSparseAttnParams&, CUstream_st*) { return no_cuda("q"); }
Status launch_attn_pool(const AttnPoolParams&, CUstream_st*) { return no_cuda("q"); }
Status attn_pool_workspace(const AttnPoolParams&, int64_t*) { return no_cuda("q"); }
Status launch_pack_block_bits(const PackBlockBitsParams&, CUstream_st*) { return no_cuda("mask"); }
Status launch_unpack_block_bits(const UnpackBlockBitsParams&, CUstream_st*) {
  return no_cuda("block_bits");
}
Status launch_block_bits_from_indices(const BlockBitsFromIndicesParams&, CUstream_st*) {
  return no_cuda("indices");
}
bool pool_gate_served(const PoolGateParams*, int) { return false; }
bool gate_scores_served(const GateScoresParams&) { return false; }
bool gate_select_served(const GateSelectParams&) { return false; }
Status launch_pool_gate(const PoolGateParams*, int, CUstream_st*) { return no_cuda("x"); }
Status launch_gate_scores(const GateScoresParams&, CUstream_st*) { return no_cuda("q_gate"); }
Status launch_gate_select(const GateSelectParams&, CUstream_st*) { return no_cuda("q_gate"); }

}  // namespace seer
