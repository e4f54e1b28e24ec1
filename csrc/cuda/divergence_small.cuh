// Classification heads: several rows per block, each held in the registers of a group of lanes; loss and gradient in
// one launch, no shared memory, no barrier.
#pragma once
#include "cuda/cluster.cuh"
#include "cuda/divergence_rows.cuh"

namespace kdfast::cuda {

// How `lanes` neighbours share a row of at most lanes * held columns: in 16-byte vectors where every row is aligned,
// else column by column.
template <class T, int lanes, int held, bool vectors>
struct InLanes {
  static constexpr int kWidth = vectors ? Vector<T>::count : 1, kSteps = held / kWidth;
  const T *student, *teacher;
  int lane, columns;

  // Of the lane's step-th vector (or single column).
  KDFAST_DEVICE int column(int step) const { return (step * lanes + lane) * kWidth; }

  KDFAST_DEVICE Logits<held> read(bool counted) const {
    Logits<held> z;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int at = column(step), first = step * kWidth;
      const bool exists = counted && at < columns;
      if constexpr (vectors) {
        Vector<T>::widen(exists ? load16(student + at) : Vector<T>::lowest(), z.s + first);
        Vector<T>::widen(exists ? load16(teacher + at) : Vector<T>::lowest(), z.t + first);
      } else {
        z.s[first] = exists ? Vector<T>::widen_one(student[at]) : -INFINITY;
        z.t[first] = exists ? Vector<T>::widen_one(teacher[at]) : -INFINITY;
      }
    }
    return z;
  }
  template <class Gradient>
  KDFAST_DEVICE void write(T* gradient, const Logits<held>& z, Gradient of) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int at = column(step), first = step * kWidth;
      if (at >= columns) continue;
      if constexpr (vectors) {
        float g[kWidth];
#pragma unroll
        for (int e = 0; e < kWidth; ++e) g[e] = of(z.s[first + e], z.t[first + e]);
        store16(gradient + at, Vector<T>::narrow(g));
      } else {
        gradient[at] = Vector<T>::narrow_one(of(z.s[first], z.t[first]));
      }
    }
  }
};

template <class Terms, int lanes, int held>
KDFAST_DEVICE RowState<float> state_of(const Logits<held>& z, float k) {
  float top_s = z.s[0], top_t = z.t[0];
#pragma unroll
  for (int e = 1; e < held; ++e) top_s = fmaxf(top_s, z.s[e]), top_t = fmaxf(top_t, z.t[e]);
  RowState<float> state;
  state.max_s = fmaxf(kNoMaximum, warp_max<lanes>(top_s));
  state.max_t = fmaxf(kNoMaximum, warp_max<lanes>(top_t));
#pragma unroll
  for (int e = 0; e < held; ++e) Terms::count(state, z.s[e] - state.max_s, z.t[e] - state.max_t, k);
  state.sum_s = warp_sum<lanes>(state.sum_s);
  state.sum_t = warp_sum<lanes>(state.sum_t);
  state.dot = warp_sum<lanes>(state.dot);
  return state;
}

template <class Terms, class T, int lanes, int held, bool vectors>
__global__ void __launch_bounds__(kRegisterThreads) rows_in_registers(const __grid_constant__ DivergenceArgs args) {
  const int64_t place = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
  const bool exists = place < args.rows;
  // Lanes beyond the last row stay for the shuffles and write nothing.
  const int64_t row = exists ? place : args.rows - 1;
  const bool counted = exists && is_counted(args, row);
  const InLanes<T, lanes, held, vectors> in{(const T*)args.student + args.student_rows(row),
                                            (const T*)args.teacher + args.teacher_rows(row), int(threadIdx.x % lanes),
                                            int(args.columns)};
  const Logits<held> z = in.read(counted);
  const RowFactors factors = factors_of(args, row);
  const RowState<float> state = args.given ? given_state(args, row) : state_of<Terms, lanes>(z, factors.k);
  if (!exists) return;
  clear_gradient(args, row, sizeof(T), counted ? args.columns : 0, in.lane, lanes);
  if (!counted) {
    if (in.lane == 0) write_masked(args, row);
    return;
  }
  if (in.lane == 0) write_results(args, row, factors.coefficient * Terms::loss(state, factors.k), state);
  if (!args.gradient) return;
  const typename Terms::Gradient of(state, factors.gradient);
  in.write((T*)gradient_of(args, row, sizeof(T)), z,
           [&](float x, float y) { return of(x - state.max_s, y - state.max_t, factors.k); });
}

}  // namespace kdfast::cuda
