// Losses between the scores of queries and keys: which kernels a form takes, and the heads' values from their parts.
#include "cuda/launch.cuh"
#include "cuda/qk.h"
#include "cuda/qk_heads.cuh"

namespace kdfast::cuda {
namespace {

// A thread for every head.
__global__ void __launch_bounds__(kThreads) head_values(const __grid_constant__ QkArgs args) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= args.all_heads()) return;
  const Head h(args, index);
  double sum = 0;
  for (int i = 0; i < args.tiles(); ++i) sum += args.parts[index * args.tiles() + i];
  args.values[index] = h.skipped ? 0.f : float(h.weight * sum);
}

}  // namespace

void launch_qk(const char* op, const Target& target, QkForm form, const QkArgs& args) {
  if (form == QkForm::grams) return launch_grams(op, target, args);
  form == QkForm::scores_kl ? launch_relations(op, target, args) : launch_scores(op, target, args);
  launch(op, head_values, target, {(args.all_heads() + kThreads - 1) / kThreads, kThreads}, args);
}

std::vector<NamedKernel> qk_kernels() {
  std::vector<NamedKernel> all = gram_kernels();
  for (const auto& family : {score_kernels(), relation_kernels()}) all.insert(all.end(), family.begin(), family.end());
  return all;
}

}  // namespace kdfast::cuda
