// Distances between the rows of layers: a warp per row, all layers in one launch. 3 x elements x size of traffic; a
// second look, for sums or the gradient, finds the row in L1.
#include <algorithm>
#include <type_traits>

#include "cuda/block.cuh"
#include "cuda/divergence_rows.cuh"
#include "cuda/launch.cuh"
#include "cuda/layers.h"

namespace kdfast::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kBlocksPerMultiprocessor = 8;

// A row of both sides, seen by a warp: any types and strides, one number at a time.
struct AnyRow {
  const void *student, *teacher;
  void* gradient;
  Element student_type, teacher_type;
  int64_t student_step, teacher_step, columns;
  int lane;

  // f(column, s, t)
  template <class F>
  KDFAST_DEVICE void visit(F f) const {
    for (int64_t c = lane; c < columns; c += 32) {
      f(c, load_any(student_type, student, c * student_step), load_any(teacher_type, teacher, c * teacher_step));
    }
  }
  template <class F>
  KDFAST_DEVICE void write(F f) const {
    visit([&](int64_t c, float s, float t) { store_any(student_type, gradient, c, f(c, s, t)); });
  }
};

// The same of one type and neighbouring columns: 16 bytes at a time where all three rows start on them.
template <class T>
struct SameRow {
  const T *student, *teacher;
  T* gradient;
  int64_t columns;
  int lane;

  KDFAST_DEVICE int64_t vectors() const {
    const bool whole = (uintptr_t(student) | uintptr_t(teacher) | uintptr_t(gradient)) % 16 == 0;
    return whole ? columns / Vector<T>::count : 0;
  }
  template <class F, class Store>
  KDFAST_DEVICE void each(F f, Store store) const {
    constexpr int n = Vector<T>::count;
    const int64_t whole = vectors();
    for (int64_t v = lane; v < whole; v += 32) {
      float s[n], t[n], x[n];
      Vector<T>::widen(*(const uint4*)(student + v * n), s);  // not load16: the row is looked at again
      Vector<T>::widen(*(const uint4*)(teacher + v * n), t);
#pragma unroll
      for (int e = 0; e < n; ++e) x[e] = f(v * n + e, s[e], t[e]);
      store(v, x);
    }
  }
  template <class F>
  KDFAST_DEVICE void visit(F f) const {
    auto all = [&](int64_t c, float s, float t) {
      f(c, s, t);
      return 0.f;
    };
    each(all, [](int64_t, const float*) {});
    for (int64_t c = vectors() * Vector<T>::count + lane; c < columns; c += 32) {
      f(c, Vector<T>::widen_one(student[c]), Vector<T>::widen_one(teacher[c]));
    }
  }
  template <class F>
  KDFAST_DEVICE void write(F f) const {
    each(f, [&](int64_t v, const float* x) { store16(gradient + v * Vector<T>::count, Vector<T>::narrow(x)); });
    for (int64_t c = vectors() * Vector<T>::count + lane; c < columns; c += 32) {
      const float x = f(c, Vector<T>::widen_one(student[c]), Vector<T>::widen_one(teacher[c]));
      gradient[c] = Vector<T>::narrow_one(x);
    }
  }
};

// ---- distances of a row: the value, and where it is wanted the gradient times factor ----
struct SquaredOf {
  template <class Row>
  KDFAST_DEVICE static float run(const Row& row, const bool* counted, float floor, float factor) {
    auto difference = [&](int64_t c, float s, float t) {
      if (counted && !counted[c]) return 0.f;
      const float from = s <= floor ? 0.f : s, to = t <= floor ? 0.f : t;
      return from == to ? 0.f : from - to;
    };
    float sum = 0.f;
    row.visit([&](int64_t c, float s, float t) {
      const float d = difference(c, s, t);
      sum = fmaf(d, d, sum);
    });
    if (row.gradient) {
      row.write([&](int64_t c, float s, float t) { return s <= floor ? 0.f : 2 * factor * difference(c, s, t); });
    }
    return warp_sum(sum);
  }
};

