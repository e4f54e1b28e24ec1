#pragma once
#include "cuda/divergence.h"

namespace kdfast::cuda {

// x *= *factor, skipped on the device where the factor is 1. `x` is contiguous.
void launch_scale(const char* op, const Target& target, Element type, void* x, int64_t count, const float* factor,
                  int multiprocessors);

}  // namespace kdfast::cuda
