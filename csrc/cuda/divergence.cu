// The kernels of the divergences: loss, state and gradient of every row in one launch. Compiled once for each of them,
// with -DKDFAST_TERMS=KlDiv and so on (common/divergence_terms.h).
//
// Least traffic: 3 x elements x size with the gradient (both logits read once, the gradient written once), 2 x without.
// Powers are made again for every look rather than kept. Per pair of logits, counted in the machine code: 27
// instructions and 4 powers for kl_div, half of an H100's issue slots and of its special-function units at 3 TB/s;
// 71 and 9 (powers and logarithms) for js_div, which with its second look is bound by both before memory.
//
//   columns       what keeps a row on chip between its looks                                            passes
//   <= 1024       registers of 1, 8 or 32 lanes (<= 256 where rows are not whole 16-byte vectors)       one
//   more          shared memory of a block, or of a cluster of 2 to 16 blocks (up to 930k columns       one
//                 of 16 bits, 465k of float32); three blocks share a multiprocessor where they can
//   no clusters   nothing: each row is read again for every look, from L2 at best                       two or three
//   one look      nothing need be kept                                                                  one
//   mixed dtypes  float32 in shared memory, widened on the way                                           one
//   strided columns, rows misaligned unlike: column by column, two or three passes
//   top-k teachers: of the student the same, on chip or read twice, of the teacher its columns at every look
//
// A cross-entropy of labels costs one more power per look, in loops of its own: others stay as they are.
//
// Registers per thread, no spills: on_chip 64 (kl_div) to 80, two_reads 66 to 80, any_layout 60, registers of lanes 72,
// of vectors up to 168. Rows arrive by 16-byte asynchronous copies and leave by 16-byte stores; 2 block barriers and 1
// push of sums per row and block, and as many for a second look. csrc/cuda/plan.h decides which kernel and shape a call
// takes.
#include "cuda/divergence_large.cuh"
#include "cuda/divergence_small.cuh"
#include "cuda/divergence_topk.cuh"
#include "cuda/launch.cuh"

namespace kdfast::cuda {
namespace {

using Kernel = void (*)(DivergenceArgs);

template <template <class> class Terms, class T>
Kernel kernel_for(const RowPlan& plan) {
  if (plan.kernel == RowKernel::on_chip) return rows_on_chip<Terms, T>;
  if (plan.kernel == RowKernel::two_reads) return rows_in_two_reads<Terms, VectorColumns<T>>;
  if (plan.lanes == 1) return rows_in_registers<Terms, T, 1, 8, false>;
  if (plan.lanes == 8) return rows_in_registers<Terms, T, 8, 8, false>;
  return plan.vectors ? rows_in_registers<Terms, T, 32, 32, true> : rows_in_registers<Terms, T, 32, 8, false>;
}

template <template <class> class Terms, class T>
Kernel topk_kernel_for(const RowPlan& plan) {
  return plan.kernel == RowKernel::on_chip ? rows_of_topk<Terms, T, true> : rows_of_topk<Terms, T, false>;
}

// `type` is the student's.
template <template <class> class Terms>
Kernel kernel_for(const RowPlan& plan, Element type) {
  if constexpr (Terms<RowMath>::kTopk) {
    if (type == Element::f32) return topk_kernel_for<Terms, float>(plan);
    return type == Element::bf16 ? topk_kernel_for<Terms, BFloat16>(plan) : topk_kernel_for<Terms, Float16>(plan);
  } else {  // or these would compile the other kernels for it
    if (plan.kernel == RowKernel::any_layout) return rows_in_two_reads<Terms, AnyColumns>;
    if (type == Element::f32 || plan.widened) return kernel_for<Terms, float>(plan);
    return type == Element::bf16 ? kernel_for<Terms, BFloat16>(plan) : kernel_for<Terms, Float16>(plan);
  }
}

Grid grid_of(const RowPlan& plan) { return {plan.blocks, plan.threads, plan.shared, plan.cluster}; }

template <template <class> class Terms>
void launch_rows(const char* op, const Target& target, const RowPlan& plan, DivergenceArgs args) {
  while ((1 << args.log_cluster) < plan.cluster) ++args.log_cluster;
  launch(op, kernel_for<Terms>(plan, args.student_type), target, grid_of(plan), args);
}

template <template <class> class Terms>
bool has_room_for(const char* op, const Target& target, const RowPlan& plan, Element type) {
  return has_room(op, (const void*)kernel_for<Terms>(plan, type), target, grid_of(plan));
}

constexpr int kReferThreads = 256;

// A thread per row: 80 bytes of its own.
template <template <class> class Terms>
__global__ void __launch_bounds__(kReferThreads)
    refer_rows(const float* states, const float* maxima, const __grid_constant__ RowNumbers row_temperature,
               float temperature, int64_t rows, float* results) {
  const int64_t row = int64_t(blockIdx.x) * kReferThreads + threadIdx.x;
  if (row >= rows) return;
  const float own = row_temperature.data ? row_temperature.data[offset(row_temperature.offsets, row)] : temperature;
  const RowState<float> state = state_at(states, row);
  write_state(results, row, referred<Terms<RowMath>>(state, maxima[row], maxima[rows + row], float(kLog2e) / own));
}

template <template <class> class Terms>
void refer(const Target& target, const float* states, const float* maxima, const RowNumbers& row_temperature,
           float temperature, int64_t rows, float* results) {
  launch("divergence_referred", refer_rows<Terms>, target, {(rows + kReferThreads - 1) / kReferThreads, kReferThreads},
         states, maxima, row_temperature, temperature, rows, results);
}

template <template <class> class Terms>
std::vector<NamedKernel> list() {
  auto kernel = [](RowPlan plan, Element type) { return (const void*)kernel_for<Terms>(plan, type); };
  const RowPlan on_chip{RowKernel::on_chip, 0, 0}, two_reads{RowKernel::two_reads, 0, 0};
  if constexpr (Terms<RowMath>::kTopk) {
    return {{"on_chip bfloat16", kernel(on_chip, Element::bf16)},
            {"on_chip float32", kernel(on_chip, Element::f32)},
            {"two_reads bfloat16", kernel(two_reads, Element::bf16)},
            {"two_reads float32", kernel(two_reads, Element::f32)}};
  }
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

}  // namespace

template <template <class> class Terms>
DivergenceKernels divergence_kernels_of() {
  return {Terms<RowMath>::kSecondLook, has_room_for<Terms>, launch_rows<Terms>, refer<Terms>, list<Terms>};
}
template DivergenceKernels divergence_kernels_of<KDFAST_TERMS>();

}  // namespace kdfast::cuda
