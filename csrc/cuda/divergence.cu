// The kernels of the divergences: loss, state and gradient of every row in one launch.
//
// Least traffic: 3 x elements x size with the gradient (both logits read once, the gradient written once), 2 x without.
// Work: 4 powers and 30 instructions per pair of logits (counted in the machine code), because the powers are made
// again for the gradient rather than kept: at 3 TB/s about half of an H100's issue slots and of its special-function
// units.
//
//   columns       what keeps a row on chip between its two looks                                        passes
//   <= 1024       registers of 1, 8 or 32 lanes                                                         one
//   more          shared memory of a block, or of a cluster of 2 to 16 blocks (up to 930k columns       one
//                 of 16 bits, 465k of float32); three blocks share a multiprocessor where they can
//   no clusters   nothing: each row is read again, from L2 at best (5 x elements x size)                two
//   no gradient   nothing need be kept                                                                  one
//   mixed dtypes, strided columns, rows misaligned unlike: column by column, two passes
//
// Hopper, bfloat16: 55 registers and 64 to 76 KB of shared memory per block of 256 threads, no spills; rows arrive by
// 16-byte asynchronous copies and leave by 16-byte stores; 2 block barriers and 1 push per row and block.
// csrc/cuda/plan.h decides which kernel and shape a call takes.
#include "cuda/divergence_large.cuh"
#include "cuda/divergence_small.cuh"
#include "cuda/launch.cuh"

namespace kdfast::cuda {
namespace {

using Kernel = void (*)(DivergenceArgs);

template <class Terms, class T>
Kernel kernel_for(const RowPlan& plan) {
  if (plan.kernel == RowKernel::on_chip) return rows_on_chip<Terms, T>;
  if (plan.kernel == RowKernel::two_reads) return rows_in_two_reads<Terms, VectorColumns<T>>;
  if (plan.lanes == 1) return rows_in_registers<Terms, T, 1, 8, false>;
  if (plan.lanes == 8) return rows_in_registers<Terms, T, 8, 8, false>;
  return plan.vectors ? rows_in_registers<Terms, T, 32, 32, true> : rows_in_registers<Terms, T, 32, 32, false>;
}

template <class Terms>
Kernel kernel_for(const RowPlan& plan, Element type) {
  if (plan.kernel == RowKernel::any_layout) return rows_in_two_reads<Terms, AnyColumns>;
  if (type == Element::f32) return kernel_for<Terms, float>(plan);
  return type == Element::bf16 ? kernel_for<Terms, BFloat16>(plan) : kernel_for<Terms, Float16>(plan);
}

}  // namespace

void launch_kl_div(const char* op, const Target& target, const RowPlan& plan, DivergenceArgs args) {
  while ((1 << args.log_cluster) < plan.cluster) ++args.log_cluster;
  launch(op, kernel_for<KlDiv>(plan, args.student_type), target, {plan.blocks, plan.threads, plan.shared, plan.cluster},
         args);
}

std::vector<NamedKernel> divergence_kernels() {
  auto kernel = [](RowPlan plan, Element type) { return (const void*)kernel_for<KlDiv>(plan, type); };
  const RowPlan on_chip{RowKernel::on_chip, 0, 0}, two_reads{RowKernel::two_reads, 0, 0};
  const RowPlan any_layout{RowKernel::any_layout, 0, 0}, registers{RowKernel::registers, 0, 0};
  RowPlan lane = registers, vectors = registers;
  lane.lanes = 1;
  vectors.vectors = true;
  return {{"on_chip bfloat16", kernel(on_chip, Element::bf16)},
          {"on_chip float16", kernel(on_chip, Element::f16)},
          {"on_chip float32", kernel(on_chip, Element::f32)},
          {"two_reads bfloat16", kernel(two_reads, Element::bf16)},
          {"two_reads float32", kernel(two_reads, Element::f32)},
          {"any_layout", kernel(any_layout, Element::f32)},
          {"registers bfloat16, a lane per row", kernel(lane, Element::bf16)},
          {"registers bfloat16, 16-byte accesses", kernel(vectors, Element::bf16)},
          {"registers float32, 16-byte accesses", kernel(vectors, Element::f32)}};
}

}  // namespace kdfast::cuda
