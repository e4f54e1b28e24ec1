// Reductions inside warps and blocks, always in the same order.
#pragma once
#include "cuda/device.h"

namespace kdfast::cuda {

// Over groups of `lanes` neighbours; every lane gets the result.
template <int lanes = 32>
KDFAST_DEVICE float warp_max(float x) {
#pragma unroll
#pragma unroll 1
  for (int apart = lanes / 2; apart; apart /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, apart));
  return x;
}
template <int lanes = 32>
KDFAST_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int apart = lanes / 2; apart; apart /= 2) x += __shfl_xor_sync(~0u, x, apart);
  return x;
}

// Over groups of as many lanes as the launch says, a power of two; every lane gets the results.
KDFAST_DEVICE float group_max(float x, int lanes) {
#pragma unroll 1
  for (int apart = lanes / 2; apart; apart /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, apart));
  return x;
}
template <int n>
KDFAST_DEVICE void group_sums(float (&x)[n], int lanes) {
#pragma unroll 1
  for (int apart = lanes / 2; apart; apart /= 2) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] += __shfl_xor_sync(~0u, x[i], apart);
  }
}
// What the first lane of each group has.
KDFAST_DEVICE float group_first(float x, int lanes) { return __shfl_sync(~0u, x, 0, lanes); }

// Over a block whose size is a power of two; thread 0 gets the result. `slots` holds one double per thread.
KDFAST_DEVICE double block_sum(double x, double* slots) {
  const int i = threadIdx.x;
  slots[i] = x;
  for (int apart = blockDim.x / 2; apart; apart /= 2) {
    __syncthreads();  // the partner's half of the tree is written
    if (i < apart) slots[i] += slots[i + apart];
  }
  return slots[0];
}

}  // namespace kdfast::cuda
