// SPDX-License-Identifier: Apache-2.0
// What the command line, the report and the code call the same things: one table per choice.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>

#include "seer/attn_pool.h"
#include "seer/pool_gate.h"
#include "seer/types.h"

namespace seer::bench {

enum class Op { kBlockSparseAttn, kAttnPool, kPoolGate, kPoolGatePair, kGateScores, kGateSelect };
enum class MaskKind { kDense, kRandom, kKvHead, kStructured };
enum class Side { kQ, kK };
enum class L2 { kHot, kCold };
enum class Protocol { kSustained, kBurst };
enum class Format { kTable, kCsv, kJson };

template <class T>
struct Named {
  std::string_view name;
  T value;
};

template <class T>
struct Names;  // kAll: every value that has a name

template <>
struct Names<Op> {
  static constexpr Named<Op> kAll[] = {{"block_sparse_attn", Op::kBlockSparseAttn},
                                       {"attn_pool", Op::kAttnPool},
                                       {"pool_gate", Op::kPoolGate},
                                       {"pool_gate_pair", Op::kPoolGatePair},
                                       {"gate_scores", Op::kGateScores},
                                       {"gate_select", Op::kGateSelect}};
};
template <>
struct Names<MaskKind> {
  static constexpr Named<MaskKind> kAll[] = {{"dense", MaskKind::kDense},
                                             {"random", MaskKind::kRandom},
                                             {"kv_head", MaskKind::kKvHead},
                                             {"structured", MaskKind::kStructured}};
};
template <>
struct Names<Side> {
  static constexpr Named<Side> kAll[] = {{"q", Side::kQ}, {"k", Side::kK}};
};
template <>
struct Names<L2> {
  static constexpr Named<L2> kAll[] = {{"hot", L2::kHot}, {"cold", L2::kCold}};
};
template <>
struct Names<Protocol> {
  static constexpr Named<Protocol> kAll[] = {{"sustained", Protocol::kSustained},
                                             {"burst", Protocol::kBurst}};
};
template <>
struct Names<Format> {
  static constexpr Named<Format> kAll[] = {
      {"table", Format::kTable}, {"csv", Format::kCsv}, {"json", Format::kJson}};
};
template <>
struct Names<DType> {  // the dtypes of the CUDA kernels
  static constexpr Named<DType> kAll[] = {{"bfloat16", DType::kBFloat16},
                                          {"float16", DType::kFloat16},
                                          {"bf16", DType::kBFloat16},
                                          {"fp16", DType::kFloat16}};
};
template <>
struct Names<PoolReduce> {
  static constexpr Named<PoolReduce> kAll[] = {{"max", PoolReduce::kMax},
                                               {"sum", PoolReduce::kSum}};
};
template <>
struct Names<SelectMethod> {
  static constexpr Named<SelectMethod> kAll[] = {{"threshold", SelectMethod::kThreshold},
                                                 {"topk", SelectMethod::kTopK},
                                                 {"density", SelectMethod::kDensity},
                                                 {"topp", SelectMethod::kTopP}};
};

// The first name of a value.
template <class T>
std::string name_of(T value) {
  const auto found = std::find_if(std::begin(Names<T>::kAll), std::end(Names<T>::kAll),
                                  [&](const Named<T>& named) { return named.value == value; });
  return std::string(found->name);
}

// "dense, random, kv_head or structured"
template <class T>
std::string all_names() {
  std::string text;
  const size_t count = std::size(Names<T>::kAll);
  for (size_t i = 0; i < count; ++i) {
    if (i > 0) text += i + 1 == count ? " or " : ", ";
    text += Names<T>::kAll[i].name;
  }
  return text;
}

}  // namespace seer::bench
