// Sums over rows. A block for each result, which needs no zeroed workspace, no ticket and no second order of summation;
// of very many rows that block would be alone for long, and sums what as many blocks as there are parts have summed.
// One pass over 4 bytes per row and result.
#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.h"

namespace kdfast::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int64_t kShared = kThreads * int64_t(sizeof(double));

// Of the losses, then of the components, which lie in pairs.
struct Results {
  float *loss, *component_sums;
};
KDFAST_DEVICE void store(const Results& to, int result, double sum) {
  *(result ? to.component_sums + (result - 1) : to.loss) = float(sum);
}

// Of `count` numbers, `stride` apart. Thread i takes every 1024th: the block's loads stay side by side.
template <class T>
KDFAST_DEVICE double sum_of(const T* numbers, int64_t stride, int64_t count) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += numbers[i * stride];
  return block_sum(sum, (double*)shared_memory());
}
KDFAST_DEVICE double sum_of_rows(const float* losses, const float* components, int result, int64_t first,
                                 int64_t count) {
  return result ? sum_of(components + (result - 1) + 2 * first, 2, count) : sum_of(losses + first, 1, count);
}

__global__ void __launch_bounds__(kThreads)
    sum_rows(const float* losses, const float* components, int64_t rows, const __grid_constant__ Results to) {
  const int result = int(blockIdx.x);
  const double sum = sum_of_rows(losses, components, result, 0, rows);
  if (threadIdx.x == 0) store(to, result, sum);
}

// Block p of a result's sums its p-th part of the rows.
__global__ void __launch_bounds__(kThreads)
    sum_rows_in_parts(const float* losses, const float* components, int64_t rows, int64_t parts, double* sums) {
  const int64_t each = (rows + parts - 1) / parts, first = blockIdx.x % parts * each;
  const int64_t count = first + each < rows ? each : rows > first ? rows - first : 0;
  const double sum = sum_of_rows(losses, components, int(blockIdx.x / parts), first, count);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    sum_parts_of_rows(const double* sums, int64_t parts, const __grid_constant__ Results to) {
  const int result = int(blockIdx.x);
  const double sum = sum_of(sums + result * parts, 1, parts);
  if (threadIdx.x == 0) store(to, result, sum);
}

}  // namespace

void launch_sum(const char* op, const Target& target, const float* losses, const float* components, int64_t rows,
                float* loss, float* component_sums, double* parts) {
  const int64_t results = components ? 3 : 1, blocks = sum_parts(rows);
  const Results to{loss, component_sums};
  const Grid last{results, kThreads, kShared};
  if (!blocks) return launch(op, sum_rows, target, last, losses, components, rows, to);
  launch(op, sum_rows_in_parts, target, {results * blocks, kThreads, kShared}, losses, components, rows, blocks, parts);
  launch(op, sum_parts_of_rows, target, last, (const double*)parts, blocks, to);
}

}  // namespace kdfast::cuda
