// Every operator's schema: the index of the native side. Kernels are registered beside their launchers
// (csrc/cpu/*.cpp, csrc/cuda/*.cu), shapes for tracing beside the public functions (kdfast/ops/*.py).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(kdfast, m) {
  // All divergences and kd_loss. kind: of csrc/common/divergence_terms.h; mixing: beta or skew. columns count of these
  // logits; they are a shard, from vocab_start on, of a whole vocabulary. labels, row_temperature, mask and weight are
  // expanded to the leading dimensions. reduction: 0 none, 1 mean, 2 sum, 3 batchmean. distillation: kd_loss, whose
  // components (divergence and cross-entropy, without alpha) are the second result. state, known: what is known of the
  // rows already: 0 nothing, 1 the normalisers, 2 everything. save: 0 nothing, 1 the state of every row, 2 the
  // gradient; it is the third result.
  m.def(
      "divergence(Tensor student, Tensor teacher, Tensor? labels, Tensor? row_temperature, Tensor? mask, "
      "Tensor? weight, Tensor? num_items, int kind, float mixing, float temperature, SymInt columns, "
      "SymInt vocabulary, SymInt vocab_start, int reduction, float scale, bool distillation, float alpha, "
      "float smoothing, int ignore_index, Tensor? state, int known, int save) "
      "-> (Tensor loss, Tensor components, Tensor saved)");
  m.def(
      "divergence_backward(Tensor grad_loss, Tensor state, Tensor student, Tensor teacher, Tensor? labels, "
      "Tensor? row_temperature, Tensor? mask, Tensor? weight, Tensor? num_items, int kind, float mixing, "
      "float temperature, SymInt columns, SymInt vocabulary, SymInt vocab_start, int reduction, float scale, "
      "bool distillation, float alpha, float smoothing, int ignore_index) -> Tensor");
  // x *= factor, skipped on the device where the factor is 1. CUDA only: elsewhere the factor can be looked at.
  m.def("scale_(Tensor(a!) x, Tensor factor) -> ()");
}