template <class Terms>
struct VectorsOf {
  template <class Row>
  KDFAST_DEVICE static float run(const Row& row, const bool*, float, float factor) {
    float ss = 0.f, tt = 0.f, st = 0.f, sd = 0.f, dd = 0.f;
    row.visit([&](int64_t, float s, float t) {
      const float d = t - s;
      ss = fmaf(s, s, ss);
      tt = fmaf(t, t, tt);
      st = fmaf(s, t, st);
      sd = fmaf(s, d, sd);
      dd = fmaf(d, d, dd);
    });
    const VectorSums sums{warp_sum(ss), warp_sum(tt), warp_sum(st), warp_sum(sd), warp_sum(dd)};
    const DistanceResult result = Terms::of(sums);
    if (row.gradient) {
      const float of_student = float(factor * result.of_student), of_other = float(factor * result.of_other);
      row.write([&](int64_t, float s, float t) { return of_student * s + of_other * (result.near ? s - t : t); });
    }
    return float(result.value);
  }
};

struct KlOf {
  template <class Row>
  KDFAST_DEVICE static float run(const Row& row, const bool* counted, float, float factor) {
    using Terms = KlDiv<ColumnMath>;
    const float k = float(kLog2e);
    auto shown = [&](int64_t c, float x) { return counted && !counted[c] ? -INFINITY : x; };
    float top_s = -INFINITY, top_t = -INFINITY;
    row.visit([&](int64_t c, float s, float t) {
      top_s = fmaxf(top_s, shown(c, s));
      top_t = fmaxf(top_t, shown(c, t));
    });
    RowState<float> state = no_columns<float>();
    state.max_s = fmaxf(kNoMaximum, warp_max(top_s));
    state.max_t = fmaxf(kNoMaximum, warp_max(top_t));
    row.visit([&](int64_t c, float s, float t) { count<Terms>(state, shown(c, s), shown(c, t), k); });
    state.sum_s = warp_sum(state.sum_s);
    state.sum_t = warp_sum(state.sum_t);
    state.moment_t = warp_sum(state.moment_t);
    if (row.gradient) {
      const Gradient<KlDiv> of(state, k, factor, {});
      row.write([&](int64_t c, float s, float t) { return of(shown(c, s), shown(c, t)); });
    }
    return KlDiv<RowMath>::loss(state, k, {});
  }
};

// ---- kernels ----
// Where a row lies.
struct RowPlace {
  const LayerPair& pair;
  int64_t batch, row, teacher_head, student_offset, teacher_offset, gradient_offset;
  float weight;
  bool counted;

  KDFAST_DEVICE RowPlace(const LayerArgs& args, int64_t index)
      : pair(args.layer[index / (args.batch * args.heads * args.rows)]) {
    row = index % args.rows;
    const int64_t above = index / args.rows, head = above % args.heads;
    batch = above / args.heads % args.batch;
    const int64_t layer = above / args.heads / args.batch, entry = layer * args.heads + head;
    teacher_head = args.table.teacher[entry];
    weight = args.table.weight[entry];
    counted = teacher_head >= 0 && (!args.row_mask || args.row_mask[batch * args.rows + row]);
    auto offset = [&](const LayerMemory& m, int64_t h) { return batch * m.batch + h * m.head + row * m.row; };
    student_offset = offset(pair.student, head);
    teacher_offset = offset(pair.teacher, teacher_head < 0 ? 0 : teacher_head);
    gradient_offset = ((batch * args.heads + head) * args.rows + row) * args.columns;
  }
};

template <class T>
KDFAST_DEVICE SameRow<T> row_at(const LayerArgs& args, const RowPlace& at, int lane) {
  return {(const T*)at.pair.student.data + at.student_offset, (const T*)at.pair.teacher.data + at.teacher_offset,
          at.pair.gradient ? (T*)at.pair.gradient + at.gradient_offset : nullptr, args.columns, lane};
}
KDFAST_DEVICE AnyRow any_row_at(const LayerArgs& args, const RowPlace& at, int lane) {
  auto place = [](const void* p, Element type, int64_t i) { return (char*)p + i * size_of(type); };
  return {place(at.pair.student.data, args.student_type, at.student_offset),
          place(at.pair.teacher.data, args.teacher_type, at.teacher_offset),
          at.pair.gradient ? place(at.pair.gradient, args.student_type, at.gradient_offset) : nullptr,
          args.student_type,
          args.teacher_type,
          at.pair.student.column,
          at.pair.teacher.column,
          args.columns,
          lane};
}

