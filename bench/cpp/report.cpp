// SPDX-License-Identifier: Apache-2.0
#include "report.h"

#include <algorithm>
#include <cstdio>

#include "seer/attn_pool.h"
#include "seer/block_sparse_attn.h"
#include "seer/pool_gate.h"

namespace seer::bench {
namespace {

std::string fixed(double value, int decimals) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", decimals, value);
  return text;
}

std::string digits(double value) {  // six of them
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", value);
  return text;
}

// Ratios to what was not measured, and rates of no work, are left empty.
Field share(const char* name, double rate, double ceiling) {
  return {name, rate > 0.0 && ceiling > 0.0 ? fixed(100.0 * rate / ceiling, 1) : ""};
}
Field rate(const char* name, double value) { return {name, value > 0.0 ? fixed(value, 1) : ""}; }

std::string json_string(const std::string& text) {
  std::string quoted = "\"";
  for (const char letter : text) {
    if (letter == '"' || letter == '\\') quoted += '\\';
    quoted += letter == '\n' ? ' ' : letter;
  }
  return quoted + "\"";
}

std::string json_object(const Row& row) {
  std::string text = "{";
  for (const Field& field : row) {
    if (text.size() > 1) text += ", ";
    text += json_string(field.name) + ": ";
    text += field.text.empty() ? "null" : field.number ? field.text : json_string(field.text);
  }
  return text + "}";
}

std::string csv_value(const std::string& text) {
  if (text.find_first_of(",\"\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char letter : text)
    quoted += letter == '"' ? std::string("\"\"") : std::string(1, letter);
  return quoted + "\"";
}

void print_csv(std::ostream& out, const std::vector<Row>& rows) {
  if (rows.empty()) return;
  const auto line = [&](const Row& row, std::string Field::* part) {
    for (size_t i = 0; i < row.size(); ++i) out << (i > 0 ? "," : "") << csv_value(row[i].*part);
    out << "\n";
  };
  line(rows[0], &Field::name);
  for (const Row& row : rows) line(row, &Field::text);
}

void print_json(std::ostream& out, const std::vector<Row>& rows) {
  out << "\"rows\": [";
  for (size_t i = 0; i < rows.size(); ++i) out << (i > 0 ? ",\n" : "\n") << json_object(rows[i]);
  out << (rows.empty() ? "]" : "\n]");
}

void print_table(std::ostream& out, const std::vector<Row>& rows) {
  if (rows.empty()) return;
  std::vector<size_t> varying;
  std::string common;
  for (size_t i = 0; i < rows[0].size(); ++i) {
    const bool same = std::all_of(rows.begin(), rows.end(),
                                  [&](const Row& row) { return row[i].text == rows[0][i].text; });
    if (!same || rows.size() == 1) {
      varying.push_back(i);
    } else if (!rows[0][i].text.empty()) {
      common += (common.empty() ? "" : ", ") + rows[0][i].name + " " + rows[0][i].text;
    }
  }
  if (!common.empty()) out << "all rows: " << common << "\n\n";
  std::vector<size_t> width;
  for (const size_t i : varying) {
    width.push_back(rows[0][i].name.size());
    for (const Row& row : rows) width.back() = std::max(width.back(), row[i].text.size());
  }
  const auto line = [&](const Row& row, std::string Field::* part) {
    std::string text;
    for (size_t n = 0; n < varying.size(); ++n) {
      const Field& field = row[varying[n]];
      const std::string padding(width[n] - (field.*part).size(), ' ');
      text += (n > 0 ? "  " : "") + (field.number ? padding + field.*part : field.*part + padding);
    }
    out << text.substr(0, text.find_last_not_of(' ') + 1) << "\n";
  };
  line(rows[0], &Field::name);
  for (const Row& row : rows) line(row, &Field::text);
}

// A single case reads better downwards.
void print_list(std::ostream& out, const Row& row) {
  for (const Field& field : row) {
    if (field.text.empty()) continue;
    out << "  " << field.name << std::string(14 - std::min<size_t>(13, field.name.size()), ' ')
        << field.text << "\n";
  }
}

Row header(const Device& device, const Ceilings& ceilings) {
  return {{"gpu", device.name, false},
          {"sm", std::to_string(device.sm)},
          {"driver", device.driver, false},
          {"runtime", device.runtime, false},
          rate("ceiling_tflops", ceilings.tflops),
          {"ceiling_tflops_of", ceilings.product, false},
          rate("ceiling_gbps", ceilings.gbps)};
}

template <class Variant>
Row variant_row(const char* op, const Variant& variant, int dim) {
  return {{"kernel", variant.name, false},
          {"op", op, false},
          {"family", "sm" + std::to_string(variant.sm), false},
          {"dtype", seer::name_of(variant.dtype), false},
          {"head_dim", std::to_string(dim)}};
}

// block_q, tile_kv, threads and shared memory: the gate's kernels choose theirs at launch.
void add_shape(Row* row, int block_q, int tile_kv, int threads, int smem_bytes) {
  const auto text = [](int value) { return value > 0 ? std::to_string(value) : std::string(); };
  row->push_back({"block_q", text(block_q)});
  row->push_back({"tile_kv", text(tile_kv)});
  row->push_back({"threads", text(threads)});
  row->push_back({"smem_bytes", text(smem_bytes)});
}

}  // namespace

Row plan_row(const Case& c, const HostMask& mask) {
  Row row = fields_of(c);
  const Work work = work_of(c, mask);
  if (c.op == Op::kBlockSparseAttn) row.push_back({"kept", fixed(kept_share(c, mask), 4)});
  row.push_back({"gflop", digits(1e-9 * work.flop)});
  row.push_back({"mbytes", digits(1e-6 * work.bytes)});
  return row;
}

Row timed_row(const Case& c, const Work& work, const std::string& kernel, Protocol protocol, L2 l2,
              const Timing& timing, const Ceilings& ceilings, const std::string& verdict) {
  const double tflops = 1e-9 * work.flop / timing.median, gbps = 1e-6 * work.bytes / timing.median;
  Row row = fields_of(c);
  row.push_back({"kernel", kernel, false});
  row.push_back({"protocol", name_of(protocol), false});
  row.push_back({"l2", name_of(l2), false});
  row.push_back({"ms", fixed(timing.median, 4)});
  row.push_back({"p5", fixed(timing.p5, 4)});
  row.push_back({"p95", fixed(timing.p95, 4)});
  row.push_back({"n", std::to_string(timing.launches)});
  row.push_back({"host_us", fixed(timing.host_us, 1)});
  row.push_back({"host_bound", timing.host_bound() ? "1" : "0"});
  row.push_back(rate("tflops", tflops));
  row.push_back(share("%tflops", tflops, ceilings.tflops));
  row.push_back(rate("gbps", gbps));
  row.push_back(share("%gbps", gbps, ceilings.gbps));
  row.push_back({"verify", verdict, false});
  return row;
}

void print_report(std::ostream& out, Format format, const Device* device, const Ceilings& ceilings,
                  const std::vector<Row>& rows) {
  const Row head = device == nullptr ? Row{} : header(*device, ceilings);
  switch (format) {
    case Format::kCsv: {
      std::vector<Row> wide = rows;  // every row says where it was measured
      for (Row& row : wide) row.insert(row.end(), head.begin(), head.end());
      print_csv(out, wide);
      return;
    }
    case Format::kJson:
      out << "{";
      if (device != nullptr) out << "\"machine\": " << json_object(head) << ",\n";
      print_json(out, rows);
      out << "}\n";
      return;
    case Format::kTable:
      if (device != nullptr) {
        out << device->name << " (sm_" << device->sm << "), driver " << device->driver
            << ", CUDA runtime " << device->runtime << "\n";
        if (ceilings.tflops > 0.0) {
          out << "ceilings: " << fixed(ceilings.tflops, 0) << " TFLOP/s (" << ceilings.product
              << "), " << fixed(ceilings.gbps, 0) << " GB/s (device copy)\n";
        }
      }
      if (rows.size() == 1) {
        print_list(out, rows[0]);
      } else {
        print_table(out, rows);
      }
  }
}

void print_variants(std::ostream& out, Format format) {
  std::vector<Row> rows;
  for (const auto& v : block_sparse_attn_variants()) {
    rows.push_back(variant_row("block_sparse_attn", v, v.head_dim));
    add_shape(&rows.back(), v.block_q, v.tile_kv, v.threads, v.smem_bytes);
  }
  for (const auto& v : attn_pool_variants()) {
    rows.push_back(variant_row("attn_pool", v, v.head_dim));
    add_shape(&rows.back(), v.rows, v.tile_kv, v.threads, v.smem_bytes);
  }
  const auto add_gate = [&](const char* op, const std::vector<GateVariant>& variants) {
    for (const GateVariant& v : variants) {
      rows.push_back(variant_row(op, v, v.dim));
      add_shape(&rows.back(), 0, 0, 0, 0);
    }
  };
  add_gate("pool_gate", pool_gate_variants());
  add_gate("gate_scores", gate_scores_variants());
  add_gate("gate_select", gate_select_variants());
  if (format == Format::kCsv) return print_csv(out, rows);
  if (format == Format::kTable) return print_table(out, rows);
  out << "{";
  print_json(out, rows);
  out << "}\n";
}

}  // namespace seer::bench
