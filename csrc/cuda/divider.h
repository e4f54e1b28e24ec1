// Division by a number that only the launch knows: a multiplication, where the machine has no instruction to divide.
#pragma once
#include <stdint.h>

#include "common/row_state.h"

namespace kdfast::cuda {

// Of 0 <= n < 2^31 by 1 <= d < 2^31, rounded down (Granlund and Montgomery, PLDI 1994): n * (1 + factor / 2^32) /
// 2^shift.
struct Divider {
  uint32_t factor = 1, shift = 0;

  Divider() = default;
  explicit Divider(int64_t d) {
    while ((int64_t(1) << shift) < d) ++shift;
    factor = uint32_t((((uint64_t(1) << shift) - uint64_t(d)) << 32) / uint64_t(d) + 1);
  }
  KDFAST_HD_MEMBER uint32_t operator()(uint32_t n) const { return (uint32_t(uint64_t(n) * factor >> 32) + n) >> shift; }
};

}  // namespace kdfast::cuda
