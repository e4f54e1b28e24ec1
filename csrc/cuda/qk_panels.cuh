// Panels of X = [a Qs - b Qt, b Qt] or Y = [Ks, Ks - Kt] in shared memory, as float: X Y^T = a Qs Ks^T - b Qt Kt^T.
// Head sizes that differ allow no difference: X = [a Qs, -b Qt] and Y = [Ks, Kt].
//
// A panel has `columns` numbers of a token's student beside as many of its teacher. A thread makes what it has copied
// itself, so that the copies of the next panel are under way while this one is multiplied, without a barrier of theirs.
#pragma once
#include "cuda/qk_heads.cuh"

namespace kdfast::cuda {

// left = of_left (s - minus t) + more t; right = of_right s + rest t. Equal tokens and factors leave exact zeros.
struct Combination {
  float of_left, minus, more, of_right, rest;
};
KDFAST_DEVICE Combination combination(const QkArgs& args, bool keys) {
  const float a = args.student_scale, b = args.teacher_scale;
  const bool equal = args.student_size == args.teacher_size;
  if (keys) return {1.f, 0.f, 0.f, equal ? 1.f : 0.f, equal ? -1.f : 1.f};
  return {a, equal ? 1.f : 0.f, equal ? a - b : 0.f, 0.f, equal ? b : -b};
}

// `kMet` tokens, `columns` of either side, in rows of 2 columns + pad.
template <int columns, int pad>
class Panel {
 public:
  static constexpr int kRow = 2 * columns + pad;
  static constexpr int kUnits = kMet * columns / 8 / kThreads;  // of a thread: 8 columns of a token
  static constexpr int kCopies = kUnits * 4 * kThreads * 16;    // bytes that wait to be combined
  static_assert(kMet * columns % (8 * kThreads) == 0);

  KDFAST_DEVICE Panel(const QkArgs& args, const Head& h, bool keys)
      : s_(h.learned(args, keys)), t_(h.taught(args, keys)), with_(combination(args, keys)) {
    // Neighbouring threads copy neighbouring vectors.
    const bool wide = (!s_.vectors || s_.type == Element::f32) && (!t_.vectors || t_.type == Element::f32);
    first_ = threadIdx.x % (columns / 8) * (wide ? 4 : 8);
    second_ = first_ + (wide ? columns / 2 : 4);
  }

  // Starts to copy the tokens from `token` on, numbers from `column` on of either side.
  KDFAST_DEVICE void copy(unsigned char* copies, int token, int column) const {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      unsigned char* to = copies_of(copies, unit);
      copy_side(s_, to, token + token_of(unit), column);
      copy_side(t_, to + 2 * kThreads * 16, token + token_of(unit), column);
    }
  }
  // Makes the panel from this thread's copies, once they have arrived.
  KDFAST_DEVICE void combine(const unsigned char* copies, float* panel) const {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      const unsigned char* from = copies_of((unsigned char*)copies, unit);
      float s[8], t[8], left[8], right[8];
      widen(s_, from, s);
      widen(t_, from + 2 * kThreads * 16, t);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        left[i] = fmaf(with_.of_left, fmaf(-with_.minus, t[i], s[i]), with_.more * t[i]);
        right[i] = fmaf(with_.of_right, s[i], with_.rest * t[i]);
      }
      float* row = panel + token_of(unit) * kRow;
      shared_store16(row + first_, Vector<float>::narrow(left));
      shared_store16(row + second_, Vector<float>::narrow(left + 4));
      shared_store16(row + columns + first_, Vector<float>::narrow(right));
      shared_store16(row + columns + second_, Vector<float>::narrow(right + 4));
    }
  }
  KDFAST_DEVICE void make(unsigned char* copies, int token, int column, float* panel) const {
    copy(copies, token, column);
    copies_arrived();
    combine(copies, panel);
  }

 private:
  KDFAST_DEVICE static int token_of(int unit) { return (unit * kThreads + threadIdx.x) / (columns / 8); }
  KDFAST_DEVICE static unsigned char* copies_of(unsigned char* copies, int unit) {
    return copies + (unit * 4 * kThreads + threadIdx.x) * 16;
  }
  KDFAST_DEVICE void copy_side(const Tokens& of, unsigned char* to, int token, int column) const {
    const bool counts = of.counts(token);
    const int places[2] = {column + first_, column + second_};
    if (!of.vectors) {
#pragma unroll 1
      for (int i = 0; i < 8; ++i) {
        const int place = places[0] + i / 4 * (places[1] - places[0]) + i % 4;
        const float x = counts && place < of.size ? of.load(token, place) : 0.f;
        ((float*)(to + i / 4 * kThreads * 16))[i % 4] = x;
      }
      return;
    }
    const int halves = of.type == Element::f32 ? 2 : 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unsigned char* place = to + half * kThreads * 16;
      if (half >= halves) continue;
      if (counts && places[half] < of.size) {
        copy16_async(place, of.at(token, places[half]));
      } else {
        shared_store16(place, {0, 0, 0, 0});
      }
    }
  }
  KDFAST_DEVICE static void widen(const Tokens& of, const unsigned char* from, float* x) {
    const uint4 v = shared_load16(from);
    if (!of.vectors || of.type == Element::f32) {
      Vector<float>::widen(v, x);
      Vector<float>::widen(shared_load16(from + kThreads * 16), x + 4);
    } else if (of.type == Element::bf16) {
      Vector<BFloat16>::widen(v, x);
    } else {
      Vector<Float16>::widen(v, x);
    }
  }

  Tokens s_, t_;
  Combination with_;
  int first_, second_;  // of the unit's columns, four from each on
};

}  // namespace kdfast::cuda
