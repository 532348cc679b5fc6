// SPDX-License-Identifier: Apache-2.0
#include "options.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <functional>
#include <numeric>
#include <string_view>

namespace seer::bench {
namespace {

using Text = std::string_view;

constexpr unsigned on(Op op) { return 1u << static_cast<int>(op); }
constexpr unsigned kSparse = on(Op::kBlockSparseAttn), kMap = on(Op::kAttnPool);
constexpr unsigned kPool = on(Op::kPoolGate), kPair = on(Op::kPoolGatePair);
constexpr unsigned kScores = on(Op::kGateScores), kSelect = on(Op::kGateSelect);
constexpr unsigned kAttention = kSparse | kMap, kRanks = kScores | kSelect;
constexpr unsigned kEvery = kAttention | kPool | kPair | kRanks;

[[noreturn]] void refuse(Text flag, const std::string& expected, Text got,
                         const std::string& remedy) {
  throw UsageError(std::string(flag) + ": expected " + expected + ", got " +
                   (got.empty() ? std::string("nothing") : "'" + std::string(got) + "'") + ". " +
                   remedy);
}

// ---- Values: each parser takes one item of a comma list ------------------------------------------

template <class T>
bool number(Text text, T* value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value);
  return error == std::errc() && end == text.data() + text.size();
}

// An integer with an optional k (1024): 32768, 32k.
template <class T>
T count_of(Text flag, Text text, int64_t least, int64_t most) {
  const bool kilo = !text.empty() && text.back() == 'k';
  int64_t value = 0;
  const bool read = number(kilo ? text.substr(0, text.size() - 1) : text, &value);
  const int64_t unit = kilo ? 1024 : 1;
  if (!read || value < least || value > most / unit) {
    refuse(flag, "integers from " + std::to_string(least) + " to " + std::to_string(most), text,
           "Separate several by commas; 32k is 32768.");
  }
  return static_cast<T>(value * unit);
}

double real_of(Text flag, Text text, double least, double most) {
  double value = 0.0;
  if (!number(text, &value) || !(value >= least && value <= most)) {
    char range[64];
    std::snprintf(range, sizeof range, "numbers from %g to %g", least, most);
    refuse(flag, range, text, "Separate several by commas.");
  }
  return value;
}

bool switch_of(Text flag, Text text) {
  if (text != "0" && text != "1") refuse(flag, "0 or 1", text, "Use 0,1 for both.");
  return text == "1";
}

template <class T>
T named(Text flag, Text text) {
  for (const Named<T>& choice : Names<T>::kAll) {
    if (choice.name == text) return choice.value;
  }
  refuse(flag, all_names<T>(), text, "Separate several by commas.");
}

Block block_of(Text flag, Text text) {
  Block block;
  const size_t cross = text.find('x');
  const Text q = text.substr(0, cross), kv = cross == Text::npos ? q : text.substr(cross + 1);
  if (!number(q, &block.q) || !number(kv, &block.kv) || block.q < 1 || block.kv < 1) {
    refuse(flag, "sizes such as 64, 128 or 64x128 (query x KV rows)", text,
           "Separate several by commas.");
  }
  return block;
}

int arch_of(Text flag, Text text) {
  if (text == "auto") return 0;
  if (text == "sm80") return 80;
  if (text == "sm90") return 90;
  refuse(flag, "auto, sm80 or sm90", text, "auto is the newest family that serves the call.");
}

int pools_of(Text flag, Text text) {
  for (int pools = 1; pools < 8; ++pools) {
    if (name_of_pools(pools) == text) return pools;
  }
  refuse(flag, "max, min, avg or several in that order, e.g. maxminavg", text,
         "Separate several choices by commas.");
}

// ---- Flags ---------------------------------------------------------------------------------------

struct Flag {
  Text name, value, help;  // value empty: the flag takes none
  unsigned ops;            // that it means something to
  std::function<void(Text)> set;
};

// A flag's comma list replaces the default.
template <class T, class Parse>
std::function<void(Text)> list(Text flag, std::vector<T>* values, Parse parse) {
  return [flag, values, parse](Text text) {
    values->clear();
    for (size_t begin = 0; begin <= text.size();) {
      const size_t end = std::min(text.find(',', begin), text.size());
      values->push_back(parse(flag, text.substr(begin, end - begin)));
      begin = end + 1;
    }
  };
}

std::vector<Flag> flags_of(Options* o) {
  Sweep* s = &o->sweep;
  Schedule* t = &o->schedule;
  const auto counts = [](int64_t least, int64_t most) {
    return [=](Text flag, Text text) { return count_of<int>(flag, text, least, most); };
  };
  const auto rows = [](Text flag, Text text) {
    return count_of<int64_t>(flag, text, 1, int64_t{1} << 30);
  };
  const auto switches = [](Text flag, Text text) { return switch_of(flag, text); };
  const auto density = [](Text flag, Text text) { return real_of(flag, text, 0.0, 1.0); };
  const auto value = [](Text flag, Text text) { return real_of(flag, text, 0.0, 1e9); };
  const auto heads = counts(1, 4096);
  const auto set_int = [](Text flag, int* to, int least, int most) {
    return [=](Text text) { *to = count_of<int>(flag, text, least, most); };
  };
  const auto set_ms = [](Text flag, double* to) {
    return [=](Text text) { *to = real_of(flag, text, 0.0, 1e5); };
  };
  const auto set_true = [](bool* to) { return [to](Text) { *to = true; }; };
  return {
      {"--rows", "LIST", "query and KV rows of a sequence [32768]", kEvery,
       list("--rows", &s->rows, rows)},
      {"--rows-kv", "LIST", "KV rows, where they differ", kAttention | kPair | kRanks,
       list("--rows-kv", &s->rows_kv, rows)},
      {"--batch", "LIST", "sequences [1]", kEvery, list("--batch", &s->batch, counts(1, 65535))},
      {"--heads-q", "LIST", "query heads [32]", kEvery, list("--heads-q", &s->heads_q, heads)},
      {"--heads-kv", "LIST", "KV heads, dividing the query heads [8]", kAttention | kPool | kPair,
       list("--heads-kv", &s->heads_kv, heads)},
      {"--head-dim", "LIST", "channels of a head; gate_*: of an embedding [128]", kEvery,
       list("--head-dim", &s->head_dim, counts(1, 1024))},
      {"--block", "LIST", "block sizes, 64 or 64x128 (query x KV rows) [64]", kEvery,
       list("--block", &s->block, block_of)},
      {"--dtype", "LIST", "bfloat16 (bf16), float16 (fp16) [bfloat16]", kEvery,
       list("--dtype", &s->dtype, named<DType>)},
      {"--causal", "LIST", "0, 1 [1]", kAttention | kRanks, list("--causal", &s->causal, switches)},
      {"--mask", "LIST", "random, kv_head, structured, dense [random]", kSparse,
       list("--mask", &s->mask, named<MaskKind>)},
      {"--density", "LIST", "kept share of the visible blocks [0.1]", kSparse,
       list("--density", &s->density, density)},
      {"--arch", "LIST", "kernel family: auto, sm80, sm90 [auto]", kAttention,
       list("--arch", &s->arch, arch_of)},
      {"--reduce", "LIST", "max, sum [max]", kMap, list("--reduce", &s->reduce, named<PoolReduce>)},
      {"--per-token", "LIST", "keep the map's rows: 0, 1 [0]", kMap,
       list("--per-token", &s->per_token, switches)},
      {"--side", "LIST",
       "q: heads_q heads pooled; k: heads_kv heads pooled and projected, one\n"
       "matrix per query head [k]",
       kPool, list("--side", &s->side, named<Side>)},
      {"--pools", "LIST", "max, min, avg or joined as maxminavg [q: avg, k: maxminavg]", kPool,
       list("--pools", &s->pools, pools_of)},
      {"--method", "LIST", "threshold, topk, density, topp [threshold]", kSelect,
       list("--method", &s->method, named<SelectMethod>)},
      {"--value", "LIST", "the method's parameter [0.002, 64, 0.1, 0.9]", kSelect,
       list("--value", &s->value, value)},
      {"--l2", "LIST", "hot, cold: caches as the last launch left them, or swept [hot]", kEvery,
       list("--l2", &o->l2, named<L2>)},
      {"--protocol", "LIST", "sustained, burst (docs/benchmarks.md) [sustained]", kEvery,
       list("--protocol", &o->protocol, named<Protocol>)},
      {"--rounds", "N", "repetitions of the protocol [3]", kEvery,
       set_int("--rounds", &t->rounds, 1, 1000)},
      {"--warm-ms", "MS", "launches before sustained ones are timed [150]", kEvery,
       set_ms("--warm-ms", &t->warm_ms)},
      {"--pause-ms", "MS", "idleness before every round [200]", kEvery,
       set_ms("--pause-ms", &t->pause_ms)},
      {"--launches", "N", "timed launches of a round, at most [100]", kEvery,
       set_int("--launches", &t->max_launches, 1, 10000)},
      {"--verify", "",
       "first compare with a plain fp32 reference on the GPU; exit status 1 if\n"
       "any case fails",
       kEvery, set_true(&o->verify)},
      {"--plan", "", "print the cases and their work; no GPU needed", kEvery, set_true(&o->plan)},
      {"--no-ceilings", "", "do not measure the machine's ceilings", kEvery,
       [o](Text) { o->ceilings = false; }},
      {"--format", "FORMAT", "table, csv, json [table]", kEvery,
       [o](Text text) { o->format = named<Format>("--format", text); }},
      {"--device", "N", "CUDA device [0]", kEvery, set_int("--device", &o->device, 0, 1023)},
      {"--seed", "N", "of inputs and masks [0]", kEvery,
       [o](Text text) { o->seed = count_of<uint64_t>("--seed", text, 0, int64_t{1} << 40); }},
  };
}

// Letters to change to come from one word to the other.
int edits(Text a, Text b) {
  std::vector<int> row(b.size() + 1);
  std::iota(row.begin(), row.end(), 0);
  for (size_t i = 1; i <= a.size(); ++i) {
    int diagonal = row[0]++;
    for (size_t j = 1; j <= b.size(); ++j) {
      const int change = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({change, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row.back();
}

template <class Range, class Name>
std::string nearest(Text word, const Range& range, Name name) {
  const auto best = std::min_element(
      std::begin(range), std::end(range),
      [&](const auto& a, const auto& b) { return edits(word, name(a)) < edits(word, name(b)); });
  return std::string(name(*best));
}

void check_flag(const Flag& flag, Op op) {
  if (flag.ops & on(op)) return;
  std::string ops;
  for (const Named<Op>& other : Names<Op>::kAll) {
    if (flag.ops & on(other.value)) ops += (ops.empty() ? "" : ", ") + std::string(other.name);
  }
  throw UsageError(std::string(flag.name) + ": expected with " + ops + " only, got it with " +
                   name_of(op) + ". Leave it out.");
}

void check_cases(const Sweep& sweep) {
  for (const Case& c : expand(sweep)) {
    if (c.heads_q % c.heads_kv != 0 && sweep.op != Op::kGateScores && sweep.op != Op::kGateSelect) {
      refuse("--heads-kv", "a divisor of the query heads, " + std::to_string(c.heads_q),
             std::to_string(c.heads_kv), "Sweep over pairs in separate runs.");
    }
    const bool gate = sweep.op != Op::kBlockSparseAttn && sweep.op != Op::kAttnPool;
    if (gate && c.block.q != c.block.kv) {
      refuse("--block", "one size for both sides with " + name_of(sweep.op),
             std::to_string(c.block.q) + "x" + std::to_string(c.block.kv), "Use 64 or 128.");
    }
    if (c.op == Op::kGateSelect && c.method == SelectMethod::kDensity && c.value > 1.0) {
      refuse("--value", "a density from 0 to 1 with --method density", std::to_string(c.value),
             "Sweep over methods in separate runs.");
    }
  }
}

}  // namespace

Options parse_options(int argc, const char* const* argv) {
  Options options;
  const std::vector<Flag> flags = flags_of(&options);
  std::vector<const Flag*> given;
  Text op;
  for (int i = 1; i < argc; ++i) {
    const Text word = argv[i];
    if (word == "--help" || word == "-h") options.action = Action::kHelp;
    if (word == "--version") options.action = Action::kVersion;
    if (options.action == Action::kHelp || options.action == Action::kVersion) return options;
    if (word == "--list") {
      options.action = Action::kList;
      continue;
    }
    if (word.substr(0, 1) != "-") {
      if (!op.empty())
        refuse("op", "one operator", word, "It comes after '" + std::string(op) + "'.");
      op = word;
      continue;
    }
    const size_t equals = word.find('=');
    const Text name = word.substr(0, equals);
    const auto flag = std::find_if(flags.begin(), flags.end(),
                                   [&](const Flag& candidate) { return candidate.name == name; });
    if (flag == flags.end()) {
      throw UsageError(std::string(name) + ": no such option. Did you mean " +
                       nearest(name, flags, [](const Flag& f) { return f.name; }) +
                       "? --help lists all.");
    }
    Text value;
    if (flag->value.empty()) {
      if (equals != Text::npos) refuse(name, "no value", word.substr(equals + 1), "Leave it out.");
    } else if (equals != Text::npos) {
      value = word.substr(equals + 1);
    } else if (i + 1 < argc) {
      value = argv[++i];
    } else {
      refuse(name, "a value", "", std::string(flag->help));
    }
    flag->set(value);
    given.push_back(&*flag);
  }
  if (options.action == Action::kList) return options;
  if (op.empty()) refuse("op", all_names<Op>(), "", "--help shows all options.");
  const auto found = std::find_if(std::begin(Names<Op>::kAll), std::end(Names<Op>::kAll),
                                  [&](const Named<Op>& candidate) { return candidate.name == op; });
  if (found == std::end(Names<Op>::kAll)) {
    refuse("op", all_names<Op>(), op,
           "Did you mean " +
               nearest(op, Names<Op>::kAll, [](const Named<Op>& n) { return n.name; }) + "?");
  }
  options.sweep.op = found->value;
  for (const Flag* flag : given) check_flag(*flag, options.sweep.op);
  check_cases(options.sweep);
  return options;
}

std::string help_text() {
  std::string text =
      "Times the kernels of seer_cuda by themselves, without torch and Python.\n\n"
      "  seer_bench OP [options]   OP: " +
      all_names<Op>() +
      "\n"
      "  seer_bench --list         the compiled kernels\n\n"
      "Every LIST is separated by commas and swept over: --rows 8k,32k --density 1,0.5,0.1 are "
      "six\n"
      "cases. An option that means nothing to OP is refused.\n\n";
  Options options;
  for (const Flag& flag : flags_of(&options)) {
    std::string left = "  " + std::string(flag.name) + " " + std::string(flag.value);
    left.resize(std::max<size_t>(left.size() + 2, 22), ' ');
    text += left;
    for (const char letter : flag.help) {
      text += letter;
      if (letter == '\n') text += std::string(22, ' ');
    }
    text += "\n";
  }
  return text +
         "\nExit status: 0; 1 if a case failed or --verify found a wrong result; 2 for wrong "
         "options\n"
         "and where there is no GPU.\n";
}

}  // namespace seer::bench
