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

// Tokens of a block's tile.
constexpr int kQkTile = 64;

// How the Gram matrices of a head are made: in tiles of X's columns, `columns` of the student's numbers beside as many
// of the teacher's.
struct GramPlan {
  int columns, tiles;
  int splits;  // of the tokens, into blocks whose sums are added up

  KDFAST_HD_MEMBER int width() const { return tiles * 2 * columns; }
  KDFAST_HD_MEMBER int64_t numbers() const { return int64_t(width()) * width(); }
  KDFAST_HD_MEMBER int pairs() const { return tiles * (tiles + 1) / 2; }
};
// By the call alone, so that sums are the same on every device. About as many blocks as a large GPU holds at a time
// (132 multiprocessors of three), but 512 tokens for each, lest the sums be read more than the tokens.
inline GramPlan plan_grams(int size, int64_t length, int64_t heads) {
  GramPlan plan = {size > 32 && size <= 64 ? 64 : 32, 1, 1};
  plan.tiles = (size + plan.columns - 1) / plan.columns;
  const int64_t blocks = heads * 2 * plan.pairs(), most = (length + 511) / 512;
  const int64_t splits = blocks > 0 ? 396 / blocks : 1;
  plan.splits = int(splits < 1 ? 1 : splits < most ? splits : most);
  return plan;
}

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
  float* grams;   // of every split, head and matrix plan.numbers() (grams)
  GramPlan plan;
  float* rows;  // of every head and query four numbers: of student and teacher the maximum and 1 / the sum (kl)
  QkLayer layer[kMostLayers];
  HeadTable table;

  KDFAST_HD_MEMBER int tiles() const { return (length + kQkTile - 1) / kQkTile; }
  KDFAST_HD_MEMBER int64_t all_heads() const { return int64_t(layers) * batch * heads; }
};

enum class QkForm : int { scores_mse, scores_kl, grams, count };

// The values, and where dq is wanted the gradients; each form by its own file.
void launch_qk(const char* op, const Target& target, QkForm form, const QkArgs& args);
void launch_grams(const char* op, const Target& target, const QkArgs& args);
void launch_scores(const char* op, const Target& target, const QkArgs& args);
void launch_relations(const char* op, const Target& target, const QkArgs& args);
std::vector<NamedKernel> qk_kernels(), gram_kernels(), score_kernels(), relation_kernels();

}  // namespace kdfast::cuda
