// The launches that sum values per row: shared by the operators that work row by row.
#pragma once
#include <cstdint>

#include "cuda/target.h"

namespace kdfast::cuda {

// Blocks that a result is summed by, each into a number of the workspace, before one block sums these; 0: one block is
// enough. By the rows alone: the order of summation is the same on every device.
constexpr int64_t sum_parts(int64_t rows) { return rows > 32 << 10 ? (rows + 8191) / 8192 : 0; }

// *loss = the sum of `rows` losses, and where there are components, the sums of both. In double, and the same for every
// run and device. `parts`: sum_parts(rows) numbers for each of the three.
void launch_sum(const char* op, const Target& target, const float* losses, const float* components, int64_t rows,
                float* loss, float* component_sums, double* parts);

}  // namespace kdfast::cuda
