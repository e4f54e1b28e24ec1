// Where a live block belongs.
#pragma once
#include "cuda/block_sparse.h"
#include "cuda/device.h"

namespace kdfast::cuda {

// The block row of live block n: the last that begins at n or before, and is not empty.
KDFAST_DEVICE int64_t outer_of(const BlockArgs& args, int64_t n) {
  int64_t low = 0, high = args.outer;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (args.begin[middle] <= n ? low : high) = middle;
  }
  return low;
}

}  // namespace kdfast::cuda
