// SPDX-License-Identifier: Apache-2.0
// seer_bench: the kernels of seer_cuda, timed and checked by themselves. bench/cpp/README.md.
#include <unistd.h>

#include <iostream>
#include <optional>

#include "ceilings.h"
#include "options.h"
#include "problem.h"
#include "report.h"

namespace seer::bench {
namespace {

constexpr int kFailed = 1, kUnusable = 2;

std::string title_of(const Case& c) {
  std::string title;
  for (const Field& field : fields_of(c)) title += (title.empty() ? "" : " ") + field.text;
  return title;
}

// Adds the rows of one case. Returns whether it ran and, if asked for, was right.
bool run_case(const Options& options, const Device& device, const Ceilings& ceilings, Timer* timer,
              const Case& c, std::vector<Row>* rows) try {
  const HostMask mask = make_mask(c, options.seed);
  const std::unique_ptr<Problem> problem = make_problem(c, mask, device, options.seed);
  const auto launch = [&](cudaStream_t stream) { problem->launch(stream); };
  launch(nullptr);
  check(cudaStreamSynchronize(nullptr), "running the kernel");
  std::string verdict;
  if (options.verify) {
    const Verdict found = problem->verify();
    if (!found.ok()) {
      std::cerr << "seer_bench: " << title_of(c) << ": wrong result: " << found.text() << "\n";
      return false;
    }
    verdict = found.text();
  }
  const Work work = work_of(c, mask);
  for (const Protocol protocol : options.protocol) {
    for (const L2 l2 : options.l2) {
      const Timing timing = timer->time(launch, protocol, l2);
      rows->push_back(
          timed_row(c, work, problem->kernel(), protocol, l2, timing, ceilings, verdict));
    }
  }
  return true;
} catch (const CudaError& error) {
  std::cerr << "seer_bench: " << title_of(c) << ": " << error.what() << "\n";
  return false;
}

int run(const Options& options) {
  const std::vector<Case> cases = expand(options.sweep);
  std::vector<Row> rows;
  if (options.plan) {
    for (const Case& c : cases) rows.push_back(plan_row(c, make_mask(c, options.seed)));
    print_report(std::cout, options.format, nullptr, {}, rows);
    return 0;
  }
  std::optional<Device> device;
  try {
    device = open_device(options.device);
  } catch (const CudaError& error) {
    throw UsageError(error.what());
  }
  Timer timer(options.schedule);
  const Ceilings ceilings = options.ceilings ? measure_ceilings(&timer, *device) : Ceilings{};
  const bool watched = isatty(STDERR_FILENO);
  size_t done = 0, failed = 0;
  for (const Case& c : cases) {
    if (watched) std::cerr << "\r" << ++done << " of " << cases.size() << " cases" << std::flush;
    failed += !run_case(options, *device, ceilings, &timer, c, &rows);
  }
  if (watched) std::cerr << "\n";
  print_report(std::cout, options.format, &*device, ceilings, rows);
  if (failed > 0) {
    std::cerr << "seer_bench: " << failed << " of " << cases.size() << " cases failed\n";
  }
  return failed > 0 ? kFailed : 0;
}

int run_main(int argc, const char* const* argv) try {
  const Options options = parse_options(argc, argv);
  switch (options.action) {
    case Action::kHelp: std::cout << help_text(); return 0;
    case Action::kVersion: std::cout << "seer_bench " SEER_VERSION "\n"; return 0;
    case Action::kList: print_variants(std::cout, options.format); return 0;
    case Action::kRun: break;
  }
  return run(options);
} catch (const UsageError& error) {
  std::cerr << "seer_bench: " << error.what() << "\n";
  return kUnusable;
} catch (const CudaError& error) {
  std::cerr << "seer_bench: " << error.what() << "\n";
  return kFailed;
}

}  // namespace
}  // namespace seer::bench

int main(int argc, char** argv) { return seer::bench::run_main(argc, argv); }
