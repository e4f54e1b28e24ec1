// Checks of the native side. Python has already refused what a user can get wrong (kdfast/ops/_checks.py); these keep a
// direct torch.ops.kdfast call from touching memory that is not there.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

namespace kdfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t size : t.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline void check_dtype(const char* op, const char* argument, const Tensor& t, ScalarType expected) {
  STD_TORCH_CHECK(t.scalar_type() == expected, op, ": ", argument, ": expected dtype ",
                  torch::headeronly::toString(expected), ", got ", torch::headeronly::toString(t.scalar_type()));
}

// float64 has kernels of its own, and is no partner of these.
inline bool is_short_float(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half;
}

// `t` has the leading dimensions of `logits` (`leading` of them) and nothing after.
inline void check_leading(const char* op, const char* argument, const Tensor& t, const Tensor& logits,
                          int64_t leading) {
  bool same = t.dim() == leading;
  for (int64_t d = 0; same && d < leading; ++d) same = t.size(d) == logits.size(d);
  STD_TORCH_CHECK(same, op, ": ", argument, ": expected the leading dimensions of logits of shape ", shape_of(logits),
                  ", got ", shape_of(t));
}

inline void check_device(const char* op, const char* argument, const Tensor& t, const Tensor& logits) {
  STD_TORCH_CHECK(t.device() == logits.device(), op, ": ", argument,
                  ": expected the device of the logits, got another");
}

// A mask of tokens.
inline void check_mask(const char* op, const char* argument, const std::optional<Tensor>& mask, const Tensor& like,
                       int64_t batch, int64_t length) {
  if (!mask) return;
  check_device(op, argument, *mask, like);
  check_dtype(op, argument, *mask, ScalarType::Bool);
  STD_TORCH_CHECK(mask->dim() == 2 && mask->size(0) == batch && mask->size(1) == length && mask->is_contiguous(), op,
                  ": ", argument, ": expected [", batch, ", ", length, "], contiguous, got ", shape_of(*mask));
}

// The teacher's head of every student head of every layer, or -1, and weights of them.
inline void check_heads(const char* op, const std::vector<int64_t>& head_map, const std::vector<double>& weight,
                        int64_t count, int64_t teacher_heads) {
  STD_TORCH_CHECK(int64_t(head_map.size()) == count && weight.size() == head_map.size(), op,
                  ": head_map, weight: expected ", count, " numbers each, got ", head_map.size(), " and ",
                  weight.size());
  for (int64_t head : head_map) {
    STD_TORCH_CHECK(head >= -1 && head < teacher_heads, op, ": head_map: expected -1 to ", teacher_heads - 1, ", got ",
                    head);
  }
}

inline void check_number(const char* op, const char* argument, const std::optional<Tensor>& x, const Tensor& like,
                         ScalarType dtype) {
  if (!x) return;
  check_device(op, argument, *x, like);
  check_dtype(op, argument, *x, dtype);
  STD_TORCH_CHECK(x->numel() == 1, op, ": ", argument, ": expected one number, got ", shape_of(*x));
}

}  // namespace kdfast
