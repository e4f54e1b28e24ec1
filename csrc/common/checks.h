// Checks of the native side. Python has already refused what a user can get wrong (kdfast/ops/_checks.py); these keep a
// direct torch.ops.kdfast call from touching memory that is not there.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

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

}  // namespace kdfast
