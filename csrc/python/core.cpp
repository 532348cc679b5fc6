// SPDX-License-Identifier: Apache-2.0
// seer_cuda._core: what this build holds and why it would refuse a problem. Needs neither torch nor
// a GPU, so it answers on any machine. Also packs and unpacks block bits over numpy.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "build_info.h"
#include "seer/attn_pool.h"
#include "seer/block_bits.h"
#include "seer/block_sparse_attn.h"
#include "seer/pool_gate.h"

namespace py = pybind11;

namespace {

struct Resources {
  const char* name;
  const char* arch;
  int registers;
};
// Written by cmake/ptxas_report.py from the compiler's own report; empty in a CPU-only build. The
// closing row keeps the array from being empty.
constexpr Resources kResources[] = {
#include "kernel_resources.inc"
    {nullptr, nullptr, 0}};

constexpr bool kHasCuda = sizeof(kCudaVersion) > 1;

seer::DType dtype_from(const std::string& name) {
  for (auto dtype : {seer::DType::kFloat16, seer::DType::kBFloat16, seer::DType::kFloat32})
    if (name == seer::name_of(dtype)) return dtype;
  throw py::value_error("dtype: expected 'float16', 'bfloat16' or 'float32', got '" + name + "'");
}

// {architecture: registers per thread}; of several kernels in one source the most.
py::dict registers_of(const char* name) {
  std::map<std::string, int> registers;
  for (const auto& resource : kResources)
    if (resource.name && std::string(resource.name) == name)
      registers[resource.arch] = std::max(registers[resource.arch], resource.registers);
  return py::cast(registers);
}

template <class Variant>
py::dict row_of(const char* op, const Variant& variant, int head_dim) {
  py::dict row;
  row["op"] = op;
  row["name"] = variant.name;
  row["sm"] = variant.sm;
  row["dtype"] = seer::name_of(variant.dtype);
  row["head_dim"] = head_dim;
  row["registers"] = registers_of(variant.name);
  return row;
}

std::vector<py::dict> variants() {
  std::vector<py::dict> rows;
  const auto attention = [&](const char* op, const auto& variant, int block_q) {
    py::dict row = row_of(op, variant, variant.head_dim);
    row["block_q"] = block_q;
    row["tile_kv"] = variant.tile_kv;
    row["threads"] = variant.threads;
    row["smem_bytes"] = variant.smem_bytes;
    rows.push_back(row);
  };
  for (const auto& variant : seer::block_sparse_attn_variants())
    attention("block_sparse_attn", variant, variant.block_q);
  for (const auto& variant : seer::attn_pool_variants())
    attention("attn_pool", variant, variant.rows);
  for (const auto& variant : seer::pool_gate_variants())
    rows.push_back(row_of("pool_gate", variant, variant.dim));
  for (const auto& variant : seer::gate_scores_variants())
    rows.push_back(row_of("gate_scores", variant, variant.dim));
  for (const auto& variant : seer::gate_select_variants())
    rows.push_back(row_of("gate_select", variant, variant.dim));
  return rows;
}

// One row of one head: what the tables of the gate's ops say of a dtype and a dimension.
int find_gate_variant(const std::string& op, int sm, seer::DType dtype, int dim,
                      std::string* why_not) {
  if (op == "pool_gate") {
    seer::PoolGateParams params;
    params.dtype = dtype;
    params.batch = params.heads = params.heads_out = 1;
    params.rows = 1;
    params.head_dim = params.gate_dim = dim;
    return seer::find_pool_gate_variant(params, sm, why_not);
  }
  seer::GateSelectParams params;
  params.gate.dtype = dtype;
  params.gate.batch = params.gate.heads_q = params.gate.heads_k = 1;
  params.gate.blocks_q = params.gate.blocks_kv = 1;
  params.gate.gate_dim = dim;
  return op == "gate_scores" ? seer::find_gate_scores_variant(params.gate, sm, why_not)
                             : seer::find_gate_select_variant(params, sm, why_not);
}

template <class Params>
Params shape_params(const std::string& dtype, int head_dim, int block_q, int block_kv) {
  Params params;
  params.dtype = dtype_from(dtype);
  params.head_dim = head_dim;
  params.block_q = block_q;
  params.block_kv = block_kv;
  // Something that every kernel can address.
  params.batch = params.heads_q = params.heads_kv = 1;
  params.rows_q = params.rows_kv = 1;
  return params;
}

std::string explain(const std::string& op, int sm, const std::string& dtype, int head_dim,
                    int block_q, int block_kv) {
  std::string why_not;
  if (op == "block_sparse_attn") {
    const auto params =
        shape_params<seer::BlockSparseAttnParams>(dtype, head_dim, block_q, block_kv);
    seer::find_block_sparse_attn_variant(params, sm, &why_not);
  } else if (op == "attn_pool") {
    const auto params = shape_params<seer::AttnPoolParams>(dtype, head_dim, block_q, block_kv);
    seer::find_attn_pool_variant(params, sm, &why_not);
  } else if (op == "pool_gate" || op == "gate_scores" || op == "gate_select") {
    find_gate_variant(op, sm, dtype_from(dtype), head_dim, &why_not);
  } else {
    throw py::value_error(
        "op: expected 'block_sparse_attn', 'attn_pool', 'pool_gate', 'gate_scores' or "
        "'gate_select', got '" +
        op + "'");
  }
  return why_not;
}

py::dict build_info() {
  py::dict info;
  info["version"] = kVersion;
  info["cuda"] = kHasCuda;
  info["cuda_version"] = kCudaVersion;
  info["archs"] = kHasCuda ? kArchs : "";
  info["compiler"] = kCompiler;
  return info;
}

void serial_for(int64_t count, int64_t /*grain*/, const seer::ParallelBody& body) {
  body(0, count);
}

void check(const seer::Status& status) {
  if (!status.ok()) throw std::runtime_error("seer_cuda._core: " + status.text);
}

using BoolArray = py::array_t<bool, py::array::c_style | py::array::forcecast>;
using WordArray = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

// A contiguous copy where it needs one, of an array whose dtype was checked: forcecast alone would
// take any numbers.
template <class Array>
Array contiguous(const py::array& array, bool fits, const char* name, const char* expected) {
  if (!fits)
    throw py::type_error(std::string(name) + ": expected dtype " + expected + ", got " +
                         std::string(py::str(array.dtype())) + ". Convert it with .astype().");
  return Array(array);
}

template <class Array>
int64_t rows_before_last(const Array& array, const char* name) {
  if (array.ndim() < 1)
    throw py::value_error(std::string(name) + ": expected at least one dimension, got a scalar");
  int64_t rows = 1;
  for (py::ssize_t d = 0; d + 1 < array.ndim(); ++d) rows *= array.shape(d);
  return rows;
}

template <class Array>
std::vector<py::ssize_t> with_last(const Array& array, int64_t last) {
  std::vector<py::ssize_t> shape(array.shape(), array.shape() + array.ndim());
  shape.back() = last;
  return shape;
}

WordArray pack_block_bits(const py::array& given) {
  const auto mask = contiguous<BoolArray>(given, given.dtype().kind() == 'b', "mask", "bool");
  seer::PackBlockBitsParams params;
  params.rows = rows_before_last(mask, "mask");
  params.blocks_kv = mask.shape(mask.ndim() - 1);
  WordArray bits(with_last(mask, seer::ceil_div(params.blocks_kv, 32)));
  params.mask = reinterpret_cast<const uint8_t*>(mask.data());
  params.bits = bits.mutable_data();
  check(seer::pack_block_bits_cpu(params, serial_for));
  return bits;
}

BoolArray unpack_block_bits(const py::array& given, int64_t blocks_kv) {
  const char kind = given.dtype().kind();
  const auto bits = contiguous<WordArray>(
      given, (kind == 'i' || kind == 'u') && given.itemsize() == int{sizeof(int32_t)}, "block_bits",
      "int32 or uint32");
  seer::UnpackBlockBitsParams params;
  params.rows = rows_before_last(bits, "block_bits");
  params.words = bits.shape(bits.ndim() - 1);
  params.blocks_kv = blocks_kv;
  if (blocks_kv < 0 || params.words * 32 < blocks_kv)
    throw py::value_error("blocks_kv: expected 0 to " + std::to_string(params.words * 32) +
                          " (32 per word), got " + std::to_string(blocks_kv));
  BoolArray mask(with_last(bits, blocks_kv));
  params.bits = bits.data();
  params.mask = reinterpret_cast<uint8_t*>(mask.mutable_data());
  check(seer::unpack_block_bits_cpu(params, serial_for));
  return mask;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "What this build of seer_cuda holds: needs neither torch nor a GPU.";
  m.def("version", [] { return kVersion; }, "Version of the compiled part.");
  m.def("build_info", &build_info,
        "dict: version, cuda (bool), cuda_version, archs (as SEER_ARCHS), compiler.");
  m.def(
      "variants", &variants,
      "Compiled kernels: list of dicts op, name, sm, dtype, head_dim (gate_scores and gate_select: "
      "gate_dim), registers ({architecture: registers per thread}); block_sparse_attn also "
      "block_q, tile_kv, threads, smem_bytes.");
  m.def("explain", &explain, py::arg("op"), py::arg("sm"), py::arg("dtype"), py::arg("head_dim"),
        py::arg("block_q"), py::arg("block_kv"),
        "Why no compiled kernel serves this problem on compute capability sm (90 for 9.0); '' if "
        "one does.");
  m.def("pack_block_bits", &pack_block_bits, py::arg("mask"),
        "bool [..., blocks_kv] -> int32 [..., ceil(blocks_kv / 32)].");
  m.def("unpack_block_bits", &unpack_block_bits, py::arg("block_bits"), py::arg("blocks_kv"),
        "int32 or uint32 [..., words] -> bool [..., blocks_kv].");
}
