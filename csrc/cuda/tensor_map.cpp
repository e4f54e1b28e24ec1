#include "cuda/tensor_map.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>

namespace kdfast::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Looked up, not linked: this library must load where there is no driver. 12.0 is the version that brought it.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = {};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? Encode(function) : nullptr;
}
Encode encode() {
  static const Encode function = find_encode();
  return function;
}

}  // namespace

bool has_tensor_maps() { return encode() != nullptr; }

TensorMap tensor_map(const char* op, const BoxedRows& m, int box_rows) {
  const auto type = m.type == Element::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[] = {cuuint64_t(m.columns), cuuint64_t(m.rows)}, steps[] = {2 * cuuint64_t(m.step)};
  const cuuint32_t box[] = {kBoxColumns, cuuint32_t(box_rows)}, every[] = {1, 1};
  CUtensorMap map;
  const CUresult result =
      encode()(&map, type, 2, const_cast<void*>(m.start), sizes, steps, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, op, ": cuTensorMapEncodeTiled: error ", int(result));
  TensorMap to;
  static_assert(sizeof(to) == sizeof(map));
  std::memcpy(&to, &map, sizeof(to));
  return to;
}

}  // namespace kdfast::cuda
