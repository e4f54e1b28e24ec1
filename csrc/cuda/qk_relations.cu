// KL(softmax(b Ta Tb^T) || softmax(a Sa Sb^T)) over the rows of scores, 64 queries by 32 keys at a time: one look for
// the rows' maxima and sums (csrc/common/row_state.h), one for dq and one for dk, each of which makes the scores again:
// 8 L^2 d multiply-adds. Products are of 16-bit numbers where both sides have them, else of float32; q and k are read L
// / 64 times, from L2.
//
// Logits are scores times log2 e: powers of two are all that is left to do for each, and a factor for every row.
#include "cuda/divergence_rows.cuh"
#include "cuda/launch.cuh"
#include "cuda/qk_products.cuh"

namespace kdfast::cuda {
namespace {

template <class T>
constexpr Element kElement = Element::f32;
template <>
constexpr Element kElement<BFloat16> = Element::bf16;
template <>
constexpr Element kElement<Float16> = Element::f16;

// Up to 64 numbers of tokens, in rows that no two lanes of a fragment meet in a bank of.
template <class T>
constexpr int kRowOf = 64 + 16 / int(sizeof(T));

// Copies `count` tokens from `token` on, their 64 numbers from `column` on.
template <class T, int count>
KDFAST_DEVICE void copy_tokens(const Tokens& of, T* to, int token, int column) {
  constexpr int width = 16 / sizeof(T), of_row = 64 / width;
#pragma unroll 1
  for (int i = threadIdx.x; i < count * of_row; i += kThreads) {
    const int row = i / of_row, first = column + i % of_row * width;
    T* place = to + row * kRowOf<T> + i % of_row * width;
    if (!of.counts(token + row) || first >= of.size) {
      shared_store16(place, {0, 0, 0, 0});
    } else if (of.vectors && of.type == kElement<T>) {
      copy16_async(place, of.at(token + row, first));
    } else {
#pragma unroll 1
      for (int c = 0; c < width; ++c) {
        place[c] = Vector<T>::narrow_one(first + c < of.size ? of.load(token + row, first + c) : 0.f);
      }
    }
  }
}

enum class Look { values, queries, keys };

template <class T, Look look>
class Relations {
 public:
  static constexpr int kRow = kRowOf<T>;
  static constexpr int64_t kMetBytes = kMet * kRow * int64_t(sizeof(T)), kOwnBytes = kOwn / kMet * kMetBytes;
  // Of a met token the key's bias, or the query's row of numbers.
  static constexpr int64_t kInfoBytes = kMet * 4 * sizeof(float);
  static constexpr int64_t shared_bytes() { return 2 * (kOwnBytes + 2 * kMetBytes + kInfoBytes); }

  KDFAST_DEVICE explicit Relations(const QkArgs& args)
      : args_(args),
        of_(args, keys, look != Look::values),
        panels_((max(args.student_size, args.teacher_size) + 63) / 64) {}

  KDFAST_DEVICE void run() {
    double value = 0;
    Sums total = {};
    for (int i = 0; i < of_.share; ++i) {
      const Head h(args_, of_.head + i);
      if (h.skipped) continue;
      Sums sums = {};
      add_head(h, sums);
      if constexpr (look == Look::values) value = value_of(h);
      const float factor = h.factor(args_) * args_.student_scale / kScale;
#pragma unroll
      for (int c = 0; c < 4 * kOwnColumns; ++c) total[c / 4][c % 4] += factor * sums[c / 4][c % 4];
    }
    if constexpr (look == Look::values) return write_part(args_, of_, value);
    const TokenGradient to(args_, Head(args_, of_.head), keys);
#pragma unroll
    for (int n = 0; n < kOwnColumns; ++n) to.write(first_of_warp(), 64 * of_.panel + 8 * n, total[n], 1.f);
  }

 private:
  static constexpr bool keys = look == Look::keys;
  // Differences of probabilities, which float16 would lose: of a long row they are small.
  static constexpr float kScale = kElement<T> == Element::f16 ? 0x1p14f : 1.f;

  struct Row {  // of a query: maximum and 1 / sum of its powers, of either side
    float max_s, of_s, max_t, of_t;
  };

  KDFAST_DEVICE int first_of_warp() const { return of_.first + int(threadIdx.x) / 32 * 16; }
  KDFAST_DEVICE static T* own(int side) { return (T*)(shared_memory() + side * kOwnBytes); }
  KDFAST_DEVICE static T* met(int buffer, int side) {
    return (T*)(shared_memory() + 2 * kOwnBytes + (2 * buffer + side) * kMetBytes);
  }
  KDFAST_DEVICE static float* info(int buffer) {
    return (float*)(shared_memory() + 2 * kOwnBytes + 4 * kMetBytes + buffer * kInfoBytes);
  }
  // Panels in the order in which that of the gradient comes last: it is there when the scores are.
  KDFAST_DEVICE int panel(int i) const { return (of_.panel + 1 + i) % panels_; }

