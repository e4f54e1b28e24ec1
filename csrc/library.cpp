// Every operator's schema: the index of the native side. Kernels are registered beside their launchers
// (csrc/cpu/*.cpp, csrc/cuda/*.cu), shapes for tracing beside the public functions (kdfast/ops/*.py).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(kdfast, m) {
  // reduction: 0 none, 1 mean, 2 sum, 3 batchmean. save: 0 nothing, 1 the state of every row, 2 the gradient; it is the
  // second result. row_temperature, mask and weight are expanded to the leading dimensions; columns is the vocabulary.
  m.def(
      "kl_div(Tensor student, Tensor teacher, Tensor? row_temperature, Tensor? mask, Tensor? weight, "
      "Tensor? num_items, float temperature, SymInt columns, int reduction, float scale, int save) "
      "-> (Tensor loss, Tensor saved)");
  m.def(
      "kl_div_backward(Tensor grad_loss, Tensor state, Tensor student, Tensor teacher, Tensor? row_temperature, "
      "Tensor? mask, Tensor? weight, Tensor? num_items, float temperature, SymInt columns, int reduction, "
      "float scale) -> Tensor");
  // x *= factor, skipped on the device where the factor is 1. CUDA only: elsewhere the factor can be looked at.
  m.def("scale_(Tensor(a!) x, Tensor factor) -> ()");
}