struct AnyLayout;

// `T`: of both sides' contiguous rows, or AnyLayout of any types and strides.
template <class Of, class T>
__global__ void __launch_bounds__(kThreads, 2) layer_rows(const __grid_constant__ LayerArgs args) {
  const int lane = threadIdx.x % 32;
  const int64_t all = int64_t(args.layers) * args.batch * args.heads * args.rows;
  const float divisor = args.divisor ? *args.divisor : 1.f;
  double sum = 0;
  for (int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; i < all; i += int64_t(gridDim.x) * kWarps) {
    const RowPlace at(args, i);
    float value = 0.f;
    if (at.counted) {
      const float weight = divisor > 0.f ? at.weight / divisor : 0.f;
      const float factor = args.upstream ? weight * args.upstream[args.per_row ? i : 0] : weight;
      const bool* columns = args.column_mask ? args.column_mask + at.batch * args.columns : nullptr;
      if constexpr (std::is_same_v<T, AnyLayout>) {
        value = weight * Of::run(any_row_at(args, at, lane), columns, args.floor, factor);
      } else {
        value = weight * Of::run(row_at<T>(args, at, lane), columns, args.floor, factor);
      }
    } else if (at.pair.gradient) {
      char* gradient = (char*)at.pair.gradient + at.gradient_offset * size_of(args.student_type);
      clear((uint16_t*)gradient, args.columns * size_of(args.student_type) / 2, lane, 32);
    }
    if (lane != 0) continue;
    if (args.per_row) {
      args.values[i] = value;
    } else {
      sum += value;
    }
  }
  if (args.per_row) return;
  sum = block_sum(sum, (double*)shared_memory());
  if (threadIdx.x == 0) args.values[blockIdx.x] = float(sum);
}

struct Kernels {
  using Kernel = void (*)(const LayerArgs);
  Kernel of[4];  // by Element, and of any layout
};
template <class Of>
constexpr Kernels kernels_of() {
  return {{layer_rows<Of, float>, layer_rows<Of, BFloat16>, layer_rows<Of, Float16>, layer_rows<Of, AnyLayout>}};
}
// By Distance.
const Kernels kKernels[] = {kernels_of<SquaredOf>(), kernels_of<VectorsOf<CosineDistance>>(),
                            kernels_of<VectorsOf<NormalizedDistance>>(), kernels_of<KlOf>()};

int64_t blocks_of(const LayerArgs& args, int multiprocessors) {
  const int64_t rows = int64_t(args.layers) * args.batch * args.heads * args.rows;
  return std::clamp<int64_t>((rows + kWarps - 1) / kWarps, 1, int64_t(multiprocessors) * kBlocksPerMultiprocessor);
}

}  // namespace

int64_t layer_values(const LayerArgs& args, int multiprocessors) {
  return args.per_row ? int64_t(args.layers) * args.batch * args.heads * args.rows : blocks_of(args, multiprocessors);
}

int64_t launch_layers(const char* op, const Target& target, Distance kind, const LayerArgs& args, int multiprocessors) {
  bool same = args.student_type == args.teacher_type;
  for (int i = 0; i < args.layers; ++i) {
    same = same && args.layer[i].student.column == 1 && args.layer[i].teacher.column == 1;
  }
  const Grid grid{blocks_of(args, multiprocessors), kThreads, kThreads * int64_t(sizeof(double))};
  launch(op, kKernels[int(kind)].of[same ? int(args.student_type) : 3], target, grid, args);
  return layer_values(args, multiprocessors);
}

std::vector<NamedKernel> layer_kernels() {
  const char* const names[] = {"squared", "cosine", "normalized", "kl"};
  std::vector<NamedKernel> all;
  for (int kind = 0; kind < int(Distance::count); ++kind) {
    all.push_back({std::string("layer distance, ") + names[kind], (const void*)kKernels[kind].of[0]});
  }
  return all;
}

}  // namespace kdfast::cuda