  KDFAST_DEVICE void take_own(const Head& h, int panel) const {
    copy_tokens<T, kOwn>(h.learned(args_, keys), own(0), of_.first, 64 * panel);
    copy_tokens<T, kOwn>(h.taught(args_, keys), own(1), of_.first, 64 * panel);
  }
  KDFAST_DEVICE void take_met(const Head& h, int buffer, int token, int panel) const {
    const Tokens student = h.learned(args_, !keys);
    copy_tokens<T, kMet>(student, met(buffer, 0), token, 64 * panel);
    copy_tokens<T, kMet>(h.taught(args_, !keys), met(buffer, 1), token, 64 * panel);
    if (threadIdx.x >= kMet) return;
    const int i = threadIdx.x;
    if constexpr (keys) {
      ((Row*)info(buffer))[i] = token + i < args_.length ? row_of(h, token + i) : Row{};
    } else {
      info(buffer)[i] = student.counts(token + i) ? 0.f : -INFINITY;
    }
  }
  KDFAST_DEVICE Row row_of(const Head& h, int query) const {
    const float* at = args_.rows + (h.index * args_.length + query) * 4;
    return {at[0], at[1], at[2], at[3]};
  }

  KDFAST_DEVICE void add_head(const Head& h, Sums& sums) {
    __syncthreads();  // the head before is done
#pragma unroll
    for (int half = 0; half < 2; ++half) begin_row(h, half);
    if (panels_ == 1) take_own(h, 0);
    take_met(h, 0, 0, panel(0));
    int buffer = 0;
    for (int token = 0; token < args_.length; token += kMet) {
      Scores student = {}, teacher = {};
      for (int i = 0; i < panels_; ++i, buffer ^= 1) {
        copies_arrived();
        __syncthreads();  // what is met now is there, and what was met before is multiplied
        const bool last = i + 1 == panels_;
        if (!last || token + kMet < args_.length) {
          take_met(h, buffer ^ 1, last ? token + kMet : token, panel(last ? 0 : i + 1));
        }
        if (panels_ > 1) {
          take_own(h, panel(i));
          copies_arrived();
          __syncthreads();  // the panel is whole
        }
        multiply(student, 0, buffer, args_.student_size - 64 * panel(i));
        multiply(teacher, 1, buffer, args_.teacher_size - 64 * panel(i));
        if (last) meet(sums, student, teacher, buffer);
      }
    }
  }
  KDFAST_DEVICE static void multiply(Scores& scores, int side, int buffer, int size) {
    const int depth = min((size + 15) / 16 * 16, 64);
    const T* of_warp = own(side) + threadIdx.x / 32 * 16 * kRow;
    if constexpr (sizeof(T) == 4) {
      add_scores<kRow>(scores, of_warp, met(buffer, side), depth);
    } else {
      add_scores<T, kRow>(scores, of_warp, met(buffer, side), depth);
    }
  }

