// Where row i of a strided tensor starts: its leading dimensions flattened, neighbours merged where memory allows.
#pragma once
#include <stdint.h>

#include "common/row_state.h"

namespace kdfast {

struct RowOffsets {
  static constexpr int kMax = 6;
  int dims = 0;
  int64_t size[kMax], stride[kMax];  // innermost first

  // In elements. Rows of a contiguous or expanded tensor take one multiplication.
  KDFAST_HD_MEMBER int64_t operator()(int64_t row) const {
    int64_t offset = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll 1  // the unrolled 64-bit divisions of six such offsets would be most of a kernel
#endif
    for (int d = 0; d + 1 < dims; ++d) {
      const int64_t next = row / size[d];
      offset += (row - next * size[d]) * stride[d];
      row = next;
    }
    return dims ? offset + row * stride[dims - 1] : 0;
  }
};

// Offsets over the first `leading` dimensions; false where more than kMax of them cannot be merged.
inline bool row_offsets(const int64_t* sizes, const int64_t* strides, int64_t leading, RowOffsets* to) {
  *to = {};
  for (int64_t d = leading - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    const int last = to->dims - 1;
    if (last >= 0 && strides[d] == to->stride[last] * to->size[last]) {
      to->size[last] *= sizes[d];
      continue;
    }
    if (to->dims == RowOffsets::kMax) return false;
    to->size[to->dims] = sizes[d];
    to->stride[to->dims++] = strides[d];
  }
  return true;
}

}  // namespace kdfast
