// SPDX-License-Identifier: Apache-2.0
// What is printed, as a table for people, CSV or JSON.
#pragma once

#include <ostream>
#include <string>
#include <vector>

#include "cases.h"
#include "ceilings.h"
#include "device.h"
#include "masks.h"
#include "names.h"
#include "timing.h"

namespace seer::bench {

using Row = std::vector<Field>;  // all rows of a report have the same fields

// The case and its work: what --plan prints.
Row plan_row(const Case& c, const HostMask& mask);

// A case that was timed. `verdict` is empty without --verify.
Row timed_row(const Case& c, const Work& work, const std::string& kernel, Protocol protocol, L2 l2,
              const Timing& timing, const Ceilings& ceilings, const std::string& verdict);

// device: nullptr with --plan. The table leaves out columns that are the same in every row and
// says them once, above.
void print_report(std::ostream& out, Format format, const Device* device, const Ceilings& ceilings,
                  const std::vector<Row>& rows);

// The compiled kernels: --list.
void print_variants(std::ostream& out, Format format);

}  // namespace seer::bench
