// What the launcher of the losses of queries and keys (qk.cpp) hands to their kernels (qk.cu): plain data, by value.
#pragma once
#include "cuda/layers.h"

namespace kdfast::cuda {

// Steps are in elements, from one to the next of [B, H, L, d].
struct QkMemory {
  const void* data;
  int64_t batch, head, token, number;
};
struct QkLayer {
  QkMemory student_q, student_k, teacher_q, teacher_k;
  void *dq, *dk;  // contiguous; null: not wanted
};

struct QkArgs {
  int layers, heads, key_heads, teacher_shared;  // teacher_shared: heads of the teacher that share keys
  int batch, length, student_size, teacher_size;
  Element student_type, teacher_type;
  float student_scale, teacher_scale;
  bool causal;
  const bool *query_mask = nullptr, *key_mask = nullptr;  // [B, L]
  const float* divisor = nullptr;
  const float* upstream = nullptr;  // of the loss, or of every head
  bool per_head;
  float* values;  // of every head
  float* parts;   // of every head and 64 queries (scores)
  float* grams;   // of every head two matrices [2d, 2d] (grams)
  float* maxima;  // of every head and query four numbers: of student and teacher the maximum and the sum of powers (kl)
  QkLayer layer[kMostLayers];
  HeadTable table;

  KDFAST_HD_MEMBER int tiles() const { return (length + 63) / 64; }
  KDFAST_HD_MEMBER int64_t all_heads() const { return int64_t(layers) * batch * heads; }
};

enum class QkForm : int { scores_mse, scores_kl, grams, count };

// The values, and where dq is wanted the gradients.
void launch_qk(const char* op, const Target& target, QkForm form, const QkArgs& args);
std::vector<NamedKernel> qk_kernels();

}  // namespace kdfast::cuda
