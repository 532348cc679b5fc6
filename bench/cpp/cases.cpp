// SPDX-License-Identifier: Apache-2.0
#include "cases.h"

#include <bit>
#include <cstdio>
#include <utility>

namespace seer::bench {
namespace {

// Every case once for each value, in place.
template <class T, class Set>
void vary(std::vector<Case>* cases, const std::vector<T>& values, const Set& set) {
  std::vector<Case> varied;
  for (const Case& c : *cases) {
    for (const T& value : values) {
      varied.push_back(c);
      set(varied.back(), value);
    }
  }
  *cases = std::move(varied);
}

void vary_density(std::vector<Case>* cases, const std::vector<double>& values) {
  std::vector<Case> varied;
  for (const Case& c : *cases) {
    const bool dense = c.mask == MaskKind::kDense;
    for (const double value : dense ? std::vector<double>{1.0} : values) {
      varied.push_back(c);
      varied.back().density = value;
    }
  }
  *cases = std::move(varied);
}

std::string shortest(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

}  // namespace

double default_value(SelectMethod method) {
  switch (method) {
    case SelectMethod::kThreshold: return 2e-3;
    case SelectMethod::kTopK: return 64;
    case SelectMethod::kDensity: return 0.1;
    case SelectMethod::kTopP: return 0.9;
  }
  return 0.0;
}

std::string name_of_pools(int pools) {
  std::string name;
  if (pools & kPoolMax) name += "max";
  if (pools & kPoolMin) name += "min";
  if (pools & kPoolAvg) name += "avg";
  return name;
}

int count_of_pools(int pools) { return std::popcount(static_cast<unsigned>(pools)); }

std::vector<Case> expand(const Sweep& sweep) {
  std::vector<Case> cases(1);
  cases[0].op = sweep.op;
  vary(&cases, sweep.rows, [](Case& c, int64_t rows) { c.rows_q = c.rows_kv = rows; });
  if (!sweep.rows_kv.empty()) {
    vary(&cases, sweep.rows_kv, [](Case& c, int64_t rows) { c.rows_kv = rows; });
  }
  vary(&cases, sweep.batch, [](Case& c, int batch) { c.batch = batch; });
  vary(&cases, sweep.heads_q, [](Case& c, int heads) { c.heads_q = heads; });
  vary(&cases, sweep.heads_kv, [](Case& c, int heads) { c.heads_kv = heads; });
  vary(&cases, sweep.head_dim, [](Case& c, int dim) { c.head_dim = dim; });
  vary(&cases, sweep.dtype, [](Case& c, DType dtype) { c.dtype = dtype; });
  vary(&cases, sweep.block, [](Case& c, Block block) { c.block = block; });
  vary(&cases, sweep.causal, [](Case& c, bool causal) { c.causal = causal; });
  if (sweep.op == Op::kBlockSparseAttn) {
    vary(&cases, sweep.mask, [](Case& c, MaskKind mask) { c.mask = mask; });
    vary_density(&cases, sweep.density);
  } else {
    for (Case& c : cases) c.mask = MaskKind::kDense;
  }
  vary(&cases, sweep.arch, [](Case& c, int arch) { c.arch = arch; });
  if (sweep.op == Op::kAttnPool) {
    vary(&cases, sweep.reduce, [](Case& c, PoolReduce reduce) { c.reduce = reduce; });
    vary(&cases, sweep.per_token, [](Case& c, bool per_token) { c.per_token = per_token; });
  }
  if (sweep.op == Op::kPoolGate) vary(&cases, sweep.side, [](Case& c, Side s) { c.side = s; });
  for (Case& c : cases) {
    c.pools = c.side == Side::kQ ? int{kPoolAvg} : kPoolMax | kPoolMin | kPoolAvg;
  }
  if (!sweep.pools.empty()) {
    vary(&cases, sweep.pools, [](Case& c, int pools) { c.pools = pools; });
  }
  if (sweep.op == Op::kGateSelect) {
    vary(&cases, sweep.method, [](Case& c, SelectMethod method) {
      c.method = method;
      c.value = default_value(method);
    });
    if (!sweep.value.empty()) {
      vary(&cases, sweep.value, [](Case& c, double value) { c.value = value; });
    }
  }
  return cases;
}

std::vector<Field> fields_of(const Case& c) {
  std::vector<Field> fields = {
      {"op", name_of(c.op), false},           {"dtype", name_of(c.dtype), false},
      {"batch", std::to_string(c.batch)},     {"rows_q", std::to_string(c.rows_q)},
      {"rows_kv", std::to_string(c.rows_kv)}, {"heads_q", std::to_string(c.heads_q)}};
  const bool ranks = c.op == Op::kGateScores || c.op == Op::kGateSelect;
  if (!ranks) fields.push_back({"heads_kv", std::to_string(c.heads_kv)});
  fields.push_back({"head_dim", std::to_string(c.head_dim)});
  fields.push_back({"block_q", std::to_string(c.block.q)});
  fields.push_back({"block_kv", std::to_string(c.block.kv)});
  const auto add_causal = [&] { fields.push_back({"causal", c.causal ? "1" : "0"}); };
  switch (c.op) {
    case Op::kBlockSparseAttn:
      add_causal();
      fields.push_back({"mask", name_of(c.mask), false});
      fields.push_back({"density", shortest(c.density)});
      break;
    case Op::kAttnPool:
      add_causal();
      fields.push_back({"reduce", name_of(c.reduce), false});
      fields.push_back({"per_token", c.per_token ? "1" : "0"});
      break;
    case Op::kPoolGate: fields.push_back({"side", name_of(c.side), false}); [[fallthrough]];
    case Op::kPoolGatePair: fields.push_back({"pools", name_of_pools(c.pools), false}); break;
    case Op::kGateScores: add_causal(); break;
    case Op::kGateSelect:
      add_causal();
      fields.push_back({"method", name_of(c.method), false});
      fields.push_back({"value", shortest(c.value)});
      break;
  }
  return fields;
}

}  // namespace seer::bench
