// The squared error of scores from the scores themselves, 64 queries by 32 keys at a time: short sequences, causal
// masks and head sizes that differ. Scores are X Y^T of panels (qk_panels.cuh), in products of float32, made once for
// the values and dq and once more for dk: 6 L^2 d multiply-adds, three times as many of tf32. q and k are read L / 64
// times, from L2.
#include "cuda/launch.cuh"
#include "cuda/qk_panels.cuh"
#include "cuda/qk_products.cuh"

namespace kdfast::cuda {
namespace {

using Columns = Panel<64, 4>;
constexpr int64_t kMetBytes = kMet * Columns::kRow * sizeof(float), kOwnBytes = 2 * kMetBytes;
constexpr int64_t kShared = kOwnBytes + kMetBytes + Columns::kCopies;

// A block's own tokens are queries or keys, the others it meets.
template <bool keys, bool gradient>
class SquaredScores {
 public:
  KDFAST_DEVICE explicit SquaredScores(const QkArgs& args)
      : args_(args), of_(args, keys, gradient), panels_((max(args.student_size, args.teacher_size) + 63) / 64) {
    own_ = (float*)shared_memory();
    met_ = (float*)(shared_memory() + kOwnBytes);
    copies_ = shared_memory() + kOwnBytes + kMetBytes;
  }

  // Adds a head's scores to the value, and its part of the gradient to `sums`.
  KDFAST_DEVICE void add_head(const Head& h, Sums& sums, double& value) {
    const Columns met(args_, h, !keys);
    const int begin = args_.causal && keys ? of_.first : 0;
    const int end = args_.causal && !keys ? min(of_.first + kOwn, args_.length) : args_.length;
    const float factor = 2 * h.factor(args_) * (keys ? 1.f : args_.student_scale);
    __syncthreads();  // the head before is done
    take_own(h, panel(0));
    met.copy(copies_, begin, 64 * panel(0));
    for (int token = begin; token < end; token += kMet) {
      Scores scores = {};
      for (int i = 0; i < panels_; ++i) {
        copies_arrived();
        __syncthreads();  // the panels before are multiplied
        met.combine(copies_, met_);
        if (panels_ > 1) take_own(h, panel(i));
        const bool last = i + 1 == panels_;
        if (!last || token + kMet < end) met.copy(copies_, last ? token + kMet : token, 64 * panel(last ? 0 : i + 1));
        __syncthreads();  // they are whole
        add_panel(scores, panel(i));
      }
      if (args_.causal && token + kMet > of_.first) hide(scores, token);
      value += squares(scores);
      if (gradient) add_gradient(sums, scores, factor);
    }
  }

  KDFAST_DEVICE const OwnTokens& place() const { return of_; }

 private:
  // Panels in the order in which that of the gradient comes last: it is there when the scores are.
  KDFAST_DEVICE int panel(int i) const { return (of_.panel + 1 + i) % panels_; }
  KDFAST_DEVICE const float* of_warp() const { return own_ + threadIdx.x / 32 * 16 * Columns::kRow; }

  KDFAST_DEVICE void take_own(const Head& h, int panel) {
    const Columns own(args_, h, keys);
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      own.make(copies_, of_.first + half * kMet, 64 * panel, own_ + half * kMet * Columns::kRow);
    }
  }
  KDFAST_DEVICE void add_panel(Scores& scores, int panel) const {
    const int size = max(args_.student_size, args_.teacher_size) - 64 * panel, depth = min((size + 15) / 16 * 16, 64);
#pragma unroll 1
    for (int side = 0; side < 128; side += 64) {
      add_scores<Columns::kRow>(scores, of_warp() + side, met_ + side, depth);
    }
  }
  // Keys behind their query do not count.
  KDFAST_DEVICE void hide(Scores& scores, int token) const {
    const int first = of_.first + threadIdx.x / 32 * 16;
    each_score(scores, [&](int own, int met, float& x) {
      const int distance = token + met - first - own;
      x = (keys ? -distance : distance) > 0 ? 0.f : x;
    });
  }
  KDFAST_DEVICE static double squares(Scores& scores) {
    float sum = 0.f;
    each_score(scores, [&](int, int, float& x) { sum = fmaf(x, x, sum); });
    return sum;
  }
  KDFAST_DEVICE void add_gradient(Sums& sums, Scores& scores, float factor) const {
    each_score(scores, [&](int, int, float& x) { x *= factor; });
    // a Qs is X's left columns, and their right ones if they are a difference; Ks is Y's left columns.
    const float more = keys && args_.student_size == args_.teacher_size ? 1.f : 0.f;
    add_products(
        sums, scores,
        [&](int token, int number) {
          const float* at = met_ + token * Columns::kRow + number;
          return keys ? fmaf(more, at[64], at[0]) : at[0];
        },
        args_.student_size - 64 * of_.panel);
  }

  const QkArgs& args_;
  OwnTokens of_;
  int panels_;
  float *own_, *met_;
  unsigned char* copies_;
};

template <bool keys, bool gradient>
__global__ void __launch_bounds__(kThreads, 3) squared_scores(const __grid_constant__ QkArgs args) {
  SquaredScores<keys, gradient> scores(args);
  const OwnTokens& own = scores.place();
  Sums sums = {};
  double value = 0;
  for (int i = 0; i < own.share; ++i) {
    const Head h(args, own.head + i);
    if (!h.skipped) scores.add_head(h, sums, value);
  }
  if (gradient) {
    const TokenGradient to(args, Head(args, own.head), keys);
#pragma unroll
    for (int n = 0; n < kOwnColumns; ++n) {
      to.write(own.first + threadIdx.x / 32 * 16, 64 * own.panel + 8 * n, sums[n], 1.f);
    }
  }
  if (!keys && own.panel == 0) write_part(args, own, value);
}

}  // namespace

void launch_scores(const char* op, const Target& target, const QkArgs& args) {
  const bool gradient = args.layer[0].dq;
  launch(op, gradient ? squared_scores<false, true> : squared_scores<false, false>, target,
         {blocks_of(args, false, gradient), kThreads, kShared}, args);
  if (gradient) launch(op, squared_scores<true, true>, target, {blocks_of(args, true, true), kThreads, kShared}, args);
}

std::vector<NamedKernel> score_kernels() {
  return {{"qk, squared scores", (const void*)squared_scores<false, false>},
          {"qk, squared scores and gradients of queries", (const void*)squared_scores<false, true>},
          {"qk, gradients of keys", (const void*)squared_scores<true, true>}};
}

}  // namespace kdfast::cuda
