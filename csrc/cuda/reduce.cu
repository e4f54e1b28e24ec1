// Sums over rows. A block for each result: the numbers are few beside the logits (4 bytes per row), and one block needs
// no zeroed workspace, no ticket and no second order of summation. One pass over 4 bytes per row and result.
#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.h"

namespace kdfast::cuda {
namespace {

constexpr int kThreads = 1024;

// Block 0 sums the losses, blocks 1 and 2 the components. Thread i takes every 1024th value: the block's loads stay
// side by side.
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const float* losses, const float* components, int64_t rows, float* loss, float* component_sums) {
  const int block = int(blockIdx.x);
  const float* numbers = block ? components + (block - 1) : losses;
  const int64_t stride = block ? 2 : 1;
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) sum += numbers[i * stride];
  sum = block_sum(sum, (double*)shared_memory());
  if (threadIdx.x == 0) *(block ? component_sums + (block - 1) : loss) = float(sum);
}

constexpr int64_t kShared = kThreads * int64_t(sizeof(double));

}  // namespace

void launch_sum(const char* op, const Target& target, const float* losses, const float* components, int64_t rows,
                float* loss, float* component_sums) {
  launch(op, sum_kernel, target, {components ? 3 : 1, kThreads, kShared}, losses, components, rows, loss,
         component_sums);
}

}  // namespace kdfast::cuda
