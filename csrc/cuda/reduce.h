// The launch that sums values per row: shared by the operators that work row by row.
#pragma once
#include <cstdint>

#include "cuda/target.h"

namespace kdfast::cuda {

// *loss = the sum of `rows` losses, and where there are components, the sums of both. In double and one block each: the
// same for every run and device.
void launch_sum(const char* op, const Target& target, const float* losses, const float* components, int64_t rows,
                float* loss, float* component_sums);

}  // namespace kdfast::cuda
