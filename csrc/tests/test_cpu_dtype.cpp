// SPDX-License-Identifier: Apache-2.0
// bfloat16 and float16 conversions: every 16-bit pattern, every midpoint, and random numbers,
// against a decoder by ldexp and rounding by distance.
#include <bit>
#include <cmath>
#include <cstdint>

#include "check.h"
#include "common/cpu_dtype.h"

namespace {

using seer::test::Random;

struct Format {
  const char* name;
  int fraction_bits;
  int bias;
  float (*to_float)(uint16_t);
  uint16_t (*from_float)(float);

  int exponent_bits() const { return 15 - fraction_bits; }
  uint16_t infinity() const {
    return static_cast<uint16_t>(((1 << exponent_bits()) - 1) << fraction_bits);
  }
};

const Format kFormats[] = {
    {"bfloat16", 7, 127, seer::bfloat16_to_float, seer::float_to_bfloat16},
    {"float16", 10, 15, seer::float16_to_float, seer::float_to_float16},
};

// The value of a finite pattern by definition. The pattern of infinity decodes to the number that
// would follow the largest finite one, which is what rounding must compare with.
double decode(const Format& format, uint16_t bits) {
  const int fraction = bits & ((1 << format.fraction_bits) - 1);
  const int exponent = (bits & 0x7fff) >> format.fraction_bits;
  const double magnitude = exponent == 0
                               ? std::ldexp(fraction, 1 - format.bias - format.fraction_bits)
                               : std::ldexp(fraction + (1 << format.fraction_bits),
                                            exponent - format.bias - format.fraction_bits);
  return bits & 0x8000 ? -magnitude : magnitude;
}

void test_every_pattern(const Format& format) {
  for (uint32_t pattern = 0; pattern < 0x10000u; ++pattern) {
    const auto bits = static_cast<uint16_t>(pattern);
    const uint16_t body = bits & 0x7fff;
    const float value = format.to_float(bits);
    const uint16_t back = format.from_float(value);
    SEER_CHECK(std::signbit(value) == (bits >= 0x8000), "%s %04x", format.name, bits);
    if (body > format.infinity()) {
      SEER_CHECK(std::isnan(value), "%s %04x gives %g", format.name, bits, value);
      SEER_CHECK((back & 0x7fff) > format.infinity(), "%s %04x gives %04x", format.name, bits,
                 back);
      continue;
    }
    if (body == format.infinity())
      SEER_CHECK(std::isinf(value), "%s %04x gives %g", format.name, bits, value);
    else
      SEER_CHECK(value == decode(format, bits), "%s %04x gives %g", format.name, bits, value);
    SEER_CHECK(back == bits, "%s %04x comes back as %04x", format.name, bits, back);
  }
}

void check_rounding(const Format& format, uint16_t below, float value, uint16_t nearest) {
  const uint16_t got = format.from_float(value);
  const auto negative = static_cast<uint16_t>(nearest | 0x8000);
  SEER_CHECK(got == nearest, "%s %a near %04x gives %04x", format.name, value, below, got);
  SEER_CHECK(format.from_float(-value) == negative, "%s %a", format.name, -value);
}

// Between each two neighbours: the midpoint goes to the even one, its neighbours to the nearest.
void test_midpoints(const Format& format) {
  for (uint16_t below = 0; below < format.infinity(); ++below) {
    const auto above = static_cast<uint16_t>(below + 1);
    const double middle = (decode(format, below) + decode(format, above)) / 2;
    const auto exact = static_cast<float>(middle);
    if (exact != middle) continue;  // below the fp32 subnormals (bfloat16 only)
    check_rounding(format, below, exact, below % 2 == 0 ? below : above);
    check_rounding(format, below, std::nextafter(exact, 0.0f), below);
    check_rounding(format, below, std::nextafter(exact, INFINITY), above);
  }
}

void test_random_bits(const Format& format) {
  Random random(1);
  for (int i = 0; i < 2000000; ++i) {
    const float value = std::bit_cast<float>(static_cast<uint32_t>(random.bits() >> 32));
    const uint16_t got = format.from_float(value);
    if (std::isnan(value)) {
      SEER_CHECK((got & 0x7fff) > format.infinity(), "%s %a", format.name, value);
      continue;
    }
    if ((got & 0x7fff) == format.infinity()) {
      const double limit = (decode(format, static_cast<uint16_t>(format.infinity() - 1)) +
                            decode(format, format.infinity())) /
                           2;
      SEER_CHECK(std::abs(double{value}) >= limit, "%s %a became infinite", format.name, value);
      continue;
    }
    const double error = std::abs(decode(format, got) - double{value});
    for (int step : {-1, 1}) {
      const auto other = static_cast<uint16_t>(got + step);
      if ((got & 0x7fff) == 0 && step < 0) continue;
      SEER_CHECK(error <= std::abs(decode(format, other) - double{value}), "%s %a gives %04x",
                 format.name, value, got);
    }
  }
}

}  // namespace

int main() {
  for (const Format& format : kFormats) {
    test_every_pattern(format);
    test_midpoints(format);
    test_random_bits(format);
  }
  return seer::test::report("cpu_dtype");
}