  // ---- what is made of the scores ----
  KDFAST_DEVICE void begin_row(const Head& h, int half) {
    if constexpr (look == Look::values) {
      states_[half] = no_columns<float>();
    } else if constexpr (look == Look::queries) {
      const int query = first_of_warp() + lane_row() + 8 * half;
      rows_[half] = query < args_.length ? row_of(h, query) : Row{};
    }
  }
  KDFAST_DEVICE void meet(Sums& sums, Scores& student, Scores& teacher, int buffer) {
    const float a = args_.student_scale * float(kLog2e), b = args_.teacher_scale * float(kLog2e);
    const float* of_met = info(buffer);
#pragma unroll
    for (int i = 0; i < 4 * kMetColumns; ++i) {
      float &s = student[i / 4][i % 4], &t = teacher[i / 4][i % 4];
      const int token = i / 4 * 8 + lane_column() + i % 2;
      if constexpr (keys) {
        const Row of = ((const Row*)of_met)[token];
        s = difference_of(of, a * s, b * t);
      } else {
        const float bias = of_met[token];
        s = fmaf(a, s, bias), t = fmaf(b, t, bias);
        if constexpr (look == Look::queries) s = difference_of(rows_[i % 4 / 2], s, t);
      }
    }
    if constexpr (look == Look::values) {
#pragma unroll
      for (int half = 0; half < 2; ++half) count_row(states_[half], student, teacher, half);
    } else if constexpr (sizeof(T) == 4) {
      const T* numbers = met(buffer, 0);
      add_products(
          sums, student, [&](int token, int number) { return numbers[token * kRow + number]; },
          args_.student_size - 64 * of_.panel);
    } else {
      add_products<T, kRow>(sums, student, met(buffer, 0), args_.student_size - 64 * of_.panel);
    }
  }
  // p_s - p_t
  KDFAST_DEVICE static float difference_of(const Row& of, float s, float t) {
    return fmaf(exp2_fast(s - of.max_s), kScale * of.of_s, exp2_fast(t - of.max_t) * (-kScale * of.of_t));
  }
  // The maxima are of the four lanes that have a row, the sums of what each has seen.
  KDFAST_DEVICE static void count_row(RowState<float>& state, const Scores& student, const Scores& teacher, int half) {
    using Terms = KlDiv<ColumnMath>;
    float top_s = state.max_s, top_t = state.max_t;
#pragma unroll
    for (int i = 0; i < 2 * kMetColumns; ++i) {
      top_s = fmaxf(top_s, student[i / 2][2 * half + i % 2]);
      top_t = fmaxf(top_t, teacher[i / 2][2 * half + i % 2]);
    }
    state = referred<Terms>(state, warp_max<4>(top_s), warp_max<4>(top_t), 1.f);
#pragma unroll
    for (int i = 0; i < 2 * kMetColumns; ++i) {
      count<Terms>(state, student[i / 2][2 * half + i % 2], teacher[i / 2][2 * half + i % 2], 1.f);
    }
  }
  // Of the block's queries, whose rows are kept for the gradients. Rows that do not count are zeros.
  KDFAST_DEVICE double value_of(const Head& h) {
    const Tokens queries = h.learned(args_, false);
    double value = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      RowState<float>& state = states_[half];
      state.sum_s = warp_sum<4>(state.sum_s);
      state.sum_t = warp_sum<4>(state.sum_t);
      state.moment_t = warp_sum<4>(state.moment_t);
      const int query = first_of_warp() + lane_row() + 8 * half;
      if (query >= args_.length || threadIdx.x % 4) continue;
      const bool counts = queries.counts(query);
      if (counts) value += KlDiv<RowMath>::loss(state, 1.f, {});
      float* to = args_.rows + (h.index * args_.length + query) * 4;
      to[0] = counts ? state.max_s : 0.f, to[1] = counts ? 1.f / state.sum_s : 0.f;
      to[2] = counts ? state.max_t : 0.f, to[3] = counts ? 1.f / state.sum_t : 0.f;
    }
    return value;
  }

  const QkArgs& args_;
  OwnTokens of_;
  int panels_;
  RowState<float> states_[2];  // of the lane's rows (values)
  Row rows_[2];                // the same (queries)
};

template <class T, Look look>
__global__ void __launch_bounds__(kThreads, 3) relations(const __grid_constant__ QkArgs args) {
  Relations<T, look>(args).run();
}

template <class T>
void launch_typed(const char* op, const Target& target, const QkArgs& args) {
  constexpr int64_t shared = Relations<T, Look::values>::shared_bytes();
  launch(op, relations<T, Look::values>, target, {blocks_of(args, false, false), kThreads, shared}, args);
  if (!args.layer[0].dq) return;
  launch(op, relations<T, Look::queries>, target, {blocks_of(args, false, true), kThreads, shared}, args);
  launch(op, relations<T, Look::keys>, target, {blocks_of(args, true, true), kThreads, shared}, args);
}

}  // namespace

void launch_relations(const char* op, const Target& target, const QkArgs& args) {
  const bool alike = args.student_type == args.teacher_type;
  if (alike && args.student_type == Element::bf16) return launch_typed<BFloat16>(op, target, args);
  if (alike && args.student_type == Element::f16) return launch_typed<Float16>(op, target, args);
  launch_typed<float>(op, target, args);
}

std::vector<NamedKernel> relation_kernels() {
  return {{"qk, rows of softmaxes, float32", (const void*)relations<float, Look::values>},
          {"qk, gradients of softmaxes by queries, float32", (const void*)relations<float, Look::queries>},
          {"qk, gradients of softmaxes by keys, float32", (const void*)relations<float, Look::keys>},
          {"qk, rows of softmaxes, 16 bits", (const void*)relations<BFloat16, Look::values>},
          {"qk, gradients of softmaxes by queries, 16 bits", (const void*)relations<BFloat16, Look::queries>},
          {"qk, gradients of softmaxes by keys, 16 bits", (const void*)relations<BFloat16, Look::keys>}};
}

}  // namespace kdfast::cuda
