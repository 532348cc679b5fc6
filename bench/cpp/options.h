// SPDX-License-Identifier: Apache-2.0
// The command line of seer_bench.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cases.h"
#include "timing.h"

namespace seer::bench {

// Something the user can mend; main prints it and ends with exit status 2.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Action { kRun, kHelp, kVersion, kList };

struct Options {
  Action action = Action::kRun;
  Sweep sweep;
  std::vector<L2> l2 = {L2::kHot};
  std::vector<Protocol> protocol = {Protocol::kSustained};
  Schedule schedule;
  Format format = Format::kTable;
  bool verify = false;
  bool plan = false;     // print the cases and their work, touch no GPU
  bool ceilings = true;  // measure them first
  int device = 0;
  uint64_t seed = 0;
};

// Throws UsageError: "--rows: expected ..., got .... <what to do>".
Options parse_options(int argc, const char* const* argv);

std::string help_text();

}  // namespace seer::bench
