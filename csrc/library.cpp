// Every operator's schema: the index of the native side. Kernels are registered beside their launchers
// (csrc/cpu/*.cpp, csrc/cuda/*.cu), shapes for tracing beside the public functions (kdfast/ops/*.py).
#include <torch/csrc/stable/library.h>

#include "common/divergence_schema.h"
#include "host/build_info.h"

STABLE_TORCH_LIBRARY(kdfast, m) {
  // All divergences and kd_loss. kind: of csrc/common/divergence_terms.h; mixing: beta or skew. columns count of these
  // logits; they are a shard, from vocab_start on, of a whole vocabulary. labels, row_temperature, mask and weight are
  // expanded to the leading dimensions. indices: of top-k kinds, whose teacher is the log-probabilities of these
  // columns. The rows' losses, times scale and over divisor (one number, or [2] for each component; where it is 0
  // nothing counts), are summed but for per_row. distillation: kd_loss, whose components (divergence and
  // cross-entropy, without alpha) are the second result. state, known: what is known of the rows already: 0 nothing, 1
  // the normalisers, 2 everything. save: 0 nothing, 1 the state of every row, 2 the gradient; it is the third result.
  const std::string call = "Tensor student, Tensor teacher, " + kdfast::divergence_arguments();
  const std::string forward =
      "divergence(" + call + ", Tensor? state, int known, int save) -> (Tensor loss, Tensor components, Tensor saved)";
  const std::string backward = "divergence_backward(Tensor grad_loss, Tensor state, " + call + ") -> Tensor";
  // The same with the gradient into given memory, whose dtype may differ from the student's. On the CPU this may be the
  // student's own.
  const std::string into = "divergence_into(Tensor(a!) gradient, " + call +
                           ", Tensor? state, int known) -> (Tensor loss, Tensor components)";
  for (const std::string* schema : {&forward, &backward, &into}) m.def(schema->c_str());
  // Rows' states [..., 9] of a shard, which these become over all shards when they are added up: referred to maxima
  // [2, ...] of student and teacher over all of them. kind and temperatures as above.
  m.def(
      "divergence_referred(Tensor state, Tensor maxima, Tensor? row_temperature, int kind, float temperature) "
      "-> Tensor");
  // Distances between layers, each [B, H, R, C]: the sum over layers and heads of weight times the sum over rows of a
  // distance of csrc/common/layer_terms.h, over divisor. row_mask [B, R], column_mask [B, C]; head_map (the teacher's
  // head of a student's, or -1) and weight of every layer and head in turn; floor: NaN for none. per_row: every row's
  // own.
  m.def(
      "layer_distance(Tensor[] student, Tensor[] teacher, Tensor? row_mask, Tensor? column_mask, Tensor? divisor, "
      "int kind, int[] head_map, float[] weight, float floor, bool per_row, bool gradient) "
      "-> (Tensor loss, Tensor[] gradients)");
  m.def(
      "layer_distance_backward(Tensor grad_loss, Tensor[] student, Tensor[] teacher, Tensor? row_mask, "
      "Tensor? column_mask, Tensor? divisor, int kind, int[] head_map, float[] weight, float floor, bool per_row) "
      "-> Tensor[]");
  // Losses between the scores a q k^T of student and teacher, without scores: layers of queries [B, H, L, d] and keys
  // [B, heads that share, L, d]. kind: of csrc/common/qk.h; masks [B, L]; the rest as of layer_distance. Gradients of
  // all layers' queries, then of their keys.
  m.def(
      "qk_distance(Tensor[] student_q, Tensor[] student_k, Tensor[] teacher_q, Tensor[] teacher_k, Tensor? query_mask, "
      "Tensor? key_mask, Tensor? divisor, int kind, float student_scale, float teacher_scale, bool causal, "
      "int[] head_map, float[] weight, bool per_head, bool gradient) -> (Tensor loss, Tensor[] gradients)");
  m.def(
      "qk_distance_backward(Tensor grad_loss, Tensor[] student_q, Tensor[] student_k, Tensor[] teacher_q, "
      "Tensor[] teacher_k, Tensor? query_mask, Tensor? key_mask, Tensor? divisor, int kind, float student_scale, "
      "float teacher_scale, bool causal, int[] head_map, float[] weight, bool per_head) -> Tensor[]");
  // The part of a matrix, whose rows lie side by side, where live rows and columns meet; and such a part put back:
  // added to what is there, or with zeros in all the rest. Indices are sorted, each once; none: all.
  m.def("pack_part(Tensor matrix, Tensor? rows, Tensor? columns) -> Tensor");
  m.def("unpack_part_(Tensor(a!) matrix, Tensor part, Tensor? rows, Tensor? columns, bool accumulate) -> ()");
  // c = a b + bias, or c += a b: matrices of any strides, of one type, or a of float32 with b of 16 bits. c is of the
  // type that sums have, float32 (float64), or of b's; its rows or columns lie side by side. CPU only.
  m.def("matmul_(Tensor(a!) c, Tensor a, Tensor b, Tensor? bias, bool add) -> ()");
  // x [rows, columns] times the live blocks [blocks, out, in] of a matrix. begin: of each of its block rows (turned),
  // or block columns, where its blocks are in index, which of the inner dimension they are at, and place, where their
  // values lie. And the live blocks [blocks, rows, columns] of grad^T x, walked by_rows or by columns.
  m.def(
      "block_sparse_product(Tensor x, Tensor values, Tensor begin, Tensor index, Tensor place, Tensor? bias, "
      "bool turned) -> Tensor");
  m.def(
      "block_sparse_gradient(Tensor grad, Tensor x, Tensor begin, Tensor index, Tensor place, int rows, int columns, "
      "bool by_rows) -> Tensor");
  // The sum over the rows of 16-bit numbers, which lie side by side, in their type. CPU only.
  m.def("column_sums(Tensor x) -> Tensor");
  // x *= factor, skipped on the device where the factor is 1. CUDA only: elsewhere the factor can be looked at.
  m.def("scale_(Tensor(a!) x, Tensor factor) -> ()");
}

#if !defined(KDFAST_WITH_CUDA)  // else csrc/cuda/runtime.cpp has it
const kdfast::CudaBuild* kdfast::cuda_build() { return nullptr; }
#endif
