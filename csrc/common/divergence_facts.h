// The list of the divergences as data.
#pragma once
#include "common/divergence_terms.h"

namespace kdfast {

// What a divergence is, where its terms are not at hand.
struct DivergenceFacts {
  const char* name;
  bool topk, second_look;
  const char* mixing;
  Divergence at_zero, at_one;  // where the mixing is at an end; count: itself
};
inline const DivergenceFacts& facts_of(Divergence kind) {
  struct NoMath {
    using V = double;
    using Real = double;
  };
#define KDFAST_FACTS(name, Terms) \
  {#name,                         \
   Terms<NoMath>::kTopk,          \
   Terms<NoMath>::kSecondLook,    \
   Terms<NoMath>::kMixing,        \
   Terms<NoMath>::kAtZero,        \
   Terms<NoMath>::kAtOne},
  static constexpr DivergenceFacts kFacts[] = {KDFAST_DIVERGENCES(KDFAST_FACTS)};
#undef KDFAST_FACTS
  return kFacts[int(kind)];
}

}  // namespace kdfast
