// SPDX-License-Identifier: Apache-2.0
// One case is one problem to time; a sweep is every combination of the lists on the command line.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "names.h"

namespace seer::bench {

struct Block {
  int q = 64, kv = 64;
};

struct Case {
  Op op = Op::kBlockSparseAttn;
  DType dtype = DType::kBFloat16;
  int batch = 1, heads_q = 32, heads_kv = 8, head_dim = 128;
  int64_t rows_q = 0, rows_kv = 0;
  Block block;
  bool causal = true;
  MaskKind mask = MaskKind::kRandom;
  double density = 1.0;
  int arch = 0;  // 0: the newest family that serves the call
  bool per_token = false;
  PoolReduce reduce = PoolReduce::kMax;
  Side side = Side::kK;
  int pools = kPoolAvg;
  SelectMethod method = SelectMethod::kThreshold;
  double value = 0.0;

  int64_t blocks_q() const { return ceil_div(rows_q, block.q); }
  int64_t blocks_kv() const { return ceil_div(rows_kv, block.kv); }
};

// The lists of the command line; what is empty follows from the rest.
struct Sweep {
  Op op = Op::kBlockSparseAttn;
  std::vector<int64_t> rows = {32768}, rows_kv = {};  // rows_kv empty: as rows
  std::vector<int> batch = {1}, heads_q = {32}, heads_kv = {8}, head_dim = {128};
  std::vector<Block> block = {{64, 64}};
  std::vector<DType> dtype = {DType::kBFloat16};
  std::vector<bool> causal = {true};
  std::vector<MaskKind> mask = {MaskKind::kRandom};
  std::vector<double> density = {0.1};
  std::vector<int> arch = {0};
  std::vector<bool> per_token = {false};
  std::vector<PoolReduce> reduce = {PoolReduce::kMax};
  std::vector<Side> side = {Side::kK};
  std::vector<int> pools = {};  // empty: avg for q, max, min and avg for k
  std::vector<SelectMethod> method = {SelectMethod::kThreshold};
  std::vector<double> value = {};  // empty: default_value(method)
};

// The rule's parameter where none is given: threshold 0.002, topk 64, density 0.1, topp 0.9.
double default_value(SelectMethod method);

// Every combination, the first lists changing slowest. A case without a mask has density 1 and
// appears once, however many densities there are.
std::vector<Case> expand(const Sweep& sweep);

// "maxminavg" for kPoolMax | kPoolMin | kPoolAvg.
std::string name_of_pools(int pools);
int count_of_pools(int pools);

// A named value of a row of the report. Numbers are written without quotes in JSON.
struct Field {
  std::string name, text;
  bool number = true;
};

// The fields of a case that matter to its op.
std::vector<Field> fields_of(const Case& c);

}  // namespace seer::bench
